"""Language models at full size with random weights: the published configurations of GPT-2 and Qwen2.5-1.5B.

The tokenizer is that of the miniature writer, smaller than the model's vocabulary, as Qwen's own is.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PretrainedConfig, Qwen2Config

from pipelines.tiny import train_writer

CONFIGURATIONS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12),
    "qwen2.5-1.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        rms_norm_eps=1e-6,
        rope_theta=1_000_000.0,
        tie_word_embeddings=True,
    ),
}
PARAMETERS = {"gpt2": 124_439_808, "qwen2.5-1.5b": 1_543_714_304}
"""As published; every one of them is here."""


def save_random(name: str, folder: Path) -> None:
    """A Transformers folder in bfloat16, as the larger models are published."""
    tokenizer = AutoTokenizer.from_pretrained(Path(train_writer.__file__).parent / "writer")
    config = CONFIGURATIONS[name]
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert model.num_parameters() == PARAMETERS[name]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_pairs(path: Path, rows: int) -> None:
    """Captions of the tiny world with a longer and a shorter rewrite."""
    from pipelines.tiny import scenes

    made = [{"prompt": c, "chosen": f"{c}, clean, outlined", "rejected": f"{c}, pale"} for c in scenes.captions(rows, seed=3)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
