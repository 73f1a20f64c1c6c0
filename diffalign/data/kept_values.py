"""Values of a cache's rows that are expensive to make, such as a judge's scores: made once, by all processes, and kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from diffalign.data.cache_files import CacheFolder
from diffalign.data.pairs import Progress
from diffalign.errors import UserError
from diffalign.processes import Processes

AT_ONCE = 1024
"""Rows of a stretch, which is what a kill can cost each process."""
Make = Callable[[range], np.ndarray]
"""Rows to their values [n, ...], in the same order."""


def kept_values(
    make: Make,
    count: int,
    directory: str | Path,
    *,
    processes: Processes,
    progress: Progress | None = None,
    stage: str = "",
    at_once: int = AT_ONCE,
) -> np.ndarray:
    """Values [count, ...] of all rows: those of ``directory``, and what is missing there from ``make``.

    All ``processes`` must call it; each makes its share of the stretches of ``at_once`` rows. ``directory`` must be named after
    all that the values follow from. Where it cannot be written to nothing is kept. Whatever ``make`` raises is raised.
    """
    folder, known = CacheFolder(directory), dict[int, np.ndarray | None]()
    stretches = [range(low, min(low + at_once, count)) for low in range(0, count, at_once)]
    mine = list(enumerate(stretches))[processes.rank :: processes.world]
    for done, (number, rows) in enumerate(mine, start=1):
        known[number] = _kept(folder, number, rows)
        if known[number] is None:
            known[number] = make(rows)
            with contextlib.suppress(UserError):
                folder.write(_name(number), known[number])
        if progress:
            progress(stage, done, len(mine))
    whole = {number: values for some in processes.all_gather_object(known) for number, values in some.items()}
    return np.concatenate([whole[number] for number in range(len(stretches))])


def _kept(folder: CacheFolder, number: int, rows: range) -> np.ndarray | None:
    """None where it is missing, torn, or of another number of rows."""
    try:
        found = np.load(folder.root / _name(number), allow_pickle=False)
    except (OSError, ValueError):
        return None
    return found if len(found) == len(rows) else None


def _name(number: int) -> str:
    return f"{number:05d}.npy"
