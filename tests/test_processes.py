"""Two real gloo processes against one with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from miniature import save_untrained, write_pairs
from test_data_cache import contents

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import torch
torch.set_num_threads(1)
from accelerate import Accelerator
from worlds import PairsInMemory, given, small_denoiser
from diffalign.data.loader import LoaderSettings, PairLoader, validation_batches
from diffalign.objectives.diffusion_dpo import DiffusionDPO
from diffalign.optimisation import OptimiserSettings
from diffalign.references import AdapterOff, Frozen
from diffalign.train import LoopSettings, Trainer
from pipelines.families import _lora

output, batch, lora = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[4] == "lora"
accelerator = Accelerator(cpu=True)
for dtype in (torch.float32, torch.float64):
    torch.manual_seed(3)
    denoiser = small_denoiser(dtype)
    if lora:
        _lora.attach(denoiser.network, rank=4, alpha=8, targets=("to_q", "to_v"), dropout=0.0, seed=1)
        denoiser.network.to(dtype)
    denoiser = denoiser.with_network(accelerator.prepare_model(denoiser.network))
    pairs = PairsInMemory(12, dtype=dtype)
    settings = LoaderSettings(batch_size=batch, seed=5)
    folder = output / str(dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    Trainer(
        learner=DiffusionDPO(beta=500).learner(given(
            denoiser, AdapterOff(denoiser) if lora else Frozen(small_denoiser(dtype)),
            PairLoader(pairs, range(10), settings, accelerator.process_index, accelerator.num_processes),
        )), policy=denoiser,
        validation=validation_batches(pairs, [10, 11], settings, 5), accelerator=accelerator, output=folder,
        loop=LoopSettings(steps=5, validate_every=5, checkpoint_every=5),
        optimiser=OptimiserSettings(learning_rate=2e-5), identity={},
    ).run()
if accelerator.is_main_process:  # two at once would print into each other
    print("processes", accelerator.num_processes)
"""


# The margin is β/2 = 250 times a difference of errors of order one; float32 predictions move it in the fifth digit.
METRICS = ("loss", "winner_drift", "accuracy", "margin")
TOLERANCES = {"float32": dict(zip(METRICS, (1e-5, 1e-5, 1e-5, 5e-5))), "float64": dict.fromkeys(METRICS, 1e-10)}


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def call(words: list[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run(tmp_path: Path, name: str, batch: int, processes: int, kind: str) -> str:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable] if processes == 1 else TORCHRUN
    return call([*launcher, str(script), str(tmp_path / name), str(batch), str(Path(__file__).parent), kind])


def curve(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_two_processes_give_the_curve_of_one_with_twice_the_batch(kind: str, tmp_path: Path) -> None:
    run(tmp_path, "one", 4, 1, kind)
    assert "processes 2" in run(tmp_path, "two", 2, 2, kind)
    for dtype, tolerances in TOLERANCES.items():
        one, two = curve(tmp_path / "one" / dtype), curve(tmp_path / "two" / dtype)
        assert [(r["kind"], r["step"]) for r in one] == [(r["kind"], r["step"]) for r in two]
        for a, b in zip(one, two, strict=True):
            for name, tolerance in tolerances.items():
                assert b[name] == pytest.approx(a[name], abs=tolerance), (dtype, a["kind"], a["step"], name)
        losses = [r["loss"] for r in one if r["kind"] == "train"]
        assert max(losses) - min(losses) > 5e-4  # something was learnt
        assert one[1]["gradient_norm"] == pytest.approx(two[1]["gradient_norm"], rel=1e-3)


def test_the_command_line_under_torchrun_is_one_run(tmp_path: Path) -> None:
    """Data, cache, kept errors, loop, export and comparison: the README's command for several processes, and its exit."""
    model, pairs = save_untrained(tmp_path / "model"), write_pairs(tmp_path / "data", 12)
    words = ["-m", "pipelines.cli", "train", "diffusion-dpo", "--model", str(model), "--pairs", str(pairs), "--steps", "2"]
    words += ["--accumulation", "2", "--validation-pairs", "2", "--learning-rate", "1e-3", "--beta", "500", "--quiet"]
    words += ["--reference-draws", "2"]
    compared = ["--prompts", "tiny", "--judges", "oracle", "--prompt-count", "2", "--sampling-steps", "1"]
    call([sys.executable, *words, "--batch-size", "2", "--output", str(tmp_path / "one")])
    said = call([*TORCHRUN, *words, "--batch-size", "1", "--output", str(tmp_path / "two"), *compared])
    assert said.count("pairs to train on") == 1  # one voice
    assert contents(tmp_path / "two" / "cache") == contents(tmp_path / "one" / "cache")  # each encoded a part of it
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert (one["kind"], one["step"]) == (two["kind"], two["step"])
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["prompts"] == 2
