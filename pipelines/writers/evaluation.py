"""Compare prompt writers: plain prompts, the rewrites of each writer, and the judges' scores of their pictures.

All contenders rewrite the same held-out prompts, their pictures are drawn from the same noise, and the judges score a picture
for the prompt that was typed, never for the rewrite. Besides the judges' scores (a CLIP score among them is the similarity to the
original prompt):

    distance        1 - cos between prompt and rewrite, in an embedding of meaning; the share beyond delta has drifted
    length          words of a rewrite, and how many rewrites are longer than the embedding's text encoder reads
    diversity       mean distance between two rewrites of one prompt, and different rewrites as a share of all

Each contender is also compared, picture by picture, with those before it in the list.

For a writer trained by Sem-DPO the report puts the drift that the weights predict for its training data
(``objectives.sem_dpo.tilted``) beside the drift that was measured: the bound is on the training data, and holds for the writer as
far as it fits them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.errors import UserError
from diffalign.evaluate import mean_with_interval, paired_difference, win_rate
from diffalign.written_aside import write_file
from pipelines import generation, grids, outputs
from pipelines.comparison_notes import rough
from pipelines.markdown import count
from pipelines.progress import Progress
from pipelines.prompts import Prompt
from pipelines.semantics import Embedding, distance
from pipelines.writers.drift import Drift
from pipelines.writers.evaluation_report import SHOWN, report
from pipelines.writers.optimizer import DRAWN
from pipelines.writers.rewrite_scorer import RewriteScorer, judged, standardised
from pipelines.writers.sampling import SAMPLE, Decoding, Truncated, candidates
from pipelines.writers.usable_prompts import UsablePrompts, usable_prompts
from pipelines.writers.writer import Writer

PLAIN = "plain"
PICTURES = "pictures"
"""Folder of the pictures that are kept, with one folder for each contender."""
OWNED = (
    *("report.md", "evaluation.json", "rewrites.csv", "side_by_side.png"),
    *(f"{PICTURES}/*/{pattern}" for pattern in generation.OWNED),
)
Interval = tuple[float, float, float]
"""A number and its 95 % interval, over prompts."""


@dataclass(frozen=True)
class Contender:
    """A writer in the comparison, with its first rewrite of each prompt or the best of its first ``best_of`` by the judges."""

    name: str
    writer: Writer
    best_of: int = 1
    drift: Drift | None = None  # distances in the writer's training data (``drift.read_drift``)


@dataclass(frozen=True)
class ContenderRun:
    """A contender's rewrites of the prompts, their pictures and what was measured of each."""

    name: str
    texts: list[str]
    pictures: list[Any] = field(repr=False)
    scores: Mapping[str, np.ndarray]  # by judge: [prompts * pictures], larger is better
    details: Mapping[str, np.ndarray]  # parts of the scores by JUDGE.PART, of judges that have parts
    distances: np.ndarray  # [prompts], from prompt to rewrite
    diversity: float  # mean distance between two rewrites of one prompt
    cut: int  # rewrites that are longer than the embedding reads
    drift: Drift | None = None


@dataclass(frozen=True)
class PairwiseResult:
    """One contender against another, on the same prompts and noise, by judge."""

    wins: Mapping[str, Interval]  # win rate of the first
    differences: Mapping[str, Interval]  # score of the first minus score of the second


@dataclass(frozen=True)
class ContenderResult:
    """A contender's row in the tables: means over the prompts."""

    name: str
    judges: Mapping[str, Interval]  # mean score by judge
    wins: Mapping[str, Interval]  # win rate over the plain prompt, by judge
    against: Mapping[str, PairwiseResult]  # by name of each contender before it, the plain prompt among them
    parts: Mapping[str, float]  # mean by JUDGE.PART
    distance: float
    distance_quantiles: tuple[float, float, float]  # 50, 90, 99 %
    beyond: float  # share of rewrites further than delta
    words: float
    cut: int  # rewrites that are longer than the embedding reads
    truncated: int  # rewrites that had not ended at ``max_rewrite_tokens``
    diversity: float
    different: float  # number of different rewrites over number of rewrites
    unchanged: float  # share of rewrites that are the prompt itself
    predicted_drift: Mapping[str, float] | None = None


def evaluate(
    prompts: Sequence[str | Prompt],
    contenders: Sequence[Contender],
    scorer: RewriteScorer,
    embedding: Embedding,
    output: str | Path,
    *,
    decoding: Decoding = SAMPLE,
    seed: int = 0,
    delta: float = 0.1,
    diversity_samples: int = 4,
    max_distance: float | None = None,
    keep_pictures: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[ContenderResult]:
    """Compare contenders with each other and with the plain prompts. Report, numbers and a picture go into ``output``.

    Prompts that one of the writers cannot take are left out for all of them, counted and named.

    Args:
        decoding: how every writer decodes its rewrites.
        seed: random seed of sampled rewrites.
        delta: a distance beyond which a rewrite counts as drifted.
        diversity_samples: rewrites of each prompt by which diversity is measured.
        max_distance: rewrites further from their prompt are not used: the first of a few that is near enough is, or else the
            prompt itself, as ``PromptOptimizer`` does.
        keep_pictures: write all pictures to ``output/pictures``, a folder for each contender, as ``generate`` does:
            ``diffalign score`` reads them.

    Returns:
        The plain prompts first, then the contenders in their order.

    Raises:
        UserError: ``output`` holds something (unless ``overwrite``), two contenders have one name, a number is out of range, or a
            judge fails.
    """
    folder = outputs.check_folder(output, overwrite)
    _refuse_equal_names(contenders)
    usable = usable_prompts(prompts, [contender.writer for contender in contenders], decoding.max_rewrite_tokens)
    asked = usable.prompts
    choice = RewriteChoice(decoding, seed, diversity_samples, max_distance)
    runs = [_run(PLAIN, asked, asked, scorer, embedding, 0.0, progress)]
    for contender in contenders:
        texts, diversity = _written(contender, asked, scorer, embedding, choice, progress)
        run = _run(contender.name, asked, texts, scorer, embedding, diversity, progress)
        runs.append(replace(run, drift=contender.drift))
    results = [_result(run, runs[:k], asked, delta) for k, run in enumerate(runs)]
    outputs.clear(folder, OWNED)
    settings = {"seed": seed, **vars(decoding), "max_distance": max_distance, "delta": delta}
    values = _values(results, contenders, usable, scorer, embedding, settings)
    outputs.write_json(folder / "evaluation.json", values)
    _write_rewrites(folder / "rewrites.csv", asked, runs)
    outputs.write_png(folder / "side_by_side.png", pictures_side_by_side(asked, runs, scorer.drawing.pictures))
    if keep_pictures:
        for run in runs:
            _write_pictures(folder / PICTURES / _folder_of(run.name), usable, run, scorer)
    write_file(folder / "report.md", report(results, values, runs, embedding))
    return results


def _refuse_equal_names(contenders: Sequence[Contender]) -> None:
    """Raise UserError for two contenders with one name, or with names that become one folder's name."""
    taken = {_folder_of(PLAIN)}
    for contender in contenders:
        if _folder_of(contender.name) in taken:
            raise UserError(
                f"Two writers are called {contender.name!r}, or would leave their pictures in one folder of that name; give each "
                "writer a name of its own, as in mine=runs/sem-dpo."
            )
        taken.add(_folder_of(contender.name))


def _folder_of(name: str) -> str:
    """The folder of a contender's pictures: its name without characters that mean something to a file system."""
    return re.sub(r"[^\w.+-]+", "-", name).strip(".-") or "writer"


# ------------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class RewriteChoice:
    """The decoding of a contender's rewrites, and the rule by which one is chosen."""

    decoding: Decoding
    seed: int
    diversity_samples: int  # rewrites of each prompt by which diversity is measured
    max_distance: float | None

    def drawn(self, contender: Contender, prompts: list[str], progress: Any) -> tuple[list[list[str]], list[list[str]]]:
        """The rewrites of each prompt that one is chosen from, and those by which diversity is measured.

        Samples are the same however many are drawn; a beam search with more beams is another search, so each number of beams has
        a search of its own.
        """
        many = contender.best_of if self.max_distance is None else max(contender.best_of, DRAWN)
        several = self.diversity_samples
        if self.decoding.how == "sample":
            drawn = self._candidates(contender, prompts, max(many, several), progress)
            return [texts[:many] for texts in drawn], [texts[:several] for texts in drawn]
        chosen_from = self._candidates(contender, prompts, many, progress)
        return chosen_from, chosen_from if many == several else self._candidates(contender, prompts, several, progress)

    def _candidates(self, contender: Contender, prompts: list[str], n: int, progress: Any) -> list[list[str]]:
        return candidates(contender.writer, prompts, n, self.decoding, seed=self.seed, progress=progress)

    def allowed(self, prompts: Sequence[str], drawn: Sequence[Sequence[str]], embedding: Embedding) -> list[list[str]]:
        """The rewrites that are near enough to their prompt; the prompt itself where none is."""
        if self.max_distance is None:
            return [list(texts) for texts in drawn]
        rows = [(prompt, text) for prompt, texts in zip(prompts, drawn, strict=True) for text in texts]
        far = iter(distance(embedding, [p for p, _ in rows], [t for _, t in rows]).tolist())
        near = [[text for text in texts if next(far) <= self.max_distance] for texts in drawn]
        return [texts or [prompt] for prompt, texts in zip(prompts, near, strict=True)]


def _written(
    contender: Contender, prompts: list[str], scorer: RewriteScorer, embedding: Embedding, choice: RewriteChoice, progress: Any
) -> tuple[list[str], float]:
    """A contender's rewrite of each prompt, and the mean distance between two of its rewrites of one prompt."""
    drawn, several = choice.drawn(contender, prompts, progress)
    pairs = [(a, b) for texts in several for a, b in combinations(texts, 2)]
    diversity = float(distance(embedding, [a for a, _ in pairs], [b for _, b in pairs]).mean()) if pairs else 0.0
    near = choice.allowed(prompts, drawn, embedding)
    if contender.best_of == 1:
        return [texts[0] for texts in near], diversity
    return _best(prompts, [texts[: contender.best_of] for texts in near], scorer, progress), diversity


def _best(prompts: Sequence[str], drawn: Sequence[Sequence[str]], scorer: RewriteScorer, progress: Any) -> list[str]:
    """The best of each prompt's rewrites by the judges.

    They are chosen on pictures from other noise than what is measured, so that a choice by lucky noise is not rewarded.
    """
    rows = [(prompt, text) for prompt, texts in zip(prompts, drawn, strict=True) for text in texts]
    other_noise = replace(scorer, drawing=replace(scorer.drawing, seed=scorer.drawing.seed + 1))
    scores = other_noise.scores([p for p, _ in rows], [t for _, t in rows], progress)
    ends = np.cumsum([len(texts) for texts in drawn])[:-1]
    overall = standardised({name: [part.tolist() for part in np.split(values, ends)] for name, values in scores.items()})
    return [texts[int(np.argmax(totals))] for texts, totals in zip(drawn, overall, strict=True)]


def _run(
    name: str, prompts: list[str], texts: list[str], scorer: RewriteScorer, embedding: Embedding, diversity: float, progress: Any
) -> ContenderRun:
    """Draw and judge the rewrites ``texts`` of ``prompts``."""
    drawn = scorer.pictures(prompts, texts, progress)
    repeated = [prompt for prompt in prompts for _ in range(scorer.drawing.pictures)]
    scores = judged(scorer.judges, drawn, repeated)
    parts = {}
    for judge_name, judge in scorer.judges.items():
        if hasattr(judge, "details"):
            parts |= {f"{judge_name}.{k}": np.asarray(v, dtype=float) for k, v in judge.details(drawn, repeated).items()}
    distances = distance(embedding, prompts, texts).numpy().astype(float)
    return ContenderRun(name, texts, drawn, scores, parts, distances, diversity, sum(bool(end) for end in embedding.cut(texts)))


def _result(run: ContenderRun, earlier: Sequence[ContenderRun], prompts: list[str], delta: float) -> ContenderResult:
    per = len(run.pictures) // len(prompts)
    groups = [prompt for prompt in prompts for _ in range(per)]

    def mean(values: np.ndarray) -> Interval:
        found = mean_with_interval(values, groups=groups)
        return found.mean, found.low, found.high

    against = {other.name: _compared(run, other, groups) for other in earlier}
    return ContenderResult(
        name=run.name,
        judges={name: mean(values) for name, values in run.scores.items()},
        wins=against[PLAIN].wins if against else {},
        against=against,
        parts={name: _mean_of_known(values) for name, values in run.details.items()},
        distance=float(run.distances.mean()),
        distance_quantiles=tuple(float(q) for q in np.quantile(run.distances, [0.5, 0.9, 0.99])),
        beyond=float((run.distances > delta).mean()),
        words=float(np.mean([len(text.split()) for text in run.texts])),
        cut=run.cut,
        truncated=sum(isinstance(text, Truncated) for text in run.texts),
        diversity=run.diversity,
        different=len(set(run.texts)) / len(run.texts),
        unchanged=float(np.mean([text == prompt for text, prompt in zip(run.texts, prompts, strict=True)])),
        predicted_drift=None if run.drift is None else {"alpha": run.drift.alpha, **vars(run.drift.predicted_drift(delta))},
    )


def _compared(run: ContenderRun, other: ContenderRun, groups: Sequence[str]) -> PairwiseResult:
    """``run`` against ``other``: pictures of the same prompts from the same noise."""
    wins, differences = {}, {}
    for name, scores in run.scores.items():
        won = win_rate(other.scores[name], scores, groups=groups)
        more = paired_difference(other.scores[name], scores, groups=groups)
        wins[name], differences[name] = (won.rate, won.low, won.high), (more.mean, more.low, more.high)
    return PairwiseResult(wins, differences)


def _mean_of_known(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


# ----------------------------------------------------------------------------------------------------------------- files


def pictures_side_by_side(prompts: Sequence[str], runs: Sequence[ContenderRun], per_prompt: int) -> Any:
    """A picture with a row for each prompt and a column for each contender, from the same noise."""
    shown = min(SHOWN, len(prompts))
    images = [run.pictures[k * per_prompt] for k in range(shown) for run in runs]
    captions = [f"{run.name}: {run.texts[k]}" for k in range(shown) for run in runs]
    return grids.grid(images, len(runs), captions, "plain prompts and rewrites, from the same noise")


def _write_rewrites(path: Path, prompts: Sequence[str], runs: Sequence[ContenderRun]) -> None:
    judges = list(runs[0].scores)
    rows = []
    for run in runs:
        per = len(run.pictures) // len(prompts)
        means = {name: values.reshape(len(prompts), per).mean(axis=1) for name, values in run.scores.items()}
        for k, prompt in enumerate(prompts):
            rows.append([run.name, prompt, run.texts[k], run.distances[k], *(means[name][k] for name in judges)])
    outputs.write_csv(path, ["way", "prompt", "rewrite", "distance", *judges], rows)


def _write_pictures(folder: Path, usable: UsablePrompts, run: ContenderRun, scorer: RewriteScorer) -> None:
    """Write a contender's pictures as ``generate`` does, for the prompts that were typed, with the rewrite in a column beside."""
    rewrites = zip(usable.prompts, run.texts, strict=True)
    prompts = [Prompt(prompt, usable.categories.get(prompt), "", {"rewrite": text}) for prompt, text in rewrites]
    rows = [(prompt, seed) for prompt in prompts for seed in scorer.drawing.seeds(prompt.text)]
    for number, image in enumerate(run.pictures):
        outputs.write_png(folder / generation.picture_name(number), image)
    write_file(folder / generation.METADATA, generation.metadata(rows))


def _values(
    results: Sequence[ContenderResult],
    contenders: Sequence[Contender],
    usable: UsablePrompts,
    scorer: RewriteScorer,
    embedding: Embedding,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    writers = {PLAIN: None, **{contender.name: _identity(contender.writer) for contender in contenders}}
    return {
        "prompts": len(usable.prompts),
        **settings,
        "left out": usable.problems,
        "notes": _notes(usable),
        "embedding": embedding.name,
        "generator": scorer.generator(),
        "drawn": asdict(scorer.drawing),
        "judges": {name: judge.provenance() for name, judge in scorer.judges.items()},
        "versions": outputs.versions(),
        "ways": [{**asdict(result), "writer": writers[result.name]} for result in results],
    }


def _identity(writer: Writer) -> dict[str, Any]:
    """The name of a writer, and a digest of everything that its rewrites depend on."""
    known = json.dumps(writer.fingerprint(), sort_keys=True, default=str)
    return {"name": writer.name, "fingerprint": hashlib.sha256(known.encode()).hexdigest()[:16]}


def _notes(usable: UsablePrompts) -> list[str]:
    """Remarks that a reader should know before believing the numbers."""
    few = rough(len(usable.prompts))
    return [
        *([f"{count(len(usable.prompts), 'prompt')}; {few}."] if few else []),
        *([f"{count(usable.repeated, 'repeated prompt')} left out."] if usable.repeated else []),
    ]
