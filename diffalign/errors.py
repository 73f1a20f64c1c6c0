"""What went wrong, for the person at the keyboard. The command line prints these as one paragraph and exits with 2."""

from __future__ import annotations

INTERRUPTED_STATUS = 130
"""Exit status of a command that was stopped by Ctrl-C, or of training that left a checkpoint on a signal."""


class UserError(Exception):
    """The input or the request is at fault, not the program: the message says what was found and what would be right."""


class StaleCacheError(UserError):
    """A cache was made under other circumstances (model, resolution, transform) than those now asked for."""


class NonFiniteLossError(UserError):
    """Training met a loss that is not a finite number; names the step, the timesteps and the margins."""
