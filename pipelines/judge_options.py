"""The options that name judges, for every command that scores, and the loading of these judges.

    --judges pickscore,mine=clip --judge-options mine.weights=./model.safetensors pickscore.dtype=bfloat16

A judge has its own name or a label that the user gives it, so that two checkpoints of one judge fit into one table; one of the
user's own is named by where its code is (``imported_judges``). Imports nothing heavy before ``judges_from``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.errors import UserError
from pipelines.imported_judges import attribute_of, is_place
from pipelines.several import Joined, assignments

if TYPE_CHECKING:
    from reward_models._judge import Scorer

_LABEL = re.compile(r"[A-Za-z0-9][\w.+-]*")
"""Pattern of a judge's label, which becomes the name of a column and the beginning of an option."""
_WHOLE = re.compile(r"[+-]?\d+")
_DECIMAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?")


def add_judge_options(parser: argparse.ArgumentParser, default: str | None = None, apart: bool = False) -> None:
    """Add the options that name judges and their options; without a ``default`` the user has to name some.

    ``apart``: judges may also be parted by spaces, for a command that takes no words without an option.
    """
    import reward_models

    usual = f" (default {default})" if default else ""
    parser.add_argument(
        "--judges",
        "--judge",
        required=default is None,
        default=default,
        action=Joined if apart else "store",
        metavar="NAME,...",
        help=f"judges, comma-separated, each NAME or LABEL=NAME; there are {', '.join(reward_models.names())}; one of your own "
        f"is LABEL=MODULE:CLASS or LABEL=FILE.py:CLASS{usual}",
    )
    parser.add_argument(
        "--judge-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="JUDGE.OPTION=VALUE",
        help="options of the judges, as in pickscore.weights=PATH pickscore.dtype=bfloat16",
    )


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the cache of scores: ``args.cache`` is True, a path or False, as ``score`` takes it."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--cache",
        type=Path,
        default=True,
        metavar="FILE",
        help="cache file of scores and embeddings (default: one of your own, shared by all runs; see DIFFALIGN_CACHE)",
    )
    either.add_argument(
        "--no-cache",
        dest="cache",
        action="store_const",
        const=False,
        help="neither read nor write the cache of scores and embeddings",
    )


def add_scoring_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of scoring, for commands that do nothing else on the device."""
    from pipelines.sampling_options import whole

    add_cache_options(parser)
    parser.add_argument(
        "--batch-size", type=whole(1), default=16, metavar="N", help="number of pictures judged together (default 16)"
    )
    parser.add_argument("--device", help="device, such as cuda, cuda:1, mps or cpu (default: the best there is)")


def scoring_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of ``score``, from the parsed options."""
    return {"batch_size": args.batch_size, "cache": args.cache}


def judges_from(args: argparse.Namespace) -> dict[str, Scorer]:
    """The judges that were asked for; see ``load_judges``."""
    return load_judges(args.judges, args.judge_options, getattr(args, "device", None), typed=True)


def load_judges(judges: str, options: Sequence[str] = (), device: str | None = None, *, typed: bool = False) -> dict[str, Scorer]:
    """The loaded judges that ``--judges`` and ``--judge-options`` name, by their labels; ``device`` is passed to those that take
    one.

    Args:
        typed: somebody typed these names just now, so that code of their own may be imported by its place. Names out of settings
            may come from anywhere.

    Raises:
        UserError: an unknown judge or option, two of one name, two that must not stand in one table, weights that are not here, a
            judge of the user's own that cannot be imported, or is named where none can be.
    """
    import reward_models
    from pipelines import imported_judges
    from reward_models.base import JudgeError

    asked, told, takes = judges_called(judges, options, typed=typed)  # unknown ones are refused before any is loaded
    loaders = {name: imported_judges.load if imported_judges.is_place(name) else reward_models.load for name in asked.values()}
    try:
        placed = {label: _placed(told[label], device, takes[name]) for label, name in asked.items()}
        return {label: loaders[name](name, **placed[label]) for label, name in asked.items()}
    except JudgeError as error:
        raise UserError(f"--judges: {error}.") from error


def judges_called(
    judges: str, options: Sequence[str] = (), *, typed: bool = False
) -> tuple[dict[str, str], dict[str, dict[str, Any]], dict[str, Sequence[str]]]:
    """The judges that are asked for: their names by label, the options of each label, and the options that each name takes.

    Raises:
        UserError: as ``load_judges``, but for weights, which are not looked for.
    """
    import reward_models
    from pipelines import imported_judges
    from reward_models.base import JudgeError

    asked = parse_judges(judges)
    told = parse_judge_options(options, asked)
    own = [name for name in asked.values() if imported_judges.is_place(name)]
    if own and not typed:
        raise UserError(
            f"{own[0]!r} is code of your own, which is imported only where --judges names it in the shell. Training and Python "
            "take the judge itself: pipelines.training.align(..., judge=...), or a mapping from names to judges."
        )
    try:
        takes = {name: (imported_judges if name in own else reward_models).options(name) for name in asked.values()}
        reward_models.check_together([*asked, *asked.values()])
    except JudgeError as error:
        raise UserError(f"--judges: {error}.") from error
    return asked, told, takes


def parse_judges(text: str) -> dict[str, str]:
    """``"pickscore,mine=clip"`` as a mapping from label to the judge's name.

    Raises:
        UserError: nothing is asked for, a label that is no plain word, one that is given twice.
    """
    asked: dict[str, str] = {}
    for item in (item.strip() for item in text.split(",")):
        label, sign, name = (part.strip() for part in item.partition("="))
        if not item:
            continue
        if not sign and is_place(item):
            label, name = attribute_of(item), item
        if not _LABEL.fullmatch(label) or (sign and not name):
            raise UserError(
                f"--judges: found {item!r}; expected NAME or LABEL=NAME, as in mine=pickscore, or for one of your own "
                "mine=my_judges:Mine or mine=path/my_judges.py:Mine."
            )
        if label in asked:
            raise UserError(
                f"--judges: {label!r} is asked for twice; give one of them a name of its own, as in mine={name or label}."
            )
        asked[label] = name or label
    if not asked:
        raise UserError(f"--judges: found {text!r}; expected at least one, as in pickscore,clip.")
    return asked


def parse_judge_options(items: Sequence[str], judges: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """``["hps-v2.1.weights=PATH", ...]`` as options of each judge; the judge ends at the last dot before the sign. Several may
    also stand in one text, parted by commas.

    Values are whole numbers, decimals, ``true``, ``false``, or else text; quotes keep what is in them as text.

    Raises:
        UserError: an item of another form, or of a judge that is not asked for.
    """
    told: dict[str, dict[str, Any]] = {label: {} for label in judges}
    for item in assignments(items):
        place, sign, value = item.partition("=")
        label, dot, option = place.rpartition(".")
        if not (sign and dot and label and option):
            raise UserError(f"--judge-options: found {item!r}; expected JUDGE.OPTION=VALUE, as in pickscore.weights=PATH.")
        if label not in told:
            raise UserError(f"--judge-options: {item!r} is for the judge {label!r}, but --judges asks for {', '.join(judges)}.")
        told[label][option] = _value(value)
    return told


def _value(text: str) -> bool | int | float | str:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _DECIMAL.fullmatch(text) else text


def _placed(options: dict[str, Any], device: str | None, takes: Sequence[str]) -> dict[str, Any]:
    """The options with the device, unless the judge takes none or was given one."""
    if device is None or "device" not in takes or "device" in options:
        return options
    _check_device(device)
    return {"device": device, **options}


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a word that is none, or one that is not here
        raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
