"""The settings of an image model's training run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from diffalign.errors import UserError
from diffalign.objectives._about import FROZEN_START, NOBODY, PROMPTS, About
from diffalign.settings import check_options, option
from pipelines.config import Schema, flag_of
from pipelines.run_folder import CACHE_FOLDER


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """The low-rank adapter (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = option(16, "rank of the adapter", ge=1)
    alpha: float = option(16.0, "scale of the adapter, which acts alpha / rank times", gt=0)
    targets: tuple[str, ...] = option(
        (), "layers that get an adapter, by the ends of their names; by default those of the model's family"
    )
    dropout: float = option(0.0, "dropout probability in the adapter", ge=0, lt=1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The training data, and how it is prepared for the network."""

    resolution: int | None = option(None, "side of the training pictures in pixels; by default the model's own", ge=8)
    crop: Literal["center", "random", "fit"] = option(
        "center", "crop of both pictures of a pair: center, random, or fit (none, where proportions are within 10 %; see buckets)"
    )
    flip: bool = option(False, "random horizontal flip, of both pictures of a pair together")
    buckets: bool = option(
        False,
        "aspect ratio buckets: cut pairs to the shape nearest to the winner's, of resolution squared pixels, not to squares",
    )
    bucket_step: int = option(64, "number of pixels of which a bucket's height and width are multiples", ge=1)
    ties: Literal["keep", "drop"] = option("drop", "treatment of ties: keep (with label 1/2) or drop")
    split: str = option("train", "split of the data set")
    columns: dict[str, str] = option(None, "names of the data set's columns, as role=name: prompt=text chosen=image_a")  # type: ignore[assignment]
    scores: str | None = option(None, "judge whose scores the pairs carry, as `diffalign relabel` called it")
    max_unreadable: float = option(
        0.01, "largest share of unreadable rows that is skipped; with more the run is refused", ge=0, le=1
    )
    prompt_dropout: float = option(
        0.2, "probability with which a prompt is replaced by the empty one, for classifier-free guidance", ge=0, le=1
    )
    latents: Literal["sample", "mode"] = option(
        "sample", "latents of a picture: a sample of the autoencoder's posterior, or its mode (the mean)"
    )
    validation_pairs: int = option(64, "pairs kept out of training for validation", ge=0)
    validation_draws: int = option(4, "fixed draws of timestep and noise per validation pair", ge=1)
    level_distribution: Literal["auto", "uniform", "logit-normal", "mode"] = option(
        "auto",
        "distribution of training's noise levels: auto (as the model was trained), uniform, logit-normal or mode (both SD3's)",
    )
    level_mean: float | None = option(
        None, "mean of the logit-normal distribution, positive is noisier; by default the model's, or 0"
    )
    level_std: float | None = option(
        None, "standard deviation of the logit-normal distribution; by default the model's, or 1", gt=0
    )
    level_scale: float | None = option(
        None, "scale of the mode distribution, above 0 denser in the middle; by default the model's", ge=-1, le=1.75
    )
    level_shift: float | None = option(None, "timestep shift, above 1 towards noise; by default the model's, or 1", gt=0)
    curriculum: Literal["none", "margin"] = option(
        "none", "order of the pairs: none, or margin (those that the judge tells apart most clearly come first)"
    )
    curriculum_stages: int = option(5, "number of stages of a curriculum, with equally many pairs and steps each", ge=1)
    curriculum_cumulative: bool = option(
        True, "whether a stage keeps the pairs of earlier ones (true: Curriculum-DPO; false: Curry-DPO)"
    )
    cache: Path | None = option(None, "folder of the encoded pairs; by default inside the output")
    encode_batch: int = option(8, "number of pictures encoded at a time", ge=1)
    text_precision: Literal["float32", "bfloat16"] = option(
        "float32", "precision of the text encoders: in float32 T5-XXL takes 18 GiB, in bfloat16 9"
    )
    vae_tiling: bool = option(
        False,
        "encode and decode pictures larger than the autoencoder's own size in tiles: less memory, slightly different latents",
    )
    vae_slicing: bool = option(False, "encode and decode one picture at a time, whatever the batch: less memory")

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class ReferenceSettings:
    """Errors of the frozen start, cached so that training needs no reference (``diffalign.data.cached_errors``)."""

    reference_draws: int = option(0, "number of fixed draws of noise and timestep per pair; 0 for new draws in every epoch", ge=0)
    reference_seed: int = option(0, "random seed of the fixed draws; runs that share cached errors need the same one")
    reference_batch: int | None = option(
        None,
        "number of pairs in a forward pass of the reference, without gradients; by default what training has room for: "
        "batch_size, 8 at least, or with gradient_checkpointing half of encode_batch at least",
        ge=1,
    )
    reference_cache: Path | None = option(None, "folder of the cached errors; by default beside the encoded pairs")

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class BatchSettings:
    """Batch size and gradient accumulation."""

    batch_size: int = option(1, "pairs per process and micro-step; for d3po and ddpo, transitions of their trajectories", ge=1)
    accumulation: int = option(
        1, "gradient accumulation: micro-steps per optimizer step; for d3po and ddpo, pairs per process and optimizer step", ge=1
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """Judges that score what the policy samples (on-line objectives) or the data's pairs (SmPO, MADPO, ADPO) in training."""

    reward: tuple[str, ...] = option(
        (), "judges that reward, as NAME or LABEL=NAME; a single one where it scores the data's pairs"
    )
    reward_options: tuple[str, ...] = option(
        (), "options of the judges that reward: pickscore.weights=PATH,pickscore.dtype=bfloat16"
    )
    rollout_batch: int = option(16, "number of pictures sampled, decoded and judged at a time in training", ge=1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class ComputeSettings:
    """Precision, memory and speed."""

    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "no", "mixed precision of the network: no, bf16 or fp16; losses stay in float32"
    )
    gradient_checkpointing: bool = option(
        False, "gradient checkpointing, which recomputes activations in the backward pass: less memory, a third more time"
    )
    quantise: Literal["none", "int8", "nf4"] = option(
        "none", "quantisation of the frozen base below a LoRA: none, int8 (torchao) or nf4 (bitsandbytes)"
    )
    attention: Literal["sdpa", "flash", "xformers"] = option(
        "sdpa",
        "attention kernels: sdpa (PyTorch's choice), flash (PyTorch's flash kernel, or an error) or xformers (UNets, CUDA)",
    )
    tf32: bool = option(False, "TF32 for float32 matrix products, on NVIDIA GPUs since Ampere: far faster, 10 bits of mantissa")
    compile: bool = option(False, "torch.compile for the network's blocks: minutes at the start, faster steps (on GPUs)")
    channels_last: bool = option(False, "channels-last memory format for the UNet (helps on GPUs)")
    tracker: str = option("tensorboard", "tracker of the metrics, by Accelerate's name; none for the JSONL file only")

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """The comparison with the base after training."""

    prompts: str | None = option(None, "held-out prompts: a file or a set by name; none for no evaluation")
    prompt_count: int = option(200, "number of held-out prompts to compare on", ge=1)
    judges: tuple[str, ...] = option((), "judges that compare, as NAME or LABEL=NAME")
    judge_options: tuple[str, ...] = option(
        (), "options of the judges that compare: pickscore.weights=PATH,pickscore.dtype=bfloat16"
    )
    sampling_steps: int = option(25, "number of sampling steps: of DDIM, or of a flow model's own sampler", ge=1)
    guidance_scale: float | None = option(
        None, "classifier-free guidance scale, as the model's pipeline defines it; none for what the model wants", ge=0
    )
    sampling_batch: int = option(8, "number of pictures sampled at a time", ge=1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class PreviewSettings:
    """Pictures sampled in training, in ``previews/``."""

    preview_every: int = option(0, "optimizer steps between previews of a few held-out prompts; 0 for none", ge=0)
    preview_prompts: str | None = option(
        None, "prompts of the previews: a file or a set by name; none for those of the comparison"
    )
    preview_count: int = option(4, "number of prompts of the previews", ge=1)
    preview_steps: int = option(
        20, "number of sampling steps of a preview: of DPM-Solver++ 2M, or of Euler for flow models", ge=1
    )
    preview_guidance: float | None = option(
        None, "classifier-free guidance scale of the previews, 1 switches it off; none for what the model wants", ge=0
    )
    preview_batch: int = option(1, "number of previews sampled and decoded at a time", ge=1)

    def __post_init__(self) -> None:
        check_options(self)
        idle = [f.name for f in dataclasses.fields(self)[1:] if getattr(self, f.name) != f.default]
        if idle and not self.preview_every:
            raise ValueError(f"{', '.join(idle)} would do nothing: --preview-every says when previews are drawn")


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """A whole run. ``objective`` holds the settings of the objective named on the command line."""

    model: str
    output: Path
    objective: Any
    lora: LoraSettings
    data: DataSettings
    reference: ReferenceSettings
    reward: RewardSettings
    batch: BatchSettings
    optimizer: Any  # diffalign.optimisation.OptimizerSettings
    loop: Any  # diffalign.train.LoopSettings
    compute: ComputeSettings
    preview: PreviewSettings
    evaluation: EvaluationSettings
    pairs: str | None = None
    train_prompts: str | None = None
    feedback: Path | None = None
    base_lora: Path | None = None
    start_lora: Path | None = None
    single_file_config: str | None = None
    without: tuple[str, ...] = ()
    preset: Literal["8gb", "12gb", "16gb", "24gb", "48gb", "80gb"] | None = None
    adapter: Literal["lora", "full"] = "lora"
    prediction_type: Literal["auto", "epsilon", "v_prediction", "sample", "velocity"] = "auto"
    error_as: Literal["prediction", "epsilon", "v_prediction", "sample", "velocity"] = "prediction"
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def cache_folder(self) -> Path:
        """Folder of the encoded pairs and of all that is derived from them."""
        return self.data.cache or self.output / CACHE_FOLDER


TOP_LEVEL = {
    "model": "model to align: a Diffusers folder, a hub id, a single .safetensors file, tiny or tiny-flow",
    "single_file_config": "Diffusers folder with the configuration and tokenizer of a single-file model, to do without the hub",
    "preset": "device memory to fit, 8gb, 12gb, 16gb, 24gb, 48gb or 80gb: switches on what that takes (--dry-run says what)",
    "without": "parts of the model to leave out: t5, for SD3",
    "pairs": "preference pairs, or pictures with prompts: a file, a folder, a hub id, or tiny",
    "train_prompts": "prompts that on-line objectives sample for: a file, a set by name, or tiny",
    "feedback": "folder that `diffalign rollout` wrote, with people's choices in it (d3po)",
    "base_lora": "LoRA of any program, part of the frozen start: a .safetensors file, a folder with one, or org/name on the hub",
    "start_lora": "LoRA that diffalign trained, to go on from; the frozen start stays the base model",
    "output": "folder that the run writes into",
    "adapter": "what is trained: lora (a LoRA) or full (the whole network)",
    "prediction_type": "prediction type of the network: epsilon, v_prediction, sample or velocity; auto reads it from the model",
    "error_as": "target of denoising errors: prediction (the network's own), epsilon, v_prediction, sample or velocity",
    "seed": "random seed of the whole run",
}


def sections(objective: type) -> dict[str, type]:
    """The sections of a configuration for one objective, in the order they are shown."""
    from diffalign.train import LoopSettings
    from pipelines.optimizers import OptimizerSettings  # with all optimizers known to it

    return {
        "objective": objective,
        "lora": LoraSettings,
        "data": DataSettings,
        "reference": ReferenceSettings,
        "reward": RewardSettings,
        "batch": BatchSettings,
        "optimizer": OptimizerSettings,
        "loop": LoopSettings,
        "compute": ComputeSettings,
        "preview": PreviewSettings,
        "evaluation": EvaluationSettings,
    }


def _of_feedback(tree: Mapping[str, Any], objective: type) -> Mapping[str, Any]:
    """Settings that follow from stored trajectories: how they were sampled, and that no others are."""
    if not tree.get("feedback") or not getattr(objective, "learns_from_people", False):
        return {}
    from pipelines.feedback import sampling_settings

    idle = {f.name: f.default for f in dataclasses.fields(objective) if f.name in _OF_ROUNDS}
    no_judge = {"reward": [], "reward_options": []}
    return {"objective": {**idle, **sampling_settings(tree["feedback"])}, "reward": no_judge}


def _missing(tree: Mapping[str, Any], about: About) -> list[str]:
    """Messages about data that this objective needs and was not given."""

    def needed(path: str, text: str) -> str:
        return f"{path}: needed but not given ({text}; {flag_of(path.split('.')[-1])})"

    if PROMPTS not in about.data:
        return [] if tree.get("pairs") else [needed("pairs", TOP_LEVEL["pairs"])]
    if tree.get("feedback"):
        return []
    missing = [] if tree.get("train_prompts") or tree.get("pairs") else [needed("train_prompts", TOP_LEVEL["train_prompts"])]
    if about.judged == "needed" and not dict(tree.get("reward") or {}).get("reward"):
        missing.append(needed("reward.reward", "judges that reward what the policy samples"))
    return missing


_OF_ROUNDS = ("round_pairs", "round_epochs", "candidates", "same_start")
"""Settings of an objective that samples its own pairs, idle where it learns from stored ones."""


def _changed(settings: Any) -> list[str]:
    """The settings that are not at their defaults."""
    return [f.name for f in dataclasses.fields(settings) if getattr(settings, f.name) != f.default]


def _contradictions(whole: Mapping[str, Any]) -> list[str]:
    """Messages about settings that contradict each other or that the objective has no use for."""
    objective, data, loop, compared = whole["objective"], whole["data"], whole["loop"], whole["evaluation"]
    samples, own = PROMPTS in objective.about.data, getattr(objective, "round_steps", 1)
    out = []
    if whole["feedback"] and not getattr(objective, "learns_from_people", False):
        out.append("feedback: this objective does not learn from choices among rollouts; d3po does")
    if whole["feedback"]:
        idle = [name for name in _changed(objective) if name in _OF_ROUNDS]
        out += [f"objective.{name}: is about sampling rounds, and with feedback nothing is sampled" for name in idle]
        out += ["reward.reward: with feedback it is people who choose"] if whole["reward"].reward else []
    if whole["compute"].quantise != "none" and whole["adapter"] == "full":
        out.append("compute.quantise: quantised weights cannot be trained, and adapter is full; train a LoRA, or set it to none")
    if whole["compute"].quantise != "none" and whole["feedback"]:
        out.append("compute.quantise: the trajectories of feedback were made by whole weights; log-densities would not compare")
    if data.text_precision != "float32" and whole["feedback"]:
        out.append("data.text_precision: the prompts of feedback were encoded in float32; leave it out")
    if whole["start_lora"] and whole["adapter"] == "full":
        out.append("start_lora: an adapter to go on from, and adapter is full; train a LoRA, or leave it out")
    if compared.prompts and not compared.judges:
        out.append("evaluation.judges: prompts are named and nobody to judge the pictures; name a judge, or set prompts to none")
    if data.buckets and hasattr(objective, "rollout_steps"):
        out.append("data.buckets: this objective samples pictures of its own, all of one shape")
    if data.buckets and data.curriculum != "none":
        out.append("data.buckets: pairs are ordered by shape, and a curriculum orders them by scores; leave one of them out")
    if whole["train_prompts"] and not samples:
        out.append("train_prompts: are what on-line objectives sample for, and this one learns from data; leave them out")
    if whole["reward"].reward and not samples and not _uses_scores(objective, data):
        out.append(
            "reward.reward: a judge scores the pairs, which neither this objective nor its loss looks at; leave it out, or let "
            "scores be used: smpo, --loss adpo, --curriculum margin"
        )
    out += _idle(objective, data, samples) + _idle_sources(whole, samples)
    if samples and data.curriculum != "none":
        out.append("data.curriculum: orders the pairs of a data set, and this objective samples its own")
    if samples:
        idle = [name for name in _changed(data) if name.startswith("level_")]
        out += [f"data.{name}: is about the noise levels of a data set, and this objective samples its own" for name in idle]
    if samples and whole["error_as"] != "prediction":
        out.append("error_as: is about denoising errors, and this objective learns from densities of its own steps")
    if loop.round_reference == "round" and objective.about.reference != FROZEN_START:
        found = objective.about.reference
        out.append(f"loop.round_reference: only a frozen start can be renewed; what this objective compares with is {found!r}")
    elif loop.round_reference == "round" and _asks_nobody(objective):
        out.append(f"loop.round_reference: the loss {objective.loss} asks no reference, which therefore need not be renewed")
    if whole["reference"].reference_draws:
        out += [f"reference.reference_draws: {reason}" for reason in _not_beforehand(objective, loop)]
    else:
        idle = _changed(whole["reference"])
        out += [f"reference.{name}: is about cached errors of the reference, and reference_draws is 0" for name in idle]
    if samples and loop.extrapolation:
        out.append("loop.extrapolation: this objective learns from what its policy sampled; weights that jump are others")
    out += lone_pairs(objective, whole["batch"]) + idle_rounds(loop) + without_held_out(loop, data, samples)
    if loop.extrapolation and loop.round_every % own:
        out.append(f"loop.round_every: should be a multiple of the objective's own round_steps, {own} (found {loop.round_every})")
    return out


def named_loss(objective: Any) -> Any:
    """The loss of the family that an objective's setting names, with its usual constants; None where it has one of its own."""
    from diffalign import losses

    name = getattr(objective, "loss", None)
    return losses.load(name) if name in losses.names() else None


def _uses_scores(objective: Any, data: DataSettings) -> bool:
    """Whether the run uses a judge's scores of the data's pairs."""
    loss = named_loss(objective)
    of_loss = loss is not None and "rewards" in loss.needs
    return of_loss or bool(objective.about.judged) or data.curriculum != "none"


def _asks_nobody(objective: Any) -> bool:
    """Whether training never asks a reference."""
    from diffalign.objectives._family import needs_reference

    loss = named_loss(objective)
    return objective.about.reference == NOBODY or (loss is not None and not needs_reference(loss))


def lone_pairs(objective: Any, batch: BatchSettings) -> list[str]:
    """Messages about micro-batches of one pair, where a loss or its baseline compares a pair with others."""
    from diffalign.losses import MismatchedMean
    from diffalign.objectives._family import refuse_lone_samples, refuse_small_batches

    loss, baseline = named_loss(objective), None
    if getattr(objective, "baseline", None) == "mismatched":
        baseline = MismatchedMean()
    elif loss is not None and loss.baseline:
        baseline = loss.baseline()
    try:
        refuse_lone_samples(baseline, batch)
        if loss is not None:
            refuse_small_batches(loss, batch)
    except UserError as error:
        return [f"batch.batch_size: {error}"]
    return []


def idle_rounds(loop: Any) -> list[str]:
    """Messages about rounds of the loop at whose ends nothing happens."""
    if loop.round_every and not loop.rounds:
        return ["loop.round_every: is the length of rounds at whose ends nothing happens; set --round-reference round as well"]
    return []


def without_held_out(loop: Any, data: Any, samples: bool = False) -> list[str]:
    """Messages about a choice by the validation loss where nothing is held out."""
    if loop.keep_best and samples:
        return ["loop.keep_best: chooses by the validation loss, and an objective that samples its own pictures has none"]
    if loop.keep_best and not data.validation_pairs:
        return ["loop.keep_best: chooses by the validation loss, and validation_pairs is 0"]
    return []


_OF_PICTURES = ("crop", "flip", "latents", "prompt_dropout", "scores", "max_unreadable", "validation_pairs", "validation_draws")
"""Settings of the data about pictures and their visits, idle where an objective samples its own."""
_OF_ROWS = ("split", "columns", "ties")
"""Settings of the data about its rows, idle where there are prompts alone."""


def _idle(objective: Any, data: DataSettings, samples: bool) -> list[str]:
    """Messages about settings of features that are switched off, and of pictures where there are none."""
    out, changed = [], _changed(data)
    if getattr(objective, "divergence", "alpha") != "alpha" and "divergence_alpha" in _changed(objective):
        out.append("objective.divergence_alpha: is about the alpha divergence; set --divergence alpha as well")
    if "bucket_step" in changed and not data.buckets:
        out.append("data.bucket_step: is about the sides of buckets, and there are none; set --buckets as well")
    if data.curriculum == "none":
        idle = [name for name in changed if name.startswith("curriculum_")]
        out += [f"data.{name}: is about a curriculum, and there is none; set --curriculum margin as well" for name in idle]
    if samples:
        idle = [name for name in changed if name in _OF_PICTURES]
        out += [f"data.{name}: is about pictures of a data set, and this objective samples its own" for name in idle]
    return out


def _idle_sources(whole: Mapping[str, Any], samples: bool) -> list[str]:
    """Messages about settings of rows, judges and sampling where there are none."""
    out, reward = [], whole["reward"]
    if samples and not whole["pairs"]:
        idle = [name for name in _changed(whole["data"]) if name in _OF_ROWS]
        out += [f"data.{name}: is about the rows of a data set, and there are prompts alone" for name in idle]
    if reward.reward_options and not reward.reward:
        out.append("reward.reward_options: are about judges that reward, and none is named; name them (--reward)")
    if "rollout_batch" in _changed(reward) and whole["objective"].about.draws_ahead:
        out.append("reward.rollout_batch: is about pictures that are sampled in training, and this objective samples none")
    return out


def _not_beforehand(objective: Any, loop: Any) -> list[str]:
    """Reasons why the reference's errors cannot be computed before training."""
    out = []
    if not objective.about.draws_ahead:
        out.append(f"needs pairs that are only noised, and this objective learns from: {objective.about.source}")
    elif _asks_nobody(objective):
        out.append("training asks no reference here, with this loss")
    elif objective.cost.forward_only > 2:
        out.append("the loss also asks the reference about mismatched prompts, which nobody can know beforehand")
    if loop.round_reference == "round":
        out.append("loop.round_reference is round, and the policy of a round's beginning cannot be asked before training")
    return out


def remarks(settings: TrainSettings) -> list[str]:
    """Warnings about settings that are allowed but seldom meant, the objective's own first."""
    from diffalign.objectives._family import remarks as of_objective

    lora, warmup, steps, out = settings.lora, settings.optimizer.warmup_steps, settings.loop.steps, []
    if settings.adapter == "lora" and lora.alpha != lora.rank:
        out.append(
            f"alpha {lora.alpha:g} at rank {lora.rank}: the LoRA acts alpha / rank = {lora.alpha / lora.rank:.3g} times as "
            f"strongly as with alpha {lora.rank}, at which recipes and their learning rates are."
        )
    if settings.adapter == "full" and (idle := _changed(lora)):
        out.append(f"adapter is full: {', '.join(idle)} of the LoRA do nothing.")
    if warmup >= steps:
        out.append(
            f"warmup_steps {warmup} of {steps} steps: the learning rate never gets to {settings.optimizer.learning_rate:g}."
        )
    return [*of_objective(settings.objective), *out, *_idle_by_the_way(settings)]


def _idle_by_the_way(settings: TrainSettings) -> list[str]:
    """Warnings about settings of what is switched off. They are no mistakes, for a recipe may have brought them."""
    loop, data, compared, out = settings.loop, settings.data, settings.evaluation, []
    if compared.judges and not compared.prompts:
        out.append(f"prompts is none, so nothing is compared with the base: {', '.join(_changed(compared))} do nothing.")
    samples = PROMPTS in settings.objective.about.data
    idle = [name for name in ("validate_every",) if loop.validate_every and name in _changed(loop)]
    idle += [name for name in ("validation_draws",) if name in _changed(data)]
    if idle and (samples or not data.validation_pairs):
        out.append(f"nothing is held out for validation: {', '.join(idle)} do nothing.")
    if settings.pairs and samples and (settings.feedback or settings.train_prompts):
        out.append(f"pairs are not learnt from: prompts are those of {'feedback' if settings.feedback else 'train_prompts'}.")
    if not loop.checkpoint_every and "keep_checkpoints" in _changed(loop):
        out.append("checkpoint_every is 0: keep_checkpoints has one checkpoint to keep, that of the end.")
    return out


SCHEMA = Schema(TrainSettings, TOP_LEVEL, sections, _missing, _contradictions, _of_feedback)
