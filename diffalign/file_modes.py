"""Modes of files that others write for us: ``tempfile``, and since version 0.8 safetensors, make them for their owner alone."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path


def as_opened(*paths: Path) -> None:
    """Give every file the mode that ``open`` would have given it: what the umask leaves of 0666. Folders stay as they are.

    Raises:
        OSError: the folder of the first one cannot be written to.
    """
    files = [path for path in paths if path.is_file()]
    if not files:
        return
    mode = _mode_of_a_new_file(files[0].parent)
    for file in files:
        set_mode(file, mode)


def mode_of(path: Path) -> int:
    """Who may do what with it, without what kind of file it is."""
    return path.stat().st_mode & 0o777


def set_mode(file: Path, mode: int) -> None:
    """Do nothing if it is so, or if the system refuses."""
    if mode_of(file) != mode:
        with contextlib.suppress(PermissionError):  # some network drives refuse; a result is worth more than its mode
            file.chmod(mode)


def _mode_of_a_new_file(folder: Path) -> int:
    """Found by making one: the umask can only be read by setting it, for all threads of the process."""
    probe = folder / f".mode-{uuid.uuid4().hex}"
    try:
        probe.touch()
        return mode_of(probe)
    finally:
        probe.unlink(missing_ok=True)
