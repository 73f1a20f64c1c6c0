"""The judge of the tiny world: reads a picture back by plain image processing, with no network.

The tiny world (``pipelines/tiny``) draws one or two coloured shapes on a plain background. Its vocabulary lives here,
because a judge may import nothing of ours while the world may import a judge.

Two numbers come out of a picture and its caption, both in [0, 1]:

* **faithfulness**: the share of the caption's claims that the picture keeps. Claims are: each object is there, in its
  shape and colour; the stated relation holds; there are no objects that nobody asked for.
* **taste**: a fixed function of style, which plain captions do not mention (``TASTE_WEIGHTS``): vivid colours, an outline,
  soft shading, no clutter, the group in the centre.

``utility`` = (taste + faithfulness) / 2 is what the synthetic people vote by, and the score this judge returns.

Shapes: ``H`` = height, ``W`` = width (64 in the shipped world), arrays are ``[H, W, 3]`` float32 in [0, 1].
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from reward_models._judge import PointwiseJudge, texts_for
from reward_models._pictures import Pictures
from reward_models.base import JudgeError, RewardInfo

if TYPE_CHECKING:
    import torch

NAME = "oracle"

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "yellow": (0.95, 0.80, 0.08),
    "green": (0.10, 0.72, 0.20),
    "cyan": (0.08, 0.76, 0.82),
    "blue": (0.12, 0.26, 0.92),
    "purple": (0.70, 0.15, 0.88),
}
BACKGROUNDS: dict[str, float] = {"white": 0.96, "grey": 0.62, "black": 0.06}
SIZES: dict[str, tuple[float, float]] = {"small": (7.5, 9.0), "large": (11.5, 13.5)}  # radius in pixels of a 64-pixel picture
RELATIONS: dict[str, tuple[int, int]] = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
"""Unit vector (x to the right, y downwards) from the first object to the second."""

TASTE_WEIGHTS: dict[str, float] = {"saturation": 0.25, "outline": 0.20, "shading": 0.15, "clutter": -0.25, "offset": -0.15}
"""Weight of each style trait; a negative weight means that less is better."""

MIN_SATURATION = 0.5  # the palest objects keep half of their colour
OUTLINE_PIXELS = 2.2  # width of the strongest outline
SHADE_DEPTH = 0.45  # how much darker the far side of the most shaded object is
CLUTTER_SPECKS = 10  # specks in the most cluttered picture
OFFSET_PIXELS = 10.0  # displacement of the most off-centre group

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_MIN_CHROMA = 0.13  # an object's pixel has more colour than this, a background's or an outline's less
_MIN_AREA = 26  # pixels; smaller patches of colour are clutter
_MIN_RIM = 16  # pixels; a connected patch with fewer cannot enclose enough to reach _MIN_AREA
_TEMPLATE = 24


# --------------------------------------------------------------------------------------------------------------- shapes


def _regular(n: int, start: float, radii: Sequence[float] = (1.0,)) -> np.ndarray:
    angles = start + np.arange(n * len(radii)) * 2 * np.pi / (n * len(radii))
    r = np.resize(np.asarray(radii), angles.shape)
    return np.stack([r * np.cos(angles), r * np.sin(angles)], axis=1)


def _cross(arm: float = 0.36) -> np.ndarray:
    a = arm
    return np.array([(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)])


SHAPES: dict[str, np.ndarray] = {
    "circle": _regular(48, 0.0) * 0.95,
    "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.85,
    "triangle": np.array([(0, -1.0), (1.05, 0.8), (-1.05, 0.8)]),
    "star": _regular(5, -np.pi / 2, (1.15, 0.5)),
    "cross": _cross(),
}
"""Outlines as polygons ``[n, 2]`` in units of the object's radius, y downwards."""


# ------------------------------------------------------------------------------------------------------------- captions


@dataclass(frozen=True)
class CaptionObject:
    """One object as a caption names it; ``size`` is None when the caption leaves it open."""

    colour: str
    shape: str
    size: str | None = None


@dataclass(frozen=True)
class CaptionClaims:
    """What a caption claims: its objects in order, the relation of the first to the second, the background."""

    objects: tuple[CaptionObject, ...]
    relation: str | None = None
    background: str | None = None


def _words(options: dict) -> str:
    return "|".join(sorted(options, key=len, reverse=True))


_OBJECT = re.compile(rf"\b(?:(?P<size>{_words(SIZES)})\s+)?(?P<colour>{_words(COLOURS)})\s+(?P<shape>{_words(SHAPES)})\b")
_RELATION = re.compile(rf"\b({_words(RELATIONS)})\b")
_BACKGROUND = re.compile(rf"\b({_words(BACKGROUNDS)}) background\b")


def read_caption(caption: str) -> CaptionClaims:
    """The claims in a caption of the tiny world; words the grammar does not know are ignored."""
    text = " ".join(caption.lower().split())
    objects = tuple(CaptionObject(m["colour"], m["shape"], m["size"]) for m in _OBJECT.finditer(text))
    relation = _RELATION.search(text)
    background = _BACKGROUND.search(text)
    return CaptionClaims(
        objects=objects,
        relation=relation.group(1) if relation and len(objects) == 2 else None,
        background=background.group(1) if background else None,
    )


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class FoundObject:
    """One object read from a picture. ``centre`` is (x, y) in pixels, ``area`` in pixels, ``fit`` the IoU of its shape."""

    colour: str
    shape: str
    centre: tuple[float, float]
    area: float
    fit: float
    mask: np.ndarray  # [H, W] bool


@dataclass(frozen=True)
class Reading:
    """Everything the oracle sees in a picture; ``style`` has the traits of ``TASTE_WEIGHTS``, each in [0, 1]."""

    objects: tuple[FoundObject, ...]
    background: str
    style: dict[str, float]

    @property
    def taste(self) -> float:
        """Weighted style in [0, 1]; 0 for a picture without any object."""
        return taste_of(self.style) if self.objects else 0.0


@dataclass(frozen=True)
class Verdict:
    """The oracle's opinion of one picture for one caption; every number in [0, 1]."""

    faithfulness: float
    taste: float
    objects_found: float
    relation_kept: float | None

    @property
    def utility(self) -> float:
        return self.liked_by(0.5)

    def liked_by(self, taste_weight: float) -> float:
        """By people to whom style counts so much, of 1, and what the caption says the rest."""
        return taste_weight * self.taste + (1.0 - taste_weight) * self.faithfulness


def taste_of(style: dict[str, float]) -> float:
    """``sum_k |w_k| * (style_k if w_k > 0 else 1 - style_k)``, in [0, 1] since the |w_k| add up to 1."""
    return float(sum(abs(w) * (style[k] if w > 0 else 1.0 - style[k]) for k, w in TASTE_WEIGHTS.items()))


def as_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """``[H, W, 3]`` float32 in [0, 1] from a PIL picture, a uint8 array or a float array already in [0, 1]."""
    array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"the oracle reads RGB pictures [H, W, 3]; got an array of shape {array.shape}")
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255.0
    return np.clip(array.astype(np.float32), 0.0, 1.0)


def read_image(image: Image.Image | np.ndarray) -> Reading:
    """Find the objects of a picture, its background and its style."""
    rgb = as_array(image)
    chroma = rgb.max(axis=2) - rgb.min(axis=2)  # [H, W]
    objects = _find_objects(rgb, chroma)
    ground = _background_level(rgb, chroma)
    name = min(BACKGROUNDS, key=lambda k: abs(BACKGROUNDS[k] - ground))
    style = _read_style(rgb, chroma, objects, ground)
    return Reading(objects, name, style)


def _background_level(rgb: np.ndarray, chroma: np.ndarray) -> float:
    luma = rgb @ _LUMA
    plain = luma[chroma < _MIN_CHROMA]
    return float(np.median(plain if plain.size > 50 else luma))


def _hue(rgb: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """Hue in [0, 1) per pixel, the hexagonal definition of HSV."""
    r, g, b = np.moveaxis(rgb, 2, 0)
    c = np.maximum(chroma, 1e-6)
    top = rgb.argmax(axis=2)
    hue = np.where(top == 0, ((g - b) / c) % 6, np.where(top == 1, (b - r) / c + 2, (r - g) / c + 4))
    return hue / 6.0


@lru_cache(maxsize=1)
def _named_hues() -> np.ndarray:
    return np.array([colorsys.rgb_to_hsv(*rgb)[0] for rgb in COLOURS.values()], dtype=np.float32)


def _find_objects(rgb: np.ndarray, chroma: np.ndarray) -> tuple[FoundObject, ...]:
    distance = np.abs(_hue(rgb, chroma)[..., None] - _named_hues())  # [H, W, colours]
    nearest = np.minimum(distance, 1.0 - distance).argmin(axis=2)
    coloured = chroma > _MIN_CHROMA
    found = []
    for k, colour in enumerate(COLOURS):
        labels, _ = ndimage.label(coloured & (nearest == k))
        sizes = np.bincount(labels.ravel())
        for i in np.nonzero(sizes[1:] >= _MIN_RIM)[0] + 1:  # label 0 is everything else
            patch = ndimage.binary_fill_holes(labels == i)
            if patch.sum() >= _MIN_AREA and _is_solid(patch):
                found.append(_describe(patch, colour))
    return tuple(sorted(found, key=lambda o: -o.area))


def _is_solid(patch: np.ndarray) -> bool:
    """False for the thin fringes that blending leaves around another object."""
    return bool(ndimage.binary_erosion(patch, iterations=2).any())


def _describe(patch: np.ndarray, colour: str) -> FoundObject:
    y, x = np.nonzero(patch)
    box = patch[y.min() : y.max() + 1, x.min() : x.max() + 1]
    small = np.asarray(Image.fromarray(box.astype(np.uint8) * 255).resize((_TEMPLATE, _TEMPLATE), Image.BOX)) / 255.0
    fits = {name: _soft_iou(small, template) for name, template in _templates().items()}
    shape = max(fits, key=fits.__getitem__)
    return FoundObject(colour, shape, (float(x.mean()), float(y.mean())), float(patch.sum()), fits[shape], patch)


def _soft_iou(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


@lru_cache(maxsize=1)
def _templates() -> dict[str, np.ndarray]:
    """Each shape filling its bounding box, ``[24, 24]`` in [0, 1]."""
    scale, out = 8, {}
    for name, polygon in SHAPES.items():
        low, high = polygon.min(axis=0), polygon.max(axis=0)
        points = (polygon - low) / (high - low) * (_TEMPLATE * scale - 1)
        canvas = Image.new("L", (_TEMPLATE * scale,) * 2, 0)
        ImageDraw.Draw(canvas).polygon([tuple(p) for p in points], fill=255)
        out[name] = np.asarray(canvas.resize((_TEMPLATE, _TEMPLATE), Image.BOX)) / 255.0
    return out


# ---------------------------------------------------------------------------------------------------------------- style


def _read_style(rgb: np.ndarray, chroma: np.ndarray, objects: tuple[FoundObject, ...], ground: float) -> dict[str, float]:
    if not objects:
        return {"saturation": 0.0, "outline": 0.0, "shading": 0.0, "clutter": 1.0, "offset": 1.0}
    area = np.array([o.area for o in objects])

    def mean_over_objects(values: list[float]) -> float:
        return float(np.clip(np.average(values, weights=area), 0.0, 1.0))

    return {
        "saturation": mean_over_objects([_saturation(rgb, chroma, o) for o in objects]),
        "outline": mean_over_objects([_outline(rgb, chroma, o, ground) for o in objects]),
        "shading": mean_over_objects([_shading(rgb, o) for o in objects]),
        "clutter": _clutter(rgb, objects, ground),
        "offset": _offset(objects, rgb.shape[:2]),
    }


def _core(mask: np.ndarray) -> np.ndarray:
    """The inside of an object, away from blended edges."""
    inner = ndimage.binary_erosion(mask, iterations=2)
    return inner if inner.sum() >= 6 else mask


def _saturation(rgb: np.ndarray, chroma: np.ndarray, found: FoundObject) -> float:
    """Solve ``S = s*C / (luma + s*(max - luma))`` for the mixing factor s: HSV saturation S is blind to shading."""
    core = _core(found.mask)
    hsv_s = float(np.median(chroma[core] / np.maximum(rgb.max(axis=2)[core], 1e-3)))
    base = np.array(COLOURS[found.colour], dtype=np.float32)
    luma, top, span = float(base @ _LUMA), float(base.max()), float(base.max() - base.min())
    s = hsv_s * luma / max(span - hsv_s * (top - luma), 1e-3)
    return (s - MIN_SATURATION) / (1.0 - MIN_SATURATION)


def _outline(rgb: np.ndarray, chroma: np.ndarray, found: FoundObject, ground: float) -> float:
    """Ink around an object (dark on light ground, light on dark ground) in units of the widest outline."""
    ring = ndimage.binary_dilation(found.mask, iterations=3) & ~ndimage.binary_erosion(found.mask)
    edge = found.mask & ~ndimage.binary_erosion(found.mask)
    luma = rgb @ _LUMA
    ink = (ground - luma) / ground if ground > 0.3 else (luma - ground) / (1.0 - ground)
    colourless = np.clip(1.0 - chroma / 0.3, 0.0, 1.0)
    amount = (np.clip(ink, 0.0, 1.0) * colourless)[ring].sum()
    return float(amount / max(edge.sum() * OUTLINE_PIXELS, 1.0))


def _shading(rgb: np.ndarray, found: FoundObject) -> float:
    """Slope of brightness along the light (from the upper left) over the object, in units of the deepest shading."""
    y, x = np.nonzero(_core(found.mask))
    radius = np.sqrt(found.area / np.pi)
    along = -((x - found.centre[0]) + (y - found.centre[1])) / np.sqrt(2.0) / radius
    value = rgb.max(axis=2)[y, x]
    slope = np.polyfit(along, value / max(value.mean(), 1e-3), 1)[0] if np.ptp(along) > 0 else 0.0
    return float(np.clip(slope / (SHADE_DEPTH / 2 / (1 - SHADE_DEPTH / 2)), 0.0, 1.0))


def _clutter(rgb: np.ndarray, objects: tuple[FoundObject, ...], ground: float) -> float:
    """Share of the free background that is marked, in units of the most cluttered picture."""
    taken = ndimage.binary_dilation(np.logical_or.reduce([o.mask for o in objects]), iterations=5)
    free = ~taken
    marked = (np.abs(rgb - ground).max(axis=2) > 0.14) & free
    return float(np.clip(marked.sum() / max(free.sum(), 1) / 0.032, 0.0, 1.0))


def _offset(objects: tuple[FoundObject, ...], size: tuple[int, int]) -> float:
    """Distance of the group's bounding box from the middle of the picture."""
    y, x = np.nonzero(np.logical_or.reduce([o.mask for o in objects]))
    dx = (x.min() + x.max()) / 2 - (size[1] - 1) / 2
    dy = (y.min() + y.max()) / 2 - (size[0] - 1) / 2
    return float(np.clip(np.hypot(dx, dy) / OFFSET_PIXELS, 0.0, 1.0))


# ------------------------------------------------------------------------------------------------------------- judgement


def judge(image: Image.Image | np.ndarray, caption: str) -> Verdict:
    """The oracle's verdict on one picture for one caption.

    Raises:
        ValueError: the caption names no object of the tiny world.
    """
    claims = read_caption(caption)
    if not claims.objects:
        raise ValueError(f"the oracle knows only captions of the tiny world; it found no object in {caption!r}")
    reading = read_image(image)
    matched = _match(claims, reading.objects)
    found = sum(m is not None for m in matched) / len(matched)
    relation = _relation_kept(claims, matched)
    checks = [float(m is not None) for m in matched]
    checks.append(float(len(reading.objects) <= len(claims.objects)))
    if relation is not None:
        checks.append(relation)
    return Verdict(float(np.mean(checks)), reading.taste, found, relation)


def _match(claims: CaptionClaims, objects: tuple[FoundObject, ...]) -> list[FoundObject | None]:
    left = list(objects)
    out: list[FoundObject | None] = []
    for claim in claims.objects:
        hit = next((o for o in left if (o.colour, o.shape) == (claim.colour, claim.shape)), None)
        if hit is not None:
            left.remove(hit)
        out.append(hit)
    return out


def _relation_kept(claims: CaptionClaims, matched: list[FoundObject | None]) -> float | None:
    if claims.relation is None:
        return None
    if None in matched:
        return 0.0
    first, second = matched
    dx, dy = second.centre[0] - first.centre[0], second.centre[1] - first.centre[1]
    ux, uy = RELATIONS[claims.relation]
    return float(dx * ux + dy * uy > abs(dx * uy) + abs(dy * ux))


class Oracle(PointwiseJudge):
    """The judge of the tiny world: the score is the utility that its synthetic people vote by, or people of another mind."""

    info = RewardInfo(
        name=NAME,
        needs_prompt=True,
        range=(0.0, 1.0),
        description="(faithfulness + taste) / 2 in the tiny world, by image processing",
    )

    def __init__(self, taste_weight: float = 0.5) -> None:
        self.taste_weight, self.made_of = taste_weight, {"taste_weight": taste_weight}

    def score_prepared(self, prepared: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        import torch

        self.check_prompts(prompts)
        verdicts = [judge(*one) for one in zip(prepared, prompts, strict=True)]
        return torch.tensor([verdict.liked_by(self.taste_weight) for verdict in verdicts], dtype=torch.float32)

    def n_cut(self, prompts: Sequence[str]) -> int:
        return 0

    def details(self, images: Any, prompts: str | Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """``faithfulness``, ``taste``, ``objects_found`` and ``relation_kept``, each [N] in [0, 1].

        NaN where a picture cannot be read; ``relation_kept`` also where the caption states no relation.
        """
        pictures = Pictures.of(images)
        captions = texts_for(self, len(pictures), prompts)
        self.check_prompts(captions)
        verdicts = [None if p is None else judge(p, c) for p, c in zip(pictures, captions, strict=True)]
        fields = ("faithfulness", "taste", "objects_found", "relation_kept")
        return {name: np.array([getattr(v, name, None) for v in verdicts], dtype=np.float64) for name in fields}

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises JudgeError at the first prompt that names no object of the tiny world."""
        for prompt in prompts:
            if not read_caption(prompt).objects:
                raise JudgeError(
                    f"the oracle judges captions of the tiny world only, such as 'a red circle left of a blue star'; "
                    f"it finds no object in {prompt!r}"
                )


def load(taste_weight: float = 0.5) -> Oracle:
    """The judge.

    Args:
        taste_weight: in [0, 1], how much style counts; what the caption says has the rest. The default is the world's people;
            at 0.8 they look at style first, as judges of pictures are often said to.
    """
    if not isinstance(taste_weight, (int, float)) or not 0.0 <= taste_weight <= 1.0:
        raise JudgeError(f"the oracle's taste_weight is a number in [0, 1]; got {taste_weight!r}")
    return Oracle(float(taste_weight))
