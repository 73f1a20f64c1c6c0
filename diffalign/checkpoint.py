"""Checkpoints: name the stateful objects once; saving and loading follow.

A checkpoint is a folder ``checkpoint-00000040`` with one file per stateful object. It is written under another name and
renamed when everything is on disk, so a folder with that name is always whole; whatever goes wrong while writing leaves the
older ones as they were.
"""

from __future__ import annotations

import contextlib
import errno
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from diffalign.differences import differences
from diffalign.errors import UserError
from diffalign.written_aside import folder_aside, remove

_PREFIX, NOTE = "checkpoint-", "checkpoint.json"
VALIDATION_LOSS = "validation_loss"
"""In a checkpoint's note: the loss on the held-out pairs at its step, if the run validated then and the loss is finite."""


_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError)
"""What torch raises at a file that it cannot read."""


class Stateful(Protocol):
    """Whatever can be saved and restored; the state holds tensors and plain values only.

    One that has a true ``copies_on_load`` copies the tensors that it is given, one after the other, and keeps none of them. They
    then stay in the file until they are read: what is as large as the model would else be in the host's memory once
    for every process of a machine.
    """

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> Any: ...


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Save through a file object: given a path, torch would report a full disk as a RuntimeError without saying so."""
    with path.open("wb") as file:
        torch.save(dict(state), file)


_ONCE_ALWAYS_SAVED = ("steps",)
"""Fields of the identity that all older checkpoints hold; today they are written only where they matter."""


def refuse_another_run(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError, naming what differs, if a checkpoint was not ``saved`` by the run that asks ``now``."""
    then = {name: value for name, value in saved.items() if name in now or name not in _ONCE_ALWAYS_SAVED}
    if told := differences(then, now):
        raise UserError(f"{path} belongs to another run: {told}. Resume with the same settings, or start a new output folder.")


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix(_PREFIX))


class Checkpoints:
    """The checkpoints of one run; keeps the newest ``keep``, and the best one as well with ``keep_best``."""

    def __init__(self, folder: Path, keep: int = 2, keep_best: bool = False) -> None:
        self.folder, self._keep, self._keep_best = folder, keep, keep_best

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob(f"{_PREFIX}*") if (p / NOTE).is_file())

    def latest(self) -> Path | None:
        """The newest complete checkpoint, if there is one."""
        found = self.all()
        return found[-1] if found else None

    def best(self) -> tuple[Path, float] | None:
        """The checkpoint with the lowest validation loss, the earliest of equals, and that loss; None if none was validated."""
        losses: dict[Path, float] = {}
        for path in self.all():
            with contextlib.suppress(UserError):  # a damaged one is reported when it is loaded
                if (loss := self.note(path).get(VALIDATION_LOSS)) is not None:
                    losses[path] = loss
        found = min(losses, key=losses.__getitem__, default=None)
        return None if found is None else (found, losses[found])

    def save(self, step: int, stateful: Mapping[str, Stateful], note: Mapping[str, Any]) -> Path:
        """Write the state of every object, and ``note`` (plain values) beside it; then forget the oldest checkpoints.

        ``note`` may hold ``VALIDATION_LOSS``, which tells the best.
        """
        target = self.folder / f"{_PREFIX}{step:08d}"
        with folder_aside(target) as aside:
            for name, each in stateful.items():
                write_state(each.state_dict(), aside / f"{name}.pt")
            content = json.dumps({"step": step, "stateful": sorted(stateful), **note}, indent=2) + "\n"
            (aside / NOTE).write_text(content, encoding="utf-8")
        self._forget()
        return target

    def _forget(self) -> None:
        """Remove what is too old. What somebody has open may stay: the next one tries again."""
        best = self.best() if self._keep_best else None
        for old in self.all()[: -self._keep]:
            if best is None or old != best[0]:
                remove(old)

    def note(self, path: Path) -> dict[str, Any]:
        """The note that ``save`` wrote beside the states of a checkpoint. Raises UserError if it is damaged."""
        file = path / NOTE
        try:
            return json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise self._unreadable(file, error) from error

    def load(self, path: Path, stateful: Mapping[str, Stateful]) -> dict[str, Any]:
        """Restore every object in place and return the note. The names must be those that were saved.

        Raises:
            UserError: the checkpoint holds other objects, or a file of it is damaged.
        """
        note = self.note(path)
        if sorted(stateful) != note["stateful"]:
            raise UserError(
                f"{path} holds {', '.join(note['stateful'])}, but this run needs {', '.join(sorted(stateful))}: "
                "it was made with other settings (say, another adapter or EMA). Resume with the settings it was started with."
            )
        self.restore(path, stateful)
        return note

    def restore(self, path: Path, stateful: Mapping[str, Stateful]) -> None:
        """Restore some of what a checkpoint holds. Raises UserError: a file of it is damaged."""
        for name, each in stateful.items():
            each.load_state_dict(self._state(path / f"{name}.pt", mapped=getattr(each, "copies_on_load", False)))

    def _state(self, file: Path, mapped: bool) -> Mapping[str, Any]:
        how = {"map_location": "cpu", "weights_only": True}
        if mapped:
            with contextlib.suppress(*_UNREADABLE):  # not every file system maps files; of others we hear below what is wrong
                return torch.load(file, mmap=True, **how)
        try:
            return torch.load(file, **how)
        except _UNREADABLE as error:
            if "you tried to allocate" in str(error):  # too little memory is a RuntimeError as well, and nothing to delete
                raise
            raise self._unreadable(file, error) from error

    def _unreadable(self, file: Path, error: Exception) -> UserError:
        """The error that says what to do about a file. An older checkpoint is never taken silently: steps would be lost."""
        if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.EINVAL):  # torch seeks before a short file
            return UserError(f"{file} cannot be read: {error.strerror or error}.")
        older = [path.name for path in self.all() if path.name < file.parent.name]
        then = f"it goes on from {older[-1]}" if older else "there is no older checkpoint, so it begins anew"
        what = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        return UserError(f"{file} is {what}. Delete the folder {file.parent} and resume again: {then}.")
