"""What the encoders of all families share: an autoencoder, devices, and letting go. A family says how its text is encoded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from pipelines.families._encoding import TruncatedPrompt, digest

VAE = "vae"
"""The pipelines' name of their autoencoder."""
_SETTINGS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


class FrozenEncoder(ABC):
    """An autoencoder and text encoders as a ``diffalign.protocols.Encoder``; in their own precision, whatever the network's.

    ``networks`` are by the names of the pipeline's attributes; the autoencoder is ``vae``.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.components = tuple(networks)
        self._networks = {name: network.requires_grad_(False).eval() for name, network in networks.items()}
        self._fingerprint: dict[str, Any] | None = None
        self._device: torch.device | None = None  # where a network goes for its work; None leaves all where they are

    # ------------------------------------------------------------------------------------------------- of each family

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Conditioning tensors [B, ...] by name, as the pipeline's ``encode_prompt`` computes them; longer prompts are cut."""

    @abstractmethod
    def truncated(self, prompts: Sequence[str]) -> list[TruncatedPrompt]:
        """The prompts that do not fit, with what is lost of each."""

    @abstractmethod
    def about_text(self) -> dict[str, Any]:
        """The part of the fingerprint that prompts depend on."""

    # ------------------------------------------------------------------------------------------------------- pictures

    def fingerprint(self) -> Mapping[str, Any]:
        """Hashes of the weights that encode (the decoder is not among them), and the few settings that change the result."""
        if self._fingerprint is None:
            (vae,) = self._at_work(VAE)
            settings = {name: vae.config.get(name) for name in _SETTINGS}
            pictures = {"vae_encoder": digest(vae.encoder, getattr(vae, "quant_conv", None))}
            self._fingerprint = {
                **pictures,
                **{name: value for name, value in settings.items() if value is not None},
                **_tiles(vae),
                **self.about_text(),
                **self._precisions(),
            }
        return self._fingerprint

    def _precisions(self) -> dict[str, Any]:
        """The part of the fingerprint for networks that do not work in float32: their weights may be the same to the bit."""
        dtypes = {name: str(next(network.parameters()).dtype).removeprefix("torch.") for name, network in self._networks.items()}
        other = {name: dtype for name, dtype in dtypes.items() if dtype != "float32"}
        return {"precisions": other} if other else {}

    def set_vae_memory(self, *, tiling: bool = False, slicing: bool = False) -> None:
        """Less memory for large pictures. Call before the fingerprint is taken.

        Args:
            tiling: pictures larger than the autoencoder's tile (512 pixels in SD 1.x, 1024 in later families) go through in tiles
                that overlap; its norms and attention see less at a time, so the latents change somewhat.
            slicing: pictures go through one at a time.

        Raises:
            UserError: the autoencoder cannot.
        """
        vae = self._networks[VAE]
        for wanted, what in ((tiling, "tiling"), (slicing, "slicing")):
            if not wanted:
                continue
            try:
                getattr(vae, f"enable_{what}")()
            except (AttributeError, NotImplementedError) as error:
                raise UserError(
                    f"data.vae_{what}: this model's autoencoder ({type(vae).__name__}) has none; set it to false."
                ) from error
        self._fingerprint = None

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> dict[str, Tensor]:
        """``pixels`` [B, 3, H, W] in [-1, 1] -> the posterior's ``mean`` and ``std`` [B, C, h, w], both scaled as the network
        knows latents."""
        (vae,) = self._at_work(VAE)
        mean, std = self.posterior(vae, pixels.to(device=vae.device, dtype=vae.dtype))
        shift, scale = _normalisation(vae)
        return {"mean": ((mean - shift) * scale).float(), "std": (std * scale).float()}

    def posterior(self, vae: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents as the autoencoder knows them, not scaled."""
        found = vae.encode(pixels).latent_dist
        return found.mean, found.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] -> pictures [B, 3, H, W] in [0, 1], float32 on the CPU, as the pipeline makes them."""
        if VAE not in self._networks:
            raise ValueError("the autoencoder has been released; keep the decoder to look at what is sampled")
        (vae,) = self._at_work(VAE)
        shift, scale = _normalisation(vae)
        pixels = vae.decode(latents.to(device=vae.device, dtype=vae.dtype) / scale + shift, return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1).cpu()

    # -------------------------------------------------------------------------------------------------------- devices

    def to(self, device: torch.device | str) -> None:
        """Move all networks to ``device``, for good."""
        self._device = None
        for network in self._at_work(*self.components):
            network.to(device)

    def work_on(self, device: torch.device | str) -> None:
        """Keep each network on ``device`` only while it is used, and on the CPU while others are.

        A cache encodes pictures first and then prompts: two moves, and never the memory of all networks.
        """
        self._device = torch.device(device)

    def networks(self) -> list[nn.Module]:
        """The networks that have not been released, in the order of ``components``."""
        return list(self._networks.values())

    def release(self, keep_decoder: bool = False) -> None:
        """Let go of all networks, or of all but the autoencoder; the fingerprint stays if it has been taken."""
        self._networks = {name: network for name, network in self._networks.items() if keep_decoder and name == VAE}

    def _at_work(self, *names: str) -> list[nn.Module]:
        """The networks of these names, where they are to work."""
        if not set(names) <= self._networks.keys():
            raise ValueError("the encoders have been released; load the family again to encode more")
        if self._device is not None:
            for name, network in self._networks.items():
                if name not in names:
                    network.to("cpu")
            for name in names:
                self._networks[name].to(self._device)
        return [self._networks[name] for name in names]


def _tiles(vae: nn.Module) -> dict[str, Any]:
    """The part of the fingerprint for pictures in tiles: their sizes; nothing where pictures go through whole."""
    if not getattr(vae, "use_tiling", False):
        return {}
    return {"vae_tiles": {name: value for name, value in sorted(vars(vae).items()) if name.startswith("tile_")}}


def _normalisation(vae: nn.Module) -> tuple[Any, Any]:
    """Shift and scale, numbers or [1, C, 1, 1]: the network's latents are ``(z - shift) * scale``."""
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return config.get("shift_factor") or 0.0, config.scaling_factor
    mean, std = (torch.tensor(value, device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1) for value in (mean, std))
    return mean, config.scaling_factor / std
