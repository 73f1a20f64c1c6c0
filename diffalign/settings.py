"""Settings are frozen dataclasses whose fields carry their own help and bounds: ``beta: float = option(2000.0, "...", gt=0)``.

The command line and the YAML reader (``pipelines.config``) are generated from them; used directly from Python they check
themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import typing
from collections.abc import Callable
from typing import Any, Literal

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
    """Raise ValueError for every field outside its bounds or beside its choices, all in one message.

    Meant for ``__post_init__``. The choices are those of a ``Literal``.
    """
    mistakes, choices = [], _choices(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value not in (*choices.get(field.name, (value,)), field.default):
            mistakes.append(f"{field.name} is one of {', '.join(map(str, choices[field.name]))}; got {value!r}")
        for name, bound in field.metadata.get("bounds", {}).items():
            holds, words = _BOUNDS[name]
            if value is not None and not holds(value, bound):
                mistakes.append(f"{field.name} should be {words} {bound}; got {value}")
    if mistakes:
        raise ValueError("; ".join(mistakes))


@functools.cache
def _choices(kind: type) -> dict[str, tuple[Any, ...]]:
    """What the fields of a class may hold that are declared as a ``Literal``, or as one of several."""
    try:
        hints = typing.get_type_hints(kind)
    except NameError:  # a class made within a function may name types that only the function knows
        return {}
    return {name: allowed for name, hint in hints.items() if (allowed := _allowed(hint))}


def _allowed(hint: Any) -> tuple[Any, ...]:
    """The values of a ``Literal``, alone or beside None; empty where other values are allowed."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    parts = typing.get_args(hint)
    if type(None) in parts and all(part is type(None) or typing.get_origin(part) is Literal for part in parts):
        return (None, *(value for part in parts for value in typing.get_args(part)))
    return ()
