"""Judges of pictures. The folder is the registry: every module here that states ``NAME`` is a judge of that name, and one that
states ``NAMES`` is one of each, versions of one another.

    judge = reward_models.load("pickscore")
    judge.score(images, prompts)  # float32 [N], one score per picture
    reward_models.score(["clip", "aesthetic-v1", "jpeg"], images, prompts)  # several in one pass: name -> scores

A judge's module also has ``load(**options)``, which returns the judge (see ``reward_models.base.Judge``); with ``NAMES`` the
name is its first argument. Nothing is imported or read from disk before a judge is loaded.

A judge of your own is a ``PointwiseJudge``: ``info`` and ``score_prepared``, and all the rest is there.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from reward_models.base import Judge, JudgeError, RewardInfo

if TYPE_CHECKING:
    from torch import Tensor

    from reward_models._judge import PointwiseJudge, Preparation, Scorer

__all__ = [
    "Judge",
    "JudgeError",
    "PointwiseJudge",
    "Preparation",
    "RewardInfo",
    "UnknownJudgeError",
    "check_together",
    "load",
    "names",
    "options",
    "score",
]


def __getattr__(name: str) -> Any:
    """What judges are made of is imported when it is asked for: it needs PIL, which the command line can do without."""
    if name in ("PointwiseJudge", "Preparation"):
        from reward_models import _judge

        return getattr(_judge, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class UnknownJudgeError(JudgeError):
    """No judge has this name; the message lists those there are."""


def names() -> list[str]:
    """The names of all judges, sorted. Reads the modules as text and imports none of them."""
    return sorted(_modules())


def load(name: str, **options: Any) -> PointwiseJudge:
    """The judge called ``name``; ``options`` go to its module's ``load``.

    Raises:
        UnknownJudgeError: no module states this name.
        JudgeError: an option that the judge does not have, weights that are not here, ...
    """
    module = _module(name)
    takes = _options(module)
    wrong = [option for option in options if option not in takes]
    if wrong:
        near = difflib.get_close_matches(wrong[0], takes, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise JudgeError(f"the judge {name!r} has no option {wrong[0]!r}.{hint} It has: {', '.join(takes) or 'none'}")
    return module.load(name, **options) if hasattr(module, "NAMES") else module.load(**options)


def options(name: str) -> tuple[str, ...]:
    """What ``load(name, ...)`` can be told. Raises UnknownJudgeError."""
    return _options(_module(name))


def score(
    judges: Sequence[str | Scorer] | Mapping[str, Scorer],
    images: Any,
    prompts: str | Sequence[str] | None = None,
    **how: Any,
) -> dict[str, Tensor]:
    """Several judges in one pass over the pictures: scores [N] float32 by name. ``how``: batch_size, cache, progress.

    Pictures are opened once, and judges on one backbone share its forward pass.

    Raises:
        JudgeError: an unknown judge, two of one name, two that must not stand in one table, wrong lengths, no pictures.
    """
    from reward_models._scoring import score_all

    panel = panel_of(judges)
    return dict(zip(panel, score_all(list(panel.values()), images, prompts, **how), strict=True))


def panel_of(judges: Sequence[str | Scorer] | Mapping[str, Scorer]) -> dict[str, Scorer]:
    """Judges by name, those given by name loaded. Raises as ``score``."""
    if isinstance(judges, str):
        judges = [judges]
    if isinstance(judges, Mapping):
        panel = dict(judges)
    else:
        loaded = [load(judge) if isinstance(judge, str) else judge for judge in judges]
        _refuse_what_says_nothing(loaded)
        panel = {judge.info.name: judge for judge in loaded}
        if len(panel) < len(loaded):
            names = [judge.info.name for judge in loaded]
            twice = next(name for name in names if names.count(name) > 1)
            raise JudgeError(f"the judge {twice!r} is asked for more than once; give each a name of its own: {{name: judge}}")
    _refuse_what_says_nothing(panel.values())
    if not panel:
        raise JudgeError("scoring needs at least one judge; none was given")
    check_together([*panel, *(judge.info.name for judge in panel.values())])
    return panel


def _refuse_what_says_nothing(judges: Iterable[Any]) -> None:
    for judge in judges:
        if not hasattr(judge, "info"):
            raise JudgeError(f"{judge!r} is no judge: it has no info. One of your own is a reward_models.PointwiseJudge")


def check_together(asked: Iterable[str]) -> None:
    """Raises JudgeError if two of these names are versions whose numbers readers of one table would take for the same measure."""
    named, apart = set(asked), {}
    for name, stem in _modules(stating="\nNOT_TOGETHER = True").items():
        if name in named:
            apart.setdefault(stem, []).append(name)
    for together in apart.values():
        if len(together) > 1:
            raise JudgeError(
                f"{' and '.join(together)} are not comparable and do not go into one table: they are versions of one judge with "
                f"different weights and scales. Score with one of them"
            )


def _module(name: str) -> Any:
    modules = _modules()
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UnknownJudgeError(f"there is no judge called {name!r}.{hint} The judges are: {', '.join(sorted(modules))}")
    return importlib.import_module(f"{__name__}.{modules[name]}")


def _options(module: Any) -> tuple[str, ...]:
    return tuple(p for p in inspect.signature(module.load).parameters if not (p == "name" and hasattr(module, "NAMES")))


def _modules(stating: str = "") -> dict[str, str]:
    """Name of each judge -> name of its module; of those modules that contain the words ``stating``."""
    found: dict[str, str] = {}
    for file in sorted(resources.files(__name__).iterdir(), key=lambda f: f.name):
        stem, _, ending = file.name.rpartition(".")
        if ending != "py" or stem.startswith("_"):
            continue
        source = file.read_text(encoding="utf-8")
        for name in _stated_names(source) if stating in source else ():
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
