"""A rollout with people's choices as training data: the identity of the model that made it, and how it is opened.

``diffalign rollout`` writes it (``rollouts``); ``diffalign train d3po --feedback FOLDER`` learns from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.data.prompt_cache import PromptCache, build_prompt_cache
from diffalign.errors import StaleCacheError, UserError
from diffalign.sources.store import Store
from diffalign.sources.stored import Stored, located
from pipelines.families._lora import SavedAdapter

PROMPT_FOLDER = "prompts"
"""Encoded, beside the trajectories: the run that learns from them sees the very numbers that made them."""


def made_by_model(base_digest: str, adapter: SavedAdapter | None, weights: str, mixed_precision: str) -> dict[str, Any]:
    """Which network sampled, and how it computed: what must agree where log-densities are compared.

    Args:
        weights: dtype of the network's weights.
        mixed_precision: no, bf16 or fp16.
    """
    lora = None if adapter is None else adapter.digest
    return {"base": base_digest, "lora": lora, "weights": weights, "mixed_precision": mixed_precision}


def refuse_another_model(stored: Stored, here: Mapping[str, Any], model: str, lora: str | None) -> None:
    """Raise UserError unless the trajectories were made by the model that a run starts from: ``here`` as ``made_by_model``."""
    made, folder = stored.store.made, stored.store.folder
    there, called = made.model, made.called
    if (there["weights"], there["mixed_precision"]) != (here["weights"], here["mixed_precision"]):
        raise UserError(
            f"The trajectories in {folder} were made with mixed precision {there['mixed_precision']} (weights in "
            f"{there['weights']}), and this run computes with {here['mixed_precision']} (weights in {here['weights']}): their "
            f"log-densities cannot be compared. Train with --mixed-precision {there['mixed_precision']}, or roll out again."
        )
    if there["base"] != here["base"]:
        raise UserError(
            f"The trajectories in {folder} were made by another model: {called['model']} (digest {there['base'][:12]}); this run "
            f"starts from {model} (digest {here['base'][:12]}). Train the model that made them, or roll out with this one."
        )
    if there["lora"] == here["lora"]:
        return
    started = f"the LoRA {lora}" if lora else "no LoRA"
    if there["lora"] is None:
        raise UserError(
            f"The trajectories in {folder} were made by {called['model']} itself, and this run starts from {started} on it. "
            f"Leave --start-lora out, or roll out with --lora {lora}."
        )
    raise UserError(
        f"The trajectories in {folder} were made with the LoRA {called['lora']}, and this run starts from {started}. "
        f"Start from where they were made: --start-lora {called['lora']}."
    )


def open_prompts(stored: Stored, encoder: Any) -> PromptCache:
    """The rollout's encoded prompts. Raises UserError if ``encoder`` is not the one that encoded them."""
    try:
        return build_prompt_cache(list(stored.prompts), encoder, stored.store.folder / PROMPT_FOLDER, option="--feedback")
    except StaleCacheError as error:
        raise UserError(
            f"The trajectories in {stored.store.folder} were made by another model than this run starts from: its text encoder "
            f"or tokenizer differs. {error}"
        ) from error


def describe(stored: Stored) -> str:
    """One sentence about the stored trajectories and choices."""
    n = stored.stats()
    notes = [f"{n['ties']} of them ties"] if n["ties"] else []
    notes += [f"{n['equal_scores_skipped']} pairs with equal scores skipped"] if n["equal_scores_skipped"] else []
    notes += [f"{n['lines_by_judges']} lines chosen by judges, not people"] if n["lines_by_judges"] else []
    counted = f"{n['pairs']} pairs of {n['prompts_with_choices']} of {n['prompts']} prompts"
    return "; ".join([f"{stored.store.folder}: {counted}", *notes])


def sampling_settings(where: str | Path) -> dict[str, Any]:
    """Settings of d3po that sample as the trajectories were sampled. Raises UserError if there are none."""
    sampling = Store.open(located(where)[0]).made.sampling
    return {"rollout_steps": sampling.steps, "eta": sampling.eta, "guidance": sampling.guidance}
