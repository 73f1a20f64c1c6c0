"""VQAScore's question put to any vision-language model of Transformers (Lin et al. 2024, arXiv 2404.01291; t2v_metrics 3.1).

    score = p("Yes") at the first position of the answer to 'Does this figure show "{prompt}"? Please answer Yes or No.'

from the logits after the question in one forward pass: nothing is generated, so that pictures go through in batches and gradients
reach them. Within one model higher is better and 0 to 1 is the range; numbers of two models are not comparable, nor are they
with CLIP-FlanT5's (``vqascore``), which are a geometric mean over two tokens. The share is of the whole vocabulary, as in the
original; with ``normalise="yes-no"`` it is of "Yes" and "No" alone, which leaves out how often the model says neither.

Every model is asked in its own chat template. Questions of a batch are padded on the right and the logits taken at the last token
of each: a causal network never looks at what comes after, so that padding changes nothing, whatever a model does with positions.

``Qwen/Qwen2.5-VL-7B-Instruct`` if none is named: 16.6 GB, Apache-2.0, first in t2v_metrics' examples (3B is not for commerce).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_models._judge import DTYPES, PointwiseJudge, check_choice, check_pixels, device_of, texts_for
from reward_models.base import JudgeError, RewardInfo

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

NAME = "vlm-yes-no"
MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'
NORMALISE = ("vocabulary", "yes-no")


class YesNo(PointwiseJudge):
    """One look at a picture for each prompt. ``model`` and ``processor`` are Transformers'."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        question: str = QUESTION,
        answer: str = "Yes",
        against: str = "No",
        normalise: str = "vocabulary",
        called: str = "",
        made_of: Mapping[str, Any] | None = None,
    ) -> None:
        check_choice("normalise", normalise, NORMALISE)
        if question.count("{}") != 1:
            raise JudgeError(f"question has one {{}}, where the prompt goes; got {question!r}")
        self._model, self._processor, self._question = model.eval().requires_grad_(False), processor, question
        self._called = called or type(model).__name__
        self._check_can_be_asked()
        tokenizer = processor.tokenizer
        self._yes, self._no = _token(tokenizer, answer), _token(tokenizer, against) if normalise == "yes-no" else None
        self._marks = re.compile("|".join(map(re.escape, sorted(_marks(processor), key=len, reverse=True))) or "(?!)")
        self._keeps_some = "logits_to_keep" in inspect.signature(model.forward).parameters
        asked = {"question": question, "answer": answer, "normalise": normalise}
        self.made_of = {**(made_of or {}), **asked, **({"against": against} if normalise == "yes-no" else {})}
        self.info = RewardInfo(
            name=NAME,
            needs_prompt=True,
            range=(0.0, 1.0),
            licence="that of the model",
            differentiable=True,
            description=f"how surely {self._called} answers {answer!r} when asked whether the picture shows the prompt",
        )

    def score_prepared(self, prepared: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self._judge(self._inputs([picture.convert("RGB") for picture in prepared], prompts)).cpu()

    def differentiable_score(self, pixels: Tensor, prompts: str | Sequence[str] | None = None) -> Tensor:
        texts = texts_for(self, len(check_pixels(pixels)), prompts)
        inputs = self._inputs(list(pixels.float()), texts, do_rescale=False)  # are in [0, 1]
        if pixels.requires_grad and not any(hasattr(v, "requires_grad") and v.requires_grad for v in inputs.values()):
            raise JudgeError(f"{self._called} is not differentiable: its image processor does not pass gradients on")
        return self._judge(inputs)

    def _inputs(self, pictures: Sequence[Any], prompts: Sequence[str], **options: Any) -> Mapping[str, Tensor]:
        """What the model is given: questions and pictures by its own processor, padded on the right."""
        # a template that can leave room for thoughts is told not to: the first word is to be the answer
        quiet = {"enable_thinking": False} if "enable_thinking" in str(self._processor.chat_template) else {}
        chats = [[{"role": "user", "content": self._content(prompt)}] for prompt in prompts]
        texts = self._processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False, **quiet)
        start = getattr(self._processor.tokenizer, "bos_token", None)
        return self._processor(
            text=texts,
            images=[[picture] for picture in pictures],
            add_special_tokens=not (start and texts[0].startswith(start)),  # the template has written it already
            padding=True,
            padding_side="right",
            return_tensors="pt",
            **options,
        )

    def _content(self, prompt: str) -> list[dict[str, str]]:
        """Picture and question. Prompts are data: braces and the model's own marks in them mean nothing."""
        return [{"type": "image"}, {"type": "text", "text": self._question.replace("{}", self._marks.sub(" ", prompt))}]

    def _judge(self, inputs: Mapping[str, Tensor]) -> Tensor:
        import torch

        kind, device = self._model.dtype, self._model.device
        moved = {k: v.to(device, kind) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}
        mask = moved["attention_mask"]
        last = (mask * torch.arange(mask.shape[1], device=device)).argmax(-1)
        places, which = last.unique(return_inverse=True)  # logits of a whole question would take gigabytes
        kept = {"logits_to_keep": places} if self._keeps_some else {}
        logits = self._model(**moved, **kept, use_cache=False).logits
        logits = logits[torch.arange(len(last), device=device), which if kept else last].float()
        if self._no is not None:
            return torch.sigmoid(logits[:, self._yes] - logits[:, self._no])
        return logits.softmax(-1)[:, self._yes]

    def _check_can_be_asked(self) -> None:
        if getattr(self._processor, "tokenizer", None) is None or getattr(self._processor, "image_processor", None) is None:
            raise JudgeError(
                f"{self._called} has no processor for pictures and words; the judge {NAME!r} needs a vision-language model that "
                f"Transformers loads with AutoModelForImageTextToText and AutoProcessor, such as {MODEL}"
            )
        if getattr(self._processor, "chat_template", None) is None:
            raise JudgeError(
                f"{self._called} has no chat template, so there is no telling how it is to be asked; the judge {NAME!r} needs an "
                f"instruction-tuned model with a chat_template.jinja (or chat_template.json), such as {MODEL}"
            )
        if self._model.config.is_encoder_decoder:
            raise JudgeError(
                f"{self._called} is an encoder and a decoder; the judge {NAME!r} asks models that continue the question"
            )


def _token(tokenizer: Any, word: str) -> int:
    """The one token that ``word`` is. Raises JudgeError if it is several: the score looks at one position."""
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        raise JudgeError(
            f"the answer is one token, such as 'Yes'; {word!r} is {len(ids)} of this model: {tokenizer.tokenize(word)}"
        )
    return ids[0]


def _marks(processor: Any) -> set[str]:
    """The model's own marks: those of its tokenizer and the place of a picture."""
    tokenizer = processor.tokenizer
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    marks = (*tokenizer.all_special_tokens, *added, getattr(processor, "image_token", None))
    return {mark for mark in marks if isinstance(mark, str) and mark.strip()}


def load(
    model: str | Path = MODEL,
    *,
    revision: str | None = None,
    question: str = QUESTION,
    answer: str = "Yes",
    against: str = "No",
    normalise: str = "vocabulary",
    device: str | None = None,
    dtype: str = "bfloat16",
) -> YesNo:
    """The judge.

    Args:
        model: a folder or hub id of a vision-language model with its processor.
        question: with one {} where the prompt goes. Another wording gives other scores.
        answer: the word whose probability is the score; one token of the model.
        against: the other answer, for ``normalise="yes-no"``.
        normalise: ``vocabulary``, or ``yes-no`` for the share of ``answer`` in the two answers.
        device: the accelerator if there is one, else the CPU, if not given.
        dtype: what the model computes in; the probability is float32 in any case.

    Raises:
        JudgeError: a model that is not here, has no chat template, is no vision-language model, ...
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    check_choice("dtype", dtype, DTYPES)
    here = Path(model).expanduser()
    where, place = str(here) if here.is_dir() else str(model), device_of(device)
    how = {"dtype": getattr(torch, dtype), "device_map": {"": place}}  # straight to its place, one copy
    try:
        processor = AutoProcessor.from_pretrained(where, revision=revision)
        net = AutoModelForImageTextToText.from_pretrained(where, revision=revision, **how)
    except (OSError, ValueError) as error:
        raise JudgeError(
            f"the judge {NAME!r} cannot load {where} as a vision-language model: {str(error).splitlines()[0]} "
            f"Where there is a connection, `hf download {where}` fetches one of the hub; a folder that you have is used by "
            f"model=PATH (in the shell --judge-options {NAME}.model=PATH)"
        ) from error
    made_of: dict[str, Any] = {"model": where, "commit": getattr(net.config, "_commit_hash", None), "dtype": dtype}
    if here.is_dir():
        made_of = {"dtype": dtype, **{file.name: file for file in sorted(here.iterdir()) if file.is_file()}}
    asked = {"question": question, "answer": answer, "against": against, "normalise": normalise}
    return YesNo(net, processor, **asked, called=here.name if here.is_dir() else where, made_of=made_of)
