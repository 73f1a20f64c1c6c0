"""Find and read a writer by the name that a user gives.

The name is ``tiny``; a folder that ``save_pretrained`` of Transformers or diffalign wrote; a hub id; or the folder of a LoRA that
PEFT or diffalign wrote, on the base that it names. That base may be a LoRA itself, as PEFT allows: all LoRAs are merged into the
weights on loading, the innermost first, so that a loaded writer is always one plain network. The merged LoRAs are kept as one, so
that training on top of them results in one LoRA on the whole model, the only form that other programs load.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from diffalign.errors import UserError
from pipelines.families._names import INDEX_FILE, LORA_FILE, NOTE_FILE
from pipelines.families._quiet import quietly

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from pipelines.low_rank import Layers

CONFIG_FILE = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BESIDE, TRAINED_ON = "base_beside", "trained_on"
"""Fields of a LoRA's record: its base's folder relative to its own; and the LoRA that it was trained on top of and contains."""
TINY = Path(__file__).parent.parent / "tiny" / "writer"
_MORE_THAN_LORA = ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication")
"""Fields of PEFT's configuration for changes that a plain LoRA cannot hold. DoRA and its like show in the layers."""
_KINDS = "a folder that save_pretrained of Transformers wrote, a LoRA's folder, a hub id (gpt2, or org/name) or 'tiny'"
_UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, UnpicklingError)


@dataclass(frozen=True)
class Origin:
    """Where a writer comes from: enough to read it again."""

    name: str  # a name that is valid in any working folder: "tiny", a hub id, or an absolute path
    place: str  # the folder or hub id that the whole model is read from
    whole: str  # name of the whole model that is valid in any working folder
    adapters: tuple[str, ...] = ()  # folders of the LoRAs on it, in the order in which they are merged
    template: Mapping[str, Any] | None = None  # the template on record
    holds: str = ""  # the LoRA that this LoRA was trained on top of and contains; empty for none


@dataclass(frozen=True)
class Merged:
    """The LoRAs that were merged into a writer on loading, as one."""

    layers: Layers = field(default_factory=dict)
    more: str = ""  # why ``layers`` do not hold all of the change: a part is no plain LoRA; empty if they do


# -------------------------------------------------------------------------------------------------------------- finding


def find(where: str | os.PathLike[str], *, base: str | None = None) -> Origin:
    """Find out what ``where`` is without reading weights.

    Args:
        base: base model of a LoRA, where it is not the one on record.

    Raises:
        UserError: there is no such thing, or it is no causal language model.
    """
    return _find(os.fspath(where), base, ())


def _find(name: str, base: str | None, above: tuple[str, ...]) -> Origin:
    if name == "tiny":
        return _in_folder(TINY, "tiny", base, above)
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(path, str(path.absolute()), base, above)
    if path.is_file():
        raise UserError(f"{path} is a file; a writer is {_KINDS}.")
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and name[0] != "." and ("/" not in name or not path.parent.exists()):
        return _on_hub(name, base, above)
    raise UserError(f"There is no writer {name}: a writer is {_KINDS}.")


def _in_folder(path: Path, called: str, base: str | None, above: tuple[str, ...]) -> Origin:
    if (path / ADAPTER_CONFIG).is_file():
        return _adapter(path, called, base, above)
    if (path / CONFIG_FILE).is_file():
        return Origin(called, str(path), called, template=_note(path).get("template"))
    if not path.is_dir():
        raise UserError(f"There is no writer {called}: the folder {path} does not exist.")
    for file, what in ((INDEX_FILE, "an image model"), (LORA_FILE, "a LoRA of an image model")):
        if (path / file).is_file():
            raise UserError(f"{path} is {what}, which cannot write. A writer is {_KINDS}.")
    holds = ", ".join(sorted(entry.name for entry in path.iterdir())[:12]) or "nothing"
    raise UserError(
        f"{path} is not a writer: it has neither a {CONFIG_FILE} (a whole model) nor an {ADAPTER_CONFIG} (a LoRA). "
        f"It holds: {holds}."
    )


def _adapter(path: Path, called: str, base: str | None, above: tuple[str, ...]) -> Origin:
    config, note = _json(path / ADAPTER_CONFIG), _note(path)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path} holds an adapter of the type {config.get('peft_type')}; a writer's can only be LORA.")
    name = base or _recorded(path, note) or config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{path} holds a LoRA, but its {ADAPTER_CONFIG} does not say on which model: name its base (--base).")
    here = str(path.resolve())
    if here in above:
        raise UserError(f"{path} is a LoRA that is, in the end, its own base: {' on '.join([*above, here])}.")
    try:
        found = _find(name, None, (*above, here))
    except UserError as error:
        moved = "" if base else " If it was moved, name it (--base)."
        raise UserError(f"{path} is a LoRA on the base model {name}, which cannot be used. {error}{moved}") from error
    if note.get(TRAINED_ON) and found.adapters:
        raise UserError(
            f"{path} holds what the LoRA {note[TRAINED_ON]} had learnt, too, so its base is a whole model; {name} is a LoRA. "
            f"Name {found.whole} in its place, if that is the model below it."
        )
    template = note.get("template") or found.template
    holds = note.get(TRAINED_ON) or (found.name if found.adapters else "")
    return replace(found, name=called, adapters=(*found.adapters, str(path)), template=template, holds=holds)


def _recorded(path: Path, note: Mapping[str, Any]) -> str | None:
    """The base that ``note_of`` recorded: its path, or its path relative to the LoRA if both were moved."""
    name, beside = note.get("base_model"), note.get(BESIDE)
    if name and beside and not os.path.exists(name) and (path / beside).is_dir():
        return str((path / beside).resolve())
    return name


def note_of(base: str, holds: str, folder: Path) -> dict[str, Any]:
    """The fields of a LoRA's record in ``folder`` for the whole model ``base`` and the LoRA that it ``holds``, if any."""
    note: dict[str, Any] = {"base_model": base}
    if os.path.isabs(base):
        note[BESIDE] = os.path.relpath(os.path.realpath(base), folder.resolve())
    if holds:
        note[TRAINED_ON] = holds
    return note


def is_writer(where: str | os.PathLike[str]) -> bool:
    """Whether a folder holds the result of a writer's training run, or PEFT's LoRA of a causal language model."""
    path = Path(where).expanduser()
    if (path / LORA_FILE).is_file():  # some image models have an ADAPTER_CONFIG beside it
        return False
    if (path / ADAPTER_CONFIG).is_file() and _json(path / ADAPTER_CONFIG).get("task_type") == "CAUSAL_LM":
        return True
    return _note(path).get("kind") == "writer"


def _note(path: Path) -> dict[str, Any]:
    return _json(path / NOTE_FILE) if (path / NOTE_FILE).is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object; it holds a {type(content).__name__}.")
    return content


def _on_hub(name: str, base: str | None, above: tuple[str, ...]) -> Origin:
    from huggingface_hub import errors, hf_hub_download, snapshot_download, try_to_load_from_cache

    local = f"`hf download {name}` brings it where there is a connection; a local folder works without the hub."
    try:
        if isinstance(try_to_load_from_cache(name, ADAPTER_CONFIG), str) or not _has(name, CONFIG_FILE, hf_hub_download):
            folder = Path(snapshot_download(name, allow_patterns=["adapter_*", "*token*", "*.json", "*.jinja"]))
            return _in_folder(folder, name, base, above)
        return Origin(name, name, name)
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise UserError(
            f"There is no folder {name} here, and the language model {name} is neither in the local hub cache "
            f"nor could the hub be reached. {local}"
        ) from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"The language model {name} asks for an agreement: accept it on its page on the hub and log in."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"There is no folder {name} here and no model {name} on the hub (or it is private and you are not logged in)."
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise UserError(f"The hub could not give the language model {name}: {error}. {local}") from error


def _has(name: str, file: str, download: Any) -> bool:
    from huggingface_hub import errors

    try:
        download(name, file)
    except errors.LocalEntryNotFoundError:
        raise
    except errors.EntryNotFoundError:  # the hub answered, and has the model but not the file
        return False
    return True


# -------------------------------------------------------------------------------------------------------------- reading


def read(origin: Origin, dtype: torch.dtype) -> tuple[PreTrainedModel, Any, Merged]:
    """The model on the CPU, in evaluation mode, with all LoRAs merged; its tokenizer; and the LoRAs that were merged.

    Raises:
        UserError: a part is missing, incomplete or unreadable, or the model is no causal language model.
    """
    import torch

    # a LoRA's update smaller than half a step of bfloat16 would be lost: merge in float32 and round once
    model, merged = _model(origin.place, torch.float32 if origin.adapters else dtype), Merged()
    for folder in origin.adapters:
        model, merged = _with(model, merged, folder, origin.place)
    tokenizer = _tokenizer(origin)
    _refuse_another_tokenizer(origin, tokenizer, rows_of(model))
    return model.to(dtype).eval(), tokenizer, merged


def _model(place: str, dtype: torch.dtype) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with quietly():
            config = AutoConfig.from_pretrained(place)
            if not _is_causal(config):
                raise UserError(
                    f"{place} is a model of the type {config.model_type}, which is no causal language model. A writer is one, "
                    "like gpt2, Qwen2.5, Llama or SmolLM."
                )
            model, info = AutoModelForCausalLM.from_pretrained(place, config=config, dtype=dtype, output_loading_info=True)
    except (*_UNREADABLE, SafetensorError) as error:
        raise UserError(f"{place} could not be loaded as a language model: {_reason(error)}.") from error
    if missing := sorted(info["missing_keys"]):  # the loader fills gaps with random numbers and only logs it
        some = ", ".join(missing[:3])
        raise UserError(f"{place} is incomplete: its files lack weights that its configuration asks for, for example {some}.")
    return model


def _is_causal(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    # BERT and its relatives are in both mappings: they attend in both directions by default
    return config.model_type in CAUSAL and not config.is_encoder_decoder and config.model_type not in MASKED


def _with(model: PreTrainedModel, merged: Merged, folder: str, base: str) -> tuple[PreTrainedModel, Merged]:
    """``model`` with the LoRA of ``folder`` merged into its weights; and ``merged`` and that LoRA as one LoRA, if possible."""
    from safetensors import SafetensorError

    with quietly():
        from peft import PeftModel
    try:
        with quietly(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            carrying = PeftModel.from_pretrained(model, folder)
            together = _joined(merged, carrying, folder)
            model = carrying.merge_and_unload()
    except (*_UNREADABLE, SafetensorError) as error:
        raise UserError(f"The LoRA {folder} does not fit its base {base}, or cannot be read: {_reason(error)}.") from error
    if any("missing adapter keys" in str(one.message) for one in said):
        raise UserError(f"The LoRA {folder} is incomplete: it lacks weights for layers that its {ADAPTER_CONFIG} names.")
    return model, together


def _joined(merged: Merged, carrying: PeftModel, folder: str) -> Merged:
    from pipelines import low_rank, peft_layers

    config, called = carrying.active_peft_config, f"The LoRA {folder}"
    odd = [name for name in _MORE_THAN_LORA if getattr(config, name, None)] + (["bias"] if config.bias != "none" else [])
    try:
        if odd:
            raise UserError(f"{called} is more than a plain LoRA ({', '.join(odd)}), which cannot be used here.")
        layers = peft_layers.layers_of(carrying.get_base_model(), called)
    except UserError as error:  # such a writer can be used, but no LoRA can be trained on top of it
        return replace(merged, more=merged.more or str(error))
    return replace(merged, layers=low_rank.joined({"": merged.layers}, {"": layers})[""])


def rows_of(model: PreTrainedModel) -> int:
    """The number of tokens that the model has embeddings of."""
    return model.get_input_embeddings().weight.shape[0]


def _refuse_another_tokenizer(origin: Origin, tokenizer: Any, rows: int) -> None:
    """Raise UserError if the tokenizer has tokens that the model does not.

    The pad token is exempt: many tokenizers have one that their model lacks, and ``Encoding.pad`` then takes another.
    """
    beyond = [token for token, number in tokenizer.get_vocab().items() if number >= rows and token != tokenizer.pad_token]
    if beyond:
        raise UserError(
            f"{origin.name}: the tokenizer knows {len(tokenizer)} tokens and the model has {rows} embeddings, so they do not "
            f"belong together ({beyond[0]!r} has none, say). Where tokens were added on purpose, "
            "model.resize_token_embeddings(len(tokenizer)) makes room for them before training."
        )


def _tokenizer(origin: Origin) -> Any:
    from transformers import AutoTokenizer

    # a LoRA's own, where it was saved with one: a chat template may have been added in training
    own = [folder for folder in origin.adapters if (Path(folder) / "tokenizer_config.json").is_file()]
    place = own[-1] if own else origin.place
    try:
        with quietly():
            return AutoTokenizer.from_pretrained(place)
    except _UNREADABLE as error:
        raise UserError(f"{place} has no tokenizer that could be loaded: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
