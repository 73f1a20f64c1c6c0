"""Judges of pictures. The folder is the registry: every module here that states ``NAME`` is a judge of that name, and one that
states ``NAMES`` is one of each, versions of one another.

    judge = reward_models.load("jpeg")
    judge.score(images, prompts)  # float32 [N], one score per picture

A judge's module also has ``load(**options)``, which returns the judge (see ``reward_models.base.Judge``); with ``NAMES`` the
name is its first argument. Nothing is imported or read from disk before a judge is loaded.
"""

from __future__ import annotations

import ast
import difflib
import importlib
from importlib import resources
from typing import Any

from reward_models.base import Judge, JudgeError, RewardInfo

__all__ = ["Judge", "JudgeError", "RewardInfo", "UnknownJudgeError", "load", "names"]


class UnknownJudgeError(JudgeError):
    """No judge has this name; the message lists those there are."""


def names() -> list[str]:
    """The names of all judges, sorted. Reads the modules as text and imports none of them."""
    return sorted(_modules())


def load(name: str, **options: Any) -> Judge:
    """The judge called ``name``; ``options`` go to its module's ``load``.

    Raises:
        UnknownJudgeError: no module states this name.
    """
    modules = _modules()
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownJudgeError(f"there is no judge called {name!r}.{hint} The judges are: {', '.join(sorted(modules))}")
    module = importlib.import_module(f"{__name__}.{modules[name]}")
    return module.load(name, **options) if hasattr(module, "NAMES") else module.load(**options)


def _modules() -> dict[str, str]:
    """Name of each judge -> name of its module."""
    found: dict[str, str] = {}
    for file in sorted(resources.files(__name__).iterdir(), key=lambda f: f.name):
        stem, _, ending = file.name.rpartition(".")
        if ending != "py" or stem.startswith("_"):
            continue
        for name in _stated_names(file.read_text(encoding="utf-8")):
            assert name not in found, f"{found[name]}.py and {stem}.py both state the name {name!r}"
            found[name] = stem
    return found


def _stated_names(source: str) -> tuple[str, ...]:
    """The string that a module assigns to ``NAME`` at its top level, or the strings of ``NAMES``."""
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        named = {t.id for t in targets if isinstance(t, ast.Name)}
        if "NAME" in named and isinstance(node.value, ast.Constant):
            return (node.value.value,)
        if "NAMES" in named and isinstance(node.value, ast.Tuple):
            return ast.literal_eval(node.value)
    return ()
