"""The folder of a cache: shards and journal entries, each written aside and renamed, so that nothing is ever half there.

fingerprint.json               what everything depends on, readable
rows/00000.npy  .json          what the rows say and which pictures they show, part by part, and rows/joined.*, which numbers them
                               (``cache_rows``); gone when the cache is complete
images/00000.moments.npy       [n, 2, C, h, w] mean and standard deviation of the scaled latents
images/00000.framing.npy       [n, 6] how each was cut from its picture, see transform.Framing
images/00000.shape.npy         [n, 2] only with buckets: h and w of each; moments are [n, 2, C, P] then, of h w entries and zeros
prompts/00000.NAME.npy         [n, ...] one file per conditioning tensor
journal/images-00000.json      a shard is committed when its journal entry exists; it says what is wrong with its pictures
journal/prompts-00000.json     journal/images.json and prompts.json say how many there are in a shard
prompts.utf8  prompts.ends     the texts of the prompts, end to end, and where each ends (``cache_values.Strings``)
origins.utf8  origins.ends     file and row of every pair
pairs.npy  skipped.json  complete.json      written at the end

A cache of prompts alone (``prompt_cache``) has prompts/, their journal, and texts.json.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from diffalign.data.file_locks import lock
from diffalign.differences import differences
from diffalign.errors import StaleCacheError, UserError
from diffalign.processes import Processes, failing_together
from diffalign.written_aside import PARTIAL, is_full, move

Busy = Callable[[str], None]
"""Called with one line that says that another process fills a cache, and that this one waits."""
PLACES = (".", "rows", "images", "prompts", "journal", "errors")
"""Folders of a cache, of whatever kind."""


@dataclass(frozen=True)
class CacheKind:
    """The kind of a cache's content."""

    what: str  # in words
    mark: str  # what of its fingerprint no other kind has
    option: str  # that says which folder it is
    mending: str = "Delete the folder to make it anew."  # what to do if a file is damaged


PAIRS = CacheKind(
    *("encoded pairs", "data", "--cache"),
    "The same command with --cache and --prepare encodes what is lost and keeps the rest; or delete the folder to make it anew.",
)
PROMPTS = CacheKind("encoded prompts", "prompts", "--cache")
ERRORS = CacheKind("cached reference errors", "draws", "--reference-cache")


def write_bytes(stream: BinaryIO, content: bytes | np.ndarray) -> None:
    """The one place where bytes of a cache reach the disk."""
    if isinstance(content, np.ndarray):
        np.save(stream, content, allow_pickle=False)
    else:
        stream.write(content)


class CacheFolder:
    """Paths and atomic writes of one cache, which is to hold what ``holds`` says."""

    def __init__(self, directory: str | Path, holds: CacheKind = PAIRS) -> None:
        self.root, self.holds = Path(directory), holds

    # ------------------------------------------------------------------------------------------------------------ writing

    def write(self, name: str, content: bytes | np.ndarray) -> None:
        """Write aside, flush to the disk, rename. Raises ``UserError`` if the disk refuses; what was there is untouched."""
        with self.writing(name) as write:
            write(content)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Callable[[bytes | np.ndarray], None]]:
        """As ``write``, piece by piece: gives a function that takes the next piece."""
        target = self.root / name
        aside = target.with_name(f"{target.name}.{secrets.token_hex(4)}{PARTIAL}")  # processes may write the same file at once
        size = 0

        def write(content: bytes | np.ndarray) -> None:
            nonlocal size
            size += content.nbytes if isinstance(content, np.ndarray) else len(content)
            write_bytes(stream, content)

        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as stream:
                yield write
                stream.flush()
                os.fsync(stream.fileno())
            self._rename(aside, target)
        except BaseException as error:
            with contextlib.suppress(OSError):  # the failure worth telling is the first one
                aside.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise UserError(self._refusal(name, size, error)) from error
            raise

    def _rename(self, aside: Path, target: Path) -> None:
        try:
            move(aside, target)
        except FileNotFoundError:
            if not (self.complete and target.exists()):  # else another job wrote the same, ended, and swept this away
                raise
        except PermissionError:
            same = target.suffix == ".npy" and target.is_file() and target.stat().st_size == aside.stat().st_size
            if not same:  # else another job wrote the same shard and reads it, over which Windows renames nothing
                raise
            aside.unlink()

    def write_json(self, name: str, value: Any) -> None:
        """The journal on one line, whatever people may want to read with indentation."""
        indent = None if name.startswith("journal") else 1
        self.write(name, (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode())

    def _refusal(self, name: str, size: int, error: OSError) -> str:
        what = f"{name} ({size:,} bytes) could not be written to the cache in {self.root}: {error.strerror or error}"
        if is_full(error) or _cut_short(error):
            free = shutil.disk_usage(self.root).free
            what += f" ({free:,} bytes free; this file alone needs {size:,}). "
            what += f"Free some space or name another folder ({self.holds.option})"
        return f"{what}. What was committed before is intact: the same command goes on from there."

    # ------------------------------------------------------------------------------------------------------------ reading

    def read_json(self, name: str) -> Any:
        """Raises ``UserError`` for a file that is missing or damaged."""
        try:
            return json.loads((self.root / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"The cache in {self.root} is damaged: {name}: {error}. {self.holds.mending}") from error

    @property
    def complete(self) -> bool:
        return (self.root / "complete.json").exists()

    @contextlib.contextmanager
    def unless_complete(self) -> Iterator[None]:
        """A ``UserError`` inside counts only while the cache is not complete.

        Once it is, another job has ended, and has removed what only filling needs.
        """
        try:
            yield
        except UserError:
            if not self.complete:
                raise

    def opened(self, version: int, expected: Mapping[str, Any] | None) -> CacheFolder:
        """This folder, if it holds a complete cache made as ``expected`` says, or of any data for None.

        Raises ``StaleCacheError`` for another one, ``UserError`` for none, none that is complete, or another kind.
        """
        if not (self.root / "fingerprint.json").exists():
            raise UserError(f"There is no cache in {self.root}.")
        if expected is not None:
            self.refuse_stale(expected)
        found = self.read_json("fingerprint.json")
        self._refuse_other_kind(found)
        if found.get("version") != version:
            raise StaleCacheError(
                f"The cache in {self.root} is of version {found.get('version')}, and this diffalign reads version {version}. "
                f"Name another folder ({self.holds.option}), or delete this one to make it anew."
            )
        if not self.complete:
            raise UserError(f"The cache in {self.root} is not complete; build it again, it goes on where it stopped.")
        return self

    def size_on_disk(self) -> int:
        """Bytes of all files. Looks at each of them: for the end of a run, not for its start."""
        return sum(os.stat(os.path.join(place, name)).st_size for place, _, names in os.walk(self.root) for name in names)

    # ---------------------------------------------------------------------------------------------------------- ownership

    def claim(self, fingerprint: Mapping[str, Any], shared: bool = False) -> None:
        """Make this folder a cache with that fingerprint, or make sure it is one already.

        Half-written files are removed, unless it is ``shared``: they may be another's who writes now.

        Raises ``StaleCacheError`` if it holds another cache, ``UserError`` if it holds something else.
        """
        known = self.root / "fingerprint.json"
        if not known.exists():
            occupied = self.root.exists() and (not self.root.is_dir() or any(_foreign(p) for p in self.root.iterdir()))
            if occupied and not known.exists():  # or another process has claimed it meanwhile
                give = f"name an empty or a new folder ({self.holds.option})"
                raise UserError(f"{self.root} exists and is not a cache of diffalign; {give}.")
            self.write_json("fingerprint.json", fingerprint)
        self.refuse_stale(fingerprint)
        if not shared:
            self.sweep()

    @contextlib.contextmanager
    def claimed(
        self, fingerprint: Mapping[str, Any], processes: Processes, shared: bool = False, busy: Busy | None = None
    ) -> Iterator[None]:
        """A block in which the first of ``processes`` holds the folder locked and claimed for all of them.

        Raises what ``locked`` and ``claim`` raise, in all of them.
        """
        with contextlib.ExitStack() as held:
            with failing_together(processes):
                if processes.rank == 0:
                    held.enter_context(self.locked(shared, busy=busy))
                    self.claim(fingerprint, shared)
            yield

    def sweep(self) -> None:
        """Remove half-written files; not those of another cache in a folder inside."""
        for place in PLACES:
            for leftover in (self.root / place).glob("*" + PARTIAL):
                with contextlib.suppress(OSError):  # they do no harm
                    leftover.unlink()

    def refuse_stale(self, expected: Mapping[str, Any]) -> None:
        """Raise ``StaleCacheError`` if the cache differs from ``expected``, naming the first fields that do and counting the
        others, and ``UserError`` if its content is of another kind."""
        fingerprint = self.read_json("fingerprint.json")
        self._refuse_other_kind(fingerprint)
        if told := differences(fingerprint, expected):
            raise StaleCacheError(
                f"The {self.holds.what} in {self.root} were made under other circumstances: {told}. "
                f"Name another folder ({self.holds.option}), or delete this one to make it anew."
            )

    def drop_stale(self, expected: Mapping[str, Any]) -> None:
        """Remove a cache that was made under other circumstances, or what is left of one whose removal was cut off.

        Raises ``UserError`` if its content is of another kind.
        """
        if (self.root / "fingerprint.json").exists():
            try:
                self.refuse_stale(expected)
            except StaleCacheError:
                shutil.rmtree(self.root)
        elif any((self.root / place).is_dir() for place in PLACES[1:]) and not any(map(_is_others, self.root.rglob("*"))):
            shutil.rmtree(self.root)

    def _refuse_other_kind(self, fingerprint: Mapping[str, Any]) -> None:
        """Raise UserError, so that a cache of one kind is never deleted for one of another."""
        if self.holds.mark not in fingerprint:
            found = [kind.what for kind in (PAIRS, PROMPTS, ERRORS) if kind.mark in fingerprint] or ["something else"]
            raise UserError(f"{self.root} holds {found[0]}, not {self.holds.what}: name another folder ({self.holds.option}).")

    @contextlib.contextmanager
    def locked(self, shared: bool = False, wait: bool = False, busy: Busy | None = None) -> Iterator[None]:
        """A block that holds the lock of a cache that is filled; the system releases it when the process dies.

        A ``shared`` lock can be held by several processes that all share it. Raises ``UserError`` if the lock is taken, unless
        this should ``wait``, or call ``busy`` and then wait.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            stream = (self.root / (WAITING_LOCK if wait else LOCK)).open("ab")  # "wb" would cut what another has locked
        except OSError as error:
            raise UserError(
                f"The folder for {self.holds.what} cannot be used: {error}. Name another one ({self.holds.option})."
            ) from error
        with stream:
            self._lock(stream, shared, wait, busy)
            yield

    def _lock(self, stream: IO[Any], shared: bool, wait: bool, busy: Busy | None) -> None:
        try:
            lock(stream, shared, wait)
        except BlockingIOError as error:
            if busy is None:
                raise UserError(f"Another process is filling the cache in {self.root}; wait for it to end.") from error
            busy(f"another process is filling the cache in {self.root}; this one waits for it to end")
            self._lock(stream, shared, True, None)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # some file systems of clusters have no locks
                raise


LOCK, WAITING_LOCK = ".lock", ".lock-end"


def _cut_short(error: OSError) -> bool:
    """Whether a disk took less of an array than it was given: NumPy says so in words alone."""
    return error.errno is None and "requested and" in str(error)


def _is_others(path: Path) -> bool:
    """Whether a file is of a kind that no cache has."""
    return path.is_file() and _foreign(path) and path.suffix not in (".npy", ".json", ".utf8", ".ends")


def _foreign(path: Path) -> bool:
    return path.name not in (LOCK, WAITING_LOCK) and not path.name.endswith(PARTIAL)


def shard_name(kind: str, shard: int, tensor: str) -> str:
    return f"{kind}/{shard:05d}.{tensor}.npy"


def journal_name(kind: str, shard: int) -> str:
    return f"journal/{kind}-{shard:05d}.json"
