"""Which pair comes when, and with which t and noise: functions of a seed and a position, and of nothing else.

A run visits positions 0, 1, 2, ... Position p holds row ``order(p)`` and its own random draws. Because nothing depends on
ranks, workers or batch sizes, the same seed gives the same numbers on any number of processes, and the state of the sampler
is one integer: the next position.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.levels import LevelDistribution, Levels

_STREAMS = {"order": 1, "draw": 2, "validation": 3, "curriculum": 4, "buckets": 5, "kept": 6, "kept levels": 7}


def generator(seed: int, stream: str, *position: int) -> torch.Generator:
    """A CPU generator of its own for one purpose and position (SeedSequence keeps neighbours independent)."""
    state = np.random.SeedSequence([seed, _STREAMS[stream], *position]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def derived_seed(seed: int, *place: int) -> int:
    """A seed in [0, 2**32) of its own for one purpose and position. PyTorch's CPU generator reads no more than 32 bits."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0])


@dataclass(frozen=True)
class Order:
    """Each epoch visits all ``n`` rows once, in a seeded order of its own."""

    n: int
    seed: int

    def row(self, position: int) -> int:
        """The row at a position, in [0, n)."""
        epoch, offset = divmod(position, self.n)
        return int(_permutation(self.n, self.seed, "order", epoch)[offset])

    def visit(self, position: int) -> int:
        """Which visit to its row a position is, from 0: the pass over the rows to which it belongs."""
        return position // self.n


class Curriculum:
    """Easy rows first: the ranking is cut into equal groups, and each stage of the run visits some of them in epochs of its own.

    ``ranking`` lists the rows [0, n), easiest first. Stage k takes the k-th part of ``steps`` optimizer steps of ``global_batch``
    positions each. With ``cumulative`` it draws from groups 0 ... k (Curriculum-DPO, Croitoru et al. 2024, arXiv 2405.13637),
    otherwise from group k alone (Curry-DPO, Pattnaik et al. 2024, arXiv 2403.07230). Positions beyond the run's last step belong
    to the last stage. A stage is a whole number of optimizer steps and visits every row of its own once before any twice.
    """

    def __init__(self, ranking: Sequence[int], stages: int, cumulative: bool, steps: int, global_batch: int, seed: int) -> None:
        if not 1 <= stages <= min(len(ranking), steps):
            raise ValueError(f"{stages} stages need at least as many rows ({len(ranking)}) and steps ({steps})")
        self._ranking, self._cumulative, self._seed = np.asarray(ranking, dtype=np.int64), cumulative, seed
        self._begins = [k * steps // stages * global_batch for k in range(stages)]  # positions
        self._ends = [(k + 1) * len(ranking) // stages for k in range(stages)]  # in the ranking

    def stage(self, position: int) -> int:
        """The stage, from 0, to which a position belongs."""
        return bisect_right(self._begins, position) - 1

    def row(self, position: int) -> int:
        """The row at a position, in [0, n)."""
        k = self.stage(position)
        low, high = 0 if self._cumulative or k == 0 else self._ends[k - 1], self._ends[k]
        epoch, offset = divmod(position - self._begins[k], high - low)
        shuffled = _permutation(high - low, self._seed, "curriculum", epoch * len(self._begins) + k)
        return int(self._ranking[low + int(shuffled[offset])])

    def visit(self, position: int) -> int:
        """A number of the pass over a stage's rows to which a position belongs; passes of different stages may share one."""
        k = self.stage(position)
        low = 0 if self._cumulative or k == 0 else self._ends[k - 1]
        return k + (position - self._begins[k]) // (self._ends[k] - low)


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, stream: str, number: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, stream, number))


@dataclass(frozen=True)
class Draw:
    """The random numbers of one visit to one pair."""

    t: int | float  # a level, as ``Levels`` has them
    noise: Tensor  # [C, H, W], shared by winner and loser
    posterior: Tensor  # [2, C, H, W], samples the VAE's posterior of winner and loser
    flip: bool  # both pictures mirrored
    drop_prompt: bool  # the prompt replaced by ""


def draw(seed: int, position: int, shape: tuple[int, ...], levels: Levels, prompt_dropout: float, flip: bool) -> Draw:
    """The draws at a position of a run; ``shape`` is the latent's [C, H, W]."""
    g = generator(seed, "draw", position)
    return _drawn(g, levels.drawn(g), shape, prompt_dropout, flip)


def _drawn(g: torch.Generator, t: int | float, shape: tuple[int, ...], prompt_dropout: float, flip: bool) -> Draw:
    """The rest of a draw whose level is known."""
    flipped, dropped = (torch.rand(2, generator=g) < torch.tensor([0.5, prompt_dropout])).tolist()
    noise = torch.randn(shape, generator=g)
    posterior = torch.randn((2, *shape), generator=g)
    return Draw(t, noise, posterior, flip and flipped, dropped)


@dataclass(frozen=True)
class FixedDraws:
    """``count`` draws that every row has for good, in place of one for each visit, so that what depends on them can be kept.

    Visit v to a row has its draw ``v mod count``. The levels of a row's draws are of as many equally likely parts of
    ``levels``, in an order of its own, so that each visit has the distribution that a free draw has.
    """

    count: int
    seed: int
    levels: Levels
    prompt_dropout: float = 0.0
    flip: bool = False
    latent_mode: bool = False  # True: the posterior's mean instead of the draw's sample

    def draw(self, row: int, number: int, shape: tuple[int, ...]) -> Draw:
        """Draw ``number``, in [0, count), of a row with latents of ``shape`` [C, H, W]."""
        part = int(torch.randperm(self.count, generator=generator(self.seed, "kept levels", row))[number])
        g = generator(self.seed, "kept", row, number)
        t = self.levels.at((part + float(torch.rand((), generator=g, dtype=torch.float64))) / self.count)
        return _drawn(g, t, shape, self.prompt_dropout, self.flip)

    def describe(self) -> dict[str, Any]:
        """Plain values for a fingerprint; a distribution from outside this package is described by where its draws lie."""
        plain, own = asdict(self), self.levels.distribution
        if type(own) is not LevelDistribution:
            shares = torch.linspace(0.0, 1.0, 65, dtype=torch.float64)[1:-1]
            plain["levels"]["distribution"] |= {"quantiles": own.quantile(shares).tolist()}
        return plain


def fixed_draws(seed: int, row: int, shape: tuple[int, ...], levels: Levels, count: int) -> list[Draw]:
    """``count`` draws for a validation pair, the same at every visit, from as many equally likely parts of ``levels``."""
    g = generator(seed, "validation", row)
    jitter = float(torch.rand((), generator=g))
    t = [levels.at((k + jitter) / count) for k in range(count)]
    return [Draw(t_k, torch.randn(shape, generator=g), torch.zeros((2, *shape)), False, False) for t_k in t]
