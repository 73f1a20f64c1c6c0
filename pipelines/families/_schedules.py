"""From a Diffusers scheduler's configuration to the core's schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffalign.errors import UserError
from diffalign.grids import FlowGrid, Line
from diffalign.levels import LevelDistribution
from diffalign.schedule import FlowSchedule, NoiseSchedule

_BENDING = (
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "time_shift_type",
    "shift_terminal",
)
_NOT_STRAIGHT = ("invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling")
_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


def schedule_of(config: Mapping[str, Any], *, allowed: Sequence[str], expected: str | None, where: str) -> NoiseSchedule:
    """The training schedule behind any of the discrete schedulers (DDPM, DDIM, PNDM, Euler ... share their betas).

    Args:
        allowed: prediction types that the family's networks have.
        expected: what the caller said it is, or None.
        where: the configuration file, for messages.

    Raises:
        UserError: another prediction type than allowed or expected, or a configuration without betas.
    """
    from diffusers import DDPMScheduler

    _refuse_unknown(expected, allowed)
    known = " or ".join(allowed)
    found = config.get("prediction_type", "epsilon")
    if found not in allowed:
        raise UserError(f"{where}: prediction_type is {found!r}, but networks of this family predict {known}.")
    if expected is not None and expected != found:
        raise UserError(
            f"prediction_type {expected!r} was asked for, but {where} says {found!r}. Leave the option out to go by the file. "
            "If it is the file that is wrong, correct it; if it belongs to another model, as may be of a single file's "
            "configuration, name a folder whose scheduler fits."
        )
    if "beta_start" not in config:
        kind = config.get("_class_name", "scheduler")
        raise UserError(f"{where}: a {kind} without beta_start has no discrete noise schedule to train on.")
    betas = {name: config[name] for name in _BETAS if config.get(name) is not None}
    clean_end = "one" if config.get("set_alpha_to_one", True) else "first"  # what DDIM takes for the end of the chain
    return NoiseSchedule(DDPMScheduler(**betas).alphas_cumprod, found, clean_end)


def flow_schedule_of(
    scheduler: Any, *, line: Line, shape: tuple[int, ...], patch: int, expected: str | None, where: str
) -> FlowSchedule:
    """The schedule of a flow model behind FlowMatchEulerDiscreteScheduler, or DPMSolverMultistepScheduler with flow sigmas.

    Training levels are logit-normal(0, 1), bent as the sampler bends its line for latents of ``shape``: SD3's paper (arXiv
    2403.03206, sections 3.1 and 5.3.2) has both, and uses the same shift in training and in sampling.

    Args:
        line: the points that the family's pipeline lets the Euler scheduler bend; a DPM-Solver has its own.
        shape: of the latents [C, H, W] that the model was made for.
        patch: latent pixels on a side of a token.
        expected: what the caller said the network predicts, or None.
        where: the configuration file, for messages.

    Raises:
        UserError: another prediction type than ``velocity`` is expected, or the scheduler is none of these.
    """
    _refuse_unknown(expected, ("velocity",))
    config, kind = scheduler.config, type(scheduler).__name__
    if odd := [name for name in _NOT_STRAIGHT if config.get(name)]:
        raise UserError(f"{where}: {odd[0]} is set; noise levels of flow models are known here without it. Set it to false.")
    train_steps = config.get("num_train_timesteps", 1000)
    if config.get("use_flow_sigmas"):
        grid = FlowGrid("solver", config.get("flow_shift", 1.0), patch=patch, train_steps=train_steps)
    elif kind == "FlowMatchEulerDiscreteScheduler":
        bending = {name: config[name] for name in _BENDING if config.get(name) is not None}
        grid = FlowGrid(line, **bending, patch=patch, train_steps=train_steps)
    else:
        raise UserError(
            f"{where}: this family's networks predict a velocity, which a {kind} does not follow. It should be a "
            "FlowMatchEulerDiscreteScheduler, or a DPMSolverMultistepScheduler with use_flow_sigmas."
        )
    return FlowSchedule(train_steps, sigmas=grid, trained_levels=LevelDistribution("logit-normal", shift=grid.bend(shape)))


def _refuse_unknown(expected: str | None, allowed: Sequence[str]) -> None:
    if expected is not None and expected not in allowed:
        raise UserError(f"prediction_type {expected!r} is not known for this family; it is {' or '.join(allowed)}.")
