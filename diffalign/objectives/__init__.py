"""One paper per file: citation, formula, departures of the released code, the paper's numbers as defaults.

The folder is the registry: ``names()`` lists it, ``load(name)`` imports one.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType

from diffalign.errors import UserError


def names(of_prompts: bool | None = None) -> list[str]:
    """The objectives, as the command line spells them: those of prompt writers, those of image models, or all of them."""
    found = sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return found if of_prompts is None else [name for name in found if load(name).ABOUT.of_prompts is of_prompts]


def load(name: str) -> ModuleType:
    """The module of an objective. Raises UserError that lists the known ones."""
    if name not in names(None):
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"No objective is called {name!r}.{hint} There are: {', '.join(names())}.")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
