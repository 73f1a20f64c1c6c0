"""What a label that is not simply 1 means."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def smoothed(label: Tensor, noise: float) -> Tensor:
    """The label [B] when a share ``noise`` of the labels is flipped: ``P (1 - e) + (1 - P) e``. A tie stays one."""
    return label * (1.0 - noise) + (1.0 - label) * noise


def expected(stated: Callable[[Tensor, Tensor], Tensor], winner: Tensor, loser: Tensor, label: Tensor) -> Tensor:
    """The expected loss [B], ``P stated(winner, loser) + (1 - P) stated(loser, winner)``."""
    label = label.to(winner.dtype)
    return label * stated(winner, loser) + (1.0 - label) * stated(loser, winner)
