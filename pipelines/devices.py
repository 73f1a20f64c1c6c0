"""How a network is spread over the processes of a run: one copy each (DDP), or a share each (FSDP2).

Accelerate's configuration says which (``accelerate launch --config_file``; ours are in ``recipes/accelerate``), or the variables
that it stands for, under ``torchrun``. Sharding is for full fine-tuning: weights, gradients and moments are shared out, and what
a block needs is gathered while it computes. The frozen copy that training may compare with is not.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diffalign.errors import UserError

_OTHERS = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
"""Engines of Accelerate that the loop and its checkpoints are not written for."""


def refuse_other_engines() -> None:
    """Raises UserError if Accelerate's configuration asks for an engine that training is not written for."""
    for variable, name in _OTHERS.items():
        if _is_asked(variable):
            raise UserError(
                f"Accelerate is set to {name}, which training is not written for. FSDP2 shares out weights, gradients and "
                "moments as well: accelerate launch --config_file $(diffalign devices fsdp2)."
            )


def _is_asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


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
    """Raises UserError if weights would be shared out. ``what`` cannot be: the beginning of a sentence."""
    if is_sharding(accelerator):
        raise UserError(f"{what} cannot be sharded (FSDP2): leave the --config_file out, or take that for DDP.")


def wrapped(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """``network`` in the precision that was asked for, with gradients averaged over processes unless ``shard`` sees to it."""
    made = accelerator.prepare_model(network, evaluation_mode=is_sharding(accelerator))
    if isinstance(made, DistributedDataParallel):
        # Buffers never change here. Sent with each call they would bind processes that make different numbers of calls.
        made.broadcast_buffers = False
    return made


def shard(network: nn.Module, accelerator: Accelerator) -> None:
    """Share the weights of a ``wrapped`` network out, in place. From here on each call of it is for all processes together.

    Blocks are those that the plugin names, or else the model's own. Shares are of the weights' dtype, float32; in bf16 they are
    gathered as such, while gradients are added up in float32 and inputs stay what they are: a noise level has no place in bf16.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = _blocks(network)
    if accelerator.mixed_precision == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    network.to(memory_format=torch.contiguous_format)  # shares are rows of plain memory
    fsdp2_prepare_model(accelerator, network)
    # Averages and past policies take the weights' place between calls: what stayed gathered after a call would not notice.
    network.set_reshard_after_forward(True)


def _blocks(network: Any) -> list[str]:
    """Classes of the blocks that are gathered at a time: those that Diffusers names for the model and that it has."""
    there = {type(module).__name__ for module in network.modules()}
    return [name for name in network._no_split_modules or network._repeated_blocks or () if name in there]
