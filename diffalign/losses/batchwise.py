"""Losses in which the batch has a say: a pair's loss depends on the pairs beside it.

They mean something only with more than one pair per micro-batch and process; gradient accumulation does not help. With one pair
AOT is plain DPO. Reordering a batch reorders its losses and changes nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.losses.baselines import MovingMargin
from diffalign.losses.pairwise import dpo
from diffalign.losses.registry import loss
from diffalign.settings import option
from diffalign.types import LogLikelihood, LogRatio


def _sorted_logistic(first: Tensor, second: Tensor, label: Tensor, beta: float) -> Tensor:
    """DPO between the k-th smallest of ``first`` [B] and of ``second`` [B]; place k's loss goes to the owner of ``first``'s k-th.

    A sorted place belongs to no single pair, so that every place has the batch's mean label (of pairs turned P >= 1/2).
    """
    order = first.argsort(stable=True)
    h = beta * (first[order] - second.sort().values)
    p = torch.maximum(label, 1.0 - label).to(h.dtype).mean()
    places = -p * F.logsigmoid(h) - (1.0 - p) * F.logsigmoid(-h)
    return torch.zeros_like(places).index_copy(0, order, places)


def _oriented(winner: Tensor, loser: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The two sides, swapped where the label says that the loser is preferred."""
    swap = label < 0.5
    return torch.where(swap, loser, winner), torch.where(swap, winner, loser)


@loss(paper="2406.05882", mixes_batch=True)
def aot(policy: LogLikelihood, reference: LogLikelihood, label: Tensor, beta: float) -> Tensor:
    """AOT, paired: the policy's margins should dominate the reference's as distributions, not pair by pair.

    Melnyk et al. 2024, arXiv 2406.05882: margins ``D = x_w - x_l`` of the batch are sorted under policy and reference, and
    ``-log sigma(beta (D_(k) - D_ref(k)))`` compares equal ranks. [B], each place's loss given to the pair with the policy's
    margin there. Pairs with P < 1/2 are turned round first; the mean over the batch of max(P, 1 - P) is the label of every
    place, so that equal labels of 1 - e are TRL's ``label_smoothing`` and a batch of ties pulls the distributions together. TRL
    returns the places in sorted order. As long as the policy is near the reference both rank the batch alike, and this is DPO:
    errors differ more between pictures and timesteps than between the two models.
    """
    winner, loser = _oriented(policy.winner, policy.loser, label)
    reference_winner, reference_loser = _oriented(reference.winner, reference.loser, label)
    return _sorted_logistic(winner - loser, reference_winner - reference_loser, label, beta)


@loss(paper="2406.05882", mixes_batch=True)
def aot_unpaired(ratio: LogRatio, label: Tensor, beta: float) -> Tensor:
    """AOT, unpaired: the winners' log-ratios should dominate the losers' as distributions.

    Melnyk et al. 2024, arXiv 2406.05882: both sides are sorted over the batch, and ``-log sigma(beta (w_(k) - l_(k)))`` compares
    equal ranks. [B], each place's loss given to the pair whose winner stands there. Labels, ties and TRL as for ``aot``.
    """
    winner, loser = _oriented(ratio.winner, ratio.loser, label)
    return _sorted_logistic(winner, loser, label, beta)


@loss(
    paper="2407.08639",
    mixes_batch=True,
    baseline=MovingMargin,
    settings={
        "sensitivity": option(0.6, "change of beta with the batch's mean margin, per unit of h", ge=0),
        "least": option(0.01, "lower bound of beta, as a share of itself", gt=0, le=1),
    },
)
def beta_dpo(ratio: LogRatio, label: Tensor, beta: float, baseline: Tensor | float, sensitivity: float, least: float) -> Tensor:
    """beta-DPO: DPO whose beta rises for batches of wide margins and falls for close ones.

    Wu et al. 2024, arXiv 2407.08639: ``beta_b = beta (1 + a (mean h - M_0))`` without gradient, where M_0 is the moving average
    of the margins (``baselines.MovingMargin``, which also has the paper's filter, ``keep``). Margins count in the label's
    direction, ``(2 P - 1) h``; a tie adds nothing to the mean and pulls its own margin to zero. The released code measures
    margins before beta and so has an ``a`` per unit of log-probability, bounds beta at 1e-3, and takes the mean over the kept
    pairs of all processes; here the mean is that of this batch. Not in TRL.
    """
    margin = ratio.margin.detach()
    mean = ((2.0 * label.to(margin.dtype) - 1.0) * margin).mean()
    factor = 1.0 + sensitivity * beta * (mean - baseline)
    return dpo(ratio, label, beta * factor.clamp(min=least))
