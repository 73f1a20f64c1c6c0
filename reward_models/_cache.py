"""Scores and embeddings that have been computed once, by content: the same picture under another name is found again.

Two levels: scores by (picture, prompt, judge), and the vectors that several judges' scores are made from, by (picture or text,
encoder). A judge's key covers the hashes of its weights and of its tokenizer, its preprocessing, its precision and the versions
of libraries, so that nothing old is ever mistaken for new. One SQLite file; several processes may use it at a time.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from reward_models.base import JudgeError

if TYPE_CHECKING:
    import numpy as np

PLACE = "DIFFALIGN_CACHE"
"""Environment variable: the folder of the user's own cache."""
_AT_ONCE = 500  # keys of one query; SQLite allows a thousand variables
_TABLES = """
create table if not exists scores (key text primary key, value real not null) without rowid;
create table if not exists vectors (key text primary key, value blob not null) without rowid;
"""


def own_path() -> Path:
    """Where the user's own cache is."""
    folder = os.environ.get(PLACE) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffalign"
    return Path(folder) / "scores.sqlite"


class Cache:
    """An open cache. Use it as a context, or ``close`` it.

    ``optional``: where it fails while it is used, as a damaged file or a full disk does, one warning is given, and from there on
    it knows and keeps nothing.

    Raises:
        JudgeError: the file cannot be used as a cache. Reading and writing raise it, too, unless the cache is optional.
    """

    def __init__(self, path: str | Path, optional: bool = False) -> None:
        self.path, self._optional, self._failed = Path(path).expanduser(), optional, False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(self.path, timeout=60)
            with suppress(sqlite3.OperationalError):  # another that opens the new file at this moment does it
                self._base.execute("pragma journal_mode=wal")
            self._base.execute("pragma synchronous=normal")
            self._base.executescript(_TABLES)
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error

    @classmethod
    def of(cls, where: Cache | str | Path | bool | None) -> Cache | None:
        """What a user gives as ``cache``: None or False, True for the user's own, a path, or an open cache."""
        if where is None or where is False or isinstance(where, Cache):
            return where or None
        return cls._own() if where is True else cls(where)

    @classmethod
    def _own(cls) -> Cache | None:
        """Nobody asked for the user's own cache: where its place cannot be written (containers), scores are computed without."""
        try:
            return cls(own_path(), optional=True)
        except JudgeError as error:
            _warn(f"{error}: nothing is remembered")
            return None

    def scores(self, keys: Sequence[str]) -> dict[str, float]:
        """Those that are known."""
        return self._read("scores", keys)

    def vectors(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """Those that are known, [D] float32 each."""
        import numpy as np

        return {key: np.frombuffer(value, dtype="<f4") for key, value in self._read("vectors", keys).items()}

    def keep_scores(self, scores: Mapping[str, float]) -> None:
        """Remember them; what is not a number is not remembered."""
        self._write("scores", [(key, value) for key, value in scores.items() if value == value])

    def keep_vectors(self, vectors: Mapping[str, np.ndarray]) -> None:
        self._write("vectors", [(key, value.astype("<f4").tobytes()) for key, value in vectors.items()])

    def close(self) -> None:
        self._base.close()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, table: str, keys: Sequence[str]) -> dict:
        found: dict = {}
        if self._failed:
            return found
        with self._errors_told():
            for start in range(0, len(keys), _AT_ONCE):
                some = keys[start : start + _AT_ONCE]
                marks = ",".join("?" * len(some))
                found.update(self._base.execute(f"select key, value from {table} where key in ({marks})", list(some)))
        return found

    def _write(self, table: str, rows: Iterable[tuple]) -> None:
        if self._failed:
            return
        with self._errors_told(), self._base:
            self._base.executemany(f"insert or replace into {table} values (?, ?)", rows)

    @contextmanager
    def _errors_told(self) -> Iterator[None]:
        """Errors of SQLite with the file's name: raised, or of an optional cache a warning, after which it is not used again."""
        try:
            yield
        except sqlite3.Error as error:
            if not self._optional:
                raise self._unusable(error) from error
            self._failed = True
            _warn(f"{self._unusable(error)}: from here on nothing is remembered")

    def _unusable(self, error: Exception) -> JudgeError:
        advice = "; if it is damaged, delete it" if type(error) is sqlite3.DatabaseError else ""
        return JudgeError(f"{self.path} cannot be used as a cache of scores: {error}{advice}")


def _warn(told: str) -> None:
    warnings.warn(f"{told}. --no-cache (cache=False) leaves it out, {PLACE} names another folder for it", stacklevel=2)


def score_key(picture: str, prompt: str, judge: str) -> str:
    """Key of a score: content of the picture, prompt (empty where the judge reads none), fingerprint of the judge."""
    return hashlib.sha256(f"{picture}\0{judge}\0{prompt}".encode()).hexdigest()


def vector_key(content: str, encoder: str) -> str:
    """Key of a picture's vector, from the hash of its content and the encoder's fingerprint."""
    return f"{encoder}:{content}"


def text_key(text: str, encoder: str) -> str:
    """Key of a text's vector."""
    return f"{encoder}:text:{hashlib.sha256(text.encode()).hexdigest()}"
