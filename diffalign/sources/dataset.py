"""The plainest source: a pair from a data set, noised with the same eps and the same t on both sides."""

from __future__ import annotations

from diffalign.schedule import Schedule
from diffalign.types import Noisy, NoisyPair, PairBatch


def noised(batch: PairBatch, schedule: Schedule) -> NoisyPair:
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
        error_weight=schedule.error_weight(t),
        known=batch.known,
    )


def noised_winners(batch: PairBatch, schedule: Schedule) -> Noisy:
    """The winners alone, with the same draw."""
    t, noise = batch.t, batch.noise
    x_t, target = schedule.add_noise(batch.winner, noise, t), schedule.target(batch.winner, noise, t)
    known = None if batch.known is None else batch.known[:, 0]
    return Noisy(x_t, target, t, batch.winner_conditioning, schedule.error_weight(t), known)
