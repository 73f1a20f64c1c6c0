"""What to switch on so that a run fits into the memory there is: found by estimating, from what costs least to what costs most.

``--preset 12gb`` applies as many of the switches as it takes for the estimate to fit; ``--dry-run`` says for each usual size of a
GPU what that would be. Nothing changes what is learnt from a pair but precision and, at the end of the list, the adapter and the
bits of its base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from diffalign import losses
from diffalign.errors import UserError
from pipelines.estimate import GIB, Estimate, estimate
from pipelines.image_settings import TrainSettings
from pipelines.ingredients import samples_itself
from pipelines.sizing import Sizing

SIZES = (8, 12, 16, 24, 48, 80)
"""Of GPUs, in GB as they are sold."""
USABLE = 0.92
"""Share of them that a run can have: the rest is the driver's, and what the allocator cannot use."""


@dataclass(frozen=True)
class Switch:
    """One thing that can be switched on."""

    name: str
    on: Callable[[TrainSettings], TrainSettings]


def _compute(**changes: Any) -> Callable[[TrainSettings], TrainSettings]:
    return lambda settings: replace(settings, compute=replace(settings.compute, **changes))


def _one_at_a_time(settings: TrainSettings) -> TrainSettings:
    """The same pairs for each optimizer step, in smaller parts; not where what is learnt from a pair depends on its company."""
    batch, objective = settings.batch, settings.objective
    if getattr(objective, "baseline", None) in ("batch", "mismatched") or ((loss := _loss(objective)) and loss.mixes_batch):
        return settings
    times = 1 if samples_itself(settings) else batch.batch_size  # of what an objective samples, accumulation counts the pairs
    return replace(settings, batch=replace(batch, batch_size=1, accumulation=batch.accumulation * times))


def _loss(objective: Any) -> losses.Loss | None:
    name = getattr(objective, "loss", None)
    return losses.load(name) if name in losses.names() else None


def _lora(settings: TrainSettings) -> TrainSettings:
    return replace(settings, adapter="lora")


def _quantised(kind: str) -> Callable[[TrainSettings], TrainSettings]:
    """Not where it is refused: pictures that whole weights have made; and never back from 4 bits to 8."""

    def on(settings: TrainSettings) -> TrainSettings:
        if settings.feedback or settings.compute.quantise == "nf4":
            return settings
        return _compute(quantise=kind)(settings)

    return on


def _small_encoding(settings: TrainSettings) -> TrainSettings:
    return replace(settings, data=replace(settings.data, encode_batch=1))


def _small_text(settings: TrainSettings) -> TrainSettings:
    return replace(settings, data=replace(settings.data, text_precision="bfloat16"))


def _small_sampling(settings: TrainSettings) -> TrainSettings:
    fewer = (
        replace(settings, evaluation=replace(settings.evaluation, sampling_batch=1)) if settings.evaluation.prompts else settings
    )
    return replace(fewer, reward=replace(settings.reward, rollout_batch=1)) if samples_itself(settings) else fewer


SWITCHES = (
    Switch("pictures encoded one at a time (encode_batch 1)", _small_encoding),
    Switch("pictures sampled and decoded one at a time (sampling_batch, rollout_batch 1)", _small_sampling),
    Switch("text encoders in bf16 (text_precision bfloat16)", _small_text),
    Switch("bf16 (mixed_precision bf16)", _compute(mixed_precision="bf16")),
    Switch("one pair at a time, more accumulation (batch_size 1)", _one_at_a_time),
    Switch("gradient checkpointing", _compute(gradient_checkpointing=True)),
    Switch("a LoRA in place of all weights (adapter lora; it wants a learning rate of about 1e-4)", _lora),
    Switch("the frozen base in 8 bits (quantise int8)", _quantised("int8")),
    Switch("4 bits in place of 8 (quantise nf4)", _quantised("nf4")),
)


@dataclass(frozen=True)
class Fit:
    """Settings with switches on, and what they would take."""

    settings: TrainSettings
    switched: tuple[str, ...]
    estimate: Estimate


def rungs(settings: TrainSettings) -> Iterator[Fit]:
    """The settings as they are, then with one switch more each time; switches that are on already, or do nothing, are not named.

    Raises:
        UserError: the model's configuration cannot be read, so there is no estimate.
    """
    sizing, switched = Sizing(), ()
    yield Fit(settings, switched, estimate(settings, sizing.of(settings)))
    for switch in SWITCHES:
        changed = switch.on(settings)
        if changed != settings:
            settings, switched = changed, (*switched, switch.name)
            yield Fit(settings, switched, estimate(settings, sizing.of(settings)))


def fitted(settings: TrainSettings, size: int) -> Fit:
    """The first rung that fits a device of ``size`` GB.

    Raises:
        UserError: none does, or there is no estimate.
    """
    last = None
    for last in rungs(settings):
        if fits(last.estimate, size):
            return last
    raise UserError(
        f"With all switches on this run still takes about {last.estimate.peak / GIB:.1f} GiB, and a device of {size} GB has "
        f"{_usable(size) / GIB:.1f} to give. {_more_advice(last)}"
    )


def _more_advice(last: Fit) -> str:
    """What presets do not switch on, by the phase that is too large."""
    if last.estimate.training < last.estimate.peak:
        return (
            "It is the encoders that do not fit: a smaller --resolution or --vae-tiling, or --without t5 where that is the one."
        )
    return "Train smaller pictures (--resolution) or a smaller model."


def applied(settings: TrainSettings) -> tuple[TrainSettings, str]:
    """The settings as their ``preset`` would have them, and a line that says what it switched on; empty without a preset."""
    if settings.preset is None:
        return settings, ""
    found = fitted(settings, int(settings.preset.removesuffix("gb")))
    what = ", ".join(found.switched) or "nothing more to switch on"
    return found.settings, f"preset {settings.preset}: {what}; about {found.estimate.peak / GIB:.1f} GiB on the device"


def advice(settings: TrainSettings) -> list[str]:
    """A line for each usual size of a GPU: what to switch on, and what the run would take then.

    Raises:
        UserError: there is no estimate.
    """
    found: list[Fit] = []
    for rung in rungs(settings):
        found.append(rung)
        if fits(rung.estimate, SIZES[0]):
            break
    lines = ["What to switch on for a GPU of (or --preset 12gb, say):"]
    for size in SIZES:
        fit = next((one for one in found if fits(one.estimate, size)), None)
        if fit is None:
            lines.append(f"  {size:2d} GB  does not fit; the least is {found[-1].estimate.peak / GIB:.1f} GiB")
        else:
            what = "; ".join(fit.switched) or "nothing"
            lines.append(f"  {size:2d} GB  {what} ({fit.estimate.peak / GIB:.1f} GiB)")
    return lines


def fits(what: Estimate, size: int) -> bool:
    """Whether a device of ``size`` GB holds it."""
    return what.peak <= _usable(size)


def _usable(size: int) -> float:
    return USABLE * size * 1e9
