"""Moments and gradients shared out among processes by DeepSpeed: ZeRO, stages 1 and 2 (arXiv 1910.02054, Section 5).

Every process has the whole network, calls it itself, and updates its share of the weights, in float32. DeepSpeed keeps a share as
one flat tensor; what is saved is by parameter and whole, as one process would save it, so a run goes on with another number of
processes or another engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffalign.optimisation import OptimizerSettings, build_optimizer
from diffalign.sharding import is_main

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroUpdates:
    """``diffalign.updates.Updates`` by DeepSpeed."""

    def __init__(
        self,
        accelerator: Accelerator,
        network: nn.Module,
        parameters: Iterable[nn.Parameter],
        settings: OptimizerSettings,
        section: Mapping[str, Any],
    ) -> None:
        import deepspeed

        parameters = list(parameters)
        self.optimizer = build_optimizer(parameters, settings)
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)
        self._engine, *_ = deepspeed.initialize(
            model=accelerator.unwrap_model(network),
            optimizer=self.optimizer,
            config=_configuration(settings, section),
            dist_init_required=False,
        )
        self.saved = Moments(self._engine.optimizer, self.optimizer, parameters)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def clip_gradients(self) -> Tensor:
        norm = torch.as_tensor(self._engine.optimizer.scaled_global_norm())
        return torch.where(norm < 0, math.nan, norm)  # -1 is DeepSpeed's word for a gradient that is not finite

    def apply(self) -> None:
        self._engine.step()

    def weights_changed(self) -> None:
        self._engine.optimizer.refresh_fp32_params()


def _configuration(settings: OptimizerSettings, section: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's. The loop divides losses by the samples of a step itself, and says where a step ends."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": dict(section),
        "zero_allow_untested_optimizer": True,  # PyTorch's AdamW; it updates each element by itself
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }


class Moments:
    """AdamW's moments of all parameters, as one process has them; every process must call ``collect`` before they are saved."""

    copies_on_load = True

    def __init__(self, sharing: Any, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        self._sharing, self._optimizer, self._parameters = sharing, optimizer, parameters
        self._state: dict[int, dict[str, Tensor]] | None = None

    def collect(self) -> None:
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = [moments["step"] for moments in self._optimizer.state.values()]
        self._state = {}
        for number, parameter in enumerate(self._parameters if steps else ()):
            whole = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            if is_main():
                self._state[number] = {"step": steps[0].clone(), **{name: value.cpu() for name, value in whole.items()}}

    def state_dict(self) -> dict[str, Any]:
        if self._state is None:
            raise ValueError("shares of several processes are to be saved: all of them must call collect() first")
        state, self._state = self._state, None
        group = {name: value for name, value in self._optimizer.param_groups[0].items() if name != "params"}
        return {"state": state, "param_groups": [{**group, "params": list(range(len(self._parameters)))}]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Weights must have been loaded: DeepSpeed's own copy of them is renewed here."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self._sharing.refresh_fp32_params()
        (group,) = state["param_groups"]
        for mine in self._optimizer.param_groups:
            mine.update({name: value for name, value in group.items() if name != "params"})
        if not state["state"]:
            return
        for mine in self._optimizer.param_groups:
            for share in mine["params"]:
                step = state["state"][0]["step"].to(share.device if mine.get("fused") else "cpu", copy=True)
                self._optimizer.state[share] = {"step": step, **{name: torch.zeros_like(share) for name in MOMENTS}}
        self._sharing._lazy_init_hp_params_optimizer_state()  # or DeepSpeed learns of moments in its first step only
        for number, parameter in enumerate(self._parameters):
            for name in MOMENTS:
                safe_set_full_optimizer_state(parameter, state["state"][number][name], name)
