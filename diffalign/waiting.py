"""Times of a run: how long its loop has taken, and which share of that it waited for data."""

from __future__ import annotations

import time
from collections.abc import Mapping

from diffalign.data.ahead import Stopwatch


class Waiting:
    """Shares of the steps' time that went by waiting for data. ``watch`` is the loader's; without one they are unknown.

    The time of a step runs from the request for its data to its end. What a source does with the data (sampling from the
    policy) is work; validation and checkpoints, between ``step_done`` and the next ``data_requested``, are not of any step.
    """

    def __init__(self, watch: Stopwatch | None) -> None:
        self._watch = watch
        self._asked = self._before = self._waited = self._whole = 0.0

    def data_requested(self) -> None:
        """Note that the data of a step are requested now."""
        if self._watch:
            self._asked, self._before = time.perf_counter(), self._watch.seconds

    def step_done(self) -> dict[str, float]:
        """``waiting``, the share of this step, in [0, 1]; empty if it is unknown."""
        if not self._watch:
            return {}
        waited, whole = self._watch.seconds - self._before, time.perf_counter() - self._asked
        self._waited, self._whole = self._waited + waited, self._whole + whole
        return {"waiting": waited / whole}

    def state_dict(self) -> dict[str, float]:
        return {"waited": self._waited, "whole": self._whole}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._waited, self._whole = state["waited"], state["whole"]

    @property
    def share(self) -> float | None:
        """The share of all steps so far, in [0, 1]; None if it is unknown."""
        return self._waited / self._whole if self._whole else None


class Clock:
    """Seconds of a run's loop, however often it was resumed. ``watch`` as for ``Waiting``."""

    def __init__(self, watch: Stopwatch | None) -> None:
        self.steps = Waiting(watch)
        self.earlier, self._began = 0.0, time.perf_counter()

    def begin(self) -> None:
        """Note that the loop begins now."""
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of the loop so far; ``earlier`` of them went by before the run was resumed."""
        return self.earlier + time.perf_counter() - self._began

    @property
    def waiting(self) -> float | None:
        """The share of the steps' time, in [0, 1], that went by waiting for data; None if it is unknown."""
        return self.steps.share

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds, **self.steps.state_dict()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore; older checkpoints have no such state and give {}."""
        if state:
            self.earlier = state["seconds"]
            self.steps.load_state_dict(state)
