"""The cores of the objectives whose loss is not one of the DPO family's: pure functions, one number per pair.

``ratio`` holds log-likelihoods under the policy minus those under the reference, for both sides [B].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.types import LogRatio, widest


def d3po(ratio: LogRatio, label: Tensor, beta: float, clip: float) -> Tensor:
    """D3PO (Yang et al. 2023, arXiv 2311.13231), as released: each side's ratio is clipped to [1 - clip, 1 + clip].

    ``-log sigma( (2P - 1) beta (clip w - clip l) )``, [B]; P = 1 where the winner won, 1/2 for a tie, whose gradient is zero.
    The gradient of a side is zero where its ratio is outside. The paper has no clip: ``clip = math.inf`` takes it away. The
    ratio is that of mean log-densities, a geometric mean per dimension, hence the narrow clip.
    """
    margin = clipped(ratio, clip).margin
    return -F.logsigmoid((2.0 * label.to(margin.dtype) - 1.0) * beta * margin)


def clipped(ratio: LogRatio, clip: float) -> LogRatio:
    """Both sides' ratios within [1 - clip, 1 + clip]; no gradient outside."""
    low = math.log1p(-clip) if clip < 1.0 else -math.inf
    return LogRatio(*(side.clamp(low, math.log1p(clip)) for side in (ratio.winner, ratio.loser)))


def dominance(first: Tensor, second: Tensor) -> Tensor:
    """Label [B] from rewards [B] or [B, R]: 1 where ``first`` is at least as good in all and better in one, 0 where ``second``
    is, 1/2 where neither dominates (D3PO's rule for several rewards)."""
    first, second = (r[:, None] if r.ndim == 1 else r for r in (first, second))
    wins = (first >= second).all(dim=1) & (first > second).any(dim=1)
    loses = (second >= first).all(dim=1) & (second > first).any(dim=1)
    return 0.5 + 0.5 * (wins.to(widest(wins)) - loses.to(widest(loses)))


def ppo(log_density: Tensor, old: Tensor, advantage: Tensor, clip: float, clip_advantage: float = 5.0) -> Tensor:
    """DDPO's clipped policy gradient (Black et al. 2023, arXiv 2305.13301, eq. 5; PPO, arXiv 1707.06347, eq. 7), [B] each.

    ``max( -A r, -A clip(r) )`` with r = exp(log_density - old) within [1 - clip, 1 + clip], A within +-clip_advantage.
    """
    advantage = advantage.to(log_density.dtype).clamp(-clip_advantage, clip_advantage)
    r = (log_density - old).exp()
    return torch.maximum(-advantage * r, -advantage * r.clamp(1.0 - clip, 1.0 + clip))


def dro(ratio: LogRatio, margin: float) -> Tensor:
    """Diffusion-DRO's hinge (arXiv 2510.18353), ``max(0, margin - (w - l))``, [B]: w of the expert, l of the policy's own step.

    The paper writes max(-margin, .), which is the same up to a constant.
    """
    return F.relu(margin - ratio.margin)


def smoothed_label(winner: Tensor, loser: Tensor, low: float, high: float) -> Tensor:
    """SmPO's P [B]: the softmax of two scores [B] after min-max normalisation by the data set's extremes ``low`` and ``high``."""
    if not low < high:
        raise ValueError(f"the data set's extreme scores must differ; got {low} to {high}")
    return torch.sigmoid((winner.to(widest(winner)) - loser.to(widest(loser))) / (high - low))
