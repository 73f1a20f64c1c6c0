"""Rewrite a list of prompts, for the terminal or into a file. An interrupted job continues where it stopped.

    rewrite_file(optimizer, "prompts.txt", "rewrites.jsonl", n=4, max_distance=0.2)

A prompt that the writer cannot rewrite stays as it is, with the reason. Finished rewrites are in ``OUT.part`` until all are done.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.written_aside import write_file
from pipelines import outputs
from pipelines.progress import Progress
from pipelines.prompts import as_prompts, read_prompts
from pipelines.writers.journal import Lines
from pipelines.writers.optimizer import PromptOptimizer, Rewrite

CHUNK = 64
ENDINGS = (".jsonl", ".csv")


@dataclass(frozen=True)
class Rewritten:
    """The numbers of a rewritten list."""

    path: Path
    prompts: int
    rewrites: int
    left: int  # prompts that could not be rewritten, and are in the file unchanged with the reason
    unchanged: int  # prompts that are unchanged for another reason
    truncated: int  # rewrites that had not ended at ``max_rewrite_tokens``

    def to_text(self) -> str:
        """A few lines for the terminal: the numbers, and remarks on prompts left unchanged and truncated rewrites."""
        lines = [f"{self.path}: {self.rewrites} rewrites of {self.prompts} prompts, {self.unchanged} of them unchanged"]
        if self.left:
            lines.append(f"{self.left} prompts could not be rewritten; the column problem says why")
        if self.truncated:
            lines.append(f"{self.truncated} rewrites had not ended at --max-rewrite-tokens")
        return "\n".join(lines)


def check_out(path: Path, overwrite: bool) -> None:
    """Raise UserError if the file exists (unless ``overwrite``) or its name has another ending."""
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"{path} ends in {path.suffix or 'nothing'}; rewrites are written as {' or '.join(ENDINGS)}.")
    outputs.check_file(path, overwrite)


def rewritten(
    optimizer: PromptOptimizer, prompts: Sequence[str], progress: Progress | None = None, **options: Any
) -> list[list[Rewrite]]:
    """The rewrites of every prompt; prompts that cannot be rewritten stay as they are.

    Args:
        options: options of ``PromptOptimizer.__call__``.
    """
    return list(optimizer.stream(prompts, CHUNK, progress, strict=False, **options))


def rewrite_file(
    optimizer: PromptOptimizer,
    prompts: str | os.PathLike[str] | Sequence[str],
    out: str | Path,
    *,
    column: str | None = None,
    overwrite: bool = False,
    chunk: int = CHUNK,
    progress: Progress | None = None,
    **options: Any,
) -> Rewritten:
    """Rewrite a file of prompts into another with a row for each rewrite: its distance, scores and other facts.

    The same call after an interruption continues where it stopped. Prompts that cannot be rewritten stay as they are, with the
    reason in the column ``problem``.

    Args:
        prompts: a file or a list's name for ``pipelines.prompts.read_prompts``; or the prompts themselves.
        out: a .jsonl or .csv file.
        column: column of the prompts in their file.
        chunk: number of prompts between two saves; the rewrites of at most so many are lost by an interruption.
        options: options of ``PromptOptimizer.__call__``.

    Raises:
        UserError: ``out`` exists (unless ``overwrite``), the unfinished file beside it is from another job, or prompts or options
            are wrong.
    """
    path = Path(out).expanduser()
    check_out(path, overwrite)
    named = isinstance(prompts, (str, os.PathLike))
    texts = [prompt.text for prompt in (read_prompts(prompts, column, strict=False) if named else as_prompts(prompts))]
    if not texts:
        raise UserError("There are no prompts to rewrite.")
    lines = Lines(path.with_name(f"{path.name}.part"), _purpose(optimizer, texts, chunk, options))
    if lines.foreign() and not overwrite:
        raise UserError(
            f"{lines.path} is what is left of rewriting other prompts, or by another writer or other settings. Start that as it "
            "was started to go on with it, or add --overwrite to drop it."
        )
    if lines.foreign():
        lines.path.unlink()
    done = sum(len(part) for part in lines.read())
    with lines.adding() as add:
        for low in range(done, len(texts), chunk):  # the same batches as without an interruption: equal to the bit
            found = optimizer(texts[low : low + chunk], strict=False, **options)
            add([[_row(rewrite, rank) for rank, rewrite in enumerate(rewrites)] for rewrites in found])
            if progress is not None:
                progress("rewriting", min(low + chunk, len(texts)), len(texts))
    found = [rows for part in lines.read() for rows in part]
    write([row for rows in found for row in rows], path)
    lines.path.unlink()
    return _counted(path, found)


def _purpose(optimizer: PromptOptimizer, prompts: Sequence[str], chunk: int, options: Any) -> str:
    """A digest of everything that rewrites depend on."""
    embedding, scorer = optimizer.embedding, optimizer.scorer
    with_what = [embedding.fingerprint if embedding else None, scorer.identity() if scorer else None]
    parts = [optimizer.writer.fingerprint(), *with_what, list(prompts), chunk, options]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _counted(path: Path, found: Sequence[Sequence[dict[str, Any]]]) -> Rewritten:
    rows = [row for rows in found for row in rows]
    left = sum(bool(row["problem"]) for row in rows)
    unchanged = sum(rows[0]["unchanged"] for rows in found) - left
    return Rewritten(path, len(found), len(rows), left, unchanged, sum(row["truncated"] for row in rows))


def to_text(found: Sequence[Sequence[Rewrite]]) -> str:
    """A line for each rewrite, under its prompt where there are several prompts."""
    lines = []
    for rewrites in found:
        lines += [f"{rewrites[0].prompt}:"] if len(found) > 1 else []
        lines += [f"{'  ' if len(found) > 1 else ''}{_line(rewrite)}" for rewrite in rewrites]
    return "\n".join(lines)


def _line(rewrite: Rewrite) -> str:
    facts = [] if rewrite.distance is None else [f"distance {rewrite.distance:.3f}"]
    facts += [f"{name} {value:.4g}" for name, value in rewrite.scores.items()]
    facts += ["unchanged"] if rewrite.unchanged else []
    facts += [f"cannot be rewritten: {rewrite.problem}"] if rewrite.problem else []
    facts += ["truncated: --max-rewrite-tokens"] if rewrite.truncated else []
    facts += [f"the text encoder does not read {rewrite.lost!r}"] if rewrite.lost else []
    return f"{rewrite.text}  [{'; '.join(facts)}]" if facts else rewrite.text


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write rows as JSON lines or CSV. A file that is there holds all rows, or those of before."""
    if path.suffix.lower() == ".csv":
        names = list(dict.fromkeys(name for row in rows for name in row))
        outputs.write_csv(path, names, [[row.get(name) for name in names] for row in rows])
    else:
        write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _row(rewrite: Rewrite, rank: int) -> dict[str, Any]:
    known = {"prompt": rewrite.prompt, "rewrite": rewrite.text, "rank": rank, "distance": rewrite.distance}
    ends = {"unchanged": rewrite.unchanged, "truncated": rewrite.truncated, "lost": rewrite.lost, "problem": rewrite.problem}
    return {**known, "score": rewrite.score, **rewrite.scores, **ends}
