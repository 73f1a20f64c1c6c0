"""The same runs on one process and on several, copied to each (DDP) or shared out among them (FSDP2, ZeRO).

As a program under torchrun (``... spread.py OUTPUT BEGUN ENGINE=NAME;NAME...``): runs from their beginning, and from the
checkpoint of step 2 in BEGUN/NAME, which another number of processes has written. Beside each run lies ``asked-RANK.json``: what
a process was asked, counted at the network and at the judge.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from judged import CASES, Case, brightness, make_trainer
from torch import Tensor
from worlds import small_denoiser

from diffalign.errors import UserError
from diffalign.optimisation import OptimizerSettings
from diffalign.sharding import all_on_main
from diffalign.updates import AccelerateUpdates
from pipelines import devices, recipes

CHECKPOINT = "checkpoint-00000002"
CONFIGURED = {"fsdp": "fsdp2", "zero": "zero2"}
"""Engines with a configuration of their own. In one launch, they come after DDP, and one of them at most."""


def environment(name: str) -> dict[str, str]:
    """What ``accelerate launch`` tells its processes, given a shipped configuration."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = ["--config_file", str(recipes.path("accelerate", name)), "--num_processes", "2", "script.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    told = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {key: value for key, value in told.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


@dataclass(frozen=True)
class Run:
    """A run of four steps whose batches over all processes are the same for every number of them."""

    case: Case  # of one process
    by: str  # which of its numbers is divided by the number of processes
    lora: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def on(self, world: int) -> Case:
        return replace(self.case, **{self.by: getattr(self.case, self.by) // world})


def of(name: str, **changes: Any) -> Any:
    return replace(CASES[name].objective, **changes)


RUNS = {
    # One validation batch on one process, three or more on several: some of them have one more than others.
    "sft, extrapolated": Run(
        Case(of("sft"), batch=4),
        "batch",
        options={"loop": {"round_every": 3, "extrapolation": 0.3, "ema_decay": 0.9}, "draws": 3, "beforehand": True},
    ),
    "dpo with a lora": Run(Case(of("diffusion-dpo"), batch=1, accumulation=4), "accumulation", lora=True),
    # Of rounds and buffers, the checkpoint falls in the middle.
    "d3po": Run(Case(of("d3po", round_pairs=12), batch=4, accumulation=4), "accumulation"),
    "dro with a lora": Run(Case(of("diffusion-dro", walk_every=3, buffer=0), batch=4), "batch", lora=True),
    "seppo": Run(Case(of("seppo"), batch=4), "batch"),
    "dpo": Run(Case(of("diffusion-dpo"), batch=4), "batch", options={"loop": {"ema_decay": 0.9}}),
}


def tell(line: str) -> None:
    """In one piece: processes write to one place at the same time."""
    os.write(1, f"{line}\n".encode())


class Asked:
    """Counts what this process does."""

    def __init__(self) -> None:
        self.samples, self.judged = 0, []

    def of_network(self, network: torch.nn.Module, words: Sequence[Any], named: dict[str, Any]) -> None:
        self.samples += len(words[0])

    def judge(self, latents: Tensor, prompts: Sequence[int]) -> Tensor:
        found = brightness(latents, prompts)
        self.judged += [[int(prompt), float(value)] for prompt, value in zip(prompts, found[:, 0], strict=True)]
        return found


def run(name: str, folder: Path, accelerator: Accelerator, begun: Path | None = None, dtype: torch.dtype = torch.float64) -> None:
    """From the beginning, or from the checkpoint of step 2 in ``begun``."""
    asked, world, what = Asked(), accelerator.num_processes, RUNS[name]
    if begun is not None and accelerator.is_main_process:
        shutil.copytree(begun / "checkpoints" / CHECKPOINT, folder / "checkpoints" / CHECKPOINT)
    accelerator.wait_for_everyone()
    case = replace(what.on(world), judge=asked.judge)
    rate = 2e-4 if what.lora else 2e-5
    trainer = make_trainer(folder, case, lora=what.lora, dtype=dtype, accelerator=accelerator, learning_rate=rate, **what.options)
    if begun is not None:
        assert trainer.resume() and trainer.step == 2
    accelerator.unwrap_model(trainer._policy.network).register_forward_pre_hook(asked.of_network, with_kwargs=True)
    trainer.run()
    kind = type(trainer._policy.network).__name__
    found = {"samples": asked.samples, "judged": asked.judged, "network": kind, "bank": held_in_the_bank(trainer)}
    found["buffers of others"] = len(getattr(trainer._stateful.get("buffer"), "_ranks", ()))
    (folder / f"asked-{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.free_memory()  # it knows one sharded network at a time


def held_in_the_bank(trainer: Any) -> int:
    """Numbers that this process holds of past checkpoints."""
    bank = trainer._stateful.get("bank")
    return sum(value.numel() for stored in (bank._held if bank else ()) for value in (stored or {}).values())


def collected_states(accelerator: Accelerator) -> None:
    """Only the main process is given what all of them have."""
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = {"rank": rank, "values": torch.full((rank + 2,), float(rank))}
    found = all_on_main(mine)
    assert [one["rank"] for one in found] == (list(range(world)) if accelerator.is_main_process else [])
    assert all(torch.equal(one["values"], torch.full((k + 2,), float(k))) for k, one in enumerate(found))


def uneven_calls(accelerator: Accelerator) -> None:
    """Processes may call a network with buffers as often as each likes, if no gradient is asked for."""
    network = small_denoiser().network
    network.register_buffer("odd", torch.zeros(3))
    denoiser = small_denoiser().with_network(devices.wrapped(network, accelerator))
    x, t, text = torch.zeros(1, 4, 8, 8), torch.tensor([7]), {"encoder_hidden_states": torch.zeros(1, 7, 32)}
    with torch.no_grad():
        for _ in range(3 if accelerator.is_main_process else 1):
            denoiser(x, t, text)
    accelerator.backward(denoiser(x, t, text).square().mean())
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    tell(" ".join(["norms", *(str(float(n)) for n in accelerator.gather(norm.reshape(1)))]))
    accelerator.free_memory()


def unlike_checkpoints(accelerator: Accelerator, output: Path, begun: Path) -> None:
    """Machines with disks of their own: the first process finds a checkpoint, the others none, or one of another run."""
    name, rank = "dpo with a lora", accelerator.process_index
    for others in ("none", "another"):
        folder = output / f"{others}, seen by {rank}"
        if rank == 0 or others == "another":
            shutil.copytree(begun / "d3po" / "checkpoints" / CHECKPOINT, folder / "checkpoints" / CHECKPOINT)
        if rank and others == "another":
            note = folder / "checkpoints" / CHECKPOINT / "checkpoint.json"
            note.write_text(note.read_text().replace("clock", "watch"))
        complain(make_trainer(folder, RUNS[name].on(accelerator.num_processes), lora=True, accelerator=accelerator).resume)
        accelerator.free_memory()


def gradients_held(accelerator: Accelerator) -> None:
    """What a process has of a sharded gradient between two micro-batches: its share, and not all of it until the last."""
    denoiser = small_denoiser()
    network = devices.wrapped(denoiser.network.requires_grad_(True), accelerator)
    devices.shard(network, accelerator)
    updates = AccelerateUpdates(accelerator, network, network.parameters(), OptimizerSettings())
    x, t, text = torch.zeros(1, 4, 8, 8), torch.tensor([7]), {"encoder_hidden_states": torch.zeros(1, 7, 32)}
    with updates.accumulating(last=False):
        updates.backward(denoiser.with_network(network)(x, t, text).square().mean())
    shares = sum(p.grad.to_local().numel() for p in network.parameters() if p.grad is not None)
    whole = sum(p.numel() for p in network.parameters())
    tell(f"process {accelerator.process_index} holds shares of gradients: {shares / whole:.2f}")
    accelerator.free_memory()


def refusals(accelerator: Accelerator) -> None:
    """What sharding is asked for and is not done."""
    plugin = accelerator.state.fsdp_plugin
    for name, other in {"fsdp_version": 1, "activation_checkpointing": True}.items():
        before = getattr(plugin, name)
        setattr(plugin, name, other)
        complain(lambda: devices.begin(accelerator))
        setattr(plugin, name, before)
    complain(lambda: devices.refuse_sharding(accelerator, "A LoRA"))


def other_zero(accelerator: Accelerator) -> None:
    """What ZeRO is asked for and is not done."""
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = "3"
    complain(lambda: devices.begin(accelerator))
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = "2"
    complain(lambda: devices.refuse_sharding(accelerator, "A LoRA"))


def complain(act: Callable[[], None]) -> None:
    try:
        act()
    except UserError as error:
        tell(f"refused: {error}")


def main(output: Path, begun: Path, engines: Sequence[str]) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=60))])
    collected_states(accelerator)
    uneven_calls(accelerator)
    unlike_checkpoints(accelerator, output, begun)
    for engine, names in (words.split("=") for words in engines):
        if engine in CONFIGURED:
            os.environ.update(environment(CONFIGURED[engine]))
        devices.begin(accelerator)
        if engine == "fsdp":
            gradients_held(accelerator)
            if accelerator.is_main_process:
                refusals(accelerator)
        if engine == "zero" and accelerator.is_main_process:
            other_zero(accelerator)
        dtype = torch.float32 if engine == "zero" else torch.float64  # DeepSpeed keeps weights and moments in float32
        for name in names.split(";"):
            run(name, output / engine / name, accelerator, dtype=dtype)
            run(name, output / f"{engine}, resumed" / name, accelerator, begun / name, dtype)
    if accelerator.is_main_process:
        print("processes", accelerator.num_processes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
