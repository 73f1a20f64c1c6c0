"""A network and its tokenizer as an embedding of texts: truncation, masks, pooling and normalisation."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from diffalign.digests import digest_of
from diffalign.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """The processing around the network. Several poolings are laid end to end, as sentence-transformers does."""

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
        return digest_of(parts)

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
        """The end of each text that lies beyond the window and is not read; "" where there is none."""
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
    """End of the last token that is read, as a position in the text."""
    return max((end for (_, end), mark in zip(offsets, special, strict=True) if not mark), default=0)


def vectors_of(network: Any, recipe: Recipe) -> Vectors:
    """The function that computes a network's vectors by a recipe."""
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
