"""What the configuration of a prompt writer's run holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from diffalign.objectives._about import FROZEN_START, About
from diffalign.settings import check_options, option
from pipelines.config import Schema, flag_of
from pipelines.image_settings import BatchSettings

COMMANDS = {"prompt-sft": "prompts sft", "sem-dpo": "prompts train"}
"""How each objective is run: ``diffalign ...``."""


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """The low-rank adapter (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = option(16, "rank of the adapter", ge=1)
    lora_alpha: float = option(32.0, "the adapter's scale is lora_alpha / rank", gt=0)
    targets: tuple[str, ...] = option(("all-linear",), "modules that get an adapter: ends of their names, or all-linear")
    dropout: float = option(0.0, "dropout in the adapter", ge=0, lt=1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class RewriteSettings:
    """Which rewrites, and how a prompt and its rewrite are put before the model."""

    split: str = option("train", "split of the data set")
    ties: Literal["keep", "drop"] = option("drop", "keep ties with label 1/2, or drop them")
    columns: dict[str, str] = option(None, "other column names, as ours=theirs")  # type: ignore[assignment]
    template: str = option("auto", "rephrase, chat, auto, or a text of your own with {prompt} in it")
    instruction: str | None = option(None, "of a chat template: the user's turn, with {prompt} in it; none for the usual one")
    system: str | None = option(None, "of a chat template: the system's turn")
    max_prompt_tokens: int = option(128, "prompts with more tokens are left out and counted", ge=1)
    max_rewrite_tokens: int = option(128, "rewrites with more tokens are left out and counted, never cut", ge=1)
    max_left_out: float = option(0.01, "share of rows that may be left out before the run is refused", ge=0, le=1)
    validation_pairs: int = option(64, "rows kept out of training for validation", ge=0)
    embedding: str = option("clip", "embedding of meaning: clip, clip-h, tiny, or a folder or hub id of a text encoder")
    distances: Literal["measured", "data"] = option(
        "measured", "distance of a winner from its prompt: measured in the embedding, or the data's column distance"
    )
    embed_batch: int = option(64, "texts embedded at a time", ge=1)
    token_rewards: str | None = option(None, "a writer trained by DPO, whose log-ratios reward the tokens (TGDPO)")

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class ComputeSettings:
    """How the arithmetic is done."""

    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "precision of the model; log-likelihoods stay float32")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, a third more time")
    tracker: str = option("tensorboard", "where metrics go, by Accelerate's name for it; none for the JSONL only")

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class ShowSettings:
    """Rewrites of held-out prompts, before and after training, for the card."""

    prompts: str | None = option(None, "held-out prompts: a file or a set by name; none for nothing to show")
    prompt_count: int = option(16, "how many of them", ge=1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class PromptTrainSettings:
    """A whole run. ``objective`` holds the settings of the objective."""

    model: str
    output: Path
    objective: Any
    lora: LoraSettings
    data: RewriteSettings
    batch: BatchSettings
    optimizer: Any  # diffalign.optimisation.OptimizerSettings
    loop: Any  # diffalign.train.LoopSettings
    compute: ComputeSettings
    show: ShowSettings
    pairs: str | None = None
    base: str | None = None
    adapter: Literal["lora", "full"] = "lora"
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self)


TOP_LEVEL = {
    "model": "the writer to start from: a folder (of a run, too), a hub id, or tiny",
    "base": "of a LoRA to start from: the model below it, if it is not where it was",
    "pairs": "rewrites to learn from: a file, a folder, a hub id; or tiny, what the tiny world's people write, or prefer",
    "output": "folder of the run",
    "adapter": "train a LoRA or the whole model",
    "seed": "seed of everything",
}


def sections(objective: type) -> dict[str, type]:
    """The sections of a configuration for one objective, in the order they are shown."""
    from diffalign.train import LoopSettings
    from pipelines.optimizers import OptimizerSettings  # with all optimizers known to it

    return {
        "objective": objective,
        "lora": LoraSettings,
        "data": RewriteSettings,
        "batch": BatchSettings,
        "optimizer": OptimizerSettings,
        "loop": LoopSettings,
        "compute": ComputeSettings,
        "show": ShowSettings,
    }


def _missing(tree: Mapping[str, Any], about: About) -> list[str]:
    return [] if tree.get("pairs") else [f"pairs: needed but not given ({TOP_LEVEL['pairs']}; {flag_of('pairs')})"]


def _contradictions(whole: Mapping[str, Any]) -> list[str]:
    objective, data = whole["objective"], whole["data"]
    out = []
    if whole["loop"].round_reference == "round" and objective.about.reference != FROZEN_START:
        found = objective.about.reference
        out.append(f"loop.round_reference: only a frozen start can be renewed; what this objective compares with is {found!r}")
    guided = getattr(objective, "token_guidance", 0.0)
    if bool(guided) != (data.token_rewards is not None):
        out.append("data.token_rewards and objective.token_guidance: one is set and the other is not; they go together")
    return out


SCHEMA = Schema(PromptTrainSettings, TOP_LEVEL, sections, _missing, _contradictions)
