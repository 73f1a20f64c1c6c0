"""What the families' encoders share: fingerprints of networks and tokenizers, and what a tokenizer cuts off."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.digests import digest_of
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
    return digest_of([rules, tokenizer.pad_token_id])


def tokenized(tokenizer: Any, prompts: Sequence[str], length: int | None = None) -> Any:
    """``input_ids`` and ``attention_mask`` [B, length], padded and cut to ``length`` (``model_max_length`` if not given)."""
    length = tokenizer.model_max_length if length is None else length
    return tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")


def about_clip(text_encoder: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """What the states of a CLIP text encoder depend on."""
    settings = text_encoder.config
    return {
        "text_encoder": digest(text_encoder),
        "text_activation": settings.hidden_act,
        "text_shape": [settings.num_hidden_layers, settings.num_attention_heads],
        "tokenizer": tokenizer_digest(tokenizer),
        "tokens": tokenizer.model_max_length,
    }


def about_t5(text_encoder: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """What the states of a T5 encoder depend on."""
    names = ("feed_forward_proj", "num_heads", "relative_attention_num_buckets", "relative_attention_max_distance")
    return {
        "text_encoder": digest(text_encoder),
        "text_settings": [getattr(text_encoder.config, name) for name in names],
        "tokenizer": tokenizer_digest(tokenizer),
    }


def about_language_model(text_encoder: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """What the states of a language model (Gemma, Qwen) depend on."""
    about = {**text_encoder.config.to_dict(), "dtype": None, "transformers_version": None, "architectures": None}
    settings = {name: value for name, value in about.items() if not name.startswith("_")}
    return {
        "text_encoder": digest(text_encoder),
        "text_settings": digest_of(settings)[:16],
        "tokenizer": tokenizer_digest(tokenizer),
    }


def default_length(pipeline: Any) -> int:
    """Tokens of a prompt that a pipeline's ``encode_prompt`` reads if nothing else is said."""
    return inspect.signature(type(pipeline).encode_prompt).parameters["max_sequence_length"].default


def truncated_prompts(
    tokenizer: Any,
    prompts: Sequence[str],
    limit: int | None = None,
    plain: Callable[[Sequence[str]], list[str]] = list,
    tail: str = "",
) -> list[TruncatedPrompt]:
    """The prompts with more than ``limit`` tokens (``model_max_length`` if not given), in order.

    ``plain`` is what is done to prompts before the tokenizer sees them, and ``tail`` what it puts after them.
    """
    if not prompts:
        return []
    limit = tokenizer.model_max_length if limit is None else limit
    with quietly():  # "longer than the maximum length" is what is asked here
        ids = tokenizer(plain(prompts)).input_ids
    cut = [(prompt, row) for prompt, row in zip(prompts, ids, strict=True) if len(row) > limit]
    return [TruncatedPrompt(prompt, _lost(tokenizer, row, limit).removesuffix(tail).strip(), len(row)) for prompt, row in cut]


def _lost(tokenizer: Any, row: list[int], limit: int) -> str:
    """What a tokenizer leaves out of these ids to keep ``limit``, an end mark always among those that it keeps."""
    marks = int(row[-1] == tokenizer.eos_token_id)
    return tokenizer.decode(row[limit - marks : len(row) - marks])
