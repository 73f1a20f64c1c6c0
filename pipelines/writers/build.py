"""Preferences between rewrites, made: a writer proposes, a generator draws, judges choose, and what is far apart becomes a pair.

For each prompt: some candidates, drawn from the same noise, judged against the prompt; the best and the worst, if they are far
enough apart, are a pair. What was drawn and judged is kept beside the pairs, one line for each prompt (``OUT.candidates.jsonl``):
a run that was cut off goes on from there, and other pairs (another gap, a cap on drift) can be made without drawing again.

With ``torchrun`` or ``accelerate launch`` each process takes its share of the prompts, and the first one makes the pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.errors import UserError
from pipelines import outputs
from pipelines.progress import Progress
from pipelines.rewrite_pairs import RewritePair, write_rewrites
from pipelines.semantics import Embedding, distance
from pipelines.writers.sampling import How, candidates
from pipelines.writers.studio import Studio, standardised
from pipelines.writers.templates import clean
from pipelines.writers.writer import Writer


@dataclass(frozen=True)
class Proposing:
    """How candidates are found: ``count`` of each prompt, shared out among ``ways``."""

    count: int = 8
    ways: tuple[How, ...] = ("sample", "diverse-beam")
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    max_rewrite_tokens: int = 75
    with_prompt: bool = False  # the prompt itself is a candidate, too

    def __post_init__(self) -> None:
        if self.count < 2:
            raise UserError(f"A pair takes two candidates at least; got {self.count}.")
        if not 1 <= len(self.ways) <= self.count:
            raise UserError(f"{self.count} candidates cannot be shared out among {len(self.ways)} ways of looking for them.")

    def propose(self, writer: Writer, prompts: Sequence[str]) -> list[list[tuple[str, str]]]:
        """(text, way) of different candidates for each prompt, in the order they were found."""
        found: list[dict[str, str]] = [{p: "prompt"} if self.with_prompt else {} for p in prompts]
        for k, way in enumerate(self.ways):
            n = self.count // len(self.ways) + (k < self.count % len(self.ways))
            warped = {"temperature": self.temperature, "top_p": self.top_p} if way == "sample" else {}
            drawn = candidates(writer, prompts, n, way, self.seed, **warped, max_rewrite_tokens=self.max_rewrite_tokens)
            for texts, known in zip(drawn, found, strict=True):
                for text in texts:
                    known.setdefault(text, way)
        return [list(known.items()) for known in found]


@dataclass(frozen=True)
class Pairing:
    """Which candidates become a pair."""

    min_gap: float = 1.0  # between best and worst, in usual differences of two rewrites of a prompt (``studio.standardised``)
    max_distance: float | None = None  # candidates further from their prompt cannot be chosen (they may be rejected)


@dataclass(frozen=True)
class Candidates:
    """What was found for one prompt."""

    prompt: str
    texts: tuple[str, ...]
    ways: tuple[str, ...]
    distances: tuple[float, ...]
    scores: Mapping[str, tuple[float, ...]]  # of each judge

    def as_line(self) -> str:
        values = {"prompt": self.prompt, "texts": self.texts, "ways": self.ways, "distances": self.distances}
        return json.dumps({**values, "scores": self.scores}, ensure_ascii=False) + "\n"

    @staticmethod
    def from_line(line: str) -> Candidates:
        values = json.loads(line)
        columns = {name: tuple(values[name]) for name in ("texts", "ways", "distances")}
        return Candidates(values["prompt"], **columns, scores={name: tuple(v) for name, v in values["scores"].items()})


@dataclass(frozen=True)
class Built:
    """What a build came to."""

    pairs: int
    prompts: int
    too_close: int  # prompts whose best and worst were not far enough apart
    too_few: int  # prompts with less than two candidates that differ (or none near enough to be chosen)
    drifted: float  # share of winners further than ``far`` from their prompt
    winner_distance: float  # mean
    loser_distance: float
    far: float
    path: Path = field(compare=False)

    def to_text(self) -> str:
        """A few lines for the terminal."""
        return "\n".join(
            [
                f"{self.path}: {self.pairs} pairs from {self.prompts} prompts",
                f"left out: {self.too_close} prompts whose candidates are too close, {self.too_few} with too few",
                f"mean distance from the prompt: winners {self.winner_distance:.3f}, losers {self.loser_distance:.3f}; "
                f"{100 * self.drifted:.0f} % of the winners are further than {self.far:g}",
            ]
        )


def build(
    prompts: Sequence[str],
    writer: Writer,
    studio: Studio,
    embedding: Embedding,
    out: str | Path,
    *,
    proposing: Proposing = Proposing(),
    pairing: Pairing = Pairing(),
    far: float = 0.1,
    chunk: int = 8,
    overwrite: bool = False,
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
) -> Built | None:
    """Make pairs of prompts, each different one once, into ``out`` (.jsonl or .parquet).

    Args:
        far: a distance beyond which a winner counts as drifted, in the summary.
        chunk: prompts that are proposed for, drawn and judged together; what is lost when a run is cut off.
        share: (r, n): this process takes every n-th prompt from the r-th on; the first makes the pairs when all have come to
            ``wait``, the others return None.

    Raises:
        UserError: ``out`` is there (unless ``overwrite``), candidates beside it are of another build, a judge fails, or no pair
            is left.
    """
    path = Path(out).expanduser()
    check_out(path, overwrite)
    asked = list(dict.fromkeys(clean(prompt) for prompt in prompts))
    if not asked:
        raise UserError("There are no prompts to build from.")
    journal = Journal(path, _purpose(writer, studio, embedding, proposing), overwrite and share[0] == 0)
    if overwrite:
        wait()  # until the first process has dropped what is of another build
    known = journal.read()
    mine = [prompt for prompt in asked[share[0] :: share[1]] if prompt not in known]
    with journal.part(share[0]) as add:
        for low in range(0, len(mine), chunk):
            for found in _found(mine[low : low + chunk], writer, studio, embedding, proposing):
                add(found)
            if progress is not None:
                progress("building", min(low + chunk, len(mine)), len(mine))
    wait()
    if share[0]:
        return None
    known = journal.read()
    kept = [known[prompt] for prompt in asked]
    journal.gather([*kept, *(one for prompt, one in known.items() if prompt not in set(asked))])
    return pair_up(kept, path, pairing, far, {"generator": _name_of(studio.pipe), "writer": writer.name or "writer"})


def check_out(path: Path, overwrite: bool) -> None:
    """Raises UserError for a file that is there, or one of another kind."""
    if path.suffix.lower() not in (".jsonl", ".parquet"):
        raise UserError(f"{path} ends in {path.suffix or 'nothing'}; pairs are written as .jsonl or .parquet.")
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there already. Name another --out, or add --overwrite to replace it.")


def _found(
    prompts: Sequence[str], writer: Writer, studio: Studio, embedding: Embedding, proposing: Proposing
) -> Iterator[Candidates]:
    """Candidates of some prompts, judged."""
    proposed = proposing.propose(writer, prompts)
    rows = [(prompt, text) for prompt, found in zip(prompts, proposed, strict=True) for text, _ in found]
    asked, texts = [p for p, _ in rows], [t for _, t in rows]
    distances, scores = distance(embedding, asked, texts).tolist(), studio.scores(asked, texts)
    at = 0
    for prompt, found in zip(prompts, proposed, strict=True):
        span = slice(at, at + len(found))
        at += len(found)
        own = {name: tuple(float(v) for v in values[span]) for name, values in scores.items()}
        yield Candidates(prompt, tuple(t for t, _ in found), tuple(w for _, w in found), tuple(distances[span]), own)


def _purpose(writer: Writer, studio: Studio, embedding: Embedding, proposing: Proposing) -> str:
    """A short name for everything that candidates and scores depend on."""
    from pipelines.families._encoding import digest

    nets = {name: digest(part) for name, part in sorted(studio.pipe.components.items()) if hasattr(part, "state_dict")}
    judges = {name: judge.provenance() for name, judge in studio.judges.items()}
    parts = [writer.fingerprint(), nets, judges, embedding.fingerprint, vars(proposing), vars(studio.how)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _name_of(pipe: Any) -> str:
    from pipelines.tiny import shipped

    name = str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)
    return shipped.NAME if Path(name) == shipped.CHECKPOINT else name


# ---------------------------------------------------------------------------------------------------------------- pairs


def pair_up(found: Sequence[Candidates], path: Path, pairing: Pairing, far: float, provenance: Mapping[str, Any]) -> Built:
    """Best against worst of every prompt, written to ``path``.

    Raises:
        UserError: no pair is left.
    """
    names = list(found[0].scores)
    overall = standardised({name: [c.scores[name] for c in found] for name in names})
    rows, too_few, too_close = [], 0, 0
    for one, totals in zip(found, overall, strict=True):
        allowed = [k for k, d in enumerate(one.distances) if pairing.max_distance is None or d <= pairing.max_distance]
        if len(one.texts) < 2 or not allowed:
            too_few += 1
            continue
        best, worst = max(allowed, key=lambda k: totals[k]), int(np.argmin(totals))
        if best == worst or totals[best] - totals[worst] < pairing.min_gap:
            too_close += 1
            continue
        rows.append(_pair(one, best, worst, totals, provenance))
    if not rows:
        raise UserError(
            f"No pair is left of {len(found)} prompts: {too_close} with candidates closer than min_gap {pairing.min_gap:g}, "
            f"{too_few} with too few. Lower --min-gap, ask for more candidates, or raise their temperature."
        )
    write_rewrites(rows, path)
    winners = np.array([row.distance for row in rows])
    losers = np.array([row.provenance["rejected_distance"] for row in rows])
    drifted = float((winners > far).mean())
    return Built(len(rows), len(found), too_close, too_few, drifted, float(winners.mean()), float(losers.mean()), far, path)


def _pair(one: Candidates, best: int, worst: int, totals: np.ndarray, provenance: Mapping[str, Any]) -> RewritePair:
    sides = (("chosen", best), ("rejected", worst))
    own = {f"{side}_{name}": values[k] for name, values in one.scores.items() for side, k in sides}
    more = {"rejected_distance": one.distances[worst], "chosen_way": one.ways[best], "rejected_way": one.ways[worst]}
    return RewritePair(
        prompt=one.prompt,
        chosen=one.texts[best],
        rejected=one.texts[worst],
        distance=one.distances[best],
        chosen_score=float(totals[best]),
        rejected_score=float(totals[worst]),
        provenance={**own, **more, "candidates": len(one.texts), **provenance},
    )


# -------------------------------------------------------------------------------------------------------------- journal


class Journal:
    """What was found so far: ``OUT.candidates.jsonl``, and a part of each process while it works. A line is whole or not there.

    Raises:
        UserError: it is of another build.
    """

    def __init__(self, out: Path, purpose: str, anew: bool) -> None:
        self._whole, self._purpose = out.with_name(f"{out.stem}.candidates.jsonl"), purpose
        if anew and self._foreign():
            for path in self._files():
                path.unlink()

    def _files(self) -> list[Path]:
        parts = sorted(self._whole.parent.glob(f"{self._whole.name}.part-*"))
        return [*([self._whole] if self._whole.exists() else []), *parts]

    def _foreign(self) -> Path | None:
        """A file of another build."""
        for path in self._files():
            first = path.read_text(encoding="utf-8").split("\n", 1)[0]
            if first and first != json.dumps({"purpose": self._purpose}):
                return path
        return None

    def read(self) -> dict[str, Candidates]:
        """By prompt, of all processes."""
        if (other := self._foreign()) is not None:
            raise UserError(
                f"{other} is what is left of a build with another writer, generator, judges or settings. Start that as it was "
                "started to go on with it, or add --overwrite to drop it."
            )
        found = {}
        for path in self._files():
            for line in path.read_bytes().decode("utf-8").split("\n")[1:-1]:  # the last is empty, or cut off
                one = Candidates.from_line(line)
                found[one.prompt] = one
        return found

    def part(self, rank: int) -> Part:
        """A process's own file, open for adding."""
        return Part(self._whole.with_name(f"{self._whole.name}.part-{rank}"), self._purpose)

    def gather(self, found: Sequence[Candidates]) -> None:
        """All in one file; the parts go."""
        lines = [json.dumps({"purpose": self._purpose}) + "\n", *(one.as_line() for one in found)]
        outputs.write_file(self._whole, "".join(lines))
        for path in self._files():
            if path != self._whole:
                path.unlink()


class Part:
    """A file that lines are added to, each on disk before the next."""

    def __init__(self, path: Path, purpose: str) -> None:
        self._path, self._purpose = path, purpose

    def __enter__(self) -> Callable[[Candidates], None]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        data = self._path.read_bytes() if self._path.exists() else b""
        whole = data.rfind(b"\n") + 1
        self._file = self._path.open("ab")
        self._file.truncate(whole)  # what follows the last line's end was cut off
        if not whole:
            self._file.write((json.dumps({"purpose": self._purpose}) + "\n").encode())
            self._file.flush()
        return self._add

    def _add(self, found: Candidates) -> None:
        self._file.write(found.as_line().encode())
        self._file.flush()

    def __exit__(self, *_: object) -> None:
        self._file.close()
