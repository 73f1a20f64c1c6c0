"""What relabelling pairs and choosing the best pictures share: the cache, the scoring of pictures, and the keys of those seen."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffalign.data.pairs import ImageSource, Progress, UnreadableImage
from diffalign.errors import UserError

if TYPE_CHECKING:
    from reward_models._cache import Cache
    from reward_models._judge import Scorer
    from reward_models._scoring import CacheLike

BATCHES_AT_ONCE = 16  # between two visits to the output; the networks wait for the disk only there


def check_scorers(judges: Mapping[str, Scorer]) -> None:
    """Raises ``UserError`` for what is no judge, or one whose scores depend on what is judged beside."""
    from reward_models._judge import Scorer
    from reward_models.base import JudgeError

    if not isinstance(judges, Mapping) or not all(isinstance(judge, Scorer) for judge in judges.values()):
        raise UserError(
            'Judges are given by names, {"name": judge}, and made by reward_models.load or of reward_models.PointwiseJudge; '
            f"got {judges!r}."
        )
    try:
        for judge in judges.values():
            judge.check_pointwise()
    except JudgeError as error:
        raise UserError(f"{error}.") from error


@contextmanager
def opened(cache: CacheLike) -> Iterator[Cache | None]:
    """The cache, opened once for all parts."""
    from reward_models._cache import Cache
    from reward_models.base import JudgeError

    try:
        known = Cache.of(cache)
    except JudgeError as error:
        raise UserError(f"--cache: {error}.") from error
    try:
        yield known
    finally:
        if known is not None and known is not cache:
            known.close()


def parts(total: int, rows_at_once: int, progress: Progress | None) -> Iterator[tuple[range, Callable[[int, int], None] | bool]]:
    """Some rows at a time, and what ``score`` reports to: its pictures, as a share of these rows."""
    for start in range(0, total, rows_at_once):
        numbers = range(start, min(start + rows_at_once, total))
        yield numbers, False if progress is None else _share(progress, numbers, total)
        if progress is not None:
            progress("judging", numbers.stop, total)  # also where there was nothing new to score


def _share(progress: Progress, numbers: range, total: int) -> Callable[[int, int], None]:
    return lambda done, of: progress("judging", numbers.start + len(numbers) * done // of, total)


def score_shown(
    judges: Mapping[str, Scorer], shown: Sequence[tuple[bytes, str]], where: str, progress: Any, **how: Any
) -> list[tuple[float, ...]]:
    """Scores by each judge of pictures with their prompts; NaN where a picture cannot be read. ``where`` names the data."""
    import reward_models
    from reward_models._pictures import UnreadablePictureWarning
    from reward_models.base import JudgeError

    if not shown:
        return []
    pictures, prompts = map(list, zip(*shown, strict=True))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnreadablePictureWarning)  # the report names them by their place in the data
            scores = reward_models.score(judges, pictures, prompts, progress=progress, **how)
    except JudgeError as error:
        raise UserError(f"{where} cannot be judged: {error}.") from error
    return list(zip(*(scores[name].tolist() for name in judges), strict=True))


def reason_without(image: ImageSource) -> str:
    """Why no judge gives this picture a score."""
    try:
        image.open()
    except UnreadableImage as error:
        return str(error)
    return "no judge gives it a score"


def key(content: bytes, prompt: str) -> bytes:
    """A digest of a picture and its prompt; equal ones are judged once."""
    return hashlib.blake2b(hashlib.sha256(content).digest() + prompt.encode(), digest_size=16).digest()


def known(value: float) -> float | None:
    """The score rounded to the digits of single precision; None for NaN."""
    return None if math.isnan(value) else float(f"{value:.9g}")
