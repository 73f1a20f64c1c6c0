"""Weak scaling of a Diffusion-DPO step over processes: seconds, bytes sent, and what they mean for 8 and 64 GPUs.

    python benchmarks/scaling.py [--processes 1 2 4] [--rounds 3] [--steps 6] [--json out.json]

Every process has as many pairs as one alone has. Numbers of processes take turns, each time started anew, and medians are
reported; what is timed is our own loop. On a CPU the processes compete for the cores, so their efficiency is told in two ways:
against one process, and against what the cores leave, where c cores take n/c times as long for n > c processes.

Bytes are counted, not estimated: at the dispatcher, where every collective passes with its tensors. Of a payload of S bytes a
ring has each of n processes send 2 S (n-1)/n for the sum of all (all_reduce), S (n-1)/n to gather or to scatter sums.

The model at the end takes what was counted (the gradients of a step, once; with FSDP2 also the weights, twice per micro-step) to
the parameters of SD1.5 and SDXL, and the FLOPs that PyTorch counts for them to seconds. The speeds that it takes are assumptions
and options, not measurements. Nothing overlaps (least) or all communication can hide behind the backward passes (most).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAYS = ("lora", "full", "sharded")
"""A LoRA and all weights by DDP, all weights by FSDP2."""
WARM_UP = 2  # steps that are not counted: DDP orders its buckets, FSDP2 plans its first one


# ------------------------------------------------------------------------------------------------------------- counting


class Sent(TorchDispatchMode):
    """Counts payloads of collectives in bytes, by kind, while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == "c10d":
            kind = operator._schema.name.removeprefix("c10d::").strip("_")
            sizes = [leaf.numel() * leaf.element_size() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            # Gathering and scattering name the whole and a share of it; the others name each tensor once.
            self.payload[kind] += max(sizes, default=0) if "gather" in kind or "scatter" in kind else sum(sizes)
        return operator(*args, **(kwargs or {}))


def on_the_wire(payload: dict[str, float], processes: int) -> float:
    """Bytes that each process sends by rings."""
    share = (processes - 1) / processes
    return sum(bytes_ * share * (2 if "allreduce" in kind else 1) for kind, bytes_ in payload.items())


# ------------------------------------------------------------------------------------------------------------- measuring


class RandomPairs:
    """Encoded pairs of noise."""

    def __init__(self, shape: tuple[int, ...], text: int, count: int = 64) -> None:
        g = torch.Generator().manual_seed(0)
        self.latent_shape, self.labels, self.weights = shape, [1.0] * count, [1.0] * count
        self._latents, self._text = torch.randn((count, 2, *shape), generator=g), torch.randn((count + 1, 77, text), generator=g)

    def __len__(self) -> int:
        return len(self.labels)

    def moments(self, index: int, side: str, flipped: bool) -> tuple[Tensor, Tensor]:
        mean = self._latents[index, int(side == "loser")]
        return mean, torch.full_like(mean, 0.1)

    def conditioning(self, index: int | None) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self._text[-1 if index is None else index]}


def work(way: str, shape: str, pairs: int, accumulation: int, steps: int) -> dict[str, Any]:
    """What one process of a launch does: some steps of our loop; seconds of each, and bytes of one more."""
    from accelerate import Accelerator
    from models import SHAPES, build_pipeline

    from diffalign.data.loader import LoaderSettings, PairLoader
    from diffalign.learner import RunContext
    from diffalign.objectives.diffusion_dpo import DiffusionDPO
    from diffalign.optimisation import OptimizerSettings
    from diffalign.processes import ManyProcesses
    from diffalign.references import AdapterOff, Frozen
    from diffalign.train import LoopSettings, Trainer
    from diffalign.weights import TrainedWeights
    from pipelines import devices
    from pipelines.families import stable_diffusion

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    devices.begin(accelerator)
    family = stable_diffusion.build(build_pipeline(shape))
    data = RandomPairs(family.latent_shape(SHAPES[shape]["pixels"]), SHAPES[shape]["text"])
    frozen = None
    if way == "lora":
        family.attach_lora(rank=16)
    else:
        frozen = family.frozen_copy()
        family.train_fully()
    family.network.to(accelerator.device).train()
    family.denoiser = family.denoiser.with_network(devices.wrapped(family.network, accelerator))
    if devices.is_sharding(accelerator):
        devices.shard(family.network, accelerator)
    start = AdapterOff(family.denoiser) if frozen is None else Frozen(frozen.with_network(frozen.network.to(accelerator.device)))
    weights, everyone = TrainedWeights(family.network), ManyProcesses(accelerator)
    visits = LoaderSettings(pairs, accumulation, prompt_dropout=0.0)
    given = RunContext(
        policy=family.denoiser,
        weights=weights,
        start=start,
        latent_shape=data.latent_shape,
        pairs=PairLoader(data, range(len(data)), visits, everyone.rank, everyone.world),
        processes=everyone,
    )
    seconds, sent, counted, last = [], Sent(), {}, steps + WARM_UP + 1

    def note(step: int, numbers: dict[str, float]) -> None:
        """Counting makes a step slower, so the last one is counted and the others are timed."""
        if step == last:
            counting.close()
            counted.update(sent.payload)
            return
        seconds.append(numbers["seconds"])
        if step == last - 1:
            counting.enter_context(sent)

    with tempfile.TemporaryDirectory() as folder, ExitStack() as counting:
        Trainer(
            DiffusionDPO(beta=2000).learner(given), family.denoiser, [], accelerator, Path(folder),
            LoopSettings(steps=last, checkpoint_every=0), OptimizerSettings(), {}, report=note, weights=weights,
        ).run()  # fmt: skip
    trained = sum(p.numel() for p in family.network.parameters() if p.requires_grad)
    return {
        "seconds": seconds[WARM_UP:],
        "payload": {k: n for k, n in counted.items() if n},
        "trained": trained,
        "world": everyone.world,
    }


def launch(way: str, processes: int, args: argparse.Namespace) -> dict[str, Any]:
    """The same in ``processes`` processes; what the first of them found."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    around = {**os.environ, "OMP_NUM_THREADS": "1", **(environment() if way == "sharded" else {})}
    sizes = [way, args.shape, args.pairs, args.accumulation, args.steps]
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        words = [sys.executable, *launcher, __file__, "--one", *sizes, found]
        done = subprocess.run([str(word) for word in words], env=around, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{way} on {processes}: {done.stderr[-3000:]}")
        return json.loads(found.read_text())


def environment() -> dict[str, str]:
    """What ``accelerate launch`` would tell its processes by the shipped configuration for FSDP2."""
    return {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the first table. Numbers of processes take turns."""
    rows, cores = [], len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    on_cpu = not torch.accelerator.is_available()
    for way in args.ways:
        worlds = [n for n in args.processes if n > 1 or way != "sharded"]  # one process has nothing to share out
        found: dict[int, list[dict[str, Any]]] = {n: [] for n in worlds}
        for _ in range(args.rounds):
            for n in worlds:
                found[n].append(launch(way, n, args))
        seconds = {n: statistics.median(s for one in found[n] for s in one["seconds"]) for n in worlds}
        base = seconds.get(1) or next((row["seconds"] for row in rows if row["way"] == "full" and row["processes"] == 1), None)
        for n in worlds:
            payload, last = found[n][-1]["payload"], found[n][-1]
            assert all(one["payload"] == payload for one in found[n]), "bytes are a function of the run"
            plain = base / seconds[n] if base else None
            rows.append({
                "way": way, "processes": n, "seconds": seconds[n], "trained": last["trained"], "payload": payload,
                "sent_per_process": on_the_wire(payload, n), "efficiency": plain,
                "efficiency_of_cores": plain * max(1.0, n / cores) if plain and on_cpu else None, "cores": cores,
            })  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Speeds:
    """Assumptions about a cluster."""

    tflops: float  # that a GPU sustains in training, 1e12 per second
    nvlink: float  # GB/s that a GPU sends inside its node
    between_nodes: float  # GB/s that a node sends to others, over all its adapters
    gpus_per_node: int


@dataclass(frozen=True)
class Work:
    """One model trained in one way."""

    name: str
    trained: int  # parameters
    forward: float  # FLOPs of one latent through the network
    sharded: bool = False

    @property
    def passes(self) -> int:
        """Forward passes' worth of a pair: two latents forward, back to activations, back to weights if all are trained, and two
        through the reference."""
        return 6 if self.name.endswith("LoRA") else 8

    def efficiency(self, gpus: int, pairs: int, accumulation: int, speeds: Speeds) -> dict[str, float]:
        """Of ``gpus`` against one, with ``pairs`` per micro-step each: if nothing overlaps, and if all that can does."""
        compute = accumulation * pairs * self.passes * self.forward / (speeds.tflops * 1e12)
        sent, share = 2 * 4 * self.trained, (gpus - 1) / gpus  # gradients in float32: there and back
        if self.sharded:  # gradients there, weights in bf16 forward and backward
            sent = 4 * self.trained + accumulation * 2 * 2 * self.trained
        bandwidth = speeds.nvlink if gpus <= speeds.gpus_per_node else min(speeds.nvlink, speeds.between_nodes)
        seconds = sent * share / (bandwidth * 1e9)
        backward = compute * (1 / 3 if self.passes == 6 else 1 / 2)
        behind = backward if self.sharded else backward / accumulation  # whole gradients are sent with the last micro-step's
        return {
            "sent_gb": sent * share / 1e9,
            "compute_seconds": compute,
            "communication_seconds": seconds,
            "least": compute / (compute + seconds),
            "most": compute / (compute + max(0.0, seconds - behind)),
        }


def networks() -> list[Work]:
    """SD1.5 at 512 pixels and SDXL at 1024, counted by PyTorch on networks without memory."""
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    crossed, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    configurations = {
        "SD1.5": ({"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}, {}),
        "SDXL": (
            {
                "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
                "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
                "down_block_types": (plain, crossed, crossed), "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
                "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
            },
            {"text_embeds": (1, 1280), "time_ids": (1, 6)},
        ),
    }  # fmt: skip
    found = []
    for name, (configuration, added) in configurations.items():
        with torch.device("meta"), torch.no_grad():
            net, counter = UNet2DConditionModel(**configuration), FlopCounterMode(display=False)
            side, width = configuration["sample_size"], configuration["cross_attention_dim"]
            more = {"added_cond_kwargs": {key: torch.empty(shape) for key, shape in added.items()}} if added else {}
            with counter:
                net(torch.empty(1, 4, side, side), torch.tensor(5), torch.empty(1, 77, width), **more)
        layers = [m for n, m in net.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
        lora = 16 * sum(m.in_features + m.out_features for m in layers)
        whole, flops = sum(p.numel() for p in net.parameters()), float(counter.get_total_flops())
        found += [Work(f"{name} LoRA", lora, flops), Work(f"{name} full", whole, flops)]
        found.append(Work(f"{name} full, FSDP2", whole, flops, sharded=True))
    return found


def modelled(args: argparse.Namespace, speeds: Speeds) -> list[dict[str, Any]]:
    """Rows of the second table."""
    rows = []
    for one in networks():
        for gpus in (8, 64):
            numbers = one.efficiency(gpus, args.model_pairs, args.model_accumulation, speeds)
            rows.append({"what": one.name, "gpus": gpus, "trained": one.trained, "forward_tflop": one.forward / 1e12, **numbers})
    return rows


# ------------------------------------------------------------------------------------------------------------- reporting


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def report(measured: list[dict[str, Any]], model: list[dict[str, Any]]) -> None:
    """Both tables."""
    if measured:
        print("| way | processes | s per step | parameters trained | sent per process and step | efficiency | of the cores' |")
        print("|---|---|---|---|---|---|---|")
    for r in measured:
        print(
            f"| {r['way']} | {r['processes']} | {r['seconds']:.3f} | {r['trained']:,} | {r['sent_per_process'] / 1e6:.3f} MB "
            f"| {_percent(r['efficiency'])} | {_percent(r['efficiency_of_cores'])} |"
        )
    print("\n| model of | GPUs | parameters trained | sent per GPU and step | computing | sending | efficiency |")
    print("|---|---|---|---|---|---|---|")
    for r in model:
        print(
            f"| {r['what']} | {r['gpus']} | {r['trained']:,} | {r['sent_gb']:.3f} GB | {r['compute_seconds']:.3f} s "
            f"| {r['communication_seconds'] * 1e3:.1f} ms | {r['least']:.1%} to {r['most']:.1%} |"
        )


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--shape", default="tiny", help="of benchmarks/step.py: tiny or quarter")
    parser.add_argument("--pairs", type=int, default=2, help="per process and micro-step")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="launches of every number of processes, in turn")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of a launch that are timed")
    parser.add_argument("--model-pairs", type=int, default=4, help="of the model: pairs per GPU and micro-step")
    parser.add_argument("--model-accumulation", type=int, default=1)
    parser.add_argument("--tflops", type=float, default=300.0, help="assumed: sustained by a GPU in bf16 training")
    parser.add_argument("--nvlink", type=float, default=300.0, help="assumed: GB/s a GPU sends inside its node")
    parser.add_argument("--between-nodes", type=float, default=200.0, help="assumed: GB/s a node sends, over all its adapters")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=6, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = parser().parse_args()
    if args.one:
        way, shape, *sizes, path = args.one
        found = work(way, shape, *map(int, sizes))
        if os.environ.get("RANK", "0") == "0":
            Path(path).write_text(json.dumps(found))
        return
    speeds = Speeds(args.tflops, args.nvlink, args.between_nodes, args.gpus_per_node)
    measured, model = measure(args), modelled(args, speeds)
    report(measured, model)
    if args.json:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        versions = {"torch": torch.__version__, "device": device}
        args.json.write_text(
            json.dumps({**versions, "measured": measured, "assumed": asdict(speeds), "model": model}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
