"""Distance in meaning between a rewrite and its prompt: embeddings of texts, and the cosine distance between them.

    d(x, y) = 1 - cos(e(x), e(y)),    in [0, 2]

Sem-DPO (arXiv 2507.20133) weighs a pair by exp(-alpha * d) of its prompt and the preferred rewrite, and reports the same distance
as drift. Which embedding ``e`` is, is the user's choice: CLIP's text tower, the miniature one of the tiny world, or any encoder
that Transformers reads, sentence embeddings among them. A CLIP reads 77 tokens: what lies beyond them has no part in the
distance; ``cut`` returns it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from diffalign.errors import UserError
from pipelines.embedding_files import (
    BROKEN,
    Source,
    find,
    load_network,
    load_tokenizer,
    read_config,
    read_recipe,
    reason,
    window_of,
)
from pipelines.progress import Progress
from pipelines.text_encoders import Recipe, TextEncoder, vectors_of
from reward_models._judge import DTYPES, device_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TINY = "pickscore"
"""Meaning of ``tiny``: the text tower of the miniature PickScore, or, by one of ``POOLINGS``, the tiny checkpoint's text encoder.
The first tells a changed colour, shape or size from added words of style best."""
POOLINGS = ("pooled", "mean", "words", "cls", "max", "last")
"""The model's own sentence vector (behind CLIP's projection, if there is one); or of the last hidden states the mean, the mean
without start and end marks, the first, the largest of each number, the last."""
BATCH = 64


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
        """The end of each text that lies beyond the window and is not read; "" where there is none."""
        ...


def distance(
    embedding: Embedding,
    prompts: Sequence[str],
    rewrites: Sequence[str],
    batch_size: int = BATCH,
    progress: Progress | None = None,
) -> Tensor:
    """[N] float32 in [0, 2]: cosine distance of each prompt and its rewrite, exactly 0 where they are the same text.

    Each different text is embedded once. ``progress`` is called with ("embedding", texts done, texts in all).
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
    source = find(str(name), revision)
    config = read_config(source)
    recipe = read_recipe(source, config, pooling, prefix)
    words = load_tokenizer(source, tokenizer)
    network = load_network(source, config, recipe, place["dtype"]).to(place["device"])
    recipe = replace(recipe, window=window_of(recipe.window, words, config))
    found = TextEncoder(source.name, network, vectors_of(network, recipe), words, recipe)
    try:
        found.embed(["a"])
    except BROKEN as error:
        raise UserError(reason(source, error)) from error
    return found


def _tiny_pickscore(prefix: str | None, tokenizer: str | Path | None, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """The text tower of the miniature PickScore, which open_clip runs."""
    from reward_models import tiny_pickscore
    from reward_models._weights import fill, read_state

    network = tiny_pickscore.build()
    fill(network, read_state(tiny_pickscore.FOLDER / tiny_pickscore.FILE, tiny_pickscore.NAME), tiny_pickscore.NAME)
    del network.visual
    network = network.to(device=device, dtype=dtype)
    words = load_tokenizer(Source("tiny", str(tiny_pickscore.FOLDER)), tokenizer)
    recipe = Recipe(("pooled",), prefix or "", window=tiny_pickscore.TOKENS, full=True)
    return TextEncoder("tiny", network, lambda ids, *_: network.encode_text(ids), words, recipe)
