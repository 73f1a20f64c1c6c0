"""What each objective declares, for the list that ``diffalign objectives`` prints and for the checks before a run."""

from __future__ import annotations

from dataclasses import dataclass

PAIRS, PICTURES, PROMPTS = "pairs", "pictures", "prompts"
"""Kinds of data: preference pairs; one picture for each prompt; prompts alone."""
REWRITES, EXPANSIONS = "rewrite-pairs", "rewrites"
"""Kinds of data of prompt writers: two rewrites of each prompt, one preferred; one rewrite of each."""
FROZEN_START = "frozen start"
"""The reference that rounds of the loop can renew (``diffalign.loop_rounds``)."""
NOBODY = "nobody"
"""The word in the place of the reference where there is none."""


@dataclass(frozen=True)
class Cost:
    """Samples through the network for one pair (of pictures, or of transitions)."""

    with_gradient: float  # with a gradient
    forward_only: float  # without: references, inversion, sampling
    at_once: float = 2.0  # with a gradient at one time, per element of a micro-batch

    @property
    def forwards(self) -> float:
        """The cost in forward passes, a backward pass counting as two."""
        return 3.0 * self.with_gradient + self.forward_only


@dataclass(frozen=True)
class About:
    """One line of the list."""

    paper: str  # arXiv number
    source: str
    reference: str
    loss: str
    data: tuple[str, ...]  # kinds that it learns from; the first is the usual one
    judged: str = ""  # "needed" or "optional": rewards of a judge
    takes_loss: bool = False  # whether --loss changes the loss
    draws_ahead: bool = False  # whether pairs are only noised, by draws that may be chosen before training and kept

    @property
    def of_prompts(self) -> bool:
        """Whether it trains a prompt writer, a language model, and not an image model."""
        return bool({REWRITES, EXPANSIONS} & set(self.data))
