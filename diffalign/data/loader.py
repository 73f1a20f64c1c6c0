"""From the cache to batches: rows, draws and stacking, one step ahead of the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol, overload

import numpy as np
import torch
from torch import Tensor

from diffalign.data.ahead import Stopwatch
from diffalign.data.buckets import BucketOrder
from diffalign.data.draws import Curriculum, Draw, Order, draw, fixed_draws
from diffalign.errors import UserError
from diffalign.levels import Levels
from diffalign.types import Conditioning, PairBatch, pinned


class EncodedPairs(Protocol):
    """The part of the cache (``data.cache.PairCache``) that the loader uses."""

    labels: Sequence[float]
    weights: Sequence[float]
    scores: Tensor | None  # [N, 2] float32 of winner and loser, NaN where there is none; may be missing altogether
    latent_shape: tuple[int, ...]
    buckets: bool  # whether pairs have shapes of their own, which ``shape_of`` and ``bucket_numbers`` tell; may be missing

    def __len__(self) -> int: ...

    def moments(self, pair_index: int, side: str, flipped: bool) -> tuple[Tensor, Tensor]: ...

    def framing(self, pair_index: int, side: str, flipped: bool) -> Tensor: ...  # [6]; may be missing altogether

    def conditioning(self, pair_index: int | None) -> Conditioning: ...


class CachedVisits(Protocol):
    """The part of cached errors (``data.cached_errors.CachedErrors``) that the loader uses."""

    def visited(self, row: int, visit: int, shape: tuple[int, ...]) -> tuple[Draw, Tensor]: ...


@dataclass(frozen=True)
class LoaderSettings:
    """``batch_size`` counts pairs per process and micro-step; ``accumulation`` micro-steps make one optimizer step."""

    batch_size: int
    accumulation: int = 1
    seed: int = 0
    prompt_dropout: float = 0.0
    flip: bool = False
    latent_mode: bool = False  # True: the posterior's mean instead of a sample
    levels: Levels = Levels()  # of the schedule (``Schedule.levels``)
    curriculum: Literal["none", "margin"] = "none"  # margin: pairs that a judge tells apart most clearly come first
    curriculum_stages: int = 5
    curriculum_cumulative: bool = True  # later stages keep the pairs of the earlier ones
    steps: int = 0  # optimizer steps of the whole run; only a curriculum asks


class PairLoader:
    """Batches by optimizer step: ``steps(start, stop)`` yields lists of ``accumulation`` micro-batches.

    ``rows`` restricts training to some rows of the cache (the rest is validation). The global batch of a step is cut into
    contiguous parts, one per process, so the union over processes does not depend on their number. With ``cached_errors``, pairs
    visit the draws that were chosen for them (``data.cached_errors``) in place of one for each position. ``device`` is where the
    batches will go; for a GPU their memory is pinned in the background. ``waiting`` is how long steps have been waited for.

    Raises:
        UserError: there is to be a curriculum, and the pairs have no scores, are too few for its stages, or differ in shape.
    """

    def __init__(
        self,
        pairs: EncodedPairs,
        rows: Sequence[int],
        settings: LoaderSettings,
        rank: int = 0,
        world: int = 1,
        cached_errors: CachedVisits | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not len(rows):
            raise ValueError("there are no pairs to train on")
        self._pairs, self._rows, self._settings, self._cached_errors = pairs, rows, settings, cached_errors
        self._rank, self._world, self._device = rank, world, torch.device(device)
        self.waiting = Stopwatch()
        if getattr(pairs, "buckets", False):
            self._order: Order | Curriculum | BucketOrder = self._by_shape()
        else:
            self._order = Order(len(rows), settings.seed) if settings.curriculum == "none" else self._by_margin()

    @property
    def global_batch(self) -> int:
        """Pairs per optimizer step over all processes."""
        return self._settings.batch_size * self._settings.accumulation * self._world

    def _by_shape(self) -> BucketOrder:
        if self._settings.curriculum != "none":
            raise UserError("A curriculum orders pairs by their scores, and buckets order them by shape; leave one of them out.")
        numbers = np.asarray(self._pairs.bucket_numbers)[np.asarray(self._rows)]  # type: ignore[attr-defined]
        return BucketOrder(numbers, self._settings.batch_size, self._settings.seed)

    def _by_margin(self) -> Curriculum:
        s, stages = self._settings, self._settings.curriculum_stages
        if stages > min(len(self._rows), s.steps):
            raise UserError(
                f"A curriculum of {stages} stages needs at least {stages} pairs and {stages} optimizer steps; "
                f"there are {len(self._rows)} pairs and {s.steps} steps. Lower curriculum_stages."
            )
        ranking = easiest_first(self._pairs, self._rows)
        return Curriculum(ranking, stages, s.curriculum_cumulative, s.steps, self.global_batch, s.seed)

    def steps(self, start: int, stop: int) -> Iterator[list[PairBatch]]:
        """The micro-batches of optimizer steps ``start`` to ``stop``; the next step is prepared in the background."""
        with ThreadPoolExecutor(max_workers=1, initializer=self._thread_begins()) as pool:
            ahead = pool.submit(self._step, start) if start < stop else None
            for step in range(start, stop):
                now, ahead = ahead, pool.submit(self._step, step + 1) if step + 1 < stop else None
                with self.waiting.running():
                    batches = now.result()
                yield batches

    def _thread_begins(self) -> Callable[[], None] | None:
        """A thread has a current GPU of its own, number 0 at first; memory would be pinned by way of that."""
        if not self._pins:
            return None
        return partial(torch.cuda.set_device, torch.cuda.current_device() if self._device.index is None else self._device.index)

    def _step(self, step: int) -> list[PairBatch]:
        s = self._settings
        first = step * self.global_batch + self._rank * s.accumulation * s.batch_size
        batches = [self._batch(first + m * s.batch_size) for m in range(s.accumulation)]
        return list(map(pinned, batches)) if self._pins else batches

    @property
    def _pins(self) -> bool:
        return self._device.type == "cuda"

    def _batch(self, first: int) -> PairBatch:
        s = self._settings
        positions = range(first, first + s.batch_size)
        rows = [int(self._rows[self._order.row(p)]) for p in positions]
        shape = shape_of(self._pairs, rows[0])  # of all of them
        if self._cached_errors is None:
            draws = [draw(s.seed, p, shape, s.levels, s.prompt_dropout, s.flip) for p in positions]
            return collate(self._pairs, rows, draws, s.latent_mode)
        visits = [self._cached_errors.visited(row, self._order.visit(p), shape) for row, p in zip(rows, positions, strict=True)]
        batch = collate(self._pairs, rows, [drawn for drawn, _ in visits], s.latent_mode)
        return replace(batch, known=torch.stack([errors for _, errors in visits]))


def shape_of(pairs: EncodedPairs, row: int) -> tuple[int, ...]:
    """(C, h, w) of a pair's latents."""
    return pairs.shape_of(row) if getattr(pairs, "buckets", False) else pairs.latent_shape


def easiest_first(pairs: EncodedPairs, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64 [N]: places in ``rows``, by how far apart a judge puts the two pictures, furthest first; without scores comes last.

    The gap counts, not whom it favours: where judge and label disagree a pair is easy to tell apart all the same, as in
    Curriculum-DPO's code. Equal gaps stay in the order of the rows.

    Raises:
        UserError: no pair has scores, or none whose pictures differ in them.
    """
    known = getattr(pairs, "scores", None)
    found = None if known is None else np.asarray(known, dtype=np.float64)[np.asarray(rows)]
    if found is None or np.isnan(found).any(axis=1).all():
        raise UserError(
            "A curriculum orders pairs by a judge's scores, which these data do not have. Name a judge (--reward), use data that "
            "`diffalign relabel` wrote (--scores), or set curriculum to none."
        )
    gap = np.nan_to_num(np.abs(found[:, 0] - found[:, 1]), nan=-1.0)
    if gap.max() == 0.0:
        raise UserError("A curriculum orders pairs by their scores' difference, which is zero for all of them: single pictures?")
    return np.argsort(-gap, kind="stable")


def collate(pairs: EncodedPairs, rows: Sequence[int], draws: Sequence[Draw], latent_mode: bool) -> PairBatch:
    """Stack rows and their draws into one batch."""
    sides = [
        [_latent(pairs, row, side, d, latent_mode) for row, d in zip(rows, draws, strict=True)] for side in ("winner", "loser")
    ]
    conditionings = [pairs.conditioning(None if d.drop_prompt else row) for row, d in zip(rows, draws, strict=True)]
    return PairBatch(
        winner=torch.stack(sides[0]),
        loser=torch.stack(sides[1]),
        conditioning={name: torch.stack([c[name] for c in conditionings]) for name in conditionings[0]},
        t=torch.tensor([d.t for d in draws]),
        noise=torch.stack([d.noise for d in draws]),
        label=torch.tensor([float(pairs.labels[row]) for row in rows]),
        weight=torch.tensor([float(pairs.weights[row]) for row in rows]),
        index=torch.tensor(rows),
        scores=_scores(pairs, rows),
        framing=_framing(pairs, rows, draws),
    )


def _scores(pairs: EncodedPairs, rows: Sequence[int]) -> Tensor | None:
    """[B, 2] float32; None where no pair of the whole data set has scores, so that every batch of a run is alike."""
    known = getattr(pairs, "scores", None)
    if known is None:
        return None
    known = torch.as_tensor(known, dtype=torch.float32)
    found = known[list(rows)]
    return None if found.isnan().all() and known.isnan().all() else found


def _framing(pairs: EncodedPairs, rows: Sequence[int], draws: Sequence[Draw]) -> Tensor | None:
    """[B, 2, 6] float32; None where it is not known how the pictures were cut."""
    if not hasattr(pairs, "framing"):
        return None
    both = [[pairs.framing(row, side, d.flip) for side in ("winner", "loser")] for row, d in zip(rows, draws, strict=True)]
    return torch.stack([torch.stack(sides) for sides in both])


def _latent(pairs: EncodedPairs, row: int, side: str, d: Draw, mode: bool) -> Tensor:
    mean, std = pairs.moments(row, side, d.flip)
    return mean if mode else mean + std * d.posterior[0 if side == "winner" else 1]


class MadeWhenAsked(Sequence[PairBatch]):
    """``count`` batches, each of which ``make`` puts together at every access: none is kept."""

    def __init__(self, count: int, make: Callable[[int], PairBatch]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> PairBatch: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[PairBatch]: ...

    def __getitem__(self, place: int | slice) -> PairBatch | Sequence[PairBatch]:
        number = range(self._count)[place]
        return self._make(number) if isinstance(number, int) else [self._make(each) for each in number]


def validation_batches(
    pairs: EncodedPairs, rows: Sequence[int], settings: LoaderSettings, draws_per_pair: int
) -> Sequence[PairBatch]:
    """Fixed pairs with fixed (t, noise): the same batches at every validation. Kept, they would hold a prompt's embeddings once
    for every draw, in every process."""
    alike: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # a batch holds one shape
    for row in map(int, rows):
        alike.setdefault(shape_of(pairs, row), []).extend((row, number) for number in range(draws_per_pair))
    size = max(settings.batch_size, 1)
    chunks = [visits[i : i + size] for visits in alike.values() for i in range(0, len(visits), size)]

    def draws_of(row: int) -> list[Draw]:
        return fixed_draws(settings.seed, row, shape_of(pairs, row), settings.levels, draws_per_pair)

    def batch(place: int) -> PairBatch:
        rows = [row for row, _ in chunks[place]]
        draws = {row: draws_of(row) for row in rows}
        return collate(pairs, rows, [draws[row][number] for row, number in chunks[place]], latent_mode=True)

    return MadeWhenAsked(len(chunks), batch)
