"""Two real gloo processes against one with twice the batch; the wheel in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import torch
torch.set_num_threads(1)
from accelerate import Accelerator
from worlds import PairsInMemory, small_denoiser
from diffalign.data.loader import LoaderSettings, PairLoader, validation_batches
from diffalign.objectives.diffusion_dpo import DiffusionDPO
from diffalign.optimisation import OptimiserSettings
from diffalign.references import AdapterOff, Frozen
from diffalign.train import LoopSettings, Trainer
from pipelines.families import _lora

output, batch, lora = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[4] == "lora"
accelerator = Accelerator(cpu=True)
torch.manual_seed(3)
denoiser = small_denoiser()
if lora:
    _lora.attach(denoiser.network, rank=4, alpha=8, targets=("to_q", "to_v"), dropout=0.0, seed=1)
denoiser = denoiser.with_network(accelerator.prepare_model(denoiser.network))
pairs = PairsInMemory(12)
settings = LoaderSettings(batch_size=batch, seed=5)
output.mkdir(parents=True, exist_ok=True)
Trainer(
    objective=DiffusionDPO(beta=500), policy=denoiser, reference=AdapterOff(denoiser) if lora else Frozen(small_denoiser()),
    loader=PairLoader(pairs, range(10), settings, accelerator.process_index, accelerator.num_processes),
    validation=validation_batches(pairs, [10, 11], settings, 5), accelerator=accelerator, output=output,
    loop=LoopSettings(steps=5, validate_every=5, checkpoint_every=5), 
    optimiser=OptimiserSettings(learning_rate=1e-4), identity={},
).run()
print("processes", accelerator.num_processes)
"""


def run(tmp_path: Path, name: str, batch: int, processes: int, kind: str) -> tuple[list[dict], str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = (
        [sys.executable]
        if processes == 1
        else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    )
    words = [*launcher, str(script), str(tmp_path / name), str(batch), str(Path(__file__).parent), kind]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()], done.stdout


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_two_processes_give_the_curve_of_one_with_twice_the_batch(kind: str, tmp_path: Path) -> None:
    one, _ = run(tmp_path, "one", 4, 1, kind)
    two, said = run(tmp_path, "two", 2, 2, kind)
    assert "processes 2" in said
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "margin", "winner_drift", "accuracy"):
            assert b[name] == pytest.approx(a[name], abs=1e-5), (a["kind"], a["step"], name)
    assert abs(one[-1]["margin"]) > 1e-3  # something was learnt
    first, last = one[1], [r for r in one if r["kind"] == "train"][-1]
    assert first["gradient_norm"] == pytest.approx(two[1]["gradient_norm"], rel=1e-3)
    assert last["loss"] != first["loss"]
