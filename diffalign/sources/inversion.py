"""Pairs whose noise is found instead of drawn: clean latents carried up the chain by the network itself.

From level p to the next level g, DDIM inversion moves z along one prediction (Song et al. 2020, arXiv 2010.02502, section 4.3):

    z' = a_g / a_p (z - s_p e) + s_g e                                            a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar)

with e the network's noise at (z, g) or, as it was first written, at (z, p). A flow moves along its velocity v instead,

    z' = z + (sigma_g - sigma_p) v

which is the same where e and v agree, and reaches sigma = 1. The step is right if e is what the network says at
(z', g): an implicit equation. ReNoise (Garibi et al. 2024, arXiv 2403.14602) iterates towards it,

    e_0 = e(z, g);   e_k = e(z moved along e_(k-1), g),  k = 1 ... K;   z' = z moved along the mean of the e_k in a window

and SmPO (arXiv 2506.02698) takes K = 1 and the mean of both. DDIM-InPO (arXiv 2503.18454) takes K = 0 and adds to each z' a
noise of ``eta`` times the deviation of the stochastic step from g back to p; its eta is 0.1.

The target is the noise that the whole way amounts to: tau = (z_t - a_t x_0) / s_t, in the network's parametrisation; that of a
velocity is (z_t - x_0) / sigma_t.

Here every sample climbs to exactly its own t, in strides of equal length, at most T / steps: ceil((t + 1) steps / T) of them, as
many as a fixed grid would need (of a flow: ceil(t steps / T)). x_0 is clean, whatever the schedule's ``clean_end``.

``released`` reproduces SmPO's code (JaydenLyh/SmPO, train.py) under two versions of Diffusers' inverse scheduler. It uses the
first sample's t for the whole batch, walks the fixed grid 1, 1 + T/n, ... (levels below t only), takes alpha_bar[0] for the
clean latents, and computes tau at t although z stopped elsewhere:

    "0.20"  (the version it pins) predicts at the level it leaves, so the first call is at 1 - T/n < 0; ends on the first grid
            level at or above t
    "0.42"  predicts at the level it goes to; ends on the last grid level below t, and for t <= 1 does not move at all
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.protocols import Predictor
from diffalign.schedule import Schedule
from diffalign.settings import check_options, option
from diffalign.types import Conditioning, NoisyPair, PairBatch, on_both_sides, placed

Evaluate = Literal["target", "source"]
Window = Literal["all", "last", "renoise"]
Released = Literal["0.20", "0.42"]

_RENOISE_WINDOWS = ((250, (0, 5)), (None, (8, 10)))
"""Of the ReNoise code: below t = 250 the predictions 0 to 4 are averaged, above it 8 and 9."""


@dataclass(frozen=True)
class Inversion:
    """How clean latents climb: by default as in SmPO, over five strides (its code for SD1.5; the paper has nine).

    ``DDIM_INPO`` and ``DDIM`` are others.
    ``released`` decides by itself where the network predicts, whatever ``evaluate`` says.
    """

    steps: int = option(5, "strides from clean to pure noise; a sample that stops at t takes its share of them", ge=1)
    renoise: int = option(1, "K, corrections of each stride; 0 is plain DDIM inversion", ge=0)
    window: Window = option("all", "which of the K + 1 predictions are averaged: all (SmPO), last, renoise (that paper's)")
    evaluate: Evaluate = option("target", "the level at which the network predicts: target (g) or source (p)")
    eta: float = option(0.0, "noise added after each stride, in deviations of the stochastic step; DDIM-InPO: 0.1", ge=0)
    released: Released | None = option(None, "reproduce SmPO's code under Diffusers 0.20 or 0.42; None does what is right")

    def __post_init__(self) -> None:
        check_options(self)


DDIM = Inversion(renoise=0)
DDIM_INPO = Inversion(steps=10, renoise=0, eta=0.1)


@torch.no_grad()
def inverted(batch: PairBatch, predictor: Predictor, schedule: Schedule, settings: Inversion) -> NoisyPair:
    """Both sides of each pair carried to the pair's t by ``predictor``, without gradient; one call for both sides.

    ``batch.noise`` is not used as noise. With ``eta`` it seeds the noise of the strides, which so belongs to the visit of the
    pair like every other draw: the same on any number of processes and in any batch.
    """
    n = len(batch)
    x_0 = torch.cat([batch.winner, batch.loser])
    t = torch.cat([batch.t, batch.t])
    conditioning = on_both_sides(batch.conditioning, batch.framing)
    generators = _generators(batch.host_noise) if settings.eta else None
    ends = torch.cat([batch.host_t, batch.host_t])
    x_t, target = invert(x_0, t, conditioning, predictor, schedule, settings, generators, ends)
    return NoisyPair(
        winner=x_t[:n],
        loser=x_t[n:],
        winner_target=target[:n],
        loser_target=target[n:],
        t=batch.t,
        conditioning=batch.conditioning,
        error_weight=schedule.error_weight(batch.t),
        framing=batch.framing,
    )


@torch.no_grad()
def invert(
    x_0: Tensor,
    t: Tensor,
    conditioning: Conditioning,
    predictor: Predictor,
    schedule: Schedule,
    settings: Inversion,
    generators: Sequence[torch.Generator] | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Clean latents [B, ...] carried to levels ``t`` [B], and what the network should predict there, float32 at least.

    ``generators``: one per sample, on the CPU; needed if ``eta`` is not zero. ``ends``: t on the CPU, where the number of strides
    is decided; else it is fetched, and the host waits.

    Raises:
        ValueError: ``eta`` without a generator for every sample, or ``released`` with a flow, which that code does not know.
    """
    if settings.eta and (generators is None or len(generators) != len(x_0)):
        raise ValueError(f"eta = {settings.eta} adds noise: give one generator per sample ({len(x_0)})")
    schedule = schedule.ending("one" if settings.released is None else "first")
    z = x_0.to(torch.promote_types(x_0.dtype, torch.float32))
    start = z
    for here_rows, source, goal, level in _strides(t.cpu() if ends is None else ends, schedule, settings):
        rows, source, goal, level = placed((here_rows, source, goal, level), t.device)
        here = z[rows]
        said_at = _direction(predictor, schedule, _rows(conditioning, rows, here_rows), level)
        moved = schedule.move(here, _way(here, said_at, schedule, source, goal, settings), source, goal)
        if settings.eta:
            draw = torch.stack([torch.randn(z.shape[1:], generator=generators[r]) for r in here_rows.tolist()])
            moved = moved + settings.eta * schedule.ddim_deviation(goal, source, moved) * placed(draw, t.device, moved.dtype)
        z = z.index_copy(0, rows, moved.to(z.dtype))
    level = t if settings.released is None else t[:1].expand_as(t)
    a, s = schedule.coefficients(level, z)
    tau = (z - a * start) / s
    return z, schedule.target(start, tau, level)


def _strides(t: Tensor, schedule: Schedule, settings: Inversion) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Rows that still climb, the levels they leave and go to, and the level at which the network predicts; all on the CPU."""
    if settings.released is not None:
        yield from _released_strides(t, len(schedule), settings)
        return
    climbs = [schedule.climb(end, settings.steps) for end in t.tolist()]
    for j in range(max(len(climb) for climb in climbs) - 1):
        rows = [i for i, climb in enumerate(climbs) if len(climb) > j + 1]
        source = torch.tensor([climbs[i][j] for i in rows], dtype=t.dtype)
        goal = torch.tensor([climbs[i][j + 1] for i in rows], dtype=t.dtype)
        yield torch.tensor(rows), source, goal, goal if settings.evaluate == "target" else source.clamp(min=0)


def _released_strides(t: Tensor, train_steps: int, settings: Inversion) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The fixed grid of the inverse scheduler, shifted by 1 as SD1.5 and SDXL configure it, for the first sample's t."""
    stride = train_steps // settings.steps
    rows = torch.arange(len(t))
    shift = -stride if settings.released == "0.20" else 0
    for j in range(settings.steps):
        level = 1 + j * stride + shift
        if level >= int(t[0]):
            return
        at = torch.full_like(t, level)
        yield (rows, at, at + stride, at) if settings.released == "0.20" else (rows, at - stride, at, at)


DirectionAt = Callable[[Tensor], Tensor]
"""What the network takes for the noise in z (of a flow: the velocity), at a level and conditioning that are settled."""


def _direction(predictor: Predictor, schedule: Schedule, conditioning: Conditioning, level: Tensor) -> DirectionAt:
    return lambda z: schedule.direction(predictor(z, level, conditioning), z, level)


def _way(z: Tensor, said_at: DirectionAt, schedule: Schedule, source: Tensor, goal: Tensor, settings: Inversion) -> Tensor:
    """The direction to move in: the mean, within the window, of K + 1 predictions, each made where the last one led."""
    predictions = [said_at(z)]
    for _ in range(settings.renoise):
        predictions.append(said_at(schedule.move(z, predictions[-1], source, goal)))
    weights = averaging_weights(settings.window, len(predictions), goal, z.dtype)
    return sum(w.view(-1, *([1] * (z.ndim - 1))) * e for w, e in zip(weights.unbind(dim=1), predictions, strict=True))


def averaging_weights(window: Window, count: int, goal: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Weights [B, count] of the predictions of a stride to level ``goal`` [B]; each row sums to 1.

    ``renoise``: of the windows that the ReNoise code uses, and the last prediction where a window lies beyond all of them.
    """
    index = torch.arange(count, device=goal.device)
    inside = torch.zeros(len(goal), count, dtype=torch.bool, device=goal.device)
    if window == "all":
        inside[:] = True
    elif window == "renoise":
        (edge, low), (_, high) = _RENOISE_WINDOWS
        first, stop = (torch.where(goal < edge, low[k], high[k])[:, None] for k in (0, 1))
        inside = (index >= first) & (index < stop)
    nothing = ~inside.any(dim=1)
    inside[:, -1] |= nothing
    return inside.to(dtype) / inside.sum(dim=1, keepdim=True)


def _rows(conditioning: Conditioning, rows: Tensor, here_rows: Tensor) -> Conditioning:
    """The conditioning of some rows, whose numbers are given on the device and on the CPU, where prompts' lengths are."""
    return {name: value[here_rows if value.device.type == "cpu" else rows] for name, value in conditioning.items()}


def _generators(noise: Tensor) -> list[torch.Generator]:
    """Two per pair, winners then losers, seeded by the pair's own draw, on the CPU."""
    digests = [hashlib.blake2b(each.float().numpy().tobytes(), digest_size=8).digest() for each in noise]
    seeds = [int.from_bytes(digest[4 * side : 4 * side + 4], "little") for side in (0, 1) for digest in digests]
    return [torch.Generator().manual_seed(seed) for seed in seeds]
