"""What a long job has found so far: a file of JSON lines that it goes on from when it was cut off.

The first line says what the job is. A line is whole or not there: what was cut off in the middle does not count.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Lines:
    """The lines of the job ``purpose``, kept in ``path``."""

    def __init__(self, path: Path, purpose: str) -> None:
        self.path, self._head = path, json.dumps({"purpose": purpose})

    def foreign(self) -> bool:
        """Whether there is a file of another job."""
        if not self.path.exists():
            return False
        first = self.path.read_bytes().split(b"\n", 1)
        return len(first) == 2 and first[0].decode("utf-8", "replace") != self._head

    def read(self) -> list[Any]:
        """What was added, in order; nothing without a file."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[1:-1]  # the last is empty, or cut off
        return [json.loads(line) for line in lines]

    @contextmanager
    def adding(self) -> Iterator[Callable[[Any], None]]:
        """A function that adds a line, which is on disk when it returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data.rfind(b"\n") + 1
        with self.path.open("ab") as file:
            file.truncate(whole)  # what follows the last line's end was cut off

            def write(text: str) -> None:
                file.write(f"{text}\n".encode())
                file.flush()

            if not whole:
                write(self._head)
            yield lambda values: write(json.dumps(values, ensure_ascii=False))
