"""The folder of a cache: shards and journal entries, each written aside and renamed, so that nothing is ever half there.

fingerprint.json               what everything depends on, readable
images/00000.moments.npy       [n, 2, C, h, w] mean and standard deviation of the scaled latents
images/00000.framing.npy       [n, 6] how each was cut from its picture, see transform.Framing
images/00000.shape.npy         [n, 2] only with buckets: h and w of each; moments are [n, 2, C, P] then, of h w entries and zeros
prompts/00000.NAME.npy         [n, ...] one file per conditioning tensor
journal/images-00000.json      a shard is committed when its journal entry exists; it names the pairs it completes
journal/prompts-00000.json
pairs.npy  texts.json  complete.json      written at the end

A cache of prompts alone (``prompt_cache``) is the same without images and pairs.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

try:
    import fcntl
except ImportError:  # Windows has no such lock; two processes filling one cache there write the same bytes twice
    fcntl = None

from diffalign.errors import StaleCacheError, UserError

PARTIAL = ".partial"


def write_bytes(stream: BinaryIO, content: bytes | np.ndarray) -> None:
    """The one place where bytes of a cache reach the disk."""
    if isinstance(content, np.ndarray):
        np.save(stream, content, allow_pickle=False)
    else:
        stream.write(content)


class CacheFolder:
    """Paths and atomic writes of one cache."""

    def __init__(self, directory: str | Path) -> None:
        self.root = Path(directory)

    # ------------------------------------------------------------------------------------------------------------ writing

    def write(self, name: str, content: bytes | np.ndarray) -> None:
        """Write aside, flush to the disk, rename. Raises ``UserError`` if the disk refuses; what was there is untouched."""
        target = self.root / name
        aside = target.with_name(target.name + PARTIAL)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as stream:
                write_bytes(stream, content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, target)
        except OSError as error:
            with contextlib.suppress(OSError):  # the failure worth telling is the first one
                aside.unlink(missing_ok=True)
            raise UserError(self._refusal(name, content, error)) from error

    def write_json(self, name: str, value: Any) -> None:
        """The journal on one line, whatever people may want to read with indentation."""
        indent = None if name.startswith("journal") else 1
        self.write(name, (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode())

    def _refusal(self, name: str, content: bytes | np.ndarray, error: OSError) -> str:
        size = content.nbytes if isinstance(content, np.ndarray) else len(content)
        what = f"{name} ({size:,} bytes) could not be written to the cache in {self.root}: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(self.root).free
            what += f" ({free:,} bytes free; this file alone needs {size:,}). Free some space or choose another folder"
        return f"{what}. What was committed before is intact: the same command goes on from there."

    # ------------------------------------------------------------------------------------------------------------ reading

    def read_json(self, name: str) -> Any:
        """Raises ``UserError`` for a file that is missing or damaged."""
        try:
            return json.loads((self.root / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"The cache in {self.root} is damaged: {name}: {error}. Delete the folder to make it anew."
            ) from error

    @property
    def complete(self) -> bool:
        return (self.root / "complete.json").exists()

    def opened(self, part: str, version: int, expected: Mapping[str, Any] | None) -> CacheFolder:
        """This folder, if it holds a complete cache made as ``expected`` says, or of any data for None.

        ``part`` tells the kinds apart: the fingerprint has "data" where pairs were encoded, "prompts" where prompts alone.

        Raises ``StaleCacheError`` for another one, ``UserError`` for none, or none that is complete.
        """
        if not (self.root / "fingerprint.json").exists():
            raise UserError(f"There is no cache in {self.root}.")
        if expected is not None:
            self.refuse_stale(expected)
        found = self.read_json("fingerprint.json")
        if part not in found:
            here, wanted = ("prompts alone", "pairs") if part == "data" else ("pairs", "prompts alone")
            raise UserError(f"The cache in {self.root} is one of {here}; expected one of {wanted}.")
        if found.get("version") != version:
            raise StaleCacheError(
                f"The cache in {self.root} is of version {found.get('version')}, and this diffalign reads version {version}. "
                "Delete the folder, or give another one, to encode everything anew."
            )
        if not self.complete:
            raise UserError(f"The cache in {self.root} is not complete; build it again, it goes on where it stopped.")
        return self

    def journal(self, kind: str) -> list[dict[str, Any]]:
        """The committed entries of ``kind`` ("images" or "prompts"), in order."""
        entries = []
        while (self.root / (name := journal_name(kind, len(entries)))).exists():
            entries.append(self.read_json(name))
        return entries

    def size_on_disk(self) -> int:
        return sum(f.stat().st_size for f in self.root.rglob("*") if f.is_file())

    # ---------------------------------------------------------------------------------------------------------- ownership

    def claim(self, fingerprint: Mapping[str, Any]) -> None:
        """Make this folder a cache with that fingerprint, or make sure it is one already; remove half-written files.

        Raises ``StaleCacheError`` if it holds another cache, ``UserError`` if it holds something else.
        """
        known = self.root / "fingerprint.json"
        if known.exists():
            self.refuse_stale(fingerprint)
        elif self.root.exists() and (not self.root.is_dir() or any(_foreign(p) for p in self.root.iterdir())):
            raise UserError(f"{self.root} exists and is not a cache of diffalign; give an empty or a new folder.")
        else:
            self.write_json("fingerprint.json", fingerprint)
        for leftover in self.root.rglob("*" + PARTIAL):
            leftover.unlink()

    def refuse_stale(self, expected: Mapping[str, Any]) -> None:
        """Raises ``StaleCacheError`` that names every field in which the cache differs from what is asked for."""
        found, wanted = flatten(self.read_json("fingerprint.json")), flatten(plain(expected))
        differing = [
            f"{name} was {json.dumps(found.get(name))} and is now {json.dumps(wanted.get(name))}"
            for name in sorted(found.keys() | wanted.keys())
            if found.get(name) != wanted.get(name)
        ]
        if differing:
            raise StaleCacheError(
                f"The cache in {self.root} was made under other circumstances: {'; '.join(differing)}. "
                "Give another folder for the cache, or delete this one to encode everything anew."
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Held while a cache is filled; the system releases it when the process dies. Raises ``UserError`` if taken."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            stream = (self.root / LOCK).open("w")
        except OSError as error:
            raise UserError(f"The folder for the cache cannot be used: {error}.") from error
        with stream:
            if fcntl is None:
                yield
                return
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"Another process is filling the cache in {self.root}; wait for it to end.") from error
            yield


LOCK = ".lock"


def _foreign(path: Path) -> bool:
    return path.name != LOCK and not path.name.endswith(PARTIAL)


def shard_name(kind: str, shard: int, tensor: str) -> str:
    return f"{kind}/{shard:05d}.{tensor}.npy"


def journal_name(kind: str, entry: int) -> str:
    return f"journal/{kind}-{entry:05d}.json"


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As it would come back from a JSON file. Raises ``TypeError`` for values that JSON does not know."""
    return json.loads(json.dumps(value, sort_keys=True))


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots."""
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= flatten(inner, f"{prefix}{name}.") if isinstance(inner, Mapping) else {prefix + name: inner}
    return found


class ShardWriter:
    """Collects items, encodes them in batches, writes shards of a fixed number of items.

    Batches never straddle two shards, so an interrupted and resumed run encodes the very batches that an uninterrupted
    one does, and the files come out identical. ``committed(shard, items)`` is called after the files of a shard are in
    place and before anything else happens.
    """

    MAX_BYTES = 64 * 2**20  # per shard, whatever the number of items asked for

    def __init__(
        self,
        folder: CacheFolder,
        kind: str,
        encode: Callable[[list[Any], list[str]], Mapping[str, np.ndarray]],
        *,
        batch_size: int,
        shard_items: int,
        stride: int,
        committed: Callable[[int, int], None],
    ) -> None:
        self._folder, self._kind, self._encode, self._committed = folder, kind, encode, committed
        self._batch_size, self._shard_items, self._stride = batch_size, shard_items, stride
        self.per_shard: int | None = None  # items; known after the first batch, or from the journal
        self.shards = 0
        self._items: list[Any] = []
        self._names: list[str] = []
        self._encoded: list[Mapping[str, np.ndarray]] = []
        self._held = 0

    def resume(self, shards: int, per_shard: int | None) -> None:
        self.shards, self.per_shard = shards, per_shard

    def add(self, item: Any, name: str) -> None:
        """``name`` says in messages where the item comes from."""
        self._items.append(item)
        self._names.append(name)
        full = self.per_shard is not None and self._held + len(self._items) == self.per_shard
        if full or len(self._items) == self._batch_size:
            self._encode_batch()
        if self._held == self.per_shard:
            self.flush()

    def flush(self) -> None:
        """Encode what is waiting and commit it as a shard, full or not."""
        if self._items:
            self._encode_batch()
        if self._encoded:
            for tensor in self._encoded[0]:
                whole = np.concatenate([part[tensor] for part in self._encoded])
                self._folder.write(shard_name(self._kind, self.shards, tensor), whole)
            self.shards += 1
        held, self._encoded, self._held = self._held, [], 0
        self._committed(self.shards, held)

    def _encode_batch(self) -> None:
        encoded = self._encode(self._items, self._names)
        count = len(self._items)
        if self.per_shard is None:
            bytes_per_item = sum(a.nbytes for a in encoded.values()) / count
            fitting = min(self._shard_items, int(self.MAX_BYTES / bytes_per_item))
            self.per_shard = max(fitting - fitting % self._stride, self._stride, count + -count % self._stride)
        self._encoded.append(encoded)
        self._held += count
        self._items, self._names = [], []
