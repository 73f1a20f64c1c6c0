"""What comes with the package, by name. Imports nothing heavy: commands that only read data ask here."""

from __future__ import annotations

from pathlib import Path

NAME = "tiny"
CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Stable Diffusion in miniature, a folder in the usual Diffusers layout."""
FLOW = Path(__file__).parent / "flow_checkpoint"
"""Stable Diffusion 3 in miniature, without T5, in the same layout."""
CHECKPOINTS = {NAME: CHECKPOINT, "tiny-flow": FLOW}
"""By the names that commands know them by."""
PAIRS = Path(__file__).parent / "pairs.parquet"
"""The preference pairs of the tiny world, in the format of Pick-a-Pic v2."""
REWRITES = Path(__file__).parent / "rewrites.parquet"
"""Preferences between rewrites of the tiny world's captions. People who weigh style nine to one against content chose, so that
more than a third of the preferred rewrites mean something else. ``diffalign prompts build`` makes them, with the writer of
``diffalign prompts sft --recipe tiny --output runs/sft``: ``--prompts tiny --count 400 --writer runs/sft --generator tiny
--judges oracle --judge-options oracle.taste_weight=0.9 --embedding tiny --ways sample --steps 15 --guidance-scale 4
--batch-size 32 --max-rewrite-tokens 48``."""


def pairs_called(where: str) -> str:
    """``tiny`` names the shipped pairs; anything else is taken as it is."""
    return str(PAIRS) if where == NAME else where
