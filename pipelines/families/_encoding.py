"""What the families' encoders share: fingerprints of networks and tokenizers, and what a tokenizer cuts off."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.families._quiet import quietly


@dataclass(frozen=True)
class TruncatedPrompt:
    """A prompt that is longer than the text encoder can read."""

    prompt: str
    lost: str  # the end that the model will not see
    tokens: int  # length with start and end marks


def digest(*networks: nn.Module | None) -> str:
    """sha256 over names, shapes and values (as float32) of the networks' tensors, one tensor at a time."""
    return digest_tensors(*(network.state_dict() for network in networks if network is not None))


def digest_tensors(*named: Mapping[str, Tensor]) -> str:
    """The same of tensors by name."""
    sha = hashlib.sha256()
    for tensors in named:
        for name, tensor in sorted(tensors.items()):
            value = tensor.detach().to("cpu", torch.float32).contiguous()
            sha.update(f"{name} {tuple(value.shape)}\n".encode())
            sha.update(value.numpy().data)
    return sha.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of everything that decides the token ids of a text, except the length limit."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for changing in ("truncation", "padding"):  # set anew by every call
        rules.pop(changing, None)
    text = json.dumps([rules, tokenizer.pad_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def truncated_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[TruncatedPrompt]:
    """The prompts with more than ``model_max_length`` tokens, in order."""
    if not prompts:
        return []
    limit = tokenizer.model_max_length
    with quietly():  # "longer than the maximum length" is what is asked here
        ids = tokenizer(list(prompts)).input_ids
    cut = [(prompt, row) for prompt, row in zip(prompts, ids, strict=True) if len(row) > limit]
    return [TruncatedPrompt(prompt, tokenizer.decode(row[limit - 1 : -1]).strip(), len(row)) for prompt, row in cut]
