"""Everything on a device that is not the CPU. There is no GPU where this is tested, so one is made (``other_device``): what would
stay on the CPU by mistake, or be made there, meets what was sent to the device, and that is an error.

It says nothing of speed, of a GPU's own kernels, or of waiting for it (that is counted in test_host_looks).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from family_runs import write_pairs
from miniatures import MINIATURES

from diffalign import objectives
from pipelines.tiny.model import pairs_path
from pipelines.training import align

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="the device is built by a C++ compiler"),
    pytest.mark.skipif(torch.accelerator.is_available(), reason="a process has one accelerator, and this machine has a real one"),
]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the device is built, or a copy of what an earlier session built of the same source."""
    folder, cache = tmp_path_factory.mktemp("other-device"), request.config.cache
    made_of = [(HERE / "other_device.cpp").read_text(), torch.__version__, sys.version, sys.executable, str(HERE)]
    name = hashlib.sha256("".join(made_of).encode()).hexdigest()[:16]
    kept = cache.mkdir("other-device") / name if cache else folder
    if kept.exists():
        shutil.copytree(kept, folder, dirs_exist_ok=True)
    yield folder
    if not kept.exists() and (folder / ".ninja_log").exists():
        aside = shutil.copytree(folder, kept.with_name(f"{name}.{os.getpid()}"))
        with contextlib.suppress(OSError):  # another process was first
            aside.rename(kept)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    pd.read_parquet(pairs_path()).head(24).to_parquet(path)
    return path


def there(built: Path, jobs: list[Any], folder: Path, *more: str) -> str:
    """What the jobs print, done on the other device in ``folder``; ``"mps"``: on one that lacks what MPS lacks."""
    words = [sys.executable, str(HERE / "other_device.py"), str(built), json.dumps(jobs), *more]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


def metrics(output: Path) -> pd.DataFrame:
    rows = pd.read_json(output / "metrics.jsonl", lines=True)
    return rows[rows.kind.isin(["train", "validation"])]


def test_the_device_is_one(built: Path, tmp_path: Path) -> None:
    """Or all that follows would show nothing: two devices are not mixed, and precision is mixed there as on a GPU."""
    code = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
from pathlib import Path; import torch, other_device; other_device.start(Path({str(built)!r}))
assert torch.accelerator.current_accelerator() == torch.device("other")
here, away = torch.ones(3, 3), torch.ones(3, 3, device="other")
for mix in (lambda: here + away, lambda: torch.cat([away, here]), lambda: away @ here, lambda: away.lerp_(here, 0.5),
            lambda: torch.nn.functional.conv2d(away[None, None], here[None, None])):
    try:
        mix()
    except RuntimeError as error:
        assert "device" in str(error), error
    else:
        raise SystemExit("devices were mixed")
with torch.autocast("other", torch.bfloat16):
    assert (away @ away).dtype == torch.bfloat16 and (away + away).dtype == torch.float32
assert ((away + 2.0 * torch.tensor(3.0))[torch.tensor([0, 2])] == 7).all() and (away.cpu() == here).all()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_judges_score_as_before_after_a_gradient_there(built: Path, tmp_path: Path) -> None:
    """A network that a gradient moves or leaves behind would no longer meet its pictures."""
    code = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
from pathlib import Path; import torch, other_device; other_device.start(Path({str(built)!r}))
import reward_models, towers
from reward_models import _clip, _heads, aesthetic
_clip.VIT_L_14, aesthetic.WIDTHS = towers.QUICK, (24, 16, 8, 8, 4, 1)
torch.save(towers.original(quick=True).state_dict(), "clip.pt")
heads = {{"aesthetic-v1": torch.nn.Linear(24, 1).state_dict(), "aesthetic-v2": {{}}}}
for i, number in enumerate(_heads.NUMBERS):
    layer = torch.nn.Linear(*aesthetic.WIDTHS[i : i + 2]).state_dict()
    heads["aesthetic-v2"] |= {{f"layers.{{number}}.{{kind}}": value for kind, value in layer.items()}}
options = {{"clip": {{"weights": "clip.pt"}}, "tiny-pickscore": {{}}}}
for name, head in heads.items():
    torch.save(head, name)
    options[name] = {{"weights": "clip.pt", "head": name}}
for name, how in options.items():
    judge = reward_models.load(name, **how)
    before = judge.score(towers.pictures(), "a red circle")
    pixels = torch.rand(1, 3, 96, 96, device="other", requires_grad=True)
    score = judge.differentiable_score(pixels, "a red circle")
    score.sum().backward()
    assert score.device == pixels.device and bool((pixels.grad.cpu() != 0).any()), name
    assert torch.equal(judge.score(towers.pictures(), "a red circle"), before), name
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_training_there_is_training_here(built: Path, pairs: Path, tmp_path: Path) -> None:
    """From pictures over a checkpoint to the comparison: the same numbers, but for the order of sums."""
    settings = {"batch_size": 2, "accumulation": 2, "steps": 2, "validation_pairs": 4, "checkpoint_every": 1}
    settings |= {"prompt_count": 2, "sampling_steps": 4}
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = ["train", "diffusion-dpo", "--recipe", "tiny", "--pairs", str(pairs), "--output", "there", "--quiet", *words]
    newest = tmp_path / "there" / "checkpoints" / "checkpoint-00000002"
    jobs = [[*command, "--prompts", "none"], {"remove": str(newest)}, [*command, "--resume"]]
    assert "resumed at step 1" in there(built, jobs, tmp_path, "mps")
    align("diffusion-dpo", recipe="tiny", pairs=str(pairs), output=tmp_path / "here", progress=False, **settings)
    numbers = ["loss", "winner_error", "gradient_norm"]
    one, other = (metrics(tmp_path / name)[["kind", "step", *numbers]] for name in ("here", "there"))
    pd.testing.assert_frame_equal(one, other, rtol=1e-4)
    assert (tmp_path / "there" / "evaluation" / "index.html").is_file()


@pytest.mark.slow
def test_every_objective_and_switch(built: Path, pairs: Path, tmp_path: Path) -> None:
    few = ["--recipe", "tiny", "--steps", "2", "--accumulation", "1", "--prompts", "none", "--quiet"]
    stored = [*few, "--pairs", str(pairs), "--cache", "cache", "--batch-size", "2", "--validation-pairs", "4"]
    jobs = []
    for name in objectives.names(of_prompts=False):
        jobs.append(["train", name, *(few if name in ("d3po", "ddpo") else stored), "--output", name])
    switches = {
        "bf16": ["--mixed-precision", "bf16"],
        "full": ["--adapter", "full"],
        "kept": ["--adapter", "full", "--reference-draws", "2", "--mixed-precision", "bf16"],
        "checked": ["--gradient-checkpointing", "true", "--ema-decay", "0.9"],
        "rounds": ["--round-every", "1", "--round-reference", "round"],
    }
    jobs += [["train", "diffusion-dpo", *stored, *more, "--output", name] for name, more in switches.items()]
    there(built, jobs, tmp_path, "mps")
    assert all((tmp_path / job[-1] / "config.yaml").is_file() for job in jobs)


@pytest.mark.slow
def test_every_family(built: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs")
    asked = [(family, name) for family in MINIATURES for name in ("diffusion-dpo", "d3po")]
    there(built, [{"family": family, "objective": name, "folder": str(tmp_path)} for family, name in asked], tmp_path)
    assert all((tmp_path / f"{family}-{name}".replace(" ", "-") / "config.yaml").is_file() for family, name in asked)


@pytest.mark.slow
def test_every_other_command(built: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red star\na blue circle\n")
    tiny, quick = ["--recipe", "tiny", "--steps", "2", "--quiet"], ["--steps", "4", "--max-rewrite-tokens", "24"]
    drawn = ["--generator", "tiny", "--judges", "oracle", "--embedding", "tiny", *quick]
    there(
        built,
        [
            ["generate", "--model", "tiny", "--prompts", "p.txt", "--out", "low", "--guidance-scale", "1.5"],
            ["generate", "--model", "tiny-flow", "--prompts", "p.txt", "--out", "high", "--offload"],
            ["score", "low", "high", "--judges", "tiny-pickscore,oracle,jpeg", "--out", "scores.csv"],
            ["rollout", "--model", "tiny", "--prompts", "p.txt", "--steps", "4", "--out", "round", "--judges", "tiny-pickscore"],
            ["train", "d3po", *tiny, "--feedback", "round", "--prompts", "none", "--output", "fed"],
            ["evaluate", "--base", "tiny", "--tuned", "fed", "--prompts", "p.txt", "--judges", "oracle", "--out", "report"],
            ["prompts", "sft", *tiny, "--output", "sft"],
            ["prompts", "build", "--prompts", "tiny", "--count", "4", "--writer", "sft", *drawn, "--out", "rewrites.parquet"],
            ["prompts", "train", *tiny, "--model", "sft", "--output", "sem"],
            ["prompts", "rewrite", "a small red star", "-n", "2", "--writer", "sem", "--embedding", "tiny"],
            ["prompts", "evaluate", "--prompts", "tiny", "--count", "4", "--writers", "sem=sem", *drawn, "--out", "judged"],
        ],
        tmp_path,
        "mps",
    )
    assert (tmp_path / "judged" / "evaluation.json").is_file()
