"""Pictures from a Diffusers pipeline, each of which depends on its prompt and its seed and on nothing else.

Each picture has a generator of its own, on the CPU: the same seed gives the same initial noise on every device, in every
batch, and for every model with latents of that size, which is what makes the pictures of two models comparable.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.errors import UserError
from pipelines import heap
from pipelines.families._registry import call_options, registry

if TYPE_CHECKING:
    from PIL import Image

SAMPLING_FILE = "sampling.json"
AUTO = "auto"
SAMPLERS: dict[str, str | None] = {
    AUTO: None,
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "as saved": None,
}
"""Name of each sampler -> its class in Diffusers; None leaves the scheduler that the pipeline was saved with. ``auto`` stands for
``ddim`` or, of a pipeline whose model follows a flow, ``as saved``: see ``sampler_of``."""
FLAGGED = "flagged"
"""Key in a picture's ``info``: the pipeline's own safety checker blacked it out."""


PIXELS = 8
"""Every model's height and width are multiples of this number of pixels; some models need a larger one."""


def check_size(step: int = PIXELS, **sides: int | None) -> None:
    """Raises UserError for a height or width that is no multiple of ``step``, with the nearest that are."""
    for name, side in sides.items():
        if side is not None and side % step:
            low = side // step * step
            near = f"{low} or {low + step}" if low else f"{step}"
            raise UserError(f"{name} {side}: sides are multiples of {step} pixels here; nearest is {near}.")


@dataclass(frozen=True)
class SamplerSettings:
    """How a pipeline samples.

    Args:
        steps: steps of the sampler.
        guidance_scale: scale of classifier-free guidance; None means ``guidance_of(pipe)``.
        sampler: a key of ``SAMPLERS``.
        batch_size: pictures sampled together; it alters none.
        height: in pixels; None means the pipeline's own, as it does for ``width``.
        width: in pixels.

    Raises:
        UserError: an unknown sampler, a number below one, or sides that are no multiples of ``PIXELS``.
    """

    steps: int = 25
    guidance_scale: float | None = None
    sampler: str = AUTO
    batch_size: int = 16
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, batch_size=self.batch_size)
        check_size(height=self.height, width=self.width)
        sampler_name(self.sampler)

    def resolved(self, pipe: Any) -> SamplerSettings:
        """The same settings with the guidance scale and the sampler that this pipeline gets."""
        guidance = guidance_of(pipe) if self.guidance_scale is None else self.guidance_scale
        return replace(self, guidance_scale=guidance, sampler=sampler_of(pipe, self.sampler))


def check_counts(**counts: int) -> None:
    """Raises UserError for a number that is below one."""
    if wrong := [f"{name} is {count}" for name, count in counts.items() if count < 1]:
        raise UserError(f"There should be one at least: {', '.join(wrong)}.")


def picture_seed(seed: int, *place: int) -> int:
    """The seed of one picture, in [0, 2**32), from the seed of the run and the picture's place (prompt, repeat).

    32 bits, because PyTorch's CPU generator ignores all others.
    """
    import numpy as np

    return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0])


def picture_seeds(prompts: int, per_prompt: int, seed: int) -> list[int]:
    """Seeds of ``per_prompt`` pictures of each of ``prompts`` prompts, prompt by prompt; more prompts change no seed."""
    return [picture_seed(seed, i, k) for i in range(prompts) for k in range(per_prompt)]


def sample(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    negative_prompt: str | None = None,
    progress: Callable[[int], None] | None = None,
    **sampler_options: Any,
) -> list[Image.Image]:
    """One picture for each prompt and seed, in order. ``pipe`` is a Diffusers text-to-image pipeline.

    ``sampler_options`` are the fields of ``SamplerSettings``; ``negative_prompt``, for all pictures, is what guidance leads away
    from. ``progress`` is called with the number of pictures just finished. The pipeline comes back as it was, with dropout off
    meanwhile. A picture that the pipeline's safety checker blacked out has ``info["flagged"]`` set.

    Raises:
        UserError: the sampler is unknown or does not fit the pipeline, a negative prompt would do nothing, or the model draws no
            pictures of that size.
        ValueError: there are not as many seeds as prompts.
    """
    import torch

    if len(prompts) != len(seeds):
        raise ValueError(f"every picture needs a prompt and a seed; got {len(prompts)} prompts and {len(seeds)} seeds")
    settings = SamplerSettings(**sampler_options).resolved(pipe)
    size = {name: value for name in ("height", "width") if (value := getattr(settings, name)) is not None}
    asked = {**_own_size(pipe), **(_square(pipe) if len(size) == 1 else {}), **size, **call_options(type(pipe).__name__)}
    if negative_prompt is not None:
        _refuse_idle_negative(pipe, settings.guidance_scale)
    images: list[Image.Image] = []
    with _scheduler(pipe, settings.sampler), _evaluation_mode(pipe), _no_bars(pipe), _few_zeros(pipe), heap.kept():
        for start in range(0, len(prompts), settings.batch_size):
            part = slice(start, start + settings.batch_size)
            with _sizes_explained(asked):
                out = pipe(
                    prompt=list(prompts[part]),
                    **({} if negative_prompt is None else {"negative_prompt": [negative_prompt] * len(prompts[part])}),
                    generator=[torch.Generator("cpu").manual_seed(s) for s in seeds[part]],
                    num_inference_steps=settings.steps,
                    guidance_scale=settings.guidance_scale,
                    output_type="pil",
                    **asked,
                )
            images += _marked(out)
            if progress is not None:
                progress(len(out.images))
    return images


@contextmanager
def _sizes_explained(size: dict[str, int]) -> Iterator[None]:
    """A context that turns a pipeline's error about the size into a UserError with the nearest sizes."""
    try:
        yield
    except ValueError as error:
        if found := re.search(r"divisible by (\d+)", str(error)):
            check_size(int(found[1]), **{name: size[name] for name in ("height", "width") if name in size})
        raise


def _refuse_idle_negative(pipe: Any, guidance: float) -> None:
    declared = next(d for d in registry().values() if type(pipe).__name__ in d.PIPELINES)
    if declared.EMBEDS_GUIDANCE:
        raise UserError("A negative prompt needs classifier-free guidance, and this model takes its guidance scale as an input.")
    if guidance <= declared.NO_GUIDANCE:
        raise UserError(f"A negative prompt does nothing without guidance, and the scale is {guidance:g}.")


def _own_size(pipe: Any) -> dict[str, int]:
    """The model's own height and width, where its pipeline has one default for all models (Sana)."""
    height = inspect.signature(type(pipe).__call__).parameters.get("height")
    if height is None or height.default is None:
        return {}
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    return {"height": side, "width": side}


def _square(pipe: Any) -> dict[str, int]:
    """The model's own size, for pipelines that ignore a height without a width, and a width without a height."""
    side = getattr(getattr(pipe, "unet", None), "config", {}).get("sample_size")
    return {} if side is None else dict.fromkeys(("height", "width"), side * pipe.vae_scale_factor)


def guidance_of(pipe: Any) -> float:
    """The guidance scale that a model wants: from ``sampling.json`` in its folder if there is one, else its class's default.

    ``sampling.json`` lies beside ``model_index.json`` and reads ``{"guidance_scale": 3.0}``.
    """
    note = Path(pipe.name_or_path or "") / SAMPLING_FILE
    if pipe.name_or_path and note.is_file():
        return _guidance_in(note)
    return float(inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default)


def _guidance_in(note: Path) -> float:
    try:
        return float(json.loads(note.read_text(encoding="utf-8"))["guidance_scale"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f'{note} should read {{"guidance_scale": <number>}}; it does not ({error!r}).') from error


def sampler_name(text: str) -> str:
    """The sampler that ``text`` names; ``as-saved`` and ``as_saved`` mean ``as saved``.

    Raises:
        UserError: there is no such sampler; names those there are.
    """
    name = text.lower().replace("-", " ").replace("_", " ").strip()
    if name not in SAMPLERS:
        raise UserError(f"There is no sampler {text!r}; the samplers are {', '.join(repr(s) for s in SAMPLERS)}.")
    return name


def sampler_of(pipe: Any, sampler: str) -> str:
    """The sampler for this pipeline: ``auto`` is resolved, others stay."""
    name = sampler_name(sampler)
    return name if name != AUTO else "as saved" if _follows_a_flow(pipe.scheduler) else "ddim"


def _follows_a_flow(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith("FlowMatch") or bool(scheduler.config.get("use_flow_sigmas"))


@contextmanager
def _scheduler(pipe: Any, sampler: str) -> Iterator[None]:
    """A context in which the pipeline samples by the named scheduler, with the noise schedule it was saved with."""
    name, saved = SAMPLERS[sampler_of(pipe, sampler)], pipe.scheduler
    if name is not None and _follows_a_flow(saved):
        raise UserError(
            f"The sampler {sampler!r} is for models that predict noise or velocity of a diffusion; this pipeline "
            f"({type(pipe).__name__}) samples by {type(saved).__name__}. Use the sampler 'auto' or 'as saved'."
        )
    if name is not None:
        import diffusers

        changes = _for_ddim(saved.config) if name == "DDIMScheduler" else {}
        pipe.scheduler = getattr(diffusers, name).from_config(saved.config, **changes)
    try:
        yield
    finally:
        pipe.scheduler = saved


def _for_ddim(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that Diffusers' DDIM needs where the model was saved with another scheduler, whose file lacks them.

    It clips x_0 to [-1, 1], but a latent is larger. And it always steps down by T // S, while the levels of a linspace grid (that
    of a DPM-Solver by default) lie T / (S - 1) apart.
    """
    changes = {} if "clip_sample" in config else {"clip_sample": False}
    return changes | ({"timestep_spacing": "leading"} if config.get("timestep_spacing") == "linspace" else {})


@contextmanager
def _evaluation_mode(pipe: Any) -> Iterator[None]:
    """A context in which all modules of the pipeline are in evaluation mode, even in the middle of training."""
    import torch

    nets = [net for net in pipe.components.values() if isinstance(net, torch.nn.Module)]
    training = [module for net in nets for module in net.modules() if module.training]
    for net in nets:
        net.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _few_zeros(pipe: Any) -> AbstractContextManager[None]:
    """A context in which SD3 without its T5 is faster, with the same results."""
    if type(pipe).__name__ != "StableDiffusion3Pipeline" or pipe.text_encoder_3 is not None:
        return nullcontext()
    from pipelines.families._encoding import default_length
    from pipelines.families._joint_attention import few_zeros_while_sampling

    return few_zeros_while_sampling(pipe.transformer, default_length(pipe))


@contextmanager
def _no_bars(pipe: Any) -> Iterator[None]:
    """A context in which the pipeline shows no progress bar for each batch."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def _marked(out: Any) -> list[Image.Image]:
    """The pictures of a pipeline's output; those that its safety checker rejected are flagged in ``info``."""
    rejected = getattr(out, "nsfw_content_detected", None) or [False] * len(out.images)
    for image, flag in zip(out.images, rejected, strict=True):
        if flag:
            image.info[FLAGGED] = True
    return out.images
