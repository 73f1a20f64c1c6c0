"""Configuration: from a recipe, a YAML file and the command line to checked settings.

The settings are declared in ``image_settings`` and ``writers.settings``. The sections are settings dataclasses, the core's own
among them, so a default, a bound or a help text stands in one place. Pydantic checks everything before anything is loaded; one
message lists all mistakes, with the nearest known name for each unknown one.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import numbers
import os
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from diffalign.errors import UserError
from diffalign.objectives._about import About
from pipelines.several import Joined, left_over, told_left_over


@dataclasses.dataclass(frozen=True)
class Schema:
    """The settings of a configuration for one kind of objective."""

    Settings: type  # the whole, a dataclass with a field for each of ``top_level`` and each section
    top_level: Mapping[str, str]  # settings that stand in no section, with their help
    sections: Callable[[type], dict[str, type]]  # of an objective, in the order they are shown
    missing: Callable[[Mapping[str, Any], About], list[str]]  # what an objective needs and was not given
    contradictions: Callable[[Mapping[str, Any]], list[str]]  # what does not go together, in a configuration without mistakes
    implied: Callable[[Mapping[str, Any], type], Mapping[str, Any]] = lambda tree, objective: {}
    """what the data of a configuration say about it: it wins over a recipe, and what is said explicitly wins over both"""


def schema_of(objective: type) -> Schema:
    """The schema of image models' objectives, or that of prompt writers'."""
    if objective.about.of_prompts:
        from pipelines.writers.settings import SCHEMA
    else:
        from pipelines.image_settings import SCHEMA
    return SCHEMA


OF_A_CALL = frozenset(
    ("name", "recipe", "resume", "overwrite", "progress", "judge", "config", "dry_run", "quiet", "debug", "prepare", "help")
)
"""Names that ``align`` and ``diffalign train`` have for themselves."""


def sections(objective: type) -> dict[str, type]:
    """The sections of a configuration for one objective, in the order they are shown.

    Raises:
        UserError: a setting of the objective, one of a user's own, has the name of another, which alone would be reached.
    """
    schema = schema_of(objective)
    found = schema.sections(objective)
    homes = {field.name: name for name, each in found.items() if each is not objective for field in dataclasses.fields(each)}
    homes |= dict.fromkeys(schema.top_level, "every run") | dict.fromkeys(OF_A_CALL, "the call")
    if taken := [f"{field.name} (of {homes[field.name]})" for field in dataclasses.fields(objective) if field.name in homes]:
        raise UserError(
            f"{objective.__name__} calls settings of its own as others are called already: {', '.join(taken)}. Options go by "
            "these names, so each has to be the only one: give yours other names."
        )
    return found


# ------------------------------------------------------------------------------------------------------- command line


def add_options(parser: argparse.ArgumentParser, objective: type) -> None:
    """One ``--option`` per setting. Values stay text; pydantic reads them together with the YAML's."""
    top = parser.add_argument_group("run")
    hints = get_type_hints(schema_of(objective).Settings)
    for name, text in schema_of(objective).top_level.items():
        how = {"action": Joined} if _takes_several(hints[name]) else {}
        top.add_argument(flag_of(name), dest=name, metavar=name.upper(), default=None, help=text, **how)
    for section, settings in sections(objective).items():
        group = parser.add_argument_group(section, (settings.__doc__ or "").strip().splitlines()[0])
        hints = get_type_hints(settings)
        for field in dataclasses.fields(settings):
            default = "none" if field.default in (None, ()) else field.default
            how = {"action": Joined} if _takes_several(hints[field.name]) else {"nargs": "?", "const": "true"}
            group.add_argument(
                flag_of(field.name),
                flag_of(f"{section}.{field.name}"),
                dest=f"{section}.{field.name}",
                **how,
                default=None,
                metavar="VALUE",
                help=f"{field.metadata.get('help', '')} (default: {default})".replace("%", "%%"),
            )


def _takes_several(hint: Any) -> bool:
    """Whether a setting is a list or a mapping."""
    return _kind(hint)[0] in (tuple, dict)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def given_options(args: argparse.Namespace, objective: type) -> dict[str, Any]:
    """The options that were set on the command line, nested as in the YAML."""
    out: dict[str, Any] = {}
    for path in _paths(objective):
        value = getattr(args, path)
        if value is not None:
            put(out, path, value)
    return out


def _paths(objective: type) -> Iterator[str]:
    yield from schema_of(objective).top_level
    for section, settings in sections(objective).items():
        yield from (f"{section}.{field.name}" for field in dataclasses.fields(settings))


def placed(options: Mapping[str, Any], objective: type) -> dict[str, Any]:
    """Options by their short names (``learning_rate=1e-4``) or dotted paths, nested as in the YAML; unknown names stay on top."""
    out: dict[str, Any] = {}
    short, whole = {path.split(".")[-1]: path for path in _paths(objective)}, sections(objective)
    for name, value in options.items():
        a_section = name in whole and isinstance(value, Mapping)  # ``optimizer`` is the name of a setting as well
        put(out, name if a_section else short.get(name, name), _plain(name, value))
    return out


_PLAIN = (str, numbers.Number, Sequence, Mapping, type(None))


def _plain(name: str, value: Any) -> Any:
    """A setting as a file of settings could hold it: paths by their names.

    Raises:
        UserError: it is an object that no file of settings could name, such as a data set in memory.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "score") or callable(value):
        raise UserError(
            f"{name} was given a {type(value).__name__}. Settings are names, numbers and paths; a judge of your own is given as "
            "judge=, to training, and to pipelines.evaluation.evaluate for comparisons."
        )
    if not isinstance(value, _PLAIN):
        raise UserError(
            f"{name} was given a {type(value).__name__}. A run is to be repeated from its settings, so they are names, numbers "
            "and paths: save data first (dataset.to_parquet(FILE)) and give the file."
        )
    return value


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set ``tree["a"]["b"] = value`` for the path ``a.b``."""
    *parents, leaf = path.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = value


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers win, section by section."""
    out: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
            out[key] = merge(out[key], value) if both else value
    return out


def layered(objective: type, recipe: Mapping[str, Any], *said: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe, above it what the data imply, above that what was said, later layers winning."""
    explicit = merge(*said)
    return merge(recipe, schema_of(objective).implied(merge(recipe, explicit), objective), explicit)


def read_yaml(path: Path) -> dict[str, Any]:
    """A configuration file. Raises UserError if it is missing, broken, or not a mapping."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"There is no configuration file {path}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} should hold a mapping of settings; it holds {type(tree).__name__}.")
    return tree


# ----------------------------------------------------------------------------------------------------------- checking


def resolve(tree: Mapping[str, Any], objective: type, unknown_flags: list[str] = ()) -> Any:
    """Checked settings from a tree of plain values: the ``Settings`` of the objective's schema.

    Raises:
        UserError: every mistake at once, one line each, unknown names with the nearest known one.
    """
    from pydantic import ValidationError

    schema = schema_of(objective)
    known_flags = [flag_of(p) for p in _paths(objective)] + [flag_of(p.split(".")[-1]) for p in _paths(objective)]
    mistakes = [f"{flag}: unknown option{_nearest(flag, known_flags)}" for flag in unknown_flags if flag.startswith("-")]
    if stray := left_over(unknown_flags):
        mistakes.append(told_left_over(stray))
    tree = merge(schema.implied(tree, objective), tree)
    try:
        checked = _schema(objective).model_validate(tree)
    except ValidationError as error:
        mistakes = [_explain(e, objective) for e in error.errors()] + mistakes
    mistakes += schema.missing(tree, objective.about)
    if not mistakes and not 0 <= checked.seed < 2**32:
        mistakes.append(f"seed: should be from 0 to 2**32 - 1, as all generators take it (found {checked.seed})")
    whole: dict[str, Any] = {}
    if not mistakes:
        whole = {name: getattr(checked, name) for name in schema.top_level}
        built, mistakes = _built(checked, objective)
        whole |= built
        mistakes = mistakes or schema.contradictions(whole)
    if mistakes:
        head = "A mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise UserError(f"{head} in the configuration:\n" + "\n".join(f"  {m}" for m in mistakes))
    return schema.Settings(**whole)


def _built(checked: Any, objective: type) -> tuple[dict[str, Any], list[str]]:
    """The sections, each as the core's own dataclass, and what they refuse."""
    built, mistakes = {}, []
    for name, settings in sections(objective).items():
        try:
            built[name] = settings(**dict(getattr(checked, name)))
        except ValueError as error:
            mistakes.append(f"{name}: {error}")
    return built, mistakes


@functools.cache
def _schema(objective: type) -> Any:
    from pydantic import BeforeValidator, ConfigDict, Field, create_model

    strict = ConfigDict(extra="forbid", frozen=True)
    fields: dict[str, Any] = {}
    for name, settings in sections(objective).items():
        model = create_model(settings.__name__, __config__=strict, **_fields(settings))
        fields[name] = (model, Field(default_factory=model))
    whole, top_level = schema_of(objective).Settings, schema_of(objective).top_level
    hints = get_type_hints(whole)
    defaults = {f.name: f.default for f in dataclasses.fields(whole) if f.default is not dataclasses.MISSING}
    for name in top_level:
        annotated = typing.Annotated[hints[name], BeforeValidator(_reader(hints[name]))]
        fields[name] = (annotated, Field(default=defaults.get(name, ...)))
    return create_model("Configuration", __config__=strict, **fields)


def _fields(settings: type) -> dict[str, Any]:
    from pydantic import BeforeValidator, Field

    hints, out = get_type_hints(settings), {}
    for field in dataclasses.fields(settings):
        hint = hints[field.name]
        if field.default is None:
            hint = hint | None
        annotated = typing.Annotated[hint, BeforeValidator(_reader(hint))]
        out[field.name] = (annotated, Field(default=field.default, **field.metadata.get("bounds", {})))
    return out


def _reader(hint: Any) -> Any:
    """A validator that reads command line text as the hint's type: lists by commas, mappings by ``a=b``, ``none`` for None or an
    empty list. YAML reads a plain ``no`` as False; where it is a choice it is taken as written."""
    kind, optional = _kind(hint)
    choices = typing.get_args(hint) if kind is typing.Literal else ()

    def read(value: Any) -> Any:
        if isinstance(value, bool) and "no" in choices:
            return "yes" if value else "no"
        if not isinstance(value, str):
            return value
        if value.startswith("~"):
            value = os.path.expanduser(value)
        if optional and value.lower() == "none":
            return None
        parts = [p.strip() for p in value.split(",") if p.strip()]
        if kind is tuple:
            return [] if value.lower() == "none" else parts
        if kind is dict and all("=" in p for p in parts):
            return dict(p.split("=", 1) for p in parts)
        return value

    return read


def _kind(hint: Any) -> tuple[Any, bool]:
    """What a hint is an instance of (``tuple`` of ``tuple[str, ...] | None``), and whether None is allowed."""
    optional = type(None) in typing.get_args(hint)
    inner = next((a for a in typing.get_args(hint) if a is not type(None)), hint) if optional else hint
    return typing.get_origin(inner), optional


def _explain(error: Mapping[str, Any], objective: type) -> str:
    path = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown setting{_nearest(path, [*sections(objective), *_paths(objective)])}"
    if error["type"] == "missing":
        return f"{path}: needed but not given ({schema_of(objective).top_level.get(path, 'set it')}; --{path.replace('_', '-')})"
    if (section := sections(objective).get(path)) and not isinstance(error["input"], Mapping):
        names = ", ".join(field.name for field in dataclasses.fields(section))
        return f"{path}: is a section, with a line for each setting below it ({names}); found {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{path}: {message[:1].lower()}{message[1:]} (found {error['input']!r})"


OF_OTHERS = {
    **{"lr": "learning_rate", "batch": "batch_size", "train_batch_size": "batch_size", "bs": "batch_size"},
    **{"epochs": "steps", "num_epochs": "steps", "num_train_epochs": "steps", "max_steps": "steps", "max_train_steps": "steps"},
    **{"grad_accum": "accumulation", "gradient_accumulation_steps": "accumulation", "precision": "mixed_precision"},
    **{"data": "pairs", "dataset": "pairs", "out": "output", "output_dir": "output", "size": "resolution"},
    **{"pretrained_model_name_or_path": "model", "base": "model", "lr_scheduler": "schedule", "report_to": "tracker"},
}
"""Names that other programs give to settings, spelled too differently for ``difflib`` to find ours."""
ALIKE = 0.75
"""Least similarity (``difflib``) at which an unknown name counts as a misspelling of a known one."""


_LENGTH = "how long a run is, --steps says: epochs x rows to train on / (--batch-size x --accumulation x processes)"
ELSEWHERE = {
    "epochs": ("steps", _LENGTH),
    "num-epochs": ("steps", _LENGTH),
    "num-train-epochs": ("steps", _LENGTH),
    "label-smoothing": ("loss-options", "labels that may be wrong are --loss cdpo --loss-options noise=0.1"),
}
"""Settings of other trainers that have no counterpart of one name: the setting that replaces each, and advice how."""


def _elsewhere(name: str, known: list[str]) -> str:
    """Advice for another trainer's setting; empty where these settings have no counterpart."""
    needed, advice = ELSEWHERE.get(name.lstrip("-").split("=")[0].split(".")[-1].replace("_", "-"), ("", ""))
    return advice if needed in {k.lstrip("-").split(".")[-1].replace("_", "-") for k in known} else ""


def _nearest(name: str, known: list[str]) -> str:
    if advice := _elsewhere(name, known):
        return f"; {advice}"
    whole = {k.lstrip("-"): k for k in known}  # the dashes would make all options alike
    if usual := [k for k in known if _leaf(k) == OF_OTHERS.get(_leaf(name))]:
        return f"; did you mean {min(usual, key=len)}?"
    leaves = {k.split(".")[-1]: k for k in reversed(whole)}
    near = difflib.get_close_matches(name.lstrip("-"), whole, n=1, cutoff=ALIKE)
    near = near or [leaves[leaf] for leaf in difflib.get_close_matches(name.split(".")[-1], leaves, n=1, cutoff=ALIKE)]
    where = "--help" if name.startswith("-") else "the command's --help"
    return f"; did you mean {whole[near[0]]}?" if near else f", and none is called alike; {where} lists all there are"


def _leaf(name: str) -> str:
    """The last word of an option or a path, as a setting is called."""
    return name.split(".")[-1].partition("=")[0].lstrip("-").replace("-", "_").lower()


def as_tree(settings: Any) -> dict[str, Any]:
    """The resolved configuration as plain values, ready for YAML or JSON and for ``resolve``."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Path):
            return str(value)
        return list(value) if isinstance(value, tuple) else value

    top_level = schema_of(type(settings.objective)).top_level
    others = [f.name for f in dataclasses.fields(settings) if f.name not in top_level]
    return {name: plain(getattr(settings, name)) for name in [*top_level, *others]}
