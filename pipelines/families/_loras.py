"""LoRAs of any making, to stand under a run: read by layer, and merged into a pipeline.

Files in kohya's or ComfyUI's layout are read here (``pipelines.lora_layouts``); all others by Diffusers' own loader, into a
pipeline whose weights take no memory, from which PEFT then tells what each layer got.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.digests import file_digest
from diffalign.errors import UserError
from pipelines import lora_layouts, low_rank, peft_layers
from pipelines.families._names import METADATA
from pipelines.families._origin import BaseLora, Origin
from pipelines.families._quiet import quietly
from pipelines.families._reading import read
from pipelines.families._registry import registry
from pipelines.low_rank import Lora, LowRank

_MORE_THAN_LORA = re.compile(r"dora_scale|lora_magnitude_vector|lora_mid|hada_|lokr_|oft_|lora_embedding|\.diff(_b)?$|\.bias$")
"""DoRA, LyCORIS' other kinds, changes of biases: functions of other form."""


def read_lora(file: str | Path, parts: Mapping[str, nn.Module], pipeline_class: type) -> Lora:
    """What a LoRA changes, by component and layer.

    Args:
        parts: the networks that it may change, by the pipeline's component (``hollow_parts``); they are not changed.
        pipeline_class: of Diffusers, which knows how to read LoRAs for it.

    Raises:
        UserError: it cannot be read, is of another model, or is more than a LoRA.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(file)
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in list(opened.keys())}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as a .safetensors file: {error}.") from error
    if odd := [name for name in tensors if _MORE_THAN_LORA.search(name)]:
        raise UserError(f"{path} is more than a plain LoRA (it holds {odd[0]}, say), which cannot be used here.")
    if not hasattr(pipeline_class, "load_lora_weights"):
        return _by_names(path, tensors, metadata, parts)
    found = _ours(tensors, parts)
    return _by_diffusers(path, parts, pipeline_class) if found is None else found


def _ours(tensors: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> Lora | None:
    """Read by our tables, where there are any for this network and all names are in them."""
    try:
        return lora_layouts.parsed(tensors, parts)
    except UserError:  # this class of network has no layout but Diffusers' own
        return None


def _by_diffusers(path: Path, parts: Mapping[str, nn.Module], pipeline_class: type) -> Lora:
    hollow = {name: _hollow(part) for name, part in parts.items()}
    with quietly() as notes:
        try:
            _bare(pipeline_class, hollow).load_lora_weights(str(path.parent), weight_name=path.name)
        except (ValueError, KeyError, RuntimeError, AttributeError, TypeError, OSError) as error:
            raise UserError(f"{path} is no LoRA for this model: {' '.join(str(error).split())[:300]}") from error
    unknown = [note for note in notes if "unexpected keys" in note]
    if unknown:
        raise UserError(f"{path} is a LoRA of another model: {' '.join(unknown[0].split())[:300]}")
    read_off = {component: peft_layers.layers_of(part, str(path)) for component, part in hollow.items()}
    out = {component: layers for component, layers in read_off.items() if layers}
    if not out:
        raise UserError(f"{path} holds no LoRA for the {' or the '.join(parts)} of this model.")
    return out


def _by_names(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], parts: Mapping[str, nn.Module]) -> Lora:
    """A file that ``save_adapter`` wrote for a network that Diffusers has no LoRA loader for."""
    component = lora_layouts.network_of(parts)
    config = json.loads(metadata.get(METADATA, "{}"))
    rank, alpha = config.get(f"{component}.r"), config.get(f"{component}.lora_alpha")
    layers = {name.removesuffix(".lora_A.weight").removeprefix(f"{component}.") for name in tensors if ".lora_A." in name}
    there = {name for name, _ in parts[component].named_modules()}
    if rank is None or not layers <= there or 2 * len(layers) != len(tensors):
        raise UserError(f"{path} is no LoRA that diffalign wrote for a {type(parts[component]).__name__}.")
    pair = {name: [tensors[f"{component}.{name}.lora_{side}.weight"].float() for side in "AB"] for name in sorted(layers)}
    return {component: {name: LowRank(down, up, alpha / rank) for name, (down, up) in pair.items()}}


# ------------------------------------------------------------------------------------------------- networks without weight


def hollow_parts(origin: Origin) -> dict[str, nn.Module]:
    """The networks of a checkpoint that a LoRA may change, with their shapes and without their weights.

    Raises:
        UserError: the checkpoint's configuration cannot be read.
    """
    import diffusers

    with quietly():  # a pipeline's module is imported here
        cls = getattr(diffusers, origin.pipeline_class)
    names = getattr(cls, "_lora_loadable_modules", [registry()[origin.family].NETWORK])
    place = origin.configured_at
    if origin.kind == "file" or place is None:  # a single file has no configuration of its own
        pipe = read(origin, dtype=torch.float32, others=torch.float32)
        return parts_of(pipe)
    try:
        index = cls.load_config(place)
        return {n: _from_configuration(place, n, *index[n]) for n in names if (index.get(n) or [None])[0]}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{origin.place} cannot be read: {' '.join(str(error).split())[:300]}") from error


def parts_of(pipe: Any) -> dict[str, nn.Module]:
    """The same of a pipeline that is loaded."""
    declared = next(d for d in registry().values() if type(pipe).__name__ in d.PIPELINES)
    names = getattr(pipe, "_lora_loadable_modules", [declared.NETWORK])
    return {name: _hollow(part) for name in names if (part := getattr(pipe, name, None)) is not None}


def _from_configuration(place: str, component: str, library: str, class_name: str) -> nn.Module:
    cls = getattr(importlib.import_module(library), class_name)
    if library == "diffusers":
        config: Any = cls.load_config(place, subfolder=component)
    else:
        config = cls.config_class.from_pretrained(place, subfolder=component)
    return _empty(cls, config)


def _hollow(part: nn.Module) -> nn.Module:
    """A network like ``part``, without adapters, whose weights take no memory."""
    return _empty(type(part), part.config)


def _empty(cls: type, config: Any) -> nn.Module:
    """Every tensor is one zero seen many times: shapes, dtype and device are as they should be, and nothing is stored."""
    with torch.device("meta"), quietly():
        network = cls.from_config(config) if hasattr(cls, "from_config") and hasattr(cls, "load_config") else cls(config)
    for module in network.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(torch.zeros(()).expand(value.shape), requires_grad=False)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.zeros((), dtype=value.dtype).expand(value.shape)
    return network


def _bare(pipeline_class: type, parts: Mapping[str, nn.Module]) -> Any:
    """A pipeline of these parts and no others."""
    asked = list(inspect.signature(pipeline_class.__init__).parameters.values())[1:]
    given = {p.name: parts.get(p.name) for p in asked if p.name in parts or p.default is inspect.Parameter.empty}
    return pipeline_class(**given)


# -------------------------------------------------------------------------------------------------------------- merging


def merge_into(pipe: Any, loras: tuple[BaseLora, ...], keep: frozenset[str]) -> None:
    """Add LoRAs to the weights of a pipeline, in float32; the components named in ``keep`` have them already.

    Raises:
        UserError: a LoRA is missing, was changed since, or is of another model.
    """
    parts = parts_of(pipe)
    for base in loras:
        lora = read_lora(checked(base), parts, type(pipe))
        for component in lora.keys() - keep:
            low_rank.merge(lora[component], getattr(pipe, component), base.path)


def checked(base: BaseLora) -> str:
    """The file of a LoRA on record, if it is still the one that was trained upon.

    Raises:
        UserError: it is gone, or another.
    """
    file = base.local()
    if not file.is_file():
        raise UserError(f"The LoRA {base.path}, which this result was trained on top of, is not there any more.")
    if file_digest(file) != base.sha256:
        raise UserError(
            f"The LoRA {base.path}, which this result was trained on top of, was changed since: train anew, or put it back."
        )
    return str(file)
