"""What comes with the package, by name. Imports nothing heavy: commands that only read data ask here."""

from __future__ import annotations

from pathlib import Path

NAME = "tiny"
PAIRS = Path(__file__).parent / "pairs.parquet"
"""The preference pairs of the tiny world, in the format of Pick-a-Pic v2."""


def pairs_called(where: str) -> str:
    """``tiny`` names the shipped pairs; anything else is taken as it is."""
    return str(PAIRS) if where == NAME else where
