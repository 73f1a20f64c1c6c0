"""Judges at work in training: they reward what the policy samples, or score the two pictures of every pair.

The core knows a judge as a function of latents; here they are decoded, shown to the judges of ``reward_models``, and forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import reward_models
from diffalign.data.pairs import Progress, UnreadableImage
from diffalign.data.table import PairTable
from diffalign.errors import UserError
from reward_models._judge import Scorer
from reward_models.base import JudgeError


class PictureJudge:
    """``diffalign.learner.Judge``: rewards [N, R] of clean latents, one column for each judge.

    ``decode`` turns latents into pictures [n, 3, H, W] in [0, 1], ``batch`` of them at a time.
    """

    def __init__(
        self, decode: Callable[[Tensor], Tensor], judges: Mapping[str, Scorer], prompts: Sequence[str], batch: int
    ) -> None:
        self._decode, self._judges, self._prompts, self._batch = decode, judges, prompts, batch

    def __call__(self, latents: Tensor, index: Sequence[int]) -> Tensor:
        """Raises UserError if a judge gives no number for a picture."""
        pictures = torch.cat([self._decode(part) for part in latents.split(self._batch)])
        rewards = rewards_of(self._judges, pictures, [self._prompts[i] for i in index])
        if not bool(rewards.isfinite().all()):
            row, column = (~rewards.isfinite()).nonzero()[0].tolist()
            name, prompt = list(self._judges)[column], self._prompts[index[row]]
            raise UserError(f"The judge {name} gives no number for a picture of {prompt!r}: it cannot reward training.")
        return rewards


def rewards_of(judges: Mapping[str, Scorer], pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    """[N, R] float64 for pictures [N, 3, H, W] in [0, 1]. Nothing is cached: no picture comes twice."""
    try:
        scores = reward_models.score(judges, list(pictures), list(prompts), cache=False, progress=False)
    except JudgeError as error:
        raise UserError(f"Pictures cannot be rewarded: {error}.") from error
    return torch.tensor([list(scores[name]) for name in judges], dtype=torch.float64).T


def pair_scores(
    table: PairTable, rows: Sequence[int], judge: Mapping[str, Scorer], progress: Progress | None, at_once: int = 64
) -> Tensor:
    """[len(rows), 2] float32: one judge's scores of winner and loser; remembered between runs by the judges' own cache.

    Raises:
        UserError: a picture cannot be judged.
    """
    out = []
    for low in range(0, len(rows), at_once):
        pairs = [table[int(row)] for row in rows[low : low + at_once]]
        shown = [(source, pair) for pair in pairs for source in (pair.winner, pair.loser)]
        try:
            pictures = [source.open() for source, _ in shown]
            scores = reward_models.score(judge, pictures, [pair.prompt for _, pair in shown], progress=False)
        except (JudgeError, UnreadableImage) as error:
            raise UserError(f"{table.description} cannot be judged: {error}.") from error
        out += next(iter(scores.values())).tolist()
        if progress:
            progress("judging", low + len(pairs), len(rows))
    return torch.tensor(out, dtype=torch.float32).view(-1, 2)


def score_range(scores: Any) -> tuple[float, float] | None:
    """The least and the greatest of scores [N, 2] that may hold NaN; None if there are none."""
    if scores is None:
        return None
    known = torch.as_tensor(scores)
    known = known[~known.isnan()]
    low, high = (float(known.min()), float(known.max())) if known.numel() else (math.nan, math.nan)
    return (low, high) if low < high else None
