"""Options that take several values, separated by spaces or by commas.

Imports the standard library only.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any

_NEXT = re.compile(r",(?=\s*[\w.+-]+=)")
"""A comma that begins another NAME=VALUE; any other belongs to the value it stands in."""

COMMAS = "Most options take one value; where several are meant they are joined by commas, as in a,b"


class Joined(argparse.Action):
    """Keeps the values as one text with commas, as a user would have written it who parts them by commas.

    Not for a command that also takes words without an option: the option would swallow those that come after it.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, **how: Any) -> None:
        super().__init__(option_strings, dest, **{"nargs": "+", **how})

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, ",".join(values))


def assignments(items: Iterable[str]) -> list[str]:
    """``["a=1,b=2", "c=3"]`` as ``["a=1", "b=2", "c=3"]``."""
    return [part.strip() for item in items for part in _NEXT.split(item.rstrip(",")) if part.strip()]


def left_over(words: Sequence[str]) -> list[str]:
    """Those words that the parser did not recognise which are not the value of an unknown option."""
    before = ["", *words]
    return [word for last, word in zip(before, words, strict=False) if not word.startswith("-") and not last.startswith("-")]


def told_left_over(words: Sequence[str]) -> str:
    """A message about such words."""
    return f"{' '.join(words)}: {'belongs' if len(words) == 1 else 'belong'} to no option. {COMMAS}"


def told_unknown(words: Sequence[str]) -> str:
    """A message about all words that the parser did not recognise."""
    return f"unknown arguments: {' '.join(words)}" + (f". {COMMAS}" if left_over(words) else "")
