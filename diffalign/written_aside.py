"""Files and folders that are there whole or not at all: written under another name beside their place, then renamed.

Whatever goes wrong in between, a full disk or a kill, leaves what was there before as it was.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from diffalign.errors import UserError
from diffalign.file_modes import as_opened, mode_of, set_mode

PARTIAL = ".partial"
"""The end of a file's name while it is being written."""
_FOLDER = ".writing-"
SECONDS_BETWEEN_TRIES = (0.1, 0.3, 1.0) if os.name == "nt" else ()
"""How often a rename is tried again: on Windows a virus scanner or an indexer may have a new file open for a moment."""
FOLDERS_FLUSH = os.name != "nt"
"""Whether the system flushes folders: Windows cannot open one, and flushes only what may be written to."""


@contextmanager
def file_aside(target: Path, *, lasting: bool = False) -> Iterator[Path]:
    """Give the name of a file to write beside ``target`` (whose folder is made), and rename it to ``target`` at the end.

    lasting: it is on the disk, not only handed to the system, before it is renamed: for what must survive a power cut.

    Raises:
        UserError: the disk is full, or refuses; ``target`` is as it was.
    """
    # Not the name of the process: a file that a killed one left behind may be another user's.
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.touch()
        mode = mode_of(aside)
        yield aside
        set_mode(aside, mode)  # some libraries (safetensors) put a file of another mode there
        if lasting:
            flush(aside)
        move(aside, target)
    except (OSError, SafetensorError) as error:
        raise disk_error(error, target) from error
    finally:
        with contextlib.suppress(OSError):  # the failure worth telling is the first one
            aside.unlink(missing_ok=True)


def write_file(target: Path, content: bytes | str, *, lasting: bool = False) -> None:
    """``file_aside`` for content that is at hand; text is UTF-8, its ends of lines as they are."""
    with file_aside(target, lasting=lasting) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def folder_aside(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``target``, flush what it holds to the disk and rename it to ``target`` at the end.

    Files have the mode that ``open`` would have given them.

    Raises:
        UserError: the disk is full, or refuses; ``target`` is as it was.
    """
    aside = target.parent / f"{_FOLDER}{target.name}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        as_opened(*aside.rglob("*"))
        flush(*aside.rglob("*"), aside)
        _swap(aside, target)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise disk_error(error, target) from error
        raise


def flush(*paths: Path) -> None:
    """Wait until the disk has them: files and, where the system knows that, folders."""
    for path in paths:
        if path.is_dir() and not FOLDERS_FLUSH:
            continue
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def move(source: Path, target: Path) -> None:
    """Rename a file or a folder, whatever file had the name before. Raises OSError, also if somebody holds one of them open for
    longer than ``SECONDS_BETWEEN_TRIES``."""
    for seconds in SECONDS_BETWEEN_TRIES:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            time.sleep(seconds)
    os.replace(source, target)


def remove(folder: Path) -> None:
    """Take away a folder as a whole, or leave it as it is where somebody has a file of it open and the system minds (Windows,
    mounted drives)."""
    doomed = folder.parent / f"{_FOLDER}old-{folder.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def is_full(error: Exception) -> bool:
    """Whether a disk, or what a user may take of it, is full: safetensors reports that as an error of its own, in words."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def disk_error(error: Exception, target: Path) -> UserError:
    """The error for a file or folder that could not be written, with the reason."""
    beside = next(place for place in (target, *target.absolute().parents) if place.exists())
    reason = getattr(error, "strerror", None) or str(error)
    if is_full(error):
        reason = f"the disk is full ({shutil.disk_usage(beside).free:,} bytes free). Free some space and try again"
    return UserError(f"{target} could not be written: {reason}. What was there before is untouched.")


def _swap(aside: Path, target: Path) -> None:
    if not target.exists():
        move(aside, target)
        return
    old = target.parent / f"{_FOLDER}old-{target.name}"
    shutil.rmtree(old, ignore_errors=True)
    move(target, old)
    try:
        move(aside, target)
    except OSError:
        move(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
