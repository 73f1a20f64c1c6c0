"""The command line with two real gloo processes, against one with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from miniature import save_untrained, write_pairs
from test_data_cache import contents

from pipelines import cli

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def call(words: list[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def curve(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_command_line_under_torchrun_is_one_run(tmp_path: Path) -> None:
    """Data, cache, kept errors, loop, export and comparison: the README's command for several processes, and its exit."""
    model, pairs = save_untrained(tmp_path / "model"), write_pairs(tmp_path / "data", 12)
    words = ["train", "diffusion-dpo", "--model", str(model), "--pairs", str(pairs), "--steps", "2"]
    words += ["--accumulation", "2", "--validation-pairs", "2", "--learning-rate", "1e-3", "--beta", "500", "--quiet"]
    words += ["--reference-draws", "2"]
    compared = ["--prompts", "tiny", "--judges", "oracle", "--prompt-count", "2", "--sampling-steps", "1"]
    assert cli.main([*words, "--batch-size", "2", "--output", str(tmp_path / "one")]) == 0
    said = call([*TORCHRUN, "-m", "pipelines.cli", *words, "--batch-size", "1", "--output", str(tmp_path / "two"), *compared])
    assert said.count("pairs to train on") == 1  # one voice
    assert contents(tmp_path / "two" / "cache") == contents(tmp_path / "one" / "cache")  # each encoded a part of it
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert (one["kind"], one["step"]) == (two["kind"], two["step"])
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["prompts"] == 2
