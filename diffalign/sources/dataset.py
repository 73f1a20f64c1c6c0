"""The plainest source: a pair from a data set, noised with the same eps and the same t on both sides."""

from __future__ import annotations

from diffalign.schedule import NoiseSchedule
from diffalign.types import NoisyPair, PairBatch


def noised(batch: PairBatch, schedule: NoiseSchedule) -> NoisyPair:
    """Noise both sides with the batch's shared draw (Diffusion-DPO, arXiv 2311.12908, section 4 and its pseudo-code)."""
    t, noise = batch.t, batch.noise
    return NoisyPair(
        winner=schedule.add_noise(batch.winner, noise, t),
        loser=schedule.add_noise(batch.loser, noise, t),
        winner_target=schedule.target(batch.winner, noise, t),
        loser_target=schedule.target(batch.loser, noise, t),
        t=t,
        conditioning=batch.conditioning,
        framing=batch.framing,
    )
