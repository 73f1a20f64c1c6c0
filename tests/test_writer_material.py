"""What the tests of writers are made of: byte-level BPE tokenizers and small random models of genuine classes.

The tests at the end see that each is the odd case it is meant to be.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pipelines.writers.templates import template_for
from pipelines.writers.writer import Writer

BEGIN, END, TURN, TURN_END = "<s>", "</s>", "<|im_start|>", "<|im_end|>"
CAPTIONS = (
    "a red circle on a blue background",
    "two small green squares beside a large yellow star",
    "a cat Rephrase: a fluffy cat, soft light, highly detailed, oil painting",
    "Rewrite this prompt for a text-to-image model. Keep what it means and make the picture better.",
)
PROMPTS = ("a cat", "two small green squares beside a large yellow star", "a red circle on a blue background")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen's and SmolLM's manner: turns end in a mark that need not be the tokenizer's end mark."""
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Llama 2's manner: with the begin mark, a space before the answer, and the tokenizer's end mark after it."""


@cache
def _bpe(begin: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, marks = pre_tokenizers.ByteLevel.alphabet(), [BEGIN, END, TURN, TURN_END]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=marks, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS * 3, trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    return tokenizer.to_str()


def tokenizer(*, begin: bool = False, end: str | None = END, chat: str | None = None) -> PreTrainedTokenizerFast:
    """``begin``: it puts a begin mark before every text. ``end``: its end mark. ``chat``: its chat template."""
    others = [mark for mark in (TURN, TURN_END) if mark != end]
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe(begin)), bos_token=BEGIN, eos_token=end, additional_special_tokens=others
    )
    made.chat_template = chat
    return made


def model(kind: str = "gpt2", *, context: int = 128, extra: int = 0, seed: int = 0, **config: Any) -> PreTrainedModel:
    """One of ``gpt2``, ``llama``, ``qwen2``, with ``extra`` more outputs than tokens and weights far from zero."""
    # AutoTokenizer takes whatever lies beside a Qwen2 for a Qwen2Tokenizer, which adds a token of its own
    vocabulary = len(tokenizer()) + extra + (kind == "qwen2")
    marks = {"bos_token_id": 0, "eos_token_id": 1}
    sizes = {"vocab_size": vocabulary, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2} | marks
    torch.manual_seed(seed)
    if kind == "gpt2":
        made = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=context, initializer_range=0.3, **config))
    else:
        heads = {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": context, "initializer_range": 0.3}
        settings = sizes | heads | config
        made = LlamaForCausalLM(LlamaConfig(**settings)) if kind == "llama" else Qwen2ForCausalLM(Qwen2Config(**settings))
    return made.eval()


def writer(
    kind: str = "gpt2", *, template: str = "auto", context: int = 128, extra: int = 0, seed: int = 0, **about: Any
) -> Writer:
    """A writer built in memory; ``about`` is of its tokenizer."""
    words = tokenizer(**about)
    return Writer(model(kind, context=context, extra=extra, seed=seed), words, template_for(template, words))


# ------------------------------------------------------------------------------------------------------------- the odd cases


def test_the_tokenizers_are_what_they_are_called() -> None:
    assert tokenizer()("a cat").input_ids == tokenizer(begin=True)("a cat").input_ids[1:]
    assert tokenizer(begin=True)("a cat").input_ids[0] == 0
    assert tokenizer(end=None).eos_token_id is None
    assert tokenizer(end=TURN_END).eos_token_id == 3
    assert tokenizer().decode(tokenizer()("a fluffy cat, 50 % ö").input_ids) == "a fluffy cat, 50 % ö"


@pytest.mark.parametrize(
    "kind, name", [("gpt2", "GPT2LMHeadModel"), ("llama", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM")]
)
def test_the_models_are_genuine_and_decided(kind: str, name: str) -> None:
    made = model(kind)
    logits = made(torch.arange(4, 12)[None]).logits[0]
    assert type(made).__name__ == name
    assert logits.std(dim=1).min() > 0.5  # far from uniform, so that what is sampled depends on what is read
    assert len(set(logits.argmax(dim=1).tolist())) > 3
