"""The text around a prompt and around its rewrite, for a writer to read and to write.

``rephrase`` is Promptist's (Hao et al. 2022, arXiv 2212.09611): "{prompt} Rephrase:" and the rewrite after a space. ``chat`` is
whatever the tokenizer's own chat template makes of an instruction, ours or the user's, and of a system turn where one is given,
with the rewrite as the assistant's turn. Both, and a text of the user's own, come out as fixed strings: they are kept with a
trained writer, so that it always reads the text that it was trained on, also where a chat template prints the date.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diffalign.errors import UserError

PLACE = "{prompt}"
REPHRASE = "{prompt} Rephrase:"
INSTRUCTION = (
    "Rewrite this prompt for a text-to-image model. Keep what it means and make the picture better. "
    "Answer with the new prompt only.\n\n{prompt}"
)
NAMES = ("auto", "rephrase", "chat")
_PROMPT, _REWRITE = "qqpromptqq", "qqrewriteqq"
"""Placeholders for the texts when a chat template is rendered: words that no template writes itself or changes."""


@dataclass(frozen=True)
class Template:
    """The text around a prompt and around its rewrite."""

    name: str
    before: str  # text before the prompt
    after: str  # text after the prompt; the rewrite follows it
    lead: str  # text before the rewrite, at most a space: byte-level BPE has it inside a word's first token
    closing: str  # text after the rewrite, which ends in its end mark; empty: the tokenizer's end mark
    has_marks: bool  # whether ``before`` holds the begin mark, if one is wanted; else the tokenizer adds its own

    def prompt_text(self, prompt: str) -> str:
        """The text that the writer reads before it writes."""
        return self.before + clean(prompt) + self.after

    def rewrite_text(self, rewrite: str) -> str:
        """The text that the writer should write, with the template's end mark if it has one."""
        return self.lead + clean(rewrite) + self.closing

    def as_record(self) -> dict[str, Any]:
        """The template as plain values, for ``from_record``."""
        return asdict(self)

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Template:
        """The template of a record that ``as_record`` made.

        Raises:
            UserError: ``record`` is none.
        """
        try:
            return Template(**record)
        except TypeError as error:
            raise UserError(f"The template on record is not one that diffalign wrote: {dict(record)!r}.") from error


def clean(text: str) -> str:
    """``text`` without white space at its ends, and with one space for any white space inside.

    Line breaks mean nothing to a text encoder.
    """
    return " ".join(text.split())


def template_for(choice: str, tokenizer: Any, instruction: str | None = None, system: str | None = None) -> Template:
    """The template for ``choice``: ``rephrase``, ``chat``, ``auto``, or a text with ``{prompt}`` in it.

    Args:
        choice: ``auto`` is ``chat`` where the tokenizer has a chat template, else ``rephrase``.
        instruction: user turn of ``chat``, with ``{prompt}`` in it; None is ``INSTRUCTION``.
        system: system turn of ``chat``; None for no such turn, which some chat templates fill with a text of their own.

    Raises:
        UserError: ``choice`` is another word or has several places for the prompt; the tokenizer has no chat template that can be
            used for ``chat``; an instruction has no place for the prompt, or the template is not ``chat``.
    """
    own = instruction is not None or system is not None
    if choice == "auto":
        choice = "chat" if own or tokenizer.chat_template else "rephrase"
    if choice == "chat":
        return _chat(tokenizer, INSTRUCTION if instruction is None else instruction, system)
    if own:
        raise UserError(f"An instruction and a system turn belong to the template 'chat', and the template is {choice!r}.")
    if choice == "rephrase":
        return _text("rephrase", REPHRASE)
    if choice.count(PLACE) == 1:
        return _text("own", choice)
    if PLACE in choice:
        raise UserError(f"The template {choice!r} has {choice.count(PLACE)} places for the prompt; it should have one {PLACE}.")
    raise UserError(f"The template {choice!r} is not known. It is {', '.join(NAMES)}, or a text of your own with {PLACE} in it.")


def _text(name: str, text: str) -> Template:
    before, _, after = text.partition(PLACE)
    after = after.rstrip(" ")  # the space before the rewrite's first word belongs to that word's token
    return Template(name, before, after, lead="" if after[-1:].isspace() else " ", closing="", has_marks=False)


# ----------------------------------------------------------------------------------------------------------------- chat


def _chat(tokenizer: Any, instruction: str, system: str | None) -> Template:
    if not tokenizer.chat_template:
        raise UserError("The template 'chat' needs a tokenizer with a chat template, which this one has not; use 'rephrase'.")
    if instruction.count(PLACE) != 1:
        raise UserError(f"The instruction {instruction!r} should have one {PLACE} in it, where the prompt is to stand.")
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns.append({"role": "user", "content": instruction.replace(PLACE, _PROMPT)})
    opened = _rendered(tokenizer, turns, add_generation_prompt=True)
    whole = _rendered(tokenizer, [*turns, {"role": "assistant", "content": _REWRITE}])
    if system is not None and system.strip() not in opened:
        raise UserError("The tokenizer's chat template does not write a system turn: say it in the instruction.")
    if opened.count(_PROMPT) != 1 or whole.count(_REWRITE) != 1:
        raise UserError(
            "The tokenizer's chat template does not write the user's and the assistant's texts once each, so it cannot be used "
            "to train a writer; use the template 'rephrase'."
        )
    answer, _, rest = whole.partition(_REWRITE)
    shown = answer if answer.startswith(opened) else opened  # a header that only finished turns have belongs to the prompt, too
    lead = shown[len(shown.rstrip(" ")) :]
    before, _, after = shown.rstrip(" ").partition(_PROMPT)
    return Template("chat", before, after, lead, _up_to_first_mark(rest, tokenizer), has_marks=True)


def _rendered(tokenizer: Any, turns: list[dict[str, str]], **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        # without the thoughts that reasoning models begin with; other templates ignore the option
        return tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False, **options)
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"The tokenizer's chat template cannot be used ({error}); use the template 'rephrase'.") from error


def _up_to_first_mark(text: str, tokenizer: Any) -> str:
    """``text`` up to and with its first special token; empty if it has none.

    That token ends a turn, and need not be the tokenizer's end mark: Qwen2.5's base models end a text with another.
    """
    ends = [text.index(mark) + len(mark) for mark in marks_of(tokenizer) if mark in text]
    return text[: min(ends)] if ends else ""


def marks_of(tokenizer: Any) -> list[str]:
    """The texts of the special tokens, which a prompt or a rewrite must not contain."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    unknown = {tokenizer.unk_token} if tokenizer.unk_token != tokenizer.eos_token else set()  # GPT-2 has one for all
    return sorted(mark for mark in (added | set(tokenizer.all_special_tokens)) - unknown if mark.strip())
