"""The steps that all training runs share: options to settings, the loop, the summary, and the identity that a resume checks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from diffalign import checkpoint, objectives
from diffalign.checkpoint import Checkpoints
from diffalign.objectives._family import depends_on_batch
from diffalign.processes import ManyProcesses, failing_together
from diffalign.train import Finished, Trainer
from pipelines import config, recipes
from pipelines.progress import TrainingBar
from pipelines.run_folder import SUMMARY_FILE, OutputFolder, begin_tracking

Say = Callable[[str], None]
Report = Callable[..., None]
LEAVE_NO_TRACE = (
    *("cache", "encode_batch", "vae_slicing", "text_precision"),
    *("embed_batch", "max_unreadable", "max_left_out", "validation_draws"),
)
"""Settings of the data that change how they are read and not what is learnt; or that the data's digest holds."""
LONG_WAIT = 0.1
"""Share of the steps' time that is worth a remark."""
WHAT_HELPS = "a faster disk for the cache, or more memory for the system to keep it in, would make training faster"
CHECKPOINTS = "checkpoints"
PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


def settings_of(name: str, recipe: str | None, options: Mapping[str, Any]) -> Any:
    """The checked settings of an objective: a shipped recipe, if any, and options by their short names.

    Raises:
        UserError: no such objective, recipe or option, or values out of range; all mistakes at once.
    """
    objective = objectives.load(name).Objective
    base = recipes.load(name, recipe) if recipe else {}
    return config.resolve(config.layered(objective, base, config.placed(options, objective)), objective)


def through_the_loop(
    build: Callable[[Report], Trainer],
    settings: Any,
    accelerator: Accelerator,
    folder: OutputFolder,
    *,
    say: Say,
    progress: bool,
    before: Callable[[Trainer], None] = lambda trainer: None,
) -> tuple[Trainer, Finished]:
    """Build the trainer, make the output folder its own, and run to the end or an interruption, with tracker and progress bar.

    ``before`` is called when everything stands, and nothing has been learnt yet in this session.
    """
    with TrainingBar(progress and accelerator.is_main_process, "step") as bar:
        trainer, everyone = build(partial(bar.update, steps=settings.loop.steps)), ManyProcesses(accelerator)
        if folder.resume:
            found = trainer.resume()
            say(f"resumed at step {trainer.step}" if found else "there is no checkpoint yet: the run begins anew")
        with failing_together(everyone):
            if everyone.rank == 0:  # nothing can be wrong any more: an older run may go
                folder.claim()
        with failing_together(everyone):
            if accelerator.log_with:
                begin_tracking(accelerator, settings)
        bar.start(trainer.step, settings.loop.steps)
        try:
            before(trainer)
            finished = trainer.run()
        except BaseException:
            for tracker in accelerator.trackers:  # or its thread would outlive a failed run in a notebook
                tracker.finish()
            raise
    if (finished.waiting or 0.0) > LONG_WAIT:
        say(f"{finished.waiting:.0%} of the steps' time went by waiting for data: {WHAT_HELPS}")
    if finished.advice:
        say(f"the last validation: {finished.advice}")
    if finished.best and finished.best[0] < finished.step:
        step, loss = finished.best
        say(
            f"of the checkpoints that are kept, that of step {step} has the lowest validation loss, {loss:.4g}: "
            f"`diffalign export {folder.path} --checkpoint best --out PLACE` writes it"
        )
    return trainer, finished


def of_the_loop(finished: Finished) -> dict[str, Any]:
    """Entries of a summary about the loop: the share of the steps' time spent waiting for data, the last validation's advice and
    the kept checkpoint with the lowest validation loss, as far as there are any."""
    told: dict[str, Any] = {} if finished.waiting is None else {"waiting": round(finished.waiting, 4)}
    if finished.advice:
        told["advice"] = finished.advice
    if finished.best:
        told["best_checkpoint"] = dict(zip(("step", "validation_loss"), finished.best, strict=True))
    return told


@dataclass(frozen=True)
class Epochs:
    """Conversion of steps to epochs: every step takes the next rows of an order that passes over all of them again and again."""

    per_step: int  # over all processes
    rows: int  # to train on

    def told(self, steps: int) -> str:
        """The line that a run prints at its start."""
        return f"{steps} steps of {self.per_step} are {self.after(steps):.3g} epochs, passes over the {self.rows} to train on"

    def after(self, steps: int) -> float:
        return steps * self.per_step / self.rows


def close(accelerator: Accelerator, finished: Finished, say: Say) -> Finished:
    """Let the trackers finish, and say how an interrupted run goes on."""
    accelerator.end_training()
    if finished.interrupted:
        say(f"Interrupted at step {finished.step}; a checkpoint was written. Go on with --resume.")
    return finished


def summary_of(output: Path, finished: Finished) -> dict[str, Any]:
    """What ``summary.json`` holds.

    Raises:
        KeyboardInterrupt: the run was stopped, by Ctrl-C, a notebook's stop button or SIGTERM, and has none yet.
    """
    if finished.interrupted:
        raise KeyboardInterrupt(
            f"stopped at step {finished.step}; a checkpoint was written. The same call with resume=True, not overwrite, goes on."
        )
    return json.loads((output / SUMMARY_FILE).read_text("utf-8"))


def division(settings: Any, world: int, buckets: bool = False) -> dict[str, Any]:
    """How a step's pairs are divided, where that changes what is learnt: nothing of most runs, which need only as many pairs."""
    batch = settings.batch
    if depends_on_batch(settings.objective):
        return {"batch_size, accumulation, processes": [batch.batch_size, batch.accumulation, world]}
    return {"batch_size": batch.batch_size} if buckets else {}  # blocks of one shape follow each other


def refuse_another_run(output: Path, asked: Mapping[str, Any]) -> None:
    """Raises UserError if what is ``asked`` for is not what the newest checkpoint was made with: a part of the run's identity,
    that which is known before anything is loaded."""
    checkpoints = Checkpoints(output / CHECKPOINTS)
    if path := checkpoints.latest():
        saved = checkpoints.note(path)["identity"]
        checkpoint.refuse_another_run(path, {name: saved[name] for name in asked if name in saved}, asked)


def identity(name: str, settings: Any) -> dict[str, Any]:
    """The settings that a resumed run must share with the one that wrote the checkpoint; each kind of run adds its
    own."""
    tree = config.as_tree(settings)
    return {
        "objective": name,
        "objective_settings": tree["objective"],
        **{f"data.{name}": value for name, value in tree["data"].items() if name not in LEAVE_NO_TRACE},
        "mixed_precision": settings.compute.mixed_precision,
        **({"tf32": True} if getattr(settings.compute, "tf32", False) else {}),
        "adapter": settings.adapter,
        "lora": tree["lora"] if settings.adapter == "lora" else None,
        "optimizer": {k: v for k, v in tree["optimizer"].items() if (k, v) != ("optimizer", "adamw")},  # once the only one
        **({"steps": settings.loop.steps} if its_length_is_learnt(settings) else {}),
        "ema_decay": settings.loop.ema_decay,
        "seed": settings.seed,
    }


def its_length_is_learnt(settings: Any) -> bool:
    """Whether the weights at any step depend on the length of the run; where not, a run can be made longer."""
    curriculum = getattr(settings.data, "curriculum", "none") != "none"
    return settings.optimizer.schedule != "constant" or curriculum or bool(settings.loop.rounds)
