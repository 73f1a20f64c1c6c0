"""Seconds and memory per pair of a Diffusion-DPO step: as the released scripts take it, against ours, a saving at a time.

    python benchmarks/step.py [--shape sd15] [--pixels 256] [--pairs 1] [--adapters lora full] [--rounds 5] [--json out.json]
    python benchmarks/step.py --profile "cached errors, bf16"       (where the time of one variant goes)

Variants run in alternation in one process; medians are reported, so the ratios hold even on a busy machine. Random weights.

    naive             what the released scripts do in every step: encode both pictures and the prompt, ask the policy and a
                      second, frozen network, and read numbers back to the host, one by one. Pictures are opened and transformed
                      one step ahead, as by a loader's workers. (Diffusers' LoRA script switches its adapter off in place of a
                      second network: as many operations, less memory.)
    cached            latents and prompts from the memory-mapped cache, read ahead by the loader; LoRA: the reference is the
                      policy with its adapter switched off; full: a frozen copy
    cached errors     the reference's errors are kept, too (--reference-draws): no reference is asked, and none is in memory
    ..., 4 at a time  four times as many pairs in the micro-batch: of ours, in the memory that the caches leave free
    ..., bf16         under autocast, with a base that is stored in bfloat16 (LoRA) or float32 weights (full); encoders and the
                      second network of the naive step are stored in bfloat16, too
                      Below a LoRA on a CPU, ours takes convolutions over few positions as matrix products (as training does)
    ..., compiled     torch.compile of the blocks on top (--compile)

All take the same pairs with the same objective and AdamW. What reads ahead would do so while other variants have their turn:
--in-a-row has each take several steps in a row and leaves the first out of account (on GPUs five, unless told otherwise).

Peak memory (--memory) is measured in a fresh process for each variant
(Linux: peak resident set; on CUDA: the allocator's peak). Also told: the floating-point operations of a step, and the share of
what the device reaches in plain matrix products of the same precision.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import SHAPES, build_pipeline, write_pairs
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BETA, RANK, ROWS = 2000.0, 8, 8


@dataclass(frozen=True)
class Variant:
    """One way to take a step."""

    name: str
    naive: bool = False
    kept: bool = False
    half: bool = False
    compiled: bool = False
    times: int = 1  # so many times the pairs in a step, in one micro-batch


VARIANTS = (
    Variant("naive", naive=True),
    Variant("cached"),
    Variant("cached errors", kept=True),
    Variant("cached errors, 4 at a time", kept=True, times=4),
    Variant("naive, bf16", naive=True, half=True),
    Variant("cached, bf16", half=True),
    Variant("cached errors, bf16", kept=True, half=True),
    Variant("cached errors, bf16, 4 at a time", kept=True, half=True, times=4),
)
SAME_BATCH = Variant("naive, 4 at a time", naive=True, times=4)
"""Only when it is named (--variants): what the batch alone is worth."""
COMPILED = (
    Variant("cached errors, compiled", kept=True, compiled=True),
    Variant("cached errors, bf16, compiled", kept=True, half=True, compiled=True),
)


class Halved(nn.Module):
    """A network under autocast, its answers in float32 again, as Accelerate wraps one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: Any, **more: Any) -> Any:
        with torch.autocast(DEVICE, torch.bfloat16):
            answer = self.module(*given, **more)
        answer.sample = answer.sample.float()
        return answer


class Policy:
    """A network that is trained, with its optimizer and its reference."""

    def __init__(self, adapter: str, variant: Variant, shape: str, share: Policy | None) -> None:
        from diffalign.optimisation import OptimizerSettings, build_optimizer
        from diffalign.references import AdapterOff
        from pipelines.families import stable_diffusion

        if share is not None:  # full fine-tuning: one network and one optimizer for all, there is no room for more
            self.family, self.optimizer, self.parameters = share.family, share.optimizer, share.parameters
        else:
            self.family = stable_diffusion.build(build_pipeline(shape))
            self.family.release_encoders()
            if DEVICE == "cpu" and adapter == "lora" and not variant.naive:
                self.family.use_products()
            if adapter == "lora":
                self.family.network.to(torch.bfloat16 if variant.half else torch.float32)
                self.family.attach_lora(rank=RANK)
            else:
                self.family.train_fully()
            self.family.network.to(DEVICE).train()
            if variant.compiled:
                self.family.compile_blocks()
            self.parameters = list(self.family.denoiser.trainable_parameters())
            self.optimizer = build_optimizer(self.parameters, OptimizerSettings())
        network = Halved(self.family.network) if variant.half else self.family.network
        self.denoiser = self.family.denoiser.with_network(network)
        self.reference = AdapterOff(self.denoiser) if adapter == "lora" else None


class Bench:
    """One data set, the models that its variants need, and their steps."""

    def __init__(self, shape: str, pixels: int, adapter: str, pairs: int, variants: tuple[Variant, ...], folder: Path) -> None:
        from diffalign.data.cache import build_cache
        from diffalign.data.cache_values import FillOptions
        from diffalign.data.open import open_pairs
        from diffalign.data.transform import Transform
        from diffalign.levels import Levels
        from diffalign.objectives.diffusion_dpo import DiffusionDPO
        from pipelines.families import stable_diffusion

        self.pairs, self.adapter, self.timer, self.levels = pairs, adapter, None, Levels()
        encoders = stable_diffusion.build(build_pipeline(shape))
        self.table = open_pairs(write_pairs(folder, pixels, ROWS))
        self.transform = Transform(pixels, "center", False, 0)
        encoders.encoder.work_on(DEVICE)
        self.cache = build_cache(self.table, encoders.encoder, folder / "cache", self.transform, FillOptions(batch_size=2))
        self.objective = DiffusionDPO(beta=BETA)
        self.encoders = {v.half: _in_half(encoders, v.half) for v in variants if v.naive}
        self.policies = self._policies(shape, variants)
        self.frozen = {v.half: self._frozen(shape, v) for v in variants if v.naive or (adapter == "full" and not v.kept)}
        self.losses = {v: self._losses(v) for v in variants}
        self.batches = {v: self._pictures(v) if v.naive else self._loader(v) for v in variants}

    def _policies(self, shape: str, variants: tuple[Variant, ...]) -> dict[Variant, Policy]:
        """A policy for every variant; those share one that compute with the same weights."""
        made: dict[Any, Policy] = {}
        found = {}
        for v in variants:
            weights = "all" if self.adapter == "full" else (v.half, v.naive, v.compiled)
            share = made.get(weights)
            found[v] = Policy(self.adapter, v, shape, share)
            made.setdefault(weights, found[v])
        return found

    def _frozen(self, shape: str, variant: Variant) -> Any:
        """The second network."""
        from pipelines.families import stable_diffusion

        network = build_pipeline(shape).unet.to(DEVICE, torch.bfloat16 if variant.half else torch.float32).requires_grad_(False)
        family = next(iter(self.policies.values())).family
        assert isinstance(family.denoiser, stable_diffusion.UNetDenoiser)
        return family.denoiser.with_network(network)

    def _losses(self, variant: Variant) -> Callable[[Any], Any]:
        """The objective at work."""
        from diffalign.learner import RunContext
        from diffalign.references import Cached, Frozen
        from diffalign.weights import TrainedWeights

        policy = self.policies[variant]
        start = Cached() if variant.kept else policy.reference or Frozen(self.frozen.get(variant.half))
        if variant.naive:
            start = Frozen(self.frozen[variant.half])
        given = RunContext(
            policy=policy.denoiser,
            weights=TrainedWeights(policy.family.network),
            start=start,
            latent_shape=self.cache.latent_shape,
            pairs=[],  # type: ignore[arg-type]  # the benchmark hands out the batches
            batch_size=self.pairs * variant.times,
            device=DEVICE,
        )
        return self.objective.learner(given).losses

    def _loader(self, variant: Variant) -> Iterator[Any]:
        """Our batches, without end. Errors are kept at one draw of each pair."""
        from diffalign.data.cached_errors import cache_errors
        from diffalign.data.draws import FixedDraws
        from diffalign.data.loader import LoaderSettings, PairLoader
        from diffalign.objectives._denoising import errors_beforehand
        from diffalign.references import AdapterOff, Frozen

        kept = None
        if variant.kept:
            denoiser = self.policies[variant].denoiser
            start = AdapterOff(denoiser) if self.adapter == "lora" else Frozen(denoiser)
            place = Path(self.cache._folder.root).parent / variant.name
            kept = cache_errors(
                self.cache,
                FixedDraws(1, 0, denoiser.schedule.levels()),
                lambda batch: errors_beforehand(batch.to(DEVICE), start, denoiser.schedule, "pairs"),
                place,
                {"variant": variant.name},
                batch_size=self.pairs,
            )
        settings = LoaderSettings(batch_size=self.pairs * variant.times)
        loader = PairLoader(self.cache, range(len(self.cache)), settings, cached_errors=kept, device=DEVICE)
        return (batches[0] for batches in loader.steps(0, 10**6))

    def _pictures(self, variant: Variant) -> Iterator[tuple[list[int], list[str], torch.Tensor]]:
        """Rows, their prompts and their pictures [2 B, 3, H, W], winners first; without end, one step ahead."""
        from diffalign.data.ahead import map_ahead
        from diffalign.data.transform import CENTER

        def opened(step: int) -> tuple[list[int], list[str], torch.Tensor]:
            count = self.pairs * variant.times
            rows = [(step * count + i) % len(self.table) for i in range(count)]
            pairs = [self.table[row] for row in rows]
            sides = [pair.side(side).open() for side in ("winner", "loser") for pair in pairs]
            pixels = torch.stack([self.transform.apply(picture, CENTER, flipped=False) for picture in sides])
            return rows, [pair.prompt for pair in pairs], pixels

        return map_ahead(opened, range(10**6), workers=1)

    # ------------------------------------------------------------------------------------------------------------ steps

    def step(self, variant: Variant) -> float:
        """Seconds of one optimizer step."""
        policy, started = self.policies[variant], time.perf_counter()
        with self.phase("wait for data"):
            batch = next(self.batches[variant])
        if variant.naive:
            with self.phase("encode"):
                batch = self._encoded(variant, *batch)
        with self.phase("policy and reference"):
            outcome = self.losses[variant](batch.to(DEVICE))
        with self.phase("backward"):
            outcome.loss.mean().backward()
        with self.phase("optimizer"):
            nn.utils.clip_grad_norm_(policy.parameters, 1.0)
            policy.optimizer.step()
            policy.optimizer.zero_grad()
        with self.phase("numbers"):
            _read(outcome, one_by_one=variant.naive)
        _settle()
        return time.perf_counter() - started

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Timed if somebody wants to know; then the device is waited for."""
        if self.timer is None:
            yield
            return
        _settle()
        started = time.perf_counter()
        yield
        _settle()
        self.timer[name] = time.perf_counter() - started

    def _encoded(self, variant: Variant, rows: list[int], prompts: list[str], pixels: torch.Tensor) -> Any:
        """Pictures and prompts through their encoders, inside the step."""
        from diffalign.data.draws import draw
        from diffalign.types import PairBatch

        encoder = self.encoders[variant.half]
        moments, text = encoder.encode_images(pixels.to(DEVICE)), encoder.encode_prompts(prompts)
        draws = [draw(0, row, self.cache.latent_shape, self.levels, 0.0, False) for row in rows]
        latents = moments["mean"] + moments["std"] * torch.randn_like(moments["mean"])
        winner, loser = latents.float().chunk(2)
        t, noise = torch.tensor([one.t for one in draws]), torch.stack([one.noise for one in draws])
        ones = torch.ones(len(rows))
        return PairBatch(winner, loser, text, t, noise, label=ones, weight=ones, index=torch.tensor(rows))

    def operations(self, variant: Variant) -> int:
        """Floating-point operations of a step of this variant."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            self.step(variant)
        return counter.get_total_flops()


def _in_half(family: Any, half: bool) -> Any:
    """The encoders in bfloat16, as scripts keep them beside a half-precision run; their answers in float32 again."""
    if not half:
        return family.encoder
    from pipelines.families import stable_diffusion

    pipe = build_pipeline(next(name for name, s in SHAPES.items() if s["text"] == family.network.config.cross_attention_dim))
    pipe.vae.to(torch.bfloat16)
    pipe.text_encoder.to(torch.bfloat16)
    encoder = stable_diffusion.build(pipe).encoder
    encoder.work_on(DEVICE)
    return encoder


def _read(outcome: Any, one_by_one: bool) -> None:
    """The step's numbers on the host: one transfer, or one for each of them as the scripts log."""
    columns = [outcome.loss.detach(), *outcome.metrics.values()]
    if one_by_one:
        for column in columns[:4]:
            column.mean().item()
        return
    torch.stack([column.double().mean() for column in columns]).tolist()


def _settle() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


# --------------------------------------------------------------------------------------------------------------- measuring


def measure(
    shape: str, pixels: int, adapter: str, pairs: int, rounds: int, variants: tuple[Variant, ...], in_a_row: int = 1
) -> dict[str, Any]:
    """Medians of all variants, run in alternation, and where the time goes."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(shape, pixels, adapter, pairs, variants, Path(folder))
        seconds: dict[str, list[float]] = {v.name: [] for v in variants}
        for round_ in range(rounds + 1):  # the first one warms up
            for v in variants:
                taken = [bench.step(v) / (pairs * v.times) for _ in range(in_a_row)]
                if round_:
                    seconds[v.name] += taken[1:] or taken
        phases, operations = {}, {}
        for v in variants:
            bench.timer = phases[v.name] = {}
            bench.step(v)
            bench.timer = None
            phases[v.name] = {phase: value / (pairs * v.times) for phase, value in phases[v.name].items()}
            operations[v.name] = None if v.compiled else bench.operations(v) / (pairs * v.times)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "shape": shape,
        "pixels": pixels,
        "adapter": adapter,
        "pairs_per_step": pairs,
        "seconds_per_pair": medians,
        "all_seconds": seconds,
        "times_naive": {name: medians["naive"] / value for name, value in medians.items()} if "naive" in medians else {},
        "phases": phases,
        "operations_per_pair": operations,
    }


def matrix_peak(dtype: torch.dtype, size: int = 2048, rounds: int = 8) -> float:
    """Floating-point operations per second of a plain matrix product. float32 on a GPU is TF32, as convolutions have it there."""
    size = 8192 if DEVICE == "cuda" else size
    torch.set_float32_matmul_precision("high" if DEVICE == "cuda" else "highest")
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(rounds):
        _settle()
        started = time.perf_counter()
        a @ b
        _settle()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def peak_memory(args: argparse.Namespace, adapter: str, variant: Variant) -> float:
    """Peak memory in MiB of two steps of one variant, in a process of its own."""
    words = [sys.executable, __file__, "--one", adapter, variant.name, "--shape", args.shape, "--pixels", str(args.pixels)]
    words += ["--pairs", str(args.pairs)]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])


def one(args: argparse.Namespace, adapter: str, variant: Variant) -> None:
    """What ``peak_memory`` runs: two steps, then the peak. What is encoded beforehand is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.shape, args.pixels, adapter, args.pairs, (variant,), Path(folder))
        gc.collect()
        _forget_peak()
        for _ in range(2):
            bench.step(variant)
        print(_peak())


def _forget_peak() -> None:
    """Start measuring now, not at the cache's filling."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if Path("/proc/self/status").exists():
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def profile(args: argparse.Namespace, adapter: str, variant: Variant) -> None:
    """Which operations take the time of one step."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.shape, args.pixels, adapter, args.pairs, (variant,), Path(folder))
        bench.step(variant)
        with torch.profiler.profile() as found:
            bench.step(variant)
    key = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60))


# --------------------------------------------------------------------------------------------------------------- reporting


def report(rows: list[dict[str, Any]], peaks: dict[str, float]) -> None:
    """A table, then the phases."""
    print(f"{'variant':30s} {'s per pair':>10s} {'naive /':>8s} {'TFLOP':>7s} {'of peak':>8s} {'peak MiB':>9s}")
    for r in rows:
        print(f"{r['shape']}, {r['pixels']} px, {r['adapter']}, {r['pairs_per_step']} pairs a step")
        for name, seconds in r["seconds_per_pair"].items():
            ratio, flops, memory = r["times_naive"].get(name), r["operations_per_pair"][name], r["peak_mib"].get(name)
            peak = peaks["bfloat16" if "bf16" in name else "float32"]
            cells = (
                f"{ratio:7.2f}x" if ratio else "",
                f"{flops / 1e12:7.2f}" if flops else "",
                f"{flops / seconds / peak:8.0%}" if flops else "",
                f"{memory:9.0f}" if memory else "",
            )
            print(f"  {name:28s} {seconds:10.3f} {cells[0]:>8s} {cells[1]:>7s} {cells[2]:>8s} {cells[3]:>9s}")
        for name, phases in r["phases"].items():
            parts = ", ".join(f"{phase} {value:.3f}" for phase, value in phases.items())
            print(f"  {name}, s per pair: {parts}")
    print(", ".join(f"{name}: {peak / 1e12:.2f} TFLOP/s in plain matrix products" for name, peak in peaks.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="sd15", choices=list(SHAPES))
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--adapters", nargs="+", default=["lora"], choices=["lora", "full"])
    parser.add_argument("--variants", nargs="+", default=None, metavar="NAME", help="only these")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--in-a-row", type=int, default=5 if DEVICE == "cuda" else 1)
    parser.add_argument("--compile", action="store_true", help="two more variants, with compiled blocks")
    parser.add_argument("--memory", action="store_true", help="also the peak memory, each in a process of its own")
    parser.add_argument("--profile", metavar="NAME", help="a variant, and nothing else")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("ADAPTER", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    known = {v.name: v for v in (*VARIANTS, SAME_BATCH, *COMPILED)}
    if args.one:
        one(args, args.one[0], known[args.one[1]])
        return
    if args.profile:
        profile(args, args.adapters[0], known[args.profile])
        return
    names = args.variants or [v.name for v in VARIANTS] + [v.name for v in COMPILED if args.compile]
    variants = tuple(known[name] for name in names)
    rows = []
    for adapter in args.adapters:
        row = measure(args.shape, args.pixels, adapter, args.pairs, args.rounds, variants, args.in_a_row)
        gc.collect()
        row["peak_mib"] = {v.name: peak_memory(args, adapter, v) for v in variants} if args.memory else {}
        rows.append(row)
    peaks = {str(dtype).removeprefix("torch."): matrix_peak(dtype) for dtype in (torch.float32, torch.bfloat16)}
    report(rows, peaks)
    if args.json:
        about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": _device_name(), "matrix_peak": peaks}
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


def _device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"


if __name__ == "__main__":
    main()
