"""Pictures of a few held-out prompts while a run goes on, from the same noise every time: what changes in them was learnt.

The policy itself is sampled, in training's precision and by our own solver, with prompts that are encoded before training; the
comparison after training goes through the pipeline. A run learns the same with and without: nothing here draws from its streams.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from PIL import Image
from torch import Tensor

from diffalign.data.cache_files import Busy
from diffalign.data.cache_values import FillOptions
from diffalign.data.prompt_cache import PromptCache, build_prompt_cache
from diffalign.digests import digest_of
from diffalign.errors import UserError
from diffalign.optimisation import Ema
from diffalign.processes import ManyProcesses, failing_together
from diffalign.sources.rollout import Sampling, rollout
from diffalign.sources.rounds import stacked
from diffalign.train import Trainer
from diffalign.weights import without_dropout
from pipelines import devices, grids, outputs
from pipelines.image_settings import TrainSettings
from pipelines.prompts import held_out_prompts
from pipelines.run import Say
from pipelines.sampling import picture_seeds

FOLDER = "previews"
_LAID_OUT: dict[str, dict[str, Any]] = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}
"""Trackers that receive the pictures, and the keyword arguments by which each takes [N, H, W, 3]."""


def prompts_of(settings: TrainSettings) -> list[str]:
    """The prompts of the previews; none where no previews are asked for.

    Raises:
        UserError: there are no prompts, or they cannot be read.
    """
    asked = settings.preview
    if not asked.preview_every:
        return []
    where = asked.preview_prompts or settings.evaluation.prompts
    if not where:
        raise UserError("There is nothing to draw previews of: name --preview-prompts, or the comparison's --prompts.")
    return [prompt.text for prompt in held_out_prompts(where, asked.preview_count)]


def encoded(settings: TrainSettings, encoder: Any, *, renew: bool, busy: Busy) -> PromptCache | None:
    """The previews' prompts, encoded, beside the data's cache."""
    if not (texts := prompts_of(settings)):
        return None
    name = digest_of(texts)[:16]
    folder, options = settings.cache_folder / f"{FOLDER}-{name}", FillOptions(settings.data.encode_batch)
    return build_prompt_cache(texts, encoder, folder, options, renew=renew, busy=busy)


class Previews:
    """Draws ``previews/00000040.png`` every so many steps, and before the first."""

    def __init__(self, settings: TrainSettings, family: Any, prompts: PromptCache, accelerator: Accelerator, say: Say) -> None:
        self._say, self._given_up = say, False
        self._settings, self._family, self._prompts, self._accelerator = settings.preview, family, prompts, accelerator
        self._folder, self._resolution = settings.output / FOLDER, settings.data.resolution or family.resolution
        self._seeds = picture_seeds(len(prompts.prompts), 1, settings.seed)
        self._processes, self._sharding = ManyProcesses(accelerator), devices.is_sharding(accelerator)
        self._average: Ema | None = None

    def beside(self, build: Callable[[Callable], Trainer]) -> Callable[[Callable], Trainer]:
        """``build`` of a trainer whose report of a step is followed by a picture where one is due."""

        def with_pictures(report: Callable) -> Trainer:
            def after_step(step: int, numbers: Any) -> None:
                report(step, numbers)
                if step % self._settings.preview_every == 0:
                    self._draw(step)

            return build(after_step)

        return with_pictures

    def begin(self, trainer: Trainer) -> None:
        """Remember the average that the result will be, and draw what there is before the first step."""
        self._average = trainer.ema
        if trainer.step == 0:
            self._draw(0)

    def _draw(self, step: int) -> None:
        """The pictures of now, on the disk and for the trackers; none any more if there is no memory for them.

        All processes sample together where weights are sharded; else the main one does, and the others wait for it. They give up
        together.

        Raises:
            UserError: the disk refuses, or a process has no memory in the middle of what all do together.
        """
        if self._given_up:
            return
        latents = self._sampled_together() if self._sharding else None
        with failing_together(self._processes):
            full = self._processes.rank == 0 and not self._drawn(step, latents)
        if any(self._processes.all_gather_object(full)):
            self._given_up = True
            clear_device_cache(garbage_collection=True)
            self._say(f"step {step}: there is no memory for previews beside training; no more are drawn")

    def _drawn(self, step: int, latents: list[Tensor] | None) -> bool:
        """Write the pictures of ``latents``, which are sampled if there are none yet. False: there is no memory for them."""
        try:
            pictures = [_picture(one) for part in latents or self._sampled() for one in self._family.encoder.decode(part)]
        except torch.OutOfMemoryError:
            return False
        sheet = grids.grid(pictures, min(len(pictures), 4), list(self._prompts.prompts), header=f"step {step}")
        outputs.write_png(self._folder / f"{step:08d}.png", sheet)
        self._track(np.stack([np.asarray(picture) for picture in pictures]), step)
        return True

    def _sampled_together(self) -> list[Tensor]:
        """A call of sharded weights is for all processes. One that leaves it half done, for want of memory, cannot go on beside
        the others: their next calls would not be the same."""
        try:
            return self._sampled()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"Process {self._processes.rank} has no memory for previews beside training, and with sharded weights all "
                "processes sample them together. Go on with --resume and without --preview-every, or with a smaller "
                "--preview-batch."
            ) from error

    def _sampled(self) -> list[Tensor]:
        """Latents, in parts of ``preview_batch``."""
        family, device, asked = self._family, self._accelerator.device, self._settings
        guidance = family.default_guidance if asked.preview_guidance is None else asked.preview_guidance
        policy = family.denoiser if self._sharding else family.denoiser.with_network(family.network)
        averaged = self._average.applied() if self._average else nullcontext()
        with averaged, without_dropout(family.network), self._accelerator.autocast():
            made = rollout(
                policy,
                policy.schedule,
                stacked(self._prompts, range(len(self._seeds))),
                Sampling(asked.preview_steps, "dpm-solver++", guidance=guidance),
                shape=family.latent_shape(self._resolution),
                seeds=self._seeds,
                unconditional={name: value[None] for name, value in self._prompts.conditioning(None).items()},
                batch_size=asked.preview_batch,
                device=device,
            )
        return list(made.final.split(asked.preview_batch))

    def _track(self, pictures: np.ndarray, step: int) -> None:
        for tracker in self._accelerator.trackers:
            if tracker.name in _LAID_OUT:
                tracker.log_images({FOLDER: pictures}, step=step, **_LAID_OUT[tracker.name])


def _picture(one: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1], rounded as the pipelines of Diffusers do."""
    return Image.fromarray((one * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
