"""Training health: the numbers that explain "the loss stays at 0.69", per pair and per timestep bin.

At the start policy and reference agree, every margin is 0 and the loss is ln 2 = 0.693. It moves slowly because a margin is
a small difference of errors times beta; accuracy on fixed validation draws moves first. Two ways to go wrong show in the
drifts (change of the denoising error against the reference): both near 0 means that nothing is learnt; both positive means
that winner and loser are unlearnt together (likelihood displacement).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from diffalign.types import LogLikelihood, LogRatio

BINS = 10
"""Timestep bins of equal width over [0, T)."""
BINNED = ("accuracy", "margin", "winner_drift", "loser_drift")
"""Metrics that are logged to trackers per bin."""


@torch.no_grad()
def denoising_health(
    ratio: LogRatio, policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], scale: float, label: Tensor
) -> dict[str, Tensor]:
    """Metrics [B] of one batch, from the log-ratios, the errors (winner [B], loser [B]) of both models, margin's scale, labels.

    ``margin`` is the logit h = scale * (w - l), 0 of a tie; ``accuracy`` is 1 where it is positive, 1/2 where it is exactly zero;
    ``winner_drift`` and ``loser_drift`` are errors minus the reference's; ``gradient_factor`` = sigma(-h) is the share of
    the full gradient that the pair still gives.
    """
    margin = scale * ratio.margin
    return {
        **_ranking(margin, label),
        "winner_drift": -ratio.winner,
        "loser_drift": -ratio.loser,
        "winner_error": policy[0].detach(),
        "loser_error": policy[1].detach(),
        "reference_winner_error": reference[0],
        "reference_loser_error": reference[1],
        "gradient_factor": torch.sigmoid(-margin),
    }


@torch.no_grad()
def policy_health(policy: tuple[Tensor, Tensor], scale: float, label: Tensor) -> dict[str, Tensor]:
    """The part of ``denoising_health`` that needs no reference: the policy's own margin, accuracy and errors."""
    return {
        **_ranking(scale * (policy[1] - policy[0]), label),
        "winner_error": policy[0].detach(),
        "loser_error": policy[1].detach(),
    }


@torch.no_grad()
def token_health(
    policy: LogLikelihood, reference: LogLikelihood | None, scale: float, lengths: tuple[Tensor, Tensor], label: Tensor
) -> dict[str, Tensor]:
    """Metrics [B] of completions, from both models' log-likelihoods, the numbers of tokens (winner [B], loser [B]) and labels.

    ``winner_ratio`` and ``loser_ratio`` are log-ratios, positive where a completion has become likelier; the log-likelihoods are
    per token. Without a reference the margin is the policy's own.
    """
    margin = scale * (policy.winner - policy.loser)
    out = {
        "winner_log_p": policy.winner.detach() / lengths[0],
        "loser_log_p": policy.loser.detach() / lengths[1],
    }
    if reference is not None:
        ratios = policy.winner - reference.winner, policy.loser - reference.loser
        margin = scale * (ratios[0] - ratios[1])
        out |= {"winner_ratio": ratios[0], "loser_ratio": ratios[1], "gradient_factor": torch.sigmoid(-margin)}
    return {**_ranking(margin, label), **out}


def _ranking(margin: Tensor, label: Tensor) -> dict[str, Tensor]:
    """``margin`` [B] and ``accuracy`` [B]. A tie (``label`` 1/2) has no winner, only a side that stands first by chance: its
    margin counts as 0 and its accuracy as 1/2. A margin that is not finite stays so."""
    counted = margin * (label != 0.5)
    return {"margin": counted, "accuracy": 0.5 * (1.0 + counted.sign())}


def by_timestep(t: Tensor, metrics: Mapping[str, Tensor], train_steps: int) -> list[dict[str, float]]:
    """Means of the metrics [N] within each timestep bin, for ``t`` [N] in [0, T]; bins without a sample are left out.

    Each entry has ``t_from`` and ``t_to`` (exclusive but for T itself), ``count``, and one mean per metric.
    """
    edges = torch.linspace(0, train_steps, BINS + 1).round().long()
    which = (torch.bucketize(t.cpu(), edges.to(t.dtype), right=True) - 1).clamp(max=BINS - 1)
    out = []
    for b in range(BINS):
        inside = which == b
        if inside.any():
            means = {name: float(value.float().cpu()[inside].mean()) for name, value in metrics.items()}
            out.append({"t_from": int(edges[b]), "t_to": int(edges[b + 1]), "count": int(inside.sum()), **means})
    return out


def error_over_pairs(values: Tensor, rows: Tensor) -> float:
    """The standard error of the mean of ``values`` [N], where those of one row of the data set (``rows`` [N]), its draws, are no
    independent samples; NaN of a single row."""
    found, place = rows.unique(return_inverse=True)
    sums = torch.zeros(len(found), dtype=values.dtype).index_add(0, place, values)
    means = sums / place.bincount()
    return float(means.std() / len(found) ** 0.5) if len(found) > 1 else math.nan


_UNMOVED = (
    "The policy has not moved from the reference: raise the learning rate, check that parameters are trainable, or look whether "
    "all pairs are ties, where there is nothing to prefer."
)


def advice(validation: Mapping[str, float], margin_error: float = 0.0) -> str | None:
    """One plain sentence when the validation metrics show a known trouble, else None; ``margin_error`` is the standard error of
    the mean margin (NaN if unknown), so that noise about zero accuses nobody's labels."""
    if "winner_ratio" in validation:
        return _advice_on_texts(validation, margin_error)
    if "reference_winner_error" not in validation:
        return None
    winner, loser = validation["winner_drift"], validation["loser_drift"]
    scale = max(validation["reference_winner_error"], 1e-12)
    if abs(winner) < 1e-6 * scale and abs(loser) < 1e-6 * scale:
        return _UNMOVED
    if winner > 0.02 * scale and loser > 0.02 * scale:
        return (
            f"Winner and loser are both unlearnt (likelihood displacement: their errors rose by {winner / scale:.1%} and "
            f"{loser / scale:.1%} of the winner's). Look at pictures and win rates: where these do not gain, lower the learning "
            "rate or raise beta."
        )
    if _prefers_losers(validation, margin_error):
        return "The margin on held-out pairs is negative: the policy prefers the losers; check the labels' orientation."
    return None


def _prefers_losers(validation: Mapping[str, float], margin_error: float) -> bool:
    """Whether most pairs are ranked the wrong way round, and their mean margin is negative beyond what chance does."""
    return validation.get("accuracy", 0.0) < 0.5 and validation["margin"] < -2.0 * margin_error


def _advice_on_texts(validation: Mapping[str, float], margin_error: float) -> str | None:
    winner, loser = validation["winner_ratio"], validation["loser_ratio"]
    if abs(winner) < 1e-6 and abs(loser) < 1e-6:
        return _UNMOVED
    if winner < -5.0 and loser < winner:
        return (
            "Preferred rewrites have become less likely, too (likelihood displacement): raise beta, lower the learning rate, or "
            "add an SFT term (sft_weight, gold_weight)."
        )
    if _prefers_losers(validation, margin_error):
        return "The margin on held-out pairs is negative: the policy prefers rejected rewrites; check the labels' orientation."
    return None
