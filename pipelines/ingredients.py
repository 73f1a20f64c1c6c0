"""From settings to what a run gives its objective: data encoded, judges loaded, the network ready to be trained.

pairs, or pictures      opened, encoded once, deduplicated, with a judge's scores where one is named
prompts                 of objectives that sample for themselves
feedback                stored trajectories with people's choices, and their prompts as they were encoded then
reference               the frozen start: the adapter switched off, or a second network
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.data.cache import PairCache, build_cache
from diffalign.data.hold_out import split_rows
from diffalign.data.loader import LoaderSettings, PairLoader
from diffalign.data.open import open_pairs
from diffalign.data.prompt_cache import PromptCache, build_prompt_cache
from diffalign.data.table import PairTable
from diffalign.data.transform import Transform
from diffalign.errors import UserError
from diffalign.learner import Given, Processes
from diffalign.levels import LevelDistribution, Levels
from diffalign.objectives._about import PROMPTS
from diffalign.protocols import Predictor
from diffalign.references import AdapterOff, Frozen, Past
from diffalign.schedule import Schedule
from diffalign.sources.rounds import ruling_transition
from diffalign.sources.stored import Stored
from diffalign.weights import TrainedWeights
from pipelines import families, feedback
from pipelines.families import _quantised
from pipelines.families._encoding import digest
from pipelines.families._sources import find_loras, recorded_loras
from pipelines.image_settings import DataSettings, TrainSettings
from pipelines.judge_options import load_judges
from pipelines.progress import Bar
from pipelines.prompts import read_prompts
from pipelines.rewarding import Judges, PictureJudge, RewardFunction, pair_scores, score_range
from pipelines.run import PRECISIONS, Say
from pipelines.run_folder import CACHE_FOLDER, PROMPT_FOLDER
from pipelines.tiny.shipped import pairs_called
from reward_models._judge import Scorer

TINY_PROMPTS, TINY_PROMPT_SEED = 500, 11
"""Captions of the tiny world's train split that ``--train-prompts tiny`` means."""


@dataclass(frozen=True)
class Prepared:
    """What training needs and nothing else: encoders are gone by now."""

    family: Any
    weights: TrainedWeights
    reference: Predictor
    base_digest: str  # of the network before alignment, and how it is quantised: the reference's identity
    cache: PairCache | None
    prompts: PromptCache | None
    judges: Judges
    train_rows: list[int]
    validation_rows: list[int]
    feedback: Stored | None = None
    start_lora: str | None = None  # digest of the adapter that training goes on from

    @property
    def data_digest(self) -> str:
        """One short name for everything the encoded data depend on."""
        parts = [cache.fingerprint for cache in (self.cache, self.prompts) if cache is not None]
        parts += [self.feedback.fingerprint()] if self.feedback else []
        plain = parts[0] if len(parts) == 1 else parts
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]

    def stats(self) -> dict[str, Any]:
        """Counts for the card."""
        return {**(self.cache or self.prompts).stats(), **(self.feedback.stats() if self.feedback else {})}


# ---------------------------------------------------------------------------------------------------------------- data


def samples_itself(settings: TrainSettings) -> bool:
    """Whether the objective makes its pictures from prompts."""
    return PROMPTS in settings.objective.about.data


def open_data(settings: TrainSettings) -> PairTable | None:
    """The pairs or pictures, not yet decoded; None where there are only prompts.

    Raises:
        UserError: they are of a kind that the objective does not learn from.
    """
    if settings.pairs is None or settings.feedback is not None:
        return None
    data, about = settings.data, settings.objective.about
    table = open_pairs(pairs_called(settings.pairs), split=data.split, ties=data.ties, columns=data.columns, scores=data.scores)
    if PROMPTS not in about.data and table.kind not in about.data:
        raise UserError(f"{table.description}: this objective learns from {' or '.join(about.data)}, and these are {table.kind}.")
    return table


def prompts_to_sample(settings: TrainSettings, table: PairTable | None) -> list[str]:
    """The prompts of an objective that samples: its own list, or the pairs' captions, each once."""
    where = settings.train_prompts
    if where == "tiny":
        return tiny_prompts()
    found = [p.text for p in read_prompts(where)] if where else [pair.prompt for pair in table]
    return list(dict.fromkeys(found))


def tiny_prompts() -> list[str]:
    """Captions of the tiny world's train split."""
    from pipelines.tiny import scenes

    return scenes.captions(TINY_PROMPTS, seed=TINY_PROMPT_SEED, split="train")


def open_feedback(settings: TrainSettings) -> Stored | None:
    """The trajectories with people's choices. Raises UserError if they are not as they should be."""
    return None if settings.feedback is None else Stored.open(settings.feedback)


def start_adapter(settings: TrainSettings) -> families.SavedAdapter | None:
    """The adapter that training goes on from, read but not attached.

    Raises:
        UserError: it is none of ours, or was trained on top of other LoRAs than this run is.
    """
    if settings.start_lora is None:
        return None
    here = find_loras(settings.base_lora) if settings.base_lora else ()
    there = recorded_loras(Path(settings.start_lora))
    if [lora.sha256 for lora in here] != [lora.sha256 for lora in there]:
        below, mine = (", ".join(lora.path for lora in loras) or "the model itself" for loras in (there, here))
        raise UserError(
            f"The LoRA in {settings.start_lora} was trained on top of {below}, and this run starts from {mine}. "
            + (f"Give this run --base-lora {there[-1].path}." if there else "Leave --base-lora out, or start anew.")
        )
    return families.read_adapter(settings.start_lora)


def training_judges(settings: TrainSettings, function: RewardFunction | None = None) -> Judges:
    """The judges of training, loaded; none if none is named, or if people chose. A ``function`` takes the place of any."""
    chosen = settings.reward
    if function is not None:
        return {name: function for name in chosen.reward}
    wanted = chosen.reward and settings.feedback is None
    return load_judges(",".join(chosen.reward), chosen.reward_options) if wanted else {}


# ------------------------------------------------------------------------------------------------------------- prepare


def load_model(settings: TrainSettings, say: Say) -> Any:
    """The checkpoint as something to train."""
    dtype = _weights_dtype(settings)
    expected = None if settings.prediction_type == "auto" else settings.prediction_type
    family = families.load_family(
        settings.model,
        dtype=dtype,
        prediction_type=expected,
        config=settings.single_file_config,
        without=settings.without,
        base_lora=settings.base_lora,
        text_dtype=settings.data.text_precision,
    )
    schedule = family.denoiser.schedule
    merged = "".join(f", with {lora.path} merged into it" for lora in family.origin.base_loras)
    if family.origin.rest:
        say(f"{settings.model} is a transformer alone: encoders, autoencoder and schedule are those of {family.origin.rest}")
    say(f"{settings.model}: {family.name}, {schedule.prediction_type} prediction, {dtype}{merged}")
    guidance = getattr(settings.objective, "guidance", None)
    if guidance not in (None, family.usual_guidance):
        say(f"trajectories are sampled with guidance {guidance:g}; the model's own pipeline uses {family.usual_guidance:g}")
    if line := _ruled_by_one(settings, family):
        say(line)
    family.set_vae_memory(tiling=settings.data.vae_tiling, slicing=settings.data.vae_slicing)
    family.denoiser = replace(family.denoiser, schedule=replace(schedule, error_as=settings.error_as))
    return family


def _ruled_by_one(settings: TrainSettings, family: Any) -> str:
    """A line on a transition that would drown the others; empty where there is none, or no density."""
    objective = settings.objective
    if not hasattr(objective, "timestep_fraction") or settings.feedback:
        return ""
    shape = family.latent_shape(settings.data.resolution or family.resolution)
    found = ruling_transition(family.denoiser.schedule, objective.sampling, shape, objective.timestep_fraction)
    if found is None:
        return ""
    part, calmer = found
    advice = "more --rollout-steps spread it" if math.isnan(calmer) else f"--timestep-fraction {calmer:.4g} leaves it out"
    return f"one transition near the clean end has {part:.2%} of the gradient's energy, so it rules what is learnt: {advice}"


def _weights_dtype(settings: TrainSettings) -> str:
    return PRECISIONS[settings.compute.mixed_precision] if settings.adapter == "lora" else "float32"


def prepare(
    settings: TrainSettings,
    table: PairTable | None,
    family: Any,
    accelerator: Accelerator,
    say: Say,
    progress: bool = True,
    judge: RewardFunction | None = None,
) -> Prepared:
    """Encode the data (or open the cache), let go of the encoders, attach what is trained.

    Raises:
        UserError: data, feedback or an adapter to go on from do not fit each other or the model.
    """
    sampling, judges = samples_itself(settings), training_judges(settings, judge)
    base_digest, saved, stored = digest(family.network), start_adapter(settings), open_feedback(settings)
    if stored is not None:
        precision = settings.compute.mixed_precision
        here = feedback.made_by_model(base_digest, saved, _weights_dtype(settings), precision)
        feedback.refuse_another_model(stored, here, settings.model, str(settings.start_lora) if saved else None)
        say(feedback.describe(stored))
    base_digest = _quantise(settings, family, accelerator.device, base_digest, say)
    with accelerator.main_process_first(), Bar(progress and accelerator.is_main_process) as bar:
        family.encoder.work_on(accelerator.device)
        cache = _encode_pairs(settings, table, family, say, bar.advance) if table is not None and not sampling else None
        prompts = _encode_prompts(settings, table, family, bar.advance, stored) if sampling else None
        if cache is not None and judges:
            cache.scores = _judged(table, cache, judges, say, bar.advance)
    _tell_of_long_prompts(family, (cache or prompts).prompts, say)
    family.release_encoders(keep_decoder=sampling and stored is None)
    train_rows, validation_rows = [], []
    if cache is not None:
        train_rows, validation_rows = split_rows(cache.prompts, settings.data.validation_pairs, settings.seed)
        kind = "pairs" if cache.kind == "pairs" else "pictures"
        say(f"noise levels: {training_levels(settings.data, family.denoiser.schedule).distribution}")
        say(f"{len(train_rows)} {kind} to train on, {len(validation_rows)} for validation, {len(cache.skipped)} skipped")
    elif stored is None:
        say(f"{len(prompts)} prompts to sample for")
    reference = _attach(settings, family, accelerator, saved)
    return Prepared(
        family,
        TrainedWeights(family.network),
        reference,
        base_digest,
        cache,
        prompts,
        judges,
        train_rows,
        validation_rows,
        stored,
        saved.digest if saved else None,
    )


def _quantise(settings: TrainSettings, family: Any, device: torch.device, base_digest: str, say: Say) -> str:
    """Quantise the base if that is asked for; the digest of what is then the reference, of the whole weights and the kind."""
    kind = settings.compute.quantise
    if kind == _quantised.NONE:
        return base_digest
    before = _quantised.held_bytes(family.network)
    family.quantise(kind, device)
    say(f"base in {kind}: {before / 2**20:.1f} MiB of weights are now {_quantised.held_bytes(family.network) / 2**20:.1f}")
    return hashlib.sha256(f"{base_digest} {kind}".encode()).hexdigest()


def _encode_pairs(settings: TrainSettings, table: PairTable, family: Any, say: Say, progress: Callable) -> PairCache:
    data = settings.data
    resolution = data.resolution or family.resolution
    for side in (resolution, data.bucket_step) if data.buckets else (resolution,):
        family.latent_shape(side)  # before anything is encoded that the network cannot take
    say(table.description)
    cache = build_cache(
        table,
        family.encoder,
        data.cache or settings.output / CACHE_FOLDER,
        Transform(resolution, data.crop, data.flip, settings.seed, data.buckets, data.bucket_step),
        batch_size=data.encode_batch,
        max_unreadable=data.max_unreadable,
        progress=progress,
    )
    for origin, reason in cache.skipped[:10]:
        say(f"skipped {origin}: {reason}")
    return cache


def _encode_prompts(
    settings: TrainSettings, table: PairTable | None, family: Any, progress: Callable, stored: Stored | None = None
) -> PromptCache:
    if stored is not None:
        return feedback.open_prompts(stored, family.encoder)
    texts, folder = prompts_to_sample(settings, table), settings.data.cache or settings.output / PROMPT_FOLDER
    return build_prompt_cache(texts, family.encoder, folder, batch_size=settings.data.encode_batch, progress=progress)


def _judged(table: PairTable, cache: PairCache, judges: Judges, say: Say, progress: Callable) -> Tensor:
    """A judge's scores of the encoded pairs."""
    if not all(isinstance(judge, Scorer) for judge in judges.values()):
        raise UserError("A function rewards what is sampled; the data's pairs are scored by a judge, by its name (reward=...).")
    if len(judges) > 1:
        raise UserError(f"The data's pairs are scored by one judge; --reward names {len(judges)}: {', '.join(judges)}.")
    say(f"{len(cache)} pairs are judged by {next(iter(judges))}")
    return pair_scores(table, cache.rows(), judges, progress)


def _tell_of_long_prompts(family: Any, prompts: list[str], say: Say) -> None:
    cut = family.truncated(sorted(set(prompts)))
    if cut:
        count, first = len({one.prompt for one in cut}), cut[0]  # one prompt may be cut by two tokenizers
        say(f"{count} prompts are too long for the text encoder; of {first.prompt!r} it does not see {first.lost!r}")


def _attach(
    settings: TrainSettings, family: Any, accelerator: Accelerator, saved: families.SavedAdapter | None = None
) -> Predictor:
    """Make parameters trainable, place everything on the device, and return the reference."""
    compute, lora = settings.compute, settings.lora
    frozen = None
    if settings.adapter == "lora":
        family.attach_lora(rank=lora.rank, alpha=lora.alpha, targets=lora.targets, dropout=lora.dropout, seed=settings.seed)
        if saved is not None:
            family.load_adapter(saved)
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


# --------------------------------------------------------------------------------------------------------------- given


def loader_settings(settings: TrainSettings, prepared: Prepared) -> LoaderSettings:
    """How pairs are visited."""
    return LoaderSettings(
        batch_size=settings.batch.batch_size,
        accumulation=settings.batch.accumulation,
        seed=settings.seed,
        prompt_dropout=settings.data.prompt_dropout,
        flip=settings.data.flip,
        latent_mode=settings.data.latents == "mode",
        levels=training_levels(settings.data, prepared.family.denoiser.schedule),
        curriculum=settings.data.curriculum,
        curriculum_stages=settings.data.curriculum_stages,
        curriculum_cumulative=settings.data.curriculum_cumulative,
        steps=settings.loop.steps,
    )


def training_levels(data: DataSettings, schedule: Schedule) -> Levels:
    """The noise levels that pairs are visited at: the family's, another distribution, or either with other constants.

    Raises:
        UserError: a constant that the distribution does not have.
    """
    auto = data.level_distribution == "auto"
    distribution = schedule.trained_levels if auto else LevelDistribution(data.level_distribution)
    chosen = {name: getattr(data, f"level_{name}") for name in ("mean", "std", "scale", "shift")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if idle := [f"data.level_{name}" for name in chosen if name not in distribution.constants]:
        kind = f"{distribution.shape}{', as the model was trained' if auto else ''}"
        raise UserError(f"{' and '.join(idle)} would do nothing: noise levels are {kind}. Set --level-distribution as well.")
    return schedule.levels(replace(distribution, **chosen))


def given(settings: TrainSettings, prepared: Prepared, processes: Processes, device: torch.device) -> Given:
    """Everything an objective may ask for."""
    family, cache, prompts = prepared.family, prepared.cache, prepared.prompts
    pairs = judge = None
    if cache is not None:
        loader = loader_settings(settings, prepared)
        pairs = PairLoader(cache, prepared.train_rows, loader, processes.rank, processes.world)
    if prompts is not None and prepared.judges:
        judge = PictureJudge(family.encoder.decode, prepared.judges, prompts.prompts, settings.reward.rollout_batch)
    resolution = settings.data.resolution or family.resolution
    return Given(
        policy=family.denoiser,
        weights=prepared.weights,
        start=prepared.reference,
        reference=Past(family.denoiser, prepared.weights) if settings.loop.round_reference == "round" else None,
        latent_shape=cache.latent_shape if cache is not None else family.latent_shape(resolution),
        pairs=pairs,
        kind=cache.kind if cache is not None else "pairs",
        prompts=prompts,
        unconditional={name: value[None] for name, value in (cache or prompts).conditioning(None).items()},
        judge=judge,
        feedback=prepared.feedback,
        score_range=score_range(getattr(cache, "scores", None)),
        unscored=unscored(cache, prepared.train_rows),
        batch_size=settings.batch.batch_size,
        accumulation=settings.batch.accumulation,
        sampling_batch=settings.reward.rollout_batch,
        seed=settings.seed,
        device=device,
        processes=processes,
    )


def unscored(cache: PairCache | None, rows: list[int]) -> int:
    """Pairs to train on without a judge's scores, where there are scores at all."""
    known = getattr(cache, "scores", None)
    return 0 if known is None else int(torch.as_tensor(known)[rows].isnan().any(dim=1).sum())
