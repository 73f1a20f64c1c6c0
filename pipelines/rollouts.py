"""Pictures for people to choose among, and everything that learning from the choices needs later.

    pictures/00012-1.png      the second picture of the thirteenth prompt
    pictures.jsonl            a line for each: its name, prompt, file and seeds
    index.html                all of them, a prompt beside the other, to look at and to choose in
    choices.jsonl             what was chosen: people write it (the page helps), or judges where they are asked to
    rollout.json  trajectories/  prompts/      what made them, the chains with their log-densities, the encoded prompts

The model samples by our own chain (``diffalign.sources.rollout``), as it would in training. A rollout that was stopped goes on
where it was; nothing that people have written is ever replaced.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import reward_models
from diffalign.data.prompt_cache import PromptCache, build_prompt_cache
from diffalign.errors import UserError
from diffalign.objectives._pieces import dominance
from diffalign.sources.choices import CHOICES
from diffalign.sources.rollout import Sampling, Trajectory, rollout
from diffalign.sources.rounds import stacked
from diffalign.sources.store import ABOUT, Store, TrajectoryOrigin, schedule_fingerprint
from diffalign.types import Conditioning
from diffalign.written_aside import write_file
from pipelines import choosing_page, families, outputs
from pipelines.families._encoding import digest
from pipelines.families._origin import recorded_loras
from pipelines.families._sources import find
from pipelines.feedback import PROMPT_FOLDER, made_by_model
from pipelines.progress import Progress
from pipelines.run import PRECISIONS
from pipelines.sampling import picture_seed
from reward_models._judge import Scorer, device_of
from reward_models.base import JudgeError

LISTING, PAGE, PICTURES = "pictures.jsonl", "index.html", "pictures"
_TRAJECTORY, _START = 1, 2
"""Streams of seeds."""


@dataclass(frozen=True)
class RolloutModel:
    """The model that samples, and its precision and place."""

    model: str
    lora: str | None = None
    mixed_precision: str = "no"
    config: str | None = None  # for a single file: a Diffusers folder with configuration and tokenizer
    device: str | None = None
    base_lora: str | None = None  # merged into the model, below ``lora``
    without: tuple[str, ...] = ()  # parts left out, as ``families.load_family`` takes them


@dataclass(frozen=True)
class RolledOut:
    """The result of a rollout."""

    folder: Path
    made: TrajectoryOrigin
    made_now: int  # trajectories; the others were there
    seconds: float
    chosen: int | None = None  # by judges
    tied: int = 0

    def to_text(self) -> str:
        """What was written, and what to do next."""
        counts = f"{len(self.made.prompts)} prompts, {len(self.made)} pictures in {self.folder / PICTURES}"
        before = f" ({len(self.made) - self.made_now} were there already)" if self.made_now < len(self.made) else ""
        lines = [f"{counts}{before}, {self.seconds:.0f} s."]
        called, made = self.made.called, self.made
        below = f" --base-lora {called['base_lora']}" if called.get("base_lora") else ""
        below += f" --single-file-config {called['config']}" if called.get("config") else ""
        below += f" --without {','.join(called['without'])}" if called.get("without") else ""
        lora = below + (f" --start-lora {called['lora']}" if called["lora"] else "")
        precision = made.model["mixed_precision"]
        mixed = f" --mixed-precision {precision}" if precision != "no" else ""
        if self.chosen is None:
            one, two = made.picture(0), made.picture(1)
            lines += [
                f"Open {self.folder / PAGE} to look at them side by side and to choose; save what it gives as",
                f"{self.folder / CHOICES}. Or write that file yourself, a line for each choice:",
                f'  {json.dumps({"chosen": two, "rejected": one})}    with "label": 0.5 for a tie',
                f"  {json.dumps({'picture': two, 'score': 4})}    or a score for each picture",
                "Then:",
            ]
        else:
            lines += [
                f"{self.folder / CHOICES}: {self.chosen} choices by judges, {self.tied} pairs undecided. "
                "No person has chosen anything.",
                "To learn from them:",
            ]
        train = f"diffalign train d3po --model {called['model']}{lora}{mixed} --feedback {self.folder} --output RUN"
        return "\n".join([*lines, f"  {train}"])


def roll_out(
    model: RolloutModel,
    prompts: Sequence[str],
    output: str | Path,
    *,
    per_prompt: int = 2,
    sampling: Sampling | None = None,
    same_start: bool = True,
    seed: int = 0,
    batch_size: int = 16,
    judges: Mapping[str, Scorer] | None = None,
    progress: Progress | None = None,
) -> RolledOut:
    """Sample ``per_prompt`` pictures of each of ``prompts`` into ``output``, or go on where such a rollout was stopped.

    Each entry of ``prompts`` is a group of pictures by itself, though it may repeat another. ``judges`` choose by dominance: of
    two pictures the one that is at least as good for all of them and better for one.

    Raises:
        UserError: a folder with something else in it, a model that cannot be loaded, judges where people have chosen.
    """
    start, folder, sampling = time.perf_counter(), Path(output).expanduser(), sampling or Sampling()
    _check(folder, sampling, per_prompt, bool(judges))
    sampler = _Sampler(model)
    made = TrajectoryOrigin(
        sampling=sampling,
        schedule=schedule_fingerprint(sampler.family.denoiser.schedule),
        model=sampler.identity,
        prompts=tuple(prompts),
        per_prompt=per_prompt,
        same_start=same_start,
        seed=seed,
        called={
            "model": sampler.called,
            "lora": sampler.lora,
            **({"base_lora": sampler.base_lora} if sampler.base_lora else {}),
            **({"without": list(sampler.without)} if sampler.without else {}),
            **({"config": str(model.config)} if model.config else {}),
        },
    )
    store = Store.create(folder, made, batch_size)
    cache = sampler.encoded(prompts, folder / PROMPT_FOLDER, progress)
    missing = store.missing()
    done = len(made) - sum(map(len, missing))
    made_now = len(made) - done
    for numbers in missing:
        trajectories = sampler.trajectories(made, numbers, cache, batch_size)
        sampler.draw(folder, made, numbers, trajectories, batch_size)
        store.write(numbers, trajectories)  # last: a shard that is there has its pictures
        done += len(numbers)
        if progress:
            progress("sampling", done, len(made))
    if lost := [number for number in range(len(made)) if not (folder / _file(made, number)).is_file()]:
        sampler.draw(folder, made, lost, store.read(lost), batch_size)
    rows = [_row(made, number) for number in range(len(made))]
    write_file(folder / LISTING, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_file(folder / PAGE, choosing_page.render(made, [row["file"] for row in rows], _side(folder, rows)))
    chosen, tied = _judged(folder, made, rows, judges, batch_size) if judges else (None, 0)
    return RolledOut(folder, made, made_now, time.perf_counter() - start, chosen, tied)


def _check(folder: Path, sampling: Sampling, per_prompt: int, judged: bool) -> None:
    """Check everything that can be checked before the model is loaded."""
    if not sampling.stochastic:
        raise UserError(f"Trajectories to learn from have noise in every step: eta is {sampling.eta:g}; give one greater than 0.")
    if per_prompt < 2:
        raise UserError(f"{per_prompt} picture of each prompt leaves nothing to choose among; make 2 or more.")
    known = (folder / ABOUT).is_file() or not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not known:
        raise UserError(f"{folder} holds files that are no rollout of diffalign; nothing is written there. Choose another --out.")
    choices = folder / CHOICES
    lines = choices.read_text("utf-8").split("\n") if judged and choices.is_file() else []
    if any('"judges"' not in line for line in lines if line.strip()):
        raise UserError(f"{choices} holds what people chose; judges do not replace it. Leave the judges out, or move the file.")


def _file(made: TrajectoryOrigin, number: int) -> str:
    return f"{PICTURES}/{made.picture(number)}.png"


def _image(picture: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1], rounded as the pipelines of Diffusers do."""
    return Image.fromarray((picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def _seeds(made: TrajectoryOrigin, number: int) -> tuple[int, int]:
    """Seeds of the steps' noise and of x_T. More prompts change no seed."""
    group, k = divmod(number, made.per_prompt)
    steps = picture_seed(made.seed, _TRAJECTORY, group, k)
    return steps, picture_seed(made.seed, _START, group, 0 if made.same_start else k)


def _row(made: TrajectoryOrigin, number: int) -> dict[str, Any]:
    seed, start = _seeds(made, number)
    prompt = made.prompts[made.group(number)]
    return {"picture": made.picture(number), "prompt": prompt, "file": _file(made, number), "seed": seed, "start_seed": start}


def _side(folder: Path, rows: Sequence[Mapping[str, Any]]) -> int:
    with Image.open(folder / rows[0]["file"]) as image:
        return image.width


# ------------------------------------------------------------------------------------------------------------- sampling


class _Sampler:
    """A model that samples as it would in training: the same weights, in the same precision."""

    def __init__(self, asked: RolloutModel) -> None:
        origin, dtype = find(asked.model, config=asked.config), PRECISIONS[asked.mixed_precision]
        if asked.mixed_precision == "fp16" and not torch.accelerator.is_available():
            raise UserError("Mixed precision fp16 needs a GPU; on a CPU use bf16 or no.")
        self.lora = asked.lora or origin.adapter  # a LoRA folder named as the model stands for both
        self.called = origin.model if origin.adapter else asked.model
        saved = families.read_adapter(self.lora) if self.lora else None
        below = recorded_loras(Path(self.lora)) if self.lora else ()  # what that one was trained on top of
        self.base_lora = asked.base_lora or (below[-1].path if below else None)
        left_out = find(self.lora, base=self.called).without if self.lora else ()
        self.without = tuple(dict.fromkeys((*left_out, *asked.without)))
        self.family = families.load_family(
            self.called, dtype=dtype, config=asked.config or origin.config, base_lora=self.base_lora, without=self.without
        )
        self.identity = made_by_model(digest(self.family.network), saved, dtype, asked.mixed_precision)
        if saved is not None:
            self.family.attach_lora(rank=saved.rank, alpha=saved.alpha, targets=saved.targets)
            self.family.load_adapter(saved)
        self._device = device_of(asked.device)
        self._autocast = None if asked.mixed_precision == "no" else getattr(torch, dtype)
        self.family.to(self._device)
        self.family.network.eval()

    def encoded(self, prompts: Sequence[str], folder: Path, progress: Progress | None) -> PromptCache:
        return build_prompt_cache(list(prompts), self.family.encoder, folder, progress=progress, option="--out")

    def trajectories(self, made: TrajectoryOrigin, numbers: range, cache: PromptCache, batch_size: int) -> Trajectory:
        groups, seeds = [made.group(n) for n in numbers], [_seeds(made, n) for n in numbers]
        return rollout(
            self._predict,
            self.family.denoiser.schedule,
            stacked(cache, groups),
            made.sampling,
            shape=self.family.latent_shape(self.family.resolution),
            seeds=[steps for steps, _ in seeds],
            start_seeds=[start for _, start in seeds],
            unconditional={name: value[None] for name, value in cache.conditioning(None).items()},
            batch_size=batch_size,
            device=self._device,
        ).labelled(torch.tensor(groups))

    def draw(
        self, folder: Path, made: TrajectoryOrigin, numbers: Sequence[int], trajectories: Trajectory, batch_size: int
    ) -> None:
        """Write the pictures that trajectories ended in."""
        pictures = torch.cat([self.family.encoder.decode(part) for part in trajectories.final.split(batch_size)])
        for number, picture in zip(numbers, pictures, strict=True):
            outputs.write_png(folder / _file(made, number), _image(picture))

    def _predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Prediction under autocast, as Accelerate wraps the network in training."""
        if self._autocast is None:
            return self.family.denoiser(x_t, t, conditioning)
        with torch.autocast(self._device.type, self._autocast):
            return self.family.denoiser(x_t, t, conditioning)


# -------------------------------------------------------------------------------------------------------------- judging


def _judged(
    folder: Path, made: TrajectoryOrigin, rows: Sequence[Mapping[str, Any]], judges: Mapping[str, Scorer], batch_size: int
) -> tuple[int, int]:
    """Choices by dominance of the judges' scores, written as people would; how many there are, and how many pairs are tied."""
    files, prompts = [folder / row["file"] for row in rows], [row["prompt"] for row in rows]
    try:
        scores = reward_models.score(judges, files, prompts, batch_size=batch_size, cache=False)
    except JudgeError as error:
        raise UserError(f"The pictures cannot be judged: {error}.") from error
    values = torch.stack([scores[name].double() for name in judges], dim=1)  # [N, R]
    if not bool(values.isfinite().all()):
        row, column = (~values.isfinite()).nonzero()[0].tolist()
        raise UserError(f"The judge {list(judges)[column]} gives no number for {files[row]}: it cannot choose.")
    groups = [range(low, low + made.per_prompt) for low in range(0, len(made), made.per_prompt)]
    pairs = [pair for group in groups for pair in combinations(group, 2)]
    first, second = (torch.tensor([pair[side] for pair in pairs]) for side in (0, 1))
    labels = dominance(values[first], values[second]).tolist()
    lines = []
    for (one, two), label in zip(pairs, labels, strict=True):
        if label != 0.5:
            chosen, rejected = (one, two) if label == 1.0 else (two, one)
            choice = {"chosen": made.picture(chosen), "rejected": made.picture(rejected), "judges": list(judges)}
            lines.append(json.dumps(choice) + "\n")
    write_file(folder / CHOICES, "".join(lines))
    return len(lines), len(pairs) - len(lines)
