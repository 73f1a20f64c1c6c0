"""From a Diffusers scheduler's configuration to the core's ``NoiseSchedule``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffalign.errors import UserError
from diffalign.schedule import NoiseSchedule

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

    known = " or ".join(allowed)
    if expected is not None and expected not in allowed:
        raise UserError(f"prediction_type {expected!r} is not known for this family; it is {known}.")
    found = config.get("prediction_type", "epsilon")
    if found not in allowed:
        raise UserError(f"{where}: prediction_type is {found!r}, but networks of this family predict {known}.")
    if expected is not None and expected != found:
        raise UserError(
            f"prediction_type {expected!r} was asked for, but {where} says {found!r}. Leave the option out to go by the file, "
            "or correct the file if it is the one that is wrong."
        )
    if "beta_start" not in config:
        kind = config.get("_class_name", "scheduler")
        raise UserError(f"{where}: a {kind} without beta_start has no discrete noise schedule to train on.")
    betas = {name: config[name] for name in _BETAS if config.get(name) is not None}
    clean_end = "one" if config.get("set_alpha_to_one", True) else "first"  # what DDIM takes for the end of the chain
    return NoiseSchedule(DDPMScheduler(**betas).alphas_cumprod, found, clean_end)
