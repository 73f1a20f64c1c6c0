"""CLIPs of two layers with random weights, in open_clip's layout: what the tests of judges on CLIP load."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image

from reward_models import _clip

GELU = _clip.Architecture((48, 96, 2, 3), (32, 64, 2, 2), 24, "gelu")
QUICK = _clip.Architecture((48, 96, 2, 3), (32, 64, 2, 2), 24, "quick_gelu")
PROMPTS = ["a red circle", "a blue star on a black background", "it’s a “small” cross"]


def original(quick: bool = False) -> CLIP:
    """open_clip's own model of that shape, random, with a temperature of 100."""
    torch.manual_seed(1)
    vision = CLIPVisionCfg(layers=2, width=48, head_width=16, mlp_ratio=2.0, patch_size=14, image_size=224)
    text = CLIPTextCfg(context_length=77, vocab_size=49408, width=32, heads=2, layers=2, mlp_ratio=2.0)
    model = CLIP(24, vision, text, quick_gelu=quick).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.logit_scale.fill_(float(np.log(100.0)))
    return model


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(2)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((64, 64), (100, 61), (230, 300))]


def write_tokenizer(folder: Path) -> None:
    """CLIP's vocabulary, which comes with open_clip, as Transformers' tokenizer."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    theirs = SimpleTokenizer()
    merges = [pair for pair, _ in sorted(theirs.bpe_ranks.items(), key=lambda item: item[1])]
    marks = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {marks.get(word, word): number for word, number in theirs.encoder.items()}
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77).save_pretrained(folder)


def exchange_words(tokenizer: Path, one: str, other: str) -> None:
    """Exchange the numbers of two words in a ``tokenizer.json``."""
    told = json.loads(tokenizer.read_text())
    words = told["model"]["vocab"]
    words[one], words[other] = words[other], words[one]
    tokenizer.write_text(json.dumps(told))
