"""Recipes: one run per YAML file, ``recipes/OBJECTIVE/NAME.yaml``, with its provenance in the comment on top.

A recipe holds only what differs from the defaults. ``diffalign train OBJECTIVE --recipe NAME`` starts from it. `accelerate/` has
configurations for ``accelerate launch`` in place of runs; ``diffalign devices NAME`` prints the path of one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign.errors import UserError, did_you_mean


def names(objective: str) -> list[str]:
    """The recipes of an objective."""
    return sorted(p.stem for p in _folder(objective).glob("*.yaml"))


def load(objective: str, name: str) -> dict[str, Any]:
    """A recipe as a tree of settings. Raises UserError that names the nearest one."""
    from pipelines.config import read_yaml

    return read_yaml(path(objective, name))


def path(objective: str, name: str) -> Path:
    """The file of a recipe. Raises UserError that names the nearest one."""
    if name not in (known := names(objective)):
        listed = ", ".join(known) or "none"
        raise UserError(f"{objective} has no recipe {name!r}; there are: {listed}.{did_you_mean(name, known)}")
    return _folder(objective) / f"{name}.yaml"


def describe(objective: str) -> list[str]:
    """One line per recipe: its name and the first line of its comment."""
    lines = []
    for name in names(objective):
        first = (_folder(objective) / f"{name}.yaml").read_text("utf-8").splitlines()[0]
        lines.append(f"{name:20s} {first.removeprefix('#').strip()}")
    return lines


def _folder(objective: str) -> Path:
    return Path(__file__).parent / objective.replace("-", "_")
