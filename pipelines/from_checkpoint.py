"""What a run had learnt by one of its checkpoints, as the result it would have been: of runs that were stopped or blew up, and of
those that were better before their end.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from diffalign import objectives
from diffalign.checkpoint import Checkpoints, Stateful
from diffalign.errors import UserError
from diffalign.optimisation import Ema
from diffalign.weights import TrainedWeights
from pipelines import config, ingredients, run
from pipelines.run_folder import CONFIG_FILE
from pipelines.training import write_result

LATEST = "latest"


def result_of_checkpoint(folder: Path, which: str, output: Path, base: str | None = None) -> int:
    """Write the LoRA or the pipeline of a checkpoint into ``output``, with its average if the run kept one; returns its step.

    Args:
        folder: a run's, finished or not.
        which: the step, or ``LATEST``.
        base: the model that was trained, if it is not where it was.

    Raises:
        UserError: no run of an image model, no such checkpoint, a damaged one, or a model that cannot be loaded.
    """
    checkpoints = Checkpoints(folder / run.CHECKPOINTS)
    path = _chosen(checkpoints, folder, which)
    note = checkpoints.note(path)
    settings = _settings(folder, note["identity"]["objective"])
    settings = replace(settings, output=output, model=base or settings.model)
    family = ingredients.load_model(settings, say=lambda _: None)
    ingredients.make_trainable(settings, family, Accelerator(cpu=True), ingredients.start_adapter(settings))
    weights = TrainedWeights(family.network)
    average = Ema(family.denoiser.trainable_parameters(), settings.loop.ema_decay) if "ema" in note["things"] else None
    things: dict[str, Stateful] = {"weights": weights, **({"ema": average} if average else {})}
    checkpoints.restore(path, things)
    with average.applied() if average else nullcontext():
        write_result(settings, family, weights)
    return int(note["step"])


def _chosen(checkpoints: Checkpoints, folder: Path, which: str) -> Path:
    there = {str(int(path.name.rpartition("-")[2])): path for path in checkpoints.all()}
    if not there:
        raise UserError(f"{folder} has no checkpoint: no `diffalign train` has written one there (--checkpoint-every).")
    if which != LATEST and which not in there:
        raise UserError(f"{folder} has no checkpoint of step {which}; there are {', '.join(there)}, and {LATEST}.")
    return there[which] if which in there else next(reversed(there.values()))


def _settings(folder: Path, name: str) -> Any:
    objective = objectives.load(name).Objective
    if objective.about.of_prompts:
        raise UserError(f"{folder} is a run of {name}, of a prompt writer; checkpoints of image models are written out.")
    return config.resolve(config.layered(objective, config.read_yaml(folder / CONFIG_FILE)), objective)
