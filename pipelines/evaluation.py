"""Evaluation of a tuned model against its base: both sample the same prompts from the same noise, and judges compare them.

``N`` = pictures of one model, ``images_per_prompt`` in a row for each prompt.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import reward_models
from diffalign import evaluate as statistics
from diffalign.errors import UserError
from diffalign.written_aside import write_file
from pipelines import grids, outputs, report_page, sampling
from pipelines.progress import Progress
from pipelines.prompts import Prompt
from pipelines.sampling import SamplerSettings
from pipelines.text_tables import number
from reward_models._judge import Scorer
from reward_models.base import DetailedJudge, Judge, JudgeError, ParticularJudge

SYSTEMS = ("base", "tuned")
OWNED = (
    "base/[0-9]*.png",
    "tuned/[0-9]*.png",
    "summary.json",
    "scores.csv",
    "side_by_side.png",
    "best_and_worst.png",
    "index.html",
)
"""Patterns of the files that a report consists of."""
SHOWN = 12
"""Pairs on the sheet ``side_by_side.png``, and half as many at either end of ``best_and_worst.png``."""
FEW_PROMPTS = 50

Load = Callable[[str], Any]
"""Model as the user named it -> a Diffusers pipeline."""


@dataclass(frozen=True)
class Summary:
    """The result of an evaluation: ``values`` is the content of ``summary.json`` in ``output``."""

    values: dict[str, Any]
    output: Path

    def to_text(self) -> str:
        """A Markdown table with one line per judge, and what to keep in mind."""
        return report_page.as_text(self.values, self.output)


@dataclass(frozen=True)
class _Job:
    prompt: Prompt
    seed: int


@dataclass(frozen=True)
class _Scores:
    """One judge's numbers on one model's pictures: ``score`` [N] and, by name, details [N]; NaN where there is none."""

    score: np.ndarray
    details: dict[str, np.ndarray] = field(default_factory=dict)


def evaluate(
    base: str,
    tuned: str,
    prompts: Sequence[Prompt | str],
    judges: Sequence[Judge | str] | Mapping[str, Judge],
    output: str | Path,
    *,
    load: Load,
    seed: int = 0,
    images_per_prompt: int = 1,
    tie_tolerance: float = 0.0,
    overwrite: bool = False,
    progress: Progress | None = None,
    **sampler_options: Any,
) -> Summary:
    """Sample, judge, compare and report. Writes into ``output`` the files of ``OWNED``; ``summary.json`` comes last.

    ``sampler_options`` are the fields of ``sampling.SamplerSettings`` and hold for both models; a guidance scale or a sampler
    that is left open is the one that the base wants. The models are loaded one after the other, so one at a time is in memory.
    ``tie_tolerance`` is in units of each judge's score.

    Raises:
        UserError: an unknown judge or sampler, prompts that a judge cannot judge by, a model that cannot be loaded, an
            output folder that holds something (unless ``overwrite``).
    """
    start = time.perf_counter()
    asked = [p if isinstance(p, Prompt) else Prompt(p) for p in prompts]
    panel = load_panel(judges, asked)
    sampler_settings = SamplerSettings(**sampler_options)
    folder = outputs.check_folder(output, overwrite)
    load(tuned)  # a model that cannot be loaded is better found out before the base has sampled for an hour
    seeds = sampling.picture_seeds(len(asked), images_per_prompt, seed)
    jobs = [_Job(asked[i // images_per_prompt], s) for i, s in enumerate(seeds)]
    sampler_settings, scores = _run_both((base, tuned), load, sampler_settings, jobs, panel, folder, progress)
    values = {
        "base": base,
        "tuned": tuned,
        "prompts": len(asked),
        "images_per_prompt": images_per_prompt,
        **asdict(sampler_settings),
        "seed": seed,
        "tie_tolerance": tie_tolerance,
        "seconds": 0.0,
        "judges": {name: _compare(j, *(scores[s][name] for s in SYSTEMS), jobs, tie_tolerance) for name, j in panel.items()},
        "versions": outputs.versions(),
    }
    values["notes"] = _notes(values, jobs)
    values |= _faithfulness(values["judges"])
    values["seconds"] = round(time.perf_counter() - start, 2)
    _write_report(folder, jobs, scores, values)
    outputs.write_json(folder / "summary.json", values)
    return Summary(values, folder)


# -------------------------------------------------------------------------------------------------------------- pictures


def load_panel(judges: Sequence[Judge | str] | Mapping[str, Judge], prompts: Sequence[Prompt]) -> dict[str, Judge]:
    """The judges by name, loaded, if they exist and can judge by these prompts.

    Raises:
        UserError: no prompt or no judge, an unknown judge, one asked for twice, two that are not comparable, prompts that a
            judge cannot judge by.
    """
    if not prompts or not judges:
        raise UserError(f"An evaluation needs at least one prompt and one judge; got {len(prompts)} and {len(judges)}.")
    try:
        panel = reward_models.panel_of(judges)
        for judge in panel.values():
            if isinstance(judge, ParticularJudge):
                judge.check_prompts([p.text for p in prompts])
            if isinstance(judge, Scorer):
                judge.check_pointwise()
    except JudgeError as error:
        raise UserError(str(error)) from error
    return panel


def _run_both(
    names: tuple[str, str],
    load: Load,
    settings: SamplerSettings,
    jobs: list[_Job],
    panel: dict[str, Judge],
    folder: Path,
    progress: Progress | None,
) -> tuple[SamplerSettings, dict[str, dict[str, _Scores]]]:
    """Each model's scores by system and judge, and the sampler settings as they were resolved for the base."""
    scores: dict[str, dict[str, _Scores]] = {}
    for system, name in zip(SYSTEMS, names, strict=True):
        _release_memory()
        pipe = load(name)
        if system == "base":
            settings = settings.resolved(pipe)
            outputs.clear(folder, OWNED)
        scores[system] = _run(pipe, system, settings, jobs, panel, folder, progress)
        del pipe
    return settings, scores


def _release_memory() -> None:
    """Give the memory of a pipeline just dropped back to the device; on the CPU that has happened already."""
    import torch

    if torch.accelerator.is_available():
        gc.collect()
        torch.accelerator.empty_cache()


def _run(
    pipe: Any,
    system: str,
    settings: SamplerSettings,
    jobs: list[_Job],
    panel: dict[str, Judge],
    folder: Path,
    progress: Progress | None,
) -> dict[str, _Scores]:
    """Sample, save and judge batch by batch, so that no more than a batch of pictures is in memory."""
    parts: dict[str, list[_Scores]] = {name: [] for name in panel}
    for start in range(0, len(jobs), settings.batch_size):
        batch = jobs[start : start + settings.batch_size]
        texts = [job.prompt.text for job in batch]
        images = sampling.sample(pipe, texts, seeds=[job.seed for job in batch], **asdict(settings))
        for i, image in enumerate(images, start):
            outputs.write_png(folder / system / f"{i:05d}.png", image)
        for name, scores in _judged(panel, images, texts).items():
            parts[name].append(scores)
        if progress is not None:
            progress(system, start + len(batch), len(jobs))
    return {name: _joined(some) for name, some in parts.items()}


def _judged(panel: dict[str, Judge], images: list[Image.Image], prompts: list[str]) -> dict[str, _Scores]:
    """Scores and details by judge; pictures that a safety checker blacked out count as not judged."""
    hidden = np.array([bool(image.info.get(sampling.FLAGGED)) for image in images])
    ours = {name: judge for name, judge in panel.items() if isinstance(judge, Scorer)}
    scores = reward_models.score(ours, images, prompts, progress=False) if ours else {}  # in one pass: they may share a backbone
    scores |= {name: judge.score(images, prompts) for name, judge in panel.items() if name not in ours}
    judged = {}
    for name, judge in panel.items():
        score = _numbers(name, scores[name], len(images))
        details = judge.details(images, prompts) if isinstance(judge, DetailedJudge) else {}
        judged[name] = _Scores(np.where(hidden, np.nan, score), {k: np.where(hidden, np.nan, v) for k, v in details.items()})
    return judged


def _numbers(name: str, given: Any, count: int) -> np.ndarray:
    """[count] float64 of what a judge said. Raises UserError if it is something else."""
    import torch

    try:
        numbers = torch.as_tensor(given).detach().to("cpu", torch.float64).numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"The judge {name} should give scores; it gave {type(given).__name__}.") from error
    if numbers.shape != (count,):
        raise UserError(f"The judge {name} gave scores {list(numbers.shape)} for {count} pictures; it should give one for each.")
    return numbers


def _joined(parts: list[_Scores]) -> _Scores:
    details = {name: np.concatenate([p.details[name] for p in parts]) for name in parts[0].details}
    return _Scores(np.concatenate([p.score for p in parts]), details)


# --------------------------------------------------------------------------------------------------------------- numbers


def _compare(judge: Judge, base: _Scores, tuned: _Scores, jobs: list[_Job], tie_tolerance: float) -> dict[str, Any]:
    """One judge's part of the summary. Pictures of equal prompts are one observation."""
    prompts = [job.prompt.text for job in jobs]
    sign = 1.0 if judge.info.higher_is_better else -1.0
    won = statistics.win_rate(sign * base.score, sign * tuned.score, groups=prompts, tie_tolerance=tie_tolerance)
    difference = statistics.paired_difference(base.score, tuned.score, groups=prompts)
    paired = ~np.isnan(base.score + tuned.score)
    return {
        "base": asdict(statistics.mean_with_interval(np.where(paired, base.score, np.nan), groups=prompts)),
        "tuned": asdict(statistics.mean_with_interval(np.where(paired, tuned.score, np.nan), groups=prompts)),
        "difference": {**asdict(difference), "effect_size": statistics.effect_size(base.score, tuned.score, groups=prompts)},
        "win_rate": won.rate,
        "win_rate_interval": [won.low, won.high],
        "wins": won.wins,
        "ties": won.ties,
        "losses": won.losses,
        "sign_test_p": won.p_value,
        "excluded": won.excluded,
        "details": {name: _detail(base.details[name], tuned.details[name]) for name in base.details},
        "higher_is_better": judge.info.higher_is_better,
        "description": judge.info.description,
        "licence": judge.info.licence,
    }


def _detail(base: np.ndarray, tuned: np.ndarray) -> dict[str, float]:
    """Means over the pictures on which both sides have the measurement."""
    both = ~np.isnan(base + tuned)
    if not both.any():
        return {"base": float("nan"), "tuned": float("nan")}
    return {"base": float(base[both].mean()), "tuned": float(tuned[both].mean())}


def _faithfulness(judges: dict[str, Any]) -> dict[str, Any]:
    """``faithfulness`` of both models, where a judge measures it."""
    found = next((j["details"]["faithfulness"] for j in judges.values() if "faithfulness" in j["details"]), None)
    return {} if found is None else {"faithfulness": found}


def _notes(values: dict[str, Any], jobs: list[_Job]) -> list[str]:
    """Warnings that the reader of the numbers should know."""
    notes, different = [], len({job.prompt.text for job in jobs})
    if different < FEW_PROMPTS:
        notes.append(f"{different} different prompts are few: below {FEW_PROMPTS} the intervals are rough.")
    for name, judge in values["judges"].items():
        if judge["excluded"]:
            notes.append(
                f"{name}: {judge['excluded']} pairs are left out, a picture being hidden by a safety checker or not judged."
            )
    return notes


# ---------------------------------------------------------------------------------------------------------------- report


def _write_report(folder: Path, jobs: list[_Job], scores: dict[str, dict[str, _Scores]], values: dict[str, Any]) -> None:
    _write_scores(folder / "scores.csv", jobs, scores)
    pairs = [_pair(i, job, scores) for i, job in enumerate(jobs)]
    first = next(iter(values["judges"]))
    title = f"{values['tuned']} (right) against {values['base']} (left)"
    outputs.write_png(folder / "side_by_side.png", _sheet(folder, pairs[:SHOWN], first, title))
    sign = 1.0 if values["judges"][first]["higher_is_better"] else -1.0
    best, worst = _extremes(sign * (scores["tuned"][first].score - scores["base"][first].score))
    sheets = [
        _sheet(folder, [pairs[i] for i in chosen], first, f"{title}: {which} difference by {first}")
        for chosen, which in ((best, "the best"), (worst, "the worst"))
    ]
    outputs.write_png(folder / "best_and_worst.png", grids.stack(sheets))
    write_file(folder / "index.html", report_page.render(values, pairs, best, worst, _are_small(folder, pairs[0])))


def _write_scores(path: Path, jobs: list[_Job], scores: dict[str, dict[str, _Scores]]) -> None:
    """One row per picture and judge."""
    judges = scores["base"]
    details = list(dict.fromkeys(name for judged in judges.values() for name in judged.details))
    rows = [
        [i, job.prompt.text, job.prompt.category, job.seed, system, name, float(judged.score[i])]
        + [float(judged.details[d][i]) if d in judged.details else None for d in details]
        for i, job in enumerate(jobs)
        for system in SYSTEMS
        for name, judged in scores[system].items()
    ]
    outputs.write_csv(path, ["picture", "prompt", "category", "seed", "system", "judge", "score", *details], rows)


def _pair(i: int, job: _Job, scores: dict[str, dict[str, _Scores]]) -> report_page.Pair:
    numbers = {name: (float(scores["base"][name].score[i]), float(scores["tuned"][name].score[i])) for name in scores["base"]}
    return report_page.Pair(job.prompt.text, job.prompt.category, job.seed, f"base/{i:05d}.png", f"tuned/{i:05d}.png", numbers)


def _extremes(gain: np.ndarray) -> tuple[list[int], list[int]]:
    """Pictures with the largest and with the smallest gain, most extreme first; earlier pictures first among equals."""
    judged = np.flatnonzero(~np.isnan(gain))
    if len(judged) == 0:
        return [0], [0]
    most = min(SHOWN // 2, max(1, len(judged) // 2))
    best = judged[np.argsort(-gain[judged], kind="stable")][:most]
    worst = judged[np.argsort(gain[judged], kind="stable")][:most]
    return best.tolist(), worst.tolist()


def _sheet(folder: Path, pairs: Sequence[report_page.Pair], judge: str, header: str) -> Image.Image:
    sides = [[Image.open(folder / getattr(pair, side)) for pair in pairs] for side in SYSTEMS]
    scores = [tuple(number(x) for x in pair.scores[judge]) for pair in pairs]
    return grids.side_by_side(*sides, [pair.prompt for pair in pairs], scores, columns=3, header=header)


def _are_small(folder: Path, pair: report_page.Pair) -> bool:
    with Image.open(folder / pair.base) as image:
        return max(image.size) < grids.SMALLEST
