"""What a person may call a model, and how each kind is found and read.

``tiny`` and ``tiny-flow``, which ship; a Diffusers folder; a hub id ``org/name``; a single ``.safetensors`` or ``.ckpt`` file in
the original layout; a file of a transformer alone (``.safetensors``, or quantised ``.gguf``), the rest coming from a Diffusers
folder or the hub; or a folder that diffalign wrote (a whole pipeline, or a LoRA that remembers its base, and the LoRAs that it
was trained on top of). Those, and any that a run names as part of its base, are merged into the weights when the model is read.

The folder ``families`` is the registry. A family's file declares, as literals:

    PIPELINES       names of the Diffusers pipeline classes it serves; single files are read with the first
    SINGLE_FILE     types of single files it serves, in the words of Diffusers' ``infer_diffusers_model_type``
    NETWORK         the pipeline's attribute that is trained
    NETWORK_CLASS   its class in Diffusers, if that reads single files of it alone (may be missing)
    LEFT_OUT        arguments to ``from_pretrained`` that leave out what neither training nor sampling needs
    CALL            arguments to the pipeline's call that make it sample just what was asked for (may be missing)
    OPTIONAL        parts that a person may leave out, by a word for them (may be missing)
    NO_GUIDANCE     the guidance scale that is none to the pipeline, where that is not 1 (may be missing)
    TOLD_GUIDANCE   whether there is no guidance but what a network with ``guidance_embeds`` is told (may be missing)
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from diffalign.errors import UserError
from pipelines.families._marks import Marks, marks_of, obeyed
from pipelines.families._names import INDEX_FILE, LORA_FILE, NOTE_FILE
from pipelines.families._quiet import quietly
from pipelines.tiny.shipped import CHECKPOINTS

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_ENDINGS = (".safetensors", ".ckpt", ".gguf")
_NOT_THE_NETWORK = ("first_stage_model.", "vae.", "text_encoders.", "cond_stage_model.", "conditioner.")
"""How names of the other parts begin in single files."""
_NOT_FOR_TEXT = {
    "inpainting": "inpainting",
    "inpainting_v2": "inpainting",
    "xl_inpaint": "inpainting",
    "xl_refiner": "refining what SDXL's base model sampled",
    "instruct-pix2pix": "picture editing",
}


class HubUnreachable(UserError):
    """Something on the hub is not here, and the hub cannot be asked: it may be as it should be."""


@dataclass(frozen=True)
class Declared:
    """What a family's file says about itself."""

    PIPELINES: tuple[str, ...]
    SINGLE_FILE: tuple[str, ...]
    NETWORK: str
    LEFT_OUT: Mapping[str, Any]
    CALL: Mapping[str, Any] = field(default_factory=dict)
    OPTIONAL: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    NETWORK_CLASS: str = ""
    NO_GUIDANCE: float = 1.0
    TOLD_GUIDANCE: bool = False


@dataclass(frozen=True)
class BaseLora:
    """A LoRA that is part of what is called the base: merged into it before anything else happens."""

    path: str  # the file, absolute
    sha256: str  # of the file
    hub: str = ""  # org/name/FILE, if it came from there

    def note(self) -> dict[str, str]:
        """As it goes into a result's note."""
        return {name: value for name, value in vars(self).items() if value}

    def local(self) -> Path:
        """The file, fetched again where a copy of the hub's is gone. It need not be there, nor be the same."""
        return _from_hub(self.hub) if self.hub and not Path(self.path).is_file() else Path(self.path)


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from: enough to read it, or the rest of it, again."""

    model: str  # what to call it later, from any folder: "tiny", a hub id, or an absolute path
    place: str  # the folder, file or hub id that is read
    kind: Literal["folder", "file", "hub", "network"]  # the last: a file with the network alone
    family: str
    pipeline_class: str
    config: str | None = None  # a Diffusers folder with the configuration for a single file, and with what it does not hold
    rest: str | None = None  # of a network alone: the folder or hub id that has all else
    adapter: str | None = None  # a folder with a LoRA on top
    lacks: tuple[str, ...] = ()  # parts of the pipeline that the checkpoint does not have
    without: tuple[str, ...] = ()  # what it has and is left out, in the words of the family's ``OPTIONAL``
    base_loras: tuple[BaseLora, ...] = ()  # merged into the weights, in this order, below the one on top
    marks: Marks = Marks()  # what a single file says of itself, which counts for more than its configuration

    def leaving_out(self, words: Sequence[str]) -> Origin:
        """The same without the parts that the family knows by these ``words``, nor those that are left out already.

        Raises:
            UserError: the family knows no such part, or cannot do without.
        """
        known = registry()[self.family].OPTIONAL
        if odd := [word for word in words if word not in known]:
            may = f"what may be left out is {', '.join(known)}" if known else "nothing may be left out of it"
            raise UserError(f"{self.model} is of the family {self.family}, which cannot do without {odd[0]!r}: {may}.")
        return replace(self, without=tuple(dict.fromkeys((*self.without, *words))))

    @property
    def parts_left_out(self) -> tuple[str, ...]:
        """The attributes of the pipeline that ``without`` stands for."""
        known = registry()[self.family].OPTIONAL
        return tuple(part for word in self.without for part in known[word])

    @property
    def configured_at(self) -> str | None:
        """The Diffusers folder or hub id that has the configurations of all parts; None of a single file by itself."""
        return self.config or self.rest or (None if self.kind == "file" else self.place)

    @property
    def scheduler_file(self) -> str:
        """The file that says what the network predicts."""
        if self.marks.prediction_type:
            return self.place
        return str(Path(self.configured_at or self.place) / "scheduler" / "scheduler_config.json")

    @property
    def own_words(self) -> str:
        """A line on what a single file says of itself, against which its configuration has no say; empty if it says nothing."""
        if not self.marks.prediction_type:
            return ""
        end = ", on a schedule that ends in pure noise" if self.marks.ends_in_noise else ""
        said = f"{self.place} says itself that it is of {self.marks.prediction_type} prediction{end}"
        return f"{said}: so it is used, whatever its configuration says"


def registry() -> dict[str, Declared]:
    """Families by name, read from the files beside this one without importing them."""
    files = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("_"))
    return {path.stem: _declared(path) for path in files}


def call_options(pipeline_class: str) -> dict[str, Any]:
    """What a pipeline of this class must be told in its call, beside the prompt, to sample just what it is asked for."""
    return next((dict(d.CALL) for d in registry().values() if pipeline_class in d.PIPELINES), {})


@functools.cache
def _declared(path: Path) -> Declared:
    wanted = Declared.__dataclass_fields__
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in wanted:
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return Declared(**found)


def torch_dtype(name: str) -> torch.dtype:
    """``float32``, ``bfloat16`` or ``float16`` (or fp32, bf16, fp16) as a torch dtype."""
    import torch

    full = _SHORT_DTYPES.get(name, name)
    if full not in _SHORT_DTYPES.values():
        raise UserError(f"dtype {name!r} is not known. Known are float32, bfloat16 and float16.")
    return getattr(torch, full)


# -------------------------------------------------------------------------------------------------------------- finding


def find(
    model: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    base: str | None = None,
    base_lora: str | os.PathLike[str] | None = None,
) -> Origin:
    """Work out what ``model`` is, reading nothing big.

    Args:
        config: for a single file: a Diffusers folder of the same architecture, for configuration and tokenizer.
        base: for a LoRA folder: the base model, where it is not the one on record.
        base_lora: a LoRA to merge into the model (see ``find_loras``).

    Raises:
        UserError: there is no such thing, or it is nothing this program can use.
    """
    origin = _find(os.fspath(model), config, base)
    if base_lora is None:
        return origin
    if origin.adapter:
        raise UserError(
            f"{origin.adapter} is a LoRA on {origin.model} and brings what it was trained on top of; "
            f"a LoRA to merge goes with a whole model: name {origin.model} instead."
        )
    return replace(origin, base_loras=find_loras(base_lora))


def find_loras(where: str | os.PathLike[str]) -> tuple[BaseLora, ...]:
    """A LoRA in a .safetensors file or a folder with one; before it those that it was trained on top of, if it says so.

    Args:
        where: a path, or on the hub ``org/name`` or ``org/name/FILE``.

    Raises:
        UserError: there is none, or there are several.
    """
    path, hub = Path(where).expanduser(), ""
    if not path.exists() and not path.parent.exists() and _LORA_ON_HUB.fullmatch(os.fspath(where)):
        path, hub = _from_hub(os.fspath(where)), os.fspath(where)
    files = (
        [path] if path.is_file() else [path / LORA_FILE] if (path / LORA_FILE).is_file() else sorted(path.glob("*.safetensors"))
    )
    if len(files) != 1 or files[0].suffix != ".safetensors":
        names = ", ".join(file.name for file in files)
        found = f"{len(files)} .safetensors files {names}".rstrip() if path.is_dir() else "no such file or folder"
        raise UserError(f"There is no LoRA at {where}: {found}. Name a .safetensors file, or a folder with one.")
    file = files[0].absolute()
    hub = f"{hub}/{file.name}" if hub and not hub.endswith(file.name) else hub
    with open(file, "rb") as opened:
        found = BaseLora(str(file), hashlib.file_digest(opened, "sha256").hexdigest(), hub)
    return (*recorded_loras(file.parent), found) if file.name == LORA_FILE else (found,)


_LORA_ON_HUB = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(/(?P<file>.+\.safetensors))?")


def _from_hub(name: str) -> Path:
    """The local copy of a file on the hub, or of a repository's LoRA files.

    Raises:
        UserError: it cannot be had.
    """
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    asked = _LORA_ON_HUB.fullmatch(name)
    try:
        if asked["file"]:
            return Path(hf_hub_download(asked["repo"], asked["file"]))
        return Path(snapshot_download(asked["repo"], allow_patterns=["*.safetensors", NOTE_FILE]))
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, errors.HFValidationError, OSError) as error:
        raise UserError(
            f"There is no LoRA at {name} here, and the hub could not give one: {' '.join(str(error).split())[:300]} "
            "Name a .safetensors file, a folder with one, or org/name or org/name/FILE on the hub."
        ) from error


def recorded_loras(folder: Path) -> tuple[BaseLora, ...]:
    """The LoRAs that the result in ``folder`` was trained on top of."""
    return tuple(BaseLora(**lora) for lora in _note(folder).get("base_loras", ()))


def _note(folder: Path) -> dict[str, Any]:
    """What diffalign wrote beside a result; nothing, if it did not make it."""
    note = folder / NOTE_FILE
    return json.loads(note.read_text()) if note.is_file() else {}


def _find(name: str, config: str | os.PathLike[str] | None, base: str | None) -> Origin:
    if name in CHECKPOINTS:
        return _in_folder(CHECKPOINTS[name], called=name, base=None)
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(path, called=str(path.absolute()), base=base)
    if path.is_file():
        return _in_file(path, config)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".") and not path.parent.exists():
        return _on_hub(name)
    raise UserError(_missing(name, path))


def _missing(name: str, path: Path) -> str:
    if not path.parent.is_dir():
        return f"There is no model {name}: the folder {path.parent} does not exist, and it is no hub id (org/name) either."
    beside = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(path.name, beside, n=3) or beside[:5]
    there = f"{path.parent} holds {', '.join(near)}" if near else f"{path.parent} is empty"
    kinds = "a Diffusers folder, a .safetensors file, a hub id (org/name), 'tiny' or 'tiny-flow'"
    return f"There is no model {name}: {there}. A model is {kinds}."


def _in_folder(path: Path, *, called: str, base: str | None) -> Origin:
    if (path / INDEX_FILE).is_file():
        return _of_index(path / INDEX_FILE, called, str(path), "folder")
    if (path / LORA_FILE).is_file():
        return _adapter(path, base)
    if not path.is_dir():
        raise UserError(f"There is no model {called}: the folder {path} does not exist.")
    if (path / "checkpoints").is_dir():
        raise UserError(
            f"{path} holds a run that is not finished. `diffalign export {path} --checkpoint latest --out FOLDER` writes what it "
            "has learnt so far; the command it was started with goes on with --resume."
        )
    if path.parent.name == "checkpoints" and path.name.startswith("checkpoint-"):
        step = path.name.rpartition("-")[2].lstrip("0") or "0"
        raise UserError(
            f"{path} is a checkpoint. `diffalign export {path.parent.parent} --checkpoint {step} --out FOLDER` makes a LoRA or a "
            "model of it."
        )
    holds = ", ".join(sorted(entry.name for entry in path.iterdir())[:12]) or "nothing"
    raise UserError(
        f"{path} is not a model: it has neither a {INDEX_FILE} (a Diffusers pipeline) nor a {LORA_FILE} (a LoRA). "
        f"It holds: {holds}."
    )


def _of_index(index: Path, called: str, place: str, kind: Literal["folder", "hub"]) -> Origin:
    content = _index(index)
    name = content["_class_name"]
    family = family_of(name, index if kind == "folder" else f"{place}/{INDEX_FILE}")
    lacks = tuple(part for part, what in content.items() if what == [None, None])
    return Origin(called, place, kind, family, name, lacks=lacks)


def _index(index: Path) -> dict[str, Any]:
    try:
        content = json.loads(index.read_text())
    except ValueError as error:
        raise UserError(f"{index} is not valid JSON ({error}). It should be what save_pretrained of Diffusers writes.") from error
    if not isinstance(content, dict) or not isinstance(content.get("_class_name"), str):
        raise UserError(f"{index} has no field _class_name, the name of the pipeline's class (StableDiffusionPipeline, say).")
    return content


def family_of(pipeline_class: str, where: Path | str) -> str:
    families = registry()
    for name, declared in families.items():
        if pipeline_class in declared.PIPELINES:
            return name
    known = ", ".join(c for declared in families.values() for c in declared.PIPELINES)
    raise UserError(f"{where} says that this is a {pipeline_class}, which diffalign does not know. Known are: {known}.")


def _adapter(path: Path, base: str | None) -> Origin:
    record = _note(path)
    name = base or record.get("base_model")
    if not name:
        raise UserError(
            f"{path} holds a LoRA, but nothing says which model it belongs to "
            f"({NOTE_FILE} with base_model is missing): name its base."
        )
    try:
        found = find(name, config=record.get("config"))
    except UserError as error:
        raise UserError(f"{path} is a LoRA on the base model {name}, which cannot be used. {error}") from error
    if found.adapter:
        raise UserError(f"{path} is a LoRA on {name}, which is itself a LoRA; its base must be a whole model.")
    whole = replace(found, adapter=str(path), base_loras=recorded_loras(path))
    return whole.leaving_out(record.get("without", ()))


def _in_file(path: Path, config: str | os.PathLike[str] | None) -> Origin:
    if path.suffix not in _ENDINGS:
        ending = path.suffix or "nothing"
        raise UserError(f"{path} is a file that ends in {ending}; a model in one file ends in {', '.join(_ENDINGS)}.")
    if config is not None and not (Path(config) / INDEX_FILE).is_file():
        raise UserError(f"The configuration for {path} should be a Diffusers folder, but {config} has no {INDEX_FILE}.")
    shapes = _shapes(path)
    kind = _single_file_type(path, shapes)
    for name, declared in registry().items():
        if kind in declared.SINGLE_FILE:
            folder = None if config is None else str(Path(config).absolute())
            marks = marks_of(shapes, _header(path)) if declared.NETWORK == "unet" else Marks()  # others predict one thing
            whole = Origin(str(path.absolute()), str(path), "file", name, declared.PIPELINES[0], folder, marks=marks)
            is_alone = declared.NETWORK_CLASS and not any(key.startswith(_NOT_THE_NETWORK) for key in shapes)
            if config is not None:
                _refuse_another_family(whole)
            return _completed(whole, kind) if is_alone else whole
    purpose = f"is a model for {_NOT_FOR_TEXT[kind]}" if kind in _NOT_FOR_TEXT else f"looks like a model of the type {kind}"
    known = ", ".join(t for declared in registry().values() for t in declared.SINGLE_FILE)
    raise UserError(f"{path} {purpose}, which diffalign does not know. Known types of single files are: {known}.")


def _refuse_another_family(file: Origin) -> None:
    found = family_of(_index(Path(file.config) / INDEX_FILE)["_class_name"], file.config)
    if found != file.family:
        raise UserError(
            f"{file.place} is of the family {file.family}, but {file.config} is of {found}. Files are known by their tensors: "
            "name a Diffusers folder of the same architecture, or take the model as a folder."
        )


def _completed(network: Origin, kind: str) -> Origin:
    """A file with the network alone, and where the rest of the pipeline is."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS

    if network.config is None:
        rest = DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
        return replace(network, kind="network", rest=rest)
    found = _of_index(Path(network.config) / INDEX_FILE, network.config, network.config, "folder")
    return replace(network, kind="network", rest=network.config, lacks=found.lacks)


def _single_file_type(path: Path, shapes: Mapping[str, torch.Tensor]) -> str:
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    kind = infer_diffusers_model_type(shapes)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    if kind == "v1" and first not in shapes:  # v1 is also what Diffusers says when at a loss
        some = ", ".join(list(shapes)[:3]) or "nothing"
        raise UserError(
            f"{path} is not a whole model in the original layout: it has no {first}. "
            f"It holds {some} ... A part of a Diffusers folder, or a LoRA, cannot be loaded by itself."
        )
    return kind


def _shapes(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, without their values where that can be helped."""
    import torch

    if path.suffix == ".gguf":
        return _gguf_shapes(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in sorted(file.keys())}
        content = torch.load(path, map_location="meta", weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it is a pickle that contains more than tensors, so that loading it could run foreign code. "
            "Convert it to .safetensors with a tool you trust, or take a .safetensors file of the same model."
        ) from error
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read as a {path.suffix} file: {error}. It may be incomplete; compare its size with the original."
        ) from error
    content = content.get("state_dict", content)
    return {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}


def _header(path: Path) -> dict[str, str]:
    """What a file says beside its tensors; only .safetensors files can."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _gguf_shapes(path: Path) -> dict[str, torch.Tensor]:
    import torch

    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{path} is a GGUF file, which needs the package gguf: pip install 'diffalign[gguf]'.")
    from gguf import GGUFReader

    try:
        found = GGUFReader(path).tensors
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path} cannot be read as a GGUF file: {error}. It may be incomplete.") from error
    return {one.name: torch.empty([int(n) for n in reversed(one.shape)], device="meta") for one in found}


def _on_hub(name: str) -> Origin:
    from huggingface_hub import errors, hf_hub_download

    local = "A local folder in the Diffusers layout, or a .safetensors file, works without the hub."
    try:
        index = Path(hf_hub_download(name, INDEX_FILE))
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise HubUnreachable(
            f"There is no folder {name} here, and the model {name} is neither in the local hub cache "
            f"nor could the hub be reached. {local}"
        ) from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"The model {name} asks for an agreement: accept it on its page on the hub and log in. {local}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"There is no folder {name} here and no model {name} on the hub (or it is private and you are not logged in)."
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"The model {name} on the hub has no {INDEX_FILE}: it is not a Diffusers pipeline.") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise UserError(f"The hub could not give the model {name}: {error}. {local}") from error
    return _of_index(index, name, name, "hub")


# -------------------------------------------------------------------------------------------------------------- reading


def read(
    origin: Origin,
    *,
    dtype: torch.dtype,
    others: torch.dtype,
    text: torch.dtype | None = None,
    whole: bool = False,
    quantise: tuple[str, torch.device] | None = None,
    **components: Any,
) -> DiffusionPipeline:
    """Load the pipeline, in evaluation mode, on the CPU, with the LoRAs of its base merged into the weights.

    Args:
        dtype: of the network; ``text`` is that of text encoders, and ``others`` of everything else, or of them as well.
        whole: with the parts that neither training nor sampling needs (the safety checker, say), and those left out by choice.
        quantise: how (see ``_quantised``) and where the network's layers are quantised, before an adapter is put on.
        components: parts to use instead of those on disk, by name, as they are.

    Raises:
        UserError: a part is missing, incomplete or unreadable.
    """
    import torch

    from pipelines.families import _lora, _quantised

    declared = registry()[origin.family]
    left_out = {} if whole else {**declared.LEFT_OUT, **dict.fromkeys(origin.parts_left_out)}
    options = {**dict.fromkeys(origin.lacks), **left_out, **components}
    try:
        with quietly() as notes:
            pipe = _load(origin, options, {declared.NETWORK: dtype, **dict.fromkeys(_TEXT, text or others), "default": others})
            if origin.base_loras:
                from pipelines.families import _loras  # which reads models itself

                _loras.merge_into(pipe, origin.base_loras, frozenset(components))
            if quantise:
                _quantised.quantise(getattr(pipe, declared.NETWORK), *quantise)
            if origin.adapter:
                _lora.put_on(pipe, declared.NETWORK, origin.adapter)
    except torch.OutOfMemoryError:
        raise
    except _UNREADABLE as error:
        raise UserError(_unreadable(origin, error)) from error
    except Exception as error:
        if type(error).__name__ != "SingleFileComponentError":  # a plain Exception of Diffusers', named in a private module
            raise
        raise UserError(
            f"{origin.place} lacks a part of a {origin.pipeline_class}: {' '.join(str(error).split())[:300]} "
            "Take the model as a Diffusers folder, or a file with all parts."
        ) from error
    _refuse_invented_weights(origin, notes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


_UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError, UnpicklingError)


_TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Whatever a family's text encoders are, pipelines call them so."""


def _load(origin: Origin, options: dict[str, Any], dtypes: dict[str, torch.dtype]) -> DiffusionPipeline:
    import diffusers

    cls = getattr(diffusers, origin.pipeline_class)
    if origin.kind == "network":
        network, dtype = next(iter(dtypes.items()))
        alone = {network: options[network] if network in options else _load_network(origin, network, dtype)}
        return cls.from_pretrained(origin.rest, dtype=dtypes, **{**options, **alone})
    if origin.kind != "file":
        variant = "fp16" if origin.kind == "folder" and _has_only_halves(Path(origin.place), next(iter(dtypes))) else None
        return cls.from_pretrained(origin.place, dtype=dtypes, variant=variant, **options)
    place = {} if origin.config is None else {"config": origin.config, "local_files_only": True}
    pipe = cls.from_single_file(origin.place, dtype=dtypes["default"], **place, **options)
    for name, dtype in dtypes.items():
        if name not in options and getattr(pipe, name, None) is not None:
            getattr(pipe, name).to(dtype)
    pipe.scheduler = obeyed(pipe.scheduler, origin.marks)
    return pipe


def _load_network(origin: Origin, name: str, dtype: torch.dtype) -> torch.nn.Module:
    """The network of a file that holds nothing else; what is quantised in it stays so, and works in ``dtype``."""
    import diffusers

    place = {} if origin.config is None else {"config": origin.config, "subfolder": name, "local_files_only": True}
    if origin.place.endswith(".gguf"):
        place["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
    return getattr(diffusers, registry()[origin.family].NETWORK_CLASS).from_single_file(origin.place, dtype=dtype, **place).eval()


def _has_only_halves(folder: Path, network: str) -> bool:
    """Whether the folder has only files named ``*.fp16.*``, as some downloads do."""
    names = [p.name for ending in ("safetensors", "bin") for p in (folder / network).glob(f"*.{ending}")]
    return bool(names) and all(".fp16" in name for name in names)


def _unreadable(origin: Origin, error: Exception) -> str:
    reason = " ".join(str(error).split())[:400]
    if origin.kind in ("file", "network") and origin.config is None:
        return (
            f"{origin.place} could not be loaded: {reason}. A single file carries no configuration and no tokenizer; "
            "they come from the hub, or, without it, from a Diffusers folder of the same architecture given as config."
        )
    what = f"the LoRA {origin.adapter} on {origin.place}" if origin.adapter else origin.place
    return f"{what} could not be loaded as a {origin.pipeline_class}: {reason or type(error).__name__}."


def _refuse_invented_weights(origin: Origin, notes: list[str]) -> None:
    """The loaders fill gaps with random numbers and only log it; a model with such gaps is broken."""
    for note in notes:
        if "newly initialized" in note:
            plain = re.sub(r"\x1b\[[0-9;]*m", "", note)
            in_table = re.findall(r"^(\S.*?)\s*\|\s*(?:MISSING|MISMATCH)", plain, re.MULTILINE)
            names = in_table or re.findall(r"'([\w.]+)'", plain)
            some = ", ".join(names[:3]) or plain[:200]
            raise UserError(
                f"{origin.place} is incomplete: its files lack weights that its configuration asks for, for example {some}."
            )
