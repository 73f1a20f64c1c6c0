"""What the policy is compared with. Every reference is a Predictor that never sees a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.protocols import Denoiser, Predictor
from diffalign.types import Conditioning


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
