"""Losses that see a pair only through its margin ``h = beta (w - l)``: shifting both log-ratios together changes nothing.

All take (ratio, label, beta) and give [B]. See the package for notation, scale and labels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.losses.labels import expected, smoothed
from diffalign.losses.registry import loss
from diffalign.settings import option
from diffalign.types import LogRatio


@loss(paper="2305.18290")
def dpo(ratio: LogRatio, label: Tensor, beta: float | Tensor) -> Tensor:
    """DPO: ``-P log sigma(h) - (1 - P) log sigma(-h)``.

    Rafailov et al. 2023, arXiv 2305.18290, eq. 7; with P < 1 the conservative form of its section on label noise.
    A tie (P = 1/2) pulls the margin to zero. TRL's ``sigmoid`` is this at P = 1; its ``sigmoid_norm`` divides the log-ratios
    by the number of tokens first, which a mean denoising error has no need of.
    """
    h = beta * ratio.margin
    label = label.to(h.dtype)
    return -label * F.logsigmoid(h) - (1.0 - label) * F.logsigmoid(-h)


@loss(paper="2305.18290", settings={"noise": option(0.1, "share of the labels that are believed flipped", ge=0, le=0.5)})
def cdpo(ratio: LogRatio, label: Tensor, beta: float, noise: float) -> Tensor:
    """cDPO: DPO on softened labels, ``P (1 - e) + (1 - P) e``.

    Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO". At P = 1:
    ``-(1 - e) log sigma(h) - e log sigma(-h)``, least at ``h = log((1 - e) / e)``: the margin stops growing there.
    A tie pulls the margin to zero. TRL has it as ``label_smoothing`` of its CPO and TPO trainers, not of its DPO trainer.
    """
    return dpo(ratio, smoothed(label, noise), beta)


@loss(paper="2403.00409", settings={"noise": option(0.1, "share of the labels that are flipped", ge=0, lt=0.5)})
def rdpo(ratio: LogRatio, label: Tensor, beta: float, noise: float) -> Tensor:
    """rDPO, robust DPO: an unbiased estimate of what DPO would say on clean labels.

    Chowdhury et al. 2024, arXiv 2403.00409. At P = 1: ``[-(1 - e) log sigma(h) + e log sigma(-h)] / (1 - 2 e)``, which is DPO
    at the label ``(1 - e) / (1 - 2 e)``, beyond 1. Averaged over flips at rate e it is DPO's loss on the true labels. Not bounded
    below: it falls like ``-e h / (1 - 2 e)`` as h grows, so that pairs are rewarded for ever larger margins; watch the drift.
    The expected loss for other labels; a tie is DPO's tie and pulls the margin to zero. TRL's ``robust`` is this at P = 1.
    """
    return dpo(ratio, (label - noise) / (1.0 - 2.0 * noise), beta)


@loss(paper="2310.12036")
def ipo(ratio: LogRatio, label: Tensor, beta: float) -> Tensor:
    """IPO: ``(h - (P - 1/2))^2``, a margin to be met rather than exceeded.

    Azar et al. 2023, arXiv 2310.12036, eq. 17, which is ``(w - l - 1 / (2 tau))^2`` on raw log-ratios: ours is tau^2 times that
    at beta = tau and P = 1, so that neither the target nor the size of the loss depends on the units of the log-ratios.
    For other labels the expected loss less its constant ``P (1 - P)``; a tie pulls the margin to zero.
    TRL divides the log-ratios by the number of completion tokens first.
    """
    h = beta * ratio.margin
    return (h - (label.to(h.dtype) - 0.5)).square()


@loss(paper="2305.10425")
def hinge(ratio: LogRatio, label: Tensor, beta: float) -> Tensor:
    """Hinge: ``max(0, 1 - h)``: no gradient once the scaled margin is 1.

    SLiC-HF (Zhao et al. 2023, arXiv 2305.10425) on log-ratios instead of log-likelihoods, as RSO has it (Liu et al. 2023,
    arXiv 2309.06657; RSO's rejection sampling is a matter of the source). The expected loss for other labels; for a tie it is
    flat at 1 between h = -1 and 1: within that band ties teach nothing. TRL's ``hinge`` is this at P = 1.
    """
    return expected(lambda first, second: F.relu(1.0 - beta * (first - second)), ratio.winner, ratio.loser, label)


@loss(paper="2402.00856", settings={"noise": option(1e-3, "label smoothing; must not be 0", gt=0, le=0.5)})
def exo(ratio: LogRatio, label: Tensor, beta: float, noise: float) -> Tensor:
    """EXO: the divergence KL(policy's choice || labels), the other way round than DPO's.

    Ji et al. 2024, arXiv 2402.00856, eq. 16, for two samples: with q = sigma(h) and p the softened label,
    ``q log(q / p) + (1 - q) log((1 - q) / (1 - p))``. It is bounded, by log(1/e), and least at ``h = log(p / (1 - p))``. Without
    softening it would be infinite, hence ``noise`` > 0. A tie has p = 1/2 and pulls the margin to zero. TRL's ``exo_pair`` is
    this at P = 1 with ``label_smoothing`` for ``noise``.
    """
    h = beta * ratio.margin
    label = label.to(h.dtype)
    p, rest = smoothed(label, noise), smoothed(1.0 - label, noise)  # 1 - p itself would lose the digits of a small noise
    chosen, other = F.logsigmoid(h), F.logsigmoid(-h)
    return chosen.exp() * (chosen - p.log()) + other.exp() * (other - rest.log())


@loss(paper="2406.08414", settings={"tau": option(0.05, "temperature of the blend of the two losses, in units of h", gt=0)})
def discopop(ratio: LogRatio, label: Tensor, beta: float, tau: float) -> Tensor:
    """DiscoPOP: ``(1 - s) (-log sigma(h)) + s exp(-h)`` with ``s = sigma(h / tau)``.

    Lu et al. 2024, arXiv 2406.08414, eq. 5 (the log-ratio modulated loss that a language model proposed): logistic for pairs
    that are still wrong, exponential for those already right. Not convex: with the paper's tau = 0.05 it rises from a hollow at
    h = -0.12 to a crest at h = 0.07, so that every pair's first steps, from h = 0, go the wrong way; from tau = 0.11 on it falls
    throughout. The expected loss for other labels; a tie is symmetric, but h = 0 is then a crest, too: drop ties.
    TRL multiplies an overflowing exponential with a vanishing blend when h is far below zero and gets nan; here the product
    is formed in the exponent (finite for tau < 1).
    """

    def stated(first: Tensor, second: Tensor) -> Tensor:
        h = beta * (first - second)
        return -torch.sigmoid(-h / tau) * F.logsigmoid(h) + torch.exp(F.logsigmoid(h / tau) - h)

    return expected(stated, ratio.winner, ratio.loser, label)


@loss(paper="2506.02698", settings={"gamma": option(10.0, "sharpness of the smoothing; gamma (2P - 1) = 1 is DPO", gt=0)})
def smpo(ratio: LogRatio, label: Tensor, beta: float, gamma: float) -> Tensor:
    """SmPO: ``-log sigma( gamma (2P - 1) h )``, P the smoothed preference of the winner.

    arXiv 2506.02698. At P = 1/2 the gradient vanishes, below it the sides change places; at gamma (2P - 1) = 1 it is DPO. Not the
    conservative DPO of ``dpo``, which pulls the margin of a tie to zero.
    """
    return -F.logsigmoid(gamma * (2.0 * label.to(ratio.margin.dtype) - 1.0) * beta * ratio.margin)
