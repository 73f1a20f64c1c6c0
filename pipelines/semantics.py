"""How far a rewrite is from what its prompt meant: embeddings of texts, and the cosine distance between them.

    d(x, y) = 1 - cos(e(x), e(y)),    in [0, 2]

Sem-DPO (arXiv 2507.20133) weighs a pair by exp(-alpha * d) of its prompt and the preferred rewrite, and reports the same distance
as drift. Which embedding ``e`` is, is the user's choice: CLIP's text tower, the miniature one of the tiny world, or any encoder
that Transformers reads, sentence embeddings among them. A CLIP reads 77 tokens: what lies beyond them has no part in the
distance, and ``cut`` says what that is.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from diffalign.errors import UserError
from reward_models._judge import DTYPES, device_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CLIPS = {"clip": "openai/clip-vit-large-patch14", "clip-h": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}
"""OpenAI's ViT-L/14 (Radford et al. 2021, arXiv 2103.00020) and LAION's ViT-H/14, of which the text towers are used."""
TINY = "pickscore"
"""What ``tiny`` is: the text tower of the miniature PickScore, or, by one of ``POOLINGS``, the tiny checkpoint's text encoder.
The first tells a changed colour, shape or size from added words of style best."""
POOLINGS = ("pooled", "mean", "words", "cls", "max", "last")
"""The model's own sentence vector (behind CLIP's projection, if there is one); or of the last hidden states the mean, the mean
without start and end marks, the first, the largest of each number, the last."""
BATCH = 64

Progress = Callable[[str, int, int], None]


class Embedding(Protocol):
    """Texts to directions in which nearby means alike."""

    name: str

    @property
    def fingerprint(self) -> str:
        """Changes when the vectors would."""
        ...

    def embed(self, texts: Sequence[str]) -> Tensor:
        """[N, D] float32 of length one, on the CPU; one forward pass."""
        ...

    def cut(self, texts: Sequence[str]) -> list[str]:
        """What of each text lies beyond the window and is not read; "" where everything is."""
        ...


def distance(
    embedding: Embedding,
    prompts: Sequence[str],
    rewrites: Sequence[str],
    batch_size: int = BATCH,
    progress: Progress | None = None,
) -> Tensor:
    """[N] float32 in [0, 2]: cosine distance of each prompt and its rewrite, exactly 0 where they are the same text.

    Each different text is embedded once. ``progress`` is told ("embedding", done, total) in texts.
    """
    if len(prompts) != len(rewrites):
        raise ValueError(f"{len(prompts)} prompts and {len(rewrites)} rewrites; each rewrite belongs to one prompt")
    vectors = embed_all(embedding, [*prompts, *rewrites], batch_size, progress)
    return between(vectors[: len(prompts)], vectors[len(prompts) :])


def between(a: Tensor, b: Tensor) -> Tensor:
    """[N] cosine distance of unit vectors [N, D]: |a - b|^2 / 2, in which nothing cancels where they are close."""
    return ((a - b).square().sum(dim=-1) / 2).clamp(max=2.0)


def embed_all(embedding: Embedding, texts: Sequence[str], batch_size: int = BATCH, progress: Progress | None = None) -> Tensor:
    """[N, D] of any number of texts, in their order; each different one is embedded once, with others of about its length."""
    import torch

    different = sorted(dict.fromkeys(texts), key=lambda text: (len(text), text))
    if not different:
        return embedding.embed([])
    parts = []
    for start in range(0, len(different), batch_size):
        parts.append(embedding.embed(different[start : start + batch_size]))
        if progress:
            progress("embedding", min(start + batch_size, len(different)), len(different))
    place = {text: i for i, text in enumerate(different)}
    return torch.cat(parts)[torch.tensor([place[text] for text in texts], dtype=torch.long)]


def load_embedding(
    name: str | Path = "clip",
    *,
    pooling: str = "auto",
    prefix: str | None = None,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    device: str | None = None,
    dtype: str = "float32",
) -> TextEncoder:
    """An embedding by its name.

    Args:
        name: ``clip``, ``clip-h`` or ``tiny``; or a folder or an id of the hub: a CLIP or its text encoder, a Diffusers folder
            (its text encoder), a sentence-transformers model, or any other encoder that Transformers reads.
        pooling: one of ``POOLINGS``; ``auto`` is the model's own vector for a CLIP, what the folder says for a
            sentence-transformers model, and the mean for others.
        prefix: put before every text, as some sentence embeddings want ("query: "); None for what the model's files say.
        tokenizer: a folder or hub id; that of the model if not given.
        device: the accelerator if there is one, else the CPU, if not given.
        dtype: what the network computes in; vectors are normalised and compared in float32 in any case.

    Raises:
        UserError: there is no such model here and it cannot be had, its files are not whole, or it is none for texts.
    """
    import torch

    if pooling not in ("auto", *POOLINGS):
        raise UserError(f"pooling is {pooling!r}; it must be auto or one of {', '.join(POOLINGS)}.")
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}.")
    place = {"device": device_of(device), "dtype": getattr(torch, dtype)}
    if str(name) == "tiny":
        pooling = TINY if pooling == "auto" else pooling
        if pooling == "pickscore":
            return _tiny_pickscore(prefix, tokenizer, **place)
    source = _source(str(name), revision)
    config = _config(source)
    recipe = _recipe(source, config, pooling, prefix)
    words = _tokenizer(source, tokenizer)
    network = _network(source, config, recipe, place["dtype"]).to(place["device"])
    recipe = replace(recipe, window=_window(recipe.window, words, config))
    found = TextEncoder(source.name, network, _vectors(network, recipe), words, recipe)
    try:
        found.embed(["a"])
    except _BROKEN as error:
        raise UserError(_reason(source, error)) from error
    return found


def _tiny_pickscore(prefix: str | None, tokenizer: str | Path | None, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """The text tower of the miniature PickScore, which open_clip runs."""
    from reward_models import tiny_pickscore
    from reward_models._weights import fill, read_state

    network = tiny_pickscore.build()
    fill(network, read_state(tiny_pickscore.FOLDER / tiny_pickscore.FILE, tiny_pickscore.NAME), tiny_pickscore.NAME)
    del network.visual
    network = network.to(device=device, dtype=dtype)
    words = _tokenizer(_Source("tiny", str(tiny_pickscore.FOLDER)), tokenizer)
    recipe = Recipe(("pooled",), prefix or "", window=tiny_pickscore.TOKENS, full=True)
    return TextEncoder("tiny", network, lambda ids, *_: network.encode_text(ids), words, recipe)


# --------------------------------------------------------------------------------------------------------------- the encoder


@dataclass(frozen=True)
class Recipe:
    """What is done around the network. Several poolings are laid end to end, as sentence-transformers does."""

    pooling: tuple[str, ...]
    prefix: str = ""
    lower: bool = False
    window: int | None = None  # tokens that are read, marks included
    full: bool = False  # padded to the window without a mask: open_clip wants it, and SigLIP was trained so


Vectors = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""Token ids, which of them are no padding, and which are words [N, S] to vectors [N, D] of any length."""


class TextEncoder:
    """An ``Embedding``: a network with its tokenizer. ``recipe`` says how texts become vectors."""

    def __init__(self, name: str, network: Any, vectors: Vectors, tokenizer: Any, recipe: Recipe) -> None:
        self.name, self.recipe = name, recipe
        self._network, self._vectors, self._tokenizer = network.eval().requires_grad_(False), vectors, tokenizer
        # A mark of the tokenizer that somebody typed would end the text there. Not "!", which pads in some CLIPs.
        marks = sorted((m for m in tokenizer.all_special_tokens if len(m) > 1), key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, marks)) or r"(?!)")

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the network's values, the tokenizer and the recipe."""
        from pipelines.families._encoding import digest, tokenizer_digest

        dtype = str(next(self._network.parameters()).dtype)
        parts = [digest(self._network), tokenizer_digest(self._tokenizer), dtype, vars(self.recipe)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def embed(self, texts: Sequence[str]) -> Tensor:
        """[N, D] float32 of length one, on the CPU; one forward pass.

        Raises:
            UserError: the network's numbers overflow.
        """
        import torch

        prepared = [self._prepared(text) for text in texts] or [" "]  # what is embedded for no text tells the width
        padding = "max_length" if self.recipe.full else True
        limits = {"truncation": self.recipe.window is not None, "max_length": self.recipe.window}
        masks = {"return_attention_mask": True, "return_special_tokens_mask": True}
        tokens = self._tokenizer(prepared, padding=padding, **limits, **masks, return_tensors="pt")
        tokens = tokens.to(next(self._network.parameters()).device)
        mask = tokens["attention_mask"].bool()
        words = mask & ~tokens["special_tokens_mask"].bool()
        words = torch.where(words.any(dim=1, keepdim=True), words, mask)  # of a text without words, the marks
        with torch.no_grad():
            out = self._vectors(tokens["input_ids"], mask, words).float()
        if not torch.isfinite(out).all():
            bad = int((~torch.isfinite(out)).any(dim=-1).nonzero()[0])
            raise UserError(
                f"The embedding {self.name} gives no finite numbers for {prepared[bad][:80]!r}: its network overflows in "
                f"{str(next(self._network.parameters()).dtype).removeprefix('torch.')}. Load it with dtype float32."
            )
        return (out / out.norm(dim=-1, keepdim=True)).cpu()[: len(texts)]

    def cut(self, texts: Sequence[str]) -> list[str]:
        """What of each text lies beyond the window and is not read; "" where everything is."""
        if self.recipe.window is None or not texts:
            return [""] * len(texts)
        prepared = [self._prepared(text) for text in texts]
        lengths = [len(row) for row in self._tokenizer(prepared, verbose=False).input_ids]
        also = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
        kept = self._tokenizer(prepared, truncation=True, max_length=self.recipe.window, **also)
        return [
            "" if length <= self.recipe.window else text[_end(offsets, special) :].strip()
            for text, length, offsets, special in zip(
                prepared, lengths, kept["offset_mapping"], kept["special_tokens_mask"], strict=True
            )
        ]

    def _prepared(self, text: str) -> str:
        text = self.recipe.prefix + self._marks.sub(" ", text)
        return (text.lower() if self.recipe.lower else text) or " "  # some tokenizers make nothing at all of ""


def _end(offsets: Sequence[tuple[int, int]], special: Sequence[int]) -> int:
    """Where the last token that is read ends."""
    return max((end for (_, end), mark in zip(offsets, special, strict=True) if not mark), default=0)


def _vectors(network: Any, recipe: Recipe) -> Vectors:
    """How a network of Transformers is asked."""
    import torch

    def states(ids: Tensor, mask: Tensor, words: Tensor) -> Tensor:
        out = network(input_ids=ids, attention_mask=mask.long())
        return torch.cat([_pool(kind, out, mask, words) for kind in recipe.pooling], dim=-1)

    def tower(ids: Tensor, mask: Tensor, words: Tensor) -> Tensor:
        masked = {} if recipe.full else {"attention_mask": mask.long()}
        return _own_vector(network.get_text_features(input_ids=ids, **masked))

    return tower if hasattr(network, "get_text_features") else states


def _pool(kind: str, out: Any, mask: Tensor, words: Tensor) -> Tensor:
    """[N, D] from the states of the tokens; ``mask`` and ``words`` [N, S] are those that count."""
    import torch

    if kind == "pooled":
        return _own_vector(out)
    states = out.last_hidden_state.float()
    if kind == "cls":
        return states[:, 0]
    if kind == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(dim=1) - 1]
    if kind == "max":
        return states.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)
    counted = (words if kind == "words" else mask)[..., None]
    return (states * counted).sum(dim=1) / counted.sum(dim=1)


def _own_vector(out: Any) -> Tensor:
    """The vector that the model itself makes of a text: CLIP's behind the projection, where the network has one."""
    if hasattr(out, "shape"):
        return out
    found = next((v for name in ("text_embeds", "pooler_output") if (v := getattr(out, name, None)) is not None), None)
    if found is None:
        raise ValueError("it makes no vector of its own (pooling=pooled) of a text; pooling=mean would be one")
    return found


# ------------------------------------------------------------------------------------------------------------ where it is


@dataclass(frozen=True)
class _Source:
    """A folder or an id of the hub, and where in it network and tokenizer lie."""

    name: str
    where: str
    network: str = ""
    tokenizer: str = ""
    revision: str | None = None

    @property
    def local(self) -> bool:
        return Path(self.where).is_dir()


def _source(name: str, revision: str | None) -> _Source:
    path = Path(name).expanduser()
    if name == "tiny":
        from pipelines.tiny.model import checkpoint_path

        return _Source("tiny", str(checkpoint_path()), "text_encoder", "tokenizer")
    if name not in CLIPS and path.is_dir():
        return _folder(path)
    place = CLIPS.get(name, name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", place) or ("/" in name and path.parent.is_dir()):
        raise UserError(_missing(name))
    return _Source(name, place, revision=revision)


def _missing(name: str) -> str:
    names = [*CLIPS, "tiny"]
    near = difflib.get_close_matches(name, names, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return (
        f"There is no embedding {name!r} (seen from {Path.cwd()}).{meant} "
        f"An embedding is {', '.join(names)}, a folder with a text encoder, or an id of the hub (org/name)."
    )


def _folder(path: Path) -> _Source:
    whole = path.absolute()
    if (path / "model_index.json").is_file():
        return _Source(str(whole), str(whole), "text_encoder", "tokenizer")
    if (path / "modules.json").is_file():  # older sentence-transformers keep the network in a folder of its own
        inner = next((m["path"] for m in _modules(path / "modules.json") if _kind(m) == "Transformer"), "")
        return _Source(str(whole), str(whole), inner, inner)
    if path.name.startswith("text_encoder") and (path / "config.json").is_file() and not _has_tokenizer(path):
        beside = path.name.replace("text_encoder", "tokenizer")
        return _Source(str(whole), str(whole.parent), path.name, beside)
    return _Source(str(whole), str(whole))


def _has_tokenizer(path: Path) -> bool:
    return any((path / file).is_file() for file in ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer_config.json"))


def _file(source: _Source, name: str, needed: bool = True) -> Path | None:
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


def _fetch(source: _Source) -> str:
    return f'hf download {source.where} --include "*.json" "*.txt" "*.model" "*.safetensors"'


def _unreachable(source: _Source) -> str:
    called = f"The embedding {source.name!r} needs" if source.name != source.where else "There is no folder of that name, and"
    verb = ", which" if source.name != source.where else ""
    return (
        f"{called} {source.where}{verb} is not on this machine and could not be fetched from the hub. Where there is a "
        f"connection, `{_fetch(source)}` fetches it; a folder that holds a copy can be given by its path, and 'tiny', which "
        "comes with diffalign, needs no files."
    )


# -------------------------------------------------------------------------------------------------------------- what it says

_POOLINGS = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "mean_sqrt_len_tokens": "mean", "lasttoken": "last"}
"""By sentence-transformers' names. The mean over the root of the length has the mean's direction."""


def _recipe(source: _Source, config: Any, pooling: str, prefix: str | None) -> Recipe:
    """What the files say of it, and what the user says instead."""
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


def _sentence_recipe(source: _Source) -> Recipe:
    """By the files of sentence-transformers; the mean over everything where there are none."""
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


def _optional(source: _Source, name: str, modules: Sequence[Any]) -> Mapping[str, Any]:
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


def _window(said: int | None, tokenizer: Any, config: Any) -> int | None:
    """Tokens that are read, marks included: the least of what tokenizer, model and its files allow; None for any number."""
    text = getattr(config, "text_config", config)
    positions = getattr(text, "max_position_embeddings", None)
    if positions and config.model_type in ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet"):
        positions -= 2  # places 0 and 1 are for padding
    limits = [n for n in (said, tokenizer.model_max_length, positions) if n and 0 < n < 10**6]
    return min(limits, default=None)


# ------------------------------------------------------------------------------------------------------------------ loading

_BROKEN = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError)


def _config(source: _Source) -> Any:
    from transformers import AutoConfig

    from pipelines.families._quiet import quietly

    if source.local and not (Path(source.where) / source.network / "config.json").is_file():
        folder = Path(source.where) / source.network
        holds = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) if folder.is_dir() else ""
        raise UserError(f"{folder} is not a text encoder: it has no config.json. It holds: {holds or 'nothing'}.")
    try:
        with quietly():
            return AutoConfig.from_pretrained(source.where, **_place(source, source.network), trust_remote_code=False)
    except _BROKEN as error:
        raise UserError(_reason(source, error)) from error


def _place(source: _Source, subfolder: str) -> dict[str, Any]:
    return {"subfolder": subfolder, "revision": source.revision or "main", "local_files_only": source.local}


def _reason(source: _Source, error: Exception) -> str:
    if not source.local and isinstance(error, OSError):
        return _unreachable(source)
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return f"{source.name} could not be loaded as an embedding of texts: {said}"


def _is_dual(config: Any) -> bool:
    """Whether it has a tower for texts besides another, as SigLIP has."""
    return hasattr(config, "text_config") and hasattr(config, "vision_config")


def _network(source: _Source, config: Any, recipe: Recipe, dtype: torch.dtype) -> Any:
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
    except (*_BROKEN, SafetensorError) as error:
        raise UserError(_reason(source, error)) from error
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
    """Which class of Transformers reads it, and with which configuration."""
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


def _tokenizer(source: _Source, given: str | Path | None) -> Any:
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
    except _BROKEN:
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
