"""Is a checkpoint of the tiny world good enough? Sample held-out captions and let the oracle count.

The bar: of the objects that the captions name, the oracle must find at least ``BAR`` in the right shape and colour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffalign.errors import UserError
from diffalign.written_aside import write_file
from pipelines import grids, outputs, sampling
from pipelines.tiny import scenes
from reward_models import oracle

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL import Image

BAR = 0.85
STEPS = 25
BATCH = 32
GRID = 64
"""Pictures on a contact sheet, eight in a row."""

Progress = Callable[[int], None]
"""Called with the number of pictures just finished."""


@dataclass(frozen=True)
class WorldReport:
    """What the oracle found in ``n`` sampled pictures; shares in [0, 1]."""

    n: int
    seed: int
    steps: int
    guidance_scale: float
    objects_found: float  # share of the captioned objects that are there in their shape and colour
    relation_kept: float | None  # share of the captions with a relation that keep it; None if no caption has one
    faithfulness: float  # mean
    taste: float  # mean
    captions: tuple[str, ...]
    pictures: tuple[Image.Image, ...]

    @property
    def passed(self) -> bool:
        return self.objects_found >= BAR

    def figures(self) -> dict[str, float | int | bool | None]:
        """The numbers alone, ready for JSON."""
        names = ("n", "seed", "steps", "guidance_scale", "objects_found", "relation_kept", "faithfulness", "taste")
        return {**{name: getattr(self, name) for name in names}, "bar": BAR, "passed": self.passed}

    def write(self, folder: Path) -> None:
        """``report.json``, ``captions.txt`` and ``grid.png`` with the first 64 pictures."""
        outputs.write_json(folder / "report.json", self.figures())
        write_file(folder / "captions.txt", "\n".join(self.captions) + "\n")
        outputs.write_png(folder / "grid.png", sheet(self.pictures, self.captions))


def check(
    pipe: StableDiffusionPipeline,
    n: int = 256,
    steps: int = STEPS,
    seed: int = 0,
    guidance_scale: float | None = None,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> WorldReport:
    """Sample ``n`` captions of the test split and judge the pictures.

    ``seed`` decides the captions and the noise of every picture; sampling is DDIM; ``guidance_scale`` None means the
    model's own (``pipelines.sampling.guidance_of``).

    Raises:
        UserError: the model does not draw pictures of the tiny world's size.
    """
    require_tiny(pipe)
    guidance = sampling.guidance_of(pipe) if guidance_scale is None else guidance_scale
    captions = scenes.captions(n, seed, split="test")
    seeds = sampling.picture_seeds(n, 1, seed)
    options = {"steps": steps, "guidance_scale": guidance, "batch_size": batch, "progress": progress}
    pictures = sampling.sample(pipe, captions, seeds=seeds, **options)
    verdicts = [oracle.judge(p, c) for p, c in zip(pictures, captions, strict=True)]
    counts = [len(oracle.read_caption(c).objects) for c in captions]
    relations = [v.relation_kept for v in verdicts if v.relation_kept is not None]
    return WorldReport(
        n=n,
        seed=seed,
        steps=steps,
        guidance_scale=guidance,
        objects_found=float(np.average([v.objects_found for v in verdicts], weights=counts)),
        relation_kept=float(np.mean(relations)) if relations else None,
        faithfulness=float(np.mean([v.faithfulness for v in verdicts])),
        taste=float(np.mean([v.taste for v in verdicts])),
        captions=tuple(captions),
        pictures=tuple(pictures),
    )


def require_tiny(pipe: StableDiffusionPipeline) -> None:
    """Refuse a model whose pictures the oracle cannot measure.

    Raises:
        UserError: the model does not draw pictures of the tiny world's size.
    """
    network = pipe.components.get("unet") or pipe.components.get("transformer")
    side = getattr(network.config, "sample_size", None) if network is not None else None
    side = side and side * pipe.vae_scale_factor
    if side != scenes.SIZE:
        found = f"draws {side} x {side} pictures" if side else f"is a {type(pipe).__name__}, whose size of pictures is not known"
        raise UserError(f"This model {found}; the oracle reads the tiny world's, which are {scenes.SIZE} x {scenes.SIZE}.")


# ------------------------------------------------------------------------------------------------------------------ output


def sheet(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """A contact sheet of the first ``GRID`` pictures with their captions."""
    return grids.grid(pictures[:GRID], columns=8, captions=captions[:GRID])
