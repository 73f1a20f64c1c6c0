"""Judges of a user's own, named in the shell by where their code is.

    --judges mine=my_judges:Mine           a module that Python finds
    --judges mine=path/to/my_judges.py:Mine --judge-options mine.power=2

Importing runs code, so only what somebody typed as ``--judges`` is taken for a place: names in settings, recipes and run folders
never are. What stands there is a judge, or a class or function that returns one and is called with the judge's options.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from reward_models._judge import Scorer


def is_place(name: str) -> bool:
    """Whether a judge is named by the place of its code; no shipped judge has a colon in its name."""
    return ":" in name


def attribute_of(place: str) -> str:
    """Name of the judge in its module, and its label where none is given."""
    return place.rpartition(":")[2]


def options(place: str) -> tuple[str, ...]:
    """Names of the options that the judge at ``place`` takes. Raises UserError as ``load``."""
    found = _found(place)
    return () if _is_judge(found) else tuple(name for name, p in _parameters(found, place).items() if p.kind != p.VAR_KEYWORD)


def load(place: str, **told: Any) -> Scorer:
    """The judge at ``place``; a class or function there is called with ``told``, its options.

    Raises:
        UserError: there is no such module, file or attribute, importing it fails, an option is unknown or missing, or what comes
            out is no judge.
    """
    found = _found(place)
    if not _is_judge(found):
        _check_options(_parameters(found, place), told, place)
        found = found(**told)
    elif told:
        raise UserError(
            f"--judges: {place} is a judge already and takes no options; name its class, or a function that returns it."
        )
    if not _is_judge(found):
        raise UserError(f"--judges: {place} gave {type(found).__name__}; a judge of your own is a reward_models.PointwiseJudge.")
    return found


def _is_judge(found: Any) -> bool:
    from reward_models._judge import Scorer

    return isinstance(found, Scorer)


def _parameters(make: Any, place: str) -> dict[str, inspect.Parameter]:
    if not callable(make):
        raise UserError(f"--judges: {place} is {type(make).__name__}; a judge of your own is a reward_models.PointwiseJudge.")
    return dict(inspect.signature(make).parameters)


def _check_options(takes: dict[str, inspect.Parameter], told: Sequence[str] | dict[str, Any], place: str) -> None:
    anything = any(p.kind == p.VAR_KEYWORD for p in takes.values())
    for wrong in () if anything else [option for option in told if option not in takes]:
        hint = did_you_mean(wrong, takes)
        raise UserError(f"--judge-options: {place} has no option {wrong!r}.{hint} It has: {', '.join(takes) or 'none'}.")
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [n for n, p in takes.items() if p.default is p.empty and p.kind not in variable and n not in told]
    if needed:
        raise UserError(
            f"--judges: {place} is made with {', '.join(needed)}; give it by --judge-options LABEL.{needed[0]}=VALUE. What is "
            "named is a judge's class, or a function that returns a judge."
        )


# --------------------------------------------------------------------------------------------------------------- importing


def _found(place: str) -> Any:
    where, _, attribute = place.rpartition(":")
    if not where or not all(part.isidentifier() for part in attribute.split(".")):
        raise UserError(
            f"--judges: found {place!r}; a judge of your own is MODULE:NAME or FILE.py:NAME, as in mine=my_judges:Mine."
        )
    found = _of_file(Path(where).expanduser()) if where.endswith(".py") else _of_module(where)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(f"--judges: {where} has no {attribute}.{_hint(part, found)}")
        found = getattr(found, part)
    return found


def _hint(name: str, within: Any) -> str:
    return did_you_mean(name, [attribute for attribute in vars(within) if not attribute.startswith("_")])


def _of_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _broken(name, error) from error  # something that it imports itself
        raise UserError(
            f"--judges: Python finds no module {name}. Of a file say where it is, as in "
            f"mine=path/to/{name.rpartition('.')[2]}.py:NAME; of a folder of modules set PYTHONPATH."
        ) from error
    except Exception as error:
        raise _broken(name, error) from error


def _of_file(path: Path) -> Any:
    """The file as a module, imported once however many judges are in it; what lies beside it is not found by its imports."""
    if not path.is_file():
        raise UserError(f"--judges: there is no file {path}.")
    name = f"{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _broken(str(path), error) from error
    return module


def _broken(where: str, error: Exception) -> UserError:
    """Any error of the user's code at all, with the last line that it had reached."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = f"{error.filename}, line {error.lineno}" if isinstance(error, SyntaxError) else f"{last.filename}, line {last.lineno}"
    return UserError(f"--judges: {where} cannot be imported: {type(error).__name__}: {error} ({line}).")
