"""What the objectives on completions share: likelihoods by both models, weights of tokens, and any loss of the family on them.

    x = sum over a completion's tokens of c_s log p(token s | what stands before it)      log-likelihood under a model
    w, l = x_policy - x_reference                                                          the two log-ratios
    loss(w, l; label, scale)                                                               scale = beta

The factors c_s are 1 in DPO (Rafailov et al. 2023, arXiv 2305.18290). Since they do not depend on the model, they
serve for every variant that counts tokens differently:

    length = "mean"     1 / tokens of the completion              length-normalised DPO; SimPO, ORPO and IPO in TRL's manner
    tail_weight = a     a beyond the shorter side's length        LD-DPO (Liu et al. 2024, arXiv 2409.06411)
    token_guidance = a  1 + a r (winner), 1 - a r (loser)         TGDPO (Zhu et al. 2025, arXiv 2506.14574), r = another model's
                                                                  reward of the token, such as a first DPO model's log-ratio
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from diffalign.health import token_health
from diffalign.likelihood import completions, log_ratio, token_log_probs
from diffalign.objectives._family import ScaledLoss, needs_reference
from diffalign.protocols import LanguageModel
from diffalign.types import LogLikelihood, LogRatio, Outcome, TextBatch, Texts, widest

Length = Literal["sum", "mean"]


@dataclass(frozen=True)
class Counting:
    """How much each token of a completion counts."""

    length: Length = "sum"
    tail_weight: float = 1.0
    token_guidance: float = 0.0

    def __post_init__(self) -> None:
        if self.length not in get_args(Length):
            raise ValueError(f"length is one of {', '.join(get_args(Length))}; got {self.length!r}")

    def factors(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """c [B, S] of winner and loser; zero where there is no token of the completion.

        Raises:
            ValueError: tokens are to count by rewards that the batch does not have.
        """
        if self.token_guidance and batch.token_rewards is None:
            raise ValueError("token_guidance needs another model's rewards of the tokens, which these data do not have")
        shared = torch.minimum(batch.winner.lengths, batch.loser.lengths)
        winner, loser = (self.each(texts, shared) for texts in (batch.winner, batch.loser))
        if self.token_guidance:
            above, below = batch.token_rewards
            winner, loser = winner * (1.0 + self.token_guidance * above), loser * (1.0 - self.token_guidance * below)
        return winner, loser

    def each(self, texts: Texts, shared: Tensor | None = None) -> Tensor:
        """c [N, S] without guidance; beyond ``shared`` [N] tokens of the completion they count ``tail_weight``."""
        counted = texts.completion.to(widest(texts.tokens))  # a third of a sum over three tokens, in all its digits
        if self.tail_weight != 1.0 and shared is not None:
            beyond = texts.completion & (texts.completion.cumsum(dim=1) > shared[:, None])
            counted = torch.where(beyond, self.tail_weight * counted, counted)
        return counted / texts.lengths[:, None] if self.length == "mean" else counted

    def totals(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """[B] what to divide log-likelihoods of winner and loser by to have them per token."""
        if self.length == "mean":
            return torch.ones_like(batch.winner.lengths), torch.ones_like(batch.loser.lengths)
        return batch.winner.lengths, batch.loser.lengths


class TokenLosses:
    """Losses of batches of rewrites: both models' log-likelihoods, a loss on them, and the loss's baseline if it has one."""

    def __init__(
        self, policy: LanguageModel, start: LanguageModel, loss: ScaledLoss, counting: Counting, gold_weight: float = 0.0
    ) -> None:
        self._policy, self._start, self._loss = policy, start, loss
        self._counting, self._gold_weight = counting, gold_weight

    def __call__(self, batch: TextBatch, reference: LanguageModel) -> Outcome:
        """Losses [B] of a training batch."""
        return self._compared(batch, reference if needs_reference(self._loss.loss) else None, with_gradient=True)

    @torch.no_grad()
    def validate(self, batch: TextBatch) -> Outcome:
        """Losses and health of held-out rewrites against the frozen start. The baseline stays as it is."""
        return self._compared(batch, self._start, with_gradient=False)

    def _compared(self, batch: TextBatch, reference: LanguageModel | None, with_gradient: bool) -> Outcome:
        factors = self._counting.factors(batch)
        past = pair_likelihoods(reference, batch, factors) if reference else None
        policy, gold = self._policy_likelihoods(batch, factors)
        ratio = log_ratio(policy, past) if past else None
        if with_gradient and ratio:
            self._loss.update_baseline(batch.label, ratio, lambda: self._mismatched(batch, reference))
        loss = self._loss(batch.label, policy, past, ratio, batch.scores)
        if gold is not None:
            loss = loss - self._gold_weight * gold
        health = token_health(policy, past, self._loss.scale, self._counting.totals(batch), batch.label)
        return Outcome(loss=loss, t=None, metrics={**health, **_of_the_pair(batch)})

    def _policy_likelihoods(self, batch: TextBatch, factors: tuple[Tensor, Tensor]) -> tuple[LogLikelihood, Tensor | None]:
        """Likelihoods of the pair, and the mean log-probability [B] of the gold rewrite's tokens, all from one call."""
        if not self._gold_weight:
            return pair_likelihoods(self._policy, batch, factors), None
        log_p = token_log_probs(self._policy, Texts.stacked(batch.winner, batch.loser, batch.gold)).chunk(3)
        winner, loser = (completions(x, c) for x, c in zip(log_p[:2], factors, strict=True))
        return LogLikelihood(winner, loser), completions(log_p[2], Counting("mean").each(batch.gold))

    def _mismatched(self, batch: TextBatch, reference: LanguageModel) -> LogRatio:
        """Log-ratios of each prompt with the next one's winner, on both sides alike: what KTO takes for the KL."""
        counted = self._counting.each(batch.mismatched)
        now, before = (completions(token_log_probs(m, batch.mismatched), counted) for m in (self._policy, reference))
        return LogRatio(now - before, now - before)


def pair_likelihoods(model: LanguageModel, batch: TextBatch, factors: tuple[Tensor, Tensor]) -> LogLikelihood:
    """Log-likelihoods [B] of both sides under one model, from one call on 2 B sequences."""
    sides = token_log_probs(model, Texts.stacked(batch.winner, batch.loser)).chunk(2)
    return LogLikelihood(*(completions(x, c) for x, c in zip(sides, factors, strict=True)))


def _of_the_pair(batch: TextBatch) -> dict[str, Tensor]:
    wide = widest(batch.weight)
    out = {"weight": batch.weight.to(wide)}
    return out if batch.distance is None else {**out, "distance": batch.distance.to(wide)}
