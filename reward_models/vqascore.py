"""VQAScore (Lin et al. 2024, arXiv 2404.01291): how surely CLIP-FlanT5 says "Yes" when asked whether a picture shows the prompt.

    score = exp(mean(log p("Yes"), log p("</s>")))        from the question about the picture, in [0, 1]

The geometric mean over the label's tokens, of which the end mark is one: the original takes the label's mean loss. The picture,
padded to a square, goes through CLIP ViT-L/14 at 336 pixels up to the layer before the last, without the class token; two
linear layers turn its 576 patches into words of T5, which stand in the question where ``<image>`` stands. What comes before
and what comes after are tokenised by themselves, so that each ends with ``</s>``.

Of T5: it overflows float16. FLAN's output layer is not its input table, though Transformers 5 makes them one unless a file says
otherwise. Its answers are of 32128 words, of which the original keeps those of the tokenizer, 32100; so does this.

Weights: ``zhiqiulin/clip-flant5-xxl``, 22.9 GB, or ``-xl``, 6.3 GB, Apache-2.0, which hold CLIP's part, too; tokenizer
``google/flan-t5-xxl`` or ``-xl``. The original package dropped them in 3.1, and 3.0 does not import on today's Transformers.
Published for ``xxl``, GenAI-Bench: SD 2.1 0.67, SDXL 0.72, DALL-E 3 0.78. Not comparable with ``vlm-yes-no``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_models._judge import PointwiseJudge, Preparation, check_choice, check_pixels, device_of, texts_for
from reward_models._preprocess import MEAN, ShortestSide
from reward_models._shards import files_of, put, tensors
from reward_models._weights import tokenizer_digest
from reward_models.base import JudgeError, RewardInfo

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

NAME = "vqascore"
REPOS = {"xxl": "zhiqiulin/clip-flant5-xxl", "xl": "zhiqiulin/clip-flant5-xl"}
TOKENIZERS = {"xxl": "google/flan-t5-xxl", "xl": "google/flan-t5-xl"}
CLIP = "openai/clip-vit-large-patch14-336"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
BEFORE = f"{SYSTEM} USER: "
AFTER = '\nDoes this figure show "{}"? Please answer yes or no. ASSISTANT: '
"""The conversation that CLIP-FlanT5 was trained with; the picture stands between the two."""
ANSWER = "Yes"
TOKENS = 2048
"""The question's, the picture counted as one."""
PRECISIONS = ("bfloat16", "float32")


@dataclass(frozen=True)
class Shape:
    """(width, MLP width, layers, heads) of CLIP's picture tower and of T5, each half of which has so many layers."""

    text: tuple[int, int, int, int]
    vision: tuple[int, int, int, int] = (1024, 4096, 24, 16)
    head: int = 64  # width of T5's heads, which do not share its width among them
    patch: int = 14
    size: int = 336
    vocabulary: int = 32128


SHAPES = {"xxl": Shape((4096, 10240, 24, 64)), "xl": Shape((2048, 5120, 24, 32))}


@dataclass(frozen=True)
class PaddedSquare:
    """Pad to a square with CLIP's mean colour, the picture in the middle, then resize: as LLaVA 1.5 does, and CLIP-FlanT5."""

    size: int = 336
    colour: tuple[int, int, int] = tuple(int(255 * mean) for mean in MEAN)  # cut off, not rounded: (122, 116, 104)

    def exact(self, image: Image.Image) -> Tensor:
        """One picture to [3, size, size]."""
        from PIL import Image

        image, side = image.convert("RGB"), max(image.size)
        square = Image.new("RGB", (side, side), self.colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return self._resized.exact(square)

    def fast(self, pixels: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] to [N, 3, size, size]; at most one grey level off ``exact``, in few values."""
        return self._resized.fast(self._padded(pixels, self.colour))

    def grad(self, pixels: Tensor) -> Tensor:
        """float [N, 3, H, W] in [0, 1] to [N, 3, size, size]; gradients reach the pixels."""
        return self._resized.grad(self._padded(pixels, [value / 255 for value in self.colour]))

    @property
    def _resized(self) -> ShortestSide:
        return ShortestSide(self.size, convert_first=True)  # a square has nothing to crop

    def _padded(self, pixels: Tensor, colour: Sequence[float]) -> Tensor:
        height, width = pixels.shape[-2:]
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        square = pixels.new_tensor(colour).view(1, 3, 1, 1).repeat(len(pixels), 1, side, side)
        square[..., top : top + height, left : left + width] = pixels
        return square


# ------------------------------------------------------------------------------------------------------------------ network


def build(shape: Shape) -> nn.ModuleDict:
    """``t5``, ``vision`` and ``projector``, without weights: their parameters are on the ``meta`` device."""
    from accelerate import init_empty_weights
    from torch import nn
    from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

    width, inner, layers, heads = shape.text
    text = T5Config(
        vocab_size=shape.vocabulary,
        d_model=width,
        d_ff=inner,
        d_kv=shape.head,
        num_layers=layers,
        num_heads=heads,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,  # read by Transformers 5 as: do not scale what the output layer reads
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    seen, seen_inner, seen_layers, seen_heads = shape.vision
    vision = CLIPVisionConfig(
        hidden_size=seen,
        intermediate_size=seen_inner,
        num_hidden_layers=seen_layers,
        num_attention_heads=seen_heads,
        image_size=shape.size,
        patch_size=shape.patch,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )
    with init_empty_weights():
        t5 = T5ForConditionalGeneration(text)
        projector = nn.Sequential(nn.Linear(seen, width), nn.GELU(), nn.Linear(width, width))
        nets = nn.ModuleDict({"t5": t5, "vision": CLIPVisionModel(vision), "projector": projector})
    t5.set_input_embeddings(t5.shared)  # one table for questions and answers, in a file under one name or several
    return nets.eval().requires_grad_(False)


_T5 = ("shared.", "encoder.", "decoder.", "lm_head.")
_TOWER = re.compile(r"(?:model\.)?vision_tower\.(?:vision_tower\.)?vision_model\.")
_UNUSED = ("position_ids", "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight")
"""A buffer of old files, and a weight that old T5s carry along."""


def renamed(weights: Iterable[tuple[str, Tensor]], nets: nn.ModuleDict) -> Iterator[tuple[str, Tensor]]:
    """The released files' weights under the names of ``build``."""
    inside = "vision_model." if hasattr(nets["vision"], "vision_model") else ""  # which Transformers had once
    for name, value in weights:
        plain = name.removeprefix("model.")
        if name.endswith(_UNUSED):
            continue
        if plain == "embed_tokens.weight":  # the input table by the name of its user
            yield "t5.shared.weight", value
        elif plain.startswith(_T5):
            yield f"t5.{plain}", value
        elif plain.startswith("mm_projector."):
            yield f"projector.{plain.removeprefix('mm_projector.')}", value
        else:
            yield f"vision.{_TOWER.sub(inside, name)}", value


def _clip_only(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The picture tower of a whole CLIP, named as inside CLIP-FlanT5."""
    return ((f"vision_tower.{name}", value) for name, value in weights if name.startswith("vision_model."))


# -------------------------------------------------------------------------------------------------------------------- judge


class VQAScore(PointwiseJudge):
    """One look at a picture for each prompt; ``nets`` as ``build`` makes them, with their weights."""

    def __init__(
        self, nets: Mapping[str, nn.Module], tokenizer: Any, made_of: Mapping[str, Any] | None = None, fast: bool = False
    ) -> None:
        self._t5, self._vision, self._projector = nets["t5"], nets["vision"], nets["projector"]
        self._tokenizer = tokenizer
        self._before, self._label = self._ids(BEFORE), self._ids(ANSWER)
        self.preparation = Preparation(PaddedSquare(self._vision.config.image_size), fast)
        self.made_of = dict(made_of or {})
        self.info = RewardInfo(
            name=NAME,
            needs_prompt=True,
            range=(0.0, 1.0),
            differentiable=True,
            description='how surely CLIP-FlanT5 answers "Yes" when asked whether the picture shows the prompt',
        )

    def score_prepared(self, prepared: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        import torch

        return self._judge(torch.stack(list(prepared)), prompts).cpu()

    def differentiable_score(self, pixels: Tensor, prompts: str | Sequence[str] | None = None) -> Tensor:
        return self._judge(self.preparation.how.grad(check_pixels(pixels)), texts_for(self, len(pixels), prompts))

    def _judge(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        import torch

        rows = [self._question(seen, prompt) for seen, prompt in zip(self._words(pixels), prompts, strict=True)]
        label = torch.tensor(self._label, device=rows[0].device).expand(len(rows), -1)
        start = label.new_full((len(rows), 1), self._t5.config.decoder_start_token_id)
        logits = self._t5(
            inputs_embeds=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            attention_mask=torch.nn.utils.rnn.pad_sequence([label.new_ones(len(row)) for row in rows], batch_first=True),
            decoder_input_ids=torch.cat([start, label[:, :-1]], dim=1),
            use_cache=False,
        ).logits
        chances = logits[..., : len(self._tokenizer)].float().log_softmax(-1)
        return chances.gather(-1, label[..., None])[..., 0].mean(-1).exp()

    def _words(self, pixels: Tensor) -> Tensor:
        """[n, patches, T5's width]: the pictures as T5 reads them."""
        weight = self._projector[0].weight
        layers = self._vision(pixel_values=pixels.to(weight), output_hidden_states=True).hidden_states
        return self._projector(layers[-2][:, 1:])  # without the class token

    def _question(self, seen: Tensor, prompt: str) -> Tensor:
        """[length, T5's width]: the question about one picture."""
        import torch

        after = self._ids(AFTER.replace("{}", _plain(prompt)))[: TOKENS - len(self._before) - 1]
        before, after = (self._t5.shared(torch.tensor(ids, device=seen.device)) for ids in (self._before, after))
        return torch.cat([before, seen, after])

    def _ids(self, text: str) -> list[int]:
        # with the end mark; it would warn beyond 512 tokens, which T5 can read, as its positions are relative
        return self._tokenizer(text, verbose=False).input_ids


_MARKS = re.compile(r"</s>|<pad>|<unk>|<extra_id_\d+>")


def _plain(prompt: str) -> str:
    """The prompt without the tokenizer's own marks."""
    return _MARKS.sub(" ", prompt)


def load(
    weights: str | Path | None = None,
    *,
    size: str = "xxl",
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    vision: str | Path | None = None,
    device: str | None = None,
    dtype: str = "bfloat16",
    preprocess: str = "exact",
) -> VQAScore:
    """The judge.

    Args:
        weights: a folder, a file or index in it, or another repository of the hub; fetched if not given.
        size: ``xxl``, the paper's, 11 billion parameters, or ``xl``, 3 billion.
        tokenizer: a folder or hub id of T5's tokenizer; that of FLAN-T5 of this size if not given.
        vision: where CLIP's picture tower is, should the weights not hold it; OpenAI's repository if not given.
        device: the accelerator if there is one, else the CPU, if not given.
        dtype: ``bfloat16`` as in the original, or ``float32``; the answer's probability is float32 in any case.
        preprocess: ``exact``, or ``fast`` through uint8 tensors, up to one grey level off.

    Raises:
        JudgeError: float16, weights that are not here or those of another network, ...
    """
    import torch

    if dtype == "float16":
        raise JudgeError(f"the judge {NAME!r} cannot compute in float16, which T5 overflows; use dtype=bfloat16 or float32")
    check_choice("dtype", dtype, PRECISIONS)
    check_choice("size", size, tuple(SHAPES))
    check_choice("preprocess", preprocess, ("exact", "fast"))
    words = _tokenizer(str(tokenizer or TOKENIZERS[size]))  # first, as the weights take minutes
    files, nets = files_of(REPOS[size], NAME, revision, weights), build(SHAPES[size])
    place, precision = device_of(device), getattr(torch, dtype)
    missing = put(nets, renamed(tensors(files, NAME), nets), NAME, place, precision)
    if missing and all(name.startswith("vision.") for name in missing):
        files += (clip := files_of(CLIP, NAME, weights=vision))
        missing = put(nets, renamed(_clip_only(tensors(clip, NAME)), nets), NAME, place, precision)
    if missing:
        raise JudgeError(
            f"the weights of the judge {NAME!r} are not those of its network: {len(missing)} are missing "
            f"({', '.join(missing[:3])})"
        )
    made_of = {**{f"weights {i}": file for i, file in enumerate(files)}, "tokenizer": tokenizer_digest(words)}
    return VQAScore(nets.to(place), words, {**made_of, "dtype": dtype}, preprocess == "fast")


def _tokenizer(where: str) -> Any:
    """T5's tokenizer. Where it finds no file, Transformers 5 may make one that knows no word, and say nothing."""
    from transformers import T5Tokenizer

    try:
        found = T5Tokenizer.from_pretrained(where)
        known = found.unk_token_id not in found(ANSWER).input_ids
    except OSError:
        known = False
    if not known:
        raise JudgeError(
            f"the judge {NAME!r} needs T5's tokenizer from {where}, which is not on this machine and could not be fetched. Where "
            f"there is a connection, `hf download {where} --include 'tokenizer*'` fetches it; a folder that you have is used by "
            f"tokenizer=PATH (in the shell --judge-options {NAME}.tokenizer=PATH)"
        )
    return found
