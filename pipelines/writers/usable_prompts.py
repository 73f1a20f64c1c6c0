"""Find the prompts that writers can rewrite before anything is drawn: one that cannot be rewritten should not end a long job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffalign.errors import UserError
from pipelines.prompts import Prompt
from pipelines.writers.templates import clean
from pipelines.writers.writer import Writer


@dataclass(frozen=True)
class UsablePrompts:
    """The prompts of a list that can be rewritten, and why the others cannot."""

    prompts: list[str]  # each different prompt once, in the order of the list
    problems: list[str]  # the place of each prompt that cannot be rewritten, and the reason
    repeated: int  # number of prompts that can be rewritten and stood in the list before
    categories: Mapping[str, str]  # by prompt, where it has one


def unwritable(writer: Writer, prompts: Sequence[str], max_rewrite_tokens: int) -> dict[int, str]:
    """The reason of every prompt that cannot be rewritten, by its number in the list.

    It is empty, has a special token's text in it, or leaves no room for ``max_rewrite_tokens``.
    """
    encoding = writer.encoding(None, max_rewrite_tokens)
    found = ((k, encoding.unwritable(clean(prompt))) for k, prompt in enumerate(prompts))
    return {k: why for k, why in found if why is not None}


def usable_prompts(prompts: Sequence[str | Prompt], writers: Sequence[Writer], max_rewrite_tokens: int) -> UsablePrompts:
    """The prompts that all ``writers`` can rewrite.

    Raises:
        UserError: there is none.
    """
    texts = [clean(prompt if isinstance(prompt, str) else prompt.text) for prompt in prompts]
    unusable: dict[int, str] = {}
    for writer in writers:
        unusable |= unwritable(writer, texts, max_rewrite_tokens)
    kept = list(dict.fromkeys(text for k, text in enumerate(texts) if k not in unusable))
    problems = [f"{_place(prompts[k], k)}: {why}" for k, why in sorted(unusable.items())]
    if not kept:
        raise UserError(f"There are no prompts to rewrite{''.join(f'; {problem}' for problem in problems[:3])}.")
    named = {text: p.category for text, p in zip(texts, prompts, strict=True) if isinstance(p, Prompt) and p.category}
    return UsablePrompts(kept, problems, len(texts) - len(unusable) - len(kept), named)


def _place(prompt: str | Prompt, number: int) -> str:
    return prompt.origin if isinstance(prompt, Prompt) and prompt.origin else f"prompt {number + 1}"
