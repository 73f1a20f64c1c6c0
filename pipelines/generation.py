"""Generation of pictures into a folder, with a grid to look at and a record of how each picture was made.

``metadata.jsonl`` names each picture's prompt, in the form that the folder of pictures (``imagefolder``) of ``datasets`` has.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.errors import UserError
from diffalign.written_aside import write_file
from pipelines import grids, outputs, sampling
from pipelines.progress import Progress
from pipelines.prompts import Prompt, as_prompts
from pipelines.sampling import SamplerSettings

METADATA = "metadata.jsonl"
OWNED = ("[0-9]*.png", "grid.png", METADATA, "generation.json")
"""Patterns of the files that ``generate`` writes."""
SHOWN = 48
"""The grid shows this many pictures at most."""


def generate(
    model: str,
    prompts: str | Sequence[Prompt | str],
    output: str | Path,
    *,
    load: Callable[[str], Any],
    images_per_prompt: int = 1,
    seed: int = 0,
    negative_prompt: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **sampler_options: Any,
) -> dict[str, Any]:
    """Sample ``images_per_prompt`` pictures of each prompt into ``output``; returns what ``generation.json`` holds.

    Pictures are ``00000.png`` and so on, prompt by prompt, and are those that ``evaluate`` would sample at this seed.
    ``sampler_options`` are the fields of ``pipelines.sampling.SamplerSettings``.

    Raises:
        UserError: an output folder that holds something (unless ``overwrite``), a model that cannot be loaded, no prompts, one
            that is no string, an unknown sampler, a size that no model has, or a number below one.
    """
    asked = as_prompts(prompts)
    _check(len(asked), seed, images_per_prompt)
    settings = SamplerSettings(**sampler_options)
    start, folder = time.perf_counter(), outputs.check_folder(output, overwrite)
    pipe = load(model)
    settings = settings.resolved(pipe)
    seeds = sampling.picture_seeds(len(asked), images_per_prompt, seed)
    rows = [(asked[i // images_per_prompt], s) for i, s in enumerate(seeds)]
    for first in range(0, len(rows), settings.batch_size):
        part = rows[first : first + settings.batch_size]
        options = {"seeds": [s for _, s in part], "negative_prompt": negative_prompt, **asdict(settings)}
        images = sampling.sample(pipe, [p.text for p, _ in part], **options)
        if first == 0:  # nothing can be wrong any more: what was there may go
            outputs.clear(folder, OWNED)
        for i, image in enumerate(images, first):
            outputs.write_png(folder / picture_name(i), image)
        if progress is not None:
            progress("sampling", first + len(part), len(rows))
    outputs.write_png(folder / "grid.png", _grid(folder, rows, images_per_prompt, f"{model}, seed {seed}"))
    write_file(folder / METADATA, metadata(rows))
    record = {
        "model": model,
        "seed": seed,
        "images_per_prompt": images_per_prompt,
        **{name: value for name, value in asdict(settings).items() if name != "batch_size"},  # which alters no picture
        **({} if negative_prompt is None else {"negative_prompt": negative_prompt}),
        "seconds": round(time.perf_counter() - start, 2),
        "versions": outputs.versions(),
        "pictures": [
            {"file": picture_name(i), "prompt": p.text, "category": p.category, "seed": s} for i, (p, s) in enumerate(rows)
        ],
    }
    outputs.write_json(folder / "generation.json", record)
    return record


def _check(prompts: int, seed: int, images_per_prompt: int) -> None:
    """Raises UserError if there is nothing to sample, or no such seed."""
    if not prompts:
        raise UserError("There are no prompts.")
    sampling.check_counts(images_per_prompt=images_per_prompt)
    if seed < 0:
        raise UserError(f"Seeds are 0 and above; it is {seed}.")


def picture_name(i: int) -> str:
    """The file of the picture of that number, counted from 0."""
    return f"{i:05d}.png"


def metadata(rows: Sequence[tuple[Prompt, int]]) -> str:
    """The content of ``metadata.jsonl`` for pictures in their order, each with its prompt and seed."""
    return "".join(_line(i, prompt, seed) for i, (prompt, seed) in enumerate(rows))


def _line(i: int, prompt: Prompt, seed: int) -> str:
    """A row of ``metadata.jsonl``: the picture, and after it whatever came with the prompt."""
    own = {"file_name": picture_name(i), "prompt": prompt.text, "category": prompt.category, "seed": seed}
    rest = {c: value for c, value in prompt.metadata.items() if c.lower() not in own}
    return json.dumps({**own, **rest}, ensure_ascii=False) + "\n"


def _grid(folder: Path, rows: Sequence[tuple[Prompt, int]], per_prompt: int, header: str) -> Image.Image:
    """The first pictures; the pictures of one prompt share a row where they fit in one."""
    columns = per_prompt if 2 <= per_prompt <= 8 else 6
    shown = rows[:SHOWN]
    images = [Image.open(folder / picture_name(i)) for i in range(len(shown))]
    more = f" (the first {len(shown)} of {len(rows)})" if len(rows) > len(shown) else ""
    return grids.grid(images, columns, [p.text for p, _ in shown], header + more)
