"""Miniatures on disk, pairs to train them on, and short runs through the real ``pipelines.training``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from miniatures import MINIATURES, PIXELS, Miniature
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from diffalign import objectives
from diffalign.objectives._about import PROMPTS as FROM_PROMPTS
from pipelines import families
from pipelines.families._names import LORA_FILE
from pipelines.tiny import scenes
from pipelines.training import align

PROMPTS = ["a red circle", "A small blue square on a green background"]


@dataclass(frozen=True)
class Saved:
    """A miniature on disk."""

    miniature: Miniature
    folder: Path

    def pipeline(self) -> Any:
        """As plain Diffusers loads it."""
        name = json.loads((self.folder / "model_index.json").read_text())["_class_name"]
        pipe = getattr(diffusers, name).from_pretrained(self.folder, **dict.fromkeys(self.miniature.lacks))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def latents(self, pipe: Any, steps: int = 2, **more: Any) -> Tensor:
        """What a pipeline samples, [B, C, h, w] before it is decoded."""
        options = {**self.miniature.call, "num_inference_steps": steps, "output_type": "latent", **more}
        if "latents" in options:
            options["latents"] = self.miniature.pack(options["latents"])
        made = pipe(list(PROMPTS), generator=torch.Generator().manual_seed(3), **options).images
        return self.miniature.unpack(made) if options["output_type"] == "latent" else made


def on_disk(name: str, folders: Path) -> Saved:
    folder = folders / name.replace(",", "").replace(" ", "-")
    return Saved(MINIATURES[name], folder if folder.exists() else MINIATURES[name].save(folder))


def write_pairs(folder: Path, n: int = 4) -> Path:
    """Pairs of scenes, drawn by the tiny world, whose two pictures differ in size and shape."""
    rng, rows = np.random.default_rng(3), []
    folder.mkdir()
    for i in range(n):
        scene, caption = scenes.draw_captioned(rng)
        scenes.render(scene).save(folder / f"w{i}.png")
        other = scenes.render(scenes.draw_captioned(rng)[0])
        other.resize((48 + 8 * i, 40), Image.Resampling.BICUBIC).save(folder / f"l{i}.png")
        rows.append({"prompt": caption, "chosen": f"w{i}.png", "rejected": f"l{i}.png"})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SMALL = {"rollout_steps": 3, "guidance": 2.0, "round_pairs": 2, "round_epochs": 1, "round_steps": 1, "least": 2}
SMALL |= {"inversion_steps": 2, "smoothing": "label", "gamma": 1.0}


def brightness(pictures: Tensor, prompts: list[str]) -> list[float]:
    """A judge: how bright a picture is."""
    return pictures.mean(dim=(1, 2, 3)).tolist()


def run(saved: Saved, pairs: Path, name: str, output: Path, *, steps: int = 2, **more: Any) -> None:
    """Some optimizer steps, a checkpoint after each."""
    settings = {f.name for f in fields(objectives.load(name).Objective)}
    small = {option: value for option, value in SMALL.items() if option in settings}
    from_prompts = FROM_PROMPTS in objectives.load(name).ABOUT.data
    kind = {"judge": brightness} if from_prompts else {"validation_pairs": 1, "validation_draws": 1}
    cache = saved.folder.parent / f"{saved.folder.name}-{'prompts' if from_prompts else 'pairs'}"
    where = {"model": str(saved.folder), "pairs": str(pairs), "output": output, "cache": cache}
    pace = {"steps": steps, "batch_size": 2, "learning_rate": 1e-2, "checkpoint_every": 1, "tracker": "none", "progress": False}
    align(name, resolution=PIXELS, **where, **{**pace, **small, **kind, **more})


def weights(output: Path) -> dict[str, Tensor]:
    """What a run left, adapter or network."""
    if (output / LORA_FILE).exists():
        return load_file(output / LORA_FILE)
    (network,) = {"unet", "transformer"} & {path.name for path in output.iterdir()}
    return load_file(next((output / network).glob("*.safetensors")))


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def loaded_plainly(saved: Saved, output: Path, adapter: str) -> Any:
    """The result in a pipeline, by nothing of ours."""
    if adapter == "full":
        return Saved(saved.miniature, output).pipeline()
    pipe = saved.pipeline()
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(output, weight_name=LORA_FILE)
    else:
        pipe.transformer = PeftModel.from_pretrained(pipe.transformer, output).eval()
    return pipe


@contextmanager
def listening(to: list[dict[str, Any]]) -> Iterator[None]:
    """Within: whatever a network that is loaded to be trained is told, in all its calls."""
    load = families.load_family

    def listened(*args: Any, **kwargs: Any) -> Any:
        family = load(*args, **kwargs)
        family.network.register_forward_pre_hook(lambda _, args, told: to.append(told), with_kwargs=True)
        return family

    families.load_family = listened
    try:
        yield
    finally:
        families.load_family = load
