"""MPS (Zhang et al. 2024, arXiv 2405.14705): a picture looks at those words of its prompt that matter to what people judge by.

CLIP-H's tokens of the picture [257, D] and of the prompt [77, D], all brought into CLIP's common space, and those of a fixed
list of words, the condition, go through a small network (``look``); its first token is compared with the prompt's embedding:

    r_i = max_j <t_i, c_j>,    kept = r_i > threshold * max_i r_i
    score = exp(logit_scale) * cos(look(picture, prompt[kept])_0, prompt),    P(a before b) = sigmoid(score_a - score_b)

Where the released code says two things, this is what its own numbers were made with: the threshold is 0.3, as in both evaluation
scripts (0.01 in the module's ``forward``, and so in the README's example and in imscore), and the largest r is that of each
prompt by itself, as pictures are scored there one at a time. The module takes it from the whole batch: scores then depend on
what else is judged, and a prompt that keeps no word scores NaN. Here each keeps one at least.

Positions after the end of a prompt take part like any other, so padding is the end mark, which LAION's tokenizer pads with.
Only the model of overall preference was released. Weights: ``RE-N-Y/mpsv1``, a safe copy; the authors' own file is a pickled
module and is refused. Code under the MIT licence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_models import _clip
from reward_models._judge import DTYPES, PointwiseJudge, Preparation, check_choice, check_pixels, device_of, texts_for
from reward_models._preprocess import ShortestSide
from reward_models._weights import Source, fill, path_of, read_state
from reward_models.base import JudgeError, RewardInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "mps"
REPO, FILE = "RE-N-Y/mpsv1", "model.safetensors"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, "
    "quantity, attributes, position, number, location, word, things."
)
"""What "overall" stands for: part of the model, which was trained with these words."""
THRESHOLD = 0.3


# ----------------------------------------------------------------------------------------------------------------- network


@dataclass(frozen=True)
class Cross:
    """The network behind CLIP by its numbers; it is as wide as CLIP's common space."""

    layers: int = 4
    heads: int = 16
    head: int = 64


CROSS = Cross()


def build(architecture: _clip.Architecture, cross: Cross) -> tuple[nn.Module, nn.Module]:
    """CLIP, and the weights of the network behind it under the names of the released file."""
    from torch import nn

    def residual(**parts: nn.Module) -> nn.Module:
        return nn.ModuleDict({"fn": nn.ModuleDict({"norm": nn.LayerNorm(width), **parts})})

    def linear(inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs, bias=False)

    def layer() -> nn.Module:
        across = residual(
            to_q=linear(width, queries),
            to_kv=linear(width, 2 * cross.head),
            to_out=linear(queries, width),
            ff=nn.ModuleDict({"0": linear(width, 2 * inner), "2": linear(inner, width)}),
        )
        within = residual(
            rotary_emb=_frequencies(cross.head),
            fused_attn_ff_proj=linear(width, queries + 2 * cross.head + 2 * inner),
            attn_out=linear(queries, width),
            ff_out=nn.ModuleDict({"1": linear(inner, width)}),
        )
        return nn.ModuleList([across, within])

    width, queries, inner = architecture.projection, cross.heads * cross.head, 4 * architecture.projection
    net = nn.ModuleDict({"layers": nn.ModuleList(layer() for _ in range(cross.layers))})
    return _clip.build(architecture).requires_grad_(False), net.eval().requires_grad_(False)


def _frequencies(head: int) -> nn.Module:
    """Rotary frequencies (Su et al. 2021, arXiv 2104.09864); the released file keeps them, too."""
    import torch
    from torch import nn

    holder = nn.Module()
    holder.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, head, 2) / head))
    return holder


def look(net: nn.Module, picture: Tensor, prompt: Tensor, kept: Tensor) -> Tensor:
    """[N, I, D]: tokens of the picture [N, I, D] after they looked at those of the prompt [N, J, D] that are ``kept`` [N, J].

    Each layer adds two blocks as PaLM has them (Chowdhery et al. 2022, arXiv 2204.02311): attention and feed-forward side by
    side after one norm, and one key and one value for all heads. The prompt's tokens are not normalised, the result neither.
    """
    for across, within in net["layers"]:
        picture = picture + _across(across["fn"], picture, prompt, kept)
        picture = picture + _within(within["fn"], picture)
    return picture


def _across(part: nn.Module, picture: Tensor, prompt: Tensor, kept: Tensor) -> Tensor:
    x = part["norm"](picture)
    key, value = part["to_kv"](prompt).chunk(2, dim=-1)
    seen = _attend(_heads(part["to_q"](x), key.shape[-1]), key, value, kept)
    return part["to_out"](seen) + part["ff"]["2"](_swiglu(part["ff"]["0"](x)))


def _within(part: nn.Module, picture: Tensor) -> Tensor:
    frequencies = part["rotary_emb"].inv_freq
    head, queries, inner = 2 * len(frequencies), part["attn_out"].in_features, part["ff_out"]["1"].in_features
    x = part["fused_attn_ff_proj"](part["norm"](picture))
    query, key, value, forward = x.split((queries, head, head, 2 * inner), dim=-1)
    seen = _attend(_rotated(_heads(query, head), frequencies), _rotated(key, frequencies), value)
    return part["attn_out"](seen) + part["ff_out"]["1"](_swiglu(forward))


def _heads(x: Tensor, head: int) -> Tensor:
    """[N, I, H * head] as [N, H, I, head]."""
    return x.unflatten(-1, (-1, head)).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, kept: Tensor | None = None) -> Tensor:
    """[N, I, H * head] for queries [N, H, I, head], and keys and values [N, J, head] that all heads share."""
    from torch.nn.functional import scaled_dot_product_attention

    key, value = (x[:, None].expand(-1, query.shape[1], -1, -1) for x in (key, value))
    mask = None if kept is None else kept[:, None, None, :]
    return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def _rotated(x: Tensor, frequencies: Tensor) -> Tensor:
    """[..., I, head] turned by its position: feature k together with feature k + head / 2."""
    import torch

    turns = torch.arange(x.shape[-2], device=x.device).to(frequencies)[:, None] * frequencies
    cos, sin = turns.cos(), turns.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _swiglu(x: Tensor) -> Tensor:
    """Shazeer 2020, arXiv 2002.05202; the gate is the second half."""
    from torch.nn.functional import silu

    x, gate = x.chunk(2, dim=-1)
    return silu(gate) * x


# ------------------------------------------------------------------------------------------------------------------ layout


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights under the names of the two networks of ``build``: the safe copy's, or what ``state_dict()`` of the authors'
    module gives.
    """
    clip: dict[str, Tensor] = {}
    cross: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.removeprefix("mps.")
        if name.startswith("cross_model."):
            cross[name.removeprefix("cross_model.")] = value
        elif not name.endswith("position_ids"):  # a buffer of old files
            clip[name.removeprefix("model.")] = value
    return clip, cross


# ------------------------------------------------------------------------------------------------------------------- judge


class MPS(PointwiseJudge):
    """One look at a picture for each prompt, at which all tokens of both are needed."""

    sharpness = 1.0

    def __init__(
        self,
        nets: Sequence[nn.Module],
        tokenise: _clip.Tokenise,
        device: Any = "cpu",
        dtype: Any = None,
        threshold: float = THRESHOLD,
        made_of: Mapping[str, Any] | None = None,
        fast: bool = False,
    ) -> None:
        clip, cross = nets
        self._scale = float(clip.logit_scale.detach().exp())
        self._clip, self._cross = clip.to(device=device, dtype=dtype), cross.to(device)
        self._tokenise, self._device, self._threshold = tokenise, device, threshold
        self.preparation = Preparation(ShortestSide(crop="floor", convert_first=True), fast)
        self.made_of = dict(made_of or {})
        self.info = RewardInfo(
            name=NAME,
            needs_prompt=True,
            range=(-self._scale, self._scale),
            licence="MIT (code)",
            differentiable=True,
            description="which picture people would prefer overall: CLIP-H, whose picture looks at the words that matter",
        )

    def score_prepared(self, prepared: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        import torch

        return self._judge(torch.stack(list(prepared)), prompts).cpu()

    def n_cut(self, prompts: Sequence[str]) -> int:
        return self._tokenise.n_cut(prompts)

    def differentiable_score(self, pixels: Tensor, prompts: str | Sequence[str] | None = None) -> Tensor:
        return self._judge(self.preparation.how.grad(check_pixels(pixels)), texts_for(self, len(pixels), prompts))

    def _judge(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        import torch

        different = list(dict.fromkeys(prompts))
        place = {text: i for i, text in enumerate(different)}
        rows = torch.tensor([place[p] for p in prompts], dtype=torch.long, device=self._device)
        with torch.no_grad():
            words, whole = self._read(different)
            kept = self._kept(words)
        looked = look(self._cross, self._see(pixels), words[rows], kept[rows])[:, 0]
        return self._scale * (_clip.unit(looked) * _clip.unit(whole)[rows]).sum(dim=-1)

    def _see(self, pixels: Tensor) -> Tensor:
        """[N, I, D] float32: the picture's tokens, without the norm that CLIP's own embedding has before the projection."""
        pixels = pixels.to(self._clip.vision_model.embeddings.class_embedding)
        return self._clip.visual_projection(self._clip.vision_model(pixel_values=pixels).last_hidden_state).float()

    def _read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Every token [N, J, D], and CLIP's embedding of the text [N, D], float32."""
        out = self._clip.text_model(input_ids=self._tokenise(texts).to(self._device))
        return tuple(self._clip.text_projection(x).float() for x in (out.last_hidden_state, out.pooler_output))

    def _kept(self, words: Tensor) -> Tensor:
        """[N, J]: the tokens of each prompt that are like a token of the condition, its marks and padding among them."""
        likeness = (words @ self._condition.T).amax(dim=-1)
        return likeness / likeness.amax(dim=-1, keepdim=True) > self._threshold

    @cached_property
    def _condition(self) -> Tensor:
        return self._read([CONDITION])[0][0]


def load(
    weights: str | Path | None = None,
    *,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    threshold: float = THRESHOLD,
    device: str | None = None,
    dtype: str = "float32",
    preprocess: str = "exact",
) -> MPS:
    """The judge.

    Args:
        weights: a file, a folder with ``model.safetensors``, or another repository of the hub; fetched if not given.
        tokenizer: a folder or hub id of a CLIP tokenizer that pads with the end mark; that of LAION's CLIP-H if not given.
        threshold: a token of the prompt counts if its likeness to the condition is above this share of the largest.
        device: the accelerator if there is one, else the CPU, if not given.
        dtype: what the towers compute in; the network behind them computes in float32 in any case.
        preprocess: ``exact``, or ``fast`` through uint8 tensors, up to one grey level off.

    Raises:
        JudgeError: weights that are not here or of another model, a threshold, tokenizer or precision that cannot be.
    """
    import torch

    check_choice("dtype", dtype, DTYPES)
    check_choice("preprocess", preprocess, ("exact", "fast"))
    _check_threshold(threshold)
    file = path_of(Source.of(REPO, FILE, revision, weights), NAME)
    nets = build(_clip.VIT_H_14, CROSS)
    for net, part in zip(nets, split(read_state(file, NAME)), strict=True):
        fill(net, part, NAME)
    tokenise = _clip.transformers_tokens(tokenizer or TOKENIZER, NAME)
    _check_padding(tokenise)
    made_of = {"weights": file, "tokenizer": tokenise.identity, "dtype": dtype, "threshold": threshold}
    place = device_of(device)
    return MPS(nets, tokenise, place, getattr(torch, dtype), threshold, made_of, preprocess == "fast")


def _check_threshold(threshold: Any) -> None:
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not (number and 0 <= threshold < 1):
        raise JudgeError(
            f"the threshold of the judge {NAME!r} is a share of the largest likeness, from 0 to below 1 (at 1 no word would be "
            f"left); got {threshold!r}. The released evaluation uses 0.3, the released module 0.01"
        )


def _check_padding(tokenise: _clip.Tokenise) -> None:
    """Raises JudgeError if an empty prompt is padded with something else than its end mark."""
    _, end, *padding = tokenise([""])[0].tolist()
    other = [token for token in padding if token != end]
    if other:
        raise JudgeError(
            f"the tokenizer of the judge {NAME!r} pads with token {other[0]}, where the model was trained with the end mark "
            f"({end}) and reads every position; that of {TOKENIZER} is right"
        )
