"""The progress bar of all commands: on stderr or in a notebook, with an ETA; an occasional line where stderr is a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

Progress = Callable[[str, int, int], None]
"""Callback of caches, data checks and evaluations: (stage, done, total)."""
SECONDS_BETWEEN_LINES = 15.0
"""Seconds between refreshes in a log file, where each is a line of its own."""


class Bar:
    """A bar for work in one or several stages; nothing shows before the first stage has begun.

    ``advance`` is a ``Progress``.
    """

    def __init__(self, shown: bool = True, unit: str = "it") -> None:
        self._shown, self._unit = shown, unit
        self._stage: tuple[str, int] | None = None
        self._bar: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` of a stage are finished; a new name or total begins a new bar."""
        if (stage, total) != self._stage:
            self._begin(stage, total)
        self._bar.update(done - self._bar.n)

    def counter(self, stage: str, total: int) -> Callable[[int], None]:
        """A callback that takes the number of further items of ``total`` that are finished."""
        self._begin(stage, total)
        return self._bar.update

    def note(self, **numbers: str) -> None:
        """Show these beside the bar from its next refresh on."""
        self._bar.set_postfix(numbers, refresh=False)

    def _begin(self, stage: str, total: int, done: int = 0) -> None:
        from tqdm.auto import tqdm

        if self._bar is not None:
            self._bar.close()
        every = 0.1 if _somebody_looks() else SECONDS_BETWEEN_LINES
        self._stage = stage, total
        self._bar = tqdm(
            total=total, initial=done, desc=stage, unit=self._unit, disable=not self._shown, mininterval=every, dynamic_ncols=True
        )


def _somebody_looks() -> bool:
    """Whether the bar is in a terminal or a notebook, whose stderr is none."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return sys.stderr.isatty() or shell is not None


class TrainingBar(Bar):
    """A bar over optimizer steps."""

    def start(self, step: int, steps: int) -> None:
        """Begin at ``step`` of ``steps``; not 0 in a resumed run."""
        self._begin("training", steps, step)

    def update(self, step: int, numbers: Mapping[str, float], *, steps: int) -> None:
        """``step`` of ``steps`` is done, with these numbers."""
        self.advance("training", step, steps)
        digits = {"loss": 4, "accuracy": 2, "reward": 4}
        self.note(**{name: f"{numbers[name]:.{n}f}" for name, n in digits.items() if name in numbers})
