"""Losses that hold each side to a mark of its own, not only the difference: they see both sinking together.

``u = beta w`` and ``v = beta l`` are the scaled log-ratios (implicit rewards). All take (ratio, label, beta) and give [B].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.losses.labels import expected
from diffalign.losses.registry import loss
from diffalign.settings import option
from diffalign.types import LogRatio


@loss(paper="2402.05369")
def nca(ratio: LogRatio, label: Tensor, beta: float) -> Tensor:
    """NCA: ``-log sigma(u) - 1/2 log sigma(-u) - 1/2 log sigma(-v)``, the winner's likelihood kept up.

    Chen et al. 2024, arXiv 2402.05369, for one pair with clear preference. On the winner it is least at u = log 2: it rises
    there and then stays; the loser falls without end. The expected loss for other labels; a tie holds both sides at zero.
    TRL's ``nca_pair`` is this at P = 1.
    """

    def stated(u: Tensor, v: Tensor) -> Tensor:
        return -F.logsigmoid(u) - 0.5 * F.logsigmoid(-u) - 0.5 * F.logsigmoid(-v)

    return expected(stated, beta * ratio.winner, beta * ratio.loser, label)


@loss(paper="2408.06266")
def apo_zero(ratio: LogRatio, label: Tensor, beta: float) -> Tensor:
    """APO-zero: ``1 - sigma(u) + sigma(v)``, winner up and loser down, each from where the reference is.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7: for winners better than what the model makes. Bounded: a side that has
    moved far, either way, has no gradient left. The expected loss for other labels, which for a tie is 1 whatever the ratios:
    ties teach nothing. KTO with its baseline at zero. TRL's ``apo_zero`` is this at P = 1 (and ignores its divergence option).
    """
    return expected(lambda u, v: torch.sigmoid(-u) + torch.sigmoid(v), beta * ratio.winner, beta * ratio.loser, label)


@loss(paper="2408.06266")
def apo_down(ratio: LogRatio, label: Tensor, beta: float) -> Tensor:
    """APO-down: ``sigma(u) + 1 - sigma(u - v)``, both down, the loser more.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8: for winners that are worse than what the model makes. The expected loss
    for other labels; of a tie only the pull downwards is left, on both sides alike: drop ties. TRL's ``apo_down`` is this at
    P = 1 (its divergence option reaches the second term only).
    """
    return expected(lambda u, v: torch.sigmoid(u) + torch.sigmoid(v - u), beta * ratio.winner, beta * ratio.loser, label)


@loss(paper="2405.00675")
def sppo(ratio: LogRatio, label: Tensor, beta: float) -> Tensor:
    """SPPO: ``(u - (P - 1/2))^2 + (v + (P - 1/2))^2``, each side to its probability of winning.

    Wu et al. 2024, arXiv 2405.00675, eq. 4.7, whose squares are of raw log-ratios with the targets divided by beta; ours is
    beta^2 times that, so that the size of the loss does not depend on units. P is meant to come from a judge and the pairs from
    the policy. With P = 1 it is TRL's ``sppo_hard`` (times beta^2). A tie holds both sides at zero.
    """
    target = label.to(ratio.winner.dtype) - 0.5
    return (beta * ratio.winner - target).square() + (beta * ratio.loser + target).square()


@loss(paper="2412.14516", settings={"target": option(0.5, "scaled log-ratio that a winner should reach", gt=0)})
def cal_dpo(ratio: LogRatio, label: Tensor, beta: float, target: float) -> Tensor:
    """Cal-DPO: DPO plus both sides calibrated, ``-log sigma(h) + (u - c)^2 + (v + c)^2``.

    Xiao et al. 2024, arXiv 2412.14516, as arXiv 2502.01237 writes it: on raw log-ratios, with c = 1 / (2 beta'). That is ours at
    beta = 1 and ``target`` = 1 / (2 beta'); the default is c = 1/2 for ratios that beta has brought to order one, where
    winners and losers end at +-1/2. The expected loss for other labels; for a tie the two calibrations average to holding both
    sides at zero. Not in TRL.
    """

    def stated(u: Tensor, v: Tensor) -> Tensor:
        return -F.logsigmoid(u - v) + (u - target).square() + (v + target).square()

    return expected(stated, beta * ratio.winner, beta * ratio.loser, label)
