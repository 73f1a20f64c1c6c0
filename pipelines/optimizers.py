"""Optimizers of Transformers that PyTorch lacks; importing this module registers them for the setting ``optimizer``."""

from __future__ import annotations

import torch
from torch import nn

from diffalign.optimisation import OptimizerSettings, register


def adafactor(parameters: list[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) as the released Diffusion-DPO and SmPO have it for SDXL.

    There is no first moment, updates are clipped to an RMS of 1, and the learning rate is as it is given: PyTorch's own Adafactor
    multiplies it by the RMS of each weight.
    """
    from transformers.optimization import Adafactor

    rate, decay = settings.learning_rate, settings.weight_decay
    return Adafactor(parameters, lr=rate, weight_decay=decay, scale_parameter=False, relative_step=False)


def _moments_of_adafactor(shape: torch.Size, settings: OptimizerSettings) -> int:
    """Means over the last and over the last but one dimension of a squared gradient; all of it where there is one dimension."""
    numbers = shape[:-1].numel() + (shape[:-2] + shape[-1:]).numel() if len(shape) > 1 else shape.numel()
    return 4 * numbers


register(
    "adafactor",
    adafactor,
    moments_bytes=_moments_of_adafactor,
    ignores=("beta1", "beta2", "epsilon", "eight_bit"),
    by_element=False,
)
