"""Synthetic people of the tiny world: they look at two pictures of one caption and say which they prefer.

They follow Bradley and Terry (1952) over what the oracle measures, and have the flaws of real annotators:

    U(picture)      = taste_weight * taste + faithfulness_weight * faithfulness
    P(0 before 1)   = sigmoid(sharpness * (U_0 - U_1))
    careless        : with probability ``flip_rate`` the answer is the opposite of what they meant
    undecided       : if |U_0 - U_1| < ``tie_band``, with probability ``tie_share`` they call it a tie

With the defaults, on pictures whose style varies freely and of which one in eight breaks a claim of its caption, 13 % of
the pairs are ties (Pick-a-Pic v2 has about 12 %), and in 80 to 85 % of the others people agree with the oracle. What holds
for a set of pairs is printed when it is made (``diffalign world pairs``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from reward_models.oracle import Verdict

TIE = 0.5


@dataclass(frozen=True)
class People:
    """A crowd with one taste; ``seed`` decides who answers which question, and how (``generator``)."""

    seed: int = 0
    sharpness: float = 26.0
    flip_rate: float = 0.05
    tie_band: float = 0.03
    tie_share: float = 0.6
    taste_weight: float = 0.5
    faithfulness_weight: float = 0.5
    crowd: int = 200

    def __post_init__(self) -> None:
        for name in ("flip_rate", "tie_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a probability in [0, 1]; got {getattr(self, name)}")
        for name in ("sharpness", "tie_band", "taste_weight", "faithfulness_weight"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is a finite number, at least 0; got {getattr(self, name)}")
        if self.crowd < 1:
            raise ValueError(f"crowd is the number of people, at least 1; got {self.crowd}")

    def utility(self, verdict: Verdict) -> float:
        """How much people like a picture, in [0, taste_weight + faithfulness_weight]."""
        return self.taste_weight * verdict.taste + self.faithfulness_weight * verdict.faithfulness

    def preference(self, verdict_0: Verdict, verdict_1: Verdict) -> float:
        """The Bradley-Terry probability that the first picture is preferred, before any flaw."""
        logit = self.sharpness * (self.utility(verdict_0) - self.utility(verdict_1))
        return 0.5 * (1.0 + math.tanh(0.5 * logit))

    def choose(self, verdict_0: Verdict, verdict_1: Verdict, rng: np.random.Generator) -> float:
        """``label_0``: 1.0 if the first picture is preferred, 0.0 if the second, 0.5 for a tie.

        Takes three draws from ``rng`` whatever the answer, so that later answers do not depend on earlier ones.
        """
        undecided, opinion, careless = rng.random(3)
        close = abs(self.utility(verdict_0) - self.utility(verdict_1)) < self.tie_band
        if close and undecided < self.tie_share:
            return TIE
        first = opinion < self.preference(verdict_0, verdict_1)
        return float(first != (careless < self.flip_rate))

    def generator(self, question: int) -> np.random.Generator:
        """The randomness of one question: the same for a seed and a number, whatever was asked before."""
        return np.random.default_rng([self.seed, question])

    def pick_person(self, rng: np.random.Generator) -> int:
        """Who answers: a ``user_id`` in [0, crowd)."""
        return int(rng.integers(self.crowd))
