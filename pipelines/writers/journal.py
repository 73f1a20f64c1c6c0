"""The results of a long job so far, as a file of JSON lines that an interrupted job continues from.

The first line identifies the job. A last line that was not written to its end is ignored and overwritten.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Lines:
    """The lines of the job that ``purpose`` identifies, kept in ``path``."""

    def __init__(self, path: Path, purpose: str) -> None:
        self.path, self._head = path, json.dumps({"purpose": purpose})

    def foreign(self) -> bool:
        """Whether the file exists and belongs to another job."""
        if not self.path.exists():
            return False
        first = self.path.read_bytes().split(b"\n", 1)
        return len(first) == 2 and first[0].decode("utf-8", "replace") != self._head

    def read(self) -> list[Any]:
        """The values that were added, in order; none if there is no file."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[1:-1]  # the last is empty, or cut off
        return [json.loads(line) for line in lines]

    @contextmanager
    def adding(self) -> Iterator[Callable[[Any], None]]:
        """A function that adds a value; its line is handed to the operating system when the function returns."""
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
