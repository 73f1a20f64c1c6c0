"""``diffalign train OBJECTIVE --prepare``: fill the cache of a run, or a part of it, and train nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from diffalign.data.cache import fill_cache
from diffalign.errors import UserError
from diffalign.processes import failing_together
from pipelines import heap, ingredients, memory_presets, shares
from pipelines.image_settings import TrainSettings
from pipelines.progress import Bar
from pipelines.run import Say
from pipelines.run_folder import start_accelerator

NAMED = 5  # files that are made anew


def prepare(settings: TrainSettings, part: str, *, say: Say = print, progress: bool = True) -> int:
    """Encode the pairs of these settings as training would; returns how many shards are still missing.

    Args:
        part: ``"3/16"`` for the third of sixteen parts, ``"1/1"`` for everything. Jobs with the other parts may run at any time.

    Raises:
        UserError: no such part, no folder for the cache, an objective without pairs, or what ``fill_cache`` raises.
    """
    share, folder = share_from(part), settings.data.cache
    if ingredients.samples_itself(settings):
        raise UserError("--prepare encodes pairs or pictures; this objective makes its own, and encodes prompts when it trains.")
    if folder is None:
        raise UserError("--prepare needs --cache FOLDER, where training will look for what is encoded.")
    everyone = shares.started()
    with failing_together(everyone):
        settings, _ = memory_presets.applied(settings)
        accelerator = start_accelerator(settings)
    say = say if accelerator.is_main_process else lambda _: None
    family, table = ingredients.load_model(settings, say, network=False), ingredients.open_data(settings)
    say(table.description)
    family.encoder.work_on(accelerator.device)
    with Bar(progress and accelerator.is_main_process) as bar, heap.kept():
        how = {"processes": everyone, "progress": bar.advance, "busy": say, "mended": partial(_tell_of_lost, say)}
        missing = fill_cache(**ingredients.encoding(settings, table, family), **how, part=share)
    say(_told(folder, part, missing))
    if settings.reference.reference_draws:
        say("The reference's errors are not made here, for they need the network: the first run to train makes and keeps them.")
    accelerator.end_training()
    return missing


def _tell_of_lost(say: Say, lost: list[str]) -> None:
    more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
    say(f"lost or cut short, and made anew: {', '.join(lost[:NAMED])}{more}")


def share_from(part: str) -> tuple[int, int]:
    """``"3/16"`` as (2, 16). Raises ``UserError`` for what is no part."""
    which, _, of = part.partition("/")
    if not (which.isdecimal() and of.isdecimal() and 1 <= int(which) <= int(of)):
        raise UserError(f"--prepare is {part!r}; expected K/N with K from 1 to N, as in 3/16.")
    return int(which) - 1, int(of)


def _told(folder: Path, part: str, missing: int) -> str:
    if not missing:
        return f"The cache in {folder} is complete."
    return f"Part {part} is done; {missing} shards of the cache in {folder} are still missing: the other parts' jobs encode them."
