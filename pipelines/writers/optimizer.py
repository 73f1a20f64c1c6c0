"""Rewrite prompts by a trained writer, with the distance of each rewrite from its prompt.

optimizer = PromptOptimizer.from_pretrained("runs/sem-dpo")
optimizer("a cat")                        # one rewrite
optimizer("a cat", n=4, max_distance=0.2) # up to four, none further from the prompt than that
optimizer(Path("prompts.txt"))            # a list of rewrites for each prompt of a file
pipe = optimizer.before(pipe)             # a Diffusers pipeline that draws rewrites in place of prompts
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
"""Number of candidates for each wanted rewrite where there is a choice to make: a cap on the distance, or judges."""


@dataclass(frozen=True)
class Rewrite:
    """A rewrite of a prompt."""

    prompt: str
    text: str
    distance: float | None = None  # 1 - cos between prompt and text, in [0, 2]; None without an embedding
    score: float | None = None  # its pictures' standardised score among the candidates, over all judges; None without a generator
    scores: Mapping[str, float] = field(default_factory=dict)  # score of its pictures for the prompt by judge, larger is better
    truncated: bool = False  # the writer had not ended at ``max_rewrite_tokens``
    unchanged: bool = False  # it is the prompt itself: no candidate was near enough, or the writer left the prompt as it is
    lost: str = ""  # its end that the generator, or without one the embedding, does not read (CLIP: beyond 77 tokens)
    problem: str = ""  # why the prompt could not be rewritten and is returned unchanged (``strict=False``)

    def __str__(self) -> str:
        return self.text


class PromptOptimizer:
    """A writer with an embedding and a scorer to choose among its rewrites.

    Args:
        embedding: text embedding that distances are measured in (``pipelines.semantics``); without one there are no distances.
        scorer: generator and judges; with one, rewrites are drawn, and those whose pictures score best come first.
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
        """Load an optimizer's parts by their names.

        Args:
            where: the writer: its folder, hub id, or ``tiny``.
            embedding: name of the embedding for ``load_embedding``; None for none. ``tiny`` is the tiny world's.
            generator: a Diffusers pipeline, or a model's name, that draws rewrites; None for none.
            judges: names as on the command line (``"pickscore,hps-v2.1"``), or loaded judges by name.
            drawing: how pictures of rewrites are drawn; None for the defaults.
            device: by default the accelerator if there is one, else the CPU.
            dtype: precision of the weights of writer and generator.
            template, instruction, system: the text around a prompt, where it is not that of the training (``Writer.load``).
            base: base model of a LoRA, if it is not the one on record.

        Raises:
            UserError: a part cannot be loaded, or there is a generator without judges, or judges without a generator.
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
        """Up to ``n`` different rewrites of each prompt: a list for one prompt, a list of lists for several.

        With a scorer, the rewrites whose pictures score best come first; without one, they are in the writer's order. The same
        seed gives the same rewrites, whatever other prompts there are.

        Args:
            prompts: one prompt; a list; or the ``Path`` of a file that ``pipelines.prompts.read_prompts`` reads. For long files
                use ``pipelines.writers.rewriting.rewrite_file``, which continues after an interruption.
            n: number of rewrites of each prompt.
            seed: random seed of sampled rewrites.
            max_distance: largest distance of a rewrite from its prompt, in [0, 2]; where no candidate is near enough, the prompt
                itself is returned, ``unchanged``.
            draw: number of candidates to choose from; by default ``4 * n`` with ``max_distance`` or a scorer, else ``n``.
            batch_size: sequences that are written, and texts that are embedded, at once.
            strict: False returns a prompt that cannot be rewritten unchanged, with the ``problem``, in place of an error.
            progress: called with (stage, number done, number in all).
            decoding: options of ``pipelines.writers.sampling.Decoding``, such as ``how="beam"`` or ``temperature=0.7``.

        Raises:
            UserError: a prompt is empty, too long, no string, or the name of a file; ``max_distance`` is given without an
                embedding; a number is out of range; an option does not exist.
        """
        how = Decoding.of(decoding)
        asked, single = _asked(prompts, strict)
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
        return kept[0] if single else kept

    def stream(
        self, prompts: str | Iterable[str | Prompt], chunk: int = 64, progress: Progress | None = None, **options: Any
    ) -> Iterator[list[Rewrite]]:
        """Rewrite a list of any length, ``chunk`` prompts at a time; yields the list of each prompt's rewrites in turn.

        Args:
            progress: called with ("rewriting", prompts done, prompts in all); for an iterable without a length the last is the
                number done.
            options: options of ``__call__``.
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
        """A function that rewrites prompts and passes them on to ``pipe``, a Diffusers pipeline.

        The function takes the pipeline's arguments; ``prompt`` is a text or a list. It warns if the pipeline does not read the
        end of a rewrite.

        Args:
            options: options of ``__call__``.
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
        """The candidates with their distances, without those further than ``cap``; the prompt itself where none is left."""
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
        """The rewrites of each prompt with the scores of their pictures, the best first."""
        rows = [r for rewrites in found for r in rewrites]
        scores = self.scorer.scores([r.prompt for r in rows], [r.text for r in rows], progress)
        ends = [sum(len(rewrites) for rewrites in found[:k]) for k in range(len(found) + 1)]
        spans = [slice(low, high) for low, high in pairwise(ends)]
        # prompt by prompt, so that a rewrite's score does not depend on the other prompts
        overall = [standardised({name: [values[span].tolist()] for name, values in scores.items()})[0] for span in spans]
        out = []
        for span, rewrites, totals in zip(spans, found, overall, strict=True):
            own = [{name: float(values[span][k]) for name, values in scores.items()} for k in range(len(rewrites))]
            scored = [replace(r, score=float(t), scores=o) for r, t, o in zip(rewrites, totals, own, strict=True)]
            out.append(sorted(scored, key=lambda r: -r.score))
        return out


def _asked(prompts: str | Sequence[str | Prompt] | Path, strict: bool) -> tuple[list[str], bool]:
    """The cleaned prompts, and whether ``prompts`` is a single prompt."""
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
    """The rewrites with the ends that the generator does not read."""
    return [replace(r, lost=end) for r, end in zip(rewrites, lost_by(pipe, [r.text for r in rewrites]), strict=True)]


def _unmeasured(prompt: str, text: str) -> Rewrite:
    return Rewrite(prompt, str(text), unchanged=text == prompt, truncated=_is_truncated(text))


def _is_truncated(text: str) -> bool:
    return isinstance(text, Truncated)


def _scorer(generator: Any, judges: str | Mapping[str, Any], drawing: DrawingSettings, device: str, dtype: str) -> RewriteScorer:
    """A scorer of a generator and judges that are given by name or loaded."""
    from pipelines import families
    from pipelines.judge_options import load_judges

    if isinstance(generator, (str, os.PathLike)):
        generator = families.load_pipeline(generator, dtype=dtype, device=device)
    return RewriteScorer(generator, load_judges(judges, device=device) if isinstance(judges, str) else judges, drawing)
