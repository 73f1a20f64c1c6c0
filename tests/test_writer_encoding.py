"""Prompts and rewrites as ids: each mark once, the same ids in training and in writing, nothing cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_writer_material import BEGIN, CHATML, END, INST, PROMPTS, TURN_END, tokenizer, writer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diffalign.errors import UserError
from pipelines.writers.encoding import Encoded, Encoding, UnusableRow
from pipelines.writers.templates import template_for

REWRITE = "a fluffy cat, soft light"
KINDS = {
    "plain": {"template": "rephrase"},
    "begin mark": {"template": "rephrase", "begin": True},
    "chat": {"template": "chat", "chat": CHATML},
    "chat, other end": {"template": "chat", "chat": CHATML, "end": TURN_END},
    "chat with begin mark": {"template": "chat", "chat": INST, "begin": True},
    "own with begin mark": {"template": f"{BEGIN}Better: {{prompt}}\n", "begin": True},
}
all_kinds = pytest.mark.parametrize("kind", KINDS)


def encoding(
    template: str = "rephrase", *, context: int | None = None, prompt: int | None = None, rewrite: int | None = None, **about
):
    words = tokenizer(**about)
    limits = {"context": context, "max_prompt_tokens": prompt, "max_rewrite_tokens": rewrite}
    return Encoding(words, template_for(template, words), **limits)


# ------------------------------------------------------------------------------------------------------------- marks


@all_kinds
def test_the_end_mark_comes_once_and_last(kind: str) -> None:
    made = encoding(**KINDS[kind])
    ids = made.rewrite("a cat", REWRITE)
    assert ids[-1] == made.end
    assert sum(ids.count(end) for end in made.ends) == 1


@all_kinds
def test_the_begin_mark_comes_first_and_once_or_never(kind: str) -> None:
    made = encoding(**KINDS[kind])
    begins = 1 if KINDS[kind].get("begin") else 0
    assert made.prompt("a cat").count(0) == begins
    assert (made.prompt("a cat")[0] == 0) == bool(begins)
    assert made.rewrite("a cat", REWRITE).count(0) == 0


def test_a_chat_template_without_begin_mark_gets_none() -> None:
    """As Transformers' own apply_chat_template: the template has every mark that there is to be."""
    words = tokenizer(begin=True, chat=CHATML)
    made = Encoding(words, template_for("chat", words))
    turns = [{"role": "user", "content": made.template.before.split("user\n")[1] + "a cat"}]
    whole = words.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert made.prompt("a cat") == whole


def test_what_ends_a_turn_and_what_ends_a_text_may_differ() -> None:
    made = encoding("chat", chat=CHATML)
    assert (made.end, made.ends) == (3, [3, 1])
    same = encoding("chat", chat=CHATML, end=TURN_END)
    assert (same.end, same.ends) == (3, [3])


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt() -> None:
    from tokenizers import processors

    words = tokenizer(begin=True)
    marks = [(BEGIN, 0), (END, 1)]
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A {END}", special_tokens=marks)
    assert words("a").input_ids[-1] == 1
    made = Encoding(words, template_for("rephrase", words))
    assert made.prompt("a cat") == [0, *tokenizer()("a cat Rephrase:").input_ids]
    assert made.rewrite("a cat", REWRITE).count(1) == 1


def test_without_any_end_mark_it_says_what_to_do() -> None:
    with pytest.raises(UserError) as error:
        encoding(end=None)
    assert "has no end mark (eos_token)" in str(error.value)
    assert "Add eos_token to its tokenizer_config.json" in str(error.value)
    with pytest.raises(UserError, match="no end mark"):
        writer(end=None)


def test_a_chat_template_can_give_the_end_mark_that_the_tokenizer_lacks() -> None:
    made = encoding("chat", chat=CHATML, end=None)
    assert (made.end, made.ends, made.pad) == (3, [3], 3)


# ------------------------------------------------------------------------------------------------------------- ids


@all_kinds
@pytest.mark.parametrize("prompt", PROMPTS)
def test_both_parts_spell_the_whole_text(kind: str, prompt: str) -> None:
    made = encoding(**KINDS[kind])
    ids = made.prompt(prompt) + made.rewrite(prompt, REWRITE)
    spelt = tokenizer().decode(ids, skip_special_tokens=True)
    expected = made.template.prompt_text(prompt) + made.template.rewrite_text(REWRITE)
    for mark in (BEGIN, END, "<|im_start|>", TURN_END):
        expected = expected.replace(mark, "")
    assert spelt == expected


@all_kinds
def test_a_rewrite_is_read_back_as_it_was(kind: str) -> None:
    made = encoding(**KINDS[kind])
    ids = made.rewrite("a cat", REWRITE)
    assert made.text(ids) == REWRITE
    assert made.text([*ids, *made.rewrite("a cat", "more")]) == REWRITE  # nothing after the end
    assert made.text(ids[:-1]) == REWRITE


def test_the_rewrite_is_what_the_whole_text_adds() -> None:
    """Words of a rewrite are encoded as in running text, where Llama's tokenizer adds a space at the start only."""
    words = sentences()
    made = Encoding(words, template_for("rephrase", words))
    whole = words("a cat Rephrase: a red cat").input_ids
    assert made.prompt("a cat") + made.rewrite("a cat", "a red cat") == [*whole, made.end]
    assert words.convert_ids_to_tokens(made.rewrite("a cat", "a red cat")) == ["▁a", "▁red", "▁cat", "</s>"]
    assert words.convert_ids_to_tokens(words(" a red cat").input_ids) == ["▁", "▁a", "▁red", "▁cat"]  # by itself


def test_what_would_join_at_the_seam_is_encoded_apart() -> None:
    """The ids of a prompt must not depend on what is written after it."""
    words = tokenizer()
    made = Encoding(words, replace(template_for("{prompt}", words), lead=""))  # "squar" and "es" would be one word
    prompt, rewrite = made.prompt("a squar"), made.rewrite("a squar", "es")
    assert (prompt, rewrite) == (words("a squar").input_ids, [*words("es").input_ids, made.end])
    assert [*prompt, *rewrite[:-1]] != words("a squares").input_ids


def sentences() -> PreTrainedTokenizerFast:
    """A tokenizer in Llama's manner: a space is put before every text, whether it begins with one or not."""
    words = ["<unk>", "</s>", "▁a", "▁red", "▁cat", "▁Rephrase:", "▁"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


# ------------------------------------------------------------------------------------------------------------- limits


def test_a_row_that_fits() -> None:
    made = encoding(context=64, prompt=30, rewrite=20)
    row = made.row("pairs.jsonl:3", "a cat", {"chosen": REWRITE, "rejected": "a dog"})
    assert isinstance(row, Encoded)
    assert row.prompt == made.prompt("a cat")
    assert row.rewrites == {"chosen": made.rewrite("a cat", REWRITE), "rejected": made.rewrite("a cat", "a dog")}


def test_limits_are_met_exactly() -> None:
    """As many tokens as are allowed are allowed, and one more is not."""
    free = encoding()
    asked, answer = len(free.prompt("a cat")), len(free.rewrite("a cat", REWRITE))
    rewrites = {"chosen": REWRITE}
    assert isinstance(encoding(prompt=asked, rewrite=answer, context=asked + answer).row("x", "a cat", rewrites), Encoded)
    for limits, kind in (
        ({"prompt": asked - 1}, "prompt too long"),
        ({"rewrite": answer - 1}, "rewrite too long"),
        ({"context": asked + answer - 1}, "rewrite too long"),
        ({"context": asked}, "prompt too long"),
    ):
        row = encoding(**limits).row("x", "a cat", rewrites)
        assert isinstance(row, UnusableRow) and row.kind == kind, limits


@pytest.mark.parametrize(
    "limits, prompt, rewrites, message",
    [
        (
            {"rewrite": 4},
            "a cat",
            {"chosen": REWRITE},
            "chosen takes 9 tokens with its end mark, and 4 are allowed (max_rewrite_tokens)",
        ),
        (
            {"prompt": 3},
            "a cat",
            {"chosen": "a"},
            "takes 4 tokens with its template, and 3 are allowed (max_prompt_tokens): 'a cat'",
        ),
        (
            {"context": 5},
            "a red circle " * 20,
            {"chosen": "a"},
            "of 5 that the writer can read, which leaves no room for a rewrite",
        ),
        ({"context": 12}, "a cat", {"a": "a", "gold": REWRITE}, "and gold takes 9 with its end mark, together more than the 12"),
        ({}, " \n", {"chosen": "a"}, "prompt is empty"),
        ({}, "a cat", {"chosen": "a", "rejected": ""}, "rejected is empty"),
        ({}, "a cat </s> dog", {"chosen": "a"}, "prompt contains '</s>', which is a mark of this writer's tokenizer"),
        ({}, "a cat", {"chosen": "a<|im_end|>"}, "chosen contains '<|im_end|>'"),
    ],
)
def test_what_is_wrong_with_a_row(limits: dict, prompt: str, rewrites: dict, message: str) -> None:
    row = encoding(**limits).row("pairs.jsonl:3", prompt, rewrites)
    assert isinstance(row, UnusableRow)
    assert str(row).startswith("pairs.jsonl:3: ")
    assert message in str(row)


def test_long_texts_are_shown_in_part() -> None:
    row = encoding(rewrite=4).row("x", "a cat", {"chosen": "a red circle " * 50})
    assert len(str(row)) < 200
    assert str(row).endswith(" ...'")


def test_a_prompt_to_be_rewritten_must_fit() -> None:
    made = encoding(context=40, rewrite=20)
    assert made.for_writing("a cat") == made.prompt("a cat")
    with pytest.raises(UserError) as error:
        made.for_writing("a red circle on a blue background " * 4)
    assert "A prompt cannot be rewritten: the prompt takes" in str(error.value)
    assert "of 40 that the writer can read, which leaves" in str(error.value)
    assert "for a rewrite of up to 20: 'a red circle on a blue" in str(error.value)
    with pytest.raises(UserError, match="prompt is empty"):
        made.for_writing("  ")
    with pytest.raises(UserError, match="prompt contains '<s>'"):
        made.for_writing("a <s> cat")
    with pytest.raises(UserError, match="max_prompt_tokens"):
        encoding(prompt=3).for_writing("a cat")


def test_limits_that_cannot_be() -> None:
    with pytest.raises(UserError, match="max_rewrite_tokens must be at least 1; got 0"):
        encoding(rewrite=0)
    with pytest.raises(UserError, match="max_rewrite_tokens 64 leaves no room for a prompt: the writer can read 64 tokens"):
        encoding(rewrite=64, context=64)


def test_the_context_is_the_models() -> None:
    assert writer(context=48).encoding().context == 48
    assert writer("llama", context=48).encoding().context == 48


def test_nobody_is_told_of_a_length_that_is_checked_here(caplog: pytest.LogCaptureFixture) -> None:
    words = tokenizer()
    words.model_max_length = 5
    Encoding(words, template_for("rephrase", words)).prompt("a red circle on a blue background")
    assert caplog.text == ""
