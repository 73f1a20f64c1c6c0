"""Metadata in the header of a file for the programs that open it: kohya's ``ss_`` fields and Stability's ``modelspec.`` fields.

A1111 and Forge sort LoRAs by ``ss_base_model_version`` and ``ss_v2``. The fields of the specification are those of version
1.0.1 (https://github.com/Stability-AI/ModelSpec). There is no date among them: the same run gives the same file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffalign.errors import UserError
from pipelines.lora_layouts import Parts, is_sdxl, network_of

GENERATIVE_MODELS = "https://github.com/Stability-AI/generative-models"


@dataclass(frozen=True)
class Kind:
    """Names of an architecture in other programs."""

    base_version: str  # ss_base_model_version
    architecture: str  # modelspec.architecture
    implementation: str  # of a LoRA in kohya's layout
    module: str  # ss_network_module
    prediction: str | None = None  # of noise models: epsilon or v


def kind_of(network: Any, prediction_type: str) -> Kind:
    """The kind of a denoiser.

    Args:
        prediction_type: what it predicts, as the scheduler's configuration says.

    Raises:
        UserError: it is none that these fields have words for.
    """
    name, v = type(network).__name__, prediction_type == "v_prediction"
    if name == "SD3Transformer2DModel":
        which = _sd3(network.config)
        return Kind(f"sd{which}", f"stable-diffusion-{which}", "https://github.com/Stability-AI/sd3-ref", "networks.lora_sd3")
    if name == "FluxTransformer2DModel":
        which = "flux-1-dev" if network.config.guidance_embeds else "flux-1-schnell"
        return Kind("flux1", which, "https://github.com/black-forest-labs/flux", "networks.lora_flux")
    if name == "ZImageTransformer2DModel":
        return Kind("zimage", "Z-Image", "https://github.com/Tongyi-MAI/Z-Image", "networks.lora_zimage")
    if name != "UNet2DConditionModel":
        raise UserError(f"The headers of kohya's and ComfyUI's files have no words for a {name}.")
    words = "v" if v else "epsilon"
    if is_sdxl(network):
        return Kind("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", GENERATIVE_MODELS, "networks.lora", words)
    if network.config.cross_attention_dim == 1024:
        architecture = "stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512"
        return Kind("sd_v2_v" if v else "sd_v2", architecture, "diffusers", "networks.lora", words)
    return Kind("sd_v1_v" if v else "sd_v1", "stable-diffusion-v1", "diffusers", "networks.lora", words)


def _sd3(config: Any) -> str:
    if config.qk_norm is None:
        return "3-medium"
    return "3-5-medium" if config.dual_attention_layers else "3-5-large"


def of_lora(parts: Parts, prediction_type: str, *, title: str, resolution: int, rank: int, alpha: float) -> dict[str, str]:
    """The header of a LoRA.

    Args:
        resolution: pixels on a side.
        rank: of a layer by itself; where layers are fused, the file's matrices have a multiple of it.
    """
    kind = kind_of(parts[network_of(parts)], prediction_type)
    return {
        "ss_network_module": kind.module,
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_base_model_version": kind.base_version,
        "ss_v2": str(kind.base_version.startswith("sd_v2")),
        "ss_output_name": title,
        **_spec(kind, f"{kind.architecture}/lora", kind.implementation, title, resolution),
    }


def of_checkpoint(network: Any, prediction_type: str, *, title: str, resolution: int) -> dict[str, str]:
    """The header of a whole model in one file."""
    kind = kind_of(network, prediction_type)
    return _spec(kind, kind.architecture, GENERATIVE_MODELS, title, resolution)


def _spec(kind: Kind, architecture: str, implementation: str, title: str, resolution: int) -> dict[str, str]:
    fields: Mapping[str, str | None] = {
        "sai_model_spec": "1.0.1",
        "architecture": architecture,
        "implementation": implementation,
        "title": title,
        "resolution": f"{resolution}x{resolution}",
        "description": "Aligned with preferences by diffalign.",
        "prediction_type": kind.prediction,
    }
    return {"format": "pt", **{f"modelspec.{name}": value for name, value in fields.items() if value is not None}}
