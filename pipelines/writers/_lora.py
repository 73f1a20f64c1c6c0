"""LoRA (Hu et al. 2021, arXiv 2106.09685) on a language model, through PEFT, in PEFT's own file format.

``pipelines.families._lora`` does the same for the networks of Diffusers, whose adapters have another format.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffalign.errors import UserError
from pipelines import peft_layers
from pipelines.families._lora import ADAPTER, check_numbers
from pipelines.families._quiet import quietly
from pipelines.low_rank import Layers
from pipelines.writers._sources import ADAPTER_WEIGHTS

ALL_LINEAR = "all-linear"


def attach(model: nn.Module, *, rank: int, alpha: float, targets: str | Sequence[str] | None, dropout: float, seed: int) -> None:
    """Freeze ``model`` and add one trainable float32 adapter. The same seed gives the same adapter.

    Args:
        rank: rank of the adapter, at least 1.
        alpha: the adapter is scaled by alpha / rank; above 0.
        targets: ends of layers' names; ``all-linear`` for all but the output layer; None for PEFT's choice for the architecture,
            or all-linear where it has none.
        dropout: dropout probability in the adapter, in [0, 1).
        seed: random seed of the adapter's first weights.

    Raises:
        UserError: a number is out of range, or a target matches no layer.
    """
    with quietly():
        from peft import LoraConfig, inject_adapter_in_model

    chosen = _targets(model, targets)
    check_numbers(rank, alpha, dropout)
    _check_targets(model, chosen)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=chosen, lora_dropout=dropout, init_lora_weights=True, task_type="CAUSAL_LM"
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), quietly():  # PEFT warns of GPT-2's transposed layers and then treats them correctly
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # updates of 1e-5 would be lost in bfloat16


def _targets(model: nn.Module, targets: str | Sequence[str] | None) -> str | list[str]:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL

    if targets is None:
        targets = USUAL.get(model.config.model_type, ALL_LINEAR)
    if isinstance(targets, str):
        return targets
    return ALL_LINEAR if list(targets) == [ALL_LINEAR] else list(targets)


def _check_targets(model: nn.Module, targets: str | list[str]) -> None:
    if isinstance(targets, str):
        return  # all-linear, or a pattern of PEFT's
    if not targets:
        raise UserError("LoRA needs at least one target, the end of a layer's name (q_proj, say); got none.")
    layers = _layers(model)
    if missing := [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in layers)]:
        ends = sorted({name.rpartition(".")[2] for name in layers})
        raise UserError(
            f"LoRA target {', '.join(map(repr, missing))} matches no layer of {type(model).__name__}. "
            f"Names of its linear layers end in: {', '.join(ends)}; {ALL_LINEAR} takes them all."
        )


def _layers(model: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def layers_of(model: nn.Module) -> Layers:
    """The weights of the attached adapter by layer; empty if there is none."""
    return peft_layers.layers_of(model, "The adapter")


def config_of(model: nn.Module) -> Any:
    """PEFT's configuration of the attached adapter."""
    return copy.deepcopy(model.peft_config[ADAPTER])


def config_for(layers: Layers, model: nn.Module) -> Any:
    """PEFT's configuration of an adapter that consists of ``layers``."""
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, whose weight matrix is transposed

    modules = dict(model.named_modules())
    transposed = any(isinstance(getattr(modules[name], "base_layer", modules[name]), Conv1D) for name in layers)
    return peft_layers.config(layers, modules.keys(), task_type="CAUSAL_LM", fan_in_fan_out=transposed)


def write(layers: Layers, config: Any, folder: Path, base: str) -> None:
    """Write weights and configuration into ``folder`` as PEFT's ``save_pretrained`` does."""
    from safetensors.torch import save_file

    weights = {f"base_model.model.{name}": weight.contiguous() for name, weight in peft_layers.weights(layers).items()}
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config.base_model_name_or_path, config.inference_mode = base, True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # the same file every time
    config.save_pretrained(folder)


def described(model: nn.Module) -> str:
    """Rank, alpha and targets of the attached adapter, as JSON."""
    config = model.peft_config[ADAPTER]
    targets = config.target_modules
    where = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    return json.dumps({"rank": config.r, "alpha": config.lora_alpha, "targets": where})
