"""The nouns: frozen dataclasses with a shape on every field.

Shape legend, used in the whole package: B = pairs in a batch, C, H, W = channels, height and width of the latents,
L = text tokens, D = width of the text embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

Conditioning = Mapping[str, Tensor]
"""What a network is conditioned on, by argument name; every tensor is [B, ...]. SD: ``encoder_hidden_states`` [B, L, D]."""


@dataclass(frozen=True)
class PairBatch:
    """Pairs from a data set, encoded, with the random draws that belong to them.

    ``t`` and ``noise`` are drawn once per pair: winner and loser share them (Diffusion-DPO, arXiv 2311.12908, section 4).
    """

    winner: Tensor  # [B, C, H, W] clean latents x_0, scaled
    loser: Tensor  # [B, C, H, W] clean latents x_0, scaled
    conditioning: Conditioning
    t: Tensor  # [B] int64, in [0, T)
    noise: Tensor  # [B, C, H, W]
    label: Tensor  # [B] probability that the winner is preferred; 1/2 is a tie
    weight: Tensor  # [B] factor on the pair's loss
    index: Tensor  # [B] int64, row of the data set
    scores: Tensor | None = None  # [B, 2] float32, a judge's score of winner and loser; NaN where a pair has none

    def __len__(self) -> int:
        return len(self.t)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PairBatch:
        """Move to a device; ``dtype`` applies to latents, noise and conditioning, never to labels, weights or scores."""

        def move(x: Tensor) -> Tensor:
            return x.to(device=device, dtype=dtype if dtype and x.is_floating_point() else None, non_blocking=True)

        return PairBatch(
            winner=move(self.winner),
            loser=move(self.loser),
            conditioning={k: move(v) for k, v in self.conditioning.items()},
            t=self.t.to(device),
            noise=move(self.noise),
            label=self.label.to(device),
            weight=self.weight.to(device),
            index=self.index,
            scores=None if self.scores is None else self.scores.to(device),
        )

    def slice(self, start: int, stop: int) -> PairBatch:
        """Pairs ``start`` to ``stop`` of the batch."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        cut = {name: value[start:stop] for name, value in tensors.items()}
        return replace(self, conditioning={k: v[start:stop] for k, v in self.conditioning.items()}, **cut)


@dataclass(frozen=True)
class NoisyPair:
    """A pair at one noise level: what the network sees and what it should say."""

    winner: Tensor  # [B, C, H, W] x_t of the preferred sample
    loser: Tensor  # [B, C, H, W] x_t of the other one
    winner_target: Tensor  # [B, C, H, W] in the network's own parametrisation
    loser_target: Tensor  # [B, C, H, W]
    t: Tensor  # [B] int64
    conditioning: Conditioning


@dataclass(frozen=True)
class TransitionPair:
    """The same step of two trajectories for one prompt: where each was, and where it went."""

    winner: Tensor  # [B, C, H, W] x_t on the preferred trajectory
    loser: Tensor  # [B, C, H, W] x_t on the other one
    winner_next: Tensor  # [B, C, H, W] stored x at t_previous
    loser_next: Tensor  # [B, C, H, W]
    t: Tensor  # [B] int64
    t_previous: Tensor  # [B] int64; -1 is the clean end
    conditioning: Conditioning


@dataclass(frozen=True)
class LogLikelihood:
    """How likely one model finds the two sides of each pair, up to a constant; larger is likelier. float32 at least."""

    winner: Tensor  # [B]
    loser: Tensor  # [B]


@dataclass(frozen=True)
class LogRatio:
    """log-likelihood under the policy minus log-likelihood under the reference, for both sides. float32 at least."""

    winner: Tensor  # [B]
    loser: Tensor  # [B]

    @property
    def margin(self) -> Tensor:
        """[B] winner minus loser: positive where the policy has moved towards the preferred side."""
        return self.winner - self.loser


@dataclass(frozen=True)
class Outcome:
    """What an objective says about a batch: one loss per pair, and the numbers worth watching, one per pair."""

    loss: Tensor  # [B], before the pair's weight
    t: Tensor  # [B]
    metrics: Mapping[str, Tensor]  # each [B], detached
