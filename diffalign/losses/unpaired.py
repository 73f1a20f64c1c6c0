"""Losses of one sample that is good or bad, against a baseline. On a pair, both sides' losses are added.

``rho`` [N] is a sample's log-ratio, ``desirable`` [N] the probability that it is a good one (0, 1, or between), ``baseline`` a
scalar in the same units (``diffalign.losses.baselines``; 0 will do to start with).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.losses.baselines import MismatchedMean, RunningMean
from diffalign.losses.registry import loss
from diffalign.settings import option
from diffalign.types import LogRatio

Utility = Literal["kahneman-tversky", "loss-averse", "risk-seeking", "risk-seeking-signed", "risk-seeking-exponential"]

_UTILITIES: dict[Utility, Callable[[Tensor, int], Tensor]] = {
    "kahneman-tversky": lambda x, sign: torch.sigmoid(sign * x),
    "loss-averse": lambda x, sign: F.logsigmoid(sign * x),
    "risk-seeking": lambda x, sign: -F.logsigmoid(-sign * x),
    "risk-seeking-signed": lambda x, sign: -sign * F.logsigmoid(-x),
    "risk-seeking-exponential": lambda x, sign: sign * torch.exp(x / 100.0) - 1.0,
}


# ----------------------------------------------------------------------------------------------------------------- KTO


def kto_unpaired(
    rho: Tensor,
    desirable: Tensor,
    beta: float,
    baseline: Tensor | float = 0.0,
    utility: Utility = "kahneman-tversky",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO, [N]: ``lambda (1 - U(s x))`` with ``x = beta (rho - z)``, s = +1 for a good sample and -1 for a bad one.

    Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7, where U is sigma and z = max(0, KL), estimated from mismatched
    samples and without gradient. Diffusion-KTO (Li et al. 2024, arXiv 2404.04465) varies U:

        kahneman-tversky           sigma(s x)              both papers; bounded: samples far either way are let go
        loss-averse                log sigma(s x)          its loss is 1 + DPO's logistic
        risk-seeking               -log sigma(-s x)        presses on where it has already won
        risk-seeking-signed        -s log sigma(-x)        only in the released code (risk_seeking_1)
        risk-seeking-exponential   s exp(x / 100) - 1      only in the released code (risk_seeking_2)

    ``desirable`` strictly between 0 and 1 is the expected loss; at 1/2 (with equal weights and sigma) it is a constant.
    Diffusion-KTO's release takes as z the mean of the batch's own log-ratios, clamped at zero, its ``bce_offset=original`` that
    of samples with rolled prompts, unclamped; its beta of 1000 has no factor 1/2.
    """
    if utility not in _UTILITIES:
        raise ValueError(f"utility is one of {', '.join(get_args(Utility))}; got {utility!r}")
    x = beta * (rho - baseline)
    good = desirable_weight * (1.0 - _UTILITIES[utility](x, 1))
    bad = undesirable_weight * (1.0 - _UTILITIES[utility](x, -1))
    desirable = desirable.to(x.dtype)
    return desirable * good + (1.0 - desirable) * bad


@loss(
    paper="2402.01306",
    baseline=MismatchedMean,
    settings={
        "utility": option("kahneman-tversky", "shape of the utility: " + ", ".join(get_args(Utility))),
        "desirable_weight": option(1.0, "weight of the preferred side", ge=0),
        "undesirable_weight": option(1.0, "weight of the other side", ge=0),
    },
)
def kto(
    ratio: LogRatio,
    label: Tensor,
    beta: float,
    baseline: Tensor | float,
    utility: Utility,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """KTO on pairs: the winner as a good sample, the loser as a bad one, against one baseline.

    The sum of ``kto_unpaired`` over the two sides, i.e. twice the mean over 2B samples. With the baseline at zero and equal
    weights it is APO-zero. P is the winner's probability of being good, 1 - P the loser's; a tie gives no gradient as long as
    the weights are equal and the utility is kahneman-tversky.
    """
    rest = (beta, baseline, utility, desirable_weight, undesirable_weight)
    return kto_unpaired(ratio.winner, label, *rest) + kto_unpaired(ratio.loser, 1.0 - label, *rest)


# ----------------------------------------------------------------------------------------------------------------- BCO


def bco_unpaired(rho: Tensor, desirable: Tensor, beta: float, baseline: Tensor | float = 0.0) -> Tensor:
    """BCO, [N]: a classifier of good and bad by the implicit reward, ``-log sigma(+-beta (rho - z))``.

    Jung et al. 2024, arXiv 2404.04656; z is the running mean of all log-ratios. TRL keeps the mean of beta rho (delta = beta z),
    in float32. Its reweighting by a prompt classifier has no part here. ``desirable`` between 0 and 1 is cross-entropy with it.
    """
    x = beta * (rho - baseline)
    desirable = desirable.to(x.dtype)
    return -desirable * F.logsigmoid(x) - (1.0 - desirable) * F.logsigmoid(-x)


@loss(paper="2404.04656", baseline=RunningMean)
def bco(ratio: LogRatio, label: Tensor, beta: float, baseline: Tensor | float) -> Tensor:
    """BCO on pairs: ``-log sigma(beta (w - z)) - log sigma(-beta (l - z))``.

    The sum of ``bco_unpaired`` over the two sides; with the baseline at zero it is ``bco_pair`` of TRL's DPO trainer. The
    expected loss for other labels; a tie holds both sides at the baseline.
    """
    return bco_unpaired(ratio.winner, label, beta, baseline) + bco_unpaired(ratio.loser, 1.0 - label, beta, baseline)
