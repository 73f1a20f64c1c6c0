"""One paper per file: citation, formula, departures of the released code, the paper's numbers as defaults.

The folder is the registry: ``names()`` lists it, ``load(name)`` imports one. One of your own joins them by ``register``:

    @register("my-dpo")
    @dataclass(frozen=True)
    class MyDPO:
        about: ClassVar[About] = About("0000.00000", "data set, shared noise", FROZEN_START, "my own", (PAIRS,))
        cost: ClassVar[Cost] = Cost(with_gradient=2, forward_only=2)
        beta: float = option(2000.0, "strength of the tie to the reference", gt=0)  # diffalign.settings; becomes --beta

        def learner(self, given: RunContext) -> Learner: ...  # diffalign.learner
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TypeVar

from diffalign.errors import UserError
from diffalign.objectives._about import (
    EXPANSIONS,
    FROZEN_START,
    NOBODY,
    PAIRS,
    PICTURES,
    PROMPTS,
    REWRITES,
    About,
    Cost,
)

__all__ = [
    "EXPANSIONS",
    "FROZEN_START",
    "NOBODY",
    "PAIRS",
    "PICTURES",
    "PROMPTS",
    "REWRITES",
    "About",
    "Cost",
    "load",
    "names",
    "nearest",
    "register",
]

SHORT = {"dpo": "diffusion-dpo", "dro": "diffusion-dro", "diffusion-kto": "kto", "sem": "sem-dpo", "prompt-dpo": "sem-dpo"}
"""What people call some of them, so that a hint need not go by the letters (of which ``ddpo`` shares more with ``dpo``)."""
_Class = TypeVar("_Class", bound=type)
_BROUGHT: dict[str, ModuleType] = {}
"""Objectives that somebody else has registered."""


def names(of_prompts: bool | None = None) -> list[str]:
    """The objectives, as the command line spells them: those of prompt writers, those of image models, or all of them."""
    shipped = (m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    found = sorted({*shipped, *_BROUGHT})
    return found if of_prompts is None else [name for name in found if load(name).ABOUT.of_prompts is of_prompts]


def load(name: str) -> ModuleType:
    """The module of an objective. Raises UserError that lists the known ones."""
    if name not in names(None):
        near = nearest(name, names())
        hint = f" Did you mean {near!r}?" if near else ""
        raise UserError(f"No objective is called {name!r}.{hint} There are: {', '.join(names())}.")
    return _BROUGHT.get(name) or importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The objective that somebody may have meant: that of a common short name, or one that is spelt much the same."""
    if (usual := SHORT.get(name.lower().replace("_", "-"))) in known:
        return usual
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def register(name: str) -> Callable[[_Class], _Class]:
    """Have an objective of your own, a frozen dataclass, stand beside the shipped ones for the rest of the process: for
    ``align("my-dpo", ...)``, and for the command line in a script that ends in ``pipelines.cli.main()``. Another class of the
    same ``name`` takes the place of the first, as when a notebook's cell is run again. Its settings become options, so none may
    have the name that another setting of a run has (``alpha`` and ``rank`` are a LoRA's): options are read with a look at that.

    Raises:
        UserError: the name is a shipped objective's, or no name for an option; the class lacks what every objective has.
    """
    if name in names() and name not in _BROUGHT:
        raise UserError(f"There is an objective {name!r} already: give yours another name.")
    if not name.replace("-", "").isalnum() or name != name.lower():
        raise UserError(f"An objective's name is of small letters, digits and hyphens; got {name!r}.")

    def registered(objective: _Class) -> _Class:
        lacks = [what for what in ("about", "cost", "learner") if not hasattr(objective, what)]
        if lacks or not dataclasses.is_dataclass(objective) or not isinstance(objective.about, About):
            raise UserError(
                f"{objective.__name__} is to be a dataclass with about (an About), cost (a Cost) and learner(run); "
                f"it lacks {', '.join(lacks) or 'that form'}."
            )
        module = ModuleType(name, objective.__doc__ or getattr(sys.modules.get(objective.__module__), "__doc__", None))
        module.ABOUT, module.Objective = objective.about, objective
        _BROUGHT[name] = module
        return objective

    return registered
