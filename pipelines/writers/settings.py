"""The settings of a training run of a prompt writer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from diffalign.objectives._about import FROZEN_START, About
from diffalign.settings import check_options, option
from pipelines.config import Schema, flag_of
from pipelines.image_settings import BatchSettings, idle_rounds, lone_pairs, without_held_out

COMMANDS = {"prompt-sft": "prompts sft", "sem-dpo": "prompts train"}
"""The command that runs each objective: ``diffalign ...``."""


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """The low-rank adapter (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = option(16, "rank of the adapter", ge=1)
    lora_alpha: float = option(32.0, "LoRA alpha: the adapter is scaled by lora_alpha / rank", gt=0)
    targets: tuple[str, ...] = option(("all-linear",), "layers that get an adapter: ends of their names, or all-linear")
    dropout: float = option(0.0, "dropout probability in the adapter", ge=0, lt=1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class RewriteSettings:
    """The rewrites to learn from, and how a prompt and its rewrite are encoded."""

    split: str = option("train", "split of the data set")
    ties: Literal["keep", "drop"] = option("drop", "ties (pairs with label 1/2): keep or drop")
    columns: dict[str, str] = option(None, "columns with other names than the usual ones, as role=name")  # type: ignore[assignment]
    template: str = option("auto", "prompt template: rephrase, chat, auto, or a text of your own with {prompt} in it")
    instruction: str | None = option(None, "user turn of a chat template, with {prompt} in it; none for the usual one")
    system: str | None = option(None, "system turn of a chat template; none for no such turn")
    max_prompt_tokens: int = option(
        128, "most tokens of a prompt, its template included; rows with longer ones are left out and counted", ge=1
    )
    max_rewrite_tokens: int = option(
        128, "most tokens of a rewrite; rows with longer ones are left out and counted, never cut", ge=1
    )
    max_left_out: float = option(0.01, "share of rows that may be left out before the run is refused", ge=0, le=1)
    validation_pairs: int = option(64, "rows kept out of training for validation", ge=0)
    embedding: str = option(
        "clip", "text embedding that distances are measured in: clip, clip-h, tiny, or a text encoder's folder or hub id"
    )
    distances: Literal["measured", "data"] = option(
        "measured", "distances of winners from their prompts: measured in the embedding, or read from the data's column distance"
    )
    embed_batch: int = option(64, "batch size of the embedding", ge=1)
    token_rewards: str | None = option(None, "writer trained by DPO whose log-ratios are the token rewards of TGDPO")

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class ComputeSettings:
    """Precision, memory, and the tracker of metrics."""

    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "no", "precision of the forward and backward pass; log-likelihoods stay float32"
    )
    gradient_checkpointing: bool = option(
        False, "gradient checkpointing: recompute activations in the backward pass, with less memory and a third more time"
    )
    tracker: str = option("tensorboard", "tracker of metrics by Accelerate's name; none for the JSONL file alone")

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class ShowSettings:
    """The held-out prompts whose rewrites before and after training are on the model card."""

    prompts: str | None = option(None, "held-out prompts: a file or a set by name; none for no rewrites on the card")
    prompt_count: int = option(16, "number of held-out prompts", ge=1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class PromptTrainSettings:
    """The settings of a whole run. ``objective`` holds those of the objective."""

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
    "model": "writer to start from: a folder (of a model, a LoRA or a run), a hub id, or tiny",
    "base": "base model of a LoRA to start from, if it is not the one on record",
    "pairs": "rewrites to learn from: a file, a folder or a hub id; or tiny, those of the tiny world's people",
    "output": "output folder of the run",
    "adapter": "what is trained: lora, or full for the whole model",
    "seed": "random seed",
}


def sections(objective: type) -> dict[str, type]:
    """The sections of a configuration for one objective, in the order in which they are printed."""
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
    loop = whole["loop"]
    return out + lone_pairs(objective, whole["batch"]) + idle_rounds(loop) + without_held_out(loop, data)


SCHEMA = Schema(PromptTrainSettings, TOP_LEVEL, sections, _missing, _contradictions)
