"""Scalars that some losses measure log-ratios against, kept outside the losses so that these stay pure.

Of each training batch (never in validation) ``update`` is given what the baseline ``watches``, gathered over all processes;
then the batch's losses are computed against ``value``, and ``state_dict`` is saved with the run. All are in units of a
log-ratio, before beta. No value ever reaches the host on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from diffalign.types import widest

Watched = Literal["mismatched", "sides", "margins"]
"""Log-ratios of samples with another's prompt [M]; of all winners and losers [2B]; winners' minus losers' [B]."""


class Baseline(Protocol):
    """A scalar that is learnt from the log-ratios that go by."""

    watches: ClassVar[Watched]

    @property
    def value(self) -> Tensor:
        """Scalar, without gradient."""
        ...

    def update(self, values: Tensor) -> None:
        """Take in the watched log-ratios of one batch (of all processes)."""
        ...

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: Mapping[str, float]) -> None: ...


def _wide(values: Tensor) -> Tensor:
    """Detached, float64 where the device has it."""
    return values.detach().to(widest(values))


class NoBaseline:
    """No baseline at all."""

    watches: ClassVar[Watched] = "sides"

    def __init__(self) -> None:
        self.value = torch.zeros(())

    def update(self, values: Tensor) -> None:
        """Learns nothing; only moves to where losses are computed."""
        self.value = torch.zeros((), device=values.device)

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Nothing was learnt."""


class _LatestMean:
    """``max(0, mean)`` of what was watched in the latest batch."""

    def __init__(self) -> None:
        self._value = torch.zeros(())

    @property
    def value(self) -> Tensor:
        return self._value

    def update(self, values: Tensor) -> None:
        self._value = _wide(values).mean().clamp(min=0.0)

    def state_dict(self) -> dict[str, float]:
        return {"value": float(self._value)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._value = torch.tensor(state["value"], dtype=torch.float64)


class MismatchedMean(_LatestMean):
    """``max(0, mean)`` of the latest batch of mismatched samples: KTO's estimate of KL(policy || reference)."""

    watches: ClassVar[Watched] = "mismatched"


class BatchMean(_LatestMean):
    """``max(0, mean)`` of the latest batch's own log-ratios: what the released Diffusion-KTO takes for the KL. Costs nothing."""

    watches: ClassVar[Watched] = "sides"


class RunningMean:
    """The mean of everything seen since the start of training: BCO's shift. Zero before the first batch."""

    watches: ClassVar[Watched] = "sides"

    def __init__(self) -> None:
        self._mean, self._count = torch.zeros(()), 0

    @property
    def value(self) -> Tensor:
        return self._mean

    def update(self, values: Tensor) -> None:
        values = _wide(values)
        self._count += values.numel()
        mean = self._mean.to(values)
        self._mean = mean + (values - mean).sum() / self._count

    def state_dict(self) -> dict[str, float]:
        return {"mean": float(self._mean), "count": self._count}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._mean, self._count = torch.tensor(state["mean"], dtype=torch.float64), int(state["count"])


class MovingMargin:
    """Exponential averages of the margins' mean and deviation over batches: beta-DPO's M_0.

    The first batch sets both. (The released code starts them at zero, so that for its first twenty steps or so every batch
    looks better than usual and the filter is too narrow.)
    """

    watches: ClassVar[Watched] = "margins"

    def __init__(self, momentum: float = 0.9) -> None:
        self.momentum = momentum
        self._mean = self._deviation = torch.zeros(())
        self._batches = 0

    @property
    def value(self) -> Tensor:
        return self._mean

    @property
    def deviation(self) -> Tensor:
        return self._deviation

    def update(self, values: Tensor) -> None:
        values = _wide(values)
        deviation = values.std() if values.numel() > 1 else self._deviation.to(values)
        keep = self.momentum if self._batches else 0.0
        self._mean = keep * self._mean.to(values) + (1.0 - keep) * values.mean()
        self._deviation = keep * self._deviation.to(values) + (1.0 - keep) * deviation
        self._batches += 1

    def keep(self, margins: Tensor, drop: float, generator: torch.Generator) -> Tensor:
        """Which pairs [N] of a batch to learn from: a share ``drop`` is left out, mostly outliers (beta-DPO, section 4.3).

        Drawn without replacement with weights ``exp(-(margin - mean)^2 / (2 deviation^2))``. Every process must call it with
        the same margins (gathered) and an equally seeded CPU generator.
        """
        margins = _wide(margins).cpu()
        deviation = self._deviation.cpu().clamp(min=torch.finfo(margins.dtype).tiny)
        weight = -0.5 * ((margins - self._mean.cpu()) / deviation).square()
        uniform = torch.rand(margins.shape, generator=generator, dtype=margins.dtype)
        order = weight - torch.log(-torch.log(uniform))  # the largest n of log weight + Gumbel noise are such a draw
        count = max(1, int(margins.numel() * (1.0 - drop)))
        kept = torch.zeros_like(margins, dtype=torch.bool)
        kept[order.topk(count).indices] = True
        return kept

    def state_dict(self) -> dict[str, float]:
        return {"mean": float(self._mean), "deviation": float(self._deviation), "batches": self._batches}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._mean = torch.tensor(state["mean"], dtype=torch.float64)
        self._deviation = torch.tensor(state["deviation"], dtype=torch.float64)
        self._batches = int(state["batches"])
