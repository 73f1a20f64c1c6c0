"""Errors of the reference computed before training, so that it need not be in memory while the policy learns.

Before its first step the network is the reference (or is with its adapter switched off), so no copy of it is made. The errors are
those at the draws at which the policy will be trained, in the same precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from diffalign.data.cache import PairCache
from diffalign.data.cache_files import ERRORS, Busy, CacheFolder
from diffalign.data.cached_errors import CachedErrors, cache_errors, with_known
from diffalign.data.draws import FixedDraws
from diffalign.data.loader import LoaderSettings
from diffalign.data.pairs import Progress
from diffalign.objectives._denoising import errors_beforehand
from diffalign.processes import ManyProcesses
from diffalign.references import AdapterOff, Frozen
from diffalign.types import PairBatch
from diffalign.weights import without_dropout
from pipelines.families._denoiser import working_dtype
from pipelines.image_settings import TrainSettings
from pipelines.run import Epochs

FOLDER = "reference"
PAIRS = 8
"""Pairs that are shown at a time, at least: they take less than one pair in training (of SDXL at 1024 pixels, counted in float32:
4.9 GiB, and 13.6), as nothing is kept for gradients."""

SPARE = 1.25
"""Passes of the reference beforehand for each that training would ask for, above which a run says so."""


def is_enough(settings: TrainSettings) -> bool:
    """Whether training can do without the reference: its errors are kept, or only validation asks it and it would be a copy."""
    objective = settings.objective
    asked_by_nobody = objective.about.draws_ahead and objective.cost.forward_only == 0
    return settings.reference.reference_draws > 0 or (settings.adapter == "full" and asked_by_nobody)


def folder_of(settings: TrainSettings) -> Path:
    """Folder of the cached errors."""
    return settings.reference.reference_cache or settings.cache_folder / FOLDER


def are_cached(settings: TrainSettings) -> bool:
    """Whether the errors at as many draws of this seed are there already; what else they depend on is not compared."""
    folder, own = CacheFolder(folder_of(settings), ERRORS), settings.reference
    if not folder.complete:
        return False
    draws = folder.read_json("fingerprint.json").get("draws", {})  # of encoded pairs, which the run refuses, there are none
    return (draws.get("count"), draws.get("seed")) == (own.reference_draws, own.reference_seed)


def told_spare(settings: TrainSettings, epochs: Epochs) -> str:
    """A line on fixed draws that ask the reference for more than training would; empty where they do not, or are cached."""
    draws = settings.reference.reference_draws
    if not draws or are_cached(settings):
        return ""
    visits = epochs.after(settings.loop.steps)
    if draws <= SPARE * visits:
        return ""
    return (
        f"reference_draws {draws}, and each pair is visited {visits:.2g} times: beforehand the reference is asked "
        f"{draws / visits:,.1f} times as often as training would ask it, and draws beyond the visits are never used. That pays "
        "where other runs share the errors (--reference-cache); else fewer --reference-draws, or 0, take less time."
    )


def pairs_at_once(settings: TrainSettings) -> int:
    """Pairs that are shown to the reference in one call. It is in no fingerprint: errors differ by rounding."""
    if settings.reference.reference_batch is not None:
        return settings.reference.reference_batch
    # A step that recomputes its activations may have no room for ``PAIRS``: there the encoders' pictures are the measure.
    least = settings.data.encode_batch // 2 if settings.compute.gradient_checkpointing else PAIRS
    return max(settings.batch.batch_size, least)


class ReferenceErrors:
    """The network as it is before the first step."""

    def __init__(
        self, settings: TrainSettings, family: Any, cache: PairCache, visits: LoaderSettings, accelerator: Accelerator
    ) -> None:
        self._settings, self._cache, self._visits, self._accelerator = settings, cache, visits, accelerator
        bare = family.denoiser.with_network(family.network)  # no wrapper: processes ask at their own pace
        self._start = AdapterOff(bare) if family.has_adapter else Frozen(bare)
        self._schedule, self._dtype, self._network = bare.schedule, working_dtype(family.network), family.network

    def __call__(self, batch: PairBatch) -> Tensor:
        """The reference's errors [B, 2] of winners and losers."""
        with without_dropout(self._network):  # of the base itself, if its configuration has any
            return errors_beforehand(batch.to(self._accelerator.device), self._start, self._schedule, self._cache.kind)

    def known(self, batches: Sequence[PairBatch]) -> Sequence[PairBatch]:
        """Batches of validation with its errors."""
        return with_known(batches, self, ManyProcesses(self._accelerator))

    def cache(self, base_digest: str, progress: Progress, renew: bool = False, busy: Busy | None = None) -> CachedErrors:
        """The errors at the fixed draws of all pairs, read or computed; ``renew`` applies to a folder of the run's own."""
        settings, visits = self._settings, self._visits
        own = settings.reference
        draws = FixedDraws(
            own.reference_draws, own.reference_seed, visits.levels, visits.prompt_dropout, visits.flip, visits.latent_mode
        )
        depends_on = {
            "reference": base_digest,
            "precision": {
                "mixed": settings.compute.mixed_precision,
                "weights": str(self._dtype).removeprefix("torch."),
                **({"tf32": True} if settings.compute.tf32 else {}),
            },
            "encoded": self._cache.fingerprint,
            "schedule": {**self._schedule.fingerprint(), "error_as": settings.error_as},
        }
        how: dict[str, Any] = {"batch_size": pairs_at_once(settings), "progress": progress, "busy": busy}
        how["renew"] = renew and own.reference_cache is None
        return cache_errors(
            self._cache, draws, self, folder_of(settings), depends_on, processes=ManyProcesses(self._accelerator), **how
        )
