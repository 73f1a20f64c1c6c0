"""One run is the same run on any number of processes, by either engine; and goes on with another number or engine.

Real gloo processes: two here, one launch for all of it; four, every kind of run, bf16 and the command line under ``-m slow``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
import spread
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from judged import signs_are_of_rounding
from miniature import save_untrained, write_pairs
from PIL import Image
from spread import RUNS, environment

from diffalign.errors import UserError
from pipelines import cli, devices
from pipelines.ingredients import pairs_per_step
from pipelines.run import division, settings_of
from pipelines.training import align

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install 'diffalign[deepspeed]'")
HERE = Path(spread.__file__).parent
FEW = {"ddp": ("sft, extrapolated", "d3po", "dro with a lora", "seppo"), "fsdp": ("sft, extrapolated", "seppo")}
ALL = {"ddp": tuple(RUNS), "fsdp": tuple(name for name, run in RUNS.items() if not run.lora)}
"""Runs by engine. An adapter is not sharded."""


def torchrun(world: int, words: Iterable[object], environment: Mapping[str, str] | None = None) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    where = {"PYTHONFAULTHANDLER": "1"}  # or nobody learns where a process crashed: once, at random, one did
    around = {**os.environ, "OMP_NUM_THREADS": "1", **where, **(environment or {})}
    done = subprocess.run([*launcher, *map(str, words)], capture_output=True, text=True, env=around, timeout=900)
    assert done.returncode == 0, done.stderr[-12000:]
    return done.stdout


def spread_out(folder: Path, world: int, engines: Mapping[str, tuple[str, ...]], dtype: torch.dtype = torch.float64) -> str:
    """One process; several, from the beginning and on from it; and one on from several. What the several printed."""
    alone = Accelerator(cpu=True)
    for name in {name for names in engines.values() for name in names}:
        spread.run(name, folder / "one" / name, alone, dtype=dtype)
    asked_for = [f"{engine}={';'.join(names)}" for engine, names in engines.items()]
    said = torchrun(world, [HERE / "spread.py", folder, folder / "one", *asked_for])
    assert f"processes {world}" in said
    for engine, names in engines.items():
        for name in names:
            spread.run(name, folder / f"one, on from {engine}" / name, alone, folder / engine / name, dtype)
    return said


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, spread_out(folder, 2, FEW)


def curve(folder: Path) -> dict[tuple[str, int], dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(row["kind"], row["step"]): row for row in rows}


def asked(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("asked-*.json"))]


def check_same(one: dict, other: dict, tolerance: float = 1e-9) -> None:
    """All that is measured: losses, gradients' norms, validation."""
    for where, row in other.items():
        zero = "accuracy" if signs_are_of_rounding(row, max(1e-9, tolerance / 1000)) else ""
        for key in row.keys() - {"kind", "step", "bins", "advice", "seconds", "waiting", zero}:
            assert row[key] == pytest.approx(one[where][key], rel=tolerance, abs=tolerance), (where, key)


def check_whole(folder: Path, engine: str, name: str, tolerance: float = 1e-9) -> None:
    one, several = curve(folder / "one" / name), curve(folder / engine / name)
    assert one.keys() == several.keys()
    check_same(one, several, tolerance)
    assert len({row["loss"] for (kind, _), row in one.items() if kind == "train"}) > 1  # it is a curve
    assert {found["network"].startswith("FSDP") for found in asked(folder / engine / name)} == {engine == "fsdp"}


def check_resumed(folder: Path, how: str, name: str, tolerance: float = 1e-9) -> None:
    one, resumed = curve(folder / "one" / name), curve(folder / how / name)
    assert {step for kind, step in resumed if kind == "train"} == {3, 4}
    assert {step for kind, step in resumed if kind == "validation"} == {4} & {step for kind, step in one if kind == "validation"}
    check_same(one, resumed, tolerance)


def check_shared(folder: Path, engine: str, name: str) -> None:
    (one,), several = asked(folder / "one" / name), asked(folder / engine / name)
    assert sum(found["samples"] for found in several) == one["samples"]
    assert len({found["samples"] for found in several}) == 1  # as many each
    together = sorted(tuple(pair) for found in several for pair in found["judged"])
    assert together == [(prompt, pytest.approx(value, abs=1e-9)) for prompt, value in sorted(map(tuple, one["judged"]))]
    assert bool(together) == (name == "d3po") and len(set(together)) == len(together)


@pytest.mark.parametrize(("engine", "name"), [(engine, name) for engine, names in FEW.items() for name in names])
def test_two_processes_give_the_curve_of_one(engine: str, name: str, runs: tuple[Path, str]) -> None:
    """In float64, to its rounding."""
    check_whole(runs[0], engine, name)


@pytest.mark.parametrize("how", ["{}, resumed", "one, on from {}"])
@pytest.mark.parametrize(("engine", "name"), [(engine, name) for engine, names in FEW.items() for name in names])
def test_a_run_goes_on_with_another_number_of_processes(engine: str, name: str, how: str, runs: tuple[Path, str]) -> None:
    """The checkpoint of step 2, written by one process and read by two, or the other way; steps 3 and 4 are those of one."""
    check_resumed(runs[0], how.format(engine), name)


@pytest.mark.parametrize("name", ["d3po", "dro with a lora"])
def test_sampling_and_judging_are_shared_and_never_done_twice(name: str, runs: tuple[Path, str]) -> None:
    """Over both processes, the network sees as many samples as that of one does, and the judge the very same pictures."""
    check_shared(runs[0], "ddp", name)


@pytest.mark.parametrize("engine", FEW)
def test_a_past_checkpoint_is_held_once_by_all_processes_together(engine: str, runs: tuple[Path, str]) -> None:
    """By the first of copies, and in shares by those that have shares."""
    (one,), (first, second) = asked(runs[0] / "one" / "seppo"), asked(runs[0] / engine / "seppo")
    assert one["bank"] == first["bank"] + second["bank"] > 0
    assert (second["bank"] == 0) == (engine == "ddp") and first["bank"] > 0


def test_nobody_keeps_the_buffers_of_others(runs: tuple[Path, str]) -> None:
    """The process that saves is given them, and lets them go; that it has them all is what ``collected_states`` looks at."""
    assert [found["buffers of others"] for found in asked(runs[0] / "ddp" / "dro with a lora")] == [0, 0]


def test_processes_may_call_a_network_unequally_often(runs: tuple[Path, str]) -> None:
    """A buffer that were sent with each call would bind them; a step that follows has the same gradient on both."""
    (line, *_) = [line for line in runs[1].splitlines() if line.startswith("norms")]
    one, other = map(float, line.split()[1:])
    assert one == other > 0


def test_processes_that_see_other_checkpoints_do_not_go_on(runs: tuple[Path, str]) -> None:
    """All of them refuse: one that raised alone would leave the others waiting."""
    told = [line for line in runs[1].splitlines() if "do not see the same newest checkpoint" in line]
    by_rank = [line.split("by rank: ")[1].split(")")[0] for line in told]
    assert sorted(by_rank) == ["checkpoint-00000002, checkpoint-00000002"] * 2 + ["checkpoint-00000002, none"] * 2


def test_between_two_micro_batches_a_process_has_its_share_of_a_sharded_gradient(runs: tuple[Path, str]) -> None:
    """Left to the last micro-batch, each process would keep the whole gradient, which no number of them makes smaller."""
    assert sorted(line[-4:] for line in runs[1].splitlines() if "holds shares of gradients" in line) in (
        ["0.49", "0.51"],
        ["0.50"] * 2,
    )


@pytest.mark.parametrize(
    "said",
    [
        "Sharding is FSDP2 here, and Accelerate is set to version 1",
        "Leave fsdp_activation_checkpointing out: --gradient-checkpointing recomputes activations.",
        "A LoRA cannot be sharded (FSDP2, ZeRO): leave the --config_file out",
    ],
)
def test_other_sharding_is_refused(said: str, runs: tuple[Path, str]) -> None:
    assert said in " ".join(line for line in runs[1].splitlines() if line.startswith("refused:"))


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("ACCELERATE_USE_MEGATRON_LM", "set to Megatron-LM, which training is not written for. FSDP2 shares out"),
        ("ACCELERATE_USE_DEEPSPEED", "set to DeepSpeed, which is not installed: pip install 'diffalign\\[deepspeed\\]'"),
    ],
)
def test_other_engines_are_refused(variable: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(variable, "true")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=said):
        align("sft", recipe="tiny", output=tmp_path / "out", prompts="none", steps=1)
    assert not (tmp_path / "out").exists()


def test_the_shipped_configurations(capsys: pytest.CaptureFixture) -> None:
    """The command prints a path, and Accelerate takes from it what it should."""
    assert cli.main(["devices"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ddp", "fsdp2", "zero2"]
    assert cli.main(["devices", "fsdp2"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    assert cli.main(["devices", "fsdp"]) == 2
    assert "Did you mean 'fsdp2'?" in capsys.readouterr().err
    assert "ACCELERATE_USE_FSDP" not in environment("ddp")
    told = environment("fsdp2")
    deep = environment("zero2")
    assert (deep["ACCELERATE_USE_DEEPSPEED"], deep["ACCELERATE_DEEPSPEED_ZERO_STAGE"]) == ("true", "2")
    assert (told["ACCELERATE_USE_FSDP"], told["FSDP_VERSION"], told["FSDP_RESHARD_AFTER_FORWARD"]) == ("true", "2", "true")


@pytest.mark.parametrize(("name", "pairs"), [("sft", 3 * 2 * 4), ("d3po", 2 * 4)])
def test_what_must_stay_the_same_is_the_pairs_of_a_step(name: str, pairs: int) -> None:
    """Of what an objective samples, a batch counts transitions: twice as many of them are no substitute for a process."""
    own = {"pairs": "tiny"} if name == "sft" else {"train_prompts": "tiny", "reward": ("oracle",)}
    settings = settings_of(name, None, {"model": "tiny", "output": "o", "batch_size": 3, "accumulation": 2, **own})
    assert pairs_per_step(settings, 4) == pairs


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, {}),
        ({"loss": "ipo"}, {}),
        ({"buckets": True}, {"batch_size": 3}),
        ({"loss": "beta-dpo"}, {"batch_size, accumulation, processes": [3, 2, 4]}),
        ({"loss": "bco", "buckets": True}, {"batch_size, accumulation, processes": [3, 2, 4]}),
    ],
)
def test_the_division_of_a_step_must_stay_where_it_matters(options: dict, known: dict) -> None:
    given = {"pairs": "tiny", "model": "tiny", "output": "o", "batch_size": 3, "accumulation": 2, **options}
    settings = settings_of("diffusion-dpo", None, given)
    assert division(settings, 4, settings.data.buckets) == known


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_kind_of_run_by_both_engines(world: int, tmp_path: Path) -> None:
    spread_out(tmp_path, world, ALL)
    for engine, names in ALL.items():
        for name in names:
            check_whole(tmp_path, engine, name)
            for how in (f"{engine}, resumed", f"one, on from {engine}"):
                check_resumed(tmp_path, how, name)
    for name in ("d3po", "dro with a lora"):
        check_shared(tmp_path, "ddp", name)
    check_shared(tmp_path, "fsdp", "d3po")


COMMAND = ["-m", "pipelines.cli", "train", "diffusion-dpo", "--adapter", "full", "--steps", "4", "--checkpoint-every", "2"]
COMMAND += ["--validate-every", "2", "--validation-pairs", "3", "--learning-rate", "1e-4", "--beta", "500", "--ema-decay", "0.9"]
COMMAND += ["--prompts", "none", "--quiet", "--preview-every", "2", "--preview-prompts", "tiny", "--preview-steps", "2"]


ZERO = ("sft, extrapolated", "dpo", "d3po", "seppo")


@needs_deepspeed
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_zero_gives_the_curve_of_one_process(world: int, tmp_path: Path) -> None:
    """In float32, which is what DeepSpeed keeps: whole runs, runs on from a checkpoint of one, and one on from theirs."""
    said = spread_out(tmp_path, world, {"zero": ZERO[: 4 if world == 4 else 2]}, torch.float32)
    for name in ZERO[: 4 if world == 4 else 2]:
        check_whole(tmp_path, "zero", name, 2e-4)
        for how in ("zero, resumed", "one, on from zero"):
            check_resumed(tmp_path, how, name, 2e-4)
    refused = " ".join(line for line in said.splitlines() if line.startswith("refused:"))
    assert "ZeRO is of stage 1 or 2 here, and Accelerate is set to 3." in refused
    assert "A LoRA cannot be sharded (FSDP2, ZeRO)" in refused


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero2", marks=needs_deepspeed)])
def test_the_command_line_with_the_shipped_configuration(engine: str, tmp_path: Path) -> None:
    """Sharded on two and on four, its export, and on from any checkpoint: in float32, by 2e-5 as one process does it."""
    words = [*COMMAND, "--model", save_untrained(tmp_path / "model"), "--pairs", write_pairs(tmp_path / "data", 12)]
    sharded = environment(engine)

    def train(name: str, world: int, batch: int, *more: str) -> Path:
        asked_for = [*words, "--batch-size", batch, "--accumulation", "2", "--output", tmp_path / name, *more]
        torchrun(world, asked_for, sharded if world > 1 else None)
        return tmp_path / name

    def cut(name: str, source: str) -> None:
        shutil.copytree(tmp_path / source, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "checkpoint-00000004")

    one, two = train("one", 1, 4), train("two", 2, 2)
    cut("one on from two", "two")
    cut("four on from one", "one")
    runs = [one, two, train("one on from two", 1, 4, "--resume"), train("four on from one", 4, 1, "--resume")]
    nets = [UNet2DConditionModel.from_pretrained(run / "unet").state_dict() for run in runs]
    for run, net in zip(runs[1:], nets[1:], strict=True):
        assert curve(run).keys() == curve(one).keys()
        check_same(curve(one), curve(run), 2e-5)
        assert all((net[name] - value).abs().max() < 2e-5 for name, value in nets[0].items())
        shown, same = (np.asarray(Image.open(path / "previews" / "00000004.png"), dtype=int) for path in (run, one))
        assert np.abs(shown - same).max() <= 1  # an eighth bit, by rounding
    began = UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet").state_dict()
    assert max((nets[0][name] - value).abs().max() for name, value in began.items()) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero2", marks=needs_deepspeed)])
def test_sharded_weights_in_bf16(engine: str, tmp_path: Path) -> None:
    """Computed in bf16, kept and averaged in float32: near what autocast does with whole weights."""
    words = [*COMMAND, "--model", save_untrained(tmp_path / "model"), "--pairs", write_pairs(tmp_path / "data", 12)]
    words += ["--mixed-precision", "bf16", "--batch-size", "2", "--output"]
    torchrun(2, [*words, tmp_path / "whole"])
    torchrun(2, [*words, tmp_path / "sharded"], environment(engine))
    whole, sharded = curve(tmp_path / "whole"), curve(tmp_path / "sharded")
    assert whole.keys() == sharded.keys()
    for where, row in whole.items():
        assert sharded[where]["winner_error"] == pytest.approx(row["winner_error"], rel=1e-3), where
    kept = torch.load(tmp_path / "sharded" / "checkpoints" / "checkpoint-00000004" / "weights.pt", weights_only=True)
    assert {value.dtype for value in kept.values()} == {torch.float32}


# ------------------------------------------------------------------------------------------------------- one process


def test_zeros_network_computes_in_the_precision_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate puts no network under autocast that DeepSpeed has; it would be trained in float32, and its reference in bf16."""
    monkeypatch.setattr(devices, "zero", lambda accelerator: {"stage": 2})
    for precision, dtype in (("bf16", torch.bfloat16), ("no", torch.float32)):
        AcceleratorState._reset_state()
        network, seen = torch.nn.Linear(4, 4), []
        network.register_forward_hook(lambda module, given, answer, seen=seen: seen.append(answer.dtype))
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        accelerator.native_amp = False  # as it is where DeepSpeed is at work on GPUs
        wrapped = devices.wrapped(Doubled(network), accelerator)
        assert wrapped(torch.ones(1, 4)).dtype == torch.float32 and seen == [dtype]
    AcceleratorState._reset_state()


class Doubled(torch.nn.Module):
    """A network with a layer."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(x)


class Block(torch.nn.Module):
    """Weights of its own, and other blocks."""

    def __init__(self, own: int, *inner: torch.nn.Module) -> None:
        super().__init__()
        self.own, self.inner = torch.nn.Parameter(torch.zeros(own)), torch.nn.ModuleList(inner)


class Inner(Block):
    """A block within blocks."""


def test_what_is_gathered_at_a_time_is_counted() -> None:
    """By hand: 5 outside, and the largest two of 100, 20 and the 30 of a block around the 100."""
    network = torch.nn.Module()
    network.outside, network.one, network.two = torch.nn.Linear(4, 1), Block(30, Inner(100)), Inner(20)
    network._no_split_modules, network._repeated_blocks = ["Block", "Inner", "Elsewhere"], None
    assert devices.blocks(network) == ["Block", "Inner"]
    assert devices.gathered(network) == 5 + 100 + 30
