"""The files of a text embedding: finding them, reading its recipe, and loading its network and tokenizer.

A CLIP or its text tower, a SigLIP, a Diffusers folder (its text encoder), a sentence-transformers model, or any encoder that
Transformers reads; a folder, or an id of the hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.errors import UserError, did_you_mean
from pipelines.text_encoders import Recipe

if TYPE_CHECKING:
    import torch

CLIPS = {"clip": "openai/clip-vit-large-patch14", "clip-h": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}
"""OpenAI's ViT-L/14 (Radford et al. 2021, arXiv 2103.00020) and LAION's ViT-H/14, of which the text towers are used."""


# ------------------------------------------------------------------------------------------------------------ where it is


@dataclass(frozen=True)
class Source:
    """A folder or an id of the hub, and where in it network and tokenizer lie."""

    name: str
    where: str
    network: str = ""
    tokenizer: str = ""
    revision: str | None = None

    @property
    def local(self) -> bool:
        return Path(self.where).is_dir()


def find(name: str, revision: str | None) -> Source:
    path = Path(name).expanduser()
    if name == "tiny":
        from pipelines.tiny.model import checkpoint_path

        return Source("tiny", str(checkpoint_path()), "text_encoder", "tokenizer")
    if name not in CLIPS and path.is_dir():
        return _folder(path)
    place = CLIPS.get(name, name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", place) or ("/" in name and path.parent.is_dir()):
        raise UserError(_missing(name))
    return Source(name, place, revision=revision)


def _missing(name: str) -> str:
    names = [*CLIPS, "tiny"]
    return (
        f"There is no embedding {name!r} (seen from {Path.cwd()}).{did_you_mean(name, names)} "
        f"An embedding is {', '.join(names)}, a folder with a text encoder, or an id of the hub (org/name)."
    )


def _folder(path: Path) -> Source:
    whole = path.absolute()
    if (path / "model_index.json").is_file():
        return Source(str(whole), str(whole), "text_encoder", "tokenizer")
    if (path / "modules.json").is_file():  # older sentence-transformers keep the network in a folder of its own
        inner = next((m["path"] for m in _modules(path / "modules.json") if _kind(m) == "Transformer"), "")
        return Source(str(whole), str(whole), inner, inner)
    if path.name.startswith("text_encoder") and (path / "config.json").is_file() and not _has_tokenizer(path):
        beside = path.name.replace("text_encoder", "tokenizer")
        return Source(str(whole), str(whole.parent), path.name, beside)
    return Source(str(whole), str(whole))


def _has_tokenizer(path: Path) -> bool:
    return any((path / file).is_file() for file in ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer_config.json"))


def _file(source: Source, name: str, needed: bool = True) -> Path | None:
    """A file of the model; None where it has none of that name.

    Raises:
        UserError: without a connection nobody can tell, and it is ``needed``.
    """
    if source.local:
        path = Path(source.where) / name
        return path if path.is_file() else None
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.hf_hub_download(source.where, name, revision=source.revision))
    except errors.LocalEntryNotFoundError as error:
        found = huggingface_hub.try_to_load_from_cache(source.where, name, revision=source.revision)
        if found is not None or not needed:  # the hub's library remembers that the model has no such file
            return None
        raise UserError(
            f"Whether {source.where} has a {name}, which says how its tokens become one vector, cannot be told without a "
            f"connection. Where there is one, `{_fetch(source)}` fetches all of it; or say pooling=mean, or whichever is right."
        ) from error
    except errors.EntryNotFoundError:
        return None
    except (errors.HfHubHTTPError, OSError) as error:
        raise UserError(_unreachable(source)) from error


def _fetch(source: Source) -> str:
    return f'hf download {source.where} --include "*.json" "*.txt" "*.model" "*.safetensors"'


def _unreachable(source: Source) -> str:
    called = f"The embedding {source.name!r} needs" if source.name != source.where else "There is no folder of that name, and"
    verb = ", which" if source.name != source.where else ""
    return (
        f"{called} {source.where}{verb} is not on this machine and could not be fetched from the hub. Where there is a "
        f"connection, `{_fetch(source)}` fetches it; a folder that holds a copy can be given by its path, and 'tiny', which "
        "comes with diffalign, needs no files."
    )


# -------------------------------------------------------------------------------------------------------------- what it says

_POOLINGS = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "mean_sqrt_len_tokens": "mean", "lasttoken": "last"}
"""Poolings by their names in sentence-transformers. The mean over the root of the length has the mean's direction."""


def read_recipe(source: Source, config: Any, pooling: str, prefix: str | None) -> Recipe:
    """The recipe that the files state, with what the user asks for instead."""
    if config.model_type in ("clip", "clip_text_model"):
        if pooling == "cls":
            raise UserError(f"{source.name} is a CLIP, which reads forwards only: its first state is the same for every text.")
        return Recipe(("pooled",) if pooling == "auto" else (pooling,), prefix or "")
    if _is_dual(config):
        if pooling not in ("auto", "pooled"):
            raise UserError(f"{source.name} is a {config.model_type} model, which makes its own vector: pooling must be auto.")
        return Recipe(("pooled",), prefix or "", full=config.model_type.startswith("siglip"))
    try:
        said = _sentence_recipe(source)
    except UserError:
        if pooling == "auto":
            raise
        said = Recipe(("mean",))
    said = said if prefix is None else replace(said, prefix=prefix)
    return said if pooling == "auto" else replace(said, pooling=(pooling,))


def _sentence_recipe(source: Source) -> Recipe:
    """The recipe in the files of sentence-transformers; the mean over all tokens where there are none."""
    listed = _file(source, "modules.json")
    modules = [] if listed is None else _modules(listed)
    unknown = [kind for kind in map(_kind, modules) if kind not in ("Transformer", "Pooling", "Normalize", "Dropout")]
    if unknown:
        raise UserError(
            f"The sentence embedding {source.name} has a {unknown[0]} layer behind its encoder, which is not supported here; "
            "without it the vectors would be others. Choose a model of an encoder and a pooling."
        )
    folder = next((m["path"] for m in modules if _kind(m) == "Pooling"), "1_Pooling" if listed is None else None)
    pooled = None if folder is None or (listed is None and not source.local) else _file(source, f"{folder}/config.json")
    if pooled is None and listed is not None and folder is not None:
        raise UserError(f"{source.name} is not whole: its modules.json names {folder}, and there is no {folder}/config.json.")
    says = {} if pooled is None else _json(pooled)
    pooling = _pooling(says, source.name) if says else ("mean",)
    inner = f"{source.network}/" if source.network else ""
    limits = _optional(source, f"{inner}sentence_bert_config.json", modules)
    prompts = _optional(source, "config_sentence_transformers.json", modules)
    prefix = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name")) or ""
    if prefix and says.get("include_prompt") is False:
        raise UserError(f"{source.name} leaves its instruction {prefix!r} out of its pooling, which is not supported here.")
    return Recipe(pooling, prefix, bool(limits.get("do_lower_case")), limits.get("max_seq_length"))


def _optional(source: Source, name: str, modules: Sequence[Any]) -> Mapping[str, Any]:
    """A file that only a model of sentence-transformers has, and need not have."""
    path = _file(source, name, needed=False) if modules else None
    return {} if path is None else _json(path)


def _pooling(says: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Older files have a switch for each pooling, newer ones a word or a list of them."""
    if (words := says.get("pooling_mode")) is not None:
        chosen = [words] if isinstance(words, str) else list(words)
        known = {**{old.removesuffix("_tokens").removesuffix("_token"): new for old, new in _POOLINGS.items()}, **_POOLINGS}
    else:
        chosen = [key.removeprefix("pooling_mode_") for key, on in says.items() if key.startswith("pooling_mode_") and on is True]
        known = _POOLINGS
    if not chosen or any(word not in known for word in chosen):
        raise UserError(
            f"The sentence embedding {name} pools by {', '.join(chosen) or 'nothing'}, which is not supported here; "
            f"known are {', '.join(_POOLINGS)}. Say pooling=mean, say, to do otherwise than it was trained."
        )
    return tuple(known[word] for word in chosen)


def _modules(path: Path) -> list[Mapping[str, Any]]:
    found = _json(path)
    if not isinstance(found, list) or not all(isinstance(m, dict) and {"type", "path"} <= m.keys() for m in found):
        raise UserError(f"{path} is not a list of modules with type and path, as sentence-transformers writes it.")
    return found


def _kind(module: Mapping[str, Any]) -> str:
    return str(module["type"]).rpartition(".")[2]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON: {error}.") from error


def window_of(said: int | None, tokenizer: Any, config: Any) -> int | None:
    """Tokens that are read, marks included: the least of what tokenizer, model and its files allow; None for any number."""
    text = getattr(config, "text_config", config)
    positions = getattr(text, "max_position_embeddings", None)
    if positions and config.model_type in ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet"):
        positions -= 2  # places 0 and 1 are for padding
    limits = [n for n in (said, tokenizer.model_max_length, positions) if n and 0 < n < 10**6]
    return min(limits, default=None)


# ------------------------------------------------------------------------------------------------------------------ loading

BROKEN = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError)


def read_config(source: Source) -> Any:
    from transformers import AutoConfig

    from pipelines.families._quiet import quietly

    if source.local and not (Path(source.where) / source.network / "config.json").is_file():
        folder = Path(source.where) / source.network
        holds = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) if folder.is_dir() else ""
        raise UserError(f"{folder} is not a text encoder: it has no config.json. It holds: {holds or 'nothing'}.")
    try:
        with quietly():
            return AutoConfig.from_pretrained(source.where, **_place(source, source.network), trust_remote_code=False)
    except BROKEN as error:
        raise UserError(reason(source, error)) from error


def _place(source: Source, subfolder: str) -> dict[str, Any]:
    return {"subfolder": subfolder, "revision": source.revision or "main", "local_files_only": source.local}


def reason(source: Source, error: Exception) -> str:
    if not source.local and isinstance(error, OSError):
        return _unreachable(source)
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return f"{source.name} could not be loaded as an embedding of texts: {said}"


def _is_dual(config: Any) -> bool:
    """Whether the model has a text tower beside another one, as SigLIP has."""
    return hasattr(config, "text_config") and hasattr(config, "vision_config")


def load_network(source: Source, config: Any, recipe: Recipe, dtype: torch.dtype) -> Any:
    """The text tower of a CLIP, the encoder of an encoder-decoder, or all of the model.

    Raises:
        UserError: weights are missing; Transformers would make some up, and log it.
    """
    from safetensors import SafetensorError

    from pipelines.families._quiet import quietly

    kind, config = _class(config)
    options = {"config": config, "dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
    try:
        with quietly():
            network, info = kind.from_pretrained(source.where, **_place(source, source.network), **options)
    except (*BROKEN, SafetensorError) as error:
        raise UserError(reason(source, error)) from error
    lacking = sorted(info["missing_keys"])
    if "pooled" not in recipe.pooling:  # the network's own vector is not used; many files have nothing for it
        unused = [name for name in lacking if "pooler" in name]
        lacking = [name for name in lacking if name not in unused]
        for name in unused:
            network.get_parameter(name).detach().zero_()  # not made up anew each time
    if lacking:
        raise UserError(f"{source.name} is not whole: its files lack {len(lacking)} weights, for example {lacking[0]}.")
    network = network.get_encoder() if config.is_encoder_decoder and hasattr(network, "get_decoder") else network
    if not (hasattr(network, "get_text_features") or not _is_dual(config)):
        raise UserError(f"{source.name} is a {config.model_type} model, which has no vector for texts.")
    network.config.use_cache = False
    return network


def _class(config: Any) -> tuple[Any, Any]:
    """The class of Transformers that loads the network, and its configuration."""
    from transformers import AutoModel, AutoModelForTextEncoding, CLIPTextModel, CLIPTextModelWithProjection

    if config.model_type == "clip":
        text = config.text_config
        text.projection_dim = config.projection_dim  # inside, some files have kept another model's default
        return CLIPTextModelWithProjection, text
    if config.model_type == "clip_text_model":
        projects = "CLIPTextModelWithProjection" in (config.architectures or ())
        return (CLIPTextModelWithProjection if projects else CLIPTextModel), config
    alone = config.is_encoder_decoder and type(config) in AutoModelForTextEncoding._model_mapping
    return (AutoModelForTextEncoding if alone else AutoModel), config


def load_tokenizer(source: Source, given: str | Path | None) -> Any:
    """Padding at the right, and with something: it is masked.

    Raises:
        UserError: there is none, or one that knows no word, as Transformers makes it where it finds no files.
    """
    from transformers import AutoTokenizer

    from pipelines.families._quiet import quietly

    where, place = source.where, _place(source, source.tokenizer)
    if given is not None:
        where, place = str(given), {"local_files_only": Path(given).is_dir()}
    try:
        with quietly():
            found = AutoTokenizer.from_pretrained(where, **place, trust_remote_code=False)
        ids = found("a", add_special_tokens=False).input_ids
        known = bool(ids) and found.unk_token_id not in ids
    except BROKEN:
        known = False
    if not known:
        at = " ".join(filter(None, (where, "" if given else source.tokenizer)))
        raise UserError(
            f"The embedding {source.name} has no tokenizer in {at} that knows a word. It belongs beside the weights "
            "(tokenizer.json, or vocab.json and merges.txt); one that lies elsewhere is used by tokenizer=PATH."
        )
    if not found.is_fast:
        raise UserError(f"The tokenizer of {source.name} does not tell where in a text its tokens are; a tokenizer.json would.")
    found.padding_side = found.truncation_side = "right"
    if found.pad_token_id is None:
        found.pad_token = found.eos_token or found.unk_token or found.convert_ids_to_tokens(0)
    return found
