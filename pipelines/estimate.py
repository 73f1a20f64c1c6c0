"""Estimate of a run's memory, counted from shapes, and time, counted in operations, before it starts.

Nothing is loaded: ``sizing`` counts a network without values. The machine's speed is measured by a short matrix product.

A run has up to four phases. First encoders fill the cache: the autoencoder is on the device, then all text encoders together.
Then they are freed, and the network is trained. Objectives that make their own pictures sample and decode them in between. At
the end the result is compared with its base, one network at a time. The device must hold the largest phase. The host holds all
networks at once while the cache is filled and in the comparison. Judges are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from diffalign.data.table import PairTable
from diffalign.errors import UserError
from diffalign.objectives._about import FROZEN_START, NOBODY
from pipelines.families._encoder import VAE
from pipelines.image_settings import TrainSettings
from pipelines.ingredients import samples_itself
from pipelines.prompts import held_out_prompts
from pipelines.reference_errors import are_cached, is_enough
from pipelines.run import PRECISIONS
from pipelines.sizing import PICTURES, Comparing, Sized, Sizing, asked_once

_EFFICIENCY = 0.5
"""Share of a large matrix product's speed that a whole step reaches; a rule of thumb."""
_LIBRARIES = int(1.0 * 2**30)
_BUFFERS = 0.05
"""Torch and its friends, and what a step holds for a moment beside the activations, as a share of them; both from the resident
memory of SD1.5's LoRA runs on a CPU. (``pytest -m slow -k real_image`` compares.)"""
GIB = 2**30
DECODER = "autoencoder"
PAST = "weights of the past"
SHARED_OUT = ("weights", "gradients", "optimizer", "average of weights", PAST)
"""Parts of which FSDP2 gives every device a share."""


@dataclass(frozen=True)
class Estimate:
    """Bytes by part, and seconds of training and of the comparison at its end; ``unknown`` says why there is no estimate."""

    bytes: dict[str, int]  # while training, on the device
    trainable: int
    seconds_per_step: float
    seconds_comparing: float
    steps: int
    encoding: dict[str, int] = field(default_factory=dict)  # of the networks that encode, by name, and of pictures on their way
    cached: dict[str, int] = field(default_factory=dict)  # on disk: of a picture, of a prompt
    sampling: int = 0  # while an objective samples its own pictures, on the device
    comparing: Comparing | None = None
    bank: int = 0  # past checkpoints that a run comes to keep on the host, once for all processes, and in checkpoints on disk
    gathered: int = 0  # weights that lie whole on a device at one time where they are shared out; 0 where they cannot be
    read: int = 0  # of the network as it is read from its files
    seconds_asking: float = 0.0  # of the reference at all fixed draws of a pair, before training
    rows: int | None = None  # that it is asked about; None where the data are not here
    unknown: str | None = None

    @property
    def training(self) -> int:
        """Bytes on the device while training."""
        return sum(self.bytes.values())

    @property
    def phases(self) -> dict[str, int]:
        """Bytes that the device must hold in each: encoding has pictures and prompts one after the other."""
        prompts = sum(size for name, size in self.encoding.items() if name not in (VAE, PICTURES))
        pictures = self.encoding.get(VAE, 0) + self.encoding.get(PICTURES, 0)
        comparing = _LIBRARIES + self.comparing.on_device if self.comparing else 0
        encoding = _LIBRARIES + max(pictures, prompts)
        return {"training": self.training, "encoding": encoding, "sampling": self.sampling, "comparing": comparing}

    @property
    def peak(self) -> int:
        """Bytes that the device must hold."""
        return max(self.phases.values())

    @property
    def host(self) -> int:
        """Bytes of a host without another device: all networks are there at once while the cache is filled."""
        weights = self.bytes.get("weights", 0) + self.bytes.get("average of weights", 0)
        comparing = _LIBRARIES + self.comparing.on_host if self.comparing else 0
        return max(self.training, self.sampling, comparing, _LIBRARIES + weights + sum(self.encoding.values()))

    @property
    def host_of_each(self) -> int:
        """Bytes of the host that each process takes for a moment before it gives its networks to a device of its own: the network
        with the encoders, and when those are gone with the frozen copy of it."""
        return self.read + max(sum(size for name, size in self.encoding.items() if name != PICTURES), self.bytes["reference"])

    def of_each(self, devices: int) -> int:
        """Bytes on each of so many devices while training, if they share the network out (FSDP2): a share of weights and all
        that goes with them, and what is gathered, with its gradients. A frozen reference is whole on each."""
        shares = sum(self.bytes[name] for name in SHARED_OUT)
        return self.training - shares + shares // devices + 2 * self.gathered

    def to_text(self) -> str:
        if self.unknown:
            return f"No estimate of memory and time: {self.unknown}"
        lines = [f"{self.steps} steps, {self.trainable / 1e6:.1f} M trainable parameters. Memory of training, roughly:"]
        lines += _listed(self.bytes)
        lines.append(_line("together", self.training))
        if self.gathered:
            sizes = ", ".join(f"{self.of_each(count) / GIB:.2f}" for count in (2, 4, 8))
            lines.append(f"Shared out over 2, 4 and 8 GPUs (diffalign devices fsdp2): {sizes} GiB on each.")
        lines.append("While the cache is filled, first the autoencoder and pictures, then all text encoders:")
        lines += _listed(self.encoding)
        if self.sampling:
            lines.append(f"While pictures are sampled and decoded (judges are not counted): {self.sampling / GIB:.2f} GiB.")
        if self.comparing:
            size = (_LIBRARIES + self.comparing.on_device) / GIB
            lines.append(f"While the result is compared with its base (judges are not counted): {size:.2f} GiB.")
        if self.host > self.peak:
            lines.append(f"On a host without a GPU all networks lie there at once: {self.host / GIB:.2f} GiB.")
        each, eight = self.host_of_each / GIB, 8 * self.host_of_each / GIB
        lines.append(f"On the host beside GPUs, until networks are on them: {each:.2f} GiB a process, {eight:.2f} of 8 together.")
        if self.bank:
            size = self.bank / GIB
            lines.append(
                f"Past checkpoints to sample from, on the host, by the end of the run: {size:.2f} GiB, once for all processes; "
                "in checkpoints, too."
            )
        if self.cached:
            kinds = ", ".join(f"{size / 2**20:.2f} MiB a {name}" for name, size in self.cached.items())
            lines.append(f"The cache takes on disk: {kinds}.")
        if self.seconds_asking:
            lines.append(f"Time of the reference's errors at fixed draws, before training, roughly: {self._asking}.")
        minutes = self.seconds_per_step * self.steps / 60
        lines.append(f"Time of training, roughly: {self.seconds_per_step:.2f} s a step, {minutes:.1f} min in all.")
        if self.seconds_comparing:
            lines.append(f"Time of the comparison with the base, roughly: {self.seconds_comparing / 60:.1f} min more.")
        return "\n".join(lines)

    @property
    def _asking(self) -> str:
        if self.rows is None:
            return f"{self.seconds_asking:.2g} s a pair"
        return f"{self.seconds_asking * self.rows / 60:.1f} min for {self.rows} of the data"


def _line(name: str, size: int) -> str:
    return f"  {name:28s} {size / GIB:8.2f} GiB"


def _listed(sizes: Mapping[str, int]) -> list[str]:
    return [_line(name, size) for name, size in sizes.items() if size]


def estimate(settings: TrainSettings, sizing: Sizing | None = None, table: PairTable | None = None) -> Estimate:
    """The estimate for a run; ``unknown`` is set where the model's configuration cannot be read without loading it.

    ``sizing`` is given where the model is counted for something else, too, and ``table`` where the data are open.
    """
    try:
        sized = (sizing or Sizing()).of(settings)
    except UserError as error:
        return Estimate({}, 0, 0.0, 0.0, settings.loop.steps, unknown=str(error))
    return estimate_of(settings, sized, table)


def estimate_of(settings: TrainSettings, sized: Sized, table: PairTable | None = None) -> Estimate:
    """The estimate for a run whose model is counted."""
    steps = settings.loop.steps
    objective = asked_once(settings.objective) if sized.guidance_embedded else settings.objective
    cost = objective.cost_of_stored if settings.feedback else objective.cost
    batch, accumulation = settings.batch.batch_size, settings.batch.accumulation
    backward = 2 if settings.adapter == "full" else 1.1  # LoRA: activation gradients, little else
    backward += 1 if settings.compute.gradient_checkpointing else 0
    pairs = accumulation * (1 if samples_itself(settings) else batch)
    forward_only = 0.0 if settings.reference.reference_draws else cost.forward_only  # asked beforehand
    passes = pairs * (cost.with_gradient * (1 + backward) + forward_only)
    seconds_of_a_pass = sized.one.flops / sized.one.rows / _speed(settings.compute.mixed_precision)
    asking = {"seconds_asking": _passes_beforehand(settings, table) * seconds_of_a_pass, "rows": len(table) if table else None}
    parts = _parts(settings, sized, cost.at_once * batch / sized.one.rows)
    comparing = _seconds_comparing(settings, sized)
    still = sum(parts[name] for name in ("weights", "reference", "optimizer", "average of weights", PAST, DECODER))
    sampling = _LIBRARIES + still + sized.sampled if samples_itself(settings) and not settings.feedback else 0
    bank = 4 * sized.trainable * objective.bank_after(steps) if hasattr(objective, "bank_after") else 0
    shown = (sized.encoding, sized.cached, sampling, sized.comparing, bank, sized.gathered, sized.read)
    return Estimate(parts, sized.trainable, passes * seconds_of_a_pass, comparing, steps, *shown, **asking)


def _passes_beforehand(settings: TrainSettings, table: PairTable | None) -> int:
    """Forward passes of the reference for the fixed draws of a row, whose two pictures may be one; none where they are cached."""
    pictures = 1 if table is not None and table.kind == "pictures" else 2
    return 0 if are_cached(settings) else pictures * settings.reference.reference_draws


def keeps_a_past(settings: TrainSettings) -> bool:
    """Whether the policy as it once was is kept beside what it is: by rounds, past checkpoints and delayed walkers."""
    about, renewed = settings.objective.about, settings.loop.round_reference == "round"
    return renewed or about.reference not in (FROZEN_START, NOBODY) or hasattr(settings.objective, "walk_every")


def _parts(settings: TrainSettings, sized: Sized, times: float) -> dict[str, int]:
    """Bytes while training, with ``times`` what was counted at one time."""
    full = settings.adapter == "full"
    kept, inner = sized.copies + int(times * sized.one.kept), int(times * sized.one.inner)
    half = PRECISIONS[settings.compute.mixed_precision] != "float32"
    return {
        "weights": sized.total,
        "reference": sized.total // (2 if half else 1) if full and not is_enough(settings) else 0,
        "gradients": sized.trainable * 4,
        "optimizer": sized.moments,
        "average of weights": sized.trainable * 4 if settings.loop.ema_decay else 0,
        PAST: sized.trainable * 4 if keeps_a_past(settings) else 0,
        DECODER: sized.encoding[VAE] if samples_itself(settings) and not settings.feedback else 0,
        "activations": kept,
        "a block gone through again": inner,
        "libraries and buffers": _LIBRARIES + int(_BUFFERS * (inner or kept)),
    }


def _seconds_comparing(settings: TrainSettings, sized: Sized) -> float:
    """Sampling by base and tuned model at the model's own size; judging is not counted."""
    e = settings.evaluation
    if not e.prompts:
        return 0.0
    flops = 2 * len(held_out_prompts(e.prompts, e.prompt_count)) * e.sampling_steps * sized.sampling_flops
    return flops / _speed(settings.compute.mixed_precision)


def _speed(precision: str) -> float:
    """Operations per second that a step reaches here, from the speed of a matrix product in this precision."""
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device, side = (there, 8192) if there else ("cpu", 1024)  # a GPU needs a large one to get going
    a = torch.randn(side, side, device=device, dtype=getattr(torch, PRECISIONS[precision]))
    (a @ a)[0, 0].item()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.2:
        (a @ a)[0, 0].item()
        count += 1
    return _EFFICIENCY * 2 * side**3 * count / (time.perf_counter() - start)
