"""What a judge is: it looks at pictures, and at the prompts they were made from, and gives each picture one number.

``N`` = number of pictures. This module imports nothing heavy; judges import torch where they compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image


class JudgeError(ValueError):
    """A judge cannot do what was asked of it; the message says what was found and what would be right."""


@dataclass(frozen=True)
class RewardInfo:
    """What to know about a judge before its numbers are read.

    ``range`` holds the lowest and highest score it can give, infinite where it is open. ``licence`` names that of the
    code and, where there are any, of the weights.
    """

    name: str
    needs_prompt: bool
    range: tuple[float, float] = (-math.inf, math.inf)
    higher_is_better: bool = True
    licence: str = "Apache-2.0"
    differentiable: bool = False
    description: str = ""


@runtime_checkable
class Judge(Protocol):
    """The least that every judge offers."""

    @property
    def info(self) -> RewardInfo: ...

    def score(self, images: Sequence[Image.Image], prompts: str | Sequence[str] | None = None) -> torch.Tensor:
        """Scores [N] float32 in the order of ``images``; NaN where a picture could not be judged.

        Raises:
            JudgeError: there are not as many prompts as pictures, or a needed prompt is missing.
        """
        ...


@runtime_checkable
class DetailedJudge(Judge, Protocol):
    """A judge that measures more than its score."""

    def details(self, images: Sequence[Image.Image], prompts: str | Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Side measurements [N] float64 by name; NaN where a measurement does not apply to a picture."""
        ...


@runtime_checkable
class ParticularJudge(Judge, Protocol):
    """A judge that understands only some prompts. Asked before pictures are made, so that the time is not spent in vain."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises JudgeError, naming the first prompt that it cannot judge by."""
        ...


def prompt_per_image(info: RewardInfo, n: int, prompts: str | Sequence[str] | None) -> list[str]:
    """One prompt for each of ``n`` pictures: a single string serves all, a list must have the right length.

    Without prompts, a judge that needs none gets empty strings.
    """
    if prompts is None:
        if info.needs_prompt:
            raise JudgeError(f"the judge {info.name!r} needs the prompts that the pictures were made from; none were given")
        return [""] * n
    if isinstance(prompts, str):
        check_text(prompts, "the prompt")
        return [prompts] * n
    if len(prompts) != n:
        raise JudgeError(f"the judge {info.name!r} got {n} pictures and {len(prompts)} prompts; each picture needs one")
    for place, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise JudgeError(f"prompt {place} of {n} is no string: {prompt!r}")
        check_text(prompt, f"prompt {place} of {n}")
    return list(prompts)


def check_text(prompt: str, which: str) -> None:
    """Raises JudgeError, naming ``which``: half a character, which JSON can hold and neither tokenizers nor files can."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise JudgeError(
            f"{which} has half a character in it, as \\ud83d is in JSON, which no judge can read: {prompt!r}; write the whole "
            "character, or leave it out"
        ) from None
