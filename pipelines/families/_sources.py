"""What a person may call a model, and how each kind is found and read.

``tiny``; a Diffusers folder; a hub id ``org/name``; a single ``.safetensors`` or ``.ckpt`` file in the original layout;
or a folder that diffalign wrote (a whole pipeline, or a LoRA that remembers its base, and the LoRAs that it was trained on
top of). Those, and any that a run names as part of its base, are merged into the weights when the model is read.

The folder ``families`` is the registry. A family's file declares, as literals:

    PIPELINES       names of the Diffusers pipeline classes it serves; single files are read with the first
    SINGLE_FILE     types of single files it serves, in the words of Diffusers' ``infer_diffusers_model_type``
    NETWORK         the pipeline's attribute that is trained
    LEFT_OUT        arguments to ``from_pretrained`` that leave out what neither training nor sampling needs
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal

from diffalign.errors import UserError
from pipelines.families._quiet import quietly

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

LORA_FILE = "pytorch_lora_weights.safetensors"
NOTE_FILE = "diffalign.json"
INDEX_FILE = "model_index.json"
METADATA = "lora_adapter_metadata"
"""Where Diffusers keeps PEFT's configuration in the header of a LoRA's file."""
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_NOT_FOR_TEXT = {
    "inpainting": "inpainting",
    "inpainting_v2": "inpainting",
    "xl_inpaint": "inpainting",
    "instruct-pix2pix": "picture editing",
}


@dataclass(frozen=True)
class Declared:
    """What a family's file says about itself."""

    PIPELINES: tuple[str, ...]
    SINGLE_FILE: tuple[str, ...]
    NETWORK: str
    LEFT_OUT: Mapping[str, Any]


@dataclass(frozen=True)
class BaseLora:
    """A LoRA that is part of what is called the base: merged into it before anything else happens."""

    path: str  # the file, absolute
    sha256: str  # of the file


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from: enough to read it, or the rest of it, again."""

    model: str  # what to call it later, from any folder: "tiny", a hub id, or an absolute path
    place: str  # the folder, file or hub id that is read
    kind: Literal["folder", "file", "hub"]
    family: str
    pipeline_class: str
    config: str | None = None  # a Diffusers folder with the configuration for a single file
    adapter: str | None = None  # a folder with a LoRA on top
    base_loras: tuple[BaseLora, ...] = ()  # merged into the weights, in this order, below the one on top

    @property
    def scheduler_file(self) -> str:
        """The file that says what the network predicts."""
        return str(Path(self.config or self.place) / "scheduler" / "scheduler_config.json")


def registry() -> dict[str, Declared]:
    """Families by name, read from the files beside this one without importing them."""
    files = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("_"))
    return {path.stem: _declared(path) for path in files}


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

    Raises:
        UserError: there is none, or there are several.
    """
    path = Path(where).expanduser()
    files = (
        [path] if path.is_file() else [path / LORA_FILE] if (path / LORA_FILE).is_file() else sorted(path.glob("*.safetensors"))
    )
    if len(files) != 1 or files[0].suffix != ".safetensors":
        found = f"{len(files)} .safetensors files" if path.is_dir() else "no such file or folder"
        raise UserError(f"There is no LoRA at {where}: {found}. Name a .safetensors file, or a folder with one.")
    file = files[0].absolute()
    with open(file, "rb") as opened:
        found = BaseLora(str(file), hashlib.file_digest(opened, "sha256").hexdigest())
    return (*recorded_loras(file.parent), found) if file.name == LORA_FILE else (found,)


def recorded_loras(folder: Path) -> tuple[BaseLora, ...]:
    """The LoRAs that the result in ``folder`` was trained on top of."""
    note = folder / NOTE_FILE
    record = json.loads(note.read_text()) if note.is_file() else {}
    return tuple(BaseLora(**lora) for lora in record.get("base_loras", ()))


def _find(name: str, config: str | os.PathLike[str] | None, base: str | None) -> Origin:
    if name == "tiny":
        from pipelines.tiny.model import checkpoint_path

        return _in_folder(checkpoint_path(), called="tiny", base=None)
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
    kinds = "a Diffusers folder, a .safetensors file, a hub id (org/name) or 'tiny'"
    return f"There is no model {name}: {there}. A model is {kinds}."


def _in_folder(path: Path, *, called: str, base: str | None) -> Origin:
    if (path / INDEX_FILE).is_file():
        pipeline_class = _class_name(path / INDEX_FILE)
        return Origin(called, str(path), "folder", _family_of(pipeline_class, path / INDEX_FILE), pipeline_class)
    if (path / LORA_FILE).is_file():
        return _adapter(path, base)
    if not path.is_dir():
        raise UserError(f"There is no model {called}: the folder {path} does not exist.")
    holds = ", ".join(sorted(entry.name for entry in path.iterdir())[:12]) or "nothing"
    raise UserError(
        f"{path} is not a model: it has neither a {INDEX_FILE} (a Diffusers pipeline) nor a {LORA_FILE} (a LoRA). "
        f"It holds: {holds}."
    )


def _class_name(index: Path) -> str:
    try:
        content = json.loads(index.read_text())
    except ValueError as error:
        raise UserError(f"{index} is not valid JSON ({error}). It should be what save_pretrained of Diffusers writes.") from error
    if not isinstance(content, dict) or not isinstance(content.get("_class_name"), str):
        raise UserError(f"{index} has no field _class_name, the name of the pipeline's class (StableDiffusionPipeline, say).")
    return content["_class_name"]


def _family_of(pipeline_class: str, where: Path | str) -> str:
    families = registry()
    for name, declared in families.items():
        if pipeline_class in declared.PIPELINES:
            return name
    known = ", ".join(c for declared in families.values() for c in declared.PIPELINES)
    raise UserError(f"{where} says that this is a {pipeline_class}, which diffalign does not know. Known are: {known}.")


def _adapter(path: Path, base: str | None) -> Origin:
    note = path / NOTE_FILE
    record = json.loads(note.read_text()) if note.is_file() else {}
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
    return replace(found, adapter=str(path), base_loras=recorded_loras(path))


def _in_file(path: Path, config: str | os.PathLike[str] | None) -> Origin:
    if path.suffix not in (".safetensors", ".ckpt"):
        ending = path.suffix or "nothing"
        raise UserError(f"{path} is a file that ends in {ending}; a model in one file ends in .safetensors or .ckpt.")
    if config is not None and not (Path(config) / INDEX_FILE).is_file():
        raise UserError(f"The configuration for {path} should be a Diffusers folder, but {config} has no {INDEX_FILE}.")
    kind = _single_file_type(path)
    for name, declared in registry().items():
        if kind in declared.SINGLE_FILE:
            folder = None if config is None else str(Path(config).absolute())
            return Origin(str(path.absolute()), str(path), "file", name, declared.PIPELINES[0], folder)
    purpose = f"is a model for {_NOT_FOR_TEXT[kind]}" if kind in _NOT_FOR_TEXT else f"looks like a model of the type {kind}"
    known = ", ".join(t for declared in registry().values() for t in declared.SINGLE_FILE)
    raise UserError(f"{path} {purpose}, which diffalign does not know. Known types of single files are: {known}.")


def _single_file_type(path: Path) -> str:
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    shapes = _shapes(path)
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
    from safetensors import SafetensorError, safe_open

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


def _on_hub(name: str) -> Origin:
    from huggingface_hub import errors, hf_hub_download

    local = "A local folder in the Diffusers layout, or a .safetensors file, works without the hub."
    try:
        index = Path(hf_hub_download(name, INDEX_FILE))
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise UserError(
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
    pipeline_class = _class_name(index)
    return Origin(name, name, "hub", _family_of(pipeline_class, f"{name}/{INDEX_FILE}"), pipeline_class)


# -------------------------------------------------------------------------------------------------------------- reading


def read(origin: Origin, *, dtype: torch.dtype, others: torch.dtype, whole: bool = False, **components: Any) -> DiffusionPipeline:
    """Load the pipeline, in evaluation mode, on the CPU, with the LoRAs of its base merged into the weights.

    Args:
        dtype: of the network; ``others`` is that of everything else.
        whole: with the parts that neither training nor sampling needs (the safety checker, say).
        components: parts to use instead of those on disk, by name, as they are.

    Raises:
        UserError: a part is missing, incomplete or unreadable.
    """
    from safetensors import SafetensorError

    declared = registry()[origin.family]
    options = {**({} if whole else declared.LEFT_OUT), **components}
    try:
        with quietly() as notes:
            pipe = _load(origin, options, {declared.NETWORK: dtype, "default": others})
            if origin.base_loras:
                from pipelines.families import _loras  # which reads models itself

                _loras.merge_into(pipe, origin.base_loras, frozenset(components))
            if origin.adapter:
                pipe.load_lora_weights(origin.adapter, weight_name=LORA_FILE)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError, UnpicklingError) as error:
        raise UserError(_unreadable(origin, error)) from error
    _refuse_invented_weights(origin, notes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _load(origin: Origin, options: dict[str, Any], dtypes: dict[str, torch.dtype]) -> DiffusionPipeline:
    import diffusers

    cls = getattr(diffusers, origin.pipeline_class)
    if origin.kind != "file":
        variant = "fp16" if origin.kind == "folder" and _has_only_halves(Path(origin.place), next(iter(dtypes))) else None
        return cls.from_pretrained(origin.place, dtype=dtypes, variant=variant, **options)
    place = {} if origin.config is None else {"config": origin.config, "local_files_only": True}
    pipe = cls.from_single_file(origin.place, dtype=dtypes["default"], **place, **options)
    network, dtype = next(iter(dtypes.items()))
    if network not in options:
        getattr(pipe, network).to(dtype)
    return pipe


def _has_only_halves(folder: Path, network: str) -> bool:
    """Whether the folder has only files named ``*.fp16.*``, as some downloads do."""
    names = [p.name for ending in ("safetensors", "bin") for p in (folder / network).glob(f"*.{ending}")]
    return bool(names) and all(".fp16" in name for name in names)


def _unreadable(origin: Origin, error: Exception) -> str:
    reason = " ".join(str(error).split())[:400]
    if origin.kind == "file" and origin.config is None:
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
