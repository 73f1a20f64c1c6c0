"""LoRA (Hu et al. 2021, arXiv 2106.09685) on any network, through PEFT.

The base weights stay where they are: an adapter adds two small matrices per layer and is switched off to get the base back.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from pipelines.families._encoding import digest_tensors
from pipelines.families._files import sort_header
from pipelines.families._names import LORA_FILE, METADATA, PEFT_FILE
from pipelines.families._quiet import quietly

ADAPTER = "default"
_LAYERS = "_layers_with_adapter"
"""Attribute of a network for the list that ``attach`` makes: the modules of a large network are not walked at every switch."""
_VARIANTS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
"""What would make another function of the same weights."""


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter that ``Family.save_adapter`` wrote."""

    folder: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    weights: Mapping[str, Tensor]  # by names inside the network, without the adapter's own name

    @property
    def digest(self) -> str:
        """sha256 over everything that decides what the adapter does."""
        return hashlib.sha256(f"{self.rank} {self.alpha} {digest_tensors(self.weights)}".encode()).hexdigest()


def attach(network: nn.Module, *, rank: int, alpha: float, targets: Sequence[str], dropout: float, seed: int) -> None:
    """Freeze ``network`` and add one trainable float32 adapter to the layers whose names end in one of ``targets``.

    The same seed gives the same adapter.

    Raises:
        UserError: a number out of range, or a target that matches no layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    check_numbers(rank, alpha, dropout)
    _check_targets(network, targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=dropout, init_lora_weights=True)
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), quietly():  # PEFT warns that int8 layers cannot be merged; they never are
        torch.default_generator.manual_seed(seed)
        add = getattr(network, "add_adapter", None)  # PixArt's transformer has none; what it does is this
        add(config, adapter_name=ADAPTER) if add else inject_adapter_in_model(config, network, ADAPTER)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # PEFT follows the base's dtype; updates of 1e-5 would be lost in bfloat16
    layers = _found(network)
    for layer in layers:
        layer._cast_input_dtype = MethodType(_cast_but_under_autocast, layer)
    setattr(network, _LAYERS, layers)


def _cast_but_under_autocast(layer: Any, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """PEFT brings what an adapter is given to float32, which autocast undoes at once: two copies of every layer's activations,
    and two of their gradients."""
    if x is not None and torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        return x
    return type(layer)._cast_input_dtype(layer, x, dtype)


def check_numbers(rank: int, alpha: float, dropout: float) -> None:
    """Raise UserError unless rank >= 1, alpha > 0 and 0 <= dropout < 1."""
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        got = f"rank {rank}, alpha {alpha}, dropout {dropout}"
        raise UserError(f"LoRA needs rank >= 1, alpha > 0 and 0 <= dropout < 1; got {got}.")


def _check_targets(network: nn.Module, targets: Sequence[str]) -> None:
    if not targets:
        raise UserError("LoRA needs at least one target, the end of a layer's name (to_q, say); got none.")
    adaptable = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in adaptable)]
    if missing:
        ends = sorted({_last_words(name) for name in adaptable})
        raise UserError(
            f"LoRA target {', '.join(map(repr, missing))} matches no layer of {type(network).__name__}. "
            f"Names of its linear and convolution layers end in: {', '.join(ends)}."
        )


def _last_words(name: str) -> str:
    """The last part of a dotted name, with the one before it where the last is only a number."""
    *front, last = name.split(".")
    return f"{front[-1]}.{last}" if last.isdigit() and front else last


@contextmanager
def switched_off(network: nn.Module) -> Iterator[None]:
    """Within: ``network`` (wrapped or not) computes without its adapter.

    One flag of each layer is turned, and nothing else: PEFT's own switch also freezes the weights, which compiled graphs would
    notice. A compiled block has two graphs, with the adapter and without, whatever is asked how often.

    Raises:
        ValueError: there is no adapter.
    """
    layers = _layers(network)
    if not layers:
        raise ValueError("the network carries no adapter that could be switched off")
    off_before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was_off in zip(layers, off_before, strict=True):
            layer._disable_adapters = was_off


def is_attached(network: nn.Module) -> bool:
    """Whether PEFT layers are inside ``network``."""
    return bool(_layers(network))


def _layers(network: nn.Module) -> tuple[Any, ...]:
    """The layers with an adapter: as ``attach`` found them, or, if others put it there, as they are found now."""
    bare = getattr(network, "module", network)  # of a wrapper (DDP)
    return getattr(bare, _LAYERS, None) or _found(network)


def _found(network: nn.Module) -> tuple[Any, ...]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return tuple(module for module in network.modules() if isinstance(module, BaseTunerLayer))


def detach(network: nn.Module) -> None:
    """Remove the adapter, whoever put it there: the layers are plain ones again."""
    from diffusers.utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(network)
    del network.peft_config
    vars(network).pop(_LAYERS, None)
    if hasattr(network, "_hf_peft_config_loaded"):  # Diffusers' mixin would refuse the next adapter
        network._hf_peft_config_loaded = False


def write(folder: Path, pipeline_class: type, part: str, network: nn.Module) -> None:
    """Write the adapter on ``network``, which the pipeline calls ``part``, into ``folder`` as ``LORA_FILE``, with its alpha.

    Where the pipeline has no loader for LoRA (PixArt), the adapter is also written as PEFT keeps one, so that plain
    ``PeftModel.from_pretrained(pipe.transformer, folder)`` reads it.
    """
    weights, config = for_diffusers(network)
    if loads_with_diffusers(pipeline_class):
        parts = {f"{part}_lora_layers": weights, f"{part}_lora_adapter_metadata": config}
        pipeline_class.save_lora_weights(folder, **parts)
        sort_header(folder / LORA_FILE)
        return
    from safetensors.torch import save_file

    named = {f"{part}.{name}": value for name, value in config.items()}
    kept = {"format": "pt", METADATA: json.dumps(named, indent=2, sort_keys=True)}
    save_file({f"{part}.{name}": weight for name, weight in weights.items()}, folder / LORA_FILE, kept)
    sort_header(folder / LORA_FILE)
    write_as_peft(folder, weights, network.peft_config[ADAPTER])


def loads_with_diffusers(pipeline_class: type) -> bool:
    """Whether pipelines of this class have a loader for LoRA."""
    return hasattr(pipeline_class, "load_lora_weights")


def write_as_peft(folder: Path, weights: Mapping[str, Tensor], config: Any) -> None:
    """The adapter as PEFT keeps one; ``weights`` are by names inside the network, ``config`` is a ``LoraConfig``."""
    from safetensors.torch import save_file

    save_file({f"base_model.model.{name}": weight for name, weight in weights.items()}, folder / PEFT_FILE, {"format": "pt"})
    own = copy.deepcopy(config)
    own.target_modules = sorted(own.target_modules)
    own.save_pretrained(folder)


def put_on(pipe: Any, part: str, folder: str | Path) -> None:
    """Apply an adapter that ``write`` wrote to a pipeline, to sample with.

    Raises:
        UserError: there is none, or it does not fit.
    """
    if loads_with_diffusers(type(pipe)):
        pipe.load_lora_weights(folder, weight_name=LORA_FILE)
        return
    saved, network = read(folder), getattr(pipe, part)
    attach(network, rank=saved.rank, alpha=saved.alpha, targets=saved.targets, dropout=0.0, seed=0)
    parameters, dtype = dict(network.named_parameters()), next(network.parameters()).dtype
    for name, weight in as_state(network, saved).items():
        parameters[name].data = weight.to(parameters[name].device, dtype)  # all of one precision, as Diffusers' loaders do it


def for_diffusers(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and configuration as ``save_lora_weights`` wants them. Without the second, alpha would be lost on loading.

    Sets, of which PEFT makes the targets, are sorted: the same adapter is the same file in every process.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in state.items()}
    config = network.peft_config[ADAPTER].to_dict()
    return weights, {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


def read(folder: str | Path) -> SavedAdapter:
    """What ``Family.save_adapter`` wrote into ``folder``.

    Raises:
        UserError: there is no such file, or it is of a kind that training cannot go on from.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder).expanduser() / LORA_FILE
    if not path.is_file():
        raise UserError(f"There is no LoRA in {folder} (no {LORA_FILE}); a folder that `diffalign train` wrote has one.")
    try:
        with safe_open(path, framework="pt") as file:
            kept = (file.metadata() or {}).get(METADATA)
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    parts = {name.partition(".")[0] for name in tensors}
    if kept is None or len(parts) != 1:
        raise UserError(f"{path} does not say its rank, alpha and layers, or has several parts: diffalign did not write it.")
    config = {name.partition(".")[2]: value for name, value in json.loads(kept).items()}
    if odd := [name for name in _VARIANTS if config.get(name)]:
        raise UserError(f"{path} is a LoRA with {', '.join(odd)}, which training cannot go on from.")
    weights = {name.partition(".")[2]: value.float() for name, value in tensors.items()}
    return SavedAdapter(str(folder), config["r"], float(config["lora_alpha"]), tuple(sorted(config["target_modules"])), weights)


def as_state(network: nn.Module, saved: SavedAdapter) -> dict[str, Tensor]:
    """The weights of a saved adapter by the names of the parameters of the one that is attached.

    Raises:
        UserError: that one has another rank, another alpha, or other layers.
    """
    config = network.peft_config[ADAPTER]
    mine = {name: p for name, p in network.named_parameters() if f".{ADAPTER}." in name}
    bare = {name.replace(f".{ADAPTER}.", "."): name for name in mine}
    if (config.r, float(config.lora_alpha)) != (saved.rank, saved.alpha) or bare.keys() != saved.weights.keys():
        there = f"rank {saved.rank}, alpha {saved.alpha:g} and the targets {', '.join(saved.targets)}"
        here = f"rank {config.r}, alpha {config.lora_alpha:g} and the targets {', '.join(sorted(config.target_modules))}"
        options = f"--rank {saved.rank} --alpha {saved.alpha:g} --targets {','.join(saved.targets)}"
        raise UserError(f"The LoRA in {saved.folder} has {there}; this run's has {here}. Give this run {options}.")
    return {bare[name]: weight for name, weight in saved.weights.items()}
