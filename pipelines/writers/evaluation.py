"""Writers compared: plain prompts, what each writer makes of them, and what judges say of the pictures.

Every number is over the same held-out prompts, drawn from the same noise, and every judge is asked about the prompt that was
typed, never about the rewrite. Besides the judges' scores (a CLIP score among them is the similarity to the original):

    distance        1 - cos between prompt and rewrite, in an embedding of meaning; the share beyond delta has drifted
    length          words of a rewrite, and how many are longer than the embedding's text encoder reads
    variety         mean distance between two rewrites of one prompt, and the share of rewrites that differ from all others

For a writer trained by Sem-DPO the report puts what the weights promise of the data (``objectives.sem_dpo.tilted``) beside what
was measured of the writer: the bound is on the data that it was trained on, and holds for the writer as far as it fits them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.errors import UserError
from diffalign.evaluate import mean_with_interval, win_rate
from pipelines import grids, outputs
from pipelines.markdown import table_lines
from pipelines.progress import Progress
from pipelines.prompts import Prompt
from pipelines.report_page import interval
from pipelines.semantics import Embedding, distance
from pipelines.writers.drift import Drift
from pipelines.writers.fitting import fitting
from pipelines.writers.optimizer import DRAWN
from pipelines.writers.sampling import BrokenOff, candidates
from pipelines.writers.studio import Studio, judged, standardised
from pipelines.writers.writer import Writer

PLAIN = "plain"
OWNED = ("report.md", "evaluation.json", "rewrites.csv", "side_by_side.png")
SHOWN = 12
"""Prompts in the picture."""


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
class Line:
    """A way in the table. Intervals are 95 %, over prompts."""

    name: str
    judges: Mapping[str, tuple[float, float, float]]  # mean with its interval
    wins: Mapping[str, tuple[float, float, float]]  # against the plain prompt
    parts: Mapping[str, float]
    distance: float
    distance_quantiles: tuple[float, float, float]  # 50, 90, 99 %
    beyond: float  # share of rewrites further than delta
    words: float
    cut: int
    broken_off: int  # rewrites that had not ended at ``max_rewrite_tokens``
    varied: float
    different: float
    unchanged: float
    promised: Mapping[str, float] | None = None


def evaluate(
    prompts: Sequence[str | Prompt],
    ways: Sequence[Way],
    studio: Studio,
    embedding: Embedding,
    output: str | Path,
    *,
    delta: float = 0.1,
    seed: int = 0,
    variety: int = 4,
    max_distance: float | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_rewrite_tokens: int = 75,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Line]:
    """Compare ways with each other and with the plain prompts; a report, pictures side by side and numbers go into ``output``.

    Prompts that one of the writers cannot take are left out for all of them, counted and named.

    Args:
        delta: a distance beyond which a rewrite counts as drifted.
        variety: rewrites of each prompt by which variety is measured.
        max_distance: the first of a few rewrites that is no further from its prompt is taken, else the prompt itself, as
            ``PromptOptimizer`` does.
        temperature, top_p, top_k, max_rewrite_tokens: how rewrites are sampled (``sampling.candidates``).

    Raises:
        UserError: ``output`` holds something (unless ``overwrite``), two ways of one name, or a judge that fails.
    """
    folder = outputs.check_folder(output, overwrite)
    if repeated := [w.name for k, w in enumerate(ways) if w.name in {PLAIN, *(v.name for v in ways[:k])}]:
        raise UserError(f"Two ways are called {repeated[0]!r}; give each writer a name of its own, as in mine=runs/sem-dpo.")
    fit = fitting(prompts, [way.writer for way in ways], max_rewrite_tokens)
    asked = fit.prompts
    sampled = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_rewrite_tokens": max_rewrite_tokens}
    choosing = Choosing(variety, max_distance, {"seed": seed, **sampled})
    found = [_found(PLAIN, asked, asked, studio, embedding, 0.0, progress)]
    for way in ways:
        texts, varied = _written(way, asked, studio, embedding, choosing, progress)
        found.append(replace(_found(way.name, asked, texts, studio, embedding, varied, progress), drift=way.drift))
    lines = [_line(one, found[0], asked, delta) for one in found]
    outputs.clear(folder, OWNED)
    how = {"seed": seed, **sampled, "max_distance": max_distance, "left out": fit.problems}
    outputs.write_json(folder / "evaluation.json", _values(lines, asked, studio, embedding, delta, how))
    _write_rewrites(folder / "rewrites.csv", asked, found)
    outputs.write_png(folder / "side_by_side.png", pictures_side_by_side(asked, found, studio.how.pictures))
    outputs.write_file(folder / "report.md", report(lines, asked, found, delta, embedding, fit.problems))
    return lines


# ------------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Choosing:
    """How a way's rewrites are drawn, and which may be chosen."""

    variety: int  # rewrites of each prompt by which variety is measured
    max_distance: float | None
    sampled: Mapping[str, Any]

    def candidates(self, way: Way) -> int:
        """How many a way's rewrite is chosen from."""
        return way.best_of if self.max_distance is None else max(way.best_of, DRAWN)

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
    many, variety = choosing.candidates(way), choosing.variety
    drawn = candidates(way.writer, prompts, max(variety, many), "sample", **choosing.sampled, progress=progress)
    pairs = [(a, b) for texts in drawn for a, b in combinations(texts[:variety], 2)]
    varied = float(distance(embedding, [a for a, _ in pairs], [b for _, b in pairs]).mean()) if pairs else 0.0
    near = choosing.allowed(prompts, [texts[:many] for texts in drawn], embedding)
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


def _line(one: Found, plain: Found, prompts: list[str], delta: float) -> Line:
    per = len(one.pictures) // len(prompts)
    groups = [prompt for prompt in prompts for _ in range(per)]

    def mean(values: np.ndarray) -> tuple[float, float, float]:
        found = mean_with_interval(values, groups=groups)
        return found.mean, found.low, found.high

    def won(name: str) -> tuple[float, float, float]:
        found = win_rate(plain.scores[name], one.scores[name], groups=groups)
        return found.rate, found.low, found.high

    return Line(
        name=one.name,
        judges={name: mean(values) for name, values in one.scores.items()},
        wins={} if one is plain else {name: won(name) for name in one.scores},
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


def _mean_of_known(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


# ---------------------------------------------------------------------------------------------------------------- report


def report(
    lines: Sequence[Line],
    prompts: Sequence[str],
    found: Sequence[Found],
    delta: float,
    embedding: Embedding,
    left_out: Sequence[str] = (),
) -> str:
    """Markdown: scores, drift, the bound, and some rewrites to read."""
    parts = [
        f"# Prompt writers on {len(prompts)} held-out prompts",
        "Scores are for the prompt that was typed. In brackets: 95 % interval over prompts; wins are against the plain prompt.",
        *_left_out(left_out),
        _score_table(lines),
        "## How far rewrites went",
        "\n".join(_distance_table(lines, delta)),
        *_promises(lines, found, embedding),
        "## Pictures\n\n![Plain prompts and rewrites, from the same noise](side_by_side.png)",
        "## Rewrites",
        "\n".join(table_lines([PLAIN, *(one.name for one in found[1:])], _examples(prompts, found))),
    ]
    return "\n\n".join(parts) + "\n"


def _score_table(lines: Sequence[Line]) -> str:
    names, parts = list(lines[0].judges), list(lines[0].parts)
    head = ["", *(h for name in names for h in (name, f"{name} wins")), *parts]
    rows = []
    for line in lines:
        cells = [line.name]
        for name in names:
            cells += [_interval(line.judges[name]), _percent(line.wins[name]) if line.wins else "-"]
        rows.append([*cells, *(f"{line.parts[name]:.3f}" for name in parts)])
    return "\n".join(table_lines(head, rows))


def _interval(values: tuple[float, float, float]) -> str:
    mean, low, high = values
    return f"{mean:.4g} ({interval(low, high, '{:.4g}'.format)})"


def _percent(values: tuple[float, float, float]) -> str:
    return "{:.0f} % ({:.0f} to {:.0f})".format(*(100 * v for v in values))


def _distance_table(lines: Sequence[Line], delta: float) -> list[str]:
    far = ["mean distance", "median / 90 % / 99 %", f"beyond {delta:g}"]
    head = ["", *far, "words", "cut", "broken off", "variety", "different", "unchanged"]
    rows = [
        [
            line.name,
            f"{line.distance:.3f}",
            " / ".join(f"{q:.3f}" for q in line.distance_quantiles),
            f"{100 * line.beyond:.1f} %",
            f"{line.words:.1f}",
            str(line.cut),
            str(line.broken_off),
            f"{line.varied:.3f}",
            f"{100 * line.different:.0f} %",
            f"{100 * line.unchanged:.0f} %",
        ]
        for line in lines
    ]
    return table_lines(head, rows)


def _left_out(problems: Sequence[str], shown: int = 10) -> list[str]:
    if not problems:
        return []
    more = [f"* and {len(problems) - shown} more"] if len(problems) > shown else []
    listed = [*(f"* {problem}" for problem in problems[:shown]), *more]
    return ["\n".join([f"{len(problems)} prompts that cannot be rewritten were left out:", "", *listed])]


def _promises(lines: Sequence[Line], found: Sequence[Found], embedding: Embedding) -> list[str]:
    told = [(line, one.drift) for line, one in zip(lines, found, strict=True) if line.promised and one.drift]
    if not told:
        return []
    head = ["", "alpha", "winners' mean distance", "as weighted", "winners beyond", "as weighted", "bound", "measured"]
    rows = [
        [
            line.name,
            f"{line.promised['alpha']:g}",
            *(f"{line.promised[name]:.3f}" for name in ("mean", "tilted_mean")),
            *(f"{100 * line.promised[name]:.1f} %" for name in ("beyond", "tilted_beyond", "bound")),
            f"{100 * line.beyond:.1f} %" if _comparable(drift, embedding) else f"- (trained by distances of {drift.embedding})",
        ]
        for line, drift in told
    ]
    remark = (
        "The first columns are of the winners in the training data, plain and as Sem-DPO's weights see them; the bound is "
        "exp(-alpha delta) / Z. It is on these data, not on the writer: nothing follows for a writer that does not fit them."
    )
    return ["## What the weights promise, and what was measured", "\n".join(table_lines(head, rows)), remark]


def _comparable(drift: Drift, embedding: Embedding) -> bool:
    """Whether a writer's data were measured as its rewrites are. Of a column in the data nobody knows."""
    return not drift.fingerprint or drift.fingerprint == embedding.fingerprint


def _examples(prompts: Sequence[str], found: Sequence[Found]) -> list[list[str]]:
    return [[prompts[k], *(one.texts[k] for one in found[1:])] for k in range(min(SHOWN, len(prompts)))]


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


def _values(
    lines: Sequence[Line], prompts: Sequence[str], studio: Studio, embedding: Embedding, delta: float, sampled: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "prompts": len(prompts),
        **sampled,
        "delta": delta,
        "embedding": embedding.name,
        "drawn": asdict(studio.how),
        "judges": {name: judge.provenance() for name, judge in studio.judges.items()},
        "versions": outputs.versions(),
        "ways": [asdict(line) for line in lines],
    }
