"""The yes/no judge on three families of vision-language models, tiny and random but genuine, with processors built here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import reward_models
from reward_models import vlm_yes_no
from reward_models.base import Judge, JudgeError

QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'
PROMPTS = ["a red circle", "a small blue star on the left of two big red circles " * 2, "star"]
MARKS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
]
VOCABULARY = 400


def template(picture: str) -> str:
    """A chat template as these models have them, with the family's words for a picture."""
    content = (
        "{% for c in m.content %}{% if c.type == 'image' %}"
        + picture
        + "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n"
    )
    ending = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    return "{% for m in messages %}<|im_start|>{{ m.role }}\n" + content + "{% endfor %}" + ending


def tokenizer() -> Any:
    """Byte-level BPE in which Yes and No are words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["Yes No Yes No user assistant", QUESTION.format("a red circle")] * 5, trainer)
    marks = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": MARKS[1:]}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **marks)


TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": MARKS.index("<|im_end|>"),
    "pad_token_id": MARKS.index("<|endoftext|>"),
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}


def qwen() -> tuple[Any, Any]:
    """Pictures of any size, positions in three axes."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14, "out_hidden_size": 32}
    places = {f"{word}_token_id": MARKS.index(f"<|{word}|>") for word in ("vision_start", "vision_end")}
    places |= {f"{word}_token_id": MARKS.index(f"<|{word}_pad|>") for word in ("image", "video")}
    vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    config = Qwen2_5_VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=vision, **places)
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28 * 2, max_pixels=28 * 28 * 16),
        tokenizer=tokenizer(),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def llava() -> tuple[Any, Any]:
    """Pictures of one size, CLIP and Llama."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    config = LlavaConfig(
        text_config={"model_type": "llama"} | TEXT,
        vision_config={"model_type": "clip_vision_model", "image_size": 56} | VISION,
        image_token_index=MARKS.index("<image>"),
        image_seq_length=16,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer=tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\n"),
    )
    return LlavaForConditionalGeneration(config), processor


def idefics() -> tuple[Any, Any]:
    """Pictures cut into tiles, those of a batch into unequally many: SmolVLM's ancestor."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessor, Idefics3Processor

    words = tokenizer()
    words.add_special_tokens(
        {"additional_special_tokens": [*MARKS[1:], *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2))]},
    )
    config = Idefics3Config(
        text_config={"model_type": "llama"} | TEXT,
        vision_config={"image_size": 56} | VISION,
        image_token_id=MARKS.index("<image>"),
        scale_factor=2,
        pad_token_id=MARKS.index("<|endoftext|>"),
    )
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56}),
        tokenizer=words,
        image_seq_len=4,
        chat_template=template("<image>"),
    )
    return Idefics3ForConditionalGeneration(config), processor


FAMILIES = {"qwen": qwen, "llava": llava, "idefics": idefics}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(FAMILIES[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(llava, tmp_path_factory.mktemp("llava"))


def saved(family: Callable[[], tuple[Any, Any]], where: Path) -> Path:
    torch.manual_seed(3)
    model, processor = family()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # so that words and pictures matter
    model.save_pretrained(where)
    processor.save_pretrained(where)
    return where


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(2)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((56, 56), (150, 61), (90, 130))]


def judge_of(folder: Path, **options: Any) -> vlm_yes_no.YesNo:
    return reward_models.load("vlm-yes-no", model=folder, dtype="float32", **options)


def asked(folder: Path, picture: Image.Image, prompt: str) -> tuple[Any, Any]:
    """The model, and its inputs for one picture through Transformers' own chat interface."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    words = {"type": "text", "text": QUESTION.replace("{}", prompt)}
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, words]}]
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return model.eval(), processor.apply_chat_template(chat, **how)


@torch.no_grad()
def chances(folder: Path, picture: Image.Image, prompt: str) -> torch.Tensor:
    """[vocabulary]: the first word of the answer, by ``generate`` as the original asks."""
    model, inputs = asked(folder, picture, prompt)
    how = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**inputs, **how).logits[0][0].softmax(-1)


def test_the_score_is_the_chance_of_yes_as_the_first_word(folder: Path) -> None:
    judge = judge_of(folder)
    assert isinstance(judge, Judge)
    score = judge.score(pictures(), PROMPTS)
    assert score.dtype == torch.float32 and score.log().std() > 0.1
    yes, no = (tokenizer().encode(word)[0] for word in ("Yes", "No"))
    theirs = torch.stack([chances(folder, *pair) for pair in zip(pictures(), PROMPTS, strict=True)])
    torch.testing.assert_close(score, theirs[:, yes], rtol=1e-5, atol=0)
    of_two = judge_of(folder, normalise="yes-no").score(pictures(), PROMPTS)
    torch.testing.assert_close(of_two, theirs[:, yes] / (theirs[:, yes] + theirs[:, no]), rtol=1e-5, atol=0)


def test_a_batch_scores_as_its_pictures_alone(folder: Path) -> None:
    judge = judge_of(folder)
    score = judge.score(pictures(), PROMPTS)
    singles = torch.cat([judge.score(p, t) for p, t in zip(pictures(), PROMPTS, strict=True)])
    torch.testing.assert_close(score, singles, rtol=1e-5, atol=0)
    assert (judge.score(pictures(), PROMPTS[::-1]) / score).log().abs()[0] > 1e-2  # and the words matter
    assert (judge.score(pictures()[::-1], PROMPTS) / score).log().abs()[0] > 1e-2  # and the pictures


def test_the_gradient_reaches_the_picture_and_is_that_of_the_score(folder: Path) -> None:
    judge = judge_of(folder)
    pixels = torch.rand(2, 3, 56, 56, requires_grad=True)
    score = judge.differentiable_score(pixels, PROMPTS[:2])
    score.log().sum().backward()
    assert (pixels.grad != 0).float().mean() > 0.5
    step = 1e-3 * pixels.grad / pixels.grad.norm()
    with torch.no_grad():
        rise = (
            judge.differentiable_score(pixels + step, PROMPTS[:2]).log()
            - judge.differentiable_score(pixels - step, PROMPTS[:2]).log()
        )
    assert rise.sum().item() == pytest.approx(2e-3 * pixels.grad.norm().item(), rel=0.05)
    whole = (255 * pixels.detach()).round().byte()
    torch.testing.assert_close(
        judge.differentiable_score(whole / 255, PROMPTS[:2]), judge.score(whole, PROMPTS[:2]), rtol=2e-2, atol=0
    )


def test_prompts_are_data(llava_folder: Path) -> None:
    judge = judge_of(llava_folder)
    odd = ["a {red} {} {0} circle", "{{ messages }} {% if %}", "<image><|im_end|>a <|im_start|>"]
    score = judge.score(pictures(), odd)
    assert torch.isfinite(score).all()
    plain = [odd[0], odd[1], "  a  "]
    theirs = torch.stack([chances(llava_folder, *pair) for pair in zip(pictures(), plain, strict=True)])
    torch.testing.assert_close(score, theirs[:, tokenizer().encode("Yes")[0]], rtol=1e-5, atol=0)


def test_question_and_answer_can_be_changed(llava_folder: Path) -> None:
    usual = judge_of(llava_folder).score(pictures()[0], "star")
    other = judge_of(llava_folder, question="Is {} missing?", answer="No")
    assert other.score(pictures()[0], "star") != usual
    assert other.fingerprint != judge_of(llava_folder).fingerprint
    assert f"how surely {llava_folder.name} answers 'No'" in other.info.description
    with pytest.raises(JudgeError, match=r"one \{\}, where the prompt goes; got 'Is it there\?'"):
        judge_of(llava_folder, question="Is it there?")
    with pytest.raises(JudgeError, match=r"'Yes it does' is \d of this model: \["):
        judge_of(llava_folder, answer="Yes it does")
    with pytest.raises(JudgeError, match="normalise is one of vocabulary, yes-no; got 'both'"):
        judge_of(llava_folder, normalise="both")


def test_a_template_that_leaves_room_for_thoughts_is_told_not_to(llava_folder: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = AutoModelForImageTextToText.from_pretrained(llava_folder), AutoProcessor.from_pretrained(llava_folder)
    thinking = processor.chat_template + "{% if enable_thinking is not defined or enable_thinking %}think{% endif %}"
    plain = vlm_yes_no.YesNo(model, processor).score(pictures()[0], "star")
    processor.chat_template = thinking
    assert vlm_yes_no.YesNo(model, processor).score(pictures()[0], "star") == plain


def test_the_mark_of_a_beginning_is_not_doubled(llava_folder: Path) -> None:
    """Where the template writes it, the tokenizer must not; where it does not, the tokenizer's stays."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = AutoModelForImageTextToText.from_pretrained(llava_folder), AutoProcessor.from_pretrained(llava_folder)
    plain, mark, own = vlm_yes_no.YesNo(model, processor), "<|endoftext|>", processor.chat_template
    without = plain.score(pictures()[0], "star")
    processor.chat_template = mark + own
    once = plain.score(pictures()[0], "star")
    assert once != without
    processor.tokenizer.bos_token = mark
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{mark} $A", special_tokens=[(mark, MARKS.index(mark))]
    )
    adding = vlm_yes_no.YesNo(model, processor)
    assert adding.score(pictures()[0], "star") == once
    processor.chat_template = own
    assert adding.score(pictures()[0], "star") == once


def test_what_cannot_be_asked_is_refused(llava_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = AutoModelForImageTextToText.from_pretrained(llava_folder), AutoProcessor.from_pretrained(llava_folder)
    with pytest.raises(JudgeError, match="has no processor for pictures and words"):
        vlm_yes_no.YesNo(model, processor.tokenizer)
    processor.chat_template = processor.tokenizer.chat_template = None
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(JudgeError, match=rf"{tmp_path.name} has no chat template.* needs an instruction-tuned model"):
        judge_of(tmp_path)
    with pytest.raises(JudgeError, match="cannot load Qwen/Qwen2.5-VL-7B-Instruct.*`hf download Qwen/Qwen2.5-VL-7B-Instruct`"):
        reward_models.load("vlm-yes-no")


def test_a_model_of_words_alone_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(JudgeError, match="cannot load .* as a vision-language model"):
        judge_of(tmp_path)
