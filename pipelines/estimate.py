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
from pipelines.families._unet import LORA_TARGETS
from pipelines.image_settings import TrainSettings
from pipelines.ingredients import samples_itself
from pipelines.prompts import held_out_prompts
from pipelines.run import PRECISIONS

_BYTES = {"no": 4, "bf16": 2, "fp16": 2}
_EFFICIENCY = 0.5
"""Share of a large matrix product's speed that a whole step reaches; a rule of thumb."""
_LIBRARIES = 2**30
_BUFFERS = 0.4
"""Torch and its friends, and what a step holds for a moment beside the activations, as a share of them; from the peaks of
SD1.5's LoRA runs at 256 pixels (6.4 GiB with 4 pairs, 9.9 with 8)."""


@dataclass(frozen=True)
class Estimate:
    """Bytes by part, and seconds of training and of the comparison at its end; ``unknown`` says why there is no estimate."""

    bytes: dict[str, int]
    trainable: int
    seconds_per_step: float
    seconds_comparing: float
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
        if self.seconds_comparing:
            lines.append(f"Time of the comparison with the base, roughly: {self.seconds_comparing / 60:.1f} min more.")
        return "\n".join(lines)


def estimate(settings: TrainSettings) -> Estimate:
    """The estimate for a run; ``unknown`` is set where the model's configuration cannot be read without loading it."""
    steps = settings.loop.steps
    try:
        config, text_width, tokens = _read_configs(settings.model)
    except (UserError, OSError, KeyError) as error:
        return Estimate({}, 0, 0.0, 0.0, steps, str(error))
    size = (settings.data.resolution // _vae_factor(settings.model)) if settings.data.resolution else config["sample_size"]
    net = _meta_network(settings, config)
    batch, precision = settings.batch.batch_size, _BYTES[settings.compute.mixed_precision]
    cost = settings.objective.cost_of_stored if settings.feedback else settings.objective.cost
    rows = int(cost.at_once * batch)  # with a gradient, at one time
    kept, flops = _forward_costs(net, (rows, config["in_channels"], size, size), tokens, text_width)
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
        "libraries and buffers": _LIBRARIES + int(_BUFFERS * kept * precision / 4),
    }
    backward = 2 if full else 1.1  # LoRA: activation gradients, little else
    pairs = settings.batch.accumulation * (1 if samples_itself(settings) else batch)
    passes = pairs * (cost.learning * (1 + backward) + cost.looking)
    seconds = flops / rows * passes / _speed(settings.compute.mixed_precision)
    return Estimate(parts, trainable, seconds, _seconds_comparing(settings, net, config, tokens, text_width), steps)


def _seconds_comparing(
    settings: TrainSettings, net: torch.nn.Module, config: dict[str, Any], tokens: int, text_width: int
) -> float:
    """Sampling by base and tuned model, in float32 and at the model's own size; judging is not counted."""
    e = settings.evaluation
    if not e.prompts:
        return 0.0
    side = config["sample_size"]
    _, flops = _forward_costs(net, (2, config["in_channels"], side, side), tokens, text_width)  # 2: guidance asks twice
    return 2 * len(held_out_prompts(e.prompts, e.prompt_count)) * e.sampling_steps * flops / _speed("no")


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
            targets = list(settings.lora.targets or LORA_TARGETS)
            net.add_adapter(LoraConfig(r=settings.lora.rank, lora_alpha=settings.lora.alpha, target_modules=targets))
    return net


def _forward_costs(net: torch.nn.Module, shape: tuple[int, ...], tokens: int, width: int) -> tuple[int, int]:
    """Bytes that autograd keeps (as float32) and operations, of one forward pass."""
    weights = {_storage(p) for p in net.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in weights:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.zeros(shape, device="meta")
    text = torch.zeros(shape[0], tokens, width, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), FlopCounterMode(display=False) as counter:
        net(x, torch.zeros(shape[0], dtype=torch.long, device="meta"), encoder_hidden_states=text)
    return sum(kept.values()), counter.get_total_flops()


def _storage(tensor: torch.Tensor) -> int:
    """Which memory a tensor or view lies in; on the meta device storages have no address, but are still told apart."""
    return tensor.untyped_storage()._cdata


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
