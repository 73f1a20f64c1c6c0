"""A whole run: settings in, an aligned checkpoint, its card and its comparison with the base out.

prepare   model, pairs, cache of latents and prompt embeddings; the encoders leave memory
train     the loop of ``diffalign.train``
export    a Diffusers folder or LoRA, model card, pictures, ``summary.json``
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed

from diffalign import objectives
from diffalign.data.cache import PairCache, build_cache
from diffalign.data.loader import LoaderSettings, PairLoader, validation_batches
from diffalign.data.open import open_pairs
from diffalign.data.table import PairTable
from diffalign.data.transform import Transform
from diffalign.errors import UserError
from diffalign.optimisation import require_bitsandbytes
from diffalign.protocols import Predictor
from diffalign.references import AdapterOff, Frozen
from diffalign.train import Finished, Trainer
from pipelines import config, families
from pipelines.config import EvaluationSettings, TrainSettings
from pipelines.curves import draw_curves
from pipelines.evaluation import evaluate, load_panel
from pipelines.export import SAMPLES, write_model_card
from pipelines.families._encoding import digest
from pipelines.judge_options import load_judges
from pipelines.outputs import write_json
from pipelines.progress import Bar, TrainingBar
from pipelines.prompts import Prompt, read_prompts
from pipelines.sampling import SAMPLING_FILE
from pipelines.tiny.model import pairs_path as tiny_pairs_path
from reward_models._judge import Scorer

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
METRICS_FILE = "metrics.jsonl"
CACHE_FOLDER = "cache"
PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """What training needs and nothing else: encoders are gone by now."""

    family: Any
    cache: PairCache
    reference: Predictor
    base_digest: str  # of the network before alignment: the reference's identity
    train_rows: list[int]
    validation_rows: list[int]


# ---------------------------------------------------------------------------------------------------------- the folder


def check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Whether a run may write into ``output``. A folder in which a run never got to a checkpoint counts as free.

    Raises:
        UserError: it holds another run, or something that is no run at all, and neither option allows going on.
    """
    if output.is_file():
        raise UserError(f"{output} is a file; the output should be a folder.")
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


def claim_output(output: Path, text: str, *, resume: bool, overwrite: bool) -> None:
    """Make the folder ours: an older run is removed if it may be (its cache stays), ``text`` becomes the configuration."""
    if overwrite and output.is_dir():
        for entry in output.iterdir():
            if entry.name != CACHE_FOLDER:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    output.mkdir(parents=True, exist_ok=True)
    if not (resume and (output / CONFIG_FILE).is_file()):
        (output / CONFIG_FILE).write_text(text)


def to_yaml(objective: str, settings: TrainSettings) -> str:
    """The resolved configuration; ``diffalign train OBJECTIVE --config`` reads it back."""
    import yaml

    return f"# diffalign train {objective}\n" + yaml.safe_dump(config.as_tree(settings), sort_keys=False)


# ------------------------------------------------------------------------------------------------------------- prepare


def preflight(settings: TrainSettings) -> None:
    """Everything that can be known to be wrong before a model is loaded.

    Raises:
        UserError: an unknown judge, prompts that cannot be read, a package or device that is asked for and not there.
    """
    e, compute = settings.evaluation, settings.compute
    if e.prompts and not e.judges:
        raise UserError(
            "evaluation.prompts is set, but evaluation.judges is empty: name a judge (--judges oracle), or set prompts to none."
        )
    if e.prompts:
        load_panel(_judges(e), held_out_prompts(e.prompts, e.prompt_count))
    if settings.optimiser.eight_bit:
        require_bitsandbytes()
    if compute.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("compute.mixed_precision is fp16, which needs a GPU; on a CPU use bf16 or no.")


def _judges(settings: EvaluationSettings) -> dict[str, Scorer]:
    return load_judges(",".join(settings.judges), settings.judge_options)


def open_data(settings: TrainSettings) -> PairTable:
    """The pairs, not yet decoded."""
    data = settings.data
    return open_pairs(pairs_path(settings.pairs), split=data.split, ties=data.ties, columns=data.columns)


def load_model(settings: TrainSettings, say: Say) -> Any:
    """The checkpoint as something to train."""
    dtype = PRECISIONS[settings.compute.mixed_precision] if settings.adapter == "lora" else "float32"
    expected = None if settings.prediction_type == "auto" else settings.prediction_type
    family = families.load_family(settings.model, dtype=dtype, prediction_type=expected, config=settings.single_file_config)
    say(f"{settings.model}: {family.name}, {family.denoiser.schedule.prediction_type} prediction, {dtype}")
    return family


def prepare(
    settings: TrainSettings, table: PairTable, family: Any, accelerator: Accelerator, say: Say, progress: bool = True
) -> Prepared:
    """Encode the pairs (or open the cache), let go of the encoders, attach what is trained."""
    cache = _encode(settings, table, family, accelerator, say, progress)
    family.release_encoders()
    base_digest = digest(family.network)
    train_rows, validation_rows = split_rows(cache.prompts, settings.data.validation_pairs, settings.seed)
    say(f"{len(train_rows)} pairs to train on, {len(validation_rows)} for validation, {len(cache.skipped)} skipped")
    reference = _attach(settings, family, accelerator)
    return Prepared(family, cache, reference, base_digest, train_rows, validation_rows)


def _encode(
    settings: TrainSettings, table: PairTable, family: Any, accelerator: Accelerator, say: Say, progress: bool
) -> PairCache:
    data = settings.data
    say(table.description)
    transform = Transform(data.resolution or family.resolution, data.crop, data.flip, settings.seed)
    folder = data.cache or settings.output / CACHE_FOLDER
    with accelerator.main_process_first(), Bar(progress and accelerator.is_main_process) as bar:
        family.encoder.to(accelerator.device)
        cache = build_cache(
            table,
            family.encoder,
            folder,
            transform,
            batch_size=data.encode_batch,
            max_unreadable=data.max_unreadable,
            progress=bar.advance,
        )
    for origin, reason in cache.skipped[:10]:
        say(f"skipped {origin}: {reason}")
    cut = family.truncated(sorted(set(cache.prompts)))
    if cut:
        say(f"{len(cut)} prompts are too long for the text encoder; of {cut[0].prompt!r} it does not see {cut[0].lost!r}")
    return cache


def pairs_path(pairs: str) -> str:
    """``tiny`` names the shipped pairs; anything else is taken as it is."""
    return str(tiny_pairs_path()) if pairs == "tiny" else pairs


def split_rows(prompts: list[str], validation_pairs: int, seed: int) -> tuple[list[int], list[int]]:
    """Rows for training and for validation; a prompt is in one of them only, and at most half of the rows are held out."""
    wanted = min(validation_pairs, len(prompts) // 2)
    rows_of: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(prompt, []).append(row)
    order = np.random.default_rng([seed, 7]).permutation(len(rows_of))
    groups, held_out = list(rows_of.values()), set()
    for k in order:
        if len(held_out) + len(groups[k]) <= wanted:
            held_out.update(groups[k])
    return [r for r in range(len(prompts)) if r not in held_out], sorted(held_out)


def _attach(settings: TrainSettings, family: Any, accelerator: Accelerator) -> Predictor:
    """Make parameters trainable, place everything on the device, and return the reference."""
    compute, lora = settings.compute, settings.lora
    frozen = None
    if settings.adapter == "lora":
        family.attach_lora(rank=lora.rank, alpha=lora.alpha, targets=lora.targets, dropout=lora.dropout, seed=settings.seed)
    else:
        frozen = family.frozen_copy(getattr(torch, PRECISIONS[compute.mixed_precision]))
        family.train_fully()
    family.set_attention(compute.attention)
    family.set_channels_last(compute.channels_last)
    family.set_gradient_checkpointing(compute.gradient_checkpointing)
    family.network.to(accelerator.device).train()
    family.denoiser = family.denoiser.with_network(accelerator.prepare_model(family.network))
    if frozen is None:
        return AdapterOff(family.denoiser)
    frozen.network.to(accelerator.device)
    return Frozen(frozen)


# --------------------------------------------------------------------------------------------------------------- train


def build_trainer(name: str, settings: TrainSettings, prepared: Prepared, accelerator: Accelerator, report: Callable) -> Trainer:
    """The trainer of a run."""
    family, cache = prepared.family, prepared.cache
    loader_settings = LoaderSettings(
        batch_size=settings.batch.batch_size,
        accumulation=settings.batch.accumulation,
        seed=settings.seed,
        prompt_dropout=settings.data.prompt_dropout,
        flip=settings.data.flip,
        latent_mode=settings.data.latents == "mode",
        train_steps=len(family.denoiser.schedule),
    )
    rank, world = accelerator.process_index, accelerator.num_processes
    return Trainer(
        objective=settings.objective,
        policy=family.denoiser,
        reference=prepared.reference,
        loader=PairLoader(cache, prepared.train_rows, loader_settings, rank, world),
        validation=validation_batches(cache, prepared.validation_rows, loader_settings, settings.data.validation_draws),
        accelerator=accelerator,
        output=settings.output,
        loop=settings.loop,
        optimiser=settings.optimiser,
        identity=run_identity(name, settings, prepared, world),
        report=report,
    )


def run_identity(name: str, settings: TrainSettings, prepared: Prepared, world: int) -> dict[str, Any]:
    """What a resumed run must share with the one that wrote the checkpoint."""
    tree = config.as_tree(settings)
    return {
        "objective": name,
        "objective_settings": tree["objective"],
        "reference": prepared.base_digest,
        "data": data_digest(prepared.cache),
        "adapter": settings.adapter,
        "lora": tree["lora"] if settings.adapter == "lora" else None,
        "optimiser": tree["optimiser"],
        "steps": settings.loop.steps,
        "pairs_per_step": settings.batch.batch_size * settings.batch.accumulation * world,
        "seed": settings.seed,
    }


def data_digest(cache: PairCache) -> str:
    """One short name for everything the encoded pairs depend on."""
    return hashlib.sha256(json.dumps(cache.fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def start_accelerator(settings: TrainSettings) -> Accelerator:
    """Accelerate, with the tracker asked for."""
    tracker = settings.compute.tracker
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))  # the others wait while one process fills the cache
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # unless told, Accelerate starts no process group on a CPU under torchrun
        kwargs_handlers=[patience],
        mixed_precision=settings.compute.mixed_precision,
        log_with=None if tracker == "none" else tracker,
        project_config=ProjectConfiguration(project_dir=str(settings.output), logging_dir=str(settings.output)),
    )


def train(
    name: str, settings: TrainSettings, *, resume: bool = False, overwrite: bool = False, say: Say = print, progress: bool = True
) -> Finished:
    """Run an objective from settings to the exported result.

    Args:
        name: an objective of ``diffalign.objectives``, such as ``diffusion-dpo``.
        resume: go on from the newest checkpoint of the output folder.
        overwrite: replace the run that is there.

    Raises:
        UserError: model, data, output folder or device are not as they should be.
        NonFiniteLossError: training blew up; the last checkpoint is untouched.
    """
    start = time.perf_counter()
    check_output(settings.output, resume=resume, overwrite=overwrite)
    preflight(settings)
    accelerator = start_accelerator(settings)
    say = say if accelerator.is_main_process else lambda _: None
    set_seed(settings.seed, device_specific=True)  # only dropout draws from it; pairs, t and noise have seeds of their own
    family, table = load_model(settings, say), open_data(settings)
    accelerator.wait_for_everyone()  # every process has checked the folder before one of them fills it
    if accelerator.is_main_process:
        claim_output(settings.output, to_yaml(name, settings), resume=resume, overwrite=overwrite)
    prepared = prepare(settings, table, family, accelerator, say, progress)
    if accelerator.log_with:
        accelerator.init_trackers(settings.compute.tracker)
    with TrainingBar(progress and accelerator.is_main_process, "step") as bar:
        trainer = build_trainer(name, settings, prepared, accelerator, partial(bar.update, steps=settings.loop.steps))
        if resume and trainer.resume():
            say(f"resumed at step {trainer.step}")
        bar.start(trainer.step, settings.loop.steps)
        finished = trainer.run()
    if accelerator.is_main_process and not finished.interrupted:
        finish(name, settings, prepared, trainer, time.perf_counter() - start, say, progress)
    accelerator.end_training()
    if finished.interrupted:
        say(f"Interrupted at step {finished.step}; a checkpoint was written. Go on with --resume.")
    return finished


def align(
    name: str, *, recipe: str | None = None, resume: bool = False, overwrite: bool = False, progress: bool = True, **options: Any
) -> dict[str, Any]:
    """The main job in one call: ``align("diffusion-dpo", recipe="tiny", output="runs/first", steps=100)``.

    Args:
        name: the objective.
        recipe: a shipped recipe to start from.
        options: any setting by its short name, as on the command line (``learning_rate=1e-4``, ``rank=8``).

    Returns:
        What ``summary.json`` holds.

    Raises:
        UserError: as ``train``; mistakes in the options all at once.
    """
    from pipelines import recipes

    objective = objectives.load(name).Objective
    base = recipes.load(name, recipe) if recipe else {}
    settings = config.resolve(config.merge(base, config.placed(options, objective)), objective)
    train(name, settings, resume=resume, overwrite=overwrite, progress=progress)
    return json.loads((settings.output / SUMMARY_FILE).read_text())


# -------------------------------------------------------------------------------------------------------------- export


def finish(
    name: str, settings: TrainSettings, prepared: Prepared, trainer: Trainer, seconds: float, say: Say, progress: bool = True
) -> None:
    """Export the result, compare it with the base, write curves, summary and card."""
    with trainer.ema.applied() if trainer.ema else nullcontext():
        _export(settings, prepared.family)
    say(f"saved {settings.output}")
    scores = _compare(settings, say, progress) if settings.evaluation.prompts else {}
    summary = {
        "objective": name,
        "model": settings.model,
        "pairs": settings.pairs,
        "adapter": settings.adapter,
        "steps": trainer.step,
        "seconds": round(seconds + scores.get("seconds", 0.0), 1),
        "seconds_training": round(seconds, 1),
        "fingerprint": {"reference": prepared.base_digest, "data": data_digest(prepared.cache)},
        **{key: scores[key] for key in ("prompts", "judges", "faithfulness", "notes") if key in scores},
    }
    write_json(settings.output / SUMMARY_FILE, summary)
    curves = draw_curves(settings.output / METRICS_FILE, settings.output / "curves.png")
    _card(name, settings, prepared, scores, curves)


def _export(settings: TrainSettings, family: Any) -> None:
    if settings.adapter == "lora":
        family.save_adapter(settings.output)
    else:
        family.save_pipeline(settings.output)
        advice = Path(family.origin.place) / SAMPLING_FILE
        if advice.is_file():
            shutil.copyfile(advice, settings.output / SAMPLING_FILE)


def _compare(settings: TrainSettings, say: Say, progress: bool) -> dict[str, Any]:
    """The comparison with the base, in ``evaluation/``; the pictures side by side also become the card's."""
    e, folder = settings.evaluation, settings.output / "evaluation"
    with Bar(progress, "picture") as bar:
        result = evaluate(
            settings.model,
            str(settings.output),
            held_out_prompts(e.prompts, e.prompt_count),
            _judges(e),
            folder,
            load=partial(families.load_pipeline, config=settings.single_file_config),
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


def held_out_prompts(where: str, count: int) -> list[Prompt]:
    """``count`` prompts; ``tiny`` means captions of the tiny world's test split, which no training saw."""
    if where == "tiny":
        from pipelines.tiny import scenes

        return [Prompt(text) for text in scenes.captions(count, seed=2026)]
    return read_prompts(where)[:count]


def _card(name: str, settings: TrainSettings, prepared: Prepared, scores: dict[str, Any], curves: Path | None) -> None:
    keys = ("win_rate", "win_rate_interval", "sign_test_p")
    table = {
        judge: {"base": r["base"]["mean"], "tuned": r["tuned"]["mean"], **{k: r[k] for k in keys}}
        for judge, r in scores.get("judges", {}).items()
    }
    write_model_card(
        settings.output,
        objective=name,
        paper=objectives.load(name).PAPER,
        base=settings.model,
        recipe=config.as_tree(settings),
        data={"source": settings.pairs, **prepared.cache.stats(), "fingerprint": data_digest(prepared.cache)},
        scores=table or None,
        curves=curves,
    )
