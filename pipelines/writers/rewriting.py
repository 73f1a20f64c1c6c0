"""A list of prompts rewritten, for the terminal or into a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from pipelines import outputs
from pipelines.progress import Progress
from pipelines.writers.optimizer import PromptOptimizer, Rewrite

CHUNK = 64
ENDINGS = (".jsonl", ".csv")


def check_out(path: Path | None, overwrite: bool) -> None:
    """Raises UserError for a file that is there, or one of another kind."""
    if path is None:
        return
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"{path} ends in {path.suffix or 'nothing'}; rewrites are written as {' or '.join(ENDINGS)}.")
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there already. Name another --out, or add --overwrite to replace it.")


def rewritten(optimizer: PromptOptimizer, prompts: Sequence[str], progress: Progress, **options: Any) -> list[list[Rewrite]]:
    """Every prompt's rewrites, some prompts at a time."""
    found: list[list[Rewrite]] = []
    for rewrites in optimizer.stream(prompts, CHUNK, **options):
        found.append(rewrites)
        progress("rewriting", len(found), len(prompts))
    return found


def to_text(found: Sequence[Sequence[Rewrite]]) -> str:
    """A line for each rewrite; the prompt above where there are several."""
    lines = []
    for rewrites in found:
        lines += [f"{rewrites[0].prompt}:"] if len(found) > 1 else []
        lines += [f"{'  ' if len(found) > 1 else ''}{_told(rewrite)}" for rewrite in rewrites]
    return "\n".join(lines)


def _told(rewrite: Rewrite) -> str:
    facts = [] if rewrite.distance is None else [f"distance {rewrite.distance:.3f}"]
    facts += [f"{name} {value:.4g}" for name, value in rewrite.scores.items()]
    facts += ["unchanged"] if rewrite.unchanged else []
    facts += ["broken off: --max-rewrite-tokens"] if rewrite.broken_off else []
    facts += [f"the text encoder does not read {rewrite.lost!r}"] if rewrite.lost else []
    return f"{rewrite.text}  [{'; '.join(facts)}]" if facts else rewrite.text


def write(found: Sequence[Sequence[Rewrite]], path: Path) -> None:
    """A row for each rewrite, with all that is known of it."""
    rows = [_row(rewrite, rank) for rewrites in found for rank, rewrite in enumerate(rewrites)]
    if path.suffix.lower() == ".csv":
        outputs.write_csv(path, list(rows[0]), [list(row.values()) for row in rows])
    else:
        outputs.write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _row(rewrite: Rewrite, rank: int) -> dict[str, Any]:
    known = {"prompt": rewrite.prompt, "rewrite": rewrite.text, "rank": rank, "distance": rewrite.distance}
    ends = {"unchanged": rewrite.unchanged, "broken_off": rewrite.broken_off, "lost": rewrite.lost}
    return {**known, "score": rewrite.score, **rewrite.scores, **ends}
