"""``metrics.jsonl``: what a run has measured, a line for each step or validation.

A process may be killed while it writes, so the last line may be torn; such a line does not count.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.written_aside import write_file


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines in order, each with at least ``kind`` and ``step``; a torn last one is left out.

    Raises:
        UserError: another line than the last is broken.
    """
    lines = path.read_bytes().rstrip(b"\n").split(b"\n")
    rows = [_row(line) for line in lines]
    if rows[-1] is None:
        rows.pop()
    if None in rows:
        raise UserError(
            f"Line {rows.index(None) + 1} of {path} is broken, and only the last line of it may be: it was changed by something "
            "else than a run. Mend or delete that line."
        )
    return rows


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of later steps, which will be done again, and a torn one; the file is replaced as a whole.

    Raises:
        UserError: as ``read_rows``, or the disk refuses; the file is untouched.
    """
    kept = [row for row in read_rows(path) if row["step"] <= step]
    write_file(path, "".join(json.dumps(row) + "\n" for row in kept), lasting=True)


def _row(line: bytes) -> dict[str, Any] | None:
    """None for a line that is broken."""
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    return row if isinstance(row, dict) and row.keys() >= {"kind", "step"} else None
