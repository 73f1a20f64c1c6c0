"""Losses as pure functions of the two log-ratios: no network, no mean, one number per pair.

Notation: ``w`` and ``l`` are the log-ratios of winner and loser [B], ``P`` the label [B], the probability that the winner is
preferred (1 in clean data, 1/2 for a tie), ``h`` the scaled margin.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from diffalign.types import LogRatio


def dpo(ratio: LogRatio, label: Tensor, beta: float) -> Tensor:
    """``-P log sigma(h) - (1 - P) log sigma(-h)`` with ``h = beta (w - l)``, [B].

    DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7); with P < 1 the conservative form of its section on label noise.
    A tie (P = 1/2) pulls the margin to zero.
    """
    h = beta * ratio.margin
    label = label.to(h.dtype)
    return -label * F.logsigmoid(h) - (1.0 - label) * F.logsigmoid(-h)
