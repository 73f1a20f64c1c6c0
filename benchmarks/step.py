"""Seconds and memory per pair of a Diffusion-DPO step: (a) everything encoded in the loop against (b) cached encodings.

    python benchmarks/step.py [--shapes tiny quarter] [--pairs 4] [--rounds 5] [--json out.json]

Variants run in alternation in one process and medians are reported, so that the ratios hold even on a busy machine. Variant
(a) does per step what training scripts of the field do: decode and transform two pictures, run the autoencoder and the text
encoder, then policy and reference. Variant (b) is our loop: latents and prompt embeddings come from the memory-mapped cache.
Both use the same objective, the same draws and the same optimizer.

Peak memory is measured in a fresh process per variant (Linux: the peak resident set; on CUDA: the allocator's peak).
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SHAPES = {
    "tiny": {"channels": (48, 96, 112), "text": 128, "layers": 1, "pixels": 64, "vae": (24, 48, 64)},
    "quarter": {"channels": (80, 160, 320, 320), "text": 192, "layers": 2, "pixels": 256, "vae": (32, 64, 128, 128)},
}
"""``quarter`` is SD1.5's shape (four levels, two layers each, a factor of eight in the autoencoder) at a quarter of its width."""


def build_pipeline(shape: str) -> Any:
    """A Stable Diffusion pipeline of the given shape with random weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from pipelines.tiny import model

    s = SHAPES[shape]
    levels, vae_levels = len(s["channels"]), len(s["vae"])
    torch.manual_seed(0)
    tokenizer = model.build_tokenizer()
    text_encoder = _text_encoder(tokenizer, s["text"])
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * vae_levels,
        up_block_types=("UpDecoderBlock2D",) * vae_levels,
        block_out_channels=s["vae"],
        layers_per_block=2 if shape == "quarter" else 1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=s["pixels"],
    )
    unet = UNet2DConditionModel(
        sample_size=s["pixels"] // 2 ** (vae_levels - 1),
        block_out_channels=s["channels"],
        layers_per_block=s["layers"],
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        cross_attention_dim=s["text"],
        attention_head_dim=4 if shape == "tiny" else 8,
        norm_num_groups=16,
    )
    return model.assemble(tokenizer, text_encoder, vae, unet)


def _text_encoder(tokenizer: Any, width: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    end = tokenizer.eos_token_id
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=end, pad_token_id=end,
        )
    )  # fmt: skip


def write_pairs(folder: Path, pixels: int, count: int) -> Path:
    """A JSONL of pairs drawn from the tiny world, enlarged to the model's size."""
    import numpy as np

    from pipelines.tiny import scenes

    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        scene, caption = scenes.draw_captioned(rng)
        other, _ = scenes.draw_captioned(rng)
        for side, picture in (("w", scene), ("l", other)):
            scenes.render(picture).resize((pixels, pixels)).save(folder / f"{i}{side}.png")
        rows.append({"prompt": caption, "chosen": f"{i}w.png", "rejected": f"{i}l.png"})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


class Bench:
    """One model, one data set, and a step in two variants, with the time of each phase."""

    def __init__(self, shape: str, adapter: str, pairs: int, folder: Path) -> None:
        from diffalign.data.cache import build_cache
        from diffalign.data.open import open_pairs
        from diffalign.data.transform import Transform
        from diffalign.objectives.diffusion_dpo import DiffusionDPO
        from diffalign.optimisation import OptimiserSettings, build_optimizer
        from diffalign.references import AdapterOff, Frozen
        from pipelines.families import stable_diffusion

        self.pairs, self.phases = pairs, {}
        pipe = build_pipeline(shape)
        self.family = stable_diffusion.build(pipe)
        pixels = SHAPES[shape]["pixels"]
        self.table = open_pairs(write_pairs(folder, pixels, 2 * pairs))
        self.transform = Transform(pixels, "center", False, 0)
        self.cache = build_cache(self.table, self.family.encoder, folder / "cache", self.transform, batch_size=4, progress=False)
        if adapter == "lora":
            self.family.attach_lora(rank=8)
            self.reference = AdapterOff(self.family.denoiser)
        else:
            self.reference = Frozen(self.family.frozen_copy())
            self.family.train_fully()
        self.objective = DiffusionDPO(beta=2000)
        self.parameters = list(self.family.denoiser.trainable_parameters())
        self.optimizer = build_optimizer(self.parameters, OptimiserSettings())

    def phase(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start
        return result

    def encoded_now(self) -> Any:
        """(a) pictures and prompts through their encoders, inside the step."""
        from dataclasses import replace

        rows = range(self.pairs)
        pairs = self.phase("read", lambda: [self.table[i] for i in rows])
        pixels = self.phase("transform", lambda: self._pixels(pairs))
        moments = self.phase("autoencoder", lambda: self.family.encoder.encode_images(pixels))
        text = self.phase("text encoder", lambda: self.family.encoder.encode_prompts([p.prompt for p in pairs]))
        batch = self.phase("draws", lambda: self._cached_batch())
        winner, loser = moments["mean"].chunk(2)
        return replace(batch, winner=winner, loser=loser, conditioning=text)

    def _pixels(self, pairs: list[Any]) -> torch.Tensor:
        from diffalign.data.transform import CENTER

        sides = [[getattr(p, side) for p in pairs] for side in ("winner", "loser")]
        return torch.stack([self.transform.apply(image.open(), CENTER, flipped=False) for images in sides for image in images])

    def encoded_before(self) -> Any:
        """(b) the same from the cache."""
        return self.phase("read cache", self._cached_batch)

    def _cached_batch(self) -> Any:
        from diffalign.data.draws import draw
        from diffalign.data.loader import collate
        from diffalign.levels import Levels

        draws = [draw(0, p, self.cache.latent_shape, Levels(), 0.0, False) for p in range(self.pairs)]
        return collate(self.cache, range(self.pairs), draws, latent_mode=True)

    def step(self, make_batch: Callable[[], Any]) -> float:
        """Seconds of one optimizer step."""
        start = time.perf_counter()
        batch = make_batch()
        outcome = self.phase("policy and reference", lambda: self.objective(batch, self.family.denoiser, self.reference))
        self.phase("backward", lambda: outcome.loss.mean().backward())
        self.phase("optimizer", self._update)
        return time.perf_counter() - start

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()  # a benchmark's own step: it times what the loop does
        self.optimizer.zero_grad()


def measure(shape: str, adapter: str, pairs: int, rounds: int) -> dict[str, Any]:
    """Medians of both variants, run in alternation, and where the time goes."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(shape, adapter, pairs, Path(folder))
        variants = {"in the loop": bench.encoded_now, "cached": bench.encoded_before}
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        phases: dict[str, dict[str, list[float]]] = {name: {} for name in variants}
        for round_ in range(rounds + 1):  # the first one warms up
            for name, make_batch in variants.items():
                bench.phases = {}
                taken = bench.step(make_batch)
                if round_:
                    seconds[name].append(taken / pairs)
                    for phase, value in bench.phases.items():
                        phases[name].setdefault(phase, []).append(value / pairs)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "shape": shape,
        "adapter": adapter,
        "pairs_per_step": pairs,
        "seconds_per_pair": medians,
        "ratio": medians["in the loop"] / medians["cached"],
        "phases": {name: {p: statistics.median(v) for p, v in by.items()} for name, by in phases.items()},
    }


def peak_memory(shape: str, adapter: str, pairs: int, variant: str) -> float:
    """Peak memory in MiB of two steps of one variant, in a process of its own."""
    words = [sys.executable, __file__, "--one", shape, adapter, variant, "--pairs", str(pairs)]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])


def one(shape: str, adapter: str, variant: str, pairs: int) -> None:
    """What ``peak_memory`` runs: two steps, then the peak. The cached variant lets go of its encoders first, as a run does."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(shape, adapter, pairs, Path(folder))
        if variant == "cached":
            bench.family.release_encoders()
        gc.collect()
        _forget_peak()
        for _ in range(2):
            bench.step(bench.encoded_before if variant == "cached" else bench.encoded_now)
        print(_peak())


def _forget_peak() -> None:
    """Start measuring now, not at the cache's filling."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if Path("/proc/self/status").exists():
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def report(rows: list[dict[str, Any]]) -> None:
    """A table, then the phases."""
    print(f"{'shape':8s} {'adapter':8s} {'in the loop':>12s} {'cached':>12s} {'ratio':>7s} {'peak MiB':>18s}")
    for r in rows:
        s, m = r["seconds_per_pair"], r["peak_mib"]
        peaks = f"{m['in the loop']:.0f} -> {m['cached']:.0f}"
        print(
            f"{r['shape']:8s} {r['adapter']:8s} {s['in the loop'] * 1e3:9.1f} ms {s['cached'] * 1e3:9.1f} ms "
            f"{r['ratio']:6.2f}x {peaks:>18s}"
        )
    for r in rows:
        for variant, phases in r["phases"].items():
            parts = ", ".join(f"{name} {value * 1e3:.1f}" for name, value in phases.items())
            print(f"{r['shape']} {r['adapter']}, {variant}, ms per pair: {parts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--adapters", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("SHAPE", "ADAPTER", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(*args.one, args.pairs)
        return
    rows = []
    for shape in args.shapes:
        for adapter in args.adapters:
            row = measure(shape, adapter, args.pairs, args.rounds)
            row["peak_mib"] = {v: peak_memory(shape, adapter, args.pairs, v) for v in ("in the loop", "cached")}
            rows.append(row)
    report(rows)
    if args.json:
        args.json.write_text(
            json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
