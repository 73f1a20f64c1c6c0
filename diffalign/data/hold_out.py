"""Which rows are kept out of training."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np


def split_rows(prompts: Sequence[Hashable] | np.ndarray, validation_pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows for training and for validation, int64 and ascending; a prompt is in one of them only, and at most half of the rows
    are held out. ``prompts`` are texts, or numbers from 0 on for them (``PairCache.prompt_numbers``), which take less memory.
    They are told apart to the letter, as they are encoded: "A cat" is another prompt than "a cat".
    """
    group = _by_appearance(prompts)
    sizes = np.bincount(group)
    left, held_out = min(validation_pairs, len(group) // 2), np.zeros(len(sizes), dtype=bool)
    for k in np.random.default_rng([seed, 7]).permutation(len(sizes)):
        if sizes[k] <= left:
            held_out[k], left = True, left - sizes[k]
        if not left:
            break
    return np.flatnonzero(~held_out[group]), np.flatnonzero(held_out[group])


def shortfall(asked: int, held_out: int, rows: int, kind: str) -> str | None:
    """Why fewer rows are held out than the settings say; None where there are as many. ``kind`` is what the rows are called."""
    if held_out >= asked:
        return None
    return (
        f"--validation-pairs {asked} holds out {held_out} of {rows} {kind}: no more than half of them are, "
        f"and {kind} of one prompt stay together"
    )


def _by_appearance(things: Sequence[Hashable] | np.ndarray) -> np.ndarray:
    """int64 [N]: 0 for the first value and all that equal it, 1 for the next that differs from it, and so on."""
    if not isinstance(things, np.ndarray):
        number: dict[Hashable, int] = {}
        return np.array([number.setdefault(thing, len(number)) for thing in things], dtype=np.int64)
    numbers = np.asarray(things)
    first = np.full(numbers.max(initial=-1) + 1, len(numbers))
    first[numbers[::-1]] = np.arange(len(numbers))[::-1]  # what is assigned last stays
    seen = np.flatnonzero(first < len(numbers))
    rank = np.empty(len(first), dtype=np.int64)
    rank[seen[np.argsort(first[seen], kind="stable")]] = np.arange(len(seen))
    return rank[numbers]
