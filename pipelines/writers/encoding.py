"""Prompts and rewrites as token ids, the same in training and in decoding.

A prompt is encoded by itself, so that decoding starts from the very ids of training. The ids of its rewrite are those that the
whole text adds; where the tokenizer would merge the two at the boundary, the rewrite is encoded by itself. The begin mark comes
once, if the tokenizer adds one or a chat template writes it; the end mark comes once, at the end of the rewrite.

Nothing is ever cut. A rewrite that is too long would lose its end, and the writer would learn not to stop; a prompt that is too
long would lose the template's text after it. Such a row is an ``UnusableRow``, for the caller to report and to leave out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffalign.errors import UserError
from pipelines.writers.templates import Template, clean, marks_of

Ids = list[int]
Kind = Literal["empty", "mark in text", "prompt too long", "rewrite too long", "no gold"]
SHOWN = 60
"""Most characters of a text that a message shows."""


@dataclass(frozen=True)
class Encoded:
    """A prompt and its rewrites as token ids; the caller names the rewrites."""

    prompt: Ids
    rewrites: Mapping[str, Ids]  # each with its end mark


@dataclass(frozen=True)
class UnusableRow:
    """A row that cannot be used, and why."""

    origin: str  # file and row, for messages
    kind: Kind
    message: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.message}"


class Encoding:
    """A tokenizer with a template and limits, in tokens.

    Args:
        context: most tokens that the model can read, prompt and rewrite together; None if there is no limit.
        max_prompt_tokens: most tokens of a prompt, its template included; None: what the context leaves.
        max_rewrite_tokens: most tokens of a rewrite, its end mark included; None: what the context leaves.
        known: number of tokens that the model has embeddings of; None: all of the tokenizer's.

    Raises:
        UserError: the tokenizer has no token that ends a rewrite, or a limit leaves no room.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: Template,
        *,
        context: int | None = None,
        max_prompt_tokens: int | None = None,
        max_rewrite_tokens: int | None = None,
        known: int | None = None,
    ) -> None:
        _check(context, max_prompt_tokens, max_rewrite_tokens)
        self.template, self.context = template, context
        self.max_prompt_tokens, self.max_rewrite_tokens = max_prompt_tokens, max_rewrite_tokens
        self._tokenizer = tokenizer
        self._known = known
        self._marks = marks_of(tokenizer)
        self.begin = self._begin_marks()
        self.end = self._end_mark()

    def _begin_marks(self) -> Ids:
        """The ids before the template's text; none where the text has the begin mark itself."""
        bos = self._tokenizer.bos_token
        in_text = self.template.has_marks or (bos and self.template.before.startswith(bos))
        return [] if in_text else _begin_marks(self._tokenizer)

    def _end_mark(self) -> int:
        if self.template.closing:
            return self._ids(self.template.closing)[0][-1]
        if self._tokenizer.eos_token_id is None:
            raise UserError(
                "The writer's tokenizer has no end mark (eos_token), so it could neither learn nor say where a rewrite ends. "
                "Add eos_token to its tokenizer_config.json, naming a token of its vocabulary, or take another model."
            )
        return self._tokenizer.eos_token_id

    @property
    def ends(self) -> list[int]:
        """The ids at which decoding stops: the end mark of a rewrite, and the tokenizer's if that is another."""
        eos = self._tokenizer.eos_token_id
        return [self.end] if eos in (None, self.end) else [self.end, eos]

    @property
    def pad(self) -> int:
        """An id for padding that the model has an embedding of; the attention mask hides it."""
        pad = self._tokenizer.pad_token_id
        return self.end if pad is None or (self._known is not None and pad >= self._known) else pad

    # ---------------------------------------------------------------------------------------------------------- texts

    def prompt(self, prompt: str) -> Ids:
        """The ids of a prompt with the template's text around it."""
        return [*self.begin, *self._ids(self.template.prompt_text(prompt))[0]]

    def rewrite(self, prompt: str, rewrite: str) -> Ids:
        """The ids of a rewrite of ``prompt``, with one end mark."""
        before, after = self.template.prompt_text(prompt), self.template.rewrite_text(rewrite)
        return self._added(*self._ids(before, before + after), after)

    def _added(self, alone: Ids, whole: Ids, after: str) -> Ids:
        ids = whole[len(alone) :] if whole[: len(alone)] == alone else self._ids(after)[0]
        return ids if self.template.closing else [*ids, self.end]

    def text(self, ids: Iterable[int]) -> str:
        """The text of a rewrite's ``ids``, up to the first end mark."""
        kept = []
        for token in ids:
            if token in self.ends:
                break
            kept.append(token)
        return clean(self._tokenizer.decode(kept, skip_special_tokens=True))

    def _ids(self, *texts: str) -> list[Ids]:
        # not verbose: the tokenizer would warn of texts beyond its maximum length, which are refused here
        return self._tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids

    # ----------------------------------------------------------------------------------------------------------- rows

    def row(self, origin: str, prompt: str, rewrites: Mapping[str, str]) -> Encoded | UnusableRow:
        """Encode a prompt with its rewrites, or say why the row cannot be used.

        Args:
            origin: file and row, for messages.
            rewrites: texts by name, such as "chosen" and "rejected".
        """
        for name, text in {"prompt": prompt, **rewrites}.items():
            if problem := self._unfit(name, text):
                return UnusableRow(origin, *problem)
        before, after = self.template.prompt_text(prompt), {k: self.template.rewrite_text(v) for k, v in rewrites.items()}
        alone, *whole = self._ids(before, *(before + text for text in after.values()))
        ids = [*self.begin, *alone]
        if problem := self._too_long(prompt, ids, room_for=1):
            return UnusableRow(origin, "prompt too long", problem)
        encoded = {name: self._added(alone, each, after[name]) for name, each in zip(after, whole, strict=True)}
        for name, each in encoded.items():
            if self.max_rewrite_tokens is not None and len(each) > self.max_rewrite_tokens:
                allowed = f"{self.max_rewrite_tokens} are allowed (max_rewrite_tokens)"
                message = f"{name} takes {len(each)} tokens with its end mark, and {allowed}: {_shown(rewrites[name])}"
                return UnusableRow(origin, "rewrite too long", message)
            if self.context is not None and len(ids) + len(each) > self.context:
                message = (
                    f"the prompt takes {len(ids)} tokens with its template and {name} takes {len(each)} with its end mark, "
                    f"together more than the {self.context} that the writer can read: {_shown(rewrites[name])}"
                )
                return UnusableRow(origin, "rewrite too long", message)
        return Encoded(ids, encoded)

    def for_writing(self, prompt: str) -> Ids:
        """The ids of a prompt that is to be rewritten.

        Raises:
            UserError: the prompt is empty, has a special token's text in it, or leaves no room for ``max_rewrite_tokens``.
        """
        if why := self.unwritable(prompt):
            raise UserError(f"A prompt cannot be rewritten: {why}.")
        return self.prompt(prompt)

    def unwritable(self, prompt: str) -> str | None:
        """Why a prompt cannot be rewritten; None if it can."""
        if problem := self._unfit("prompt", prompt):
            return problem[1]
        return self._too_long(prompt, self.prompt(prompt), room_for=self.max_rewrite_tokens or 1)

    def _unfit(self, name: str, text: str) -> tuple[Kind, str] | None:
        if not clean(text):
            return "empty", f"{name} is empty"
        if found := [mark for mark in self._marks if mark in text]:
            return "mark in text", f"{name} contains {found[0]!r}, which is a mark of this writer's tokenizer: {_shown(text)}"
        return None

    def _too_long(self, prompt: str, ids: Ids, room_for: int) -> str | None:
        takes = f"the prompt takes {len(ids)} tokens with its template"
        if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
            return f"{takes}, and {self.max_prompt_tokens} are allowed (max_prompt_tokens): {_shown(prompt)}"
        if self.context is not None and len(ids) + room_for > self.context:
            left = max(0, self.context - len(ids))
            room = f"which leaves {left} for a rewrite of up to {room_for}" if left else "which leaves no room for a rewrite"
            return f"{takes}, of {self.context} that the writer can read, {room}: {_shown(prompt)}"
        return None


def _check(context: int | None, prompt: int | None, rewrite: int | None) -> None:
    for name, value in (("max_prompt_tokens", prompt), ("max_rewrite_tokens", rewrite)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1; got {value}.")
    if context is not None and rewrite is not None and rewrite >= context:
        raise UserError(
            f"max_rewrite_tokens {rewrite} leaves no room for a prompt: the writer can read {context} tokens in all, "
            "prompt and rewrite together."
        )


def _begin_marks(tokenizer: Any) -> Ids:
    """The ids that the tokenizer puts before every text; usually none or the begin mark."""
    with_marks, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    for start in range(len(with_marks) - len(bare) + 1):
        if with_marks[start : start + len(bare)] == bare:
            return with_marks[:start]
    return []


def _shown(text: str) -> str:
    text = clean(text)
    return repr(text if len(text) <= SHOWN else text[:SHOWN].rstrip() + " ...")
