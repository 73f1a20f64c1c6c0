"""What went wrong, for the person at the keyboard. The command line prints these as one paragraph and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

INTERRUPTED_STATUS = 130
"""Exit status of a command that was stopped by Ctrl-C, or of training that left a checkpoint on a signal."""


class UserError(Exception):
    """The input or the request is at fault, not the program: the message says what was found and what would be right."""


class StaleCacheError(UserError):
    """A cache was made under other circumstances (model, resolution, transform) than those now asked for."""


class NonFiniteLossError(UserError):
    """Training met a loss that is not a finite number; names the step, the timesteps and the margins."""


def did_you_mean(name: str, known: Iterable[str], n: int = 1, cutoff: float = 0.6) -> str:
    """The hint that follows an error about an unknown name: `` Did you mean 'ddpo'?``, or nothing where no known name is alike.

    ``n`` names at most; ``cutoff``, in [0, 1], is how much alike they have to be (``difflib.get_close_matches``).
    """
    near = difflib.get_close_matches(name, list(known), n, cutoff)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
