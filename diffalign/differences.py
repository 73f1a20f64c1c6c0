"""Comparing saved values with those of this run, and saying where they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

NAMED = 6
"""Differences that a refusal names; the others it counts."""
_LONG = 80


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As it would come back from a JSON file. Raises ``TypeError`` for values that JSON does not know."""
    return json.loads(json.dumps(value, sort_keys=True))


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots."""
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= flatten(inner, f"{prefix}{name}.") if isinstance(inner, Mapping) else {prefix + name: inner}
    return found


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The names, of whatever depth, whose values are not the same, in order: ``beta was 2000 and is now 500; ...; and 2 more``.

    Empty if nothing differs; a name that is on one side only is ``none`` on the other. Raises ``TypeError`` for values that JSON
    does not know.
    """
    before, after = flatten(plain(then)), flatten(plain(now))
    names = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    told = [f"{name} was {_short(before.get(name))} and is now {_short(after.get(name))}" for name in names[:NAMED]]
    return "; ".join(told + ([f"and {len(names) - NAMED} more"] if len(names) > NAMED else []))


def _short(value: Any) -> str:
    if value is None:
        return "none"
    whole = json.dumps(value, ensure_ascii=False)
    return f"a list of {len(value)}" if isinstance(value, list) and len(whole) > _LONG else whole
