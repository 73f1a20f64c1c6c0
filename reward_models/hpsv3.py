"""HPSv3 (Ma et al. 2025, arXiv 2508.03789): Qwen2-VL-7B reads a rubric, the prompt and the picture; a head gives the score.

    (m, log s) = head(state of the token <|Reward|>),    score = m
    P(a before b) = E[sigmoid(z)],  z ~ N(m_a - m_b, s_a^2 + s_b^2)

The second number that the original returns beside the score is log s, not s. Typical scores are -2 to 12. About 16 TFLOP for a
picture, 50 times CLIP-H. On today's ``Qwen2VLModel``, made equal to the original class, which needs Transformers 4.45.2 (see
``_qwen``). Weights: ``MizzenAI/HPSv3``, 17 GB, MIT; tokenizer ``Qwen/Qwen2-VL-7B-Instruct``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_models import _qwen
from reward_models._judge import PointwiseJudge, Preparation, check_choice, check_pixels, device_of, texts_for
from reward_models._pictures import Pictures
from reward_models._weights import Source, fill, path_of, read_state
from reward_models.base import JudgeError, RewardInfo

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor, nn

NAME = "hps-v3"
REPO, FILE = "MizzenAI/HPSv3", "HPSv3.safetensors"
TOKENIZER = "Qwen/Qwen2-VL-7B-Instruct"
SHAPE = _qwen.Shape()
HEAD = (1024, 16, 2)
REWARD, PICTURE = "<|Reward|>", "<|image_pad|>"
_NAMES = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start vision_end"
MARKS = tuple(f"<|{name}|>" for name in f"{_NAMES} vision_pad image_pad video_pad".split())
"""Qwen2-VL's, in the order of their numbers, for a ``tokenizer.json`` that leaves some to another file."""

# The released prompt (MizzenAI/HPSv3, MIT licence), to the letter and blank: the model was trained with it.
RUBRIC = (
    "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall score to "
    "estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being the best. \n"
    "\n**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal body "
    "structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to interpret, with no "
    "blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements (e.g., "
    "hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, composition, "
    "atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult material. "
    "If such content is present, the image quality and satisfaction score should be the lowest possible. \n"
    "\n**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align with the "
    "textual description. The subject should match the description in terms of number, appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the image "
    "adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image logically fit "
    "the scenario described in the prompt. The environment should support and enhance the subject without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, accessories, "
    "expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, but critical attributes "
    "should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the image. The "
    "generated content should not introduce elements that conflict with or distort the original description.\n"
    "Textual prompt - {prompt}\n\n\n"
    "\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND\n"
)
# Qwen2-VL's chat template with its own system turn, written out; one mark for every token of the picture.
CONVERSATION = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{picture}<|vision_end|>{rubric}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def conversation(prompt: str, tokens: int) -> str:
    """What the model reads, for a picture of so many tokens."""
    return CONVERSATION.format(picture=PICTURE * tokens, rubric=RUBRIC.format(prompt=prompt))


# ------------------------------------------------------------------------------------------------------------------ layout


def build(shape: _qwen.Shape) -> tuple[nn.Module, nn.Module]:
    """Qwen2-VL without weights, and the head."""
    from torch import nn

    first, second, last = HEAD
    layers = (
        nn.Linear(shape.text[0], first),
        nn.ReLU(),
        nn.Identity(),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, last),
    )
    return _qwen.build(shape), nn.Sequential(*layers).eval().requires_grad_(False)  # the third is a dropout in training


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The released file's weights under the names of ``build``; the language model's own head is not used."""
    body, head = {}, {}
    for name, value in state.items():
        if name.startswith("rm_head."):
            head[name.removeprefix("rm_head.")] = value
        elif name != "lm_head.weight":
            body[f"language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name] = value
    return body, head


# ------------------------------------------------------------------------------------------------------------------- judge


class HPSv3(PointwiseJudge):
    """One look at a picture for each prompt. ``log_deviation`` is the judge's other number, a judge itself.

    Pictures more than 200 times as long as they are wide, which the original refuses, score NaN with a warning.
    """

    def __init__(
        self,
        nets: Sequence[nn.Module],
        tokenizer: Tokenizer,
        device: Any = "cpu",
        made_of: Mapping[str, Any] | None = None,
    ) -> None:
        self._reader = _Reader(nets, tokenizer, device)
        self.preparation, self.made_of = Preparation(_qwen.TokenGrid()), dict(made_of or {})
        self.info = RewardInfo(
            name=NAME,
            needs_prompt=True,
            licence="MIT",
            differentiable=True,
            description="which picture people would prefer, by Qwen2-VL-7B and a rubric; typically -2 to 12",
        )
        self.log_deviation = _LogDeviation(self)

    def score_prepared(self, prepared: Sequence[Tensor | None], prompts: Sequence[str]) -> Tensor:
        return self._reader(prepared, prompts)[:, 0]

    def differentiable_score(self, pixels: Tensor, prompts: str | Sequence[str] | None = None) -> Tensor:
        pictures = self.preparation.how.grad(check_pixels(pixels))
        return self._reader.read(list(pictures), texts_for(self, len(pixels), prompts))[:, 0]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        _check(prompts)

    def prefer(self, images_a: Any, images_b: Any, prompts: str | Sequence[str] | None = None, **how: Any) -> Tensor:
        """[N] the judge's own probability that the first picture of each pair is preferred. ``how``: see ``score``."""
        from reward_models._scoring import score_all

        first, second = Pictures.of(images_a), Pictures.of(images_b)
        if len(first) != len(second):
            raise JudgeError(f"pictures are preferred pair by pair; got {len(first)} and {len(second)}")
        (score_a, log_a), (score_b, log_b) = (
            score_all([self, self.log_deviation], side, prompts, **how) for side in (first, second)
        )
        return self.preference(score_a, score_b, log_a, log_b)

    def preference(
        self, score_a: Tensor, score_b: Tensor, log_deviation_a: Tensor | None = None, log_deviation_b: Tensor | None = None
    ) -> Tensor:
        """P(a before b) from scores and from what ``log_deviation`` scores for the same pictures.

        Raises:
            JudgeError: the deviations are missing.
        """
        if log_deviation_a is None or log_deviation_b is None:
            self.check_preference()  # which says so
        return preference(score_a - score_b, (log_deviation_a.exp() ** 2 + log_deviation_b.exp() ** 2).sqrt())

    def check_preference(self) -> None:
        raise JudgeError(
            f"a preference of the judge {NAME!r} follows from scores and deviations; `prefer` has both from the pictures"
        )


class _LogDeviation(PointwiseJudge):
    """How unsure HPSv3 is of a score: log of the deviation that people's opinions have around it."""

    def __init__(self, judge: HPSv3) -> None:
        self._reader, self.preparation = judge._reader, judge.preparation
        self.made_of = {**judge.made_of, "output": "log deviation"}
        self.info = RewardInfo(
            name=f"{NAME}-log-deviation",
            needs_prompt=True,
            higher_is_better=False,
            licence=judge.info.licence,
            description="log of the deviation that HPSv3 gives its score",
        )

    def score_prepared(self, prepared: Sequence[Tensor | None], prompts: Sequence[str]) -> Tensor:
        return self._reader(prepared, prompts)[:, 1]


class _Reader:
    """Both numbers of both judges. Remembers the last batch: when they score together, the second finds it done."""

    def __init__(self, nets: Sequence[nn.Module], tokenizer: Tokenizer, device: Any) -> None:
        self._body, self._head = (net.to(device) for net in nets)
        self._tokenizer, self._device = tokenizer, device
        self._reward, self._picture = (tokenizer.token_to_id(mark) for mark in (REWARD, PICTURE))
        self._last: tuple[Sequence[Tensor | None], Sequence[str], Tensor] | None = None

    def __call__(self, pictures: Sequence[Tensor | None], prompts: Sequence[str]) -> Tensor:
        """[n, 2] on the CPU: score and log deviation; NaN where there is no picture."""
        import torch

        if not self._is_last(pictures, prompts):
            out = torch.full((len(pictures), 2), float("nan"))
            there = [i for i, picture in enumerate(pictures) if picture is not None]
            if there:
                out[there] = self.read([pictures[i] for i in there], [prompts[i] for i in there]).cpu()
            self._last = list(pictures), list(prompts), out
        return self._last[2]

    def _is_last(self, pictures: Sequence[Tensor | None], prompts: Sequence[str]) -> bool:
        if self._last is None or len(self._last[0]) != len(pictures) or self._last[1] != list(prompts):
            return False
        return all(a is b for a, b in zip(self._last[0], pictures, strict=True))

    def read(self, pictures: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """[n, 2] float32 for pictures [3, H, W], prepared."""
        _check(prompts)
        tokens = [picture[0].numel() // _qwen.TOKEN**2 for picture in pictures]
        texts = [conversation(prompt, n) for prompt, n in zip(prompts, tokens, strict=True)]
        ids, mask = self._ids(texts)
        states = _qwen.decode(self._body, ids, mask, _qwen.see(self._body.visual, pictures), self._picture)
        return self._head(states[ids == self._reward].float())

    def _ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens [n, L], shorter texts padded on the right, and where there are any."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        ids = [torch.tensor(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts))]
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        return pad_sequence(ids, batch_first=True).to(self._device), mask.to(self._device)


def _check(prompts: Sequence[str]) -> None:
    for prompt in prompts:
        mark = next((mark for mark in (REWARD, PICTURE) if mark in prompt), None)
        if mark is not None:
            raise JudgeError(
                f"the judge {NAME!r} cannot read a prompt that holds {mark}, which it takes for a mark of its own: {prompt!r}"
            )


def preference(difference: Tensor, deviation: Tensor) -> Tensor:
    """E[sigmoid(z)], z ~ N(difference, deviation^2), float32; there is no closed form.

    By the trapezoid rule over nine deviations either way, which for a bell curve is as good as exact: 1e-12 up to a deviation of
    20, 1e-5 at 50. Gauss-Hermite's rule with 64 points is off by 1e-3 at 8, as its polynomials cannot follow the step.
    """
    import torch

    steps = torch.linspace(-9, 9, 513, dtype=torch.float64, device=difference.device)
    weights = torch.softmax(-(steps**2) / 2, dim=0)
    z = difference.double()[..., None] + deviation.double()[..., None] * steps
    return (torch.sigmoid(z) @ weights).float()


# -------------------------------------------------------------------------------------------------------------------- load


def load(
    weights: str | Path | None = None,
    *,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    device: str | None = None,
    dtype: str = "bfloat16",
) -> HPSv3:
    """The judge.

    Args:
        weights: a file, a folder with ``HPSv3.safetensors``, or another repository of the hub; fetched if not given.
        tokenizer: a folder with the ``tokenizer.json`` of Qwen2-VL, or a hub id; ``Qwen/Qwen2-VL-7B-Instruct`` if not given.
        device: the accelerator if there is one, else the CPU, if not given.
        dtype: what Qwen2-VL computes in, bfloat16 as it was trained (16 GB) or float32 (31 GB); the head computes in float32.

    Raises:
        JudgeError: weights or a tokenizer that are not here, or are those of another model.
    """
    import torch

    check_choice("dtype", dtype, ("bfloat16", "float32"))  # float16 is too narrow for Qwen2's largest states
    file = path_of(Source.of(REPO, FILE, revision, weights), NAME)
    vocabulary = _tokenizer_file(tokenizer)
    words = _tokenizer(vocabulary)
    nets = build(SHAPE)
    body, head = split(read_state(file, NAME))
    fill(nets[1], head, NAME)
    _qwen.fill(nets[0], body, SHAPE, getattr(torch, dtype), NAME)
    made_of = {"weights": file, "tokenizer": vocabulary, "dtype": dtype}
    return HPSv3(nets, words, device_of(device), made_of)


def _tokenizer_file(place: str | Path | None) -> Path:
    try:
        return path_of(Source.of(TOKENIZER, "tokenizer.json", None, place), NAME)
    except JudgeError as error:
        raise JudgeError(
            f"the judge {NAME!r} needs the tokenizer of {TOKENIZER}, and there is no tokenizer.json in {place or 'the cache'}. "
            f"Where there is a connection, `hf download {TOKENIZER} tokenizer.json` fetches it; "
            f"a folder that has it is used by tokenizer=PATH (in the shell --judge-options {NAME}.tokenizer=PATH)"
        ) from error


def _tokenizer(file: Path) -> Tokenizer:
    """Qwen2-VL's, with the token that HPSv3 reads its score at, which comes after all others."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens([*MARKS, REWARD])
    if tokenizer.get_vocab_size() != SHAPE.vocabulary:
        raise JudgeError(
            f"{file} has {tokenizer.get_vocab_size()} tokens with {REWARD}, where the network of the judge {NAME!r} has "
            f"{SHAPE.vocabulary}; the tokenizer of {TOKENIZER} is right"
        )
    return tokenizer
