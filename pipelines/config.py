"""Configuration: from a recipe, a YAML file and the command line to checked settings.

The sections are the core's own settings dataclasses, so a default, a bound or a help text stands in one place. Pydantic
checks everything before anything is loaded; all mistakes come in one message, unknown names with the nearest known one.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

from diffalign.errors import UserError
from diffalign.objectives._about import FROZEN_START, PROMPTS, About
from diffalign.settings import check_options, option


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """The low-rank adapter (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = option(16, "rank of the adapter", ge=1)
    alpha: float = option(16.0, "the adapter's scale is alpha / rank", gt=0)
    targets: tuple[str, ...] = option(("to_q", "to_k", "to_v", "to_out.0"), "modules that get an adapter (ends of their names)")
    dropout: float = option(0.0, "dropout in the adapter", ge=0, lt=1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Which pairs, and what is done to them before the network sees them."""

    resolution: int | None = option(None, "pixels per side; by default the model's own", ge=8)
    crop: Literal["center", "random"] = option("center", "one crop for both pictures of a pair")
    flip: bool = option(False, "mirror half of the visits, both pictures together")
    ties: Literal["keep", "drop"] = option("drop", "keep ties with label 1/2, or drop them")
    split: str = option("train", "split of the data set")
    columns: dict[str, str] = option(None, "other column names, as ours=theirs")  # type: ignore[assignment]
    scores: str | None = option(None, "the judge whose scores the pairs carry, as `diffalign relabel` called it")
    max_unreadable: float = option(0.01, "share of unreadable rows that is skipped before the run is refused", ge=0, le=1)
    prompt_dropout: float = option(0.2, "share of the prompts replaced by the empty one", ge=0, le=1)
    latents: Literal["sample", "mode"] = option("sample", "draw from the autoencoder's posterior, or take its mean")
    validation_pairs: int = option(64, "pairs kept out of training for validation", ge=0)
    validation_draws: int = option(4, "fixed (t, noise) draws per validation pair", ge=1)
    curriculum: Literal["none", "margin"] = option("none", "margin: pairs that the judge tells apart most clearly come first")
    curriculum_stages: int = option(5, "stages of a curriculum, of equally many pairs and steps", ge=1)
    curriculum_cumulative: bool = option(True, "stages keep the pairs of the earlier ones (Curriculum-DPO), or not (Curry-DPO)")
    cache: Path | None = option(None, "folder for the encoded pairs; by default inside the output")
    encode_batch: int = option(8, "pictures encoded at a time", ge=1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class BatchSettings:
    """How many pairs at a time."""

    batch_size: int = option(1, "pairs per process and micro-step", ge=1)
    accumulation: int = option(1, "micro-steps per optimizer step", ge=1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """Judges in training: of what the policy samples (on-line objectives), or of the data's pairs (SmPO, MADPO, ADPO)."""

    reward: tuple[str, ...] = option((), "judges by name, or LABEL=NAME; one for the data's pairs")
    reward_options: tuple[str, ...] = option((), "what they are loaded with: pickscore.weights=PATH,pickscore.dtype=bfloat16")
    rollout_batch: int = option(16, "pictures sampled, decoded and judged at a time in training", ge=1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class ComputeSettings:
    """How the arithmetic is done."""

    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "precision of the network; errors stay float32")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, a third more time")
    attention: Literal["sdpa", "xformers"] = option("sdpa", "attention kernels")
    channels_last: bool = option(False, "channels-last memory format for the UNet (helps on GPUs)")
    tracker: str = option("tensorboard", "where metrics go, by Accelerate's name for it; none for the JSONL only")

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """The comparison with the base after training."""

    prompts: str | None = option(None, "held-out prompts: a file or a set by name; none for no evaluation")
    prompt_count: int = option(200, "how many of them", ge=1)
    judges: tuple[str, ...] = option((), "judges by name, or LABEL=NAME")
    judge_options: tuple[str, ...] = option((), "what judges are loaded with: pickscore.weights=PATH,pickscore.dtype=bfloat16")
    sampling_steps: int = option(25, "DDIM steps", ge=1)
    guidance_scale: float = option(7.5, "classifier-free guidance", ge=0)
    sampling_batch: int = option(8, "pictures sampled at a time", ge=1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """A whole run. ``objective`` holds the settings of the objective named on the command line."""

    model: str
    output: Path
    objective: Any
    lora: LoraSettings
    data: DataSettings
    reward: RewardSettings
    batch: BatchSettings
    optimiser: Any  # diffalign.optimisation.OptimiserSettings
    loop: Any  # diffalign.train.LoopSettings
    compute: ComputeSettings
    evaluation: EvaluationSettings
    pairs: str | None = None
    train_prompts: str | None = None
    feedback: Path | None = None
    start_lora: Path | None = None
    single_file_config: str | None = None
    adapter: Literal["lora", "full"] = "lora"
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self)


TOP_LEVEL = {
    "model": "a Diffusers folder, a hub id, a single .safetensors file, or tiny",
    "single_file_config": "a Diffusers folder with configuration and tokenizer, for a single-file model without the hub",
    "pairs": "preference pairs, or pictures with prompts: a file, a folder, a hub id, or tiny",
    "train_prompts": "prompts to sample for, of on-line objectives: a file, a set by name, or tiny",
    "feedback": "a folder that `diffalign rollout` wrote, with people's choices in it (d3po)",
    "start_lora": "a LoRA that diffalign trained, to go on from; the frozen start stays the base model",
    "output": "folder of the run",
    "adapter": "train a LoRA or the whole network",
    "prediction_type": "what the network predicts; auto reads it from the model",
    "seed": "seed of everything",
}


def sections(objective: type) -> dict[str, type]:
    """The sections of a configuration for one objective, in the order they are shown."""
    from diffalign.optimisation import OptimiserSettings
    from diffalign.train import LoopSettings

    return {
        "objective": objective,
        "lora": LoraSettings,
        "data": DataSettings,
        "reward": RewardSettings,
        "batch": BatchSettings,
        "optimiser": OptimiserSettings,
        "loop": LoopSettings,
        "compute": ComputeSettings,
        "evaluation": EvaluationSettings,
    }


# ------------------------------------------------------------------------------------------------------- command line


def add_options(parser: argparse.ArgumentParser, objective: type) -> None:
    """One ``--option`` per setting. Values stay text; pydantic reads them together with the YAML's."""
    top = parser.add_argument_group("run")
    for name, text in TOP_LEVEL.items():
        top.add_argument(_flag(name), dest=name, metavar=name.upper(), default=None, help=text)
    for section, settings in sections(objective).items():
        group = parser.add_argument_group(section, (settings.__doc__ or "").strip().splitlines()[0])
        for field in dataclasses.fields(settings):
            default = "none" if field.default is None else field.default
            group.add_argument(
                _flag(field.name),
                _flag(f"{section}.{field.name}"),
                dest=f"{section}.{field.name}",
                nargs="?",
                const="true",
                default=None,
                metavar="VALUE",
                help=f"{field.metadata.get('help', '')} (default: {default})".replace("%", "%%"),
            )


def _flag(name: str) -> str:
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
    yield from TOP_LEVEL
    for section, settings in sections(objective).items():
        yield from (f"{section}.{field.name}" for field in dataclasses.fields(settings))


def placed(options: Mapping[str, Any], objective: type) -> dict[str, Any]:
    """Options by their short names (``learning_rate=1e-4``) or dotted paths, nested as in the YAML; unknown names stay on top."""
    out: dict[str, Any] = {}
    short = {path.split(".")[-1]: path for path in _paths(objective)}
    for name, value in options.items():
        put(out, short.get(name, name), value)
    return out


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


def read_yaml(path: Path) -> dict[str, Any]:
    """A configuration file. Raises UserError if it is missing, broken, or not a mapping."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"There is no configuration file {path}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} should hold a mapping of settings; it holds {type(tree).__name__}.")
    return tree


# ----------------------------------------------------------------------------------------------------------- checking


def resolve(tree: Mapping[str, Any], objective: type, unknown_flags: list[str] = ()) -> TrainSettings:
    """Checked settings from a tree of plain values.

    Raises:
        UserError: every mistake at once, one line each, unknown names with the nearest known one.
    """
    from pydantic import ValidationError

    known_flags = [_flag(p) for p in _paths(objective)] + [_flag(p.split(".")[-1]) for p in _paths(objective)]
    mistakes = [f"{flag}: unknown option{_nearest(flag, known_flags)}" for flag in unknown_flags if flag.startswith("-")]
    tree = _with_feedback(tree, objective)
    try:
        checked = _schema(objective).model_validate(tree)
    except ValidationError as error:
        mistakes = [_explain(e, objective) for e in error.errors()] + mistakes
    mistakes += _missing(tree, objective.about)
    if tree.get("feedback") and not getattr(objective, "learns_from_people", False):
        mistakes.append("feedback: this objective does not learn from choices among rollouts; d3po does")
    if tree.get("start_lora") and tree.get("adapter") == "full":
        mistakes.append("start_lora: an adapter to go on from, and adapter is full; train a LoRA, or leave it out")
    built, contradictions = ({}, []) if mistakes else _built(checked, objective)
    if mistakes := mistakes + contradictions:
        head = "A mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise UserError(f"{head} in the configuration:\n" + "\n".join(f"  {m}" for m in mistakes))
    values = {name: getattr(checked, name) for name in TOP_LEVEL}
    return TrainSettings(**values, **built)


def _with_feedback(tree: Mapping[str, Any], objective: type) -> Mapping[str, Any]:
    """With how the trajectories to learn from were sampled, where nobody says otherwise."""
    if not tree.get("feedback") or not getattr(objective, "learns_from_people", False):
        return tree
    from pipelines.feedback import sampling_settings

    return merge({"objective": sampling_settings(tree["feedback"])}, tree)


def _missing(tree: Mapping[str, Any], about: About) -> list[str]:
    """What this objective learns from and was not given."""

    def needed(path: str, text: str) -> str:
        return f"{path}: needed but not given ({text}; {_flag(path.split('.')[-1])})"

    if PROMPTS not in about.data:
        return [] if tree.get("pairs") else [needed("pairs", TOP_LEVEL["pairs"])]
    if tree.get("feedback"):
        return []
    missing = [] if tree.get("train_prompts") or tree.get("pairs") else [needed("train_prompts", TOP_LEVEL["train_prompts"])]
    if about.judged == "needed" and not dict(tree.get("reward") or {}).get("reward"):
        missing.append(needed("reward.reward", "judges that reward what the policy samples"))
    return missing


def _built(checked: Any, objective: type) -> tuple[dict[str, Any], list[str]]:
    """The sections, each as the core's own dataclass, and what in them does not go together."""
    built, mistakes = {}, []
    for name, settings in sections(objective).items():
        try:
            built[name] = settings(**dict(getattr(checked, name)))
        except ValueError as error:
            mistakes.append(f"{name}: {error}")
    return built, mistakes or _contradictions(built["objective"], built["data"], built["loop"])


def _contradictions(objective: Any, data: DataSettings, loop: Any) -> list[str]:
    """Rounds of the loop and a curriculum, where the objective has no use for them."""
    samples, own = PROMPTS in objective.about.data, getattr(objective, "round_steps", 1)
    out = []
    if samples and data.curriculum != "none":
        out.append("data.curriculum: orders the pairs of a data set, and this objective samples its own")
    if loop.round_reference == "round" and objective.about.reference != FROZEN_START:
        found = objective.about.reference
        out.append(f"loop.round_reference: only a frozen start can be renewed; what this objective compares with is {found!r}")
    if samples and loop.extrapolation:
        out.append("loop.extrapolation: this objective learns from what its policy sampled; weights that jump are others")
    if loop.extrapolation and loop.round_every % own:
        out.append(f"loop.round_every: should be a multiple of the objective's own round_steps, {own} (found {loop.round_every})")
    return out


def _schema(objective: type) -> Any:
    from pydantic import ConfigDict, Field, create_model

    strict = ConfigDict(extra="forbid", frozen=True)
    fields: dict[str, Any] = {}
    for name, settings in sections(objective).items():
        model = create_model(settings.__name__, __config__=strict, **_fields(settings))
        fields[name] = (model, Field(default_factory=model))
    hints = get_type_hints(TrainSettings)
    defaults = {f.name: f.default for f in dataclasses.fields(TrainSettings) if f.default is not dataclasses.MISSING}
    for name in TOP_LEVEL:
        fields[name] = (hints[name], Field(default=defaults.get(name, ...)))
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
    """From the text of a command line to what the hint wants: lists by commas, mappings by ``a=b``, ``none`` for None."""
    optional = type(None) in typing.get_args(hint)
    inner = next((a for a in typing.get_args(hint) if a is not type(None)), hint) if optional else hint
    kind = typing.get_origin(inner)

    def read(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if optional and value.lower() == "none":
            return None
        parts = [p.strip() for p in value.split(",") if p.strip()]
        if kind is tuple:
            return parts
        if kind is dict and all("=" in p for p in parts):
            return dict(p.split("=", 1) for p in parts)
        return value

    return read


def _explain(error: Mapping[str, Any], objective: type) -> str:
    path = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown setting{_nearest(path, list(_paths(objective)))}"
    if error["type"] == "missing":
        return f"{path}: needed but not given ({TOP_LEVEL.get(path, 'set it')}; --{path.replace('_', '-')})"
    message = error["msg"].removeprefix("Value error, ")
    return f"{path}: {message[:1].lower()}{message[1:]} (found {error['input']!r})"


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or difflib.get_close_matches(
        name.split(".")[-1], [k.split(".")[-1] for k in known], n=1, cutoff=0.6
    )
    if not close:
        return ""
    return f"; did you mean {next(k for k in known if k == close[0] or k.split('.')[-1] == close[0])}?"


def as_tree(settings: TrainSettings) -> dict[str, Any]:
    """The resolved configuration as plain values, ready for YAML or JSON and for ``resolve``."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Path):
            return str(value)
        return list(value) if isinstance(value, tuple) else value

    return {name: plain(getattr(settings, name)) for name in [*TOP_LEVEL, *_section_names(settings)]}


def _section_names(settings: TrainSettings) -> list[str]:
    return [f.name for f in dataclasses.fields(settings) if f.name not in TOP_LEVEL]
