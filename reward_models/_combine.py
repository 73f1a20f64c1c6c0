"""Several judges as one reward: ``0.5 * pickscore.z(seen) + imagereward.scaled(2.0)``.

Judges have scales of their own (PickScore about 20, HPSv2 about 0.27); without bringing them to one, a sum is the largest alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from reward_models._judge import PointwiseJudge, Scorer
from reward_models.base import JudgeError, RewardInfo

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Term:
    """``factor * (score - mean) / deviation``; mean and deviation of the pictures judged together where ``by_group`` is set."""

    judge: PointwiseJudge
    factor: float = 1.0
    mean: float = 0.0
    deviation: float = 1.0
    by_group: bool = False

    def value(self, scores: Tensor) -> Tensor:
        """[N] from the judge's scores [N]; NaN stay NaN and count for neither mean nor deviation."""
        mean, deviation = _moments(scores, self.judge) if self.by_group else (self.mean, self.deviation)
        return self.factor * (scores - mean) / deviation


def standardised(judge: Scorer, reference: Any = None) -> Term:
    """The term of ``judge`` by the moments of ``reference``, scores [M] seen before; None: of whatever is judged together.

    Raises:
        JudgeError: a combination instead of a judge, or scores that are all the same.
    """
    import torch

    if not isinstance(judge, PointwiseJudge):
        raise JudgeError("judges are standardised before they are combined, one by one")
    if reference is None:
        return Term(judge, by_group=True)
    mean, deviation = _moments(torch.as_tensor(reference, dtype=torch.float32).flatten(), judge)
    return Term(judge, mean=mean, deviation=deviation)


def _moments(scores: Tensor, judge: PointwiseJudge) -> tuple[float, float]:
    known = scores.detach()[~scores.detach().isnan()].double()
    deviation = float(known.std()) if len(known) > 1 else 0.0
    if not deviation > 0:
        raise JudgeError(
            f"scores of the judge {judge.info.name!r} cannot be standardised by {len(known)} of them that do not differ; "
            f"give scores seen before, as in judge.z(scores)"
        )
    return float(known.mean()), deviation


class Combined(Scorer):
    """A weighted sum of judges; higher is better. A judge for which lower is better enters with its sign turned."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self._terms = tuple(terms)
        infos = [term.judge.info for term in self._terms]
        self.info = RewardInfo(
            name=" + ".join(_told(term) for term in self._terms),
            needs_prompt=any(info.needs_prompt for info in infos),
            licence="; ".join(dict.fromkeys(info.licence for info in infos)),
            differentiable=all(info.differentiable for info in infos),
            description="a weighted sum of judges",
        )

    @property
    def parts(self) -> tuple[PointwiseJudge, ...]:
        return tuple(term.judge for term in self._terms)

    @property
    def is_pointwise(self) -> bool:
        return not any(term.by_group for term in self._terms)

    def n_cut(self, prompts: Sequence[str]) -> int | None:
        counts = [term.judge.n_cut(prompts) for term in self._terms]
        return None if None in counts else max(counts)

    def combine(self, scores: Sequence[Tensor]) -> Tensor:
        return sum(_sign(term) * term.value(of_judge) for term, of_judge in zip(self._terms, scores, strict=True))

    def differentiable_score(self, pixels: Tensor, prompts: str | Sequence[str] | None = None) -> Tensor:
        return self.combine([term.judge.differentiable_score(pixels, prompts) for term in self._terms])

    def scaled(self, factor: float) -> Combined:
        return Combined([replace(term, factor=factor * term.factor) for term in self._terms])

    def plus(self, other: Combined) -> Combined:
        """The sum of both."""
        return Combined((*self._terms, *other._terms))

    def provenance(self) -> dict[str, Any]:
        """What each term's judge says it is made of, and the numbers by which it enters."""
        terms = [{**term.judge.provenance(), **_numbers(term)} for term in self._terms]
        return {"judge": self.info.name, "terms": terms}


def _sign(term: Term) -> float:
    return 1.0 if term.judge.info.higher_is_better else -1.0


def _numbers(term: Term) -> dict[str, Any]:
    return {"factor": term.factor, "mean": term.mean, "deviation": term.deviation, "by_group": term.by_group}


def _told(term: Term) -> str:
    scale = ".z()" if term.by_group or (term.mean, term.deviation) != (0.0, 1.0) else ""
    return f"{term.factor:g}*{term.judge.info.name}{scale}"
