"""What a person may call a model, and how each kind is found.

``tiny`` and ``tiny-flow``, which ship; a Diffusers folder; a hub id ``org/name``; a single ``.safetensors`` or ``.ckpt`` file in
the original layout; a file of a transformer alone (``.safetensors``, or quantised ``.gguf``), the rest coming from a Diffusers
folder or the hub; or a folder that diffalign wrote (a whole pipeline, or a LoRA that remembers its base, and the LoRAs that it
was trained on top of). Those, and any that a run names as part of its base, are merged into the weights when the model is read.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, Literal

from diffalign.digests import file_digest
from diffalign.errors import UserError
from pipelines.families._hub import LORA_ON_HUB, index_on_hub, lora_on_hub
from pipelines.families._marks import Marks, marks_of
from pipelines.families._names import INDEX_FILE, LORA_FILE, NOTE_FILE
from pipelines.families._origin import BaseLora, Origin, note_of, recorded_loras
from pipelines.families._registry import family_of, registry
from pipelines.families._single_files import ENDINGS, header_of, shapes_of, single_file_type
from pipelines.tiny.shipped import CHECKPOINTS

_NOT_THE_NETWORK = ("first_stage_model.", "vae.", "text_encoders.", "cond_stage_model.", "conditioner.")
"""How names of the other parts begin in single files."""

_NOT_FOR_TEXT = {
    "inpainting": "inpainting",
    "inpainting_v2": "inpainting",
    "xl_inpaint": "inpainting",
    "xl_refiner": "refining what SDXL's base model sampled",
    "instruct-pix2pix": "picture editing",
}


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
        UserError: nothing was found, or nothing that this program can use.
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
    asked = where.as_posix() if isinstance(where, PurePath) else os.fspath(where)  # on Windows org/name is a path org\name
    if not path.exists() and not path.parent.exists() and LORA_ON_HUB.fullmatch(asked):
        path, hub = lora_on_hub(asked), asked
    files = (
        [path] if path.is_file() else [path / LORA_FILE] if (path / LORA_FILE).is_file() else sorted(path.glob("*.safetensors"))
    )
    if len(files) != 1 or files[0].suffix != ".safetensors":
        names = ", ".join(file.name for file in files)
        found = f"{len(files)} .safetensors files {names}".rstrip() if path.is_dir() else "no such file or folder"
        raise UserError(f"There is no LoRA at {where}: {found}. Name a .safetensors file, or a folder with one.")
    file = files[0].absolute()
    hub = f"{hub}/{file.name}" if hub and not hub.endswith(file.name) else hub
    found = BaseLora(str(file), file_digest(file), hub)
    return (*recorded_loras(file.parent), found) if file.name == LORA_FILE else (found,)


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
    beside = sorted(entry.name for entry in path.parent.iterdir() if _may_be_a_model(entry))
    near = difflib.get_close_matches(path.name, beside, n=3) or beside[:5]
    there = f"in {path.parent.absolute()} there is {' or '.join(near) or 'none'}"
    kinds = "a Diffusers folder, a .safetensors file, a hub id (org/name), 'tiny' or 'tiny-flow'"
    return f"There is no model {name}: {there}. A model is {kinds}."


def _may_be_a_model(path: Path) -> bool:
    return path.suffix in ENDINGS or (path / INDEX_FILE).is_file() or (path / LORA_FILE).is_file()


def _in_folder(path: Path, *, called: str, base: str | None) -> Origin:
    if (path / INDEX_FILE).is_file():
        return _of_index(path / INDEX_FILE, called, str(path), "folder")
    if (path / LORA_FILE).is_file():
        return _adapter(path, base)
    if not path.is_dir():
        raise UserError(f"There is no model {called}: the folder {path} does not exist.")
    if str(note_of(path).get("kind", "")).startswith("writer"):
        raise UserError(f"{path} is a prompt writer, a language model, and draws nothing: `diffalign prompts` has its commands.")
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
        content = json.loads(index.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{index} is not valid JSON ({error}). It should be what save_pretrained of Diffusers writes.") from error
    if not isinstance(content, dict) or not isinstance(content.get("_class_name"), str):
        raise UserError(f"{index} has no field _class_name, the name of the pipeline's class (StableDiffusionPipeline, say).")
    return content


def _adapter(path: Path, base: str | None) -> Origin:
    record = note_of(path)
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
    if path.suffix not in ENDINGS:
        ending = path.suffix or "nothing"
        raise UserError(f"{path} is a file that ends in {ending}; a model in one file ends in {', '.join(ENDINGS)}.")
    if config is not None and not (Path(config) / INDEX_FILE).is_file():
        raise UserError(f"The configuration for {path} should be a Diffusers folder, but {config} has no {INDEX_FILE}.")
    shapes = shapes_of(path)
    kind = single_file_type(path, shapes)
    for name, declared in registry().items():
        if kind in declared.SINGLE_FILE:
            folder = None if config is None else str(Path(config).absolute())
            marks = marks_of(shapes, header_of(path)) if declared.NETWORK == "unet" else Marks()  # others predict one thing
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


def _on_hub(name: str) -> Origin:
    return _of_index(index_on_hub(name), name, name, "hub")
