"""Signals that ask a run to stop when its step is done."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGBREAK") if hasattr(signal, name)]


class Interruption:
    """Turns SIGTERM, Ctrl-C and the like into a request to stop after the current step; a second Ctrl-C is not caught.

    SIGUSR1 is what SLURM sends some time before the end (``--signal``), SIGBREAK what Windows sends when a console closes. In a
    thread other than the main one, which alone may have signals, nothing is caught.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        here = threading.current_thread() is threading.main_thread()
        for number in SIGNALS if here else ():
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
