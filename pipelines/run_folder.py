"""The folder of a run, its tracker and Accelerate, whatever it trains."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.differences import flatten
from diffalign.errors import UserError
from diffalign.written_aside import write_file
from pipelines import config

if TYPE_CHECKING:
    from accelerate import Accelerator

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
METRICS_FILE = "metrics.jsonl"
CACHE_FOLDER, PROMPT_FOLDER = "cache", "cache-prompts"
"""Folders of encoded data, which outlive a run that is replaced."""


def check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Check that a run may write into ``output``. A folder in which a run never got to a checkpoint counts as free.

    Raises:
        UserError: it holds another run, or something that is no run at all, and neither option allows going on.
    """
    if output.is_file():
        raise UserError(f"{output} is a file; the output should be a folder.")
    if resume and overwrite:
        raise UserError("To resume is to go on with the run that is there, to overwrite is to replace it: ask for one of them.")
    is_run = (output / CONFIG_FILE).is_file()
    if resume:
        if not is_run:
            raise UserError(f"There is no run to resume in {output} (no {CONFIG_FILE}).")
        return
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not is_run:
        raise UserError(f"{output} holds files that are no run of diffalign; nothing is written there. Choose another --output.")
    begun = (output / "checkpoints").is_dir() or (output / SUMMARY_FILE).is_file()
    if begun and not overwrite:
        raise UserError(
            f"{output} already holds a run. Use --resume to go on with it, --overwrite to replace it, or another --output."
        )


@dataclass(frozen=True)
class OutputFolder:
    """The folder of a run that may be there (``check_output``), and the ``text`` of its configuration. One process calls it."""

    path: Path
    text: str
    resume: bool
    overwrite: bool

    def mark(self) -> None:
        """Have a folder without a run known as one, before anything is encoded into it. A run that is there stays whole."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / CONFIG_FILE).is_file():
            write_file(self.path / CONFIG_FILE, self.text)

    def claim(self) -> None:
        """Make the folder ours: an older run is removed if it may be (its caches stay), ``text`` becomes the configuration.

        Of a run that goes on as well: what does not change what is learnt may differ from what it was begun with.
        """
        write_file(self.path / CONFIG_FILE, self.text)  # first, so that the folder is a run's all the time
        if self.overwrite:
            for entry in self.path.iterdir():
                if entry.name not in (CONFIG_FILE, CACHE_FOLDER, PROMPT_FOLDER):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def to_yaml(command: str, settings: Any) -> str:
    """The resolved configuration; ``diffalign COMMAND --config`` reads it back."""
    import yaml

    return f"# diffalign {command}\n" + yaml.safe_dump(config.as_tree(settings), sort_keys=False)


# -------------------------------------------------------------------------------------------------------------- trackers

PROJECT = "diffalign"
RUN_NAMES = {"wandb": "name", "trackio": "name", "swanlab": "experiment_name", "mlflow": "run_name", "clearml": "task_name"}
"""Each tracker's keyword for the name of a run; the others have none, or take the project's."""


def check_tracker(tracker: str) -> None:
    """Check that the tracker can be used. (Accelerate leaves a tracker out whose package is missing, and only logs that it does.)

    Raises:
        UserError: Accelerate knows no such tracker, or its package is not installed.
    """
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [kind.value for kind in LoggerType]
    if tracker not in ("none", *known):
        raise UserError(f"tracker is {tracker!r}; Accelerate knows {', '.join(known)}, and none is the JSONL file only.")
    if tracker not in ("none", "all", *map(str, get_available_trackers())):
        raise UserError(
            f"tracker is {tracker!r}, whose package is not installed: pip install {tracker}, or take --tracker tensorboard, "
            "or none for the JSONL file only."
        )


def begin_tracking(accelerator: Accelerator, settings: Any) -> None:
    """Tell the tracker asked for of the run: its project, its name and its settings. Every process calls it.

    Raises:
        UserError: the tracker refuses to begin.
    """
    tracker, name = settings.compute.tracker, settings.output.resolve().name
    project = tracker if tracker == "tensorboard" else PROJECT  # to TensorBoard it is a folder in the run's own
    names = {kind: {word: name} for kind, word in RUN_NAMES.items()}
    try:
        accelerator.init_trackers(project, config=hyperparameters(settings), init_kwargs=names)
    except Exception as error:  # whatever that package raises
        raise UserError(f"The tracker {tracker} does not begin: {' '.join(str(error).split())[:300]}") from error


def hyperparameters(settings: Any) -> dict[str, Any]:
    """The configuration as trackers take one: names with dots in them, numbers, switches and texts."""
    settings_by_name = flatten(config.as_tree(settings))
    return {name: v if isinstance(v, bool | int | float | str) else _text(v) for name, v in settings_by_name.items()}


def _text(value: Any) -> str:
    """A value as the command line would write it."""
    return "none" if value is None else ",".join(map(str, value))


# ------------------------------------------------------------------------------------------------------------ accelerate


def start_accelerator(settings: Any) -> Accelerator:
    """Accelerate, with the tracker asked for; on a CPU also a heap that gives back what is free.

    Raises:
        UserError: Accelerate is set to an engine that training is not written for, or there is no such tracker.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

    from pipelines import devices, heap

    check_tracker(settings.compute.tracker)
    devices.refuse_other_engines()
    devices.forget_precision()
    heap.give_back_large_blocks()
    tracker = settings.compute.tracker
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # by default Accelerate starts no process group on a CPU under torchrun
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # gradients once, not twice
        mixed_precision=settings.compute.mixed_precision,
        log_with=None if tracker == "none" else tracker,
        project_config=ProjectConfiguration(project_dir=str(settings.output), logging_dir=str(settings.output)),
    )
    devices.begin(accelerator)
    return accelerator
