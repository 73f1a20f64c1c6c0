"""The values in a cache's shards: from the encoder's tensors to arrays on the disk, and back through memory maps."""

from __future__ import annotations

import contextlib
import functools
import io
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
import torch
from torch import Tensor

from diffalign.data.ahead import default_workers
from diffalign.data.cache_files import CacheFolder, shard_name
from diffalign.errors import UserError

DTYPES = {"float16": np.float16, "float32": np.float32}
OPEN_SHARDS = 128  # each costs a file descriptor


@dataclass(frozen=True)
class FillOptions:
    """How a cache is filled. Raises UserError for what no cache can be filled with."""

    batch_size: int = 8  # items that the encoder takes together
    dtype: str = "float16"  # of what is stored, float16 or float32
    shard_items: int = 256  # of a shard, fewer if they are large; a shard is what a kill can cost each process
    workers: int = field(default_factory=default_workers)  # threads that decode ahead of the encoder; 0 for none
    max_unreadable: float = 0.01  # share of the pairs, in [0, 1], that may be skipped because they cannot be read

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"dtype of the cache is {self.dtype!r}; it must be one of {', '.join(DTYPES)}.")
        if self.batch_size < 1 or self.shard_items < 1:
            raise UserError(f"batch_size is {self.batch_size} and shard_items is {self.shard_items}; both must be at least 1.")
        if not 0.0 <= self.max_unreadable <= 1.0:
            raise UserError(f"max_unreadable is {self.max_unreadable}; it is a share of the pairs and must be in [0, 1].")


DEFAULTS = FillOptions()


def cast(value: Tensor, dtype: str, labels: Sequence[str]) -> np.ndarray:
    """The tensor as an array of the cache's dtype; integers stay as they are. Raises ``UserError`` for what is not finite."""
    if not value.is_floating_point():
        return value.cpu().numpy()
    exact = value.detach().to("cpu", torch.float32).numpy()
    with np.errstate(over="ignore"):
        stored = exact.astype(DTYPES[dtype])
    for row in np.flatnonzero(~np.isfinite(stored.reshape(len(stored), -1)).all(axis=1)):
        if np.isfinite(exact[row]).all():
            reach = f"up to {np.abs(exact[row]).max():g}, more than float16 holds; use dtype float32 for the cache"
        else:
            reach = "values that are not finite; run the encoder in float32"
        raise UserError(f"The encoder gave {reach} (for {labels[row]}).")
    return stored


class Strings(Sequence[str]):
    """Texts in two files, end to end and where each ends, read through memory maps, one at a time."""

    def __init__(self, folder: CacheFolder, name: str) -> None:
        self._bytes, self._ends = (mapped(folder, f"{name}.{part}", dtype) for part, dtype in (("utf8", "u1"), ("ends", "<i8")))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return Taken(self, np.arange(*index.indices(len(self))))
        number = range(len(self))[index]
        first = int(self._ends[number - 1]) if number else 0
        return self._bytes[first : int(self._ends[number])].tobytes().decode("utf-8", "surrogatepass")

    @staticmethod
    @contextlib.contextmanager
    def writing(folder: CacheFolder, name: str) -> Iterator[Callable[[Iterable[str]], None]]:
        """Write the two files; gives a function that takes the next texts."""
        end = 0

        def write(texts: Iterable[str]) -> None:
            nonlocal end
            coded = [text.encode("utf-8", "surrogatepass") for text in texts]
            ends = end + np.cumsum([len(each) for each in coded], dtype="<i8")
            write_bytes(b"".join(coded))
            write_ends(ends.tobytes())
            end = int(ends[-1]) if coded else end

        with folder.writing(f"{name}.utf8") as write_bytes, folder.writing(f"{name}.ends") as write_ends:
            yield write


class Taken(Sequence[str]):
    """Texts by the numbers [N] of another sequence's."""

    def __init__(self, texts: Sequence[str], numbers: np.ndarray) -> None:
        self._texts, self._numbers = texts, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        number = self._numbers[index]
        return Taken(self._texts, number) if isinstance(index, slice) else self._texts[int(number)]


def mapped(folder: CacheFolder, name: str, dtype: np.dtype | str) -> np.ndarray:
    """A memory map of a file of bare values. Raises ``UserError`` for one that is missing or damaged."""
    try:
        size, each = (folder.root / name).stat().st_size, np.dtype(dtype).itemsize
        if size % each:
            raise ValueError(f"{size} bytes are no multiple of {each}")
        return np.memmap(folder.root / name, dtype=dtype, mode="r") if size else np.empty(0, dtype)  # nothing cannot be mapped
    except (OSError, ValueError) as error:
        raise damaged(folder, name, error) from error


def damaged(folder: CacheFolder, name: str, error: Exception) -> UserError:
    return UserError(f"The cache in {folder.root} is damaged: {name}: {error}. {folder.holds.mending}")


def npy_header(dtype: np.dtype, count: int) -> bytes:
    """What stands before the values in an .npy file of ``count`` of them."""
    stream = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(stream, described)
    return stream.getvalue()


class Numbering:
    """Numbers keys by their first appearance, on the disk: a temporary file that SQLite removes, a megabyte in memory."""

    def __init__(self) -> None:
        self._base = sqlite3.connect("", isolation_level=None)
        for setting in ("journal_mode=off", "synchronous=off", "cache_size=-1024", "locking_mode=exclusive"):
            self._base.execute(f"pragma {setting}")
        self._base.execute("create table seen (thing primary key, number integer) without rowid")
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def of(self, things: Iterable[bytes]) -> tuple[list[int], np.ndarray]:
        """Their numbers, and the places in ``things`` of those that were not known before."""
        numbers, new = [], []
        for place, thing in enumerate(things):
            found = self._base.execute("select number from seen where thing = ?", (thing,)).fetchone()
            if not found:
                self._base.execute("insert into seen values (?, ?)", found := (thing, self._count))
                found, self._count = found[1:], self._count + 1
                new.append(place)
            numbers.append(found[0])
        return numbers, np.array(new, dtype=np.int64)

    def close(self) -> None:
        self._base.close()


class Shards:
    """Memory maps of a cache's arrays; those used last stay open. Safe to use from several threads."""

    def __init__(self, folder: CacheFolder) -> None:
        self._folder = folder
        self.open = functools.lru_cache(maxsize=OPEN_SHARDS)(self.load)

    def load(self, name: str) -> np.ndarray:
        """A memory map of an array. Raises ``UserError`` for a file that is missing or damaged."""
        root = self._folder.root
        try:
            return np.load(root / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:  # EOFError: an empty one
            raise damaged(self._folder, name, error) from error

    def conditioning(self, number: int, per_shard: int, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors ``names`` of the encoded prompt ``number``, without batch dimension, floats as float32."""
        shard, place = divmod(number, per_shard)
        found = {}
        for name in names:
            value = np.array(self.open(shard_name("prompts", shard, name))[place])
            found[name] = torch.from_numpy(value.astype(np.float32) if value.dtype.kind == "f" else value)
        return found
