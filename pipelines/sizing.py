"""The memory and operations that a run's model needs, counted in shapes.

Networks are built from their configurations without values (``families.sketch``), and make one forward pass over one pair.
Activations are the tensors that autograd keeps; operations are counted by PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from diffalign.optimisation import moments_bytes
from pipelines import devices, families
from pipelines.counting import (
    Encoded,
    Pass,
    asking_bytes,
    decoding_bytes,
    encoded_prompt,
    encoding_bytes,
    forward_pass,
    picture_bytes,
    prompt_bytes,
)
from pipelines.families import _quantised
from pipelines.families._encoder import VAE
from pipelines.image_settings import TrainSettings
from pipelines.ingredients import samples_itself
from pipelines.run import PRECISIONS

PICTURES = "pictures on their way"
_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
_ON_DISK = 2  # bytes of a number in the cache

T = TypeVar("T")
Size = tuple[int, int, int]
"""(C, h, w) of a latent."""


@dataclass(frozen=True)
class Comparing:
    """Bytes while a model samples for the comparison, in the run's precision."""

    network: int
    decoder: int
    encoders: dict[str, int]
    asked: int  # what the network holds while it answers
    decoded: int  # what the decoder holds for one picture

    @property
    def on_device(self) -> int:
        """Bytes on a device that holds one network at a time."""
        return max(self.network + self.asked, self.decoder + self.decoded, *self.encoders.values(), 0)

    @property
    def on_host(self) -> int:
        """Bytes of all networks together."""
        return self.network + self.decoder + sum(self.encoders.values()) + max(self.asked, self.decoded)


@dataclass(frozen=True)
class Sized:
    """A model as far as an estimate needs it."""

    total: int  # bytes of the network's weights
    trainable: int  # numbers
    moments: int  # bytes that the optimizer keeps
    one: Pass  # of one pair
    encoding: dict[str, int]  # bytes of each network that encodes, and of pictures on their way
    cached: dict[str, int]  # bytes on disk of one picture and one prompt
    sampling_flops: float  # of one picture and step at the model's own size, guided
    sampled: int = 0  # bytes while an objective samples or decodes its own pictures, beside weights; 0 where there are none
    comparing: Comparing | None = None
    guidance_embedded: bool = False
    copies: int = 0  # bytes of weights in half precision that are kept beside those in float32
    gathered: int = 0  # bytes of weights that lie whole on a device at one time where all others are shared out
    read: int = 0  # bytes of the network's weights before a base is quantised


def asked_once(objective: Any) -> Any:
    """The objective with its costs for a network that takes its guidance as an input."""
    return replace(objective, guidance=1.0) if hasattr(objective, "guidance") else objective


class Sizing:
    """Counts a model, each number once: presets ask for most of them again with every switch.

    All settings that it is called with name the same model, LoRA, size of pictures and tiling.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}

    def of(self, settings: TrainSettings) -> Sized:
        """Raises UserError where the model's configuration is not here."""
        full = settings.adapter == "full"
        plain, trained = self._plain(settings, "float32" if full else _precision(settings)), self._trained(settings)
        size = plain.latent_shape(settings.data.resolution or plain.resolution)
        objective = asked_once(settings.objective) if plain.embeds_guidance else settings.objective
        one, copies = self._pass(settings, size, max(1, round(objective.cost.at_once)))
        parameters = list(trained.denoiser.trainable_parameters())
        trainable = sum(p.numel() for p in parameters)
        base = _weights_bytes(settings, plain)
        return Sized(
            total=base + (0 if full else 4 * trainable),
            trainable=trainable,
            moments=moments_bytes(parameters, settings.optimizer),
            one=one,
            copies=copies,
            encoding=self._encoding(settings),
            cached={"picture": 2 * math.prod(size) * _ON_DISK, "prompt": prompt_bytes(self._prompt(settings), _ON_DISK)},
            sampling_flops=_calls(plain) * self._own_flops(settings, one, size),
            sampled=self._sampled(settings, objective, size) if samples_itself(settings) else 0,
            comparing=self._comparing(settings) if settings.evaluation.prompts else None,
            guidance_embedded=plain.embeds_guidance,
            read=_weights_bytes(settings, plain, quantised=False),
            gathered=_SIZE[_precision(settings)] * devices.gathered(plain.network) if full else 0,
        )

    def _once(self, key: Hashable, count: Callable[..., T], *given: Any) -> T:
        if key not in self._found:
            self._found[key] = count(*given)
        return self._found[key]

    def _plain(self, settings: TrainSettings, dtype: str) -> Any:
        """The family as it is read."""
        return self._once(("plain", dtype), _sketched, settings, dtype)

    def _trained(self, settings: TrainSettings) -> Any:
        """The family with the parameters that are trained."""
        dtype = "float32" if settings.adapter == "full" else _precision(settings)
        key = ("trained", settings.adapter, dtype, settings.compute.channels_last)
        return self._once(key, _as_trained, settings, dtype)

    def _encoder(self, settings: TrainSettings) -> Any:
        """The family whose autoencoder works as the run has it."""
        return self._once("encoder", _with_vae_memory, settings)

    def _prompt(self, settings: TrainSettings) -> Encoded:
        return self._once("prompt", encoded_prompt, self._plain(settings, "float32"))

    def _pass(self, settings: TrainSettings, size: Size, rows: int) -> tuple[Pass, int]:
        """One pass with a gradient, and the bytes of weights in half precision that are kept for it, however many samples."""
        precision, checkpointing = _precision(settings), settings.compute.gradient_checkpointing
        family, prompt = self._trained(settings), self._prompt(settings)
        autocast = None if precision == "float32" else getattr(torch, precision)

        def counted(rows: int) -> Pass:
            key = ("pass", settings.adapter, size, rows, checkpointing, precision, settings.compute.channels_last)
            return self._once(key, forward_pass, family, prompt, size, rows, checkpointing, autocast)

        one = counted(rows)
        copies = 2 * one.kept - counted(2 * rows).kept if settings.adapter == "full" and autocast else 0
        return replace(one, kept=one.kept - copies), copies

    def _own_flops(self, settings: TrainSettings, one: Pass, size: Size) -> float:
        """Operations for one picture and call at the model's own size."""
        family = self._plain(settings, "float32")
        own = family.latent_shape(family.resolution)
        if size == own:
            return one.flops / one.rows
        return self._once("own", forward_pass, family, self._prompt(settings), own, 1, False, None).flops

    def _encoding(self, settings: TrainSettings) -> dict[str, int]:
        """They are sketched in float32; the autoencoder stays so."""
        data, family = settings.data, self._encoder(settings)
        pixels, text = data.resolution or family.resolution, _SIZE[data.text_precision]
        key = (PICTURES, data.encode_batch)
        networks = {name: size * (4 if name == VAE else text) // 4 for name, size in encoding_bytes(family).items()}
        if samples_itself(settings):  # prompts alone
            return networks
        return {**networks, PICTURES: self._once(key, picture_bytes, family, pixels, data.encode_batch)}

    def _sampled(self, settings: TrainSettings, objective: Any, size: Size) -> int:
        pictures, guidance = settings.reward.rollout_batch, getattr(objective, "guidance", 1.0)
        asked = self._asked(settings, size, pictures * (1 if guidance == 1.0 else 2))
        at_once = 1 if settings.data.vae_slicing else pictures
        decoded = self._once(("decoded", at_once), decoding_bytes, self._encoder(settings), size, at_once)
        return max(asked, decoded)

    def _comparing(self, settings: TrainSettings) -> Comparing:
        """Costs of the comparison, at the model's own size."""
        family, scale = self._plain(settings, _precision(settings)), _SIZE[_precision(settings)] / 4
        size = family.latent_shape(family.resolution)
        encoders = {name: int(count * scale) for name, count in encoding_bytes(family).items()}
        decoded = self._once("compared", decoding_bytes, self._plain(settings, "float32"), size, 1)
        return Comparing(
            network=_weights_bytes(settings, family),
            decoder=encoders.pop(VAE),
            encoders=encoders,
            asked=self._asked(settings, size, _calls(family) * settings.evaluation.sampling_batch),
            decoded=int(decoded * scale),
        )

    def _asked(self, settings: TrainSettings, size: Size, rows: int) -> int:
        dtype = _precision(settings)
        given = (self._plain(settings, dtype), self._prompt(settings), size, rows)
        return self._once(("asked", dtype, size, rows), asking_bytes, *given)


def _precision(settings: TrainSettings) -> str:
    return PRECISIONS[settings.compute.mixed_precision]


def _weights_bytes(settings: TrainSettings, family: Any, quantised: bool = True) -> int:
    """Bytes of the network's weights; those of a .gguf file stay as they are in it."""
    if settings.model.endswith(".gguf"):
        return Path(settings.model).stat().st_size
    return _quantised.quantised_bytes(family.network, settings.compute.quantise if quantised else _quantised.NONE)


def _sketched(settings: TrainSettings, dtype: str) -> Any:
    return families.sketch(settings.model, dtype=dtype, config=settings.single_file_config, without=settings.without)


def _with_vae_memory(settings: TrainSettings) -> Any:
    family = _sketched(settings, "float32")
    family.set_vae_memory(tiling=settings.data.vae_tiling, slicing=settings.data.vae_slicing)
    return family


def _as_trained(settings: TrainSettings, dtype: str) -> Any:
    """The family as ``ingredients`` prepares it, where copies of pictures in another memory order are kept, too."""
    family = _sketched(settings, dtype)
    if settings.adapter == "full":
        family.train_fully()
    else:
        if not torch.accelerator.is_available():
            family.use_products()
        family.attach_lora(settings.lora.rank, settings.lora.alpha, settings.lora.targets)
    if settings.compute.channels_last:
        family.set_channels_last(True)
    family.network.train()
    return family


def _calls(family: Any) -> int:
    """Calls of the network per step of usual sampling."""
    return 1 if family.embeds_guidance or family.default_guidance == 1 else 2
