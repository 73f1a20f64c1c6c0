"""A whole training run of a prompt writer: from its settings to a trained writer with its model card and curves.

prepare   load the writer and the rewrites, measure distances
train     run the loop of ``diffalign.train``, as for image models
export    write a LoRA or a whole model with its tokenizer, model card, rewrites of held-out prompts, and ``summary.json``
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from diffalign import objectives
from diffalign.data.texts import validation_batches
from diffalign.optimisation import require_bitsandbytes
from diffalign.processes import ManyProcesses, failing_together
from diffalign.random_state import preserved_random_state
from diffalign.train import Finished, Trainer
from pipelines import run, shares
from pipelines.curves import draw_curves, read_metrics
from pipelines.outputs import write_json
from pipelines.prompts import held_out_prompts
from pipelines.run import Say
from pipelines.run_folder import METRICS_FILE, SUMMARY_FILE, OutputFolder, check_output, start_accelerator, to_yaml
from pipelines.writers import card, ingredients
from pipelines.writers.drift import Drift
from pipelines.writers.ingredients import PreparedTexts
from pipelines.writers.sampling import MAX_REWRITE_TOKENS, Decoding, candidates
from pipelines.writers.settings import COMMANDS, PromptTrainSettings
from pipelines.writers.writer import Writer

FAR = 0.1
"""The distance beyond which a winner counts as drifted, in reports."""


def build_trainer(
    name: str, settings: PromptTrainSettings, prepared: PreparedTexts, accelerator: Accelerator, report: Any
) -> Trainer:
    """The trainer of a run. ``report`` takes the metrics."""
    everyone = ManyProcesses(accelerator)
    context = ingredients.run_context(settings, prepared, everyone)
    return Trainer(
        learner=settings.objective.learner(context),
        policy=prepared.writer,
        validation=validation_batches(prepared.data, prepared.validation_rows, settings.batch.batch_size),
        accelerator=accelerator,
        output=settings.output,
        loop=settings.loop,
        optimizer=settings.optimizer,
        identity=run_identity(name, settings, prepared, everyone.world),
        report=report,
        weights=prepared.weights,
        waiting=context.texts.waiting,
    )


def run_identity(name: str, settings: PromptTrainSettings, prepared: PreparedTexts, world: int) -> dict[str, Any]:
    """The values that a resumed run must share with the run that wrote the checkpoint."""
    return {
        **settings_identity(name, settings, world),
        "reference": prepared.base_digest,
        "data": prepared.data_digest,
    }


def settings_identity(name: str, settings: PromptTrainSettings, world: int) -> dict[str, Any]:
    """The part of ``run_identity`` that is known before anything is loaded."""
    return {
        **run.identity(name, settings),
        "token_rewards": settings.data.token_rewards,
        "rows_per_step": rows_per_step(settings, world),
        **run.division(settings, world),
    }


def rows_per_step(settings: PromptTrainSettings, world: int) -> int:
    """Number of rows in an optimizer step, over all processes."""
    return settings.batch.batch_size * settings.batch.accumulation * world


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    name: str,
    settings: PromptTrainSettings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = print,
    progress: bool = True,
) -> Finished:
    """Run an objective from settings to the exported writer.

    Args:
        name: ``sem-dpo`` or ``prompt-sft``.
        settings: settings of the run.
        resume: continue from the newest checkpoint of the output folder.
        overwrite: replace a run in the output folder.
        say: prints a line.
        progress: whether to show progress bars.

    Raises:
        UserError: writer, rewrites, embedding, output folder or device cannot be used.
        NonFiniteLossError: the loss is not finite; the last checkpoint is untouched.
    """
    start = time.perf_counter()
    everyone, shown = shares.started(), []
    with failing_together(everyone):
        check_output(settings.output, resume=resume, overwrite=overwrite)
        if settings.optimizer.eight_bit:
            require_bitsandbytes()
        if settings.show.prompts:
            shown = [prompt.text for prompt in held_out_prompts(settings.show.prompts, settings.show.prompt_count)]
        accelerator = start_accelerator(settings)
        if resume:
            run.refuse_another_run(settings.output, settings_identity(name, settings, accelerator.num_processes))
    with preserved_random_state():  # only now, as Accelerate has given this process a GPU of its own
        say = say if accelerator.is_main_process else lambda _: None
        set_seed(settings.seed, device_specific=True)  # only dropout draws from it
        table, writer = ingredients.open_rewrites(settings), ingredients.load_writer(settings, say)
        writer.to(accelerator.device)
        with failing_together(everyone):
            before = _rewritten(settings, writer, shown) if everyone.rank == 0 else []
        prepared = ingredients.prepare(settings, table, writer, accelerator, say, progress)
        epochs = run.Epochs(rows_per_step(settings, accelerator.num_processes), len(prepared.train_rows))
        say(epochs.told(settings.loop.steps))
        folder = OutputFolder(settings.output, to_yaml(COMMANDS[name], settings), resume, overwrite)
        build = partial(build_trainer, name, settings, prepared, accelerator)
        trainer, finished = run.through_the_loop(build, settings, accelerator, folder, say=say, progress=progress)
        with failing_together(everyone):
            if everyone.rank == 0 and not finished.interrupted:
                finish(name, settings, prepared, trainer, epochs, shown, before, time.perf_counter() - start, say)
        return run.close(accelerator, finished, say)


def train_writer(
    name: str = "sem-dpo",
    *,
    recipe: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Train a prompt writer in one call: ``train_writer("sem-dpo", model="runs/sft", pairs="pairs.jsonl", output="runs/sem")``.

    Args:
        name: ``prompt-sft`` or ``sem-dpo``.
        recipe: a shipped recipe to start from.
        resume: continue from the newest checkpoint of the output folder.
        overwrite: replace a run in the output folder.
        progress: whether to show progress bars.
        options: any setting by its short name, as on the command line (``alpha=5``, ``learning_rate=1e-5``).

    Returns:
        The content of ``summary.json``.

    Raises:
        UserError: see ``train``; wrong options are named all at once.
        KeyboardInterrupt: the run was stopped; the same call with ``resume=True`` continues it.
    """
    settings = run.settings_of(name, recipe, options)
    finished = train(name, settings, resume=resume, overwrite=overwrite, progress=progress)
    return run.summary_of(settings.output, finished)


# -------------------------------------------------------------------------------------------------------------- export


def finish(
    name: str,
    settings: PromptTrainSettings,
    prepared: PreparedTexts,
    trainer: Trainer,
    epochs: run.Epochs,
    shown: list[str],
    before: list[list[str]],
    seconds: float,
    say: Say,
) -> None:
    """Export the writer with its curves, summary and model card."""
    writer = prepared.writer
    with trainer.ema.applied() if trainer.ema else nullcontext():
        write_result(settings, writer)
        after = _rewritten(settings, writer, shown)
    say(f"saved {settings.output}")
    rewrites = [{"prompt": p, "before": b[0], "after": a[0]} for p, b, a in zip(shown, before, after, strict=True)]
    summary = {
        "objective": name,
        "model": settings.model,
        "rewrites": settings.pairs,
        "adapter": settings.adapter,
        "steps": trainer.step,
        "epochs": round(epochs.after(trainer.step), 4),
        "seconds": round(seconds, 1),
        "fingerprint": {"reference": prepared.base_digest, "data": prepared.data_digest},
        "rows": dict(prepared.counts),
        "validation": _last_validation(settings.output / METRICS_FILE),
        "weights": _weights(prepared.drift),
        "rewritten": rewrites,
    }
    if prepared.drift is not None:
        prepared.drift.write(settings.output)
    write_json(settings.output / SUMMARY_FILE, summary)
    curves = draw_curves(settings.output / METRICS_FILE, settings.output / "curves.png")
    card.write(settings, summary, curves, paper=f"arXiv {objectives.load(name).ABOUT.paper}", writer=writer)


def write_result(settings: PromptTrainSettings, writer: Writer) -> None:
    """Write the adapter or the whole model with its present parameters into the output folder."""
    if settings.adapter == "lora":
        writer.save_adapter(settings.output)
    else:
        writer.save(settings.output)


def _rewritten(settings: PromptTrainSettings, writer: Any, prompts: list[str]) -> list[list[str]]:
    """A rewrite of each prompt, as long as the rewrites in training at most."""
    longest = min(settings.data.max_rewrite_tokens, MAX_REWRITE_TOKENS)
    decoding = Decoding(max_rewrite_tokens=longest)
    return candidates(writer, prompts, decoding=decoding, seed=settings.seed) if prompts else []


def _last_validation(metrics: Path) -> dict[str, float] | None:
    rows = read_metrics(metrics)["validation"]
    return {k: v for k, v in rows[-1].items() if isinstance(v, float)} if rows else None


def _weights(drift: Drift | None) -> dict[str, Any] | None:
    """The drift of the training data's winners, plain and as Sem-DPO's weights see it, and its bound."""
    if drift is None:
        return None
    return {"alpha": drift.alpha, "embedding": drift.embedding, "delta": FAR, **vars(drift.predicted_drift(FAR))}
