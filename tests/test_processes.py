"""The command line with two real gloo processes, against one with twice the batch; and how they wait and fail together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launched import together
from miniature import save_untrained, write_pairs
from test_data_cache import contents
from threads import Process, in_threads

from diffalign.errors import StaleCacheError, UserError
from diffalign.processes import failing_together, main_process_first
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
    """Data, cache, cached errors, loop, export and comparison: the README's command for several processes, and its exit."""
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


# --------------------------------------------------------------------------------------------------------- waiting, failing


LONG = """
import os, time, torch
from datetime import timedelta
from accelerate import PartialState
from diffalign.processes import ManyProcesses, failing_together, main_process_first

everyone = ManyProcesses(PartialState(cpu=True, backend="gloo", timeout=timedelta(seconds=2)))
main_process_first(everyone, lambda: time.sleep(4 if everyone.rank == 0 else 0))
print(everyone.all_gather_object(everyone.rank), float(everyone.mean(torch.ones(1) * everyone.rank)))
try:
    with failing_together(everyone):
        if everyone.rank == 1:
            raise OSError("no space")
except Exception as error:
    print(type(error).__name__, error)
if everyone.rank == 1:
    os._exit(0)
everyone.all_gather_object(None)
"""


def test_processes_wait_long_for_one_that_works_and_not_for_one_that_has_ended() -> None:
    """Longer than the collectives of a step have patience, which is two seconds here."""
    (failed, waited, told), (_, other, _) = together([["-c", LONG]] * 2)
    assert waited == "[0, 1] 0.5\nUserError Process 1 failed with OSError: no space\n"
    assert other == "[0, 1] 0.5\nOSError no space\n"
    assert failed == 1 and "Process 0 waited for the others, and one of them has ended" in told


def test_a_failure_is_everybodys() -> None:
    """Of whichever process; nobody tries what the main one could not do."""
    tried = []

    def work(process: Process) -> list[str]:
        said = []
        for culprit in (0, 1):
            try:
                with failing_together(process):
                    if process.rank == culprit:
                        raise StaleCacheError(f"{culprit} says no")
            except UserError as error:
                said.append(f"{type(error).__name__}: {error}")
        with pytest.raises(UserError, match="full"):
            main_process_first(process, lambda: tried.append(process.rank) or _refused("full"))
        return said

    found = in_threads(2, work)
    assert found[0] == ["StaleCacheError: 0 says no", "UserError: 1 says no"]
    assert found[1] == ["UserError: 0 says no", "StaleCacheError: 1 says no"]
    assert tried == [0]


def _refused(why: str) -> None:
    raise UserError(why)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("inputs")
    model, pairs = save_untrained(folder / "model"), write_pairs(folder / "data", 6)
    words = ["-m", "pipelines.cli", "train", "diffusion-dpo", "--model", model, "--pairs", pairs, "--steps", "1"]
    return [*words, "--validation-pairs", "2", "--prompts", "none", "--quiet"]


def test_what_one_process_refuses_is_refused_by_all(training: list[object], tmp_path: Path) -> None:
    """An output folder on a disk of its own, before anything is loaded."""
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "thesis.txt").write_text("mine")
    for status, _, told in together([[*training, "--output", tmp_path / str(rank)] for rank in (0, 1)]):
        assert status == 2 and "holds files that are no run of diffalign" in told


@pytest.mark.parametrize(
    ("option", "what", "said"),
    [
        ("cache", "cache/thesis.txt", "exists and is not a cache of diffalign"),  # before it is filled
        ("output", "run/checkpoints", "checkpoint"),  # when a checkpoint is written
    ],
)
def test_what_the_main_process_cannot_write_ends_all(
    option: str, what: str, said: str, training: list[object], tmp_path: Path
) -> None:
    folder = (tmp_path / what).parent
    folder.mkdir()
    (tmp_path / what).write_text("mine")
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "config.yaml").write_text("")  # known as a run that has not got anywhere
    (one, _, why), (other, _, same) = together([[*training, "--output", tmp_path / "run", f"--{option}", folder]] * 2)
    assert one != 0 and other == 2 and said in why and said in same
