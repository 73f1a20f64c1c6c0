"""The loop: one for every objective and every family.

    for each optimizer step:
        for each micro-batch of the source: the objective's losses; backward
        clip, step, average; now and then: validate, log, checkpoint

It runs on Accelerate (one process, or many by torchrun / accelerate launch). Nothing in it knows a method or a model.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign import health, metrics_file, sharding
from diffalign.checkpoint import NOTE, VALIDATION_LOSS, Checkpoints, Stateful, refuse_another_run, step_of
from diffalign.data.ahead import Stopwatch
from diffalign.errors import NonFiniteLossError, UserError
from diffalign.interruption import Interruption
from diffalign.learner import Batch, Learner
from diffalign.loop_rounds import LoopRounds
from diffalign.optimisation import Ema, OptimizerSettings, build_schedule
from diffalign.processes import ManyProcesses, Processes, failing_together, turns
from diffalign.protocols import Policy
from diffalign.random_state import RandomState
from diffalign.settings import check_options, option
from diffalign.types import Outcome, widest
from diffalign.updates import updates_of
from diffalign.waiting import Clock
from diffalign.weights import TrainedWeights, without_dropout
from diffalign.written_aside import disk_error

LoopReference = Literal["start", "round"]
ROW = "row"
"""The column of a held-out pair's row of the data set, while a validation is put together."""
WEIGHTED = "weighted_loss"
"""The metric of the loss with the pairs' weights (a data set's own, Sem-DPO's W): what is trained."""


OF_THE_LOG = frozenset(
    {"kind", "step", "loss", WEIGHTED, "t", ROW, "bins", "advice"}
    | {"gradient_norm", "learning_rate", "seconds", "waiting", "interrupted"}
)
"""Columns that the loop itself writes, which no objective's metric may be called like."""


@dataclass(frozen=True)
class LoopSettings:
    """The length of training, and how often it is logged, validated and saved."""

    steps: int = option(2000, "optimizer steps", ge=1)
    log_every: int = option(1, "optimizer steps between lines of metrics", ge=1)
    validate_every: int = option(50, "optimizer steps between validations; 0 validates only at the ends", ge=0)
    checkpoint_every: int = option(100, "optimizer steps between checkpoints; 0 writes one only at the end", ge=0)
    keep_checkpoints: int = option(2, "number of checkpoints to keep, the newest", ge=1)
    ema_decay: float = option(
        0.0, "decay of an exponential moving average of the weights, which is then the result; 0 for none", ge=0, lt=1
    )
    keep_best: bool = option(
        False, "keep also the checkpoint with the lowest validation loss: `diffalign export --checkpoint best`"
    )
    round_every: int = option(0, "optimizer steps of a round of the loop; 0 for one round, the whole run", ge=0)
    round_reference: LoopReference = option(
        "start", "reference model: the policy at the beginning of the run (start) or of the round (round)"
    )
    extrapolation: float = option(
        0.0, "share of a round's change of the weights by which they are extrapolated at its end; 0 for none", ge=0
    )

    def __post_init__(self) -> None:
        check_options(self)
        if not self.round_every and (self.round_reference == "round" or self.extrapolation):
            raise ValueError("round_reference and extrapolation are about rounds of the loop: set round_every to their length")
        if self.keep_best and not self.checkpoint_every:
            raise ValueError("keep_best chooses among checkpoints: set checkpoint_every")

    @property
    def rounds(self) -> dict[str, Any]:
        """The settings of rounds, for the run's identity; empty if there are none."""
        named = {"every": self.round_every, "reference": self.round_reference, "extrapolation": self.extrapolation}
        return named if self.round_reference == "round" or self.extrapolation else {}


@dataclass(frozen=True)
class Finished:
    """How a run ended; ``interrupted`` after SIGTERM or Ctrl-C, with a checkpoint of ``step``."""

    step: int
    interrupted: bool
    seconds: float  # of the loop, before it was resumed as well
    earlier: float = 0.0  # of them, before it was resumed
    waiting: float | None = None  # share of the steps' time that went by until their data were there; None if unknown
    advice: str | None = None  # on what the last validation showed (``health.advice``)
    best: tuple[int, float] | None = None  # step and loss of the best validated checkpoint that is kept (main process only)


class Position:
    """The sampler's position: optimizer steps done."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]


@runtime_checkable
class Shared(Protocol):
    """Something of which every process has a part: all of them must call ``collect`` before one of them saves it."""

    def collect(self) -> None: ...


class Trainer:
    """Everything a run is made of, and the loop over it.

    ``weights`` are what is trained, if the caller has taken hold of them already. ``identity`` names what the run must not change
    under itself (reference, data, objective): it is written into every checkpoint and compared on resume. ``waiting`` is the
    watch of what loads the data (``PairLoader.waiting``).
    """

    def __init__(
        self,
        learner: Learner,
        policy: Policy,
        validation: Sequence[Batch],
        accelerator: Accelerator,
        output: Path | str,
        loop: LoopSettings,
        optimizer: OptimizerSettings,
        identity: Mapping[str, Any],
        report: Callable[[int, Mapping[str, float]], None] = lambda step, numbers: None,
        weights: TrainedWeights | None = None,
        waiting: Stopwatch | None = None,
        zero: Mapping[str, Any] | None = None,
    ) -> None:
        """``zero`` is a section of DeepSpeed's configuration (``updates_of``)."""
        self._learner, self._policy, output = learner, policy, Path(output)
        self._advice: str | None = None
        self._validated: tuple[int, float] | None = None  # the last validation's step and loss
        self._clock = Clock(waiting)
        self._waiting = self._clock.steps
        self._validation, self._report = validation if learner.validate else [], report
        if loop.keep_best and not self._validation:
            raise UserError(
                "keep_best needs a validation loss, and nothing is held out here, or pairs mean nothing to this objective."
            )
        self._accelerator, self._loop = accelerator, loop
        self._identity = {**identity, **({"rounds": loop.rounds} if loop.rounds else {})}
        parameters = list(policy.trainable_parameters())
        self._updates = updates_of(accelerator, policy.network, parameters, optimizer, zero)
        self._schedule = build_schedule(self._updates.optimizer, loop.steps, optimizer)
        self._position, self._random = Position(), RandomState(accelerator)
        self._saved: int | None = None  # the last step of which this process has seen a checkpoint written
        self._ema = Ema(parameters, loop.ema_decay) if loop.ema_decay else None
        self._checkpoints = Checkpoints(output / "checkpoints", loop.keep_checkpoints, loop.keep_best)
        self._metrics_file = output / "metrics.jsonl"
        weights = weights or TrainedWeights(accelerator.unwrap_model(policy.network))
        self._rounds = _rounds_of(loop, learner, weights, self._ema)
        self._stateful: dict[str, Stateful] = {
            "weights": weights,
            "optimizer": self._updates.saved,
            "schedule": self._schedule,
            "position": self._position,
            "random": self._random,
            **({"scaler": accelerator.scaler} if accelerator.scaler is not None else {}),  # fp16's; it also counts steps
            **({"ema": self._ema} if self._ema else {}),
            **({"rounds": self._rounds} if self._rounds else {}),
            **learner.stateful,
        }

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._position.step

    @property
    def ema(self) -> Ema | None:
        return self._ema

    # ------------------------------------------------------------------------------------------------------- resuming

    def save(self) -> None:
        """Write a checkpoint of this step (main process only; the others wait)."""
        for each in self._stateful.values():
            if isinstance(each, Shared):
                each.collect()
        with failing_together(ManyProcesses(self._accelerator)):
            if self._accelerator.is_main_process:
                # The clock's times are no state: what is restored is the same to the bit however long it took.
                note = {"identity": self._identity, "clock": self._clock.state_dict(), **self._validation_loss()}
                self._checkpoints.save(self.step, self._stateful, note)
        self._saved = self.step

    def _validation_loss(self) -> dict[str, float]:
        """The validation loss of this step, for a checkpoint's note; empty if there was no validation or it is not finite."""
        step, loss = self._validated or (None, math.nan)
        return {VALIDATION_LOSS: loss} if step == self.step and math.isfinite(loss) else {}

    def _best(self) -> tuple[int, float] | None:
        found = self._checkpoints.best() if self._accelerator.is_main_process else None
        return found and (step_of(found[0]), found[1])

    def resume(self) -> bool:
        """Go on from the newest checkpoint; False if there is none. All processes must call it, and it fails on all alike.

        Raises:
            UserError: processes see different checkpoints; or the newest was made with another reference, data set or objective,
                is damaged, or lies behind the last step of this run; or a line of ``metrics.jsonl`` is broken.
        """
        everyone = ManyProcesses(self._accelerator)
        path = self._newest_of_all(everyone)
        if path is None:
            return False
        with failing_together(everyone):
            self._load(path)
        return True

    def _load(self, path: Path) -> None:
        note = self._checkpoints.note(path)
        refuse_another_run(path, note["identity"], self._identity)
        if note["step"] > self._loop.steps:
            raise UserError(
                f"{path} is at step {note['step']} already, and the run is to have {self._loop.steps}. Resume with more steps, "
                "or take an earlier state: `diffalign export RUN --checkpoint STEP`."
            )
        self._checkpoints.load(path, self._stateful)
        self._clock.load_state_dict(note.get("clock", {}))
        self._forget_metrics_after(self.step)

    def _newest_of_all(self, everyone: Processes) -> Path | None:
        """The newest checkpoint, which must be the same for every process: they may be on machines with disks of their own."""
        with failing_together(everyone):
            path = self._checkpoints.latest()
            # A note has times in it, which no two runs share.
            mine = path and (path.name, sha256((path / NOTE).read_bytes()).hexdigest())
        seen = everyone.all_gather_object(mine)
        if any(one != seen[0] for one in seen):
            names = [one[0] if one else "none" for one in seen]
            raise UserError(
                f"Processes do not see the same newest checkpoint in {self._checkpoints.folder} (by rank: {', '.join(names)}). "
                "The output folder must be on a disk that all machines share; what others hold is of another run or out of date."
            )
        return path

    def _forget_metrics_after(self, step: int) -> None:
        """Drop lines of steps that will be done again."""
        if self._accelerator.is_main_process and self._metrics_file.exists():
            metrics_file.forget_after(self._metrics_file, step)

    def _forget_all_metrics(self) -> None:
        """Drop what a run measured here that never got to a checkpoint; the new one would write on in its last line."""
        if self._accelerator.is_main_process:
            self._metrics_file.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------------------- the loop

    def run(self) -> Finished:
        """Train to the last step, or until interrupted.

        Raises:
            NonFiniteLossError: a loss or gradient is not finite. The update is not made; the last checkpoint stays.
        """
        began = self.step
        self._metrics_file.parent.mkdir(parents=True, exist_ok=True)
        self._clock.begin()
        if self._rounds:
            self._rounds.begin()
        with Interruption() as interruption:
            if self.step == 0:
                self._forget_all_metrics()
                self.validate()
            self._waiting.data_requested()
            for micro_batches in self._learner.source.steps(self.step, self._loop.steps):
                tick = time.perf_counter()
                numbers, stop = self._optimizer_step(micro_batches, interruption)
                self._position.step += 1
                if self._rounds and self._rounds.stepped(self.step, last=self.step == self._loop.steps):
                    self._updates.weights_changed()
                numbers["seconds"] = time.perf_counter() - tick
                self._after_step(numbers | self._waiting.step_done())
                if stop or (interruption.requested and self._accelerator.num_processes == 1):
                    break
                self._waiting.data_requested()
        stopped_early = self.step < self._loop.steps
        if self.step > began and self.step != self._saved:
            self.save()
        clock = self._clock
        return Finished(self.step, stopped_early, clock.seconds, clock.earlier, clock.waiting, self._advice, self._best())

    def _after_step(self, numbers: Mapping[str, float]) -> None:
        last = self.step == self._loop.steps
        if self._is_due(self._loop.log_every) or last:
            self._log("train", numbers)
        saving = self._is_due(self._loop.checkpoint_every)
        if self._is_due(self._loop.validate_every) or last or (saving and self._loop.keep_best):
            self.validate()
        if saving:
            self.save()
        self._report(self.step, numbers)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _optimizer_step(self, micro_batches: Sequence[Batch], interruption: Interruption) -> tuple[dict[str, float], bool]:
        """One update from some micro-batches; the loss is the mean over all their samples.

        The host looks at the device once, when everything but the update is done. Also returned is whether one of the processes
        was interrupted by then.
        """
        outcomes, weights, samples = [], [], sum(len(batch) for batch in micro_batches)
        rate = self._updates.optimizer.param_groups[0]["lr"]
        for number, batch in enumerate(micro_batches, start=1):
            batch = batch.to(self._accelerator.device)
            with self._updates.accumulating(last=number == len(micro_batches)):
                outcome = checked(self._learner.losses(batch), batch.weight)
                loss = (batch.weight * outcome.loss).sum() / samples
                self._updates.backward(loss)
            outcomes.append(outcome)
            weights.append(batch.weight)
        norm = self._updates.clip_gradients()
        numbers = self._means(outcomes, weights, gradient_norm=norm, interrupted=float(interruption.requested))
        stop = numbers.pop("interrupted") > 0
        numbers["learning_rate"] = float(rate)
        self._refuse_non_finite(numbers, outcomes)
        self._updates.apply()
        if math.isfinite(numbers["gradient_norm"]):  # else fp16 has overflowed; a fused optimizer does not say that it skipped it
            self._schedule.step()
            if self._ema:
                self._ema.update()
        return numbers, stop

    def _means(self, outcomes: Sequence[Outcome], weights: Sequence[Tensor], **more: Tensor | float) -> dict[str, float]:
        """Means over all pairs of the step and of ``more``, on all processes: one transfer from the device.

        ``loss`` is on validation's scale, every pair counting the same; what is trained is ``weighted_loss``, where that is
        another number.
        """
        losses = [o.loss.detach() for o in outcomes]
        columns = {"loss": torch.cat(losses), WEIGHTED: torch.cat([w * o for w, o in zip(weights, losses, strict=True)])}
        for name in outcomes[0].metrics:
            columns[name] = torch.cat([o.metrics[name] for o in outcomes])
        table = [c.to(widest(c)).mean() for c in columns.values()] + [_scalar(v, columns["loss"]) for v in more.values()]
        means = self._accelerator.reduce(torch.stack(table), "mean").cpu()
        numbers = dict(zip([*columns, *more], means.tolist(), strict=True))
        if numbers[WEIGHTED] == numbers["loss"]:
            numbers.pop(WEIGHTED)
        return numbers

    def _refuse_non_finite(self, numbers: Mapping[str, float], outcomes: Sequence[Outcome]) -> None:
        trained = numbers.get(WEIGHTED, numbers["loss"])
        if math.isfinite(trained) and (math.isfinite(numbers["gradient_norm"]) or self._accelerator.scaler is not None):
            return
        where = f"Timesteps {torch.cat([o.t for o in outcomes]).tolist()}, margins" if outcomes[0].t is not None else "Margins"
        margins = [round(m, 4) for o in outcomes for m in o.metrics.get("margin", o.loss).tolist()]
        last = self._checkpoints.latest()
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise NonFiniteLossError(
            f"Step {self.step + 1}: loss {trained}, gradient norm {numbers['gradient_norm']}. "
            f"{where} {margins}. The update was not made; {kept}. "
            "Resuming comes to this step again. A lower learning rate, bf16 instead of fp16, or a look at these pairs may help: "
            "go on with it from what `diffalign export RUN --checkpoint latest` writes (--start-lora, or --model)."
        )

    # -------------------------------------------------------------------------------------------- validation and logs

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Metrics on the fixed pairs and draws, without dropout, overall and per timestep bin; empty without validation pairs."""
        if not self._validation:
            return {}
        with self._ema.applied() if self._ema else nullcontext(), without_dropout(self._policy.network):
            rows, t, columns = self._validation_columns()
        means = {name: float(values.double().mean()) for name, values in columns.items()}
        bins = health.by_timestep(t, columns, len(self._policy.schedule)) if t is not None else []
        error = health.error_over_pairs(columns["margin"], rows) if "margin" in columns else math.nan
        self._advice = health.advice(means, error) if self.step else None
        self._validated = self.step, means["loss"]
        self._log("validation", means, bins=bins, advice=self._advice)
        return means

    def _validation_columns(self) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Rows of the data set [N], timesteps [N] and every metric [N], of all processes."""
        accelerator = self._accelerator
        taken = turns(len(self._validation), accelerator.process_index, accelerator.num_processes)
        asked = [(self._validated_batch(self._validation[place]), mine) for place, mine in taken]
        outcomes = [outcome for (outcome, _), mine in asked if mine]
        rows = [row for (_, rows), mine in asked if mine for row in rows]
        numbers = _rows(outcomes) | ({ROW: rows} if outcomes else {})
        gathered = _joined(ManyProcesses(accelerator).all_gather_object(numbers))
        rows = torch.tensor(gathered.pop(ROW))
        t = torch.tensor(gathered.pop("t")) if "t" in gathered else None
        return rows, t, {name: torch.tensor(values, dtype=torch.float64) for name, values in gathered.items()}

    def _validated_batch(self, batch: Batch) -> tuple[Outcome, list[int]]:
        """The outcome of one batch and its rows of the data set; the batch leaves the device before the next one comes."""
        rows = batch.index.tolist()  # of the host's copy
        batch = batch.to(self._accelerator.device)
        return checked(self._learner.validate(batch), batch.weight), rows

    def _log(self, kind: str, numbers: Mapping[str, float], **more: Any) -> None:
        if self._accelerator.is_main_process:
            written = {name: value if math.isfinite(value) else None for name, value in numbers.items()}  # JSON has no infinity
            try:
                with self._metrics_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"kind": kind, "step": self.step, **written, **more}) + "\n")
            except OSError as error:
                raise disk_error(error, self._metrics_file) from error
        flat = {f"{kind}/{name}": value for name, value in numbers.items()}
        for b in more.get("bins", []):
            span = f"t{b['t_from']:04d}-{b['t_to']:04d}"
            flat |= {f"{kind}-{name}/{span}": b[name] for name in health.BINNED if name in b}
        self._accelerator.log(flat, step=self.step)


def checked(outcome: Outcome, weight: Tensor) -> Outcome:
    """An objective's word on samples of ``weight`` [B], if it has one loss and one of each metric for each of them.

    Raises:
        UserError: it has not. A loss of [B, 1] would meet the weights as [B, B], and every gradient would be B times too large.
            Or a metric is called as a column of the log is, which it would overwrite.
    """
    if taken := sorted(OF_THE_LOG & outcome.metrics.keys()):
        raise UserError(f"The objective calls metrics as the log calls columns of its own: {', '.join(taken)}. Rename them.")
    for name, numbers in {"loss": outcome.loss, **outcome.metrics}.items():
        if numbers.shape != weight.shape:
            raise UserError(
                f"The objective gave {name!r} of shape {list(numbers.shape)} for {len(weight)} samples; it should be "
                f"{list(weight.shape)}, one number for each."
            )
    return outcome


def _rounds_of(loop: LoopSettings, learner: Learner, weights: TrainedWeights, ema: Ema | None) -> LoopRounds | None:
    """What happens between rounds, if anything does. Raises UserError where no reference can be renewed."""
    if loop.round_reference == "round" and learner.reference is None:
        raise UserError(
            "round_reference is round, but this objective has no reference that the loop could renew: it compares with nobody, "
            "or has rounds of its own. Set round_reference to start."
        )
    if not loop.rounds:
        return None
    return LoopRounds(weights, loop.round_every, loop.extrapolation, learner.reference, ema)


def _scalar(value: Tensor | float, beside: Tensor) -> Tensor:
    """[], as wide as it gets, on the device of another tensor; a number is written there, which is no copy that the host would
    wait for."""
    if isinstance(value, Tensor):
        return sharding.plain(value.detach()).to(widest(beside)).reshape(())
    return torch.full((), value, dtype=widest(beside), device=beside.device)


def _rows(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """All numbers of all pairs, by name: one transfer from the device."""
    if not outcomes:
        return {}
    columns = {"loss": torch.cat([o.loss for o in outcomes])}
    columns |= {name: torch.cat([o.metrics[name] for o in outcomes]) for name in outcomes[0].metrics}
    if outcomes[0].t is not None:
        columns["t"] = torch.cat([o.t for o in outcomes])
    table = torch.stack([column.to(widest(column)) for column in columns.values()]).cpu()
    return dict(zip(columns, table.tolist(), strict=True))


def _joined(parts: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Every process's rows, one after another; a process may have had none."""
    names = next(part for part in parts if part)
    return {name: [value for part in parts for value in part.get(name, [])] for name in names}
