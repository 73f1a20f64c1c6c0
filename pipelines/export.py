"""Export of a result for other programs: as a LoRA in their layout, or merged, as a whole pipeline or as one file.

The result's folder records its base (``diffalign.json``). A LoRA that was trained on top of others is joined with them into one
LoRA of all their ranks, unless ``alone`` is set. A prompt writer becomes a folder of
Transformers or PEFT.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.written_aside import file_aside
from pipelines import lora_layouts, low_rank, model_spec, peft_layers, single_file
from pipelines.families import _lora, _loras
from pipelines.families._files import installed_into, sort_header
from pipelines.families._names import INDEX_FILE, LORA_FILE, METADATA, NOTE_FILE
from pipelines.families._origin import Origin
from pipelines.families._quiet import quietly
from pipelines.families._reading import read, torch_dtype
from pipelines.families._registry import registry
from pipelines.families._sources import find
from pipelines.low_rank import Layers, Lora
from pipelines.sampling import SAMPLING_FILE
from pipelines.writers._sources import is_writer

LAYOUTS = ("diffusers", *lora_layouts.LAYOUTS, "single-file")


SINGLE_FILES = ("stable_diffusion", "sdxl")
"""Families that are written as one file."""


@dataclass(frozen=True)
class Export:
    """What is exported, and how.

    Args:
        result: a folder that ``diffalign train`` or ``diffalign prompts sft|train`` wrote.
        output: a file that ends in .safetensors; for ``diffusers`` a folder.
        layout: one of ``LAYOUTS``.
        merge: with ``diffusers``, write the whole pipeline (the whole model of a writer) with the LoRA merged into its weights.
        scale: strength of the LoRA, 1 being as it was trained. LoRAs that it was trained on top of keep theirs.
        alone: leave out the LoRAs that it was trained on top of, to load all of them together.
        dtype: type of the tensors; None is float32, for LoRAs and for models.
        base: the base model, if not the one on record.
        title: title in the header of the file; None is the name of the result's folder.
        checkpoint: the checkpoint to export in place of the finished result: a step, ``latest`` or ``best``.
    """

    result: str
    output: Path
    layout: str = "diffusers"
    merge: bool = False
    scale: float = 1.0
    alone: bool = False
    dtype: str | None = None
    base: str | None = None
    title: str | None = None
    overwrite: bool = False
    checkpoint: str | None = None


@dataclass(frozen=True)
class Exported:
    """What was written, and how to use it."""

    path: Path
    text: str


def export(asked: Export) -> Exported:
    """Write a result in another layout. Nothing half-written is left.

    Raises:
        UserError: a result or a base that cannot be read, options that do not go together, a network that has no such layout,
            an output that is in the way.
    """
    if asked.checkpoint is not None:
        return _of_checkpoint(asked)
    if is_writer(asked.result):
        return _writer(asked)
    origin = find(asked.result, base=asked.base)
    whole = asked.merge or asked.layout == "single-file"
    _check(asked, origin, whole)
    dtype = torch_dtype(asked.dtype or "float32")
    made = _whole(asked, origin, dtype) if whole or not origin.adapter else _lora_of(asked, origin, dtype)
    return replace(made, text=f"{made.text} {origin.own_words}.") if origin.own_words else made


def _lora_of(asked: Export, origin: Origin, dtype: torch.dtype) -> Exported:
    parts = _loras.hollow_parts(replace(origin, adapter=None, base_loras=()))
    lora, below = _own(asked, origin, parts), _below(origin, parts)
    together = lora if asked.alone or not below else low_rank.with_one_alpha(low_rank.joined(below, lora))
    if asked.layout == "diffusers":
        return _diffusers(asked, origin, together, parts, dtype, joined=bool(below) and not asked.alone)
    return _foreign(asked, origin, together, parts, dtype)


def _of_checkpoint(asked: Export) -> Exported:
    """Export a checkpoint through a temporary folder that holds the result the run would have had."""
    from pipelines.from_checkpoint import result_of_checkpoint

    run = Path(asked.result).expanduser()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / run.absolute().name  # whose name is the title, if there is no other
        step = result_of_checkpoint(run, asked.checkpoint, result, asked.base)
        base = None if is_writer(result) else asked.base  # on record: the whole model, whatever training began with
        done = export(replace(asked, result=str(result), base=base, checkpoint=None))
    return replace(done, text=f"{done.text} It is the checkpoint of step {step}.")


def _check(asked: Export, origin: Origin, whole: bool) -> None:
    """Check everything that can be checked before a file is read."""
    out = asked.output
    if asked.layout not in LAYOUTS:
        raise UserError(f"There is no layout {asked.layout!r}; the layouts are {', '.join(LAYOUTS)}.")
    if not (asked.scale == asked.scale and 0 < abs(asked.scale) < float("inf")):
        raise UserError(f"The scale of a LoRA is a number other than 0; got {asked.scale}.")
    if not origin.adapter:
        _check_without_lora(asked, origin)
    if asked.layout == "single-file" and origin.family not in SINGLE_FILES:
        raise UserError(
            f"A single file in the original layout is written for Stable Diffusion 1.x, 2.x and XL; this is a "
            f"{origin.pipeline_class}. Export the whole pipeline instead: --to diffusers --merge."
        )
    if asked.merge and asked.layout in lora_layouts.LAYOUTS:
        raise UserError(
            f"A merged model has no LoRA to write in {asked.layout}'s layout: --to diffusers or single-file, or no --merge."
        )
    if asked.alone and whole:
        raise UserError("A merged model has all LoRAs in it; --alone is for LoRAs.")
    if asked.alone and not origin.base_loras:
        raise UserError(f"{asked.result} was not trained on top of another LoRA, so it is alone already: leave --alone out.")
    if asked.layout == "diffusers":
        one = "single-file" if asked.merge or not origin.adapter else "kohya or --to comfyui"
        _check_folder(asked, "Diffusers' layout", f", or --to {one}")
    elif out.suffix != ".safetensors":
        raise UserError(f"The layout {asked.layout} is one file, whose name ends in .safetensors; got {out}.")
    elif out.exists() and (out.is_dir() or not asked.overwrite):
        raise UserError(f"{out} is there already. Name another, or add --overwrite to replace it.")
    _check_elsewhere(asked)


def _check_folder(asked: Export, what: str, otherwise: str = "") -> None:
    """Check that the output can be a folder; ``otherwise`` is the advice where a file is named."""
    out = asked.output
    if out.is_file():
        raise UserError(f"{out} is a file; {what} is a folder.")
    if out.suffix.lower() == ".safetensors":
        raise UserError(f"{what} is a folder, and {out} is the name of a file: give --out {out.with_suffix('')}{otherwise}.")
    if out.is_dir() and any(out.iterdir()) and not asked.overwrite:
        raise UserError(f"{out} is not empty. Name another, or add --overwrite to replace files of the same names in it.")


def _check_elsewhere(asked: Export) -> None:
    if asked.output.resolve() == Path(asked.result).expanduser().resolve():
        raise UserError(f"{asked.output} is the result itself; name another place.")


def _check_without_lora(asked: Export, origin: Origin) -> None:
    if asked.layout in lora_layouts.LAYOUTS:
        raise UserError(
            f"{asked.result} is a whole {origin.pipeline_class} and no LoRA, so {asked.layout}'s layout has nothing to hold. "
            "--to single-file writes it as one file, --to diffusers as a folder."
        )
    if asked.scale != 1.0:
        raise UserError(f"{asked.result} is a whole {origin.pipeline_class}; a scale is for LoRAs.")


# --------------------------------------------------------------------------------------------------------------- writers


def _writer(asked: Export) -> Exported:
    """A language model: whole, or its LoRA as PEFT keeps it, with those in it that it was trained on top of."""
    from pipelines.writers.writer import Writer

    _check_writer(asked)
    writer = Writer.load(asked.result, dtype=asked.dtype or "float32", base=asked.base)
    if asked.merge or not writer.origin.adapters:
        writer.save(asked.output)
        how = f'a whole language model. In Transformers: AutoModelForCausalLM.from_pretrained("{asked.output}")'
    else:
        writer.save_adapter(asked.output)
        how = f'{_counted({"": writer.merged.layers})}. In PEFT: AutoPeftModelForCausalLM.from_pretrained("{asked.output}")'
    return Exported(asked.output, f"{asked.output}: {how}; here: --writer {asked.output}.")


def _check_writer(asked: Export) -> None:
    """Check that a writer is exported as a folder of Transformers or PEFT; both are called ``diffusers`` here."""
    given = {"--to": asked.layout != "diffusers", "--scale": asked.scale != 1.0, "--alone": asked.alone, "--title": asked.title}
    if odd := [name for name, it_is in given.items() if it_is]:
        raise UserError(
            f"{asked.result} is a prompt writer, a language model; {', '.join(odd)} {'is' if len(odd) == 1 else 'are'} for image "
            "models. With --merge a writer is written as a whole model for Transformers, without as a LoRA for PEFT."
        )
    if asked.dtype and not asked.merge:
        raise UserError("--dtype is of a writer's whole model (--merge); its LoRA is float32.")
    _check_folder(asked, "A writer")
    _check_elsewhere(asked)


# ----------------------------------------------------------------------------------------------------------------- LoRAs


def _own(asked: Export, origin: Origin, parts: Mapping[str, nn.Module]) -> Lora:
    """The result's own LoRA, as strong as asked."""
    cls = _pipeline_class(origin)
    return low_rank.scaled(_loras.read_lora(Path(origin.adapter) / LORA_FILE, parts, cls), asked.scale)


def _below(origin: Origin, parts: Mapping[str, nn.Module]) -> Lora:
    """The LoRAs that the result was trained on top of, as one; empty if there are none."""
    out: Lora = {}
    for base in origin.base_loras:
        out = low_rank.joined(out, _loras.read_lora(_loras.checked(base), parts, _pipeline_class(origin)))
    return out


def _pipeline_class(origin: Origin) -> type:
    import diffusers

    return getattr(diffusers, origin.pipeline_class)


def _diffusers(
    asked: Export, origin: Origin, lora: Lora, parts: Mapping[str, nn.Module], dtype: torch.dtype, joined: bool
) -> Exported:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {}
    for component, layers in lora.items():
        tensors |= {f"{component}.{name}": value for name, value in peft_layers.weights(layers).items()}
        header |= {f"{component}.{key}": value for key, value in _plain(_peft_config(layers, parts[component])).items()}
    note: dict[str, Any] = {"kind": "lora", "family": origin.family, "base_model": origin.model}
    if origin.base_loras and not joined:
        note["base_loras"] = [base.note() for base in origin.base_loras]
    if origin.without:
        note["without"] = list(origin.without)
    if origin.config:
        note["config"] = origin.config
    with installed_into(asked.output) as folder:
        metadata = {"format": "pt", METADATA: json.dumps(header, indent=2, sort_keys=True)}
        save_file(_stored(tensors, dtype), folder / LORA_FILE, metadata=metadata)
        sort_header(folder / LORA_FILE)
        (folder / NOTE_FILE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        if alone := _part_without_loader(origin):
            layers = lora[alone]
            _lora.write_as_peft(folder, _stored(peft_layers.weights(layers), dtype), _peft_config(layers, parts[alone]))
    how = f'pipe.load_lora_weights("{asked.output}", weight_name="{LORA_FILE}")'
    if alone:
        how = (
            f'pipe.{alone} = peft.PeftModel.from_pretrained(pipe.{alone}, "{asked.output}"), for its pipeline has no LoRA loader'
        )
    return Exported(asked.output, f"{asked.output}: {_counted(lora)}. In Diffusers: {how}")


def _part_without_loader(origin: Origin) -> str:
    """The network, where its pipeline has no loader for LoRA, so that PEFT's own has to do; otherwise nothing."""
    return "" if _lora.loads_with_diffusers(_pipeline_class(origin)) else registry()[origin.family].NETWORK


def _peft_config(layers: Layers, network: nn.Module) -> Any:
    return peft_layers.config(layers, [n for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))])


def _plain(config: Any) -> dict[str, Any]:
    """A PEFT configuration as JSON for a file's header, with lists in place of sets."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def _foreign(asked: Export, origin: Origin, lora: Lora, parts: Mapping[str, nn.Module], dtype: torch.dtype) -> Exported:
    tensors = lora_layouts.written(lora, parts, asked.layout)
    network = parts[lora_layouts.network_of(parts)]
    rank, alpha = peft_layers.most_common(lora[lora_layouts.network_of(parts)])
    header = model_spec.of_lora(
        parts, _prediction(origin), title=_title(asked), resolution=_resolution(origin, network), rank=rank, alpha=alpha
    )
    alphas = {name: value for name, value in tensors.items() if name.endswith(lora_layouts.ALPHA)}
    _write_file(asked.output, {**_stored(tensors, dtype), **alphas}, header)  # alphas stay exact
    return Exported(asked.output, f"{asked.output}: {_counted(lora)} in {asked.layout}'s layout.")


def _counted(lora: Lora) -> str:
    rank, alpha = peft_layers.most_common(next(iter(lora.values())))
    return f"a LoRA of {sum(map(len, lora.values()))} layers, rank {rank}, alpha {alpha:g}"


# ---------------------------------------------------------------------------------------------------------- whole models


def _whole(asked: Export, origin: Origin, dtype: torch.dtype) -> Exported:
    pipe = read(replace(origin, adapter=None), dtype=torch.float32, others=torch.float32, whole=True)
    if origin.adapter:
        for component, layers in _own(asked, origin, _loras.parts_of(pipe)).items():
            low_rank.merge(layers, getattr(pipe, component), origin.adapter)
    if asked.layout == "single-file":
        network = getattr(pipe, registry()[origin.family].NETWORK)
        tensors = single_file.tensors(pipe)
        resolution = network.config.sample_size * pipe.vae_scale_factor
        prediction = pipe.scheduler.config.get("prediction_type", "")
        header = model_spec.of_checkpoint(network, prediction, title=_title(asked), resolution=resolution)
        _write_file(asked.output, _stored(tensors, dtype), header)
        return Exported(asked.output, f"{asked.output}: the whole model in one file, {len(tensors)} tensors.")
    with installed_into(asked.output, last=INDEX_FILE) as folder, quietly():
        pipe.to(dtype=dtype).save_pretrained(folder)
        note = {"kind": "pipeline", "family": origin.family, "base_model": origin.model}
        (folder / NOTE_FILE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        advice = Path(origin.place) / SAMPLING_FILE
        if advice.is_file():
            shutil.copyfile(advice, folder / SAMPLING_FILE)
    return Exported(
        asked.output, f'{asked.output}: the whole model. In Diffusers: DiffusionPipeline.from_pretrained("{asked.output}")'
    )


# --------------------------------------------------------------------------------------------------------------- details


def _title(asked: Export) -> str:
    return asked.title or Path(asked.result).expanduser().resolve().name


def _prediction(origin: Origin) -> str:
    return _scheduler(origin).get("prediction_type", "")


def _scheduler(origin: Origin) -> Mapping[str, Any]:
    """The scheduler's configuration, where it can be had without reading the model."""
    import diffusers

    if origin.configured_at is None:
        return origin.marks.of_scheduler
    return {**diffusers.DDIMScheduler.load_config(origin.configured_at, subfolder="scheduler"), **origin.marks.of_scheduler}


def _resolution(origin: Origin, network: nn.Module) -> int:
    """Pixels on a side that the network was made for."""
    import diffusers

    size = network.config.get("sample_size") or 128  # FLUX does not say; it was made for a million pixels
    if origin.configured_at is None:
        return 8 * size
    channels = diffusers.AutoencoderKL.load_config(origin.configured_at, subfolder="vae")["block_out_channels"]
    return size * 2 ** (len(channels) - 1)


def _stored(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", dtype).contiguous().clone() for name, value in tensors.items()}


def _write_file(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Beside the place, then into it.

    Raises:
        UserError: it could not be written; what was there is untouched.
    """
    from safetensors.torch import save_file

    with file_aside(path) as aside:
        save_file(dict(tensors), aside, metadata=dict(header))
        sort_header(aside)
