"""Pick-a-Pic v1 and v2 (Kirstain et al. 2023, arXiv 2305.01569): two pictures and who won, as 1, 0 or 1/2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffalign.data.pairs import flag_from, number_from

FORM = "Pick-a-Pic columns"
KIND = "pairs"
PROMPT = "caption"
IMAGES = ("jpg_0", "jpg_1")
REQUIRED = {name: (name,) for name in ("jpg_0", "jpg_1", "label_0", "caption")}
OPTIONAL = {name: (name,) for name in ("label_1", "has_label", "weight", "score_0", "score_1")}
LABELS = ("label_0", "label_1", "has_label")
SCORES = ("score_0", "score_1")


def probability(row: Mapping[str, Any]) -> float | None:
    """``label_0``; None where ``has_label`` is false. ``label_1``, where there is one, must be its complement."""
    if flag_from(row.get("has_label"), "has_label") is False:
        return None
    first = number_from(row["label_0"], "label_0", 0.0, 1.0)
    if row.get("label_1") not in (None, ""):
        second = number_from(row["label_1"], "label_1", 0.0, 1.0)
        if abs(first + second - 1.0) > 1e-4:
            raise ValueError(f"label_0 is {first:g} and label_1 is {second:g}; they must add up to 1")
    return first
