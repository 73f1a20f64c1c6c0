"""Losses that take a judge's scores beside, or instead of, the label: whatever units the judge has, say in which.

``rewards`` [B, 2] are the scores of winner and loser.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.losses.registry import loss
from diffalign.settings import option
from diffalign.types import LogRatio


@loss(
    paper="2510.05342",
    settings={
        "c_max": option(2.0, "amplification of pairs that the judge finds close", gt=1),
        "c_min": option(0.5, "damping of pairs that the judge finds easy", ge=0, lt=1),
        "tau": option(2.0, "difference of scores at which pairs are neither amplified nor damped", gt=0),
        "sharpness": option(1.0, "steepness of the change from amplification to damping", gt=0),
    },
)
def madpo(
    ratio: LogRatio, rewards: Tensor, label: Tensor, beta: float, c_max: float, c_min: float, tau: float, sharpness: float
) -> Tensor:
    """MADPO: DPO with a weight from the judge's margin, ``-omega log sigma(h)``.

    arXiv 2510.05342: for a margin D = r_w - r_l of scores on a logistic (Bradley-Terry) scale,

        c     = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) exp(lambda (|D| - tau)))      1 at |D| = tau
        omega = sigma(c D) / sigma(D)  where D > -tau,  else 1

    so that the pair weighs as if the judge's margin were c D. Scores need to be in nats: a cosine times CLIP's logit scale of
    100 is, a bare cosine is not. The paper's notebook has tau = log(999). The expected loss for other labels, with -D for the
    flipped side; a tie pulls the margin to ``log(omega(D) / omega(-D))``, zero where the judge sees a tie too. Not in TRL.
    """
    h = beta * ratio.margin
    label, gap = label.to(h.dtype), (rewards[:, 0] - rewards[:, 1]).to(h.dtype)
    c = c_min + (c_max - c_min) / (1.0 + (c_max - 1.0) / (1.0 - c_min) * torch.exp(sharpness * (gap.abs() - tau)))

    def weight(gap: Tensor) -> Tensor:
        return torch.where(gap > -tau, torch.exp(F.logsigmoid(c * gap) - F.logsigmoid(gap)), torch.ones_like(gap))

    return -label * weight(gap) * F.logsigmoid(h) - (1.0 - label) * weight(-gap) * F.logsigmoid(-h)


def adpo_group(ratios: Tensor, rewards: Tensor, beta: float, reward_temperature: float = 0.5) -> Tensor:
    """ADPO, listwise, [B]: cross-entropy from judged shares to the policy's, for K pictures of one prompt.

    Wang 2025, arXiv 2510.18913: ``-sum_k q_k log softmax(beta rho)_k`` with ``q = softmax(z / beta_r)``, z the scores [B, K]
    standardised within their group (equal scores: q uniform) and beta = 1 / tau. Log-ratios [B, K] are against the anchor; same t
    and same noise for all K. Least at beta rho = z / beta_r up to a constant; there it equals q's entropy (the paper's KL
    subtracts it).
    The released code anchors to the policy that sampled (tau 0.8, beta_r 0.5, K = 8) and can adapt tau to a language model's
    entropy; that part is not here. Raises ValueError for groups of one, which have no deviation.
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"pictures are compared within their group, and these groups have {rewards.shape[1]}")
    rewards = rewards.to(ratios.dtype)
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    q = torch.softmax(centred / (rewards.std(dim=1, keepdim=True) + 1e-8) / reward_temperature, dim=1)
    return -(q * torch.log_softmax(beta * ratios, dim=1)).sum(dim=1)


@loss(
    paper="2510.18913",
    settings={
        "reward_temperature": option(0.5, "beta_r, the temperature of the judge's probabilities, in standard deviations", gt=0)
    },
)
def adpo(ratio: LogRatio, rewards: Tensor, beta: float, reward_temperature: float) -> Tensor:
    """ADPO on pairs: soft-label DPO, the label taken from the judge.

    ``adpo_group`` (arXiv 2510.18913) with K = 2. Two scores standardise to +-1/sqrt 2 whatever their gap, so that the label is
    ``sigma(sqrt 2 / beta_r)`` on the side of the better score (0.94 at the default) and 1/2 where scores are equal. The data
    set's label is not used. For a label that follows the gap, relabel the pairs with the judge and use ``dpo``.
    """
    return adpo_group(torch.stack([ratio.winner, ratio.loser], dim=1), rewards, beta, reward_temperature)
