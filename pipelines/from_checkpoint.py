"""The result that a run would have had at one of its checkpoints: for runs that were stopped, diverged or got worse."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from diffalign import objectives
from diffalign.checkpoint import Checkpoints, Stateful, step_of
from diffalign.errors import UserError
from diffalign.optimisation import Ema
from diffalign.weights import TrainedWeights
from pipelines import config, ingredients, run
from pipelines.run_folder import CONFIG_FILE
from pipelines.training import write_result

LATEST, BEST = "latest", "best"


def result_of_checkpoint(folder: Path, which: str, output: Path, base: str | None = None) -> int:
    """Write the LoRA or the model of a checkpoint into ``output``, with its average if the run kept one; returns its step.

    Args:
        folder: a run's, finished or not.
        which: the step, ``LATEST``, or ``BEST``: the one with the lowest validation loss.
        base: the model that was trained, if it is not where it was.

    Raises:
        UserError: no run, no such checkpoint, a damaged one, or a model that cannot be loaded.
    """
    checkpoints = Checkpoints(folder / run.CHECKPOINTS)
    path = _chosen(checkpoints, folder, which)
    note = checkpoints.note(path)
    settings = _settings(folder, note["identity"]["objective"])
    settings = replace(settings, output=output, model=base or settings.model)
    learnt = _writer(settings) if settings.objective.about.of_prompts else _family(settings)
    average = Ema(learnt.parameters, settings.loop.ema_decay) if "ema" in note["stateful"] else None
    stateful: dict[str, Stateful] = {"weights": learnt.weights, **({"ema": average} if average else {})}
    checkpoints.restore(path, stateful)
    with average.applied() if average else nullcontext():
        learnt.write()
    return int(note["step"])


@dataclass(frozen=True)
class _Learnt:
    """The trained weights of a run, as they are before the first step."""

    weights: TrainedWeights
    parameters: Iterable[nn.Parameter]
    write: Callable[[], None]


def _family(settings: Any) -> _Learnt:
    family = ingredients.load_model(settings, say=lambda _: None)
    ingredients.make_trainable(settings, family, Accelerator(cpu=True), ingredients.start_adapter(settings))
    weights = TrainedWeights(family.network)
    return _Learnt(weights, family.denoiser.trainable_parameters(), lambda: write_result(settings, family, weights))


def _writer(settings: Any) -> _Learnt:
    from pipelines.writers import ingredients as of_writers
    from pipelines.writers.training import write_result as write_writer

    writer = of_writers.load_writer(settings, lambda _: None)
    of_writers.make_trainable(settings, writer)
    weights = TrainedWeights(writer.model)
    return _Learnt(weights, writer.trainable_parameters(), lambda: write_writer(settings, writer))


def _chosen(checkpoints: Checkpoints, folder: Path, which: str) -> Path:
    there = {str(step_of(path)): path for path in checkpoints.all()}
    if not there:
        raise UserError(f"{folder} has no checkpoint: no `diffalign train` has written one there (--checkpoint-every).")
    if which == BEST:
        return _best(checkpoints, folder)
    if which != LATEST and which not in there:
        raise UserError(f"{folder} has no checkpoint of step {which}; there are {', '.join(there)}, {LATEST} and {BEST}.")
    return there[which] if which in there else next(reversed(there.values()))


def _best(checkpoints: Checkpoints, folder: Path) -> Path:
    found = checkpoints.best()
    if found is None:
        raise UserError(
            f"No checkpoint of {folder} was validated at its step: nobody knows the best. --keep-best sees to it, or a "
            "--validate-every that --checkpoint-every is a multiple of; of this run take a step by its number."
        )
    return found[0]


def _settings(folder: Path, name: str) -> Any:
    objective = objectives.load(name).Objective
    return config.resolve(config.layered(objective, config.read_yaml(folder / CONFIG_FILE)), objective)
