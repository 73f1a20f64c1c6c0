"""What a run will take, before it takes it: memory by counting on the meta device, time by counting operations.

Nothing is loaded: the network is built from its configuration without storage. Activations are counted by watching what
autograd keeps during one forward pass of one micro-batch; operations with PyTorch's FLOP counter; the machine's speed with a
short matrix product.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffalign.errors import UserError
from pipelines.config import TrainSettings

_BYTES = {"no": 4, "bf16": 2, "fp16": 2}
_EFFICIENCY = 0.5
"""Share of a large matrix product's speed that a whole step reaches; a rule of thumb."""


@dataclass(frozen=True)
class Estimate:
    """Bytes by part, and seconds of training; ``unknown`` says why there is no estimate."""

    bytes: dict[str, int]
    trainable: int
    seconds_per_step: float
    steps: int
    unknown: str | None = None

    def to_text(self) -> str:
        if self.unknown:
            return f"No estimate of memory and time: {self.unknown}"
        lines = [f"{self.steps} steps, {self.trainable / 1e6:.1f} M trainable parameters. Memory of training, roughly:"]
        lines += [f"  {name:28s} {size / 2**30:8.2f} GiB" for name, size in self.bytes.items()]
        lines.append(f"  {'together':28s} {sum(self.bytes.values()) / 2**30:8.2f} GiB")
        minutes = self.seconds_per_step * self.steps / 60
        lines.append(f"Time of training, roughly: {self.seconds_per_step:.2f} s a step, {minutes:.1f} min in all.")
        return "\n".join(lines)


def estimate(settings: TrainSettings) -> Estimate:
    """The estimate for a run; ``unknown`` is set where the model's configuration cannot be read without loading it."""
    steps = settings.loop.steps
    try:
        config, text_width, tokens = _read_configs(settings.model)
    except (UserError, OSError, KeyError) as error:
        return Estimate({}, 0, 0.0, steps, str(error))
    size = (settings.data.resolution // _vae_factor(settings.model)) if settings.data.resolution else config["sample_size"]
    net = _meta_network(settings, config)
    batch, precision = settings.batch.batch_size, _BYTES[settings.compute.mixed_precision]
    kept, flops = _forward_costs(net, (2 * batch, config["in_channels"], size, size), tokens, text_width)
    total = sum(p.numel() for p in net.parameters())
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    full = settings.adapter == "full"
    if settings.compute.gradient_checkpointing:
        kept //= 4
    parts = {
        "weights": total * (4 if full else precision),
        "reference": total * precision if full else 0,
        "gradients": trainable * 4,
        "optimizer": trainable * (2 if settings.optimiser.eight_bit else 8),
        "average of weights": trainable * 4 if settings.loop.ema_decay else 0,
        "activations": kept * precision // 4,
    }
    passes = 1 + 1 + (2 if full else 1.1)  # policy, reference, backward (LoRA: activation gradients, little else)
    seconds = flops * passes * settings.batch.accumulation / (_matmul_speed() * _EFFICIENCY)
    return Estimate(parts, trainable, seconds, steps)


def _read_configs(model: str) -> tuple[dict[str, Any], int, int]:
    """UNet configuration, text width and tokens of a Diffusers folder."""
    folder = _folder(model)
    config = json.loads((folder / "unet" / "config.json").read_text())
    text = json.loads((folder / "text_encoder" / "config.json").read_text())
    return config, config["cross_attention_dim"], text.get("max_position_embeddings", 77)


def _folder(model: str) -> Path:
    from pipelines.tiny.model import checkpoint_path

    folder = checkpoint_path() if model == "tiny" else Path(model)
    if not (folder / "unet" / "config.json").is_file():
        raise UserError(f"{model} is not a local Diffusers folder with a UNet, so its size is not known without loading it.")
    return folder


def _vae_factor(model: str) -> int:
    vae = json.loads((_folder(model) / "vae" / "config.json").read_text())
    return 2 ** (len(vae["block_out_channels"]) - 1)


def _meta_network(settings: TrainSettings, config: dict[str, Any]) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    with torch.device("meta"):
        net = UNet2DConditionModel.from_config(config)
        if settings.adapter == "lora":
            net.requires_grad_(False)
            net.add_adapter(
                LoraConfig(r=settings.lora.rank, lora_alpha=settings.lora.alpha, target_modules=list(settings.lora.targets))
            )
    return net


def _forward_costs(net: torch.nn.Module, shape: tuple[int, ...], tokens: int, width: int) -> tuple[int, int]:
    """Bytes that autograd keeps (as float32) and operations, of one forward pass."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[id(tensor.untyped_storage())] = tensor.numel() * tensor.element_size()
        return tensor

    x = torch.zeros(shape, device="meta")
    text = torch.zeros(shape[0], tokens, width, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), FlopCounterMode(display=False) as counter:
        net(x, torch.zeros(shape[0], dtype=torch.long, device="meta"), encoder_hidden_states=text)
    return sum(kept.values()), counter.get_total_flops()


def _matmul_speed(side: int = 1024, seconds: float = 0.2) -> float:
    """Operations per second of a float32 matrix product here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(side, side, device=device)
    a @ a
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        (a @ a)[0, 0].item()
        count += 1
    return 2 * side**3 * count / (time.perf_counter() - start)
