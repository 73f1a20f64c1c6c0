"""How the shipped miniature writer was made: ``diffalign world train-writer --output DIR``.

A genuine GPT-2 (Radford et al. 2019) of about 400 thousand parameters with a byte-level tokenizer of its own, pretrained as a
plain language model on the tiny world's words, captions of its train split among them. As on pages of the web, what is said once
is often said again: a page holds one subject, captioned up to three times in different styles, or some words in any order, two
or three times. That is where a language model learns to repeat what it has read, which is most of what a writer of prompts has
to do; of prompts and rewrites it has seen nothing.

B = batch, S = places in a row (``CONTEXT``).
"""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from diffalign.optimisation import OptimizerSettings, build_optimizer, build_schedule
from diffalign.written_aside import folder_aside
from pipelines.tiny import model, scenes
from pipelines.tiny.settings import WriterTraining

Say = Callable[[str], None]

END = "<|endoftext|>"
CONTEXT = 128
"""Three captions of the longest kind take 75 places."""
MOST_TOKENS = 600
WORDS_IN_LIST = (3, 14)
"""The fewest and the most words on a line of a page without captions."""
_UNSEEN = -100
"""A target that no loss is taken of; PyTorch's own number for it."""


# --------------------------------------------------------------------------------------------------------------- the parts


def build_tokenizer() -> GPT2Tokenizer:
    """GPT-2's tokenizer in which each word of the world is one token, with or without a space before it; the rest are bytes.

    Like GPT-2's it has one special token, which ends a text, and none for padding.
    """
    words = [*_words(), "Rephrase"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=MOST_TOKENS - 1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([text for word in words for text in (word, f" {word}")], trainer)
    learnt = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    symbols = [*sorted(alphabet), *("".join(pair) for pair in merges), END]
    return GPT2Tokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=merges, model_max_length=CONTEXT)


def _words() -> list[str]:
    return [word for word in model.vocabulary() if word.isalpha()]


def build_writer(tokenizer: GPT2Tokenizer) -> GPT2LMHeadModel:
    """GPT-2 in miniature with random weights, but for one head that looks back; no dropout, since there is no end of captions.

    The spread of the weights is one over the root of the width: GPT-2's own is for eight times that width.
    """
    end, width = tokenizer.eos_token_id, 96
    size = {"n_positions": CONTEXT, "n_embd": width, "n_layer": 3, "n_head": 4, "initializer_range": width**-0.5}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    writer = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **size, **none))
    look_back(writer)
    return writer


@torch.no_grad()
def look_back(writer: GPT2LMHeadModel) -> None:
    """Let the first head of the first layer begin by looking at the place before; training may change it like everything else.

    Repeating takes two heads, one that notes what came before each word, and one that finds where the present word was noted
    (Olsson et al. 2022, arXiv 2209.11895). Large models find both by themselves; in the minutes that this one has, not even
    the first was found. Places are sines and cosines in the head's dimensions, so that the place before is a rotation.
    """
    amplitude, sharpness = 0.4, 3.0  # of the places' waves, and of the looking
    attention, places = writer.transformer.h[0].attn, writer.transformer.wpe.weight  # places: [S, D]
    head, width = attention.head_dim, places.shape[1]
    turn = 2 * torch.pi / torch.from_numpy(np.geomspace(3.0, 200.0, head // 2)).float()
    angle = torch.arange(len(places))[:, None] * turn
    places[:, :head] = amplitude * torch.cat([angle.sin(), angle.cos()], dim=1)
    cos, sin = turn.cos().diag(), turn.sin().diag()
    weight = attention.c_attn.weight  # [D, 3 D]: queries, keys, values
    weight[:, :head] = weight[:, width : width + head] = 0.0
    weight[:head, :head] = sharpness * torch.cat([torch.cat([cos, sin], dim=1), torch.cat([-sin, cos], dim=1)])
    weight[:head, width : width + head] = sharpness * torch.eye(head)


# ------------------------------------------------------------------------------------------------------------------- pages


def draw_page(rng: np.random.Generator, captions: int, styled: float) -> str:
    """One subject of the train split captioned one to ``captions`` times, a line each; a share ``styled`` with style words."""
    _, plain = scenes.draw_captioned(rng, "train", styled=0.0)
    lines = []
    for _ in range(int(rng.integers(1, captions + 1))):
        words = scenes.style_words(scenes.draw_style(rng), rng) if rng.random() < styled else []
        lines.append(", ".join([plain, *words]))
    return "\n".join(lines)


def draw_list(rng: np.random.Generator) -> str:
    """Words of the world in any order, the same two or three times, a line each."""
    fewest, most = WORDS_IN_LIST
    line = " ".join(str(word) for word in rng.choice(_words(), int(rng.integers(fewest, most + 1))))
    return "\n".join([line] * int(rng.integers(2, 4)))


def pages(config: WriterTraining, tokenizer: GPT2Tokenizer) -> Iterator[list[int]]:
    """Token ids of freshly drawn pages without end, each closed by the end mark."""
    rng = np.random.default_rng(config.seed)
    while True:
        listed = rng.random() < config.lists
        page = draw_list(rng) if listed else draw_page(rng, config.captions, config.styled)
        yield [*tokenizer(page).input_ids, tokenizer.eos_token_id]


def rows(source: Iterable[list[int]], end: int) -> Iterator[list[int]]:
    """Whole pages after one another for as long as ``CONTEXT + 1`` ids hold them.

    Every second row begins with the end mark, as if another page had gone before: a writer is asked to go on from a prompt
    with nothing before it, and to write from nothing but that mark.
    """
    row, marked = [end], True
    for page in source:
        if len(row) + len(page) > CONTEXT + 1:
            yield row
            marked = not marked
            row = [end] if marked else []
        row = row + page


def as_batch(some: Sequence[list[int]], end: int) -> tuple[Tensor, Tensor]:
    """Ids [B, S] and for each the one that follows it [B, S], padded at the right to the longest row."""
    longest = max(map(len, some))
    ids = torch.tensor([row + [end] * (longest - len(row)) for row in some])
    targets = torch.tensor([row[1:] + [_UNSEEN] * (longest - len(row)) for row in some])
    return ids[:, :-1], targets


def caption_loss(writer: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats."""
    return F.cross_entropy(writer(input_ids=ids, use_cache=False).logits.transpose(1, 2), targets, ignore_index=_UNSEEN)


@torch.no_grad()
def perplexity(writer: nn.Module, tokenizer: GPT2Tokenizer, captions: Sequence[str]) -> float:
    """exp of the mean loss per token of captions that stand alone, the end mark counted."""
    end = tokenizer.eos_token_id
    ids, targets = as_batch([[end, *tokenizer(text).input_ids, end] for text in captions], end)
    return float(caption_loss(writer, ids, targets).exp())


# ---------------------------------------------------------------------------------------------------------------- training


def train(output: Path, config: WriterTraining, say: Say = print) -> None:
    """Pretrain and write ``output`` as a Transformers folder with half-precision weights and ``training.json``."""
    torch.manual_seed(config.seed)
    tokenizer, start = build_tokenizer(), time.perf_counter()
    writer = build_writer(tokenizer).train()
    end = tokenizer.eos_token_id
    settings = OptimizerSettings(
        learning_rate=config.learning_rate, beta2=0.98, weight_decay=0.05, schedule="cosine", warmup_steps=config.steps // 20
    )
    optimizer = build_optimizer(writer.parameters(), settings)
    schedule, smooth = build_schedule(optimizer, config.steps, settings), None
    source = rows(pages(config, tokenizer), end)
    for step in range(1, config.steps + 1):
        loss = caption_loss(writer, *as_batch([next(source) for _ in range(config.batch)], end))
        loss.backward()
        nn.utils.clip_grad_norm_(writer.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if step % 100 == 0 or step == config.steps:
            say(f"{step}/{config.steps} loss {smooth:.4f} {time.perf_counter() - start:.0f} s")
    save(output, writer.eval(), tokenizer, _record(config, writer, tokenizer, time.perf_counter() - start))
    say(f"saved {output}")


def save(output: Path, writer: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, record: dict[str, Any]) -> None:
    """Half-precision weights that load as float32 (Transformers goes by the dtype in the configuration), and the tokenizer."""
    with folder_aside(output) as folder:
        half, end = copy.deepcopy(writer).half(), tokenizer.eos_token_id
        half.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
        half.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "dtype": "float32"}, indent=2) + "\n")
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def _record(config: WriterTraining, writer: nn.Module, tokenizer: GPT2Tokenizer, seconds: float) -> dict[str, Any]:
    held_out = scenes.captions(200, seed=config.seed, split="validation")
    return {
        "command": "diffalign world train-writer --output DIR",
        "config": asdict(config),
        "parameters": sum(p.numel() for p in writer.parameters()),
        "perplexity_validation": round(perplexity(writer, tokenizer, held_out), 3),
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()} CPU",
        "versions": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
    }
