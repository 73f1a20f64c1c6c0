"""What the objectives on denoising errors share: errors of both models on a noisy pair, and any loss of the family on them.

    x = -error                      log-likelihood stand-in of a side under a model
    w, l = x_policy - x_reference   the two log-ratios
    loss(w, l; label, scale)        scale = beta/2: mean errors and the factor of the released Diffusion-DPO code

Where a loss does not use the reference (SFT, SimPO, MaPO ...), training does not call it. Validation on held-out pairs always
does, so that drift and accuracy can be compared across losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from diffalign import losses
from diffalign.errors import UserError
from diffalign.health import denoising_health, policy_health
from diffalign.learner import Kind, Learner, RunContext
from diffalign.likelihood import denoising, errors, log_ratio, pair_errors
from diffalign.losses.baselines import Baseline
from diffalign.objectives._about import Cost
from diffalign.objectives._family import ScaledLoss, needs_reference, refuse_lone_samples, refuse_small_batches
from diffalign.processes import Processes
from diffalign.protocols import Denoiser, Predictor
from diffalign.schedule import Schedule
from diffalign.sources.dataset import noised, noised_winners
from diffalign.types import LogRatio, NoisyPair, Outcome, PairBatch

Noising = Callable[[PairBatch, Denoiser], NoisyPair]
"""A source's last step: from encoded pairs to what the network sees."""
Relabel = Callable[[PairBatch], Tensor]
"""The probability [B] that the winner is preferred, if the data's own label is not to be taken."""


def plainly_noised(batch: PairBatch, policy: Denoiser) -> NoisyPair:
    """Both sides with the batch's own draw."""
    return noised(batch, policy.schedule)


@torch.no_grad()
def errors_beforehand(batch: PairBatch, start: Predictor, schedule: Schedule, kind: Kind) -> Tensor:
    """The frozen start's errors [B, 2] at a batch's own draws, to be kept (``data.cached_errors``)."""
    if kind == "pictures":  # the same picture stands on both sides
        return errors(start, noised_winners(batch, schedule))[:, None].expand(-1, 2)
    return torch.stack(pair_errors(start, noised(batch, schedule)), dim=1)


def own_label(batch: PairBatch) -> Tensor:
    return batch.label


def cost_of(loss: losses.Loss) -> Cost:
    """The cost of a pair of the data set with plain noise: the policy's two samples, and the other calls that the loss needs."""
    mismatched = loss.baseline is not None and loss.baseline.watches == "mismatched"
    return Cost(with_gradient=2, forward_only=(2 if needs_reference(loss) else 0) + (4 if mismatched else 0))


def refuse_unscored(loss: losses.Loss, scored: bool) -> None:
    """Raises UserError for a loss on a judge's scores where the data have none."""
    if "rewards" in loss.needs and not scored:
        raise UserError(
            f"The loss {loss.name} needs a judge's scores of both pictures, which these data do not have. Name a judge "
            "(--reward), or use data that `diffalign relabel` wrote (--scores)."
        )


def denoising_learner(
    run: RunContext,
    noising: Noising,
    loss: losses.Loss,
    scale: float,
    *,
    baseline: Baseline | None = None,
    label: Relabel = own_label,
) -> Learner:
    """``loss`` on the data set's pairs, against the run's reference, with the loss's own baseline if none is given.

    ``noising`` is for training; held-out pairs get plain noise, so that their numbers mean the same under every objective.

    Raises:
        UserError: the loss needs larger batches, or scores that the data do not have.
    """
    refuse_small_batches(loss, run)
    refuse_unscored(loss, run.score_range is not None)
    if "rewards" in loss.needs and run.unscored:
        raise UserError(
            f"The loss {loss.name} needs a judge's scores of both pictures, and {run.unscored} of the pairs have none: leave "
            "them out, or let a judge score them all (--reward)."
        )
    baseline = loss.baseline() if baseline is None and loss.baseline else baseline
    refuse_lone_samples(baseline, run)
    denoising_losses = DenoisingLosses(run.policy, run.start, noising, loss, scale, baseline, run.processes)
    return Learner(
        source=run.pairs,
        losses=lambda batch: denoising_losses(replace(batch, label=label(batch)), run.compared_with),
        validate=lambda batch: denoising_losses.validate(replace(batch, label=label(batch))),
        stateful={"baseline": baseline} if baseline else {},
        reference=run.reference,
    )


class DenoisingLosses:
    """Losses of batches of pairs: noising, both models' errors, a loss on them, and the loss's baseline if it has one."""

    def __init__(
        self,
        policy: Denoiser,
        start: Predictor,
        noising: Noising,
        loss: losses.Loss,
        scale: float,
        baseline: Baseline | None = None,
        processes: Processes | None = None,
    ) -> None:
        self._policy, self._start, self._noising = policy, start, noising
        self._loss = ScaledLoss(loss, scale, baseline, processes)

    def __call__(self, batch: PairBatch, reference: Predictor) -> Outcome:
        """Losses [B] of a training batch."""
        pair = self._noising(batch, self._policy)
        return self._compared(batch, pair, reference if needs_reference(self._loss.loss) else None, with_gradient=True)

    @torch.no_grad()
    def validate(self, batch: PairBatch) -> Outcome:
        """Losses and health of held-out pairs with plain noise, against the frozen start. The baseline stays as it is."""
        pair = plainly_noised(batch, self._policy)
        return self._compared(batch, pair, self._start, with_gradient=False)

    def _compared(self, batch: PairBatch, pair: NoisyPair, reference: Predictor | None, with_gradient: bool) -> Outcome:
        before = pair_errors(reference, pair) if reference else None  # first: its activations never meet the policy's
        now = pair_errors(self._policy, pair)
        policy, past = denoising(*now), denoising(*before) if before else None
        ratio = log_ratio(policy, past) if past else None
        if with_gradient and ratio:
            self._loss.update_baseline(batch.label, ratio, lambda: self._mismatched(pair, reference))
        loss, scale = self._loss(batch.label, policy, past, ratio, batch.scores), self._loss.scale
        health = denoising_health(ratio, now, before, scale, batch.label) if ratio else policy_health(now, scale, batch.label)
        return Outcome(loss=loss, t=pair.t, metrics=health)

    def _mismatched(self, pair: NoisyPair, reference: Predictor) -> LogRatio:
        """Log-ratios with the prompts rolled by one: 4 B more samples through the network, none of them with a graph."""
        if len(pair.t) < 2:
            raise ValueError("a baseline of mismatched prompts needs a batch_size of at least 2")
        others = {name: value.roll(1, dims=0) for name, value in pair.conditioning.items()}
        rolled = replace(pair, conditioning=others, known=None)
        now, before = pair_errors(self._policy, rolled), pair_errors(reference, rolled)
        return log_ratio(denoising(*now), denoising(*before))
