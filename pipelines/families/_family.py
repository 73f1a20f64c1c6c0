"""One loaded checkpoint, ready to be trained: the interface of all families.

A family's file makes a denoiser and an encoder; everything else (adapters, switches, saving) is the same for all and is here.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.protocols import Predictor
from pipelines.families import _attention, _compiled, _convolutions, _lora, _quantised
from pipelines.families._denoiser import NetworkDenoiser, working_dtype
from pipelines.families._encoder import FrozenEncoder
from pipelines.families._encoding import TruncatedPrompt
from pipelines.families._files import installed_into
from pipelines.families._frozen import frozen_copy
from pipelines.families._names import INDEX_FILE, NOTE_FILE
from pipelines.families._origin import Origin
from pipelines.families._quiet import quietly
from pipelines.families._reading import read
from pipelines.families._registry import registry
from pipelines.sampling import guidance_of

UNET = "unet"


class Family:
    """A checkpoint of a known family. Nothing is trainable until ``attach_lora`` or ``train_fully`` is called."""

    def __init__(
        self,
        name: str,
        pipeline: Any,
        denoiser: NetworkDenoiser,
        encoder: FrozenEncoder,
        network_name: str,
        lora_targets: Sequence[str],
        resolution: int,
        origin: Origin | None = None,
        *,
        patch: int = 1,
        whole: bool = False,
    ) -> None:
        self.name, self.denoiser, self.encoder, self.origin = name, denoiser, encoder, origin
        self.resolution = resolution  # pixels on a side that the network was made for
        self._network = denoiser.network  # kept apart: ``denoiser`` may later be put around a wrapper of it
        self._pipeline, self._network_name, self._lora_targets = pipeline, network_name, tuple(lora_targets)
        self._latents = pipeline.vae.config.latent_channels, pipeline.vae_scale_factor  # kept: the autoencoder may be let go
        self._patch = patch  # latent pixels on a side of what the network takes for one
        self._whole = whole  # whether the autoencoder takes sides of whole latent pixels only; others cut off what is over
        self._released = False
        self.left_out = _left_out(pipeline)

    @property
    def network(self) -> nn.Module:
        """The bare network, never a wrapper; wrappers share its parameters."""
        return self._network

    @property
    def pipeline_class(self) -> str:
        """The name of the pipeline's class in Diffusers."""
        return type(self._pipeline).__name__

    @property
    def base_model(self) -> str:
        """The name of the checkpoint: 'tiny', a hub id or a path; empty if it was built in memory."""
        return self.origin.model if self.origin else ""

    @property
    def default_guidance(self) -> float:
        """The usual guidance scale, by the checkpoint or its pipeline, on the scale of this package: 1 is none."""
        declared = registry()[self.name]
        if declared.EMBEDS_GUIDANCE and not self.embeds_guidance:  # FLUX.1 [schnell]
            return 1.0
        return guidance_of(self._pipeline) + 1.0 - declared.NO_GUIDANCE

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is an input of the network, so that one call does what two do elsewhere (FLUX.1 [dev])."""
        return registry()[self.name].EMBEDS_GUIDANCE and bool(self.network.config.guidance_embeds)

    # ------------------------------------------------------------------------------------------------ what is trained

    def quantise(self, kind: str, device: torch.device | str = "cpu") -> None:
        """Keep the weights of the blocks' linear layers in ``int8`` or ``nf4``, for a LoRA on top; see ``_quantised``.

        Everything else stays as it is. Layers are quantised one by one on ``device``.

        Raises:
            UserError: the library is not installed, or the weights are quantised already.
        """
        if self.has_adapter:
            raise ValueError("quantise before an adapter is attached")
        _quantised.quantise(self.network, kind, device)

    def attach_lora(
        self, rank: int = 8, alpha: float | None = None, targets: Sequence[str] | None = None, dropout: float = 0.0, seed: int = 0
    ) -> None:
        """Add a float32 adapter and freeze the rest. ``alpha`` defaults to ``rank``, ``targets`` to the attention layers.

        Raises:
            UserError: a number out of range, or a target that matches no layer.
        """
        if self.has_adapter:
            raise ValueError("there is an adapter already")
        alpha, targets = rank if alpha is None else alpha, targets or self._lora_targets
        _lora.attach(self.network, rank=rank, alpha=alpha, targets=targets, dropout=dropout, seed=seed)
        _quantised.keep_from_exchange(self.network)

    @property
    def has_adapter(self) -> bool:
        """Whether ``attach_lora`` has been called."""
        return _lora.is_attached(self.network)

    def detach_lora(self) -> None:
        """Remove the adapter: the network is the base again."""
        _lora.detach(self.network)

    def train_fully(self) -> None:
        """Make every weight of the network trainable, in float32.

        Raises:
            UserError: some are quantised.
        """
        if self.has_adapter:
            raise ValueError("the network carries an adapter; detach it first")
        self._refuse_quantised()
        self.network.float().requires_grad_(True)

    def _refuse_quantised(self) -> None:
        if _quantised.is_quantised(self.network):
            raise UserError(f"{self.base_model} has quantised weights, which cannot be trained: train a LoRA on them instead.")

    def frozen_copy(self, half: torch.dtype | None = None, everything: bool = False) -> Predictor:
        """A second, frozen network with the present weights: the reference of a full fine-tuning run.

        With ``half``, the type of autocast, it takes half of the memory, and under autocast it answers as the network does
        (``_frozen.frozen_copy``, also for ``everything``).
        """
        if self.has_adapter:
            raise ValueError("with an adapter, denoiser.adapter_off() is the reference; no copy is needed")
        self._refuse_quantised()
        return self.denoiser.with_network(frozen_copy(self.network, half, everything))

    def adapter_state(self) -> dict[str, Tensor]:
        """The trained tensors by name: the adapter, or the whole network. Not copies: clone them to keep them."""
        return {name: parameter.detach() for name, parameter in self.network.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy ``adapter_state`` of another moment into the same tensors, which an optimizer may hold.

        Raises:
            UserError: names or shapes differ, as with another rank or other targets.
        """
        mine = self.adapter_state()
        odd = sorted(mine.keys() ^ state.keys()) or sorted(n for n in mine if mine[n].shape != state[n].shape)
        if odd:
            raise UserError(
                f"The saved weights do not fit this run: {len(odd)} differ in name or shape, for example {odd[0]}. "
                "Was it another rank or target?"
            )
        for name, parameter in mine.items():
            parameter.copy_(state[name])

    def load_adapter(self, saved: _lora.SavedAdapter) -> None:
        """Give the adapter that is attached the weights of one that ``save_adapter`` wrote.

        Raises:
            UserError: it has another rank, another alpha, or other layers.
        """
        self.load_adapter_state(_lora.as_state(self.network, saved))

    # ------------------------------------------------------------------------------------------------------- switches

    def to(self, device: torch.device | str) -> None:
        """Move the network; the encoders, if they are still there, will be there whenever they work."""
        self.network.to(device)
        if not self._released:
            self.encoder.work_on(device)

    def release_encoders(self, keep_decoder: bool = False) -> None:
        """Free the encoders' memory, once the cache is filled. The decoder is kept for objectives that sample."""
        self.encoder.release(keep_decoder)
        for name in self.encoder.components:
            setattr(self._pipeline, name, None)
        self._released = True

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of square pictures of ``resolution`` pixels a side.

        Raises:
            UserError: the network cannot take them, because it cuts latents into patches.
        """
        channels, factor = self._latents
        side = resolution // factor
        if side % self._patch or (self._whole and resolution % factor):
            step = factor * self._patch
            near = f"{resolution // step * step} or {(resolution // step + 1) * step}"
            raise UserError(f"{self.name} takes pictures whose sides are multiples of {step} pixels, {near}; got {resolution}.")
        return channels, side, side

    def set_vae_memory(self, *, tiling: bool = False, slicing: bool = False) -> None:
        """Encode and decode pictures that are larger than a tile in overlapping tiles, and one at a time; see the encoder.

        Raises:
            UserError: the autoencoder cannot.
        """
        self.encoder.set_vae_memory(tiling=tiling, slicing=slicing)

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Recompute activations in the backward pass: less memory, about a third more time."""
        if on:
            self.network.enable_gradient_checkpointing()
        else:
            self.network.disable_gradient_checkpointing()

    def set_channels_last(self, on: bool) -> None:
        """Store a UNet's convolution weights channels-last, which is faster on GPUs. Call before an optimizer is made.

        Transformers have no convolutions to speak of: nothing happens.
        """
        if self._network_name != UNET:
            return
        self.network.to(memory_format=torch.channels_last if on else torch.contiguous_format)

    def use_products(self) -> int:
        """Compute large convolutions over few positions as matrix products, for a frozen network on a CPU; returns how many."""
        return _convolutions.use_products(self.network)

    def compile_blocks(self, **options: Any) -> int:
        """Have ``torch.compile(**options)`` take the network's repeated blocks; how many they are. After ``attach_lora``."""
        return _compiled.compile_blocks(self.network, **options)

    def set_attention(self, kind: str, device: torch.device | str | None = None) -> None:
        """``sdpa`` (PyTorch's choice, the default), ``flash`` (that kernel of PyTorch's or none), or ``xformers``, for UNets.

        Call it when the network is in its dtype; ``device`` is where it will work, if it is not there yet.

        Raises:
            UserError: another word, or a kernel where it cannot run.
        """
        if kind not in _attention.KINDS:
            raise UserError(f"attention is {', '.join(_attention.KINDS[:-1])} or {_attention.KINDS[-1]}; got {kind!r}.")
        is_unet = self._network_name == UNET
        _attention.any_kernel(self.network)
        if kind == "flash":
            _attention.only_flash(self.network, working_dtype(self.network), device or next(self.network.parameters()).device)
        if kind in ("sdpa", "flash"):
            if is_unet:  # Diffusers would put plain attention in the place of a transformer's joint or linear one
                self.network.disable_xformers_memory_efficient_attention()
            return
        if not is_unet:
            raise UserError(f"attention xformers is for UNets; {self.name} has a transformer with its own attention: use sdpa.")
        if importlib.util.find_spec("xformers") is None:
            raise UserError(
                "attention xformers needs the package xformers, which is not installed: "
                "pip install 'diffalign[xformers]', or use sdpa."
            )
        if not torch.cuda.is_available():
            raise UserError("attention xformers needs a CUDA device, and there is none here; use sdpa.")
        with quietly():
            self.network.enable_xformers_memory_efficient_attention()

    def attention(self, kind: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> str:
        """A line on what computes attention (``set_attention``), in ``dtype`` on ``device`` if not the network's own."""
        device = device or next(self.network.parameters()).device
        return _attention.describe(kind, self.network, dtype or working_dtype(self.network), device)

    def truncated(self, prompts: Sequence[str]) -> list[TruncatedPrompt]:
        """The prompts that are too long for the text encoder, with what is lost of each."""
        return self.encoder.truncated(prompts)

    # --------------------------------------------------------------------------------------------- sampling and saving

    def pipeline(self) -> Any:
        """A whole pipeline around the live network, on its device, to sample from while training.

        Shares the network's weights; the rest is read again where it was released or has another dtype.
        """
        dtype, device = working_dtype(self.network), next(self.network.parameters()).device
        if not self._released and dtype == torch.float32:
            self.encoder.to(device)
            return self._pipeline
        pipe = read(self._needed_origin(), dtype=dtype, others=dtype, **{self._network_name: self.network})
        for name in self.encoder.components:
            getattr(pipe, name).to(device)
        return pipe

    def save_adapter(self, path: str | Path) -> None:
        """Write the adapter into the folder ``path`` as ``pytorch_lora_weights.safetensors``.

        ``pipe.load_lora_weights(path, weight_name="pytorch_lora_weights.safetensors")`` reads it, with its alpha; for pipelines
        that have no such method, ``PeftModel.from_pretrained(pipe.transformer, path)``.
        Beside it goes ``diffalign.json`` with the base model's name. Other files in ``path`` stay.

        Raises:
            UserError: it could not be written; what was there is untouched.
        """
        if not self.has_adapter:
            raise ValueError("there is no adapter to save")
        with installed_into(Path(path)) as folder:
            _lora.write(folder, type(self._pipeline), self._network_name, self.network)
            (folder / NOTE_FILE).write_text(json.dumps(self._note("lora"), indent=2) + "\n", encoding="utf-8")

    def save_pipeline(self, path: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the whole pipeline into the folder ``path``, for ``from_pretrained(path)``. Other files in ``path`` stay.

        ``weights`` are all of the network's, by name, where it has only this process's shares of them.

        Raises:
            UserError: it could not be written; what was there is untouched.
        """
        if self.has_adapter:
            raise ValueError("the network carries an adapter: save_adapter writes it, detach_lora removes it")
        if _quantised.is_quantised(self.network):
            raise ValueError("the weights are quantised: a pipeline is saved with whole ones")
        pipe, network = self._pipeline, self.network if weights is None else self._joined(weights)
        if self.origin is not None:  # with everything that was left out, or let go, on loading
            pipe = read(self.origin, dtype=torch.float32, others=torch.float32, whole=True, **{self._network_name: network})
        elif self._released or weights is not None:
            self._needed_origin()
        with installed_into(Path(path), last=INDEX_FILE) as folder, quietly():
            pipe.save_pretrained(folder)
            (folder / NOTE_FILE).write_text(json.dumps(self._note("pipeline"), indent=2) + "\n", encoding="utf-8")

    def _joined(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """A network of the same kind with these weights, on the CPU; buffers are not sharded."""
        of_diffusers = next(made for made in type(self.network).__mro__ if made.__module__.startswith("diffusers."))
        network = of_diffusers.from_config(self.network.config)
        network.load_state_dict({name: weights.get(name, value) for name, value in self.network.state_dict().items()})
        return network

    def _note(self, kind: str) -> dict[str, Any]:
        note = {"kind": kind, "family": self.name, "base_model": self.base_model}
        if self.origin and self.origin.base_loras:  # in a LoRA's folder: to be applied as well; in a pipeline's: for the record
            note["base_loras"] = [lora.note() for lora in self.origin.base_loras]
        if self.origin and self.origin.without:  # in the same way
            note["without"] = list(self.origin.without)
        return {**note, "config": self.origin.config} if self.origin and self.origin.config else note

    def _needed_origin(self) -> Origin:
        if self.origin is None:
            raise ValueError("the encoders were released, and this family was not loaded from anywhere they could be read again")
        return self.origin


def _left_out(pipeline: Any) -> tuple[str, ...]:
    """Names of missing parts that ``from_pretrained`` requires unless they are passed as None: SD3's third text encoder."""
    return tuple(n for n, part in pipeline.components.items() if part is None and n not in pipeline._optional_components)
