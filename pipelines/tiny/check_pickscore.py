"""Does a judge of the tiny world prefer what the oracle prefers? Counted on pairs of held-out captions.

Two kinds of pairs, of the test split, which no training saw: pictures of the tiny checkpoint, and drawings that differ in
style and of which some break a claim of their caption. Pictures are judged as stored, after JPEG. A pair counts if the
oracle does not find its pictures equally good.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from scipy.stats import binomtest

from pipelines.tiny import pairs
from pipelines.tiny.check import Progress
from pipelines.tiny.people import People
from pipelines.tiny.train_pickscore import draw_variants
from reward_models import oracle
from reward_models.oracle import Verdict

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

BAR = 0.85
BROKEN = 0.3
"""Share of the drawings that break a claim of their caption."""
Score = Callable[[Sequence[Image.Image], Sequence[str]], Any]
"""Pictures and their captions to one number each, as ``Judge.score`` does it."""


@dataclass(frozen=True)
class HeldOutPair:
    """Two pictures of one caption, and what the oracle says of them."""

    caption: str
    pictures: tuple[Image.Image, Image.Image]
    verdicts: tuple[Verdict, Verdict]

    @property
    def difference(self) -> float:
        """Of the oracle's utilities, first less second."""
        return self.verdicts[0].utility - self.verdicts[1].utility

    @property
    def same_claims(self) -> bool:
        """Both pictures keep equally many of the caption's claims; only style tells them apart."""
        return self.verdicts[0].faithfulness == self.verdicts[1].faithfulness


def held_out(caption: str, jpgs: Sequence[bytes]) -> HeldOutPair:
    """The pair, judged by the oracle."""
    first, second = (Image.open(io.BytesIO(jpg)).convert("RGB") for jpg in jpgs)
    return HeldOutPair(caption, (first, second), (oracle.judge(first, caption), oracle.judge(second, caption)))


def sampled_pairs(
    pipe: StableDiffusionPipeline, n: int, seed: int, candidates: int = 2, progress: Progress | None = None
) -> list[HeldOutPair]:
    """Pictures of a checkpoint for captions of the test split; of more than two candidates, the two furthest apart."""
    records = pairs.sample_pairs(pipe, n, seed, candidates=candidates, split="test", progress=progress)
    return [held_out(r.caption, (r.jpg_0, r.jpg_1)) for r in records]


def rendered_pairs(n: int, seed: int) -> list[HeldOutPair]:
    """Drawings for captions of the test split."""
    rng = np.random.default_rng([seed, 1])
    drawn = [draw_variants(rng, "test", 2, BROKEN) for _ in range(n)]
    return [held_out(caption, [pairs.encode_jpeg(picture) for picture in two]) for caption, two in drawn]


# ---------------------------------------------------------------------------------------------------------------- counting


@dataclass(frozen=True)
class Agreement:
    """In how many of ``n`` pairs a judge prefers what the oracle prefers, with a 95 % interval (Wilson 1927)."""

    right: int
    n: int

    @property
    def rate(self) -> float | None:
        return self.right / self.n if self.n else None

    @property
    def interval(self) -> tuple[float, float] | None:
        if not self.n:
            return None
        found = binomtest(self.right, self.n).proportion_ci(method="wilson")
        return float(found.low), float(found.high)

    def __str__(self) -> str:
        if not self.n:
            return "no such pair"
        low, high = self.interval
        return f"{self.rate:.1%} of {self.n} (95 %: {low:.1%} to {high:.1%})"


def agreement(score: Score, among: Sequence[HeldOutPair]) -> dict[str, Agreement]:
    """Agreement on all pairs that the oracle does not call equal (``untied``), and on parts of them.

    ``clear``: the oracle's utilities differ by more than the band in which people may call a tie.
    ``style alone`` and ``claims``: what tells the pictures apart; in the latter, one keeps more of the caption's claims.
    """
    untied = [pair for pair in among if pair.difference != 0.0]
    first, second = (_scores(score, untied, side) for side in (0, 1))
    differences = np.array([pair.difference for pair in untied])
    right = (first - second) * differences > 0.0
    alone = np.array([pair.same_claims for pair in untied], dtype=bool)
    parts = {"untied": differences != 0.0, "clear": abs(differences) > People().tie_band, "style alone": alone, "claims": ~alone}
    return {name: Agreement(int(right[part].sum()), int(part.sum())) for name, part in parts.items()}


def _scores(score: Score, among: Sequence[HeldOutPair], side: int) -> np.ndarray:
    captions = [pair.caption for pair in among]
    return np.asarray(score([pair.pictures[side] for pair in among], captions), dtype=np.float64)
