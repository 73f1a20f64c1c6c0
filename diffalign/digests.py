"""Digests by which what was made once is known again: of plain values, and of files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def digest_of(value: Any) -> str:
    """sha256 of a value as JSON, 64 hexadecimal digits.

    The order of a mapping does not count; what JSON does not know counts as its text.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: str | Path) -> str:
    """sha256 of a file's content, 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
