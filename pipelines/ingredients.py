"""Preparation of a run from its settings: data encoded, judges loaded, the network ready to be trained.

pairs, or pictures      opened, encoded once, deduplicated, with a judge's scores where one is named
prompts                 of objectives that sample for themselves
feedback                stored trajectories with people's choices, and their prompts as they were encoded then
reference               the frozen start: the adapter switched off, or a second network
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from diffalign.data.buckets import told_rare
from diffalign.data.cache import PairCache, build_cache
from diffalign.data.cache_files import CacheFolder
from diffalign.data.cache_values import FillOptions
from diffalign.data.cached_errors import CachedErrors
from diffalign.data.hold_out import shortfall, split_rows
from diffalign.data.loader import LoaderSettings, PairLoader, validation_batches
from diffalign.data.open import open_pairs
from diffalign.data.prompt_cache import PromptCache, build_prompt_cache
from diffalign.data.table import PairTable
from diffalign.data.transform import Transform
from diffalign.digests import digest_of
from diffalign.errors import UserError
from diffalign.learner import RunContext
from diffalign.levels import LevelDistribution, Levels
from diffalign.objectives import _denoising
from diffalign.objectives._about import PROMPTS
from diffalign.processes import ManyProcesses, Processes, failing_together, main_process_first
from diffalign.protocols import Predictor
from diffalign.references import AdapterOff, Cached, Frozen, Snapshot
from diffalign.schedule import Schedule
from diffalign.sources.rounds import ruling_transition
from diffalign.sources.stored import Stored
from diffalign.types import PairBatch, placed
from diffalign.weights import TrainedWeights
from pipelines import devices, families, feedback, heap, own_judges, previews, reference_errors
from pipelines.families import _quantised
from pipelines.families._compiled import compile_blocks
from pipelines.families._encoding import digest
from pipelines.families._origin import recorded_loras
from pipelines.families._sources import find_loras
from pipelines.image_settings import DataSettings, TrainSettings, named_loss
from pipelines.judge_options import load_judges
from pipelines.own_judges import OwnJudge
from pipelines.progress import Bar
from pipelines.prompts import read_prompts
from pipelines.rewarding import Judges, PictureJudge, pair_scores, score_range
from pipelines.run import PRECISIONS, Epochs, Say
from pipelines.run_folder import CACHE_FOLDER, PROMPT_FOLDER
from pipelines.tiny.shipped import pairs_called

TINY_PROMPTS, TINY_PROMPT_SEED = 500, 11
"""Captions of the tiny world's train split that ``--train-prompts tiny`` means."""
LATE = 0.2
"""Share of a run's rounds after which the first baseline comes too late to be one."""
PROMPTS_AT_ONCE = 4096
"""Number of prompts tokenized together to find those that are too long."""


@dataclass(frozen=True)
class Prepared:
    """What training needs; the encoders are freed by now."""

    family: Any
    weights: TrainedWeights
    reference: Predictor
    base_digest: str  # of the network before alignment, and how it is quantised: the reference's identity
    cache: PairCache | None
    prompts: PromptCache | None
    judges: Judges
    own_judge: OwnJudge | None
    """of a user, in ``judges`` in place of those that settings could name"""
    train_rows: Sequence[int]
    previews: PromptCache | None = None
    validation: Sequence[PairBatch] = ()
    feedback: Stored | None = None
    cached_errors: CachedErrors | None = None  # the reference's, at draws that every pair has for good
    start_lora: str | None = None  # digest of the adapter that training goes on from

    @property
    def data_digest(self) -> str:
        """One short name for everything the encoded data depend on."""
        parts = [cache.fingerprint for cache in (self.cache, self.prompts) if cache is not None]
        parts += [self.feedback.fingerprint()] if self.feedback else []
        plain = parts[0] if len(parts) == 1 else parts
        return digest_of(plain)[:16]

    def stats(self) -> dict[str, Any]:
        """Counts for the card."""
        return {**(self.cache or self.prompts).stats(), **(self.feedback.stats() if self.feedback else {})}


# ---------------------------------------------------------------------------------------------------------------- data


def samples_itself(settings: TrainSettings) -> bool:
    """Whether the objective makes its pictures from prompts."""
    return PROMPTS in settings.objective.about.data


def pairs_per_step(settings: TrainSettings, world: int) -> int:
    """Over all processes. Of what an objective samples, accumulation counts the pairs, and the batch their transitions."""
    at_once = 1 if samples_itself(settings) else settings.batch.batch_size
    return at_once * settings.batch.accumulation * world


def open_data(settings: TrainSettings) -> PairTable | None:
    """The pairs or pictures, not yet decoded; None where there are only prompts.

    Raises:
        UserError: they are of a kind that the objective does not learn from.
    """
    if settings.pairs is None or settings.feedback is not None:
        return None
    data, about = settings.data, settings.objective.about
    if data.split != "train" and Path(pairs_called(settings.pairs)).expanduser().is_file():
        raise UserError(
            f"data.split: {settings.pairs} is one file, which has no splits; leave --split out, or name another file."
        )
    table = open_pairs(pairs_called(settings.pairs), split=data.split, ties=data.ties, columns=data.columns, scores=data.scores)
    if PROMPTS not in about.data and table.kind not in about.data:
        raise UserError(f"{table.description}: this objective learns from {' or '.join(about.data)}, and these are {table.kind}.")
    return table


def refuse_unscored(settings: TrainSettings, table: PairTable | None) -> None:
    """Raises UserError where the objective or its loss learns from a judge's scores, and there will be none."""
    if table is None or table.scored or settings.reward.reward:
        return
    objective = settings.objective
    if hasattr(objective, "refuse_unscored"):
        objective.refuse_unscored(objective.score_low, objective.score_high)
    if (loss := named_loss(objective)) is not None:
        _denoising.refuse_unscored(loss, scored=False)


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


def training_judges(settings: TrainSettings, own: OwnJudge | None = None) -> Judges:
    """The judges of training, loaded; none if none is named, or if people chose. A user's ``own`` takes the place of any.

    Raises:
        UserError: an unknown judge, or one that cannot score the data's pairs where there are such.
    """
    chosen = settings.reward
    if not samples_itself(settings):
        _refuse_for_pairs(chosen.reward, own)
    if own is not None:
        return {own_judges.name_of(own): own}
    wanted = chosen.reward and settings.feedback is None
    return load_judges(",".join(chosen.reward), chosen.reward_options) if wanted else {}


def _refuse_for_pairs(names: Sequence[str], own: OwnJudge | None) -> None:
    if own is not None and not own_judges.is_judge(own):
        raise UserError(
            "A function rewards what is sampled; the data's pairs are scored by a judge: by its name (reward=...), or by a "
            "reward_models.PointwiseJudge of your own."
        )
    if len(names) > 1:
        raise UserError(f"The data's pairs are scored by one judge; --reward names {len(names)}: {', '.join(names)}.")


# ------------------------------------------------------------------------------------------------------------- prepare


def load_model(settings: TrainSettings, say: Say, *, network: bool = True) -> Any:
    """The checkpoint as something to train; without the ``network`` as something to encode with."""
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
        network=network,
    )
    schedule = family.denoiser.schedule
    merged = "".join(f", with {lora.path} merged into it" for lora in family.origin.base_loras)
    if family.origin.rest:
        say(f"{settings.model} is a transformer alone: encoders, autoencoder and schedule are those of {family.origin.rest}")
    if family.origin.own_words:
        say(family.origin.own_words)
    say(f"{settings.model}: {family.name}, {schedule.prediction_type} prediction, {dtype}{merged}")
    guidance = getattr(settings.objective, "guidance", None)
    if guidance not in (None, family.default_guidance):
        say(f"trajectories are sampled with guidance {guidance:g}; the model's own pipeline uses {family.default_guidance:g}")
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
    judge: OwnJudge | None = None,
    renew: bool = False,
) -> Prepared:
    """Encode the data (or open the cache), let go of the encoders, attach what is trained.

    With ``renew`` caches in the run's own folder that were made under other circumstances are made anew; so are those that never
    got complete.

    Raises:
        UserError: data, feedback or an adapter to go on from do not fit each other or the model.
    """
    everyone = ManyProcesses(accelerator)
    refuse_unscored(settings, table)
    judges, saved, stored = training_judges(settings, judge), start_adapter(settings), open_feedback(settings)
    base_digest = _start_digest(settings, family, accelerator.device, saved, stored, say)
    with Bar(progress and accelerator.is_main_process) as bar, heap.kept():
        family.encoder.work_on(accelerator.device)
        renew = _may_go(settings, renew)
        cache, prompts = _encode(settings, table, family, everyone, stored, judges, say, bar.advance, renew)
        shown = main_process_first(everyone, lambda: previews.encoded(settings, family.encoder, renew=renew, busy=say))
    with failing_together(everyone):
        if everyone.rank == 0:
            _tell_of_long_prompts(family, cache, prompts, say)
    family.release_encoders(keep_decoder=shown is not None or (samples_itself(settings) and stored is None))
    train_rows, validation_rows = _split(settings, cache, prompts, family, stored, say)
    if line := _late_baseline(settings, len(prompts or ()), accelerator.num_processes):
        say(line)
    if line := reference_errors.told_spare(settings, Epochs(pairs_per_step(settings, everyone.world), len(train_rows))):
        say(line)
    in_buckets = cache is not None and cache.buckets
    if in_buckets and (line := told_rare(cache.bucket_numbers[list(train_rows)], settings.batch.batch_size)):
        say(line)
    start = _attach(settings, family, accelerator, say, saved)
    cached_errors, validation = None, []
    if cache is not None:
        visits = loader_settings(settings, family.denoiser.schedule)
        validation = validation_batches(cache, validation_rows, visits, settings.data.validation_draws)
    if start is None:
        with Bar(progress and accelerator.is_main_process) as bar, heap.kept():
            reference = reference_errors.ReferenceErrors(settings, family, cache, visits, accelerator)
            cached_errors = reference.cache(base_digest, bar.advance, renew, say) if settings.reference.reference_draws else None
            validation = reference.known(validation)
        start = Cached()
    if devices.is_sharding(accelerator):
        devices.shard(family.network, accelerator)
    return Prepared(
        family=family,
        weights=TrainedWeights(family.network),
        reference=start,
        base_digest=base_digest,
        cache=cache,
        prompts=prompts,
        judges=judges,
        own_judge=judge,
        previews=shown,
        train_rows=train_rows,
        validation=validation,
        feedback=stored,
        cached_errors=cached_errors,
        start_lora=saved.digest if saved else None,
    )


def _may_go(settings: TrainSettings, renew: bool) -> bool:
    """Whether a cache made under other circumstances may be replaced: it is in the run's own folder, and ``renew`` is set or the
    cache was never completed, as after a refusal whose reason has been mended."""
    own = settings.output / (PROMPT_FOLDER if samples_itself(settings) else CACHE_FOLDER)
    return settings.data.cache is None and (renew or not CacheFolder(own).complete)


def _start_digest(
    settings: TrainSettings,
    family: Any,
    device: torch.device,
    saved: families.SavedAdapter | None,
    stored: Stored | None,
    say: Say,
) -> str:
    """The digest of the frozen start, which is quantised here if that is asked for; feedback must be of this very model."""
    whole = digest(family.network)
    if stored is not None:
        precision = settings.compute.mixed_precision
        here = feedback.made_by_model(whole, saved, _weights_dtype(settings), precision)
        feedback.refuse_another_model(stored, here, settings.model, str(settings.start_lora) if saved else None)
        say(feedback.describe(stored))
    return _quantise(settings, family, device, whole, say)


def _encode(
    settings: TrainSettings,
    table: PairTable | None,
    family: Any,
    everyone: Processes,
    stored: Stored | None,
    judges: Judges,
    say: Say,
    progress: Callable,
    renew: bool,
) -> tuple[PairCache | None, PromptCache | None]:
    """The pairs with their judge's scores if there is one, or the prompts of an objective that samples."""
    if samples_itself(settings):
        return None, main_process_first(everyone, lambda: _encode_prompts(settings, table, family, progress, stored, renew, say))
    say(table.description)
    cache = build_cache(**encoding(settings, table, family), processes=everyone, progress=progress, renew=renew, busy=say)
    for origin, reason in cache.skipped[:10]:
        say(f"skipped {origin}: {reason}")
    if judges:
        say(f"{len(cache)} pairs are judged by {next(iter(judges))}, or were before")
        cache.scores = pair_scores(table, cache.rows(), judges, settings.cache_folder, everyone, progress)
    return cache, None


def _split(
    settings: TrainSettings, cache: PairCache | None, prompts: PromptCache | None, family: Any, stored: Stored | None, say: Say
) -> tuple[Sequence[int], Sequence[int]]:
    """Rows to train on, and rows for validation; none where there are only prompts."""
    if cache is not None:
        train_rows, validation_rows = split_rows(cache.prompt_numbers, settings.data.validation_pairs, settings.seed)
        kind = "pairs" if cache.kind == "pairs" else "pictures"
        say(f"noise levels: {training_levels(settings.data, family.denoiser.schedule).distribution}")
        say(f"{len(train_rows)} {kind} to train on, {len(validation_rows)} for validation, {cache.skipped_count} skipped")
        if line := shortfall(settings.data.validation_pairs, len(validation_rows), len(cache.prompt_numbers), kind):
            say(line)
        return train_rows, validation_rows
    if stored is None:
        say(f"{len(prompts)} prompts to sample for")
    return [], []


def _late_baseline(settings: TrainSettings, prompts: int, processes: int) -> str:
    """A line on prompts that come back so seldom that their own rewards are no baseline for long; empty where they do."""
    objective = settings.objective
    if not hasattr(objective, "first_own"):
        return ""
    pairs = settings.loop.steps * settings.batch.accumulation * processes
    first, rounds = objective.first_own(prompts), math.ceil(pairs / (objective.round_pairs * objective.round_epochs))
    if first <= rounds * LATE:
        return ""
    return (
        f"{prompts} prompts come back every {prompts / objective.round_pairs:.3g} rounds, and have the {objective.least} rewards "
        f"that their own baseline takes from round {first} on, of {rounds}: until then rewards are measured against their round. "
        "Fewer prompts, a smaller --least or --baseline round."
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


def encoding(settings: TrainSettings, table: PairTable, family: Any) -> dict[str, Any]:
    """What is encoded, with what, into which folder and how: arguments of ``build_cache`` and ``fill_cache``.

    Raises:
        UserError: the network cannot take latents of this size.
    """
    data = settings.data
    resolution = data.resolution or family.resolution
    for side in (resolution, data.bucket_step) if data.buckets else (resolution,):
        family.latent_shape(side)
    return {
        "table": table,
        "encoder": family.encoder,
        "directory": settings.cache_folder,
        "transform": Transform(resolution, data.crop, data.flip, settings.seed, data.buckets, data.bucket_step),
        "options": FillOptions(data.encode_batch, max_unreadable=data.max_unreadable),
    }


def _encode_prompts(
    settings: TrainSettings,
    table: PairTable | None,
    family: Any,
    progress: Callable,
    stored: Stored | None,
    renew: bool,
    say: Say,
) -> PromptCache:
    if stored is not None:
        return feedback.open_prompts(stored, family.encoder)
    texts, folder = prompts_to_sample(settings, table), settings.data.cache or settings.output / PROMPT_FOLDER
    options = FillOptions(settings.data.encode_batch)
    return build_prompt_cache(texts, family.encoder, folder, options, progress=progress, renew=renew, busy=say)


def _tell_of_long_prompts(family: Any, cache: PairCache | None, prompts: PromptCache | None, say: Say) -> None:
    """Tokenized once: of a cache of pairs the answer is kept with it."""
    if cache is not None:
        found = cache.remembered("long-prompts", lambda: _long_prompts(family, cache.unique_prompts))
    else:
        found = _long_prompts(family, list(dict.fromkeys(prompts.prompts)))
    if count := found["count"]:
        say(f"{count} prompts are too long for the text encoder; of {found['prompt']!r} it does not see {found['lost']!r}")


def _long_prompts(family: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Number of these different prompts that are longer than the text encoder reads, and the first of them."""
    found: dict[str, Any] = {"count": 0}
    for low in range(0, len(texts), PROMPTS_AT_ONCE):
        cut = family.truncated(texts[low : low + PROMPTS_AT_ONCE])
        if cut and not found["count"]:
            found |= {"prompt": cut[0].prompt, "lost": cut[0].lost}
        found["count"] += len({one.prompt for one in cut})  # one prompt may be cut by two tokenizers
    return found


def _attach(
    settings: TrainSettings, family: Any, accelerator: Accelerator, say: Say, saved: families.SavedAdapter | None = None
) -> Predictor | None:
    """Make parameters trainable, place everything on the device, and return the reference; None if training never asks it."""
    compute, beforehand = settings.compute, reference_errors.is_enough(settings)
    if settings.optimizer.eight_bit:
        devices.refuse_sharding(accelerator, "The moments of an 8-bit optimizer")
    if not settings.optimizer.kind.by_element:
        devices.refuse_sharding(accelerator, f"The moments of {settings.optimizer.optimizer}")
    make_trainable(settings, family, accelerator, saved)
    _choose_kernels(settings, family, accelerator, say)
    frozen = None
    if not beforehand and settings.adapter != "lora":
        precision = getattr(torch, PRECISIONS[compute.mixed_precision])
        frozen = family.frozen_copy(precision, everything=devices.is_sharding(accelerator))
    if beforehand or not devices.is_sharding(accelerator):  # or else each process gets no more than its share
        family.network.to(accelerator.device)
    family.network.train()
    family.set_gradient_checkpointing(compute.gradient_checkpointing)
    if compute.compile:
        family.compile_blocks()
    family.denoiser = family.denoiser.with_network(devices.wrapped(family.network, accelerator))
    if beforehand:
        return None
    if frozen is None:
        return AdapterOff(family.denoiser)
    if compute.compile:
        compile_blocks(frozen.network)
    return Frozen(frozen.with_network(devices.wrapped(frozen.network, accelerator)))


def _choose_kernels(settings: TrainSettings, family: Any, accelerator: Accelerator, say: Say) -> None:
    """Set the attention kernels and the memory format; copies of the network made afterwards have them, too."""
    compute = settings.compute
    if line := devices.lacks_cuda():
        say(line)
    family.set_attention(compute.attention, accelerator.device)
    if line := family.attention(compute.attention, getattr(torch, PRECISIONS[compute.mixed_precision]), accelerator.device):
        say(line)
    if compute.channels_last and devices.is_sharding(accelerator):
        say("channels-last is left out: shares of sharded weights are rows of plain memory")
    elif compute.channels_last:
        family.set_channels_last(True)


def make_trainable(settings: TrainSettings, family: Any, accelerator: Accelerator, saved: families.SavedAdapter | None) -> None:
    """Put an adapter on, new or ``saved``, or make all weights trainable."""
    if settings.adapter != "lora":
        family.train_fully()
        return
    devices.refuse_sharding(accelerator, "A LoRA")
    if accelerator.device.type == "cpu":
        family.use_products()
    lora = settings.lora
    family.attach_lora(rank=lora.rank, alpha=lora.alpha, targets=lora.targets, dropout=lora.dropout, seed=settings.seed)
    if saved is not None:
        family.load_adapter(saved)


# ------------------------------------------------------------------------------------------------------- run context


def loader_settings(settings: TrainSettings, schedule: Schedule) -> LoaderSettings:
    """Settings of the loader of pairs."""
    return LoaderSettings(
        batch_size=settings.batch.batch_size,
        accumulation=settings.batch.accumulation,
        seed=settings.seed,
        prompt_dropout=settings.data.prompt_dropout,
        flip=settings.data.flip,
        latent_mode=settings.data.latents == "mode",
        levels=training_levels(settings.data, schedule),
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


def run_context(settings: TrainSettings, prepared: Prepared, processes: Processes, device: torch.device) -> RunContext:
    """The context of a run that its objective reads."""
    family, cache, prompts = prepared.family, prepared.cache, prepared.prompts
    pairs = judge = None
    if cache is not None:
        loader = loader_settings(settings, family.denoiser.schedule)
        pairs = PairLoader(cache, prepared.train_rows, loader, processes.rank, processes.world, prepared.cached_errors, device)
    if prompts is not None and prepared.judges:
        judge = PictureJudge(family.encoder.decode, prepared.judges, prompts.prompts, settings.reward.rollout_batch)
    resolution = settings.data.resolution or family.resolution
    return RunContext(
        policy=family.denoiser,
        weights=prepared.weights,
        start=prepared.reference,
        reference=Snapshot(family.denoiser, prepared.weights) if settings.loop.round_reference == "round" else None,
        latent_shape=cache.latent_shape if cache is not None else family.latent_shape(resolution),
        pairs=pairs,
        kind=cache.kind if cache is not None else "pairs",
        prompts=prompts,
        unconditional=placed({name: value[None] for name, value in (cache or prompts).conditioning(None).items()}, device),
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


def unscored(cache: PairCache | None, rows: Sequence[int]) -> int:
    """Pairs to train on without a judge's scores, where there are scores at all."""
    known = getattr(cache, "scores", None)
    return 0 if known is None else int(torch.as_tensor(known)[rows].isnan().any(dim=1).sum())
