"""What a run will take, before it takes it: memory by counting in shapes, time by counting operations.

Nothing is loaded: networks are built from their configurations without numbers (``families.sketch``), and go through one forward
pass of one pair. Activations are what autograd keeps of it; operations are counted by PyTorch; the machine's speed is that of a
short matrix product.

A run has up to four phases. First encoders fill the cache, one network at a time on the device; then they are let go, and the
network is trained; objectives that make their own pictures sample and decode them in between; at the end the result is compared
with its base, again one network at a time. The largest phase is what the device must hold. The host holds all networks at once
while the cache is filled and while it compares. Judges are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from diffalign.errors import UserError
from pipelines import families
from pipelines.counting import (
    Pass,
    asking_bytes,
    conditioning_bytes,
    decoding_bytes,
    encoding_bytes,
    forward_pass,
    picture_bytes,
)
from pipelines.families import _quantised
from pipelines.families._encoder import VAE
from pipelines.image_settings import TrainSettings
from pipelines.ingredients import samples_itself
from pipelines.prompts import held_out_prompts
from pipelines.run import PRECISIONS

_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
_EFFICIENCY = 0.5
"""Share of a large matrix product's speed that a whole step reaches; a rule of thumb."""
_LIBRARIES = int(1.0 * 2**30)
_BUFFERS = 0.05
"""Torch and its friends, and what a step holds for a moment beside the activations, as a share of them; both from the resident
memory of SD1.5's LoRA runs on a CPU. (``pytest -m slow -k real_image`` compares.)"""
GIB = 2**30
PICTURES = "pictures on their way"
DECODER = "autoencoder"


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
    unknown: str | None = None

    @property
    def training(self) -> int:
        """Bytes on the device while training."""
        return sum(self.bytes.values())

    @property
    def peak(self) -> int:
        """Bytes that the device must hold: training, sampling, comparing, or the largest network that encodes."""
        networks = {name: size for name, size in self.encoding.items() if name not in (VAE, PICTURES)}
        pictures = self.encoding.get(VAE, 0) + self.encoding.get(PICTURES, 0)
        comparing = self.comparing.peak if self.comparing else 0
        return max(self.training, self.sampling, comparing, _LIBRARIES + max(pictures, *networks.values(), 0))

    @property
    def host(self) -> int:
        """Bytes of a host without another device: all networks are there at once while the cache is filled."""
        weights = self.bytes.get("weights", 0) + self.bytes.get("average of weights", 0)
        comparing = self.comparing.host if self.comparing else 0
        return max(self.training, self.sampling, comparing, _LIBRARIES + weights + sum(self.encoding.values()))

    def to_text(self) -> str:
        if self.unknown:
            return f"No estimate of memory and time: {self.unknown}"
        lines = [f"{self.steps} steps, {self.trainable / 1e6:.1f} M trainable parameters. Memory of training, roughly:"]
        lines += _listed(self.bytes)
        lines.append(_line("together", self.training))
        lines.append("While the cache is filled, one after the other:")
        lines += _listed(self.encoding)
        if self.sampling:
            lines.append(f"While pictures are sampled and decoded (judges are not counted): {self.sampling / GIB:.2f} GiB.")
        if self.comparing:
            size = self.comparing.peak / GIB
            lines.append(f"While the result is compared with its base (judges are not counted): {size:.2f} GiB.")
        if self.host > self.peak:
            lines.append(f"On a host without a GPU all networks lie there at once: {self.host / GIB:.2f} GiB.")
        if self.cached:
            kinds = ", ".join(f"{size / 2**20:.2f} MiB a {name}" for name, size in self.cached.items())
            lines.append(f"The cache takes on disk: {kinds}.")
        minutes = self.seconds_per_step * self.steps / 60
        lines.append(f"Time of training, roughly: {self.seconds_per_step:.2f} s a step, {minutes:.1f} min in all.")
        if self.seconds_comparing:
            lines.append(f"Time of the comparison with the base, roughly: {self.seconds_comparing / 60:.1f} min more.")
        return "\n".join(lines)


def _line(name: str, size: int) -> str:
    return f"  {name:28s} {size / GIB:8.2f} GiB"


def _listed(sizes: Mapping[str, int]) -> list[str]:
    return [_line(name, size) for name, size in sizes.items() if size]


@dataclass(frozen=True)
class Comparing:
    """Bytes while a model samples for the comparison, in the run's precision."""

    network: int
    decoder: int
    encoders: dict[str, int]
    asked: int  # what the network holds while it answers
    decoded: int  # what the decoder holds for one picture

    @property
    def peak(self) -> int:
        """On a device that holds one network at a time."""
        return _LIBRARIES + max(self.network + self.asked, self.decoder + self.decoded, *self.encoders.values(), 0)

    @property
    def host(self) -> int:
        """All networks together."""
        return _LIBRARIES + self.network + self.decoder + sum(self.encoders.values()) + max(self.asked, self.decoded)


@dataclass(frozen=True)
class Sized:
    """A model as far as an estimate needs it; the same for all settings but precision, adapter, size and those of memory."""

    total: int  # bytes of the network's weights
    trainable: int  # numbers
    one: Pass  # of one pair
    encoding: dict[str, int]
    cached: dict[str, int]
    sampling_flops: float  # of one picture and step at the model's own size, guided
    sampled: int = 0  # bytes while an objective samples or decodes its own pictures, beside weights; 0 where there are none
    comparing: Comparing | None = None
    copies: int = 0  # bytes of weights in half precision that are kept beside those in float32


def estimate(settings: TrainSettings, sized: Sized | None = None) -> Estimate:
    """The estimate for a run; ``unknown`` is set where the model's configuration cannot be read without loading it."""
    steps = settings.loop.steps
    try:
        sized = sized or size_of(settings)
    except UserError as error:
        return Estimate({}, 0, 0.0, 0.0, steps, unknown=str(error))
    cost = settings.objective.cost_of_stored if settings.feedback else settings.objective.cost
    batch, accumulation = settings.batch.batch_size, settings.batch.accumulation
    backward = 2 if settings.adapter == "full" else 1.1  # LoRA: activation gradients, little else
    backward += 1 if settings.compute.gradient_checkpointing else 0
    pairs = accumulation * (1 if samples_itself(settings) else batch)
    passes = pairs * (cost.learning * (1 + backward) + cost.looking)
    seconds = sized.one.flops / sized.one.rows * passes / _speed(settings.compute.mixed_precision)
    parts = _parts(settings, sized, cost.at_once * batch / sized.one.rows)
    comparing = _seconds_comparing(settings, sized)
    still = sum(parts[name] for name in ("weights", "reference", "optimizer", "average of weights", DECODER))
    sampling = _LIBRARIES + still + sized.sampled if samples_itself(settings) and not settings.feedback else 0
    return Estimate(parts, sized.trainable, seconds, comparing, steps, sized.encoding, sized.cached, sampling, sized.comparing)


def size_of(settings: TrainSettings) -> Sized:
    """Count the model of a run. Raises UserError where its configuration is not here."""
    full, precision = settings.adapter == "full", PRECISIONS[settings.compute.mixed_precision]
    dtype = "float32" if full else precision
    family = families.sketch(settings.model, dtype=dtype, config=settings.single_file_config, without=settings.without)
    family.set_vae_memory(tiling=settings.data.vae_tiling, slicing=settings.data.vae_slicing)
    base = _quantised.quantised_bytes(family.network, settings.compute.quantise)
    if full:
        family.train_fully()
    else:
        family.attach_lora(settings.lora.rank, settings.lora.alpha, settings.lora.targets)
    trainable = sum(p.numel() for p in family.denoiser.trainable_parameters())
    pixels = settings.data.resolution or family.resolution
    size = family.latent_shape(pixels)
    rows = max(1, round(settings.objective.cost.at_once))
    autocast = None if precision == "float32" else getattr(torch, precision)
    one = forward_pass(family, size, rows, settings.compute.gradient_checkpointing, autocast)
    copies = 0
    if full and autocast:  # of weights, in half precision: they are kept as well, and there are no more of them for more samples
        two = forward_pass(family, size, 2 * rows, settings.compute.gradient_checkpointing, autocast)
        copies = 2 * one.kept - two.kept
        one = replace(one, kept=one.kept - copies)
    own = one.flops if size == family.latent_shape(family.resolution) else _own_flops(family)
    return Sized(
        total=base + (0 if full else 4 * trainable),
        trainable=trainable,
        one=one,
        copies=copies,
        encoding={**_encoding(settings, family), PICTURES: picture_bytes(family, pixels, settings.data.encode_batch)},
        cached=_cached(settings, family, size),
        sampling_flops=2 * own / rows,  # guidance asks twice
        sampled=_sampled(settings, family, size) if samples_itself(settings) else 0,
        comparing=_comparing(settings) if settings.evaluation.prompts else None,
    )


def _encoding(settings: TrainSettings, family: Any) -> dict[str, int]:
    """Bytes of each network that encodes; they are sketched in float32."""
    text = _SIZE[settings.data.text_precision]
    return {name: size * (4 if name == VAE else text) // 4 for name, size in encoding_bytes(family).items()}


def _sampled(settings: TrainSettings, family: Any, size: tuple[int, int, int]) -> int:
    pictures, guidance = settings.reward.rollout_batch, getattr(settings.objective, "guidance", 1.0)
    return max(
        asking_bytes(family, size, pictures * (1 if guidance == 1.0 else 2)),
        decoding_bytes(family, size, 1 if settings.data.vae_slicing else pictures),
    )


def _comparing(settings: TrainSettings) -> Comparing:
    """Of the model's own size; guidance asks twice."""
    precision = PRECISIONS[settings.compute.mixed_precision]
    family = families.sketch(settings.model, dtype=precision, config=settings.single_file_config, without=settings.without)
    size = family.latent_shape(family.resolution)
    encoders = {name: numbers * _SIZE[precision] // 4 for name, numbers in encoding_bytes(family).items()}
    return Comparing(
        network=_quantised.quantised_bytes(family.network, settings.compute.quantise),
        decoder=encoders.pop(VAE),
        encoders=encoders,
        asked=asking_bytes(family, size, 2 * settings.evaluation.sampling_batch),
        decoded=decoding_bytes(family, size, 1) * _SIZE[precision] // 4,
    )


def _own_flops(family: Any) -> int:
    return forward_pass(family, family.latent_shape(family.resolution), 1, False, None).flops


def _parts(settings: TrainSettings, sized: Sized, times: float) -> dict[str, int]:
    """Bytes while training, with ``times`` what was counted at one time."""
    full = settings.adapter == "full"
    kept, inner = sized.copies + int(times * sized.one.kept), int(times * sized.one.inner)
    half = PRECISIONS[settings.compute.mixed_precision] != "float32"
    return {
        "weights": sized.total,
        "reference": sized.total // (2 if half else 1) if full else 0,
        "gradients": sized.trainable * 4,
        "optimizer": sized.trainable * (2 if settings.optimiser.eight_bit else 8),
        "average of weights": sized.trainable * 4 if settings.loop.ema_decay else 0,
        DECODER: sized.encoding[VAE] if samples_itself(settings) and not settings.feedback else 0,
        "activations": kept,
        "a block gone through again": inner,
        "libraries and buffers": _LIBRARIES + int(_BUFFERS * (inner or kept)),
    }


def _cached(settings: TrainSettings, family: Any, size: tuple[int, int, int]) -> dict[str, int]:
    """Bytes on disk of one picture and one prompt."""
    each = {"float16": 2, "float32": 4}["float16"]
    channels, height, width = size
    return {"picture": 2 * channels * height * width * each, "prompt": conditioning_bytes(family, each)}


def _seconds_comparing(settings: TrainSettings, sized: Sized) -> float:
    """Sampling by base and tuned model, in float32 and at the model's own size; judging is not counted."""
    e = settings.evaluation
    if not e.prompts:
        return 0.0
    return 2 * len(held_out_prompts(e.prompts, e.prompt_count)) * e.sampling_steps * sized.sampling_flops / _speed("no")


def _speed(precision: str, side: int = 1024, seconds: float = 0.2) -> float:
    """Operations per second that a step reaches here, from the speed of a matrix product in this precision."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(side, side, device=device, dtype=getattr(torch, PRECISIONS[precision]))
    a @ a
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        (a @ a)[0, 0].item()
        count += 1
    return _EFFICIENCY * 2 * side**3 * count / (time.perf_counter() - start)
