"""A prompt, the preferred picture and the other one; a label only where the preference is not certain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffalign.data.pairs import number_from

FORM = "prompt, chosen, rejected"
KIND = "pairs"
PROMPT = "prompt"
IMAGES = ("chosen", "rejected")
REQUIRED = {
    "prompt": ("prompt", "caption", "text"),
    "chosen": ("chosen", "winner", "win", "image_w", "chosen_image", "image_chosen", "winner_image", "preferred", "w"),
    "rejected": ("rejected", "loser", "lose", "image_l", "rejected_image", "image_rejected", "loser_image", "unpreferred", "l"),
}
OPTIONAL = {name: (name,) for name in ("label", "weight", "score_chosen", "score_rejected")}
LABELS = ("label",)
SCORES = ("score_chosen", "score_rejected")


def probability(row: Mapping[str, Any]) -> float:
    """``label``, the probability that ``chosen`` is preferred; 1 where it is missing or empty."""
    value = row.get("label")
    return 1.0 if value is None or value == "" else number_from(value, "label", 0.0, 1.0)
