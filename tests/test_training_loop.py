"""The loop: exact resume, equal numbers however a batch is cut, and what happens when things go wrong."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from worlds import PairsInMemory, given, small_denoiser

from diffalign import checkpoint
from diffalign.data.loader import LoaderSettings, PairLoader, validation_batches
from diffalign.errors import NonFiniteLossError, UserError
from diffalign.learner import Learner
from diffalign.objectives.diffusion_dpo import DiffusionDPO
from diffalign.optimisation import Ema, OptimiserSettings, learning_rate_factor
from diffalign.references import AdapterOff, Frozen
from diffalign.train import LoopSettings, Trainer
from pipelines.families import _lora

PAIRS = PairsInMemory(12)


def make_trainer(
    output: Path,
    *,
    steps: int = 4,
    lora: bool = True,
    batch: int = 2,
    accumulation: int = 1,
    ema: float = 0.0,
    dropout: float = 0.0,
    identity: dict | None = None,
    dtype: torch.dtype = torch.float32,
    validation: bool = False,
    objective: Any = None,
    wrap: Callable[[Learner], Learner] | None = None,
    report: Callable = lambda step, numbers: None,
    **loop,
) -> Trainer:
    """A trainer on the small UNet; everything about it is a function of the arguments."""
    torch.manual_seed(3)
    denoiser = small_denoiser(dtype)
    if lora:
        _lora.attach(denoiser.network, rank=4, alpha=8, targets=("to_q", "to_v"), dropout=dropout, seed=1)
        reference = AdapterOff(denoiser)
    else:
        reference = Frozen(small_denoiser(dtype))
    denoiser.network.train()
    pairs = PairsInMemory(12, dtype=dtype)
    settings = LoaderSettings(batch_size=batch, accumulation=accumulation, seed=5)
    output.mkdir(parents=True, exist_ok=True)
    loader = PairLoader(pairs, range(10), settings)
    learner = (objective or DiffusionDPO(beta=500)).learner(given(denoiser, reference, loader, batch_size=batch))
    return Trainer(
        learner=learner if wrap is None else wrap(learner),
        policy=denoiser,
        validation=validation_batches(pairs, [10, 11], settings, 5) if validation else [],
        accelerator=Accelerator(cpu=True),
        output=output,
        loop=LoopSettings(**{"steps": steps, "checkpoint_every": 2, "validate_every": 2, "ema_decay": ema, **loop}),
        optimiser=OptimiserSettings(learning_rate=1e-3, warmup_steps=2, schedule="cosine"),
        identity=identity or {"reference": "small"},
        report=report,
    )


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer._policy.network.named_parameters() if p.requires_grad}


def lines(folder: Path, kind: str = "train") -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if r["kind"] == kind]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_four_steps_are_bitwise_two_and_a_kill_and_two(lora: bool, tmp_path: Path) -> None:
    options = {"lora": lora, "ema": 0.9, "dropout": 0.2 if lora else 0.0, "validation": True}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.run()

    def kill(step: int, numbers: dict) -> None:
        if step == 3:  # the checkpoint of step 2 is on disk, step 3 is lost
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        make_trainer(tmp_path / "cut", report=kill, **options).run()
    torch.manual_seed(999)
    resumed = make_trainer(tmp_path / "cut", **options)
    assert resumed.resume() and resumed.step == 2
    resumed.run()
    assert equal(weights(whole), weights(resumed))
    assert all(torch.equal(a, b) for a, b in zip(whole.ema._average, resumed.ema._average, strict=True))
    for kind in ("train", "validation"):
        one, other = (lines(tmp_path / d, kind) for d in ("whole", "cut"))
        assert [{k: v for k, v in r.items() if k != "seconds"} for r in one] == [
            {k: v for k, v in r.items() if k != "seconds"} for r in other
        ]
    first, last = (
        torch.load(tmp_path / d / "checkpoints" / "checkpoint-00000004" / "optimizer.pt", weights_only=True)
        for d in ("whole", "cut")
    )
    assert all(torch.equal(first["state"][k]["exp_avg"], last["state"][k]["exp_avg"]) for k in first["state"])


def test_training_did_something_and_a_fresh_run_is_another(tmp_path: Path) -> None:
    """Guards the test above: equal weights would mean little if nothing moved."""
    before = weights(make_trainer(tmp_path / "a"))
    trainer = make_trainer(tmp_path / "b")
    trainer.run()
    assert not equal(before, weights(trainer))


def test_the_optimizer_goes_on_with_the_tensors_that_were_restored(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=2).run()
    trainer = make_trainer(tmp_path, steps=4, identity={"reference": "small"})
    trainer.resume()
    held = {id(p) for group in trainer._updates.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer._policy.trainable_parameters()}


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_batch_of_four_is_four_batches_of_one(lora: bool, tmp_path: Path) -> None:
    runs = {}
    for name, batch, accumulation in (("whole", 4, 1), ("cut", 1, 4), ("half", 2, 2)):
        trainer = make_trainer(tmp_path / name, batch=batch, accumulation=accumulation, lora=lora, dtype=torch.float64, steps=3)
        trainer.run()
        rows = lines(tmp_path / name)
        norms = [r["gradient_norm"] for r in rows if r["kind"] == "train"]  # AdamW would hide a factor
        runs[name] = ([r["loss"] for r in rows] + norms, weights(trainer))
    for name in ("cut", "half"):
        assert runs[name][0] == pytest.approx(runs["whole"][0], rel=1e-7 if lora else 1e-9)
        for key, value in runs["whole"][1].items():  # LoRA is float32 even on a float64 base
            torch.testing.assert_close(runs[name][1][key], value, rtol=1e-5, atol=5e-6 if lora else 1e-8)


def test_a_weight_scales_the_loss_of_its_pair(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, steps=1)
    trainer._learner.source._pairs.weights = [0.5] * 12
    trainer.run()
    assert lines(tmp_path)[0]["loss"] == pytest.approx(0.5 * math.log(2), abs=1e-6)


def test_a_non_finite_loss_stops_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    calls = []

    def poisoned(learner: Learner) -> Learner:
        def losses(batch):
            calls.append(batch.t.tolist())
            outcome = learner.losses(batch)
            return outcome if len(calls) <= 3 else replace(outcome, loss=outcome.loss * float("nan"))

        return replace(learner, losses=losses)

    trainer = make_trainer(tmp_path, wrap=poisoned)
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.run()
    message = str(caught.value)
    assert "Step 4" in message and str(calls[-1]) in message and "margins" in message and "checkpoint-00000002" in message
    assert all(torch.isfinite(p).all() for p in trainer._policy.trainable_parameters())
    assert [p.name for p in checkpoint.Checkpoints(tmp_path / "checkpoints").all()] == ["checkpoint-00000002"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_cleanly(number: int, tmp_path: Path) -> None:
    def interrupt(step: int, numbers: dict) -> None:
        if step == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    finished = make_trainer(tmp_path, steps=50, report=interrupt, checkpoint_every=100).run()
    assert finished.interrupted and finished.step == 3
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").latest().name == "checkpoint-00000003"
    assert signal.getsignal(number) is before


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, steps=2)
    trainer.run()
    good = (tmp_path / "checkpoints" / "checkpoint-00000002" / "weights.pt").read_bytes()
    real = torch.save

    def full(state, file, **kw):
        if "optimizer" in file.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(state, file, **kw)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    trainer._position.step = 4
    with pytest.raises(UserError, match="disk is full.*untouched"):
        trainer.save()
    assert [p.name for p in sorted((tmp_path / "checkpoints").glob("*checkpoint*"))] == ["checkpoint-00000002"]
    assert (tmp_path / "checkpoints" / "checkpoint-00000002" / "weights.pt").read_bytes() == good
    assert not list((tmp_path / "checkpoints").glob(".writing*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the always-full device of Linux")
def test_a_really_full_disk_is_an_error_of_the_disk() -> None:
    with pytest.raises(OSError) as caught:
        checkpoint.write_state({"a": torch.zeros(1000, 1000)}, Path("/dev/full"))
    assert caught.value.errno == errno.ENOSPC


def test_a_half_written_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=2).run()
    (tmp_path / "checkpoints" / ".writing-checkpoint-00000004").mkdir()
    (tmp_path / "checkpoints" / "checkpoint-00000009").mkdir()  # no checkpoint.json: not whole
    trainer = make_trainer(tmp_path)
    assert trainer.resume() and trainer.step == 2


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=5, checkpoint_every=1, keep_checkpoints=2).run()
    assert [p.name for p in checkpoint.Checkpoints(tmp_path / "checkpoints").all()] == [
        "checkpoint-00000004",
        "checkpoint-00000005",
    ]


def test_another_reference_is_refused_on_resume(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=2, identity={"reference": "abc", "data": "d1"}).run()
    with pytest.raises(UserError, match="reference: 'abc' then, 'xyz' now"):
        make_trainer(tmp_path, identity={"reference": "xyz", "data": "d1"}).resume()


def test_other_stateful_things_are_refused_on_resume(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=2, ema=0.9).run()
    with pytest.raises(UserError, match="made with other settings"):
        make_trainer(tmp_path, ema=0.0).resume()


def test_validation_is_fixed_binned_and_in_the_file(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=2, validation=True).run()
    rows = lines(tmp_path, "validation")
    assert [r["step"] for r in rows] == [0, 2]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and rows[0]["accuracy"] == 0.5
    assert rows[0]["reference_winner_error"] == rows[1]["reference_winner_error"]  # the same draws
    assert rows[1]["winner_drift"] != 0
    bins = rows[1]["bins"]
    assert sum(b["count"] for b in bins) == 10
    assert all(b["t_from"] % 100 == 0 and b["t_to"] - b["t_from"] == 100 for b in bins)
    whole = sum(b["margin"] * b["count"] for b in bins) / 10
    assert whole == pytest.approx(rows[1]["margin"], rel=1e-5, abs=1e-8)


def test_learning_on_separable_pairs_raises_accuracy(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=30, batch=4, lora=False, validation=True, checkpoint_every=0, validate_every=30).run()
    rows = lines(tmp_path, "validation")
    assert rows[-1]["accuracy"] > 0.8 and rows[-1]["loss"] < rows[0]["loss"]


def test_learning_rate_shapes() -> None:
    """Warm-up 4 of 12 steps: quarters up to 1; linear falls by eighths; cosine is one half in the middle of its fall."""

    def factors(kind: str) -> list[float]:
        return [learning_rate_factor(s, 12, OptimiserSettings(schedule=kind, warmup_steps=4)) for s in range(13)]

    for kind in ("constant", "linear", "cosine"):
        assert factors(kind)[:5] == [0, 0.25, 0.5, 0.75, 1.0]
    assert factors("constant")[5:] == [1.0] * 8
    assert factors("linear")[5:] == pytest.approx([1 - k / 8 for k in range(1, 9)])
    assert factors("cosine")[8] == pytest.approx(0.5)


def test_the_average_of_weights_by_hand() -> None:
    """Warm-up decays 2/11 and 3/12: 0 -> (9/11) * 1 -> 0.25 * 9/11 + 0.75 * 3."""
    p = torch.nn.Parameter(torch.zeros(1))
    ema = Ema([p], decay=0.99)
    for value in (1.0, 3.0):
        p.data.fill_(value)
        ema.update()
    with ema.applied():
        assert p.item() == pytest.approx(0.25 * 9 / 11 + 0.75 * 3)
    assert p.item() == 3.0
