"""The command line where a process has no memory for previews after a while: ``drawing_together.py PLACE RANK WORDS...``."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from pipelines import cli, previews


def full_at(place: str, rank: str) -> None:
    """From its second call on, ``previews.PLACE`` finds no memory in one process."""
    own, calls = getattr(previews, place), []

    def called(*given: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) > 1 and os.environ["RANK"] == rank:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(*given, **named)

    setattr(previews, place, called)


if __name__ == "__main__":
    full_at(*sys.argv[1:3])
    sys.exit(cli.main(sys.argv[3:]))
