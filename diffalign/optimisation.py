"""Optimizers, learning-rate schedules and weight averaging: what a step does to the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.settings import check_options, option
from diffalign.sharding import Gathered, is_sharded, joined, own, share


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer and its learning rate schedule, by default those of Diffusion-DPO.

    ``optimizer`` is ``adamw`` (Loshchilov & Hutter 2019, arXiv 1711.05101), or what is known by ``register``: ``adafactor`` of
    ``pipelines.optimizers``, and your own.
    """

    learning_rate: float = option(2.048e-5, "peak learning rate", gt=0)
    optimizer: str = option(
        "adamw", "optimizer: adamw, or adafactor (second moments by rows and columns, no momentum: less memory)"
    )
    beta1: float = option(0.9, "decay of AdamW's first moment", ge=0, lt=1)
    beta2: float = option(0.999, "decay of AdamW's second moment", ge=0, lt=1)
    weight_decay: float = option(1e-2, "decoupled weight decay", ge=0)
    epsilon: float = option(1e-8, "epsilon of AdamW, in its denominator", gt=0)
    schedule: Literal["constant", "linear", "cosine"] = option(
        "constant", "learning rate schedule after warm-up: constant, linear or cosine"
    )
    warmup_steps: int = option(0, "optimizer steps of linear warm-up", ge=0)
    max_grad_norm: float = option(
        1.0, "largest global norm of the gradients, to which they are clipped; 0 switches clipping off", ge=0
    )
    eight_bit: bool = option(False, "8-bit AdamW through bitsandbytes")

    def __post_init__(self) -> None:
        check_options(self)
        if self.optimizer not in _KINDS:
            raise ValueError(f"optimizer is one of {', '.join(sorted(_KINDS))}; got {self.optimizer!r}")
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if idle := [name for name in changed if name in self.kind.ignores]:
            raise ValueError(f"{', '.join(idle)} would do nothing: {self.optimizer} has no use for it")

    @property
    def kind(self) -> OptimizerKind:
        """The entry of the chosen optimizer in the table."""
        return _KINDS[self.optimizer]


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer: how it is built, and what a run has to know of it beforehand."""

    build: Callable[[list[nn.Parameter], OptimizerSettings], torch.optim.Optimizer]
    moments_bytes: Callable[[torch.Size, OptimizerSettings], int]  # what it keeps for one weight between two steps
    ignores: tuple[str, ...] = ()  # settings that do nothing for it
    by_element: bool = True  # whether shares of a weight can be updated without the rest of it (FSDP2, ZeRO)


def _moments_of_adamw(shape: torch.Size, settings: OptimizerSettings) -> int:
    return shape.numel() * (2 if settings.eight_bit else 8)


def register(
    name: str,
    build: Callable[[list[nn.Parameter], OptimizerSettings], torch.optim.Optimizer],
    *,
    moments_bytes: Callable[[torch.Size, OptimizerSettings], int] = _moments_of_adamw,
    ignores: Iterable[str] = (),
    by_element: bool = True,
) -> None:
    """Make an optimizer known as ``name`` to the setting ``optimizer``, of runs in this process.

    Another one of the same name takes the place of the first, as when a notebook's cell is run again.

    Args:
        build: from the parameters and the settings to the optimizer. Its state is saved and restored by ``state_dict``.
        moments_bytes: what it keeps for a weight of some shape, for estimates of memory; as AdamW's, where nothing is said.
        ignores: settings that do nothing for it, and are refused where somebody changes them.
        by_element: whether shares of a weight can be updated without the rest of it. If not, FSDP2 and ZeRO are refused.

    Raises:
        UserError: the name is that of a shipped optimizer.
    """
    if name in SHIPPED and name in _KINDS:
        raise UserError(f"There is an optimizer {name!r} already: give yours another name.")
    _KINDS[name] = OptimizerKind(build, moments_bytes, tuple(ignores), by_element)


def build_optimizer(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer that the settings name."""
    return settings.kind.build(list(parameters), settings)


def _adamw(parameters: list[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW, fused where torch has it for the parameters' device; 8-bit through bitsandbytes if the settings say so."""
    options = dict(
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        eps=settings.epsilon,
    )
    if settings.eight_bit:
        return require_bitsandbytes().optim.AdamW8bit(parameters, **options)
    fused = all(p.is_floating_point() and p.device.type in ("cuda", "cpu", "xpu", "mps") for p in parameters)
    return torch.optim.AdamW(parameters, fused=fused, **options)


SHIPPED = ("adamw", "adafactor")
"""Names that stay theirs."""
_KINDS = {"adamw": OptimizerKind(_adamw, _moments_of_adamw)}


def moments_bytes(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> int:
    """Bytes of the state that the optimizer keeps for these parameters between two steps."""
    return sum(settings.kind.moments_bytes(p.shape, settings) for p in parameters)


def require_bitsandbytes() -> Any:
    """The module, or a UserError that says how to get it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError("8-bit AdamW needs bitsandbytes: pip install 'diffalign[8bit]', or set eight_bit to false.") from error
    return bitsandbytes


def learning_rate_factor(step: int, steps: int, settings: OptimizerSettings) -> float:
    """The factor on the learning rate at optimizer step ``step`` (from 0): linear warm-up, then the schedule to ``steps``."""
    if step < settings.warmup_steps:
        return step / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    progress = (step - settings.warmup_steps) / max(steps - settings.warmup_steps, 1)
    if settings.schedule == "linear":
        return max(1.0 - progress, 0.0)
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def build_schedule(
    optimizer: torch.optim.Optimizer, steps: int, settings: OptimizerSettings
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule as torch's LambdaLR; its state is one integer, so it resumes with any optimizer."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, settings))


class Ema:
    """Exponential moving average of the trained parameters, with a warm-up that forgets the start: min(decay, (1+n)/(10+n))."""

    copies_on_load = True

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self._parameters = list(parameters)
        self._average = self._copies()
        self._decay, self._updates = decay, 0
        self._sharded, self._gathered = is_sharded(self._parameters), Gathered()

    def _current(self) -> list[Tensor]:
        """The parameters, or this process's shares of them."""
        return [own(p.detach()) for p in self._parameters]

    def _copies(self) -> list[Tensor]:
        return [p.clone() for p in self._current()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the current parameters."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        torch._foreach_lerp_(self._average, self._current(), 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the parameters hold the average."""
        kept = self._copies()
        self._copy(self._average)
        try:
            yield
        finally:
            self._copy(kept)

    @contextmanager
    def carried(self) -> Iterator[None]:
        """By how much the parameters are moved within this context, by so much the average moves as well."""
        before = self._copies()
        yield
        torch._foreach_add_(self._average, torch._foreach_sub(self._current(), before))

    @torch.no_grad()
    def _copy(self, values: list[Tensor]) -> None:
        for mine, value in zip(self._current(), values, strict=True):
            mine.copy_(value)

    def collect(self) -> None:
        """Before the average of sharded parameters is saved, on all processes."""
        if self._sharded:
            self._gathered.collect([joined(a, p) for a, p in zip(self._average, self._parameters, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        average = self._gathered.taken() if self._sharded else [a.clone() for a in self._average]
        return {"updates": self._updates, "average": average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._updates = state["updates"]
        for mine, saved, parameter in zip(self._average, state["average"], self._parameters, strict=True):
            mine.copy_(share(saved, parameter))
