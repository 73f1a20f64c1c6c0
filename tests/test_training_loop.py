"""The loop: exact resume, equal numbers however a batch is cut, and what happens when things go wrong."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import shutil
import signal
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from worlds import PairsInMemory, given, small_denoiser

from diffalign import checkpoint, written_aside
from diffalign.checkpoint import Checkpoints
from diffalign.data.loader import LoaderSettings, PairLoader, validation_batches
from diffalign.errors import NonFiniteLossError, UserError
from diffalign.interruption import Interruption
from diffalign.learner import Learner
from diffalign.objectives.diffusion_dpo import DiffusionDPO
from diffalign.objectives.sft import SFT
from diffalign.objectives.smpo import SmPO
from diffalign.optimisation import Ema, OptimizerSettings, learning_rate_factor
from diffalign.random_state import RandomState, get_random_state, set_random_state
from diffalign.references import AdapterOff, Frozen
from diffalign.train import LoopSettings, Trainer
from diffalign.written_aside import folder_aside
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
    scaler: torch.amp.GradScaler | None = None,
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
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler
    learner = (objective or DiffusionDPO(beta=500)).learner(given(denoiser, reference, loader, batch_size=batch))
    return Trainer(
        learner=learner if wrap is None else wrap(learner),
        policy=denoiser,
        validation=validation_batches(pairs, [10, 11], settings, 5) if validation else [],
        accelerator=accelerator,
        output=str(output),
        loop=LoopSettings(**{"steps": steps, "checkpoint_every": 2, "validate_every": 2, "ema_decay": ema, **loop}),
        optimizer=OptimizerSettings(learning_rate=1e-3, warmup_steps=2, schedule="cosine"),
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


def test_a_loop_of_ones_own_makes_its_folder(tmp_path: Path) -> None:
    made = make_trainer(tmp_path / "made", steps=1)
    (tmp_path / "made").rmdir()
    made.run()
    assert lines(tmp_path / "made")[0]["step"] == 1


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


def test_every_sample_of_a_step_counts_the_same_where_micro_batches_differ_in_size(tmp_path: Path) -> None:
    norms = {}
    for size in (4, 3):  # 4, and 3 and 1
        trainer = make_trainer(tmp_path / str(size), dtype=torch.float64, objective=DiffusionDPO(beta=500), lora=False)
        settings = LoaderSettings(batch_size=size, accumulation=1, seed=5)
        batches = validation_batches(PairsInMemory(12, dtype=torch.float64), [0, 1, 2, 3], settings, 1)
        assert [len(batch) for batch in batches] == ([4] if size == 4 else [3, 1])
        norms[size] = trainer._optimizer_step(batches, Interruption())[0]["gradient_norm"]
    assert norms[3] == pytest.approx(norms[4], rel=1e-9) and norms[4] > 0


def test_a_checkpoint_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, rename = tmp_path / "checkpoint", os.replace
    kept.mkdir()
    (kept / "state").write_text("old")

    def refused(source: Path, target: Path) -> None:
        if (source / "state").is_file() and (source / "state").read_text() == "new":
            raise OSError(errno.EIO, "input/output error")
        rename(source, target)

    monkeypatch.setattr(written_aside.os, "replace", refused)
    with pytest.raises(UserError, match="What was there before is untouched"), folder_aside(kept) as aside:
        (aside / "state").write_text("new")
    assert (kept / "state").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_due_checkpoint_of_an_interrupted_run_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, save = [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, *rest: written.append(step) or save(self, step, *rest))

    def stop(step: int, numbers: dict) -> None:
        if step == 2:  # its checkpoint is due, and written by now
            signal.raise_signal(signal.SIGTERM)

    assert make_trainer(tmp_path, report=stop).run().interrupted and written == [2]
    resumed = make_trainer(tmp_path)
    resumed.resume()
    assert resumed.run().step == 4 and written == [2, 4]


def test_the_scale_of_fp16_losses_goes_on_where_it_was(tmp_path: Path) -> None:
    """A resumed run that began anew with a scale of 65536 would leave out updates that the whole one made."""
    scales = {}
    for name in ("first", "second"):
        scaler = torch.amp.GradScaler("cpu", 2.0**10, growth_interval=2)
        trainer = make_trainer(tmp_path, steps=2 if name == "first" else 4, identity={"a": "run"}, scaler=scaler)
        resumed = trainer.resume()
        scales[name] = trainer._accelerator.scaler.get_scale()
        trainer.run()
        assert resumed == (name == "second")
    assert scales == {"first": 2.0**10, "second": 2.0**11}


def test_a_weight_scales_the_loss_of_its_pair(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, steps=1)
    trainer._learner.source._pairs.weights = [0.5] * 12
    trainer.run()
    (line,) = [row for row in lines(tmp_path) if row["kind"] == "train"]
    assert line["weighted_loss"] == pytest.approx(0.5 * math.log(2), abs=1e-6)
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)  # as validation's, which has no weights
    make_trainer(tmp_path / "plain", steps=1).run()
    assert all("weighted_loss" not in row for row in lines(tmp_path / "plain"))


@pytest.mark.parametrize("change", [lambda x: x[:, None], lambda x: x.mean(), lambda x: x[:1]], ids=["a column", "a mean", "one"])
@pytest.mark.parametrize("where", ["losses", "validate"])
def test_a_loss_that_is_not_one_number_for_each_is_refused(change: Callable, where: str, tmp_path: Path) -> None:
    """A column beside the weights of a batch would be a matrix, and every gradient as many times too large as there are pairs."""

    def odd(learner: Learner) -> Learner:
        own = getattr(learner, where)
        return replace(learner, **{where: lambda batch: replace(outcome := own(batch), loss=change(outcome.loss))})

    trainer = make_trainer(tmp_path, wrap=odd, validation=True)
    with pytest.raises(UserError, match=r"gave 'loss' of shape \[.*\] for \d samples; it should be \[\d\]"):
        trainer.run()


@pytest.mark.parametrize("where", ["losses", "validate"])
def test_a_metric_called_like_a_column_of_the_log_is_refused(where: str, tmp_path: Path) -> None:
    def odd(learner: Learner) -> Learner:
        own = getattr(learner, where)
        return replace(
            learner, **{where: lambda batch: replace(outcome := own(batch), metrics={"step": outcome.loss, "t": outcome.loss})}
        )

    with pytest.raises(UserError, match=r"as the log calls columns of its own: step, t\."):
        make_trainer(tmp_path, wrap=odd, validation=True).run()


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])])
def test_a_signal_saves_and_ends_cleanly(number: int, tmp_path: Path) -> None:
    def interrupt(step: int, numbers: dict) -> None:
        if step == 3:
            signal.raise_signal(number)

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


@pytest.mark.parametrize(
    "torn", [b'{"kind": "tr', b"\0" * 20, b'{"kind": "train", "step": 4}\n{"kind": "\xc3'], ids=["cut", "zeros", "letter"]
)
def test_a_torn_last_line_of_the_metrics_is_dropped(torn: bytes, tmp_path: Path) -> None:
    make_trainer(tmp_path).run()
    file = tmp_path / "metrics.jsonl"
    before = file.read_bytes()
    file.write_bytes(before + torn)
    trainer = make_trainer(tmp_path)
    assert trainer.resume() and trainer.step == 4
    assert file.read_bytes() == before + torn[: torn.rfind(b"\n") + 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "metrics.jsonl"]


def test_a_run_that_begins_anew_does_not_write_on_in_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    trainer = make_trainer(tmp_path, steps=2)
    assert not trainer.resume()
    trainer.run()
    assert [row["step"] for row in lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize("broken", ["{", "", "7", '{"kind": "train"}'])
def test_a_broken_line_in_the_middle_of_the_metrics_is_named(broken: str, tmp_path: Path) -> None:
    make_trainer(tmp_path).run()
    file = tmp_path / "metrics.jsonl"
    first, _, *others = file.read_text().splitlines()
    file.write_text("\n".join([first, broken, *others]))
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"Line 2 of .*metrics\.jsonl is broken.*Mend or delete"):
        make_trainer(tmp_path).resume()
    assert file.read_bytes() == before


def test_metrics_are_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trainer(tmp_path).run()
    file = tmp_path / "metrics.jsonl"
    before, real = file.read_bytes(), Path.write_bytes

    def full(path: Path, content: bytes) -> None:
        real(path, content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="disk is full.*untouched"):
        make_trainer(tmp_path).resume()
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "metrics.jsonl"]


def in_the_file(state: Any, folder: Path) -> list[bool]:
    """Of every tensor of a nest, whether its numbers lie in a file of ``folder`` that is mapped into this process."""
    if isinstance(state, torch.Tensor):
        at = state.data_ptr()
        maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
        spans = [[int(end, 16) for end in fields[0].split("-")] for fields in maps]
        return [any(low <= at < high for low, high in spans)]
    inner = state.values() if isinstance(state, Mapping) else state if isinstance(state, (list, tuple)) else ()
    return [found for value in inner for found in in_the_file(value, folder)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_resumed_run_reads_from_the_file_what_is_as_large_as_the_model(lora: bool, tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=2, lora=lora, ema=0.9).run()
    trainer, seen = make_trainer(tmp_path, lora=lora, ema=0.9), {}

    class Watched:
        def __init__(self, name: str, thing: Any) -> None:
            self.name, self.thing = name, thing
            self.copies_on_load = getattr(thing, "copies_on_load", False)

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            seen[self.name] = in_the_file(state, tmp_path)
            self.thing.load_state_dict(state)

    trainer._stateful = {name: Watched(name, each) for name, each in trainer._stateful.items()}
    assert trainer.resume()
    assert all(seen[name] and all(seen[name]) for name in ("weights", "optimizer", "ema"))
    gc.collect()
    assert str(tmp_path / "checkpoints") not in Path("/proc/self/maps").read_text()  # and nothing of it is kept: all are copies
    trainer._optimizer_step(next(trainer._learner.source.steps(2, 3)), Interruption())


def test_files_that_cannot_be_mapped_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trainer(tmp_path, steps=2).run()
    load = torch.load

    def without_maps(*given: Any, mmap: bool = False, **how: Any) -> Any:
        if mmap:
            raise RuntimeError("unable to mmap 4096 bytes from file <optimizer.pt>: No such device (19)")
        return load(*given, **how)

    monkeypatch.setattr(checkpoint.torch, "load", without_maps)
    trainer = make_trainer(tmp_path)
    assert trainer.resume() and trainer.step == 2


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["optimizer.pt", "checkpoint.json"])
@pytest.mark.parametrize("damage", [halved, shortened, zeroed, emptied], ids=lambda d: d.__name__)
def test_a_damaged_checkpoint_is_named_with_the_older_one(damage: Callable, name: str, tmp_path: Path) -> None:
    make_trainer(tmp_path).run()
    newest = tmp_path / "checkpoints" / "checkpoint-00000004"
    damage(newest / name)
    with pytest.raises(UserError) as caught:
        make_trainer(tmp_path).resume()
    advice = f"Delete the folder {newest} and resume again: it goes on from checkpoint-00000002."
    assert str(caught.value) == f"{newest / name} is damaged. {advice}"
    shutil.rmtree(newest)
    trainer = make_trainer(tmp_path)
    assert trainer.resume() and trainer.step == 2


def test_a_damaged_checkpoint_without_an_older_one(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=2).run()
    (only,) = (tmp_path / "checkpoints").iterdir()
    (only / "weights.pt").unlink()
    with pytest.raises(UserError, match="weights.pt is missing.*there is no older checkpoint, so it begins anew"):
        make_trainer(tmp_path).resume()
    shutil.rmtree(only)
    assert not make_trainer(tmp_path).resume()


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), RuntimeError("you tried to allocate 9")])
def test_what_is_no_damage_is_no_reason_to_delete(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trainer(tmp_path, steps=2).run()

    def fails(*_: object, **how: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint.torch, "load", fails)
    with pytest.raises((UserError, RuntimeError), match="weights.pt cannot be read: Permission denied|you tried") as caught:
        make_trainer(tmp_path).resume()
    assert "Delete" not in str(caught.value)


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=5, checkpoint_every=1, keep_checkpoints=2).run()
    assert [p.name for p in checkpoint.Checkpoints(tmp_path / "checkpoints").all()] == [
        "checkpoint-00000004",
        "checkpoint-00000005",
    ]


class Nothing:
    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...


def test_the_best_checkpoint_stays_where_that_is_asked_for(tmp_path: Path) -> None:
    losses = {1: 0.7, 2: 0.5, 3: None, 4: 0.6, 5: 0.5, 6: 0.8}
    for keep_best, left in ((True, [2, 6]), (False, [6])):
        kept = Checkpoints(tmp_path / str(keep_best), keep=1, keep_best=keep_best)
        for step, loss in losses.items():
            kept.save(step, {"nothing": Nothing()}, {} if loss is None else {"validation_loss": loss})
        assert [checkpoint.step_of(path) for path in kept.all()] == left
        assert checkpoint.step_of(kept.best()[0]) == left[0]
    (kept.latest() / "checkpoint.json").write_text("{")
    assert kept.best() is None


def test_every_checkpoint_is_validated_where_the_best_is_kept(tmp_path: Path) -> None:
    often = {"steps": 6, "checkpoint_every": 2, "validate_every": 4}
    for keep_best, validated in ((True, [0, 2, 4, 6]), (False, [0, 4, 6])):
        folder = tmp_path / str(keep_best)
        finished = make_trainer(folder, keep_best=keep_best, keep_checkpoints=1, validation=True, **often).run()
        losses = {row["step"]: row["loss"] for row in lines(folder, "validation")}
        assert list(losses) == validated
        possible = [2, 4, 6] if keep_best else [6]
        assert finished.best == min(((step, losses[step]) for step in possible), key=lambda found: found[1])


def test_the_best_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_best chooses among checkpoints: set checkpoint_every"):
        LoopSettings(keep_best=True, checkpoint_every=0)
    with pytest.raises(UserError, match="keep_best needs a validation loss"):
        make_trainer(tmp_path, keep_best=True)


def test_another_reference_is_refused_on_resume(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=2, identity={"reference": "abc", "data": "d1"}).run()
    with pytest.raises(UserError, match='reference was "abc" and is now "xyz"'):
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


def test_one_batch_of_validation_lies_in_memory_at_a_time(tmp_path: Path) -> None:
    shown, most = [], []

    def watched(learner: Learner) -> Learner:
        def validate(batch: Any) -> Any:
            shown.append(weakref.ref(batch.noise))
            most.append(sum(noise() is not None for noise in shown))
            return learner.validate(batch)

        return replace(learner, validate=validate)

    trainer = make_trainer(tmp_path, validation=True, wrap=watched)
    trainer.validate(), trainer.validate()
    assert len(most) == 10 and max(most) <= 2  # the last one's frame may still be there


@pytest.mark.parametrize("objective", [None, SFT(), SmPO(smoothing="label")], ids=["diffusion-dpo", "sft", "smpo"])
def test_validation_drops_nothing_out_and_draws_nothing(objective: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dropout=0.5, validation=True, steps=3, ema=0.5, objective=objective)
    trainer.run()
    network = trainer._policy.network
    state, modes = torch.get_rng_state(), [module.training for module in network.modules()]
    once, again = trainer.validate(), trainer.validate()
    assert once == again and once["winner_drift"] != 0
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in network.modules()] == modes and any(modes)
    batch = trainer._validation[0]
    assert not torch.equal(trainer._learner.losses(batch).loss, trainer._learner.losses(batch).loss)  # training does drop out


def test_a_network_that_drops_nothing_keeps_its_mode_in_validation(tmp_path: Path) -> None:
    """Layers of rate 0 are there; compiled blocks would be compiled anew for another mode of theirs."""
    seen = []

    def watched(learner: Learner) -> Learner:
        def validate(batch):
            seen.append([module.training for module in trainer._policy.network.modules()])
            return learner.validate(batch)

        return replace(learner, validate=validate)

    trainer = make_trainer(tmp_path, validation=True, wrap=watched)
    trainer.validate()
    kinds = [module for module in trainer._policy.network.modules() if isinstance(module, torch.nn.Dropout)]
    assert kinds and all(modes == [True] * len(modes) for modes in seen)


def test_learning_on_separable_pairs_raises_accuracy(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=30, batch=4, lora=False, validation=True, checkpoint_every=0, validate_every=30).run()
    rows = lines(tmp_path, "validation")
    assert rows[-1]["accuracy"] > 0.8 and rows[-1]["loss"] < rows[0]["loss"]


def test_learning_rate_shapes() -> None:
    """Warm-up 4 of 12 steps: quarters up to 1; linear falls by eighths; cosine is one half in the middle of its fall."""

    def factors(kind: str) -> list[float]:
        return [learning_rate_factor(s, 12, OptimizerSettings(schedule=kind, warmup_steps=4)) for s in range(13)]

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


def test_an_update_that_fp16_leaves_out_moves_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither weights nor schedule nor average, where a scaler begins too high and a fused optimizer does not say what it leaves.
    The norm, which is not finite, is null in the metrics: JSON has no infinity."""
    scaler = torch.amp.GradScaler("cpu", 3e38, backoff_factor=1e-30)
    trainer = make_trainer(tmp_path, steps=3, ema=0.5, scaler=scaler)
    assert trainer._updates.optimizer.defaults["fused"]
    rates, averaged, moved, begun = [], [], [], weights(trainer)
    average = trainer.ema.update
    monkeypatch.setattr(trainer.ema, "update", lambda: (averaged.append(trainer.step), average()))
    trainer._report = lambda step, numbers: (
        rates.append(trainer._updates.optimizer.param_groups[0]["lr"]),
        moved.append(not equal(weights(trainer), begun)),
    )
    trainer.run()
    assert rates == [0.0, 5e-4, 1e-3]  # the warm-up of two steps began with the second
    assert averaged == [1, 2] and moved == [False, False, True]  # the second was made at a rate of zero
    written = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["gradient_norm"] is None for row in written] == [True, False, False]


def test_random_streams_of_another_machine_are_taken_as_far_as_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process takes what it had, one that is new keeps its own; and a GPU's stream is that of the process's own device."""
    accelerator = Accelerator(cpu=True)
    states = RandomState(accelerator)
    torch.manual_seed(1)
    states.collect()
    expected = torch.rand(3)
    saved = states.state_dict()
    torch.manual_seed(2)
    RandomState(accelerator).load_state_dict(saved)
    assert torch.equal(torch.rand(3), expected)
    second = SimpleNamespace(process_index=1, num_processes=2)
    torch.manual_seed(2)
    RandomState(second).load_state_dict(saved)
    torch.manual_seed(2)
    own = torch.rand(3)
    torch.manual_seed(2)
    RandomState(second).load_state_dict(saved)
    assert torch.equal(torch.rand(3), own) and not torch.equal(own, expected)
    restored: list[torch.Tensor] = []
    module = SimpleNamespace(get_rng_state=lambda: torch.tensor([7], dtype=torch.uint8), set_rng_state=restored.append)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch, "get_device_module", lambda: module)
    on_a_gpu = get_random_state()
    set_random_state(on_a_gpu)
    on_the_host = {name: value for name, value in on_a_gpu.items() if name != "device"}
    set_random_state(on_the_host | {"cuda": torch.tensor([8], dtype=torch.uint8)})  # as checkpoints were
    set_random_state(on_the_host | {"cuda": [torch.zeros(1, dtype=torch.uint8)] * 8})  # of eight GPUs, before that
    assert [state.tolist() for state in restored] == [[7], [8]]
