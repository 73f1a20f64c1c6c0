"""A trained writer at work: plain prompts in; better ones out, with how far they went.

optimizer = PromptOptimizer.from_pretrained("runs/sem-dpo")
optimizer("a cat")                        # one rewrite
optimizer("a cat", n=4, max_distance=0.2) # four, none further from the prompt than that
optimizer(Path("prompts.txt"))            # a list of them for each prompt of a file
pipe = optimizer.before(pipe)             # a Diffusers pipeline that is shown rewrites
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, overload

from diffalign.errors import UserError
from pipelines.progress import Progress
from pipelines.prompts import FORMATS, Prompt, as_prompts, read_prompts
from pipelines.semantics import Embedding, distance, load_embedding
from pipelines.writers.rewrite_scorer import DrawingSettings, RewriteScorer, lost_by, standardised
from pipelines.writers.sampling import Decoding, Truncated, candidates
from pipelines.writers.templates import clean
from pipelines.writers.usable_prompts import unwritable
from pipelines.writers.writer import Writer
from reward_models._judge import device_of

DRAWN = 4
"""Candidates for each rewrite that is asked for, where they are chosen from (a cap on drift, or judges)."""


@dataclass(frozen=True)
class Rewrite:
    """What became of a prompt."""

    prompt: str
    text: str
    distance: float | None = None  # 1 - cos between prompt and text, in [0, 2]; None without an embedding
    score: float | None = None  # of its pictures among those of the other candidates, over all judges; None without a generator
    scores: Mapping[str, float] = field(default_factory=dict)  # each judge's own, for the prompt, larger is better
    truncated: bool = False  # the writer had not ended at ``max_rewrite_tokens``
    unchanged: bool = False  # the prompt itself, because nothing near enough was found, or because the writer left it
    lost: str = ""  # its end that the generator (without one, the embedding) does not read (CLIP: beyond 77 tokens)
    problem: str = ""  # why the prompt could not be rewritten, and is here unchanged (``strict=False``)

    def __str__(self) -> str:
        return self.text


class PromptOptimizer:
    """A writer with what it takes to choose among its rewrites.

    Args:
        embedding: of meaning (``pipelines.semantics``); without one there is no distance and no cap on it.
        scorer: a generator with judges; with one, rewrites are drawn, and the best are those whose pictures score best.
    """

    def __init__(self, writer: Writer, embedding: Embedding | None = None, scorer: RewriteScorer | None = None) -> None:
        self.writer, self.embedding, self.scorer = writer, embedding, scorer

    @classmethod
    def from_pretrained(
        cls,
        where: str | os.PathLike[str],
        *,
        embedding: str | None = "clip",
        generator: Any = None,
        judges: str | Mapping[str, Any] | None = None,
        drawing: DrawingSettings | None = None,
        device: str | None = None,
        dtype: str = "float32",
        template: str | None = None,
        instruction: str | None = None,
        system: str | None = None,
        base: str | None = None,
    ) -> PromptOptimizer:
        """A writer by its folder, hub id, or ``tiny``.

        Args:
            base: the base model of a LoRA, if not the one on record.
            embedding: as ``load_embedding`` names them; ``None`` for none. ``tiny`` belongs to the tiny world.
            generator: a Diffusers pipeline, or a model's name, to draw rewrites with.
            judges: names as on the command line (``"pickscore,hps-v2.1"``), or loaded judges by name.
            drawing: how pictures of rewrites are drawn.
            device: the accelerator if there is one, else the CPU, if not given.
            template, instruction, system: what the writer is shown, where not as it was trained (``Writer.load``).

        Raises:
            UserError: something of this is not here, or a generator without judges (or the other way round).
        """
        if (generator is None) != (judges is None):
            raise UserError("Rewrites are drawn by a generator and judged by judges: give both, or neither.")
        place = device_of(device)
        turns = {"instruction": instruction, "system": system}
        writer = Writer.load(where, dtype=dtype, template=template, base=base, **turns).to(place)
        chosen = None if embedding is None else load_embedding(embedding, device=place)
        return cls(writer, chosen, _scorer(generator, judges, drawing or DrawingSettings(), place, dtype) if generator else None)

    @overload
    def __call__(self, prompts: str, **options: Any) -> list[Rewrite]: ...
    @overload
    def __call__(self, prompts: Sequence[str | Prompt] | Path, **options: Any) -> list[list[Rewrite]]: ...
    def __call__(
        self,
        prompts: str | Sequence[str | Prompt] | Path,
        *,
        n: int = 1,
        seed: int = 0,
        max_distance: float | None = None,
        draw: int | None = None,
        batch_size: int = 32,
        strict: bool = True,
        progress: Progress | None = None,
        **decoding: Any,
    ) -> list[Rewrite] | list[list[Rewrite]]:
        """Up to ``n`` different rewrites of each prompt, the best first: a list for one prompt, a list of lists for several.

        Several are a list, or a file by its ``Path`` (as ``pipelines.prompts.read_prompts`` reads it). For files that take long,
        ``pipelines.writers.rewriting.rewrite_file`` goes on where it was cut off.

        Best are those whose pictures score best, if there is a scorer; otherwise they stay in the writer's order. The same seed
        gives the same rewrites, whatever other prompts there are.

        Args:
            max_distance: rewrites further from their prompt are thrown away; where none is left, the prompt itself is returned,
                ``unchanged``.
            draw: how many candidates to choose from; by default four for each rewrite that is wanted where there is a cap or a
                scorer, else as many as are wanted.
            strict: False gives a prompt that cannot be rewritten back unchanged, with the ``problem``, in place of an error.
            decoding: options of ``pipelines.writers.sampling.Decoding``, such as ``how="beam"`` or ``temperature=0.7``.

        Raises:
            UserError: a prompt that is empty, too long, no string, or the name of a file; a cap without an embedding; a number
                out of range; an option that does not exist.
        """
        how = Decoding.of(decoding)
        asked, alone = _asked(prompts, strict)
        self._check(n, max_distance, draw)
        problems = unwritable(self.writer, asked, how.max_rewrite_tokens)
        if problems and strict:
            raise UserError(_refused(problems, len(asked)))
        choosing = max_distance is not None or self.scorer is not None
        wanted = draw or (DRAWN * n if choosing else n)
        fit = [prompt for k, prompt in enumerate(asked) if k not in problems]
        drawn = candidates(self.writer, fit, wanted, how, seed=seed, batch_size=batch_size, progress=progress)
        found = self._measured(fit, [list(dict.fromkeys(texts)) for texts in drawn], max_distance, batch_size)
        if self.scorer is not None and fit:
            found = [_with_lost(self.scorer.pipe, rewrites) for rewrites in self._ranked(found, progress)]
        each = iter(found)
        kept = [[_left(asked[k], problems[k])] if k in problems else next(each)[:n] for k in range(len(asked))]
        return kept[0] if alone else kept

    def stream(
        self, prompts: str | Iterable[str | Prompt], chunk: int = 64, progress: Progress | None = None, **options: Any
    ) -> Iterator[list[Rewrite]]:
        """The same for a list of any length, ``chunk`` prompts at a time; yields one prompt's rewrites after the other's.

        ``progress`` is told ("rewriting", prompts done, prompts in all; or done, where the list has no length).
        """
        if chunk < 1:
            raise UserError(f"chunk is how many prompts are rewritten at a time, 1 or more; it is {chunk}.")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        rest, done = iter(prompts), 0
        total = len(prompts) if isinstance(prompts, Sized) else None
        while part := list(islice(rest, chunk)):
            found = self(part, **options)
            done += len(part)
            if progress is not None:
                progress("rewriting", done, done if total is None else total)
            yield from found

    def before(self, pipe: Any, **options: Any) -> Callable[..., Any]:
        """``pipe``, a Diffusers pipeline, as a function that rewrites prompts before it draws them.

        It takes what the pipeline takes; ``prompt`` is a text or a list. ``options`` are those of a call. It warns of a rewrite
        whose end the pipeline does not read.
        """

        def rewriting(prompt: str | Sequence[str], *args: Any, **kwargs: Any) -> Any:
            asked = [prompt] if isinstance(prompt, str) else list(prompt)
            texts = [rewrites[0].text for rewrites in self(asked, **options)]
            for text, lost in zip(texts, lost_by(pipe, texts), strict=True):
                if lost:
                    warnings.warn(f"The pipeline does not read the end {lost!r} of the rewrite {text!r}.", stacklevel=2)
            return pipe(texts[0] if isinstance(prompt, str) else texts, *args, **kwargs)

        return rewriting

    def _check(self, n: int, max_distance: float | None, draw: int | None) -> None:
        if max_distance is not None and self.embedding is None:
            raise UserError("A cap on the distance needs an embedding to measure it: give one (embedding=...).")
        if max_distance is not None and not 0 <= max_distance <= 2:
            raise UserError(f"max_distance is a cosine distance, between 0 and 2; got {max_distance}.")
        if n < 1 or (draw is not None and draw < n):
            raise UserError(f"{n} rewrites cannot be chosen from {draw or n} candidates.")

    def _measured(
        self, prompts: Sequence[str], drawn: Sequence[Sequence[str]], cap: float | None, batch_size: int
    ) -> list[list[Rewrite]]:
        """Different candidates with their distances, those beyond the cap thrown away."""
        if self.embedding is None or not prompts:
            pairs = zip(prompts, drawn, strict=True)
            return [[_unmeasured(p, text) for text in texts] for p, texts in pairs]
        rows = [(p, text) for p, texts in zip(prompts, drawn, strict=True) for text in texts]
        asked, texts = [p for p, _ in rows], [text for _, text in rows]
        distances, lost = distance(self.embedding, asked, texts, batch_size).tolist(), self.embedding.cut(texts)
        measured = [
            Rewrite(p, str(text), far, unchanged=text == p, truncated=_is_truncated(text), lost=end)
            for (p, text), far, end in zip(rows, distances, lost, strict=True)
        ]
        each, out = iter(measured), []
        for prompt, texts in zip(prompts, drawn, strict=True):
            near = [r for r in islice(each, len(texts)) if cap is None or r.distance <= cap]
            out.append(near or [Rewrite(prompt, prompt, 0.0, unchanged=True, lost=self.embedding.cut([prompt])[0])])
        return out

    def _ranked(self, found: Sequence[Sequence[Rewrite]], progress: Progress | None) -> list[list[Rewrite]]:
        """By what their pictures score, the best first."""
        rows = [r for rewrites in found for r in rewrites]
        scores = self.scorer.scores([r.prompt for r in rows], [r.text for r in rows], progress)
        ends = [sum(len(rewrites) for rewrites in found[:k]) for k in range(len(found) + 1)]
        spans = [slice(low, high) for low, high in pairwise(ends)]
        # Prompt by prompt, so that a rewrite's score does not depend on what else was asked for.
        overall = [standardised({name: [values[span].tolist()] for name, values in scores.items()})[0] for span in spans]
        out = []
        for span, rewrites, totals in zip(spans, found, overall, strict=True):
            own = [{name: float(values[span][k]) for name, values in scores.items()} for k in range(len(rewrites))]
            scored = [replace(r, score=float(t), scores=o) for r, t, o in zip(rewrites, totals, own, strict=True)]
            out.append(sorted(scored, key=lambda r: -r.score))
        return out


def _asked(prompts: str | Sequence[str | Prompt] | Path, strict: bool) -> tuple[list[str], bool]:
    """Cleaned prompts, and whether one was asked for by itself."""
    if isinstance(prompts, Path):
        return [clean(prompt.text) for prompt in read_prompts(prompts, strict=strict)], False
    if not isinstance(prompts, str):
        return [clean(prompt.text) for prompt in as_prompts(prompts)], False
    if prompts.strip().lower().endswith(FORMATS) and Path(prompts.strip()).is_file():
        raise UserError(f'{prompts!r} is a file. Its prompts are rewritten by Path("{prompts.strip()}"); a string is a prompt.')
    return [clean(prompt.text) for prompt in as_prompts(prompts)], True


def _refused(problems: Mapping[int, str], of: int) -> str:
    first, why = next(iter(problems.items()))
    if of == 1:
        return f"A prompt cannot be rewritten: {why}."
    lenient = "strict=False, or --prompts FILE on the command line, leaves such prompts as they are."
    more = f" So it is with {len(problems)} of {of} prompts." if len(problems) > 1 else ""
    return f"Prompt {first + 1} of {of} cannot be rewritten: {why}.{more} {lenient}"


def _left(prompt: str, problem: str) -> Rewrite:
    return Rewrite(prompt, prompt, unchanged=True, problem=problem)


def _with_lost(pipe: Any, rewrites: Sequence[Rewrite]) -> list[Rewrite]:
    """With what the generator does not read of each."""
    return [replace(r, lost=end) for r, end in zip(rewrites, lost_by(pipe, [r.text for r in rewrites]), strict=True)]


def _unmeasured(prompt: str, text: str) -> Rewrite:
    return Rewrite(prompt, str(text), unchanged=text == prompt, truncated=_is_truncated(text))


def _is_truncated(text: str) -> bool:
    return isinstance(text, Truncated)


def _scorer(generator: Any, judges: str | Mapping[str, Any], drawing: DrawingSettings, device: str, dtype: str) -> RewriteScorer:
    """From names or loaded things."""
    from pipelines import families
    from pipelines.judge_options import load_judges

    if isinstance(generator, (str, os.PathLike)):
        generator = families.load_pipeline(generator, dtype=dtype, device=device)
    return RewriteScorer(generator, load_judges(judges, device=device) if isinstance(judges, str) else judges, drawing)
