"""What the policy is compared with. Every reference is a Predictor that never sees a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.protocols import Denoiser, Predictor
from diffalign.types import Conditioning
from diffalign.weights import TrainedWeights, Weights


class AdapterOff:
    """The frozen start of a LoRA run: the policy's own weights with the adapter switched off. Costs no memory."""

    kind = "adapter-off"

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        with self._denoiser.adapter_off():
            return self._denoiser(x_t, t, conditioning)


class Frozen:
    """The frozen start of a full fine-tuning run: a second network that is never trained."""

    kind = "frozen"

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self._predictor(x_t, t, conditioning)


class Past:
    """The policy as it was at some moment: its own network with the weights that were kept then, without dropout.

    The kept weights are saved with the run, so it resumes with the same one.
    """

    kind = "past"

    def __init__(self, denoiser: Denoiser, weights: TrainedWeights) -> None:
        self._denoiser, self._weights = denoiser, weights
        self._kept: Weights = {}

    def keep(self) -> None:
        """Become what the policy is now."""
        self._kept = self._weights.copy()

    def become(self, kept: Weights) -> None:
        """Become a policy of which ``TrainedWeights.copy`` was taken."""
        self._kept = self._weights.placed(kept)

    @property
    def weights(self) -> Weights:
        """What was kept; empty before anything was."""
        return self._kept

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        if not self._kept:
            raise ValueError("there is no past yet: keep() takes it")
        with self._weights.held(self._kept):
            return self._denoiser(x_t, t, conditioning)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": dict(self._kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._kept = self._weights.placed(state["kept"]) if state["kept"] else {}
