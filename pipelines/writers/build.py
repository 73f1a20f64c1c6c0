"""Build preferences between rewrites: a writer proposes candidates, a generator draws them, judges choose the best and the worst.

The candidates of a prompt are drawn from the same noise and judged for the prompt. The best and the worst become a pair if their
scores are far enough apart. All candidates with their scores are kept beside the pairs, one line for each prompt
(``OUT.candidates.jsonl``): an interrupted build continues from there, and other pairs (with another gap or a cap on drift) can be
made without drawing again.

With ``torchrun`` or ``accelerate launch`` each process takes its share of the prompts, and the first one makes the pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.errors import UserError
from diffalign.written_aside import write_file
from pipelines import outputs
from pipelines.progress import Progress
from pipelines.prompts import Prompt
from pipelines.rewrite_pairs import RewritePair, write_rewrites
from pipelines.semantics import Embedding, distance
from pipelines.writers.journal import Lines
from pipelines.writers.rewrite_scorer import RewriteScorer, standardised
from pipelines.writers.sampling import Decoding, Truncated, candidates
from pipelines.writers.usable_prompts import usable_prompts
from pipelines.writers.writer import Writer


@dataclass(frozen=True)
class Proposing:
    """The proposal of candidates: ``count`` for each prompt, shared out among the ``decodings``."""

    count: int = 8
    decodings: tuple[Decoding, ...] = (Decoding("sample"), Decoding("diverse-beam"))
    seed: int = 0  # random seed of the samples
    with_prompt: bool = False  # the prompt itself is a candidate, too

    def __post_init__(self) -> None:
        if self.count < 2:
            raise UserError(f"A pair takes two candidates at least; got {self.count}.")
        if not 1 <= len(self.decodings) <= self.count:
            raise UserError(f"{self.count} candidates cannot be shared out among {len(self.decodings)} ways of looking for them.")

    @property
    def max_rewrite_tokens(self) -> int:
        """The most tokens of any candidate."""
        return max(decoding.max_rewrite_tokens for decoding in self.decodings)

    def propose(self, writer: Writer, prompts: Sequence[str]) -> list[Proposed]:
        """Candidates for each prompt. Rewrites that the writer had not ended are left out: they would teach it not to end."""
        found: list[dict[str, str]] = [{p: "prompt"} if self.with_prompt else {} for p in prompts]
        truncated = [0] * len(prompts)
        for k, decoding in enumerate(self.decodings):
            n = self.count // len(self.decodings) + (k < self.count % len(self.decodings))
            drawn = candidates(writer, prompts, n, decoding, seed=self.seed)
            for row, (texts, known) in enumerate(zip(drawn, found, strict=True)):
                whole = [text for text in texts if not isinstance(text, Truncated)]
                truncated[row] += len(texts) - len(whole)
                known |= {text: decoding.how for text in whole if text not in known}
        return [Proposed(list(known.items()), n) for known, n in zip(found, truncated, strict=True)]


@dataclass(frozen=True)
class Proposed:
    """The candidates of one prompt, before they are judged."""

    candidates: list[tuple[str, str]]  # (text, method of decoding or "prompt"), all different, in the order they were found
    truncated: int  # number of rewrites left out because they had not ended at ``max_rewrite_tokens``


@dataclass(frozen=True)
class Pairing:
    """Which candidates become a pair."""

    min_gap: float = 1.0  # least difference between the best and the worst score, which are ``rewrite_scorer.standardised``
    max_distance: float | None = None  # candidates further from their prompt cannot be chosen (they may be rejected)


@dataclass(frozen=True)
class Candidates:
    """The candidates of one prompt, judged: one entry of each tuple for each candidate."""

    prompt: str
    texts: tuple[str, ...]
    ways: tuple[str, ...]  # method of decoding, or "prompt"
    distances: tuple[float, ...]  # from the prompt
    scores: Mapping[str, tuple[float, ...]]  # by judge, larger is better
    truncated: int = 0  # number of rewrites that had not ended and are no candidates

    @staticmethod
    def of(values: Mapping[str, Any]) -> Candidates:
        """The candidates of a line of the journal."""
        columns = {name: tuple(values[name]) for name in ("texts", "ways", "distances")}
        scores = {name: tuple(v) for name, v in values["scores"].items()}
        return Candidates(values["prompt"], **columns, scores=scores, truncated=values["truncated"])


@dataclass(frozen=True)
class Built:
    """The result of a build."""

    pairs: int
    prompts: int
    too_close: int  # prompts whose best and worst were not far enough apart
    too_few: int  # prompts with fewer than two different candidates, or with none near enough to be chosen
    drifted: float  # share of winners further than ``far`` from their prompt
    winner_distance: float  # mean distance of the winners from their prompts
    loser_distance: float
    far: float
    truncated: int  # rewrites that had not ended at ``max_rewrite_tokens``
    unwritable: tuple[str, ...]  # prompts that the writer cannot rewrite: the place of each, and the reason
    path: Path = field(compare=False)

    def to_text(self) -> str:
        """A few lines for the terminal."""
        lines = [
            f"{self.path}: {self.pairs} pairs from {self.prompts} prompts",
            f"left out: {self.too_close} prompts whose candidates are too close, {self.too_few} with too few",
            f"mean distance from the prompt: winners {self.winner_distance:.3f}, losers {self.loser_distance:.3f}; "
            f"{100 * self.drifted:.0f} % of the winners are further than {self.far:g}",
        ]
        if self.truncated:
            lines.append(f"{self.truncated} candidates had not ended at max_rewrite_tokens and were left out")
        return "\n".join([*lines, *unwritable_lines(self.unwritable)])


def unwritable_lines(problems: Sequence[str]) -> list[str]:
    """A line with the number of prompts that cannot be rewritten, and the first few of them."""
    if not problems:
        return []
    return [f"{len(problems)} prompts that cannot be rewritten were left out:", *(f"  {problem}" for problem in problems[:5])]


def build(
    prompts: Sequence[str | Prompt],
    writer: Writer,
    scorer: RewriteScorer,
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
    """Build pairs of rewrites, at most one for each different prompt, and write them to ``out`` (.jsonl or .parquet).

    Prompts that the writer cannot rewrite are left out, counted and named.

    Args:
        far: a distance beyond which a winner counts as drifted, in the summary.
        chunk: number of prompts that are worked on together; the candidates of at most so many are lost by an interruption.
        share: (r, n): this process takes every n-th of the prompts that are left, from the r-th on. When all have come to
            ``wait``, the first makes the pairs; the others return None.
        wait: waits for the other processes.

    Raises:
        UserError: ``out`` exists (unless ``overwrite``), the candidates beside it are from another build, a judge fails, or no
            prompt or pair is left.
    """
    path = Path(out).expanduser()
    check_out(path, overwrite)
    usable = usable_prompts(prompts, [writer], proposing.max_rewrite_tokens)
    asked = usable.prompts
    journal = CandidateJournal(path, _purpose(writer, scorer, embedding, proposing), overwrite and share[0] == 0)
    if overwrite:
        wait()  # until the first process has dropped the candidates of another build
    known = journal.read()
    wait()  # before anybody writes: all have to see the same prompts done, or they would share out different ones
    mine = [prompt for prompt in asked if prompt not in known][share[0] :: share[1]]
    with journal.part(share[0]) as add:
        for low in range(0, len(mine), chunk):
            for one in _candidates(mine[low : low + chunk], writer, scorer, embedding, proposing):
                add(one)
            if progress is not None:
                progress("building", min(low + chunk, len(mine)), len(mine))
    wait()
    if share[0]:
        return None
    known = journal.read()
    kept = [known[prompt] for prompt in asked]
    journal.gather([*kept, *(one for prompt, one in known.items() if prompt not in set(asked))])
    made_by = {"generator": _name_of(scorer.pipe), "writer": writer.name or "writer"}
    return pair_up(kept, path, pairing, far, made_by, usable.problems)


def check_out(path: Path, overwrite: bool) -> None:
    """Raise UserError if the file exists (unless ``overwrite``) or its name has another ending."""
    if path.suffix.lower() not in (".jsonl", ".parquet"):
        raise UserError(f"{path} ends in {path.suffix or 'nothing'}; pairs are written as .jsonl or .parquet.")
    outputs.check_file(path, overwrite)


def _candidates(
    prompts: Sequence[str], writer: Writer, scorer: RewriteScorer, embedding: Embedding, proposing: Proposing
) -> Iterator[Candidates]:
    """The candidates of some prompts, judged."""
    proposed = proposing.propose(writer, prompts)
    rows = [(prompt, text) for prompt, found in zip(prompts, proposed, strict=True) for text, _ in found.candidates]
    asked, texts = [p for p, _ in rows], [t for _, t in rows]
    distances = distance(embedding, asked, texts).tolist() if rows else []
    scores = scorer.scores(asked, texts) if rows else {name: np.zeros(0) for name in scorer.judges}
    at = 0
    for prompt, found in zip(prompts, proposed, strict=True):
        n = len(found.candidates)
        span = slice(at, at + n)
        at += n
        own = {name: tuple(float(v) for v in values[span]) for name, values in scores.items()}
        ways = tuple(way for _, way in found.candidates)
        yield Candidates(prompt, tuple(texts[span]), ways, tuple(distances[span]), own, found.truncated)


def _purpose(writer: Writer, scorer: RewriteScorer, embedding: Embedding, proposing: Proposing) -> str:
    """A digest of everything that candidates and scores depend on."""
    parts = [writer.fingerprint(), *scorer.identity(), embedding.fingerprint, asdict(proposing)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _name_of(pipe: Any) -> str:
    from pipelines.tiny import shipped

    name = str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)
    return shipped.NAME if Path(name) == shipped.CHECKPOINT else name


# ---------------------------------------------------------------------------------------------------------------- pairs


def pair_up(
    found: Sequence[Candidates],
    path: Path,
    pairing: Pairing,
    far: float,
    provenance: Mapping[str, Any],
    unwritable: Sequence[str] = (),
) -> Built:
    """Pair the best with the worst candidate of every prompt, and write the pairs to ``path``.

    Args:
        far: a distance beyond which a winner counts as drifted, in the summary.
        provenance: values that go into further columns of every pair.
        unwritable: prompts that could not be rewritten, for the summary.

    Raises:
        UserError: no pair is left.
    """
    names = list(found[0].scores)
    overall = standardised({name: [c.scores[name] for c in found] for name in names})
    rows, too_few, too_close, truncated = [], 0, 0, sum(one.truncated for one in found)
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
            + (
                f" {truncated} candidates had not ended: raise --max-rewrite-tokens, or train the writer first."
                if truncated
                else ""
            )
        )
    write_rewrites(rows, path)
    winners = np.array([row.distance for row in rows])
    losers = np.array([row.provenance["rejected_distance"] for row in rows])
    drifted = float((winners > far).mean())
    return Built(
        pairs=len(rows),
        prompts=len(found),
        too_close=too_close,
        too_few=too_few,
        drifted=drifted,
        winner_distance=float(winners.mean()),
        loser_distance=float(losers.mean()),
        far=far,
        truncated=truncated,
        unwritable=tuple(unwritable),
        path=path,
    )


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


class CandidateJournal:
    """The candidates found so far: ``OUT.candidates.jsonl``, and a part of it by each process while it works.

    Args:
        out: the file of the pairs.
        purpose: a digest of what the candidates depend on.
        anew: drop files of another build.
    """

    def __init__(self, out: Path, purpose: str, anew: bool) -> None:
        self._whole, self._purpose = out.with_name(f"{out.stem}.candidates.jsonl"), purpose
        if anew and self._foreign():
            for lines in self._files():
                lines.path.unlink()

    def _files(self) -> list[Lines]:
        parts = sorted(self._whole.parent.glob(f"{self._whole.name}.part-*"))
        return [Lines(path, self._purpose) for path in (self._whole, *parts) if path.exists()]

    def _foreign(self) -> Path | None:
        """A file of another build; None if there is none."""
        return next((lines.path for lines in self._files() if lines.foreign()), None)

    def read(self) -> dict[str, Candidates]:
        """The candidates of all processes, by prompt.

        Raises:
            UserError: a file is from another build.
        """
        if (other := self._foreign()) is not None:
            raise UserError(
                f"{other} is what is left of a build with another writer, generator, judges or settings. Start that as it was "
                "started to go on with it, or add --overwrite to drop it."
            )
        found = [Candidates.of(values) for lines in self._files() for values in lines.read()]
        return {one.prompt: one for one in found}

    @contextmanager
    def part(self, rank: int) -> Iterator[Callable[[Candidates], None]]:
        """A function that adds candidates to the file of the process ``rank``."""
        with Lines(self._whole.with_name(f"{self._whole.name}.part-{rank}"), self._purpose).adding() as add:
            yield lambda found: add(vars(found))

    def gather(self, found: Sequence[Candidates]) -> None:
        """Write all candidates to one file and delete the parts."""
        lines = [json.dumps({"purpose": self._purpose}), *(json.dumps(vars(one), ensure_ascii=False) for one in found)]
        write_file(self._whole, "".join(f"{line}\n" for line in lines))
        for path in self._whole.parent.glob(f"{self._whole.name}.part-*"):
            path.unlink()
