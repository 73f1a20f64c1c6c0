"""The head that LAION's second aesthetic predictor and ImageReward have in common: five linear layers, nothing between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

NUMBERS = (0, 2, 4, 6, 7)
"""The layers' numbers in the released files; dropouts lie between."""


def build(widths: Sequence[int]) -> nn.Module:
    """Linear layers from each width to the next."""
    from torch import nn

    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths))).eval().requires_grad_(False)


def renumbered(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """``{prefix}0.weight`` ... ``{prefix}7.bias`` by the names of ``build``; other names stay, to be found out."""
    places = {f"{prefix}{number}.{kind}": f"{i}.{kind}" for i, number in enumerate(NUMBERS) for kind in ("weight", "bias")}
    return {places.get(name, name): value for name, value in state.items()}
