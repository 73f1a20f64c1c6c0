"""Sem-DPO: "Mitigating Semantic Inconsistency in Preference Optimization for Prompt Engineering", arXiv 2507.20133.

A prompt writer, a causal language model pi, learns from pairs of rewrites (y^w, y^l) of a prompt x, judged by the pictures that
they lead to. A winner that means something else than x counts less:

    w, l = sum over tokens of log pi(y | x) - log pi_reference(y | x)            of winner and loser
    h    = beta (w - l)
    d    = 1 - cos(e(x), e(y^w))                                                 e: a frozen embedding of meaning
    loss = - W log sigma(h),   W = exp(-alpha d)                                 W is outside, d a number of the data

In our frame: source = a data set of rewrites; reference = the frozen start; likelihood = tokens; loss = ``losses.dpo`` at beta,
or any other of ``losses`` by ``--loss``; W is the pair's weight. alpha = 0 is DPO (arXiv 2305.18290) to the last digit.

What can be said of W whatever the writer: with Z = E[exp(-alpha d)] over the data, the loss is Z times DPO's on data tilted by
W / Z, in which the mean distance of winners is never larger, falls as alpha rises, and P(d > delta) <= exp(-alpha delta) / Z
(``tilted``). It says nothing about the loser, and nothing about the writer itself unless that fits the tilted data.

``normalise`` none is the formula above, which also lowers the learning rate by Z; ``step`` divides by the mean of W over each
optimizer step's pairs (of all processes), ``data`` by Z over all pairs to train on.

Not found in public, and chosen here (no training code is released): alpha, and the embedding (the paper's is a CLIP text tower);
normalisation; beta and the learning rate; how many rewrites are drawn for a prompt. docs/prompts.md has what these do.

Settings of relatives: ``length`` mean for length-normalised DPO, SimPO, ORPO and IPO in the manner of TRL; ``loss`` simpo with
gamma 0 and ``sft_weight`` for CPO (arXiv 2401.08417; in units of beta: its weight 1 is 1 / beta); ``tail_weight`` for LD-DPO;
``token_guidance`` for TGDPO; ``gold_weight`` for Triple-PO's term on a reference rewrite (arXiv 2405.16681), whose data
have a column gold, with ``loss`` simpo and its gamma 0. That term is the mean over a gold rewrite's own tokens, so that a row
does not depend on what else is in its batch; TRL's is the mean over all gold tokens of the batch, which is ours with rows
weighted by their lengths. W, like a row's weight, multiplies all of the row's loss, its gold and ``sft_weight`` terms too.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.learner import Learner, TextRunContext
from diffalign.objectives._about import REWRITES, About, Cost
from diffalign.objectives._family import LossChoice, ScaledLoss, needs_reference, refuse_lone_samples, refuse_small_batches
from diffalign.objectives._tokens import Counting, Length, TokenLosses
from diffalign.protocols import LanguageModel
from diffalign.settings import check_options, option
from diffalign.types import Outcome, TextBatch

ABOUT = About("2507.20133", "data set of rewrites", "frozen start", "dpo", (REWRITES,), takes_loss=True)
Normalise = Literal["none", "step", "data"]


@dataclass(frozen=True)
class SemDPO(LossChoice):
    """The objective."""

    about: ClassVar[About] = ABOUT
    beta: float = option(0.1, "strength of the tie to the reference", gt=0)
    alpha: float = option(5.0, "rate at which a winner's weight falls with its distance from the prompt; 0 is DPO", ge=0)
    normalise: Normalise = option("none", "divisor of the weights: none, or their mean over the step or over the data")
    length: Length = option("sum", "reduction of the tokens' log-probabilities: sum or mean")
    tail_weight: float = option(1.0, "weight of the tokens beyond the shorter side's length (LD-DPO)", ge=0, le=1)
    token_guidance: float = option(0.0, "weight of another model's rewards of the tokens (TGDPO)", ge=0)
    gold_weight: float = option(0.0, "weight of an SFT term on a reference rewrite (Triple-PO)", ge=0)

    def __post_init__(self) -> None:
        check_options(self)
        self._counting, self.chosen()

    @property
    def _counting(self) -> Counting:
        return Counting(self.length, self.tail_weight, self.token_guidance)

    @property
    def cost(self) -> Cost:
        loss = self.chosen()
        mismatched = loss.baseline is not None and loss.baseline.watches == "mismatched"
        forward_only = (2 if needs_reference(loss) else 0) + (2 if mismatched else 0)
        return Cost(with_gradient=3 if self.gold_weight else 2, forward_only=forward_only, at_once=3 if self.gold_weight else 2)

    def factors(self, distances: Tensor, of_all: Tensor | None = None) -> Tensor:
        """W [G] of pairs by their distances [G]; ``of_all`` are those of all pairs to train on, for ``normalise`` data."""
        weights = semantic_weights(distances, self.alpha)
        if self.normalise == "step":
            return weights / weights.mean()
        return weights / semantic_weights(of_all, self.alpha).mean() if self.normalise == "data" else weights

    def learner(self, run: TextRunContext) -> Learner:
        """Raises UserError where the data lack what the settings need."""
        loss, of_all, data = self.chosen(), run.texts.distances, run.texts.data
        has = {"gold": data.gold, "token_rewards": data.token_rewards}
        known = {"distance": of_all, "scores": data.scores}
        self.refuse_lacking(
            {name for name, values in has.items() if values is not None}
            | {name for name, values in known.items() if values is not None and not bool(values.isnan().any())}
        )
        baseline = loss.baseline() if loss.baseline else None
        refuse_small_batches(loss, run)
        refuse_lone_samples(baseline, run)
        weigh = (lambda distances: self.factors(distances, of_all)) if self.alpha else None
        scaled_loss = ScaledLoss(loss, self.beta, baseline, run.processes)
        losses = TokenLosses(run.policy, run.start, scaled_loss, self._counting, self.gold_weight)
        mismatched = baseline is not None and baseline.watches == "mismatched"
        return Learner(
            source=replace(run.texts, factors=weigh, mismatched=mismatched),
            losses=lambda batch: losses(batch, run.compared_with),
            validate=losses.validate,
            stateful={"baseline": baseline} if baseline else {},
            reference=run.reference,
        )

    def refuse_lacking(self, has: Container[str]) -> None:
        """Raise UserError unless the data have what the settings look at: distance, gold, token_rewards, scores."""
        if self.alpha and "distance" not in has:
            raise UserError("Sem-DPO weighs winners by their distance from the prompt, which these data do not have.")
        if self.gold_weight and "gold" not in has:
            raise UserError("gold_weight needs reference rewrites, a column gold, which these data do not have.")
        if self.token_guidance and "token_rewards" not in has:
            raise UserError("token_guidance needs another model's rewards of the tokens (--token-rewards).")
        if "rewards" in self.chosen().needs and "scores" not in has:
            raise UserError(f"The loss {self.loss} needs a judge's scores of both rewrites, which these data do not all have.")

    def __call__(self, batch: TextBatch, policy: LanguageModel, reference: LanguageModel) -> Outcome:
        """Losses [B] of the pairs in ``batch``, before W, with margins and log-ratios. One policy and one reference call."""
        scaled_loss = ScaledLoss(self.chosen(), self.beta)
        return TokenLosses(policy, reference, scaled_loss, self._counting, self.gold_weight)(batch, reference)


Objective = SemDPO


def semantic_weights(distances: Tensor, alpha: float) -> Tensor:
    """``W = exp(-alpha d)`` [N] of distances [N] in [0, 2]."""
    return torch.exp(-alpha * distances.double())


@dataclass(frozen=True)
class Tilt:
    """Winners' distances in a data set, as they are and as Sem-DPO sees them (tilted by W / Z)."""

    z: float  # the mean of W: what unnormalised weights leave of the learning rate
    mean: float  # E[d] in the data
    tilted_mean: float  # E[d] under the tilt, never larger
    beyond: float  # P(d > delta) in the data
    tilted_beyond: float  # P(d > delta) under the tilt
    bound: float  # of that: min(1, exp(-alpha delta) / Z)
    weaker_bound: float  # exp(-alpha (delta - E[d])), by Jensen
    effective: float  # (sum W)^2 / sum W^2 over N: the share of the data that the weights leave, as a sample size


def tilted(distances: Tensor, alpha: float, delta: float) -> Tilt:
    """What the weights do to winners' distances [N], and the bound on how many are further than ``delta``.

    With D_W = W D / Z: (i) the mean distance cannot be larger than in the data, since W falls where d rises; (ii) every winner
    further than delta has W < exp(-alpha delta), so that their share under D_W is at most exp(-alpha delta) / Z; (iii) Z is at
    least exp(-alpha E[d]) by Jensen's inequality.
    """
    d, weights = distances.double(), semantic_weights(distances, alpha)
    z, beyond = weights.mean(), (d > delta).double()
    return Tilt(
        z=float(z),
        mean=float(d.mean()),
        tilted_mean=float((weights * d).mean() / z),
        beyond=float(beyond.mean()),
        tilted_beyond=float((weights * beyond).mean() / z),
        bound=min(1.0, float(torch.exp(torch.tensor(-alpha * delta)) / z)),
        weaker_bound=min(1.0, float(torch.exp(-alpha * (delta - d.mean())))),
        effective=float(weights.sum().square() / weights.square().sum() / len(d)),
    )
