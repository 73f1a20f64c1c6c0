"""Writers compared: plain prompts, what each writer makes of them, and what judges say of the pictures.

Every number is over the same held-out prompts, drawn from the same noise, and every judge is asked about the prompt that was
typed, never about the rewrite. Besides the judges' scores (a CLIP score among them is the similarity to the original):

    distance        1 - cos between prompt and rewrite, in an embedding of meaning; the share beyond delta has drifted
    length          words of a rewrite, and how many are longer than the embedding's text encoder reads
    variety         mean distance between two rewrites of one prompt, and different rewrites as a share of all

Ways are also compared with each other, picture by picture: each with those before it in the list.

For a writer trained by Sem-DPO the report puts what the weights promise of the data (``objectives.sem_dpo.tilted``) beside what
was measured of the writer: the bound is on the data that it was trained on, and holds for the writer as far as it fits them.
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
from pipelines.writers.fitting import Fitting, fitting
from pipelines.writers.optimizer import DRAWN
from pipelines.writers.sampling import SAMPLE, BrokenOff, Decoding, candidates
from pipelines.writers.studio import Studio, judged, standardised
from pipelines.writers.writer import Writer

PLAIN = "plain"
PICTURES = "pictures"
"""Folder of the pictures that are kept, one folder for each way."""
OWNED = (
    *("report.md", "evaluation.json", "rewrites.csv", "side_by_side.png"),
    *(f"{PICTURES}/*/{pattern}" for pattern in generation.OWNED),
)
Interval = tuple[float, float, float]
"""A number and its 95 % interval, over prompts."""


@dataclass(frozen=True)
class Way:
    """One way to come from a prompt to what is drawn: a writer's first rewrite, or the best of ``best_of`` by the judges."""

    name: str
    writer: Writer
    best_of: int = 1
    drift: Drift | None = None  # of the data that it was trained on (``drift.read_drift``)


@dataclass(frozen=True)
class Found:
    """What one way came to on one list of prompts."""

    name: str
    texts: list[str]
    pictures: list[Any] = field(repr=False)
    scores: Mapping[str, np.ndarray]  # [prompts * pictures] of each judge, larger is better
    details: Mapping[str, np.ndarray]  # of judges that have parts, as JUDGE.PART
    distances: np.ndarray  # [prompts]
    varied: float  # mean distance between two rewrites of one prompt
    cut: int
    drift: Drift | None = None


@dataclass(frozen=True)
class Match:
    """A way against another on the same prompts and noise, by judge."""

    wins: Mapping[str, Interval]  # its win rate
    differences: Mapping[str, Interval]  # its score minus the other's


@dataclass(frozen=True)
class Line:
    """A way in the table."""

    name: str
    judges: Mapping[str, Interval]  # mean
    wins: Mapping[str, Interval]  # against the plain prompt
    against: Mapping[str, Match]  # each way before it, the plain prompt among them
    parts: Mapping[str, float]
    distance: float
    distance_quantiles: tuple[float, float, float]  # 50, 90, 99 %
    beyond: float  # share of rewrites further than delta
    words: float
    cut: int
    broken_off: int  # rewrites that had not ended at ``max_rewrite_tokens``
    varied: float
    different: float  # how many different rewrites there are, over how many there are in all
    unchanged: float
    promised: Mapping[str, float] | None = None


def evaluate(
    prompts: Sequence[str | Prompt],
    ways: Sequence[Way],
    studio: Studio,
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
) -> list[Line]:
    """Compare ways with each other and with the plain prompts; a report, pictures side by side and numbers go into ``output``.

    Prompts that one of the writers cannot take are left out for all of them, counted and named.

    Args:
        decoding: how every writer decodes its rewrites.
        seed: random seed of sampled rewrites.
        delta: a distance beyond which a rewrite counts as drifted.
        diversity_samples: rewrites of each prompt by which diversity is measured.
        max_distance: the first of a few rewrites that is no further from its prompt is taken, else the prompt itself, as
            ``PromptOptimizer`` does.
        keep_pictures: leave them in ``output/pictures``, a folder for each way, as ``generate`` does: ``diffalign score`` reads
            them.

    Raises:
        UserError: ``output`` holds something (unless ``overwrite``), two ways of one name, a number out of range, or a judge that
            fails.
    """
    folder = outputs.check_folder(output, overwrite)
    _refuse_equal_names(ways)
    fit = fitting(prompts, [way.writer for way in ways], decoding.max_rewrite_tokens)
    asked = fit.prompts
    choosing = Choosing(decoding, seed, diversity_samples, max_distance)
    found = [_found(PLAIN, asked, asked, studio, embedding, 0.0, progress)]
    for way in ways:
        texts, varied = _written(way, asked, studio, embedding, choosing, progress)
        found.append(replace(_found(way.name, asked, texts, studio, embedding, varied, progress), drift=way.drift))
    lines = [_line(one, found[:k], asked, delta) for k, one in enumerate(found)]
    outputs.clear(folder, OWNED)
    settings = {"seed": seed, **vars(decoding), "max_distance": max_distance, "delta": delta}
    values = _values(lines, ways, fit, studio, embedding, settings)
    outputs.write_json(folder / "evaluation.json", values)
    _write_rewrites(folder / "rewrites.csv", asked, found)
    outputs.write_png(folder / "side_by_side.png", pictures_side_by_side(asked, found, studio.how.pictures))
    if keep_pictures:
        for one in found:
            _write_pictures(folder / PICTURES / _folder_of(one.name), fit, one, studio)
    write_file(folder / "report.md", report(lines, values, found, embedding))
    return lines


def _refuse_equal_names(ways: Sequence[Way]) -> None:
    """Names of folders, too, which a name of other characters may come to."""
    taken = {_folder_of(PLAIN)}
    for way in ways:
        if _folder_of(way.name) in taken:
            raise UserError(
                f"Two ways are called {way.name!r}, or would leave their pictures in one folder of that name; give each writer a "
                "name of its own, as in mine=runs/sem-dpo."
            )
        taken.add(_folder_of(way.name))


def _folder_of(name: str) -> str:
    """What a way's pictures lie in: its name without what a file system could take for something else."""
    return re.sub(r"[^\w.+-]+", "-", name).strip(".-") or "writer"


# ------------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Choosing:
    """How a way's rewrites are drawn, and which may be chosen."""

    decoding: Decoding
    seed: int
    diversity_samples: int  # rewrites of each prompt by which diversity is measured
    max_distance: float | None

    def drawn(self, way: Way, prompts: list[str], progress: Any) -> tuple[list[list[str]], list[list[str]]]:
        """The rewrites of each prompt that one is chosen from, and those by which diversity is measured.

        Samples are the same however many are drawn; a beam search with more beams is another search, so each number of beams has
        a search of its own.
        """
        many = way.best_of if self.max_distance is None else max(way.best_of, DRAWN)
        several = self.diversity_samples
        if self.decoding.how == "sample":
            drawn = self._candidates(way, prompts, max(many, several), progress)
            return [texts[:many] for texts in drawn], [texts[:several] for texts in drawn]
        chosen_from = self._candidates(way, prompts, many, progress)
        return chosen_from, chosen_from if many == several else self._candidates(way, prompts, several, progress)

    def _candidates(self, way: Way, prompts: list[str], n: int, progress: Any) -> list[list[str]]:
        return candidates(way.writer, prompts, n, self.decoding, seed=self.seed, progress=progress)

    def allowed(self, prompts: Sequence[str], drawn: Sequence[Sequence[str]], embedding: Embedding) -> list[list[str]]:
        """Those near enough to their prompts; the prompt itself where none is."""
        if self.max_distance is None:
            return [list(texts) for texts in drawn]
        rows = [(prompt, text) for prompt, texts in zip(prompts, drawn, strict=True) for text in texts]
        far = iter(distance(embedding, [p for p, _ in rows], [t for _, t in rows]).tolist())
        near = [[text for text in texts if next(far) <= self.max_distance] for texts in drawn]
        return [texts or [prompt] for prompt, texts in zip(prompts, near, strict=True)]


def _written(
    way: Way, prompts: list[str], studio: Studio, embedding: Embedding, choosing: Choosing, progress: Any
) -> tuple[list[str], float]:
    """A rewrite of each prompt, and how far several of one prompt are apart."""
    drawn, several = choosing.drawn(way, prompts, progress)
    pairs = [(a, b) for texts in several for a, b in combinations(texts, 2)]
    varied = float(distance(embedding, [a for a, _ in pairs], [b for _, b in pairs]).mean()) if pairs else 0.0
    near = choosing.allowed(prompts, drawn, embedding)
    if way.best_of == 1:
        return [texts[0] for texts in near], varied
    return _best(prompts, [texts[: way.best_of] for texts in near], studio, progress), varied


def _best(prompts: Sequence[str], drawn: Sequence[Sequence[str]], studio: Studio, progress: Any) -> list[str]:
    """The best of each prompt's rewrites by the judges.

    Chosen on pictures of their own: the luck of the noise that chose it is not in what is measured.
    """
    rows = [(prompt, text) for prompt, texts in zip(prompts, drawn, strict=True) for text in texts]
    other_noise = replace(studio, how=replace(studio.how, seed=studio.how.seed + 1))
    scores = other_noise.scores([p for p, _ in rows], [t for _, t in rows], progress)
    ends = np.cumsum([len(texts) for texts in drawn])[:-1]
    overall = standardised({name: [part.tolist() for part in np.split(values, ends)] for name, values in scores.items()})
    return [texts[int(np.argmax(totals))] for texts, totals in zip(drawn, overall, strict=True)]


def _found(
    name: str, prompts: list[str], texts: list[str], studio: Studio, embedding: Embedding, varied: float, progress: Any
) -> Found:
    drawn = studio.pictures(prompts, texts, progress)
    repeated = [prompt for prompt in prompts for _ in range(studio.how.pictures)]
    scores = judged(studio.judges, drawn, repeated)
    parts = {}
    for judge_name, judge in studio.judges.items():
        if hasattr(judge, "details"):
            parts |= {f"{judge_name}.{k}": np.asarray(v, dtype=float) for k, v in judge.details(drawn, repeated).items()}
    distances = distance(embedding, prompts, texts).numpy().astype(float)
    return Found(name, texts, drawn, scores, parts, distances, varied, sum(bool(end) for end in embedding.cut(texts)))


def _line(one: Found, earlier: Sequence[Found], prompts: list[str], delta: float) -> Line:
    per = len(one.pictures) // len(prompts)
    groups = [prompt for prompt in prompts for _ in range(per)]

    def mean(values: np.ndarray) -> Interval:
        found = mean_with_interval(values, groups=groups)
        return found.mean, found.low, found.high

    against = {other.name: _match(one, other, groups) for other in earlier}
    return Line(
        name=one.name,
        judges={name: mean(values) for name, values in one.scores.items()},
        wins=against[PLAIN].wins if against else {},
        against=against,
        parts={name: _mean_of_known(values) for name, values in one.details.items()},
        distance=float(one.distances.mean()),
        distance_quantiles=tuple(float(q) for q in np.quantile(one.distances, [0.5, 0.9, 0.99])),
        beyond=float((one.distances > delta).mean()),
        words=float(np.mean([len(text.split()) for text in one.texts])),
        cut=one.cut,
        broken_off=sum(isinstance(text, BrokenOff) for text in one.texts),
        varied=one.varied,
        different=len(set(one.texts)) / len(one.texts),
        unchanged=float(np.mean([text == prompt for text, prompt in zip(one.texts, prompts, strict=True)])),
        promised=None if one.drift is None else {"alpha": one.drift.alpha, **vars(one.drift.promised(delta))},
    )


def _match(one: Found, other: Found, groups: Sequence[str]) -> Match:
    """``one`` against ``other``: pictures of the same prompts from the same noise."""
    wins, differences = {}, {}
    for name, scores in one.scores.items():
        won = win_rate(other.scores[name], scores, groups=groups)
        more = paired_difference(other.scores[name], scores, groups=groups)
        wins[name], differences[name] = (won.rate, won.low, won.high), (more.mean, more.low, more.high)
    return Match(wins, differences)


def _mean_of_known(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


# ----------------------------------------------------------------------------------------------------------------- files


def pictures_side_by_side(prompts: Sequence[str], found: Sequence[Found], per_prompt: int) -> Any:
    """A row for each prompt, a column for each way, from the same noise."""
    shown = min(SHOWN, len(prompts))
    images = [one.pictures[k * per_prompt] for k in range(shown) for one in found]
    captions = [f"{one.name}: {one.texts[k]}" for k in range(shown) for one in found]
    return grids.grid(images, len(found), captions, "plain prompts and rewrites, from the same noise")


def _write_rewrites(path: Path, prompts: Sequence[str], found: Sequence[Found]) -> None:
    judges = list(found[0].scores)
    rows = []
    for one in found:
        per = len(one.pictures) // len(prompts)
        means = {name: values.reshape(len(prompts), per).mean(axis=1) for name, values in one.scores.items()}
        for k, prompt in enumerate(prompts):
            rows.append([one.name, prompt, one.texts[k], one.distances[k], *(means[name][k] for name in judges)])
    outputs.write_csv(path, ["way", "prompt", "rewrite", "distance", *judges], rows)


def _write_pictures(folder: Path, fit: Fitting, one: Found, studio: Studio) -> None:
    """A way's pictures as ``generate`` leaves its own, under the prompts that were typed; what was drawn stands beside these."""
    rewrites = zip(fit.prompts, one.texts, strict=True)
    rows = [(Prompt(p, fit.categories.get(p), "", {"rewrite": text}), s) for p, text in rewrites for s in studio.how.seeds(p)]
    for number, image in enumerate(one.pictures):
        outputs.write_png(folder / generation.picture_name(number), image)
    write_file(folder / generation.METADATA, generation.metadata(rows))


def _values(
    lines: Sequence[Line], ways: Sequence[Way], fit: Fitting, studio: Studio, embedding: Embedding, settings: Mapping[str, Any]
) -> dict[str, Any]:
    writers = {PLAIN: None, **{way.name: _identity(way.writer) for way in ways}}
    return {
        "prompts": len(fit.prompts),
        **settings,
        "left out": fit.problems,
        "notes": _notes(fit),
        "embedding": embedding.name,
        "generator": studio.generator(),
        "drawn": asdict(studio.how),
        "judges": {name: judge.provenance() for name, judge in studio.judges.items()},
        "versions": outputs.versions(),
        "ways": [{**asdict(line), "writer": writers[line.name]} for line in lines],
    }


def _identity(writer: Writer) -> dict[str, Any]:
    """Where a writer was read from, and a short name for all that its rewrites depend on."""
    known = json.dumps(writer.fingerprint(), sort_keys=True, default=str)
    return {"name": writer.name, "fingerprint": hashlib.sha256(known.encode()).hexdigest()[:16]}


def _notes(fit: Fitting) -> list[str]:
    """What a reader should know before believing the numbers."""
    few = rough(len(fit.prompts))
    return [
        *([f"{count(len(fit.prompts), 'prompt')}; {few}."] if few else []),
        *([f"{count(fit.repeated, 'repeated prompt')} left out."] if fit.repeated else []),
    ]
