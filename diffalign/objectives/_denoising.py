"""What the objectives on denoising errors share: both models asked about a noisy pair, and any loss of the family on the answer.

    x = -error                      log-likelihood stand-in of a side under a model
    w, l = x_policy - x_reference   the two log-ratios
    loss(w, l; label, scale)        scale = beta/2: mean errors and the factor of the released Diffusion-DPO code

Where a loss does not look at the reference (SFT, SimPO, MaPO ...), it is not asked in training. On held-out pairs it always
is, so that drift and accuracy can be compared across losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign import losses
from diffalign.checkpoint import Stateful
from diffalign.errors import UserError
from diffalign.health import denoising_health, policy_health
from diffalign.learner import Alone, Given, Learner, Processes, Source
from diffalign.likelihood import denoising, log_ratio, pair_errors
from diffalign.losses.baselines import Baseline
from diffalign.losses.divergences import Divergence
from diffalign.objectives._about import Cost
from diffalign.protocols import Denoiser, Predictor
from diffalign.settings import check_options, option
from diffalign.sources.dataset import noised
from diffalign.types import LogRatio, NoisyPair, Outcome, PairBatch

Noising = Callable[[PairBatch, Denoiser], NoisyPair]
"""A source's last step: from encoded pairs to what the network sees."""
Relabel = Callable[[PairBatch], Tensor]
"""The probability [B] that the winner is preferred, if the data's own label is not to be taken."""


def plainly_noised(batch: PairBatch, policy: Denoiser) -> NoisyPair:
    """Both sides with the batch's own draw."""
    return noised(batch, policy.schedule)


def own_label(batch: PairBatch) -> Tensor:
    return batch.label


@dataclass(frozen=True)
class LossChoice:
    """Which loss looks at the two log-ratios. ``diffalign objectives --losses`` lists them."""

    loss: str = option("dpo", "loss on the two log-ratios; `diffalign objectives --losses` lists them")
    loss_options: dict[str, float | str] = option(None, "constants of that loss, as name=value")  # type: ignore[assignment]
    divergence: Divergence = option("reverse-kl", "divergence that ties the policy to the reference")
    divergence_alpha: float = option(0.5, "order of the alpha divergence; 1 is reverse-kl")
    sft_weight: float = option(0.0, "weight of an added SFT term on the winner, in units of beta", ge=0)

    def __post_init__(self) -> None:
        check_options(self)
        self.chosen()

    def chosen(self, **own: float) -> losses.Loss:
        """The loss; ``own`` are its constants that the objective itself has settings for.

        Raises:
            ValueError: an unknown name, constant or value.
        """
        extras = losses.Extras(self.divergence, self.divergence_alpha, self.sft_weight)
        return losses.load(self.loss, extras, **own | losses.read_options(self.loss, self.loss_options or {}))


def refuse_extras(choice: LossChoice, own: str) -> None:
    """Raise ValueError for settings of the family's losses beside a loss that is not one of them: they would do nothing."""
    idle = [name for name in ("divergence", "sft_weight", "loss_options") if getattr(choice, name) not in ("reverse-kl", 0, None)]
    if idle:
        raise ValueError(f"{', '.join(idle)} would do nothing: the loss {own!r} is the objective's own; name another one")


def looks_back(loss: losses.Loss) -> bool:
    """Whether a loss needs a reference in training."""
    return bool(loss.needs & {"ratio", "reference", "baseline"})


def cost_of(loss: losses.Loss) -> Cost:
    """Of a pair of the data set with plain noise: the policy's two samples, and what else the loss has asked."""
    mismatched = loss.baseline is not None and loss.baseline.watches == "mismatched"
    return Cost(learning=2, looking=(2 if looks_back(loss) else 0) + (4 if mismatched else 0))


def denoising_learner(
    given: Given,
    noising: Noising,
    loss: losses.Loss,
    scale: float,
    *,
    source: Source | None = None,
    reference: Predictor | None = None,
    baseline: Baseline | None = None,
    label: Relabel = own_label,
    things: Mapping[str, Stateful] | None = None,
) -> Learner:
    """``loss`` on the pairs of ``source`` (the data set's if not given), against ``reference`` (the run's if not given).

    ``noising`` is for training; held-out pairs get plain noise, so that their numbers mean the same under every objective.

    Raises:
        UserError: the loss needs larger batches, or scores that the data do not have.
    """
    if loss.mixes_batch and given.batch_size < 2:
        raise UserError(f"The loss {loss.name} compares the pairs of a batch: batch_size must be at least 2.")
    if "rewards" in loss.needs and given.score_range is None:
        raise UserError(f"The loss {loss.name} needs a judge's scores of both pictures, which these data do not have.")
    baseline = loss.baseline() if baseline is None and loss.baseline else baseline
    refuse_lone_samples(baseline, given)
    at_work = DenoisingLosses(given.policy, given.start, noising, loss, scale, baseline, given.processes)
    kept = {**(things or {}), **({"baseline": baseline} if baseline else {})}
    against = reference or given.compared_with
    return Learner(
        source=source or given.pairs,
        losses=lambda batch: at_work(replace(batch, label=label(batch)), against),
        validate=lambda batch: at_work.validate(replace(batch, label=label(batch))),
        things=kept,
        reference=None if reference else given.reference,
    )


def refuse_lone_samples(baseline: Baseline | None, given: Given) -> None:
    """Raise UserError for a baseline that exchanges the prompts of a batch where there is nothing to exchange."""
    if baseline is not None and baseline.watches == "mismatched" and given.batch_size < 2:
        raise UserError("A baseline of mismatched prompts needs a batch_size of at least 2.")


def refuse_unfit(loss: losses.Loss, shown: set[str], given: Given) -> None:
    """For objectives that show a loss less than DPO does: say before anything is sampled what could not be computed.

    Raises:
        UserError: the loss looks at more than ``shown`` (fields of ``losses.Evidence``), or needs larger batches.
    """
    if more := sorted(loss.needs - shown - {"label"}):
        raise UserError(f"The loss {loss.name} looks at more than this objective can show it: {', '.join(more)}.")
    if loss.mixes_batch and given.batch_size < 2:
        raise UserError(f"The loss {loss.name} compares the pairs of a batch: batch_size must be at least 2.")


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
        self._policy, self._start, self._noising, self._loss, self._scale = policy, start, noising, loss, scale
        self._baseline, self._processes = baseline, processes or Alone()

    def __call__(self, batch: PairBatch, reference: Predictor) -> Outcome:
        """Losses [B] of a training batch."""
        pair = self._noising(batch, self._policy)
        return self._compared(batch, pair, reference if looks_back(self._loss) else None, learning=True)

    @torch.no_grad()
    def validate(self, batch: PairBatch) -> Outcome:
        """Losses and health of held-out pairs with plain noise, against the frozen start. The baseline stays as it is."""
        pair = plainly_noised(batch, self._policy)
        return self._compared(batch, pair, self._start, learning=False)

    def _compared(self, batch: PairBatch, pair: NoisyPair, reference: Predictor | None, learning: bool) -> Outcome:
        before = pair_errors(reference, pair) if reference else None  # first: its activations never meet the policy's
        now = pair_errors(self._policy, pair)
        policy, past = denoising(*now), denoising(*before) if before else None
        ratio = log_ratio(policy, past) if past else None
        if self._baseline is not None and learning:
            self._baseline.update(self._watched(pair, ratio, reference))
        value = None if self._baseline is None else self._baseline.value.to(now[0].device)
        evidence = losses.Evidence(batch.label, ratio, policy, past, batch.scores, value)
        loss = self._loss(evidence, self._scale)
        health = denoising_health(ratio, now, before, self._scale) if ratio else policy_health(now, self._scale)
        return Outcome(loss=loss, t=pair.t, metrics=health)

    @torch.no_grad()
    def _watched(self, pair: NoisyPair, ratio: LogRatio, reference: Predictor) -> Tensor:
        """What the baseline is learnt from, of all processes."""
        watches = self._baseline.watches
        if watches == "margins":
            values = ratio.margin
        elif watches == "sides":
            values = torch.cat([ratio.winner, ratio.loser])
        else:
            values = self._mismatched(pair, reference)
        return self._processes.gather(values)

    def _mismatched(self, pair: NoisyPair, reference: Predictor) -> Tensor:
        """Log-ratios [2B] with the prompts rolled by one: 4 B more samples through the network, none of them with a graph."""
        if len(pair.t) < 2:
            raise ValueError("a baseline of mismatched prompts needs a batch_size of at least 2")
        rolled = replace(pair, conditioning={name: value.roll(1, dims=0) for name, value in pair.conditioning.items()})
        now, before = pair_errors(self._policy, rolled), pair_errors(reference, rolled)
        ratio = log_ratio(denoising(*now), denoising(*before))
        return torch.cat([ratio.winner, ratio.loser])
