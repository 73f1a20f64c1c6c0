"""What all objectives with a loss of the family share: the choice of the loss, checks of what it needs, and its evaluation.

An objective's likelihoods come from somewhere (denoising errors, transitions, tokens); from there on all do the same:

    w, l = x_policy - x_reference            the two log-ratios
    loss(w, l; label, scale, baseline ...)   one number per pair
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffalign import losses
from diffalign.errors import UserError
from diffalign.losses.baselines import Baseline
from diffalign.losses.divergences import Divergence
from diffalign.processes import OneProcess, Processes
from diffalign.settings import check_options, option
from diffalign.types import LogLikelihood, LogRatio


class BatchSizes(Protocol):
    """The only part of a run's context that is used here."""

    batch_size: int


@dataclass(frozen=True)
class LossChoice:
    """The choice of the loss on the two log-ratios. ``diffalign objectives --losses`` lists them."""

    loss: str = option("dpo", "loss on the two log-ratios; `diffalign objectives --losses` lists them")
    loss_options: dict[str, float | str] = option(None, "constants of the loss, as name=value")  # type: ignore[assignment]
    divergence: Divergence = option("reverse-kl", "divergence that ties the policy to the reference")
    divergence_alpha: float = option(0.5, "order of the alpha divergence; 1 is reverse-kl")
    sft_weight: float = option(
        0.0,
        "weight of an added SFT term on the winner, times what multiplies log-ratios (beta; beta / 2 for denoising errors)",
        ge=0,
    )

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


def depends_on_batch(objective: Any) -> bool:
    """Whether what is learnt from a pair depends on the others of its micro-batch: by a loss that mixes them, or a baseline."""
    if getattr(objective, "baseline", None) in ("batch", "mismatched"):
        return True
    name = getattr(objective, "loss", None)
    chosen = losses.load(name) if name in losses.names() else None
    return chosen is not None and (chosen.mixes_batch or chosen.baseline is not None)


PER_TOKEN = ("simpo", "orpo", "ipo")
"""Losses that take log-probabilities per token where they come from (Meng et al. 2024, Hong et al. 2024; IPO as TRL has it)."""
SMALL_BETA = 10.0
"""Losses of absolute scale come from language models, where beta is of order one."""


def remarks(objective: Any) -> list[str]:
    """Remarks on what is allowed and seldom meant: a loss at a scale that it was not made for."""
    name = getattr(objective, "loss", None)
    if name is None or name not in losses.names():
        return []
    is_cpo = name == "simpo" and objective.chosen().settings.gamma == 0
    if name in PER_TOKEN and getattr(objective, "length", "mean") == "sum" and not is_cpo:
        return [
            f"The loss {name} was made for the mean of a completion's log-probabilities over its tokens; with length sum long "
            "rewrites count for more, and its constants mean something else. Try --length mean."
        ]
    if objective.chosen().scale == "absolute" and objective.beta > SMALL_BETA:
        return [
            f"The loss {name} takes likelihoods as they are, not their ratios to a reference, and wants a beta of order one; "
            f"here beta is {objective.beta:g}, as log-ratios of means want it. Try --beta 1."
        ]
    reach = 2 * objective.beta * math.log1p(objective.clip) if hasattr(objective, "clip") else math.inf
    if reach < 0.1:
        return [
            f"Clipped ratios and beta {objective.beta:g} hold the margin within {reach:.2f} of zero, where the loss {name} is "
            "nearly linear and its constants do nothing. A larger --beta, or --clip inf, lets it speak."
        ]
    return []


def refuse_extras(choice: LossChoice, own: str) -> None:
    """Raise ValueError for settings of the family's losses beside a loss that is not one of them: they would do nothing."""
    idle = [name for name in ("divergence", "sft_weight", "loss_options") if getattr(choice, name) not in ("reverse-kl", 0, None)]
    if idle:
        raise ValueError(f"{', '.join(idle)} would do nothing: the loss {own!r} is the objective's own; name another one")


def needs_reference(loss: losses.Loss) -> bool:
    """Whether a loss needs a reference in training."""
    return bool(loss.needs & {"ratio", "reference", "baseline"})


def refuse_lone_samples(baseline: Baseline | None, given: BatchSizes) -> None:
    """Raise UserError for a baseline that exchanges the prompts of a batch where there is nothing to exchange."""
    if baseline is not None and baseline.watches == "mismatched" and given.batch_size < 2:
        raise UserError("A baseline of mismatched prompts needs a batch_size of at least 2.")


def refuse_unfit(loss: losses.Loss, shown: set[str]) -> None:
    """Raise ValueError if a loss needs fields of ``losses.Evidence`` beyond ``shown``, for objectives with less than DPO has."""
    if more := sorted(loss.needs - shown - {"label"}):
        raise ValueError(f"the loss {loss.name} looks at more than this objective can show it: {', '.join(more)}")


def refuse_small_batches(loss: losses.Loss, given: BatchSizes) -> None:
    """Raise UserError for a loss that compares the pairs of a batch where there is one pair in it."""
    if loss.mixes_batch and given.batch_size < 2:
        raise UserError(f"The loss {loss.name} compares the pairs of a batch: batch_size must be at least 2.")


class ScaledLoss:
    """A loss of the family with the scale of its likelihoods, and the baseline it measures against, if it has one."""

    def __init__(
        self, loss: losses.Loss, scale: float, baseline: Baseline | None = None, processes: Processes | None = None
    ) -> None:
        self.loss, self.scale, self.baseline = loss, scale, baseline
        self._processes = processes or OneProcess()

    @torch.no_grad()
    def update_baseline(self, label: Tensor, ratio: LogRatio, mismatched: Callable[[], LogRatio]) -> None:
        """Update the baseline, if there is one, with a training batch of all processes.

        ``mismatched`` is called only for a baseline of mismatched prompts. Margins are multiplied by 2 label - 1 (``label`` [B]),
        as they are where the baseline is used.
        """
        if self.baseline is None:
            return
        if self.baseline.watches == "margins":
            values = (2.0 * label.to(ratio.margin.dtype) - 1.0) * ratio.margin
        else:
            sides = mismatched() if self.baseline.watches == "mismatched" else ratio
            values = torch.cat([sides.winner, sides.loser])
        self.baseline.update(self._processes.gather(values))

    def __call__(
        self,
        label: Tensor,
        policy: LogLikelihood,
        reference: LogLikelihood | None,
        ratio: LogRatio | None,
        scores: Tensor | None = None,
    ) -> Tensor:
        """Losses [B]. ``reference`` and ``ratio`` are None without a reference; ``scores`` [B, 2] are a judge's."""
        value = None if self.baseline is None else self.baseline.value.to(policy.winner.device)
        return self.loss(losses.Evidence(label, ratio, policy, reference, scores, value), self.scale)
