"""The card of a trained writer: what it is, how it is asked, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines import config
from pipelines.export import CARD, flat, public, table
from pipelines.outputs import write_file
from pipelines.writers.settings import PromptTrainSettings


def write(settings: PromptTrainSettings, summary: Mapping[str, Any], curves: Path | None, paper: str) -> Path:
    """Write ``README.md`` into the run's folder. Absolute paths are cut to their last part: a card is meant to be given away.

    Raises:
        UserError: it could not be written; an older one stays.
    """
    base, kind = public(settings.model), "LoRA of the" if settings.adapter == "lora" else "version of the"
    name = summary["objective"]
    parts = [
        f"---\nlibrary_name: transformers\ntags: [text-generation, prompt-optimisation, diffalign, {name}]\n---\n",
        f"# {base}, trained by {name}\n",
        f"This is a {kind} prompt writer `{base}`, trained with diffalign by `{name}` ({paper}). It rewrites a plain prompt for",
        "a text-to-image model.\n",
        "## Use\n\n```python\nfrom pipelines.writers.optimizer import PromptOptimizer\n",
        f'optimizer = PromptOptimizer.from_pretrained("{settings.output.absolute().name}")\noptimizer("a cat", n=4)\n```\n',
        _rewritten(summary["rewritten"]),
        f"## Training\n\n![Training curves]({curves.name})\n" if curves else "",
        _numbers("Weights by meaning (of the winners that it was trained on)", summary["weights"]),
        _numbers("Held-out rewrites, at the end", summary["validation"]),
        "## Data\n\n" + table(("field", "value"), flat({"source": summary["rewrites"], **summary["rows"]})),
        "## Configuration\n\n" + table(("field", "value"), flat(config.as_tree(settings))),
    ]
    path = settings.output / CARD
    write_file(path, "\n".join(part for part in parts if part))
    return path


def _rewritten(rows: list[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    cells = [(row["prompt"], row["before"], row["after"]) for row in rows]
    return "## Held-out prompts, rewritten before and after\n\n" + table(("prompt", "before", "after"), cells)


def _numbers(title: str, values: Mapping[str, float] | None) -> str:
    return "" if not values else f"## {title}\n\n" + table(("field", "value"), flat(values))
