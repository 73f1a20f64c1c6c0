"""Checkpoints: name the stateful things once; saving and loading follow.

A checkpoint is a folder ``checkpoint-00000040`` with one file per stateful thing. It is written under another name and
renamed when everything is on disk, so a folder with that name is always whole; whatever goes wrong while writing leaves the
older ones as they were.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from diffalign.errors import UserError

INTERRUPTED_STATUS = 130
"""Exit status of a run that was stopped by a signal and left a checkpoint."""

_PREFIX = "checkpoint-"
_ASIDE = ".writing-"


class Stateful(Protocol):
    """Whatever can be saved and restored; the state holds tensors and plain values only."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> Any: ...


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``target`` and rename it to ``target`` at the end; on any error nothing is left.

    Raises:
        UserError: the disk is full (the old ``target``, if any, is untouched).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.parent / f"{_ASIDE}{target.name}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        yield aside
        _flush(aside)
        _swap(aside, target)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise _disk_error(error, target) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Save through a file object: given a path, torch would report a full disk as a RuntimeError without saying so."""
    with path.open("wb") as file:
        torch.save(dict(state), file)


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(aside: Path, target: Path) -> None:
    if not target.exists():
        aside.rename(target)
        return
    old = target.parent / f"{_ASIDE}old-{target.name}"
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _disk_error(error: OSError, target: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"The disk is full: {target} could not be written. What was there before is untouched; free some space and resume."
        )
    return UserError(f"{target} could not be written: {error.strerror or error}. What was there before is untouched.")


class Checkpoints:
    """The checkpoints of one run; keeps the newest ``keep``."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self._folder, self._keep = folder, keep

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p for p in self._folder.glob(f"{_PREFIX}*") if (p / "checkpoint.json").is_file())

    def latest(self) -> Path | None:
        """The newest complete checkpoint, if there is one."""
        found = self.all()
        return found[-1] if found else None

    def save(self, step: int, things: Mapping[str, Stateful], note: Mapping[str, Any]) -> Path:
        """Write the state of every thing, and ``note`` (plain values) beside it; then forget the oldest checkpoints."""
        target = self._folder / f"{_PREFIX}{step:08d}"
        with written_aside(target) as aside:
            for name, thing in things.items():
                write_state(thing.state_dict(), aside / f"{name}.pt")
            (aside / "checkpoint.json").write_text(json.dumps({"step": step, "things": sorted(things), **note}, indent=2) + "\n")
        for old in self.all()[: -self._keep]:
            shutil.rmtree(old)
        return target

    def load(self, path: Path, things: Mapping[str, Stateful]) -> dict[str, Any]:
        """Restore every thing in place and return the note. The names must be those that were saved."""
        note = json.loads((path / "checkpoint.json").read_text())
        if sorted(things) != note["things"]:
            raise UserError(
                f"{path} holds {', '.join(note['things'])}, but this run needs {', '.join(sorted(things))}: "
                "it was made with other settings (say, another adapter or EMA). Resume with the settings it was started with."
            )
        for name, thing in things.items():
            thing.load_state_dict(torch.load(path / f"{name}.pt", map_location="cpu", weights_only=True))
        return note
