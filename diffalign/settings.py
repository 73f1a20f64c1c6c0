"""Settings are frozen dataclasses whose fields carry their own help and bounds: ``beta: float = option(2000.0, "...", gt=0)``.

The command line and the YAML reader (``pipelines.config``) are generated from them; used directly from Python they check
themselves.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "gt": (operator.gt, "greater than"),
    "ge": (operator.ge, "at least"),
    "lt": (operator.lt, "less than"),
    "le": (operator.le, "at most"),
}


def option(default: Any = dataclasses.MISSING, help: str = "", **bounds: float) -> Any:
    """A dataclass field with a help text and bounds (``gt``, ``ge``, ``lt``, ``le``)."""
    unknown = bounds.keys() - _BOUNDS.keys()
    if unknown:
        raise TypeError(f"bounds are {', '.join(_BOUNDS)}; got {', '.join(unknown)}")
    return dataclasses.field(default=default, metadata={"help": help, "bounds": bounds})


def check_options(settings: Any) -> None:
    """Raise ValueError for every field outside its bounds, all in one message. Meant for ``__post_init__``."""
    mistakes = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        for name, bound in field.metadata.get("bounds", {}).items():
            holds, words = _BOUNDS[name]
            if value is not None and not holds(value, bound):
                mistakes.append(f"{field.name} should be {words} {bound}; got {value}")
    if mistakes:
        raise ValueError("; ".join(mistakes))
