"""How likely a model finds what it is shown. The one place where a sign is chosen: larger is always likelier.

A denoising error stands in for a negative log-likelihood (Diffusion-DPO, arXiv 2311.12908, eq. 13-14): the smaller the
error of the predicted noise, the likelier the sample. The error is a *mean* over the latent's dimensions, the convention
of the released code, under which beta = 2000...5000; divide beta by C*H*W for the paper's sum.

The error is that of what the network predicts, whatever that is: of eps, of v, of a flow's velocity. A schedule's ``error_as``
has it converted to another parametrisation by a factor of the level (``Schedule.error_weight``), for all objectives alike: with
``epsilon`` a velocity's error is multiplied by (1 - sigma)^2.

A transition of a sampled trajectory has a likelihood proper, the Gaussian density of the step (D3PO, arXiv 2311.13231, eq. 13;
DDPO, arXiv 2305.13301). Here too it is the released code's mean over dimensions; the papers' sum is C*H*W times as large.

A completion's likelihood under a language model is the product of its tokens' probabilities (DPO, arXiv 2305.18290): a sum of
log-probabilities, in which tokens may count more or less (length normalisation, LD-DPO, TGDPO: ``objectives._tokens``).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.protocols import LanguageModel, Predictor
from diffalign.references import Cached
from diffalign.schedule import Schedule
from diffalign.types import LogLikelihood, LogRatio, Noisy, NoisyPair, Texts, TransitionPair, on_both_sides, widest


def denoising_error(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error per sample: [B, ...] and [B, ...] -> [B], in float64 (float32 on MPS, which has no other), times
    ``weight`` [B] where there is one.

    The margin is beta/2 times a difference of four such errors. With beta = 5000, errors in half precision would move it by
    up to 0.3, and the last bit of float32 errors still by 3e-4. Latents are small: the cost is not measurable.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    dtype = widest(prediction)
    error = (prediction.to(dtype) - target.to(dtype)).square().flatten(1).mean(dim=1)
    return error if weight is None else weight.to(error) * error


def pair_errors(predictor: Predictor, pair: NoisyPair) -> tuple[Tensor, Tensor]:
    """Denoising errors of winner and loser, [B] each, from one call of the network on the stacked pair, or as they are known."""
    if isinstance(predictor, Cached) and pair.known is not None:
        winner, loser = pair.known.to(widest(pair.known)).unbind(dim=1)
        return winner, loser
    conditioning = on_both_sides(pair.conditioning, pair.framing)
    prediction = predictor(torch.cat([pair.winner, pair.loser]), torch.cat([pair.t, pair.t]), conditioning)
    weight = None if pair.error_weight is None else torch.cat([pair.error_weight, pair.error_weight])
    winner, loser = denoising_error(prediction, torch.cat([pair.winner_target, pair.loser_target]), weight).chunk(2)
    return winner, loser


def errors(predictor: Predictor, noisy: Noisy) -> Tensor:
    """Denoising errors [B] of single samples, from one call of the network, or as they are known."""
    if isinstance(predictor, Cached) and noisy.known is not None:
        return noisy.known.to(widest(noisy.known))
    return denoising_error(predictor(noisy.x_t, noisy.t, noisy.conditioning), noisy.target, noisy.error_weight)


def denoising(winner_error: Tensor, loser_error: Tensor) -> LogLikelihood:
    """Log-likelihoods from the denoising errors [B] of the two sides."""
    return LogLikelihood(winner=-winner_error, loser=-loser_error)


def transition(predictor: Predictor, schedule: Schedule, pair: TransitionPair, eta: float = 1.0) -> LogLikelihood:
    """Log-densities of both steps, [B] each, means over dimensions, from one call of the network.

    A step without noise has none: nan (``schedule.has_noise``).

    ``predictor`` must predict as the sampler's did: wrap it in ``solvers.Guided`` if the trajectories were guided. Then one
    call of the network holds both sides with and without the prompt, 4 B rows.
    """
    conditioning = on_both_sides(pair.conditioning)
    x_t, x_next = torch.cat([pair.winner, pair.loser]), torch.cat([pair.winner_next, pair.loser_next])
    t, t_previous = torch.cat([pair.t, pair.t]), torch.cat([pair.t_previous, pair.t_previous])
    prediction = predictor(x_t, t, conditioning)
    winner, loser = schedule.log_density(x_next, x_t, prediction, t, t_previous, eta).chunk(2)
    return LogLikelihood(winner=winner, loser=loser)


def token_log_probs(model: LanguageModel, texts: Texts) -> Tensor:
    """log p of every completion's tokens, each given what stands before it: [N, S] float64 (float32 on MPS), zero elsewhere.

    One call of the model, for the logits from the end of the shortest prompt on only: with a vocabulary
    of 150,000 the logits are most of the memory.
    """
    begins = texts.begins
    last = texts.tokens.shape[1] - begins + 1  # the position before the first token of a completion, and all after it
    logits = model(texts.tokens, texts.mask, last)
    return F.pad(log_probs(logits[:, :-1], texts.tokens[:, begins:], texts.completion[:, begins:]), (begins, 0))


def log_probs(logits: Tensor, tokens: Tensor, counted: Tensor) -> Tensor:
    """log p of ``tokens`` [N, S] under ``logits`` [N, S, V], each of the token at its own place; zero where not ``counted``.

    The logarithm of the sum is taken in float32 whatever the logits' dtype: in half precision it would be off by 0.01 to 0.1 a
    token, as much as a log-ratio may be.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    each = logits.gather(2, tokens[:, :, None])[..., 0] - logits.logsumexp(dim=2)
    return torch.where(counted, each, torch.zeros_like(each)).to(widest(each))


def completions(log_p: Tensor, weights: Tensor) -> Tensor:
    """Log-likelihoods [N] of completions from their tokens' log-probabilities [N, S], each counted ``weights`` [N, S] times."""
    return (log_p * weights.to(log_p.dtype)).sum(dim=1)


def log_ratio(policy: LogLikelihood, reference: LogLikelihood) -> LogRatio:
    """log p_policy - log p_reference for both sides, each [B]."""
    return LogRatio(winner=policy.winner - reference.winner, loser=policy.loser - reference.loser)
