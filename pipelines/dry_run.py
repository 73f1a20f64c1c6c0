"""Checks of a run without reading weights or pictures; each check is the function that the run itself calls.

The findings also name what could not be checked: models and data of the hub that are not downloaded, a single file's
configuration. Judges are checked by name, not loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from diffalign.data.draws import Curriculum
from diffalign.data.loader import easiest_first
from diffalign.data.readers import hub
from diffalign.data.table import PairTable
from diffalign.errors import UserError
from diffalign.sources.rounds import refuse_broken_rounds
from pipelines import families, ingredients, previews, reference_errors, training
from pipelines.families import _lora
from pipelines.families._hub import HubUnreachable
from pipelines.image_settings import TrainSettings
from pipelines.judge_options import judges_called
from pipelines.prompts import held_out_prompts
from pipelines.run import Epochs
from pipelines.run_folder import check_tracker
from pipelines.tiny.shipped import pairs_called


@dataclass
class Findings:
    """Mistakes that were found, checks that could not be made, and what the run would remark on; a sentence for each."""

    mistakes: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    table: PairTable | None = field(default=None, compare=False)  # the data, where they could be opened

    def check(self, check: Callable[..., Any], *given: Any) -> Any:
        """The answer of a check; None if it refuses, which is noted."""
        try:
            return check(*given)
        except HubUnreachable as error:
            self.unchecked.append(str(error))
        except UserError as error:
            self.mistakes.append(str(error))
        return None


def look(settings: TrainSettings) -> Findings:
    """Find everything that would be refused before the first step, as far as it can be known."""
    found = Findings()
    found.check(check_tracker, settings.compute.tracker)
    for check in training.preflight_checks(settings):
        found.check(check)
    for check in (_judges_of_the_comparison, _judges_of_training, _rounds, previews.prompts_of):
        found.check(check, settings)
    _look_at_data(settings, found)
    _look_at_model(settings, found)
    return found


def _judges_of_the_comparison(settings: TrainSettings) -> None:
    e = settings.evaluation
    if e.prompts:
        judges_called(",".join(e.judges), e.judge_options)
        held_out_prompts(e.prompts, e.prompt_count)


def _judges_of_training(settings: TrainSettings) -> None:
    chosen = settings.reward
    if chosen.reward and not settings.feedback:
        judges_called(",".join(chosen.reward), chosen.reward_options)


def _rounds(settings: TrainSettings) -> None:
    """Check the rounds for one process, the least there can be; several processes have to divide a round, too."""
    pairs = getattr(settings.objective, "round_pairs", None)
    if pairs is not None and ingredients.samples_itself(settings) and not settings.feedback:
        refuse_broken_rounds(pairs, settings.batch.accumulation)


# ---------------------------------------------------------------------------------------------------------------- data


def _look_at_data(settings: TrainSettings, found: Findings) -> None:
    if settings.pairs is not None and hub.claims(pairs_called(settings.pairs)):
        found.unchecked.append(f"there are no data {settings.pairs} here; on the hub they were not looked for.")
        return
    found.table = table = found.check(ingredients.open_data, settings)
    if ingredients.samples_itself(settings) and settings.feedback is None and settings.train_prompts:
        found.check(ingredients.prompts_to_sample, settings, None)
    found.check(ingredients.refuse_unscored, settings, table)
    if table is not None and settings.data.curriculum != "none":
        found.check(_curriculum, settings, table)
    if table is not None and settings.reference.reference_draws:
        held_out = min(settings.data.validation_pairs, len(table) // 2)
        epochs = Epochs(ingredients.pairs_per_step(settings, 1), len(table) - held_out)
        found.remarks += filter(None, [found.check(reference_errors.told_spare, settings, epochs)])


def _curriculum(settings: TrainSettings, table: PairTable) -> None:
    """Check the curriculum with all pairs, some of which are kept for validation."""
    data, batch = settings.data, settings.batch
    if not table.scored and not settings.reward.reward:
        easiest_first(table, [])  # which refuses pairs without scores
    stages, together = data.curriculum_stages, batch.batch_size * batch.accumulation
    try:
        Curriculum(range(len(table)), stages, data.curriculum_cumulative, settings.loop.steps, together, settings.seed)
    except ValueError as error:
        raise UserError(f"data.curriculum: {error}. Lower --curriculum-stages.") from error


# --------------------------------------------------------------------------------------------------------------- model


def _look_at_model(settings: TrainSettings, found: Findings) -> None:
    origin = found.check(_origin, settings)
    if origin is None:
        return
    if origin.configured_at is None:
        found.unchecked.append(f"{settings.model} is a single file without --single-file-config.")
        return
    family = found.check(_sketched, settings)
    if family is not None:
        for check in _checks_of(settings, family):
            found.check(check)


def _origin(settings: TrainSettings) -> Any:
    return families.find(settings.model, config=settings.single_file_config).leaving_out(settings.without)


def _sketched(settings: TrainSettings) -> Any:
    expected = None if settings.prediction_type == "auto" else settings.prediction_type
    how = {"config": settings.single_file_config, "without": settings.without, "prediction_type": expected}
    return families.sketch(settings.model, **how)


def _checks_of(settings: TrainSettings, family: Any) -> Iterator[Callable[[], Any]]:
    """The checks in the order of a run; the LoRA comes last, for it changes the network."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    yield lambda: ingredients.encoding(settings, None, family)
    if not ingredients.samples_itself(settings):
        yield lambda: ingredients.training_levels(settings.data, family.denoiser.schedule)
    yield lambda: family.set_attention(settings.compute.attention, device)
    if settings.adapter == "lora":
        yield lambda: _with_lora(settings, family)


def _with_lora(settings: TrainSettings, family: Any) -> None:
    lora, saved = settings.lora, Findings().check(ingredients.start_adapter, settings)
    family.attach_lora(rank=lora.rank, alpha=lora.alpha, targets=lora.targets, dropout=lora.dropout)
    if saved is not None:
        _lora.as_state(family.network, saved)
