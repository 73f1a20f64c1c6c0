"""Losses as pure functions of the two log-ratios: no network, no mean, one number per pair.

Notation, in every module here: ``w`` and ``l`` are the log-ratios of winner and loser [B] (log-likelihood under the policy
minus under the reference), ``P`` the label [B], the probability that the winner is preferred (1 in clean data, 1/2 for a
tie), ``beta`` the factor that brings log-ratios to order one, ``h = beta (w - l)`` the scaled margin.

**Scale.** Denoising errors are means over a latent, so that raw log-ratios are of order 1e-4 to 1e-2, and a constant such as
the 1 of the hinge would never be felt next to them. Every constant here therefore stands beside ``beta w``, ``beta l`` or
``h``, never beside ``w`` or ``l``: multiplying the log-ratios by k and dividing beta by k changes nothing, whatever the loss.
The few for which that cannot hold, because they need a probability rather than a ratio, say ``scale = "absolute"``.

**Labels.** Where a docstring says "the expected loss", it is ``P loss(w, l) + (1 - P) loss(l, w)``: the loss as its paper
has it at P = 1, with the sides swapped at P = 0, half of each for a tie.

    pairwise      functions of the margin h                       dpo, cdpo, rdpo, ipo, hinge, exo, discopop, smpo
    sides         each side against a mark of its own             nca, apo_zero, apo_down, sppo, cal_dpo
    unpaired      one sample and a baseline                       kto, bco (and ``*_unpaired`` for samples without a partner)
    absolute      the policy's own likelihoods                    sft, simpo, mapo, orpo, asft, hypo
    batchwise     the batch has a say                             aot, aot_unpaired, beta_dpo
    rewarded      scores of a judge instead of labels             madpo, adpo (and ``adpo_group`` for K pictures)
    divergences   what replaces the log in the log-ratio          transformed

``names()`` lists what ``--loss`` may be, ``load(name)`` gives it with its settings. A function becomes a loss by its
decorator; nothing else needs editing.
"""

from __future__ import annotations

from diffalign.losses.absolute import asft, hypo, mapo, orpo, sft, simpo
from diffalign.losses.baselines import Baseline, BatchMean, MismatchedMean, MovingMargin, NoBaseline, RunningMean
from diffalign.losses.batchwise import aot, aot_unpaired, beta_dpo
from diffalign.losses.divergences import transformed
from diffalign.losses.pairwise import cdpo, discopop, dpo, exo, hinge, ipo, rdpo, smpo
from diffalign.losses.registry import Evidence, Extras, Loss, load, loss, names, read_options
from diffalign.losses.rewarded import adpo, adpo_group, madpo
from diffalign.losses.sides import apo_down, apo_zero, cal_dpo, nca, sppo
from diffalign.losses.unpaired import bco, bco_unpaired, kto, kto_unpaired

__all__ = [
    "Baseline",
    "BatchMean",
    "Evidence",
    "Extras",
    "Loss",
    "MismatchedMean",
    "MovingMargin",
    "NoBaseline",
    "RunningMean",
    "adpo",
    "adpo_group",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "asft",
    "bco",
    "bco_unpaired",
    "beta_dpo",
    "cal_dpo",
    "cdpo",
    "discopop",
    "dpo",
    "exo",
    "hinge",
    "hypo",
    "ipo",
    "kto",
    "kto_unpaired",
    "load",
    "loss",
    "madpo",
    "mapo",
    "names",
    "nca",
    "orpo",
    "rdpo",
    "read_options",
    "sft",
    "simpo",
    "smpo",
    "sppo",
    "transformed",
]
