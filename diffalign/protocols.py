"""What the core asks of the world outside. Model families (``pipelines/families``) and judges provide these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from diffalign.schedule import Schedule
from diffalign.types import Conditioning


@runtime_checkable
class Predictor(Protocol):
    """Anything that predicts from a noisy latent: the policy, or a reference."""

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """``x_t`` [B, C, H, W], ``t`` [B] -> the network's prediction [B, C, H, W], in its own parametrisation.

        ``t`` is int64 where the schedule is a table of steps, float32 in [0, T] where it is a flow.
        """
        ...


@runtime_checkable
class Policy(Protocol):
    """A network that is being trained, whatever it predicts."""

    @property
    def network(self) -> nn.Module:
        """The module that is trained, wrapped for distribution, saved and resumed."""
        ...

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters an optimizer should see: all of them, or the adapter's."""
        ...

    def adapter_off(self) -> AbstractContextManager[None]:
        """Within this context the network is the one before alignment. Raises if there is no adapter."""
        ...


@runtime_checkable
class Denoiser(Predictor, Policy, Protocol):
    """A trainable network of one family of diffusion models."""

    schedule: Schedule


@runtime_checkable
class LanguageModel(Protocol):
    """A language model that says what comes next: the policy, or a reference."""

    def __call__(self, tokens: Tensor, mask: Tensor, last: int | None = None) -> Tensor:
        """``tokens`` [N, S] int64, ``mask`` [N, S] bool -> logits [N, S, V], or [N, last, V] of the last positions alone."""
        ...


@runtime_checkable
class TextPolicy(LanguageModel, Policy, Protocol):
    """A trainable causal language model."""


@runtime_checkable
class Encoder(Protocol):
    """The frozen parts that turn pictures and prompts into what the network sees. Used once, to fill the cache."""

    def fingerprint(self) -> Mapping[str, Any]:
        """Everything an encoding depends on (weights, scaling, lengths), as plain values; equal means interchangeable."""
        ...

    def encode_images(self, pixels: Tensor) -> dict[str, Tensor]:
        """``pixels`` [B, 3, H, W] in [-1, 1] -> ``mean`` and ``std`` of the scaled latents, each [B, C, h, w] float32."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """One conditioning tensor [B, ...] per name, float32."""
        ...
