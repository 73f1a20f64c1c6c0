"""A whole run: settings in, an aligned checkpoint, its card and its comparison with the base out.

prepare   model, pairs, cache of latents and prompt embeddings; the encoders leave memory
train     the loop of ``diffalign.train``
export    a Diffusers folder or LoRA, model card, pictures, ``summary.json``
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from diffalign import objectives
from diffalign.errors import UserError
from diffalign.optimisation import require_bitsandbytes
from diffalign.processes import ManyProcesses, OneProcess, Processes, failing_together
from diffalign.random_state import preserved_random_state
from diffalign.train import Finished, Trainer
from diffalign.weights import TrainedWeights
from pipelines import config, devices, families, ingredients, memory_presets, own_judges, previews, run, shares
from pipelines.curves import draw_curves
from pipelines.evaluation import evaluate, load_panel
from pipelines.families import _quantised
from pipelines.families._origin import BaseLora
from pipelines.families._sources import find_loras
from pipelines.image_settings import EvaluationSettings, TrainSettings, remarks
from pipelines.ingredients import Prepared, pairs_per_step
from pipelines.judge_options import load_judges
from pipelines.model_card import SAMPLES, write_model_card
from pipelines.outputs import write_json
from pipelines.own_judges import OwnJudge
from pipelines.progress import Bar
from pipelines.prompts import held_out_prompts
from pipelines.run import Say
from pipelines.run_folder import METRICS_FILE, SUMMARY_FILE, OutputFolder, check_output, start_accelerator, to_yaml
from pipelines.sampling import SAMPLING_FILE
from pipelines.tiny.shipped import CHECKPOINTS
from reward_models._judge import Scorer

# ------------------------------------------------------------------------------------------------------------- prepare


def preflight(settings: TrainSettings) -> None:
    """Check everything that can be checked before anything is loaded.

    Raises:
        UserError: rollouts or LoRAs that cannot be read, a package or device that is asked for and not there.
    """
    for check in preflight_checks(settings):
        check()


def preflight_checks(settings: TrainSettings) -> Iterator[Callable[[], Any]]:
    """The checks one by one, for callers that collect all mistakes."""
    yield partial(ingredients.open_feedback, settings)
    if settings.base_lora:
        yield partial(find_loras, settings.base_lora)
    yield partial(_refuse_idle_configuration, settings)
    yield partial(ingredients.start_adapter, settings)
    if settings.optimizer.eight_bit:
        yield require_bitsandbytes
    yield partial(_quantised.require, settings.compute.quantise)
    yield partial(_refuse_fp16_on_a_cpu, settings.compute.mixed_precision)
    yield partial(_refuse_tf32_elsewhere, settings.compute.tf32)


def _refuse_idle_configuration(settings: TrainSettings) -> None:
    if settings.single_file_config and (settings.model in CHECKPOINTS or Path(settings.model).expanduser().is_dir()):
        raise UserError(f"single_file_config: is about a single file, and {settings.model} is a folder; leave it out.")


def _refuse_fp16_on_a_cpu(precision: str) -> None:
    if precision == "fp16" and not torch.accelerator.is_available():
        raise UserError("compute.mixed_precision is fp16, which needs a GPU; on a CPU use bf16 or no.")


def _refuse_tf32_elsewhere(asked: bool) -> None:
    if asked and not torch.cuda.is_available():
        raise UserError("compute.tf32 is about NVIDIA GPUs, and there is none here: leave it out.")


def check_judges(settings: TrainSettings, judge: OwnJudge | None = None, everyone: Processes | None = None) -> None:
    """Load every judge and let it go, before the model is loaded. Accelerate must have begun, or all processes of a machine would
    take the first GPU for their own. Those of the comparison are loaded where they will work, in the main process.

    Raises:
        UserError: an unknown judge, prompts that cannot be read, or a judge that cannot do what it is asked for.
    """
    everyone, comparison = everyone or OneProcess(), settings.evaluation
    with failing_together(everyone):
        if everyone.rank == 0 and comparison.prompts:
            load_panel(_judges(comparison), held_out_prompts(comparison.prompts, comparison.prompt_count))
        ingredients.training_judges(settings, judge)


def _judges(settings: EvaluationSettings) -> dict[str, Scorer]:
    return load_judges(",".join(settings.judges), settings.judge_options)


# --------------------------------------------------------------------------------------------------------------- train


def build_trainer(name: str, settings: TrainSettings, prepared: Prepared, accelerator: Accelerator, report: Callable) -> Trainer:
    """The trainer of a run."""
    everyone = ManyProcesses(accelerator)
    context = ingredients.run_context(settings, prepared, everyone, accelerator.device)
    return Trainer(
        learner=settings.objective.learner(context),
        policy=prepared.family.denoiser,
        validation=prepared.validation,
        accelerator=accelerator,
        output=settings.output,
        loop=settings.loop,
        optimizer=settings.optimizer,
        identity=run_identity(name, settings, prepared, everyone.world),
        report=report,
        weights=prepared.weights,
        waiting=context.pairs.waiting if context.pairs else None,
        zero=devices.zero(accelerator),
    )


def run_identity(name: str, settings: TrainSettings, prepared: Prepared, world: int) -> dict[str, Any]:
    """Identity of a run: what a resumed run must share with the one that wrote the checkpoint."""
    return {
        **settings_identity(name, settings, world),
        "reference": prepared.base_digest,
        "data": prepared.data_digest,
        "start_lora": prepared.start_lora,
        **({"cached_errors": prepared.cached_errors.fingerprint} if prepared.cached_errors else {}),
        **own_judge_identity(prepared.own_judge),
        **base_loras(prepared.family.origin.base_loras),
    }


def settings_identity(name: str, settings: TrainSettings, world: int) -> dict[str, Any]:
    """The part of it that is known before anything is loaded."""
    tree = config.as_tree(settings)
    return {
        **run.identity(name, settings),
        **({"quantise": settings.compute.quantise} if settings.compute.quantise != _quantised.NONE else {}),
        "error_as": settings.error_as,
        "judges": {"scores": settings.data.scores, **tree["reward"], "rollout_batch": None},
        "pairs_per_step": pairs_per_step(settings, world),
        **run.division(settings, world, settings.data.buckets),
    }


def own_judge_identity(judge: OwnJudge | None) -> dict[str, Any]:
    """Identity of a judge of the user's own, which the settings cannot name."""
    return {} if judge is None else {"judge": f"{own_judges.name_of(judge)} {own_judges.judge_digest(judge)}"}


def base_loras(found: Sequence[BaseLora]) -> dict[str, list[str]]:
    """The LoRAs that are part of the frozen start, by their digests; nothing where there are none."""
    return {"base_loras": [lora.sha256 for lora in found]} if found else {}


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    name: str,
    settings: TrainSettings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = print,
    progress: bool = True,
    judge: OwnJudge | None = None,
) -> Finished:
    """Run an objective from settings to the exported result.

    Args:
        name: an objective of ``diffalign.objectives``, such as ``diffusion-dpo``.
        resume: go on from the newest checkpoint of the output folder.
        overwrite: replace the run that is there.
        judge: a judge of the caller's own (see ``align``), in place of those that the settings name.

    Raises:
        UserError: model, data, output folder or device are not as they should be.
        NonFiniteLossError: training blew up; the last checkpoint is untouched.
    """
    start = time.perf_counter()
    everyone = shares.started()
    with failing_together(everyone):
        check_output(settings.output, resume=resume, overwrite=overwrite)
        settings, switched = memory_presets.applied(settings)
        preflight(settings)
        accelerator = start_accelerator(settings)
    # not before Accelerate has given this process a GPU of its own
    with preserved_random_state(), devices.products_in_tf32(settings.compute.tf32):
        with failing_together(everyone):
            if resume:
                known = settings_identity(name, settings, accelerator.num_processes) | own_judge_identity(judge)
                run.refuse_another_run(settings.output, known)
            previews.prompts_of(settings)
        check_judges(settings, judge, everyone)
        say = say if accelerator.is_main_process else lambda _: None
        set_seed(settings.seed, device_specific=True)  # only dropout draws from it; pairs, t and noise have seeds of their own
        slow = devices.slow_products(accelerator, settings.compute.tf32)
        for remark in [*remarks(settings), *([switched] if switched else []), *([slow] if slow else [])]:
            say(remark)
        folder = OutputFolder(settings.output, to_yaml(f"train {name}", settings), resume, overwrite)
        trained = _train_and_export(name, settings, accelerator, folder, say, progress, judge)
        accelerator.free_memory()
        with failing_together(everyone):  # and leaving together: NCCL takes its groups apart with everybody
            if accelerator.is_main_process and not trained.finished.interrupted:
                finish(name, settings, trained, time.perf_counter() - start, say, progress)
        return run.close(accelerator, trained.finished, say)


@dataclass(frozen=True)
class Trained:
    """The facts about a training that its summary and card need after the networks are freed."""

    finished: Finished
    epochs: run.Epochs | None  # None where an objective samples for itself
    base_digest: str
    data_digest: str
    base_loras: list[BaseLora]
    stats: dict[str, Any]
    pipeline_class: str
    left_out: tuple[str, ...]  # parts that the pipeline is without


def _train_and_export(
    name: str,
    settings: TrainSettings,
    accelerator: Accelerator,
    folder: OutputFolder,
    say: Say,
    progress: bool,
    judge: OwnJudge | None,
) -> Trained:
    """Run everything that needs the networks, which are freed on return: what follows needs the memory."""
    family, table = ingredients.load_model(settings, say), ingredients.open_data(settings)
    everyone = ManyProcesses(accelerator)
    with failing_together(everyone):
        if everyone.rank == 0:
            folder.mark()
    prepared = ingredients.prepare(settings, table, family, accelerator, say, progress, judge, folder.overwrite)
    epochs = None
    if len(prepared.train_rows):
        epochs = run.Epochs(pairs_per_step(settings, accelerator.num_processes), len(prepared.train_rows))
        say(epochs.told(settings.loop.steps))
    build, shown = partial(build_trainer, name, settings, prepared, accelerator), None
    if prepared.previews is not None:
        shown = previews.Previews(settings, prepared.family, prepared.previews, accelerator, say)
    how = {"say": say, "progress": progress, **({"before": shown.begin} if shown else {})}
    trainer, finished = run.through_the_loop(shown.beside(build) if shown else build, settings, accelerator, folder, **how)
    if not finished.interrupted:
        with trainer.ema.applied() if trainer.ema else nullcontext():
            prepared.weights.collect()
            with failing_together(everyone):
                if everyone.rank == 0:
                    write_result(settings, family, prepared.weights)
        say(f"saved {settings.output}")
    loras = family.origin.base_loras
    of_pipeline = family.pipeline_class, family.left_out
    return Trained(finished, epochs, prepared.base_digest, prepared.data_digest, loras, prepared.stats(), *of_pipeline)


def align(
    name: str,
    *,
    recipe: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    judge: OwnJudge | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The main job in one call: ``align("diffusion-dpo", recipe="tiny", output="runs/first", steps=100)``.

    Args:
        name: the objective.
        recipe: a shipped recipe to start from.
        judge: your own, in place of one with a name (``reward="pickscore"``): a ``reward_models.PointwiseJudge``, or several
            combined, to reward what is sampled, or to score the pairs of ``smpo``; for what is sampled also a function from
            pictures [N, 3, H, W] in [0, 1] and their N prompts to N rewards, larger is better.
        options: any setting by its short name, as on the command line (``learning_rate=1e-4``, ``rank=8``).

    Returns:
        What ``summary.json`` holds.

    Raises:
        UserError: as ``train``; mistakes in the options all at once.
        KeyboardInterrupt: the run was stopped; the same call with ``resume=True`` goes on.
    """
    if judge is not None:
        own_judges.check(judge)
        if "reward" in options:
            raise UserError("judge takes the place of named judges, and reward names judges: give one of them.")
        options["reward"] = (own_judges.name_of(judge),)  # for the record
    settings = run.settings_of(name, recipe, options)
    finished = train(name, settings, resume=resume, overwrite=overwrite, progress=progress, judge=judge)
    return run.summary_of(settings.output, finished)


# -------------------------------------------------------------------------------------------------------------- export


def finish(name: str, settings: TrainSettings, trained: Trained, seconds: float, say: Say, progress: bool = True) -> None:
    """Write curves, summary and card; compare the result with its base, and write summary and card again.

    Raises:
        UserError: the comparison does not fit into the memory. What was trained is complete without it.
    """
    _write_record(name, settings, trained, seconds, {})
    if settings.evaluation.prompts:
        _write_record(name, settings, trained, seconds, _compare(settings, say, progress))


def _write_record(name: str, settings: TrainSettings, trained: Trained, seconds: float, scores: dict[str, Any]) -> None:
    """Summary, curves and card; ``scores`` is what the comparison found, empty without one."""
    how = _like_training(settings)
    summary = {
        "objective": name,
        "model": settings.model,
        "base_lora": str(settings.base_lora) if settings.base_lora else None,
        "start_lora": str(settings.start_lora) if settings.start_lora else None,
        "pairs": settings.pairs,
        "train_prompts": settings.train_prompts,
        "feedback": str(settings.feedback) if settings.feedback else None,
        "adapter": settings.adapter,
        "steps": trained.finished.step,
        **({"epochs": round(trained.epochs.after(trained.finished.step), 4)} if trained.epochs else {}),
        "seconds": round(seconds + trained.finished.earlier + scores.get("seconds", 0.0), 1),
        "seconds_training": round(trained.finished.seconds, 1),
        **run.of_the_loop(trained.finished),
        "fingerprint": {"reference": trained.base_digest, "data": trained.data_digest, **base_loras(trained.base_loras)},
        **{key: scores[key] for key in ("prompts", "judges", "faithfulness", "notes") if key in scores},
        **({"compared_in": {key: how[key] for key in ("dtype", "quantise")}} if scores else {}),
    }
    write_json(settings.output / SUMMARY_FILE, summary)
    curves = draw_curves(settings.output / METRICS_FILE, settings.output / "curves.png")
    _card(name, settings, trained, scores, curves)


def write_result(settings: TrainSettings, family: Any, weights: TrainedWeights) -> None:
    """The adapter, or the whole pipeline, as the parameters are now, into the output folder."""
    if settings.adapter == "lora":
        family.save_adapter(settings.output)
    else:
        family.save_pipeline(settings.output, weights.state_dict() if weights.sharded else None)
        advice = Path(family.origin.place) / SAMPLING_FILE
        if advice.is_file():
            shutil.copyfile(advice, settings.output / SAMPLING_FILE)


def _compare(settings: TrainSettings, say: Say, progress: bool) -> dict[str, Any]:
    """The comparison with the base, in ``evaluation/``; the pictures side by side also become the card's."""
    e, folder = settings.evaluation, settings.output / "evaluation"
    with Bar(progress, "picture") as bar, _enough_memory(settings):
        result = evaluate(
            base_of(settings),
            str(settings.output),
            held_out_prompts(e.prompts, e.prompt_count),
            _judges(e),
            folder,
            load=partial(_load, settings),
            seed=settings.seed,
            steps=e.sampling_steps,
            guidance_scale=e.guidance_scale,
            batch_size=e.sampling_batch,
            overwrite=True,
            progress=bar.advance,
        )
    shutil.copyfile(folder / "side_by_side.png", settings.output / SAMPLES)
    say(result.to_text())
    return result.values


@contextmanager
def _enough_memory(settings: TrainSettings) -> Iterator[None]:
    """A context in which running out of the device's memory becomes a UserError with advice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"The result is saved in {settings.output}, but its comparison with the base does not fit into the device's memory "
            f"({str(error).splitlines()[0]}). Compare later, where nothing else is on the device: {_compared_later(settings)}"
        ) from error


def _compared_later(settings: TrainSettings) -> str:
    """The command for the same comparison by itself, one picture at a time; its prompts are left beside the result."""
    e, how, prompts = settings.evaluation, _like_training(settings), settings.output / "evaluation-prompts.jsonl"
    asked = held_out_prompts(e.prompts, e.prompt_count)
    prompts.write_text("".join(json.dumps({"prompt": prompt.text}) + "\n" for prompt in asked), encoding="utf-8")
    given = {
        "--base": settings.model,
        "--base-lora": settings.base_lora,
        "--tuned": settings.output,
        "--prompts": prompts,
        "--judges": ",".join(e.judges),
        "--steps": e.sampling_steps,
        "--guidance-scale": e.guidance_scale,
        "--seed": settings.seed,
        "--dtype": how["dtype"],
        "--quantise": how["quantise"],
        "--without": ",".join(settings.without),
        "--single-file-config": settings.single_file_config,
        "--batch-size": 1,
        "--out": settings.output / "evaluation-later",
    }
    options = [word for name, value in given.items() if value not in (None, "", ()) for word in (name, str(value))]
    judges = ["--judge-options", *e.judge_options] if e.judge_options else []
    return shlex.join(["diffalign", "evaluate", *options, *judges, "--offload"])


def base_of(settings: TrainSettings) -> str:
    """Name of the model that the result is compared with."""
    return f"{settings.model} with {settings.base_lora.name}" if settings.base_lora else settings.model


def _load(settings: TrainSettings, name: str) -> Any:
    """Load one of the two models that are compared; the result's folder records what it was trained on top of."""
    how = {"config": settings.single_file_config, "without": settings.without, **_like_training(settings)}
    if name != base_of(settings):
        return families.load_pipeline(name, **how)
    return families.load_pipeline(settings.model, **how, base_lora=settings.base_lora)


def _like_training(settings: TrainSettings) -> dict[str, Any]:
    """Options that sample with no more memory than training had: in its precision, idle parts offloaded to the CPU."""
    compute = settings.compute
    return {"dtype": run.PRECISIONS[compute.mixed_precision], "offload": True, "quantise": compute.quantise}


def _card(name: str, settings: TrainSettings, trained: Trained, scores: dict[str, Any], curves: Path | None) -> None:
    keys = ("win_rate", "win_rate_interval", "sign_test_p")
    table = {
        judge: {"base": r["base"]["mean"], "tuned": r["tuned"]["mean"], **{k: r[k] for k in keys}}
        for judge, r in scores.get("judges", {}).items()
    }
    write_model_card(
        settings.output,
        objective=name,
        paper=f"arXiv {objectives.load(name).ABOUT.paper}",
        base=settings.model,
        base_loras=[lora.path for lora in trained.base_loras],
        recipe=config.as_tree(settings),
        data={
            "source": str(settings.feedback or settings.pairs or settings.train_prompts),
            **trained.stats,
            "fingerprint": trained.data_digest,
        },
        scores=table or None,
        curves=curves,
        pipeline_class=trained.pipeline_class,
        left_out=trained.left_out,
    )
