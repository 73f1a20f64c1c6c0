"""Settings that make a run fit into a device's memory, tried by estimate in order of their cost.

``--preset 12gb`` applies as many of these switches as it takes for the estimate to fit; ``--dry-run`` lists them for each usual
size of a GPU. Only precision and, at the end of the list, the adapter and the quantisation of its base change what is learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffalign.errors import UserError
from diffalign.objectives._family import depends_on_batch
from pipelines.estimate import GIB, Estimate, estimate_of
from pipelines.image_settings import TrainSettings
from pipelines.ingredients import samples_itself
from pipelines.sizing import Sizing

SIZES = (8, 12, 16, 24, 48, 80)
"""Memory sizes of GPUs, in GB as they are sold."""
USABLE = 0.92
"""Share of them that a run can have: the rest is the driver's, and what the allocator cannot use."""


@dataclass(frozen=True)
class Switch:
    """One thing that can be switched on."""

    name: str
    on: Callable[[TrainSettings], TrainSettings]


def _compute(settings: TrainSettings, **changes: Any) -> TrainSettings:
    return replace(settings, compute=replace(settings.compute, **changes))


def _checkpointing(settings: TrainSettings) -> TrainSettings:
    return _compute(settings, gradient_checkpointing=True)


def _bf16(settings: TrainSettings) -> TrainSettings:
    """Switch to bf16, but not from fp16, which is as small, nor from the precision in which people's trajectories were made."""
    if settings.compute.mixed_precision != "no" or settings.feedback:
        return settings
    return _compute(settings, mixed_precision="bf16")


def _one_at_a_time(settings: TrainSettings) -> TrainSettings:
    """The same pairs for each optimizer step, in smaller parts; not where what is learnt from a pair depends on its company."""
    batch = settings.batch
    if depends_on_batch(settings.objective):
        return settings
    times = 1 if samples_itself(settings) else batch.batch_size  # of what an objective samples, accumulation counts the pairs
    return replace(settings, batch=replace(batch, batch_size=1, accumulation=batch.accumulation * times))


def _lora(settings: TrainSettings) -> TrainSettings:
    return replace(settings, adapter="lora")


def _quantised(kind: str) -> Callable[[TrainSettings], TrainSettings]:
    """A switch that quantises, except where refused (trajectories of whole weights, a quantised file), nor from 4 bits to 8."""

    def on(settings: TrainSettings) -> TrainSettings:
        refused = settings.feedback or settings.model.endswith(".gguf")
        return settings if refused or settings.compute.quantise == "nf4" else _compute(settings, quantise=kind)

    return on


def _small_encoding(settings: TrainSettings) -> TrainSettings:
    return replace(settings, data=replace(settings.data, encode_batch=1))


def _small_text(settings: TrainSettings) -> TrainSettings:
    """Switch text encoders to bfloat16, except for people's trajectories, whose prompts were encoded in float32."""
    return settings if settings.feedback else replace(settings, data=replace(settings.data, text_precision="bfloat16"))


def _small_sampling(settings: TrainSettings) -> TrainSettings:
    fewer = (
        replace(settings, evaluation=replace(settings.evaluation, sampling_batch=1)) if settings.evaluation.prompts else settings
    )
    sampling = samples_itself(settings) and not settings.feedback
    return replace(fewer, reward=replace(settings.reward, rollout_batch=1)) if sampling else fewer


SWITCHES = (
    Switch("pictures encoded one at a time (encode_batch 1)", _small_encoding),
    Switch("pictures sampled and decoded one at a time (sampling_batch, rollout_batch 1)", _small_sampling),
    Switch("text encoders in bf16 (text_precision bfloat16)", _small_text),
    Switch("bf16 (mixed_precision bf16)", _bf16),
    Switch("one pair at a time, more accumulation (batch_size 1)", _one_at_a_time),
    Switch("gradient checkpointing", _checkpointing),
    Switch("a LoRA in place of all weights (adapter lora; it wants a learning rate of about 1e-4)", _lora),
    Switch("the frozen base in 8 bits (quantise int8)", _quantised("int8")),
    Switch("the frozen base in 4 bits (quantise nf4)", _quantised("nf4")),
)


@dataclass(frozen=True)
class Fit:
    """Settings with switches on, and what they would take."""

    settings: TrainSettings
    switches: tuple[Switch, ...]
    estimate: Estimate

    @property
    def switched(self) -> tuple[str, ...]:
        return tuple(switch.name for switch in self.switches)


class Ladder:
    """The switches tried on one run; what was counted for one rung is not counted again for the next."""

    def __init__(self, settings: TrainSettings, sizing: Sizing | None = None) -> None:
        self._settings, self._sizing = settings, sizing or Sizing()

    def rungs(self) -> Iterator[Fit]:
        """The run as it is, then with one switch more each time; those that are on already, or do nothing, are left out.

        Raises:
            UserError: the model's configuration cannot be read, so there is no estimate.
        """
        fit = self._with(())
        yield fit
        for switch in SWITCHES:
            if switch.on(fit.settings) != fit.settings:
                fit = self._with((*fit.switches, switch))
                yield fit

    def pruned(self, fit: Fit, size: int) -> Fit:
        """The fit without those switches that it can do without on a device of ``size`` GB; the most costly are dropped first."""
        for switch in reversed(fit.switches):
            fewer = self._with(tuple(one for one in fit.switches if one is not switch))
            if fits(fewer.estimate, size):
                fit = fewer
        return fit

    def _with(self, switches: Sequence[Switch]) -> Fit:
        settings = self._settings
        for switch in switches:
            settings = switch.on(settings)
        return Fit(settings, tuple(switches), estimate_of(settings, self._sizing.of(settings)))


def fitted(settings: TrainSettings, size: int, sizing: Sizing | None = None) -> Fit:
    """The settings with as many switches as it takes to fit a device of ``size`` GB.

    Raises:
        UserError: all do not, or there is no estimate.
    """
    ladder, last = Ladder(settings, sizing), None
    for last in ladder.rungs():
        if fits(last.estimate, size):
            return ladder.pruned(last, size)
    raise UserError(
        f"With all switches on this run still takes about {last.estimate.peak / GIB:.1f} GiB, and a device of {size} GB has "
        f"{_usable(size) / GIB:.1f} to give. {_more_advice(last)}"
    )


def _more_advice(last: Fit) -> str:
    """Advice beyond the presets, by the phase that is too large."""
    phases = last.estimate.phases
    return _ADVICE[max(phases, key=phases.__getitem__)]


_ADVICE = {
    "training": "It is training itself: smaller pictures (--resolution) or a smaller model.",
    "encoding": "It is the encoders that do not fit: a smaller --resolution, --vae-tiling, or --without t5 if that is the one.",
    "sampling": "It is sampling and decoding in the run itself: a smaller --resolution, --vae-slicing or --vae-tiling.",
    "comparing": "It is the comparison at the end, at the model's own size: leave it out (--prompts none), evaluate elsewhere.",
}


def applied(settings: TrainSettings, sizing: Sizing | None = None) -> tuple[TrainSettings, str]:
    """The settings as their ``preset`` would have them, and a line that says what it switched on; empty without a preset."""
    if settings.preset is None:
        return settings, ""
    found = fitted(settings, int(settings.preset.removesuffix("gb")), sizing)
    what = ", ".join(found.switched) or "nothing more to switch on"
    return found.settings, f"preset {settings.preset}: {what}; about {found.estimate.peak / GIB:.1f} GiB on the device"


def advice(settings: TrainSettings, sizing: Sizing | None = None) -> list[str]:
    """A line for each usual size of a GPU: what to switch on, and what the run would take then.

    Raises:
        UserError: there is no estimate.
    """
    ladder, found = Ladder(settings, sizing), []
    for rung in ladder.rungs():
        found.append(rung)
        if fits(rung.estimate, SIZES[0]):
            break
    lines = ["What to switch on for a GPU of (or --preset 12gb, say):"]
    for size in SIZES:
        fit = next((one for one in found if fits(one.estimate, size)), None)
        if fit is None:
            lines.append(f"  {size:2d} GB  does not fit; the least is {found[-1].estimate.peak / GIB:.1f} GiB")
        else:
            fit = ladder.pruned(fit, size)
            what = "; ".join(fit.switched) or "nothing"
            lines.append(f"  {size:2d} GB  {what} ({fit.estimate.peak / GIB:.1f} GiB)")
    return lines


def fits(what: Estimate, size: int) -> bool:
    """Whether a device of ``size`` GB holds it."""
    return what.peak <= _usable(size)


def _usable(size: int) -> float:
    return USABLE * size * 1e9
