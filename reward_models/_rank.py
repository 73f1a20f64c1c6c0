"""Pictures of one prompt in order, best first."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from reward_models._judge import Scorer
    from reward_models._pictures import Pictures

THUMBNAIL = 160
SHOWN = 24
"""Pictures that a notebook shows."""


@dataclass(frozen=True)
class Place:
    """One picture in a ranking; equal scores share a rank. ``rank`` None: it could not be judged."""

    number: int
    name: str
    score: float
    rank: int | None
    probability: float | None


@dataclass(frozen=True)
class Ranking:
    """``places`` best first; what could not be judged comes last.

    ``order`` are the numbers of the pictures in that order, ``ranks`` each picture's rank from 1 in the order they were given.
    A place's ``probability`` is the judge's own that the picture would be chosen among all (Luce's rule, softmax of
    sharpness * score); None for judges whose preferences do not follow from scores alone.
    """

    judge: str
    prompt: str | None
    places: tuple[Place, ...]
    pictures: Pictures

    @property
    def order(self) -> list[int]:
        return [place.number for place in self.places]

    @property
    def ranks(self) -> list[int | None]:
        return [place.rank for place in sorted(self.places, key=lambda p: p.number)]

    @property
    def scores(self) -> list[float]:
        return [place.score for place in sorted(self.places, key=lambda p: p.number)]

    @property
    def best(self) -> Image.Image | None:
        """The picture that ranks first; None if none could be judged."""
        first = self.places[0] if self.places else None
        return self.pictures[first.number] if first and first.rank is not None else None

    def __iter__(self) -> Iterator[Place]:
        return iter(self.places)

    def to_text(self) -> str:
        """A line for each picture."""
        rows = [f"{p.rank or '-':>4}  {p.score:>9.4f}  {_percent(p.probability):>6}  {p.name}" for p in self.places]
        return "\n".join([f"{'rank':>4}  {self.judge:>9}  {'P':>6}  picture", *rows])

    def __repr__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        """Thumbnails with rank and score, for notebooks."""
        cells = "".join(self._cell(place) for place in self.places[:SHOWN])
        more = f"<p>and {len(self.places) - SHOWN} more</p>" if len(self.places) > SHOWN else ""
        title = f"<p><b>{html.escape(self.judge)}</b> {html.escape(self.prompt or '')}</p>"
        return f'{title}<div style="display:flex;flex-wrap:wrap;gap:8px">{cells}</div>{more}'

    def _cell(self, place: Place) -> str:
        label = f"{place.rank or '-'}. {place.score:.4g}"
        label += f" ({_percent(place.probability)})" if place.probability is not None else ""
        name = html.escape(place.name)
        return (
            f'<figure style="margin:0;width:{THUMBNAIL}px">{_thumbnail(self.pictures[place.number], name)}'
            f'<figcaption style="font-size:12px">{label}<br><span style="color:#777;word-break:break-all">{name[-48:]}</span>'
            f"</figcaption></figure>"
        )


def ranking(judge: Scorer, pictures: Pictures, prompt: str | None, scores: Tensor) -> Ranking:
    """The ranking by ``scores`` [N]; equal scores keep the order they came in."""
    import torch

    given, sign = scores.tolist(), 1.0 if judge.info.higher_is_better else -1.0
    judged = [i for i, score in enumerate(given) if not math.isnan(score)]
    order = sorted(judged, key=lambda i: -sign * given[i])
    rank: dict[float, int] = {}
    for place, i in enumerate(order, 1):
        rank.setdefault(given[i], place)  # that of the first with this score
    chance: dict[int, float] = {}
    if judge.sharpness is not None and judged:
        chances = torch.softmax(judge.sharpness * sign * scores[judged].double(), dim=0)
        chance = dict(zip(judged, chances.tolist(), strict=True))
    places = [Place(i, pictures.name(i), given[i], rank[given[i]], chance.get(i)) for i in order]
    places += [Place(i, pictures.name(i), score, None, None) for i, score in enumerate(given) if math.isnan(score)]
    return Ranking(judge.info.name, prompt, tuple(places), pictures)


def _percent(probability: float | None) -> str:
    return "" if probability is None else f"{probability:.1%}"


def _thumbnail(picture: Image.Image | None, name: str) -> str:
    if picture is None:
        return f'<div style="width:{THUMBNAIL}px;height:{THUMBNAIL}px;background:#eee">unreadable</div>'
    from PIL import Image

    scale = THUMBNAIL / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    small = picture.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="{name}">'
