"""SFT of a prompt writer: maximum likelihood of rewrites, which every preference objective on prompts starts from.

    loss = - (1 / tokens) sum over the rewrite's tokens of log pi(token | what stands before it)

The prompt's tokens are read and not learnt. Promptist (Hao et al. 2022, arXiv 2212.09611, section 2.2) starts so, on pairs of
plain prompts and what their authors made of them. Of preference pairs it learns the winners. ``length`` sum counts long rewrites
more (the likelihood of the whole rewrite, not of its average token).

In our frame: source = a data set of rewrites; reference = nobody; likelihood = tokens; loss = its negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffalign.learner import Learner, TextRunContext
from diffalign.likelihood import completions, token_log_probs
from diffalign.objectives._about import EXPANSIONS, REWRITES, About, Cost
from diffalign.objectives._tokens import Counting, Length
from diffalign.protocols import LanguageModel
from diffalign.settings import check_options, option
from diffalign.types import Outcome, TextBatch

ABOUT = About("2212.09611", "data set of rewrites", "nobody", "sft", (EXPANSIONS, REWRITES))


@dataclass(frozen=True)
class PromptSFT:
    """The objective."""

    about: ClassVar[About] = ABOUT
    cost: ClassVar[Cost] = Cost(with_gradient=1, forward_only=0, at_once=1)
    length: Length = option("mean", "reduction of the tokens' log-probabilities: mean or sum")

    def __post_init__(self) -> None:
        check_options(self)
        Counting(self.length)

    def learner(self, run: TextRunContext) -> Learner:
        return Learner(run.texts, lambda batch: self(batch, run.policy), lambda batch: self.validate(batch, run.policy))

    def __call__(self, batch: TextBatch, policy: LanguageModel) -> Outcome:
        """Losses [B] of the winners in ``batch``. One policy call on B sequences."""
        log_p = token_log_probs(policy, batch.winner)
        mean = completions(log_p, Counting("mean").each(batch.winner))
        loss = -mean if self.length == "mean" else -completions(log_p, Counting("sum").each(batch.winner))
        return Outcome(loss=loss, t=None, metrics={"winner_log_p": mean.detach()})

    @torch.no_grad()
    def validate(self, batch: TextBatch, policy: LanguageModel) -> Outcome:
        """The same on held-out rewrites."""
        return self(batch, policy)


Objective = PromptSFT
