"""Losses that need likelihoods, not only ratios: without a reference, or with policy and reference kept apart.

``x`` is a log-likelihood of the policy; for a denoiser minus its error L, so that ``-x`` = L > 0. Where a formula wants a
probability, ``p = exp(s x) = exp(-s L)`` stands in for it: in (0, 1) and rising with the likelihood, no more. For those and for
SFT no beta can stand beside every constant: their ``scale`` is "absolute", and their constants are tied to mean errors of 0.01
to 1. Nothing holds a policy near its start here: keep the learning rate low, or add an SFT term.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.losses.labels import expected
from diffalign.losses.registry import loss
from diffalign.settings import option
from diffalign.types import LogLikelihood


@loss(paper="2311.12908", scale="absolute")
def sft(policy: LogLikelihood, label: Tensor) -> Tensor:
    """SFT on the preferred side: ``-x_w``, the denoising error itself.

    The baseline of every comparison. The expected loss for other labels: a tie is learnt from both pictures, half each.
    """
    return expected(lambda winner, _: -winner, policy.winner, policy.loser, label)


@loss(paper="2405.14734", settings={"gamma": option(0.5, "margin that is asked for, in units of h", ge=0)})
def simpo(policy: LogLikelihood, label: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO: ``-log sigma(beta (x_w - x_l) - gamma)``: no reference, a margin instead.

    Meng et al. 2024, arXiv 2405.14734; its likelihoods are means per token, ours per latent dimension. gamma is in units of h, as
    the paper's is. With gamma = 0 and an added SFT term it is CPO (arXiv 2401.08417) and, where the SFT term has a picture of its
    own, Triple-PO (arXiv 2405.16681). The expected loss for other labels; a tie pulls the margin to zero. TRL's
    ``label_smoothing`` keeps the sign of gamma in the flipped term, and so asks for a margin of gamma even for a tie.
    """

    def stated(winner: Tensor, loser: Tensor) -> Tensor:
        return -F.logsigmoid(beta * (winner - loser) - gamma)

    return expected(stated, policy.winner, policy.loser, label)


@loss(
    paper="2406.06424",
    scale="absolute",
    settings={
        "weight": option(0.1, "weight of the ratio term against the denoising error", gt=0),
        "rate": option(0.5, "s in q(L) = s L / (exp(s L) - 1)", gt=0),
    },
)
def mapo(policy: LogLikelihood, label: Tensor, beta: float, weight: float, rate: float) -> Tensor:
    """MaPO: ``L_w - weight log sigma(beta (q(L_w) - q(L_l)))`` with ``q(L) = s L / (exp(s L) - 1)``.

    Hong et al. 2024, arXiv 2406.06424, without a reference. q falls from 1 as the error grows; it is -log p times p / (1 - p) at
    p = exp(-s L). What we call beta is the paper's T = 1000 and what we call weight its beta = 0.1, so that beta is here, too,
    what multiplies the difference inside. The expected loss for other labels; a tie learns both pictures and pulls the margin to
    zero. The released code forms ``exp(s L) - 1`` by subtraction, in float32.
    """

    def q(x: Tensor) -> Tensor:
        """``e / (exp(e) - 1)`` of e = -s x, also where exp(e) has no room, and by its series where e is next to nothing."""
        error = -rate * x
        near, square = error < 0.05, error.square()
        series = 1.0 - error / 2 + square / 12 * (1.0 - square / 60 * (1.0 - square / 42))
        far = torch.where(near, 1.0, error)
        return torch.where(near, series, far * (-far).exp() / -torch.expm1(-far))

    def stated(winner: Tensor, loser: Tensor) -> Tensor:
        return -winner - weight * F.logsigmoid(beta * (q(winner) - q(loser)))

    return expected(stated, policy.winner, policy.loser, label)


def log_odds(log_p: Tensor) -> Tensor:
    """``log(p / (1 - p))`` from log p < 0."""
    return log_p - torch.log(-torch.expm1(log_p))


@loss(
    paper="2403.07691",
    scale="absolute",
    settings={
        "weight": option(0.1, "weight of the odds-ratio term against the likelihood term", gt=0),
        "rate": option(1.0, "s in p = exp(-s L)", gt=0),
    },
)
def orpo(policy: LogLikelihood, label: Tensor, beta: float, weight: float, rate: float) -> Tensor:
    """ORPO: ``-log p_w - weight log sigma(beta (odds_w - odds_l))`` with odds = log(p / (1 - p)), p = exp(s x).

    Hong et al. 2024, arXiv 2403.07691, eq. 4 and 7, where p is the geometric mean of the tokens' probabilities and beta = 1. At
    small errors the difference of log-odds is about ``log(L_l / L_w)``: it compares errors by ratio, so that beta = 1 is a
    sensible start whatever their size, and the thousands of the other losses are not. The expected loss for other labels; a tie
    learns both pictures and pulls their errors together. TRL calls weight beta, and its likelihood term averages over the
    prompt's tokens as well. (An early Diffusers script had ``L_w - 0.1 log sigma(L_w - L_l)``, which pushes the margin the wrong
    way.)
    """

    def stated(winner: Tensor, loser: Tensor) -> Tensor:
        return -winner - weight * F.logsigmoid(beta * (log_odds(winner) - log_odds(loser)))

    return expected(stated, rate * policy.winner, rate * policy.loser, label)


@loss(
    paper="2409.10571",
    scale="absolute",
    settings={
        "weight": option(0.1, "weight of the two odds terms against the likelihood term", gt=0),
        "rate": option(1.0, "s in p = exp(-s L)", gt=0),
    },
)
def asft(policy: LogLikelihood, label: Tensor, weight: float, rate: float) -> Tensor:
    """ASFT: ``-log p_w + weight [-log sigma(odds_w) - log sigma(-odds_l)]`` with p = exp(s x).

    Wang et al. 2024, arXiv 2409.10571, as arXiv 2502.01237 reduces it: ``-(1 + weight) log p_w - weight log(1 - p_l)``,
    likelihood for the winner and unlikelihood for the loser. The second term is large only where the loser's error L is near
    zero: its gradient is about weight / L. The expected loss for other labels; a tie learns both and pushes both from p = 1. Not
    in TRL.
    """

    def stated(winner: Tensor, loser: Tensor) -> Tensor:
        return -(1.0 + weight) * winner - weight * torch.log(-torch.expm1(loser))

    return expected(stated, rate * policy.winner, rate * policy.loser, label)


@loss(
    paper="2602.11902",
    settings={
        "gamma": option(0.0, "margin that is asked for beyond the reference's, in units of h", ge=0),
        "softness": option(0.0, "width of a soft bend at zero, in units of h; 0 is the sharp one", ge=0),
    },
)
def hypo(policy: LogLikelihood, reference: LogLikelihood, label: Tensor, beta: float, gamma: float, softness: float) -> Tensor:
    """HyPO: DPO that forgets the reference where the reference is wrong, ``-log sigma(beta (D - max(0, D_ref)) - gamma)``.

    Yuan et al. 2026, arXiv 2602.11902; D and D_ref are winner minus loser under policy and reference. Where the reference
    prefers the loser (D_ref < 0) DPO would be content once the policy is merely less wrong; here it must be right. ``softness``
    s replaces the bend by ``s softplus(beta D_ref / s)``. The expected loss for other labels; a tie pulls D to the middle
    between 0 and D_ref.
    No released code; not in TRL. (arXiv 2406.01462, another HyPO, needs samples of the policy.)
    """

    def mark(margin: Tensor) -> Tensor:
        return softness * F.softplus(beta * margin / softness) if softness else F.relu(beta * margin)

    margin, at_reference = policy.winner - policy.loser, reference.winner - reference.loser
    label = label.to(margin.dtype)
    kept = F.logsigmoid(beta * margin - mark(at_reference) - gamma)
    flipped = F.logsigmoid(-beta * margin - mark(-at_reference) - gamma)
    return -label * kept - (1.0 - label) * flipped
