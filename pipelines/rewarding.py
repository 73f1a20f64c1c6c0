"""Judges in training: they reward what the policy samples, or score the two pictures of every pair.

For the core a judge is a function of latents; here these are decoded and scored by the judges of ``reward_models``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import reward_models
from diffalign.data.kept_values import kept_values
from diffalign.data.pairs import Progress, UnreadableImage
from diffalign.data.table import PairTable
from diffalign.errors import UserError
from diffalign.processes import Processes
from pipelines import own_judges
from pipelines.own_judges import OwnJudge, RewardFunction
from reward_models._judge import Scorer
from reward_models.base import JudgeError

Judges = Mapping[str, OwnJudge]
JUDGED_AT_ONCE, OPEN_AT_ONCE = 512, 64
"""Pairs whose scores are written to the disk together; pairs whose pictures are in memory together."""


class PictureJudge:
    """``diffalign.learner.Judge``: rewards [N, R] of clean latents, one column for each judge.

    ``decode`` turns latents into pictures [n, 3, H, W] in [0, 1], ``batch`` of them at a time.
    """

    def __init__(self, decode: Callable[[Tensor], Tensor], judges: Judges, prompts: Sequence[str], batch: int) -> None:
        self._decode, self._judges, self._prompts, self._batch = decode, judges, prompts, batch

    def __call__(self, latents: Tensor, index: Sequence[int]) -> Tensor:
        """Raises UserError if a judge gives no number for a picture."""
        some = [(latents[low : low + self._batch], index[low : low + self._batch]) for low in range(0, len(index), self._batch)]
        parts = [rewards_of(self._judges, self._decode(part), [self._prompts[i] for i in where]) for part, where in some]
        rewards = torch.cat(parts)
        if not bool(rewards.isfinite().all()):
            row, column = (~rewards.isfinite()).nonzero()[0].tolist()
            name, prompt = list(self._judges)[column], self._prompts[index[row]]
            raise UserError(f"The judge {name} gives no number for a picture of {prompt!r}: it cannot reward training.")
        return rewards


def rewards_of(judges: Judges, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    """[N, R] float64 for pictures [N, 3, H, W] in [0, 1], larger is better. Nothing is cached: no picture comes twice.

    Raises:
        UserError: a judge cannot judge these, or a function gives something else than a number for each picture.
    """
    ours = {name: judge for name, judge in judges.items() if isinstance(judge, Scorer)}
    try:
        scores = reward_models.score(ours, list(pictures), list(prompts), cache=False, progress=False) if ours else {}
    except JudgeError as error:
        raise UserError(f"Pictures cannot be rewarded: {error}.") from error
    scores |= {name: _asked(name, judge, pictures, prompts) for name, judge in judges.items() if name not in ours}
    columns = [torch.as_tensor(scores[name]).double() * direction(judge) for name, judge in judges.items()]
    return torch.stack(columns, dim=1)


def _asked(name: str, judge: RewardFunction, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    said = judge(pictures, list(prompts))
    if isinstance(said, tuple) and len(said) == 2 and isinstance(said[1], Mapping):
        said = said[0]
    try:
        numbers = torch.as_tensor(said).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"The function {name} should give numbers; it gave {type(said).__name__} ({error}).") from error
    if numbers.shape != (len(prompts),):
        raise UserError(
            f"The function {name} should give {len(prompts)} numbers, one for each picture; got {list(numbers.shape)}."
        )
    return numbers


def direction(judge: OwnJudge) -> float:
    """1 where larger is better, as it is of functions; -1 where smaller is."""
    return -1.0 if isinstance(judge, Scorer) and not judge.info.higher_is_better else 1.0


def pair_scores(
    table: PairTable,
    rows: Sequence[int],
    judge: Mapping[str, Scorer],
    directory: Path,
    processes: Processes,
    progress: Progress | None = None,
) -> Tensor:
    """[len(rows), 2] float32: one judge's scores of winner and loser of ``rows`` of the table.

    All ``processes`` must call it: they share the work. What was judged before is read from a folder in ``directory``, that of
    the encoded pairs, which bears the judge's fingerprint.

    Raises:
        UserError: a picture cannot be judged.
    """
    (scorer,) = judge.values()
    folder = directory / f"scores-{own_judges.judge_digest(scorer)}"
    how = {"processes": processes, "progress": progress, "stage": "judging", "at_once": JUDGED_AT_ONCE}
    found = kept_values(lambda part: _judged(table, rows[part.start : part.stop], judge), len(rows), folder, **how)
    return torch.from_numpy(found)


def _judged(table: PairTable, rows: Sequence[int], judge: Mapping[str, Scorer]) -> np.ndarray:
    """[n, 2] float32, larger is better."""
    found, (scorer,) = [], judge.values()
    for low in range(0, len(rows), OPEN_AT_ONCE):
        pairs = [table[int(row)] for row in rows[low : low + OPEN_AT_ONCE]]
        shown = [(source, pair.prompt) for pair in pairs for source in (pair.winner, pair.loser)]
        try:
            pictures, prompts = [source.open() for source, _ in shown], [prompt for _, prompt in shown]
            found += reward_models.score(judge, pictures, prompts, progress=False).values()
        except (JudgeError, UnreadableImage) as error:
            raise UserError(f"{table.description} cannot be judged: {error}.") from error
    return (direction(scorer) * torch.cat(found)).float().view(-1, 2).numpy()


def score_range(scores: Any) -> tuple[float, float] | None:
    """The least and the greatest of scores [N, 2] that may hold NaN; None if there are none."""
    if scores is None:
        return None
    known = torch.as_tensor(scores)
    known = known[~known.isnan()]
    low, high = (float(known.min()), float(known.max())) if known.numel() else (math.nan, math.nan)
    return (low, high) if low < high else None
