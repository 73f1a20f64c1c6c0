"""A prompt and one picture: an expert's work, a winner without its loser, or a thumb up or down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffalign.data.pairs import number_from

FORM = "prompt, image"
KIND = "pictures"
PROMPT = "prompt"
IMAGES = ("image", "image")
REQUIRED = {
    "prompt": ("prompt", "caption", "text"),
    "image": ("image", "jpg", "picture", "img", "png", "image_path", "file_name", "filename", "path"),
}
OPTIONAL = {name: (name,) for name in ("label", "weight", "score")}
LABELS = ("label",)
SCORES = ("score", "score")


def probability(row: Mapping[str, Any]) -> float:
    """``label``, the probability that the picture is wanted; 1 where it is missing or empty."""
    value = row.get("label")
    return 1.0 if value is None or value == "" else number_from(value, "label", 0.0, 1.0)
