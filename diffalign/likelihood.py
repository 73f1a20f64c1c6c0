"""How likely a model finds what it is shown. The one place where a sign is chosen: larger is always likelier.

A denoising error stands in for a negative log-likelihood (Diffusion-DPO, arXiv 2311.12908, eq. 13-14): the smaller the
error of the predicted noise, the likelier the sample. The error is a *mean* over the latent's dimensions, the convention
of the released code, under which beta = 2000...5000; divide beta by C*H*W for the paper's sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.protocols import Predictor
from diffalign.types import LogLikelihood, LogRatio, NoisyPair


def denoising_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per sample: [B, ...] and [B, ...] -> [B], in float64 (float32 on MPS, which has no other).

    The margin is beta/2 times a difference of four such errors. With beta = 5000, errors in half precision would move it by
    up to 0.3, and the last bit of float32 errors still by 3e-4. Latents are small: the cost is not measurable.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    dtype = torch.float32 if prediction.device.type == "mps" else torch.float64
    return (prediction.to(dtype) - target.to(dtype)).square().flatten(1).mean(dim=1)


def pair_errors(predictor: Predictor, pair: NoisyPair) -> tuple[Tensor, Tensor]:
    """Denoising errors of winner and loser, [B] each, from one call of the network on the stacked pair."""
    conditioning = {name: torch.cat([value, value]) for name, value in pair.conditioning.items()}
    prediction = predictor(torch.cat([pair.winner, pair.loser]), torch.cat([pair.t, pair.t]), conditioning)
    winner, loser = denoising_error(prediction, torch.cat([pair.winner_target, pair.loser_target])).chunk(2)
    return winner, loser


def denoising(winner_error: Tensor, loser_error: Tensor) -> LogLikelihood:
    """Log-likelihoods from the denoising errors [B] of the two sides."""
    return LogLikelihood(winner=-winner_error, loser=-loser_error)


def log_ratio(policy: LogLikelihood, reference: LogLikelihood) -> LogRatio:
    """log p_policy - log p_reference for both sides, each [B]."""
    return LogRatio(winner=policy.winner - reference.winner, loser=policy.loser - reference.loser)
