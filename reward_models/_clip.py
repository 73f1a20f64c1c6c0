"""CLIP's two towers on today's Transformers, from weights in either layout: what seven judges have in common.

Embeddings are L2-normalised and compared in float32 whatever the towers compute in: at a cosine near 0.28 a bfloat16 step is
0.002, which is as much as most fine-tuning gains.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from reward_models._dual import ClipEncoder
from reward_models._judge import DTYPES, check_choice, device_of
from reward_models._preprocess import Preprocess
from reward_models._weights import fill, read_state, read_tokenizer, tokenizer_digest
from reward_models.base import JudgeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TOKENS = 77


@dataclass(frozen=True)
class Tokenise:
    """Prompts to the numbers of their tokens [N, length], without the tokenizer's own marks that somebody typed."""

    encode: Callable[[list[str]], Tensor]
    count: Callable[[str], int]
    """Tokens of a prompt, start and end included, before it is cut."""
    length: int
    identity: str
    """What decides the tokens, for the fingerprints of judges."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self.encode([plain(text) for text in texts])

    def n_cut(self, texts: Sequence[str]) -> int:
        """How many are longer than ``length`` and are not read to their end."""
        return sum(self.count(plain(text)) > self.length for text in texts)


@dataclass(frozen=True)
class Architecture:
    """A CLIP by its numbers: (width, MLP width, layers, heads) of each tower."""

    vision: tuple[int, int, int, int]
    text: tuple[int, int, int, int]
    projection: int
    activation: str  # "quick_gelu" in OpenAI's, "gelu" in LAION's: the wrong one loads and scores differently
    patch: int = 14
    size: int = 224
    vocabulary: int = 49408
    tokens: int = TOKENS


VIT_L_14 = Architecture((1024, 4096, 24, 16), (768, 3072, 12, 12), 768, "quick_gelu")
"""OpenAI's, 428 M parameters (Radford et al. 2021, arXiv 2103.00020)."""
VIT_H_14 = Architecture((1280, 5120, 32, 16), (1024, 4096, 24, 16), 1024, "gelu")
"""LAION-2B's, 986 M parameters: also the body of PickScore, HPSv2, HPSv2.1 and MPS."""


def build(architecture: Architecture) -> Any:
    """Transformers' ``CLIPModel`` of that shape, every number stated: its defaults are those of another model."""
    from transformers import CLIPConfig, CLIPModel

    def tower(numbers: tuple[int, int, int, int]) -> dict[str, Any]:
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        shared = {"hidden_act": architecture.activation, "projection_dim": architecture.projection, "layer_norm_eps": 1e-5}
        return {**dict(zip(names, numbers, strict=True)), **shared}

    end = architecture.vocabulary - 1
    text = {"vocab_size": architecture.vocabulary, "max_position_embeddings": architecture.tokens}
    text |= {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    config = CLIPConfig(
        text_config=tower(architecture.text) | text,
        vision_config=tower(architecture.vision) | {"image_size": architecture.size, "patch_size": architecture.patch},
        projection_dim=architecture.projection,
    )
    return CLIPModel(config).eval()


# ------------------------------------------------------------------------------------------------------------------ layout

_PLACES = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.proj": "visual_projection.weight",
}
_NORMS = {"ln_final": "text_model.final_layer_norm", "visual.ln_pre": "vision_model.pre_layrnorm"}
_NORMS["visual.ln_post"] = "vision_model.post_layernorm"
_INSIDE = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_INSIDE["attn.out_proj"] = "self_attn.out_proj"
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")
_BUFFERS = {"attn_mask"}
"""Old files hold this buffer; it is no weight."""


def is_open_clip(state: Mapping[str, Any]) -> bool:
    """Whether the names are those of OpenAI's and open_clip's layout."""
    return "token_embedding.weight" in state


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in open_clip's layout under the names of Transformers: fused attention split, projections transposed.

    Raises:
        JudgeError: a name that such a file does not have.
    """
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if name not in _BUFFERS:
            out.update(_renamed(name, value))
    return out


def _renamed(name: str, value: Tensor) -> dict[str, Tensor]:
    if name in _PLACES:
        projection = name in ("text_projection", "visual.proj")
        return {_PLACES[name]: value.T.contiguous() if projection else value}
    stem, _, kind = name.rpartition(".")
    if stem in _NORMS:
        return {f"{_NORMS[stem]}.{kind}": value}
    block = _BLOCK.fullmatch(name)
    if block is None:
        raise JudgeError(f"a CLIP in open_clip's layout has no weight called {name!r}")
    visual, number, part, kind = block.groups()
    place = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}"
    if part == "attn.in_proj":
        return {f"{place}.self_attn.{p}_proj.{kind}": v for p, v in zip("qkv", value.chunk(3), strict=True)}
    return {f"{place}.{_INSIDE[part]}.{kind}": value}


def load_model(architecture: Architecture, file: Path, judge: str) -> Any:
    """``CLIPModel`` in float32 from a file in either layout; nothing may be missing or left over.

    Raises:
        JudgeError: the weights cannot be read safely, or are those of another model.
    """
    state = {name.removeprefix("model."): value for name, value in read_state(file, judge).items()}
    state = to_transformers(state) if is_open_clip(state) else state
    model = build(architecture)
    fill(model, {name: value for name, value in state.items() if not name.endswith("position_ids")}, judge)  # old files' buffer
    return model


# ------------------------------------------------------------------------------------------------------------------- words

_SPECIAL = re.compile(r"<\|(?:startoftext|endoftext)\|>|<(?:start|end)_of_text>")
"""Marks of Transformers' and of open_clip's tokenizer."""


def plain(text: str) -> str:
    """The prompt without the tokenizer's own marks: ``<|endoftext|>`` typed into a prompt would end it there."""
    return _SPECIAL.sub(" ", text)


def open_clip_tokens() -> Tokenise:
    """OpenAI's and open_clip's tokenizer: mends curly quotes and HTML entities, pads with 0. For CLIP, LAION and HPSv2."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer(context_length=TOKENS)
    identity = f"open_clip {metadata.version('open_clip_torch')}"  # which brings the vocabulary along
    return Tokenise(tokenizer, lambda text: len(tokenizer.encode(text)) + 2, TOKENS, identity)


def transformers_tokens(folder: str | Path, judge: str, length: int = TOKENS) -> Tokenise:
    """Transformers' tokenizer, which leaves quotes as they are, and pads with the end mark. For PickScore and MPS.

    Raises:
        JudgeError: ``folder``, which may also be an id of the hub, has none.
    """
    from transformers import CLIPTokenizer

    tokenizer = read_tokenizer(CLIPTokenizer, folder, judge)
    how = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}

    def count(text: str) -> int:
        return len(tokenizer(text, verbose=False).input_ids)  # it would warn of errors, but what is long is cut

    return Tokenise(lambda texts: tokenizer(texts, **how).input_ids, count, length, tokenizer_digest(tokenizer))


# ------------------------------------------------------------------------------------------------------------------ towers


class Towers:
    """Pictures and words to unit vectors in one space."""

    def __init__(
        self,
        model: Any,
        tokenise: Callable[[Sequence[str]], Tensor],
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self._model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self._tokenise, self._device = tokenise, device

    @property
    def scale(self) -> float:
        """exp of the learnt temperature: about 100."""
        return float(self._model.logit_scale.detach().float().exp())

    def n_cut(self, prompts: Sequence[str]) -> int | None:
        """How many prompts are too long to be read to their end; None where the tokenizer does not tell."""
        return self._tokenise.n_cut(prompts) if isinstance(self._tokenise, Tokenise) else None

    def images(self, pixels: Tensor) -> Tensor:
        """Preprocessed [N, 3, H, W] to float32 [N, D] of length one; gradients pass."""
        weights = self._model.vision_model.embeddings.class_embedding
        return unit(features(self._model.get_image_features(pixel_values=pixels.to(weights))))

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """[N, D] of length one, float32. Each different prompt is encoded once."""
        import torch

        different = list(dict.fromkeys(prompts))
        with torch.no_grad():
            out = unit(self._encode_texts(self._tokenise(different).to(self._device)))
        place = {text: i for i, text in enumerate(different)}
        return out[torch.tensor([place[p] for p in prompts], dtype=torch.long, device=out.device)]

    def _encode_texts(self, tokens: Tensor) -> Tensor:
        return features(self._model.get_text_features(input_ids=tokens))


_LOADED: WeakValueDictionary[tuple, ClipEncoder] = WeakValueDictionary()


def load_encoder(
    architecture: Architecture,
    file: Path,
    judge: str,
    how: Preprocess,
    *,
    tokenizer: str | Path | None = None,
    device: str | None = None,
    dtype: str = "float32",
    preprocess: str = "exact",
) -> ClipEncoder:
    """Towers behind their preprocessing; as long as somebody holds it, the same object for the same arguments, so that judges
    on one CLIP keep one copy of it and share its forward pass.

    ``tokenizer``: a folder or hub id for Transformers' tokenizer; None for open_clip's.

    Raises:
        JudgeError: weights of another model, a preprocessing or precision that does not exist.
    """
    check_choice("preprocess", preprocess, ("exact", "fast"))
    check_choice("dtype", dtype, DTYPES)
    place, state = device_of(device), file.stat()
    words = open_clip_tokens() if tokenizer is None else transformers_tokens(tokenizer, judge, architecture.tokens)
    key = (architecture, file, state.st_size, state.st_mtime_ns, how, words.identity, str(place), dtype, preprocess)
    found = _LOADED.get(key)
    if found is None:
        import torch

        towers = Towers(load_model(architecture, file, judge), words, place, getattr(torch, dtype))
        made_of = {"weights": file, "tokenizer": words.identity, "dtype": dtype}
        found = _LOADED[key] = ClipEncoder(towers, how, made_of, fast=preprocess == "fast")
    return found


class OpenClipTowers(Towers):
    """The same for a model of open_clip, of whatever architecture."""

    def images(self, pixels: Tensor) -> Tensor:
        return unit(self._model.encode_image(pixels.to(next(self._model.parameters()))))

    def _encode_texts(self, tokens: Tensor) -> Tensor:
        return self._model.encode_text(tokens)


def features(out: Any) -> Tensor:
    """The embedding in what Transformers returns: a tensor up to version 4, an output with ``pooler_output`` from 5."""
    return out if hasattr(out, "shape") else out.pooler_output


def unit(vectors: Tensor) -> Tensor:
    """Float32, each of length one."""
    vectors = vectors.float()
    return vectors / vectors.norm(dim=-1, keepdim=True)
