"""Which rows are kept out of training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def split_rows(prompts: Sequence[str], validation_pairs: int, seed: int) -> tuple[list[int], list[int]]:
    """Rows for training and for validation; a prompt is in one of them only, and at most half of the rows are held out."""
    wanted = min(validation_pairs, len(prompts) // 2)
    rows_of: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(prompt, []).append(row)
    order = np.random.default_rng([seed, 7]).permutation(len(rows_of))
    groups, held_out = list(rows_of.values()), set()
    for k in order:
        if len(held_out) + len(groups[k]) <= wanted:
            held_out.update(groups[k])
    return [r for r in range(len(prompts)) if r not in held_out], sorted(held_out)
