"""Keeps the loaders' chatter off the terminal while something is read, without losing what it says."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LIBRARIES = ("diffusers", "transformers", "xformers", "bitsandbytes", "torch.utils._pytree")
"""The last two speak when PEFT and Diffusers import them and torchao."""


class _Notes(logging.Handler):
    def __init__(self, notes: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        self._notes.append(record.getMessage())


@contextmanager
def quietly() -> Iterator[list[str]]:
    """Within: no progress bars, no log lines and no Python warnings of the model libraries; the log lines land in the list.

    Everything is as before on leaving, also after an exception.
    """
    notes: list[str] = []
    handler = _Notes(notes)
    bars = _switch_off_bars()  # first, for it imports libraries, which then set up their loggers
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    before = [(one, list(one.handlers), one.propagate) for one in loggers]
    for one in loggers:
        one.handlers, one.propagate = [handler], False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield notes
    finally:
        for one, handlers, propagate in before:
            one.handlers, one.propagate = handlers, propagate
        for module in bars:
            module.enable_progress_bar()


def _switch_off_bars() -> list:
    """Switch the progress bars off; gives the libraries whose bars were on."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    on = [module for module in (diffusers_logging, transformers_logging) if module.is_progress_bar_enabled()]
    for module in on:
        module.disable_progress_bar()
    return on
