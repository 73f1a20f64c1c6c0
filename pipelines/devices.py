"""Distribution of a network over the processes of a run: a copy in each (DDP, ZeRO), or a shard in each (FSDP2).

Accelerate's configuration chooses (``accelerate launch --config_file``; ours are in ``recipes/accelerate``), or, under
``torchrun``, environment variables. Sharding is for full fine-tuning: weights, gradients and moments are sharded, and a
block's weights are gathered while it computes. The frozen copy that serves as reference is not sharded. DeepSpeed's ZeRO shards
moments and gradients (stages 1 and 2), and every process has the whole network.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin, convert_outputs_to_fp32
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diffalign.errors import UserError

_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"


def refuse_other_engines() -> None:
    """Raises UserError if Accelerate's configuration asks for an engine that training is not written for, or that is missing."""
    if _is_asked("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError(
            "Accelerate is set to Megatron-LM, which training is not written for. FSDP2 shares out weights, gradients and "
            "moments as well: accelerate launch --config_file $(diffalign devices fsdp2)."
        )
    if _is_asked(_DEEPSPEED) and importlib.util.find_spec("deepspeed") is None:
        raise UserError("Accelerate is set to DeepSpeed, which is not installed: pip install 'diffalign[deepspeed]'.")


def _is_asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def lacks_cuda() -> str:
    """A remark where a GPU may be there that PyTorch cannot use, as PyPI's wheels for Windows cannot; else nothing."""
    if sys.platform != "win32" or torch.accelerator.is_available() or torch.version.cuda is not None:
        return ""
    return "on the CPU: this PyTorch was built without CUDA, as PyPI's are for Windows; pytorch.org/get-started has one with it"


def forget_precision() -> None:
    """Reset Accelerate's precision, which it otherwise keeps for the whole life of a process, so that the next run in a notebook
    may have another. The state of the processes (rank, groups) stays."""
    AcceleratorState._reset_state()


def begin(accelerator: Accelerator) -> None:
    """Have weights sharded where that was asked for, on a CPU as well.

    Raises:
        UserError: in a way that is not done here.
    """
    if _is_asked("ACCELERATE_USE_FSDP") and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate shards on GPUs alone, and says nothing. PyTorch does it over gloo just as well.
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        for state in (PartialState(), accelerator.state):  # the second is refreshed from the first
            state.distributed_type = DistributedType.FSDP
    if accelerator.distributed_type == DistributedType.FSDP:
        _refuse_other_sharding(accelerator)
    if section := zero(accelerator):
        _refuse_other_zero(accelerator, section)


def zero(accelerator: Accelerator) -> dict[str, Any] | None:
    """The section ``zero_optimization`` of DeepSpeed's configuration, where ZeRO is in use; else None."""
    if not _is_asked(_DEEPSPEED):
        return None
    plugin = accelerator.state.deepspeed_plugin or DeepSpeedPlugin()  # on a CPU, Accelerate takes no notice of it
    return dict(plugin.deepspeed_config["zero_optimization"])


def _refuse_other_zero(accelerator: Accelerator, section: Mapping[str, Any]) -> None:
    if section["stage"] not in (1, 2):
        raise UserError(
            f"ZeRO is of stage 1 or 2 here, and Accelerate is set to {section['stage']}. FSDP2 shares out weights, too: "
            "accelerate launch --config_file $(diffalign devices fsdp2)."
        )
    if accelerator.mixed_precision == "fp16":
        raise UserError("compute.mixed_precision is fp16: with ZeRO networks are trained in bf16 or float32, so set bf16 or no.")


def _refuse_other_sharding(accelerator: Accelerator) -> None:
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise UserError(f"Sharding is FSDP2 here, and Accelerate is set to version {plugin.fsdp_version}: set fsdp_version to 2.")
    if plugin.activation_checkpointing:
        raise UserError("Leave fsdp_activation_checkpointing out: --gradient-checkpointing recomputes activations.")
    if accelerator.mixed_precision == "fp16":
        raise UserError("compute.mixed_precision is fp16: sharded weights are trained in bf16 or float32, so set bf16 or no.")


def is_sharding(accelerator: Accelerator) -> bool:
    """Whether weights are shared out among the processes."""
    return accelerator.is_fsdp2


def refuse_sharding(accelerator: Accelerator, what: str) -> None:
    """Raises UserError if weights or moments would be shared out. ``what`` cannot be: the beginning of a sentence."""
    if is_sharding(accelerator) or zero(accelerator):
        raise UserError(f"{what} cannot be sharded (FSDP2, ZeRO): leave the --config_file out, or take that for DDP.")


def wrapped(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """``network`` on the device, called in the precision asked for; gradients, if it has any, are averaged over processes, unless
    ``shard`` or ZeRO sees to that."""
    if zero(accelerator) is not None:
        return _under_autocast(network, accelerator)
    made = accelerator.prepare_model(network, evaluation_mode=is_sharding(accelerator))
    if isinstance(made, DistributedDataParallel):
        # Buffers never change here. Sent with each call they would bind processes that make different numbers of calls.
        made.broadcast_buffers = False
    return made


def _under_autocast(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """``network`` on the device, called in the precision asked for. Accelerate leaves precision to DeepSpeed, which would keep
    weights in it."""
    network.to(accelerator.device)
    if accelerator.mixed_precision == "bf16":
        in_half = torch.autocast(accelerator.device.type, dtype=torch.bfloat16)(network.forward)
        network.forward = convert_outputs_to_fp32(in_half)
    return network


@contextmanager
def products_in_tf32(asked: bool) -> Iterator[None]:
    """Within, PyTorch may round the factors of float32 products to TF32, if that is ``asked``; afterwards all is as it was.
    (cuDNN's convolutions round theirs anyway.)"""
    before = torch.get_float32_matmul_precision()
    if asked:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def slow_products(accelerator: Accelerator, tf32: bool) -> str | None:
    """A remark where the tensor cores of a GPU would lie idle: float32 is what a run without a recipe computes in."""
    if accelerator.device.type != "cuda" or accelerator.mixed_precision != "no" or tf32:
        return None
    return "float32 products do not use this GPU's tensor cores and take several times longer: --mixed-precision bf16, or --tf32."


def shard(network: nn.Module, accelerator: Accelerator) -> None:
    """Share the weights of a ``wrapped`` network out, in place. From here on each call of it is for all processes together.

    Blocks are those that the plugin names, or else the model's own. Shares are of the weights' dtype, float32; in bf16 they are
    gathered as such, while gradients are added up in float32 and inputs stay what they are: a noise level has no place in bf16.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = blocks(network)
    if accelerator.mixed_precision == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    network.to(memory_format=torch.contiguous_format)  # shares are rows of plain memory
    fsdp2_prepare_model(accelerator, network)
    # Averages and past policies take the weights' place between calls: what stayed gathered after a call would not notice.
    network.set_reshard_after_forward(True)


def blocks(network: Any) -> list[str]:
    """Classes of the blocks that are gathered at a time: those that Diffusers names for the model and that it has."""
    there = {type(module).__name__ for module in network.modules()}
    return [name for name in network._no_split_modules or network._repeated_blocks or () if name in there]


def gathered(network: Any) -> int:
    """How many of the weights of a ``shard``-ed network lie whole on a device at one time: what is in no block, which stays
    gathered through a call, and two blocks, because the next is gathered while one computes."""
    names, sizes = set(blocks(network)), Counter[nn.Module]()
    _add_to_blocks(network, network, names, sizes)
    outside = sizes.pop(network, 0)
    return outside + sum(sorted(sizes.values())[-2:])


def _add_to_blocks(module: nn.Module, block: nn.Module, names: set[str], sizes: Counter[nn.Module]) -> None:
    """Count the weights within ``module`` for the innermost block that they are in."""
    block = module if type(module).__name__ in names else block
    sizes[block] += sum(p.numel() for p in module.parameters(recurse=False))
    for child in module.children():
        _add_to_blocks(child, block, names, sizes)
