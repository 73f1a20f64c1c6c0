"""Scenes of the tiny world: a grammar, a renderer and the captions people would write.

A scene is one or two objects (colour, shape, size) on a background, and a style that plain captions do not mention.
Everything is drawn from a ``numpy.random.Generator`` that the caller passes in: same generator, same scene.

The vocabulary (colours, shapes, sizes, relations) is the oracle's, in ``reward_models.oracle``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageDraw

from reward_models import oracle

SIZE = 64
"""Pixels per side."""
_SCALE = 4  # supersampling of the renderer
SPLITS = {"train": range(0, 16), "validation": range(16, 17), "test": range(17, 20)}
"""A plain caption belongs to one split for ever: by its hash modulo 20."""

STYLE_WORDS: dict[str, tuple[str, str]] = {
    "saturation": ("pale", "vivid"),
    "outline": ("borderless", "outlined"),
    "shading": ("flat", "shaded"),
    "clutter": ("clean", "cluttered"),
    "offset": ("centred", "displaced"),
}
"""Word for the lowest and for the highest third of each trait."""


@dataclass(frozen=True)
class Style:
    """How a scene is drawn; every trait in [0, 1], from none to most."""

    saturation: float
    outline: float
    shading: float
    clutter: float
    offset: float

    @property
    def taste(self) -> float:
        """The taste that a perfect reader would find in this style."""
        return oracle.taste_of(asdict(self))


@dataclass(frozen=True)
class SceneObject:
    """One object; ``centre`` (x, y) and ``radius`` in pixels of a 64-pixel picture."""

    colour: str
    shape: str
    size: str
    radius: float
    centre: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn: what is in it, how it is drawn, and the seed of its specks."""

    objects: tuple[SceneObject, ...]
    relation: str | None
    background: str
    style: Style
    speck_seed: int


# ------------------------------------------------------------------------------------------------------------- drawing lots


def draw_style(rng: np.random.Generator) -> Style:
    """Every trait uniform in [0, 1], independently."""
    return Style(*(float(v) for v in rng.random(5)))


def draw_scene(rng: np.random.Generator, style: Style | None = None) -> Scene:
    """One scene from the grammar; two objects in two of three scenes."""
    style = style or draw_style(rng)
    count = 1 if rng.random() < 1 / 3 else 2
    kinds = [_draw_kind(rng) for _ in range(count)]
    while count == 2 and kinds[0][:2] == kinds[1][:2]:
        kinds[1] = _draw_kind(rng)
    relation = str(rng.choice(list(oracle.RELATIONS))) if count == 2 else None
    radii = [float(rng.uniform(*oracle.SIZES[size])) for _, _, size in kinds]
    centres = _place(rng, radii, relation, style.offset)
    objects = tuple(SceneObject(c, s, z, r, p) for (c, s, z), r, p in zip(kinds, radii, centres, strict=True))
    background = str(rng.choice(list(oracle.BACKGROUNDS)))
    return Scene(objects, relation, background, style, int(rng.integers(2**31)))


def _draw_kind(rng: np.random.Generator) -> tuple[str, str, str]:
    return tuple(str(rng.choice(list(words))) for words in (oracle.COLOURS, oracle.SHAPES, oracle.SIZES))


def _place(rng: np.random.Generator, radii: list[float], relation: str | None, offset: float) -> list[tuple[float, float]]:
    """Centres such that the relation holds, nothing overlaps or is cut, and the group is ``offset`` away from the middle."""
    points = np.zeros((len(radii), 2))
    if relation is not None:
        gap = sum(radii) * 1.12 + rng.uniform(2.5, 4.5)
        ux, uy = oracle.RELATIONS[relation]
        slant = np.deg2rad(rng.uniform(-22, 22))
        points[1] = gap * np.array([ux * np.cos(slant) - uy * np.sin(slant), ux * np.sin(slant) + uy * np.cos(slant)])
    reach = np.array(radii)[:, None] * 1.12
    low, high = (points - reach).min(axis=0), (points + reach).max(axis=0)
    room = np.maximum((SIZE - 4 - (high - low)) / 2, 0.0)
    angle = rng.uniform(0, 2 * np.pi)
    shift = np.clip(offset * oracle.OFFSET_PIXELS * np.array([np.cos(angle), np.sin(angle)]), -room, room)
    moved = points - (low + high) / 2 + SIZE / 2 + shift
    return [(float(x), float(y)) for x, y in moved]


# ----------------------------------------------------------------------------------------------------------------- drawing


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of 64 x 64 pixels, drawn at four times that size and reduced."""
    level = oracle.BACKGROUNDS[scene.background]
    canvas = np.full((SIZE, SIZE, 3), level, dtype=np.float32)
    canvas = _draw_specks(canvas, scene)
    ink = 0.05 if level > 0.3 else 0.97
    for item in scene.objects:
        if scene.style.outline > 0.05:
            border = _coverage(item, grow=scene.style.outline * oracle.OUTLINE_PIXELS)
            canvas = canvas * (1 - border) + ink * border
        inside = _coverage(item)
        canvas = canvas * (1 - inside) + _paint(item, scene.style) * inside
    return Image.fromarray(np.round(np.clip(canvas, 0, 1) * 255).astype(np.uint8))


def _coverage(item: SceneObject, grow: float = 0.0) -> np.ndarray:
    """Share of each pixel inside the object's outline moved outwards by ``grow`` pixels, ``[64, 64, 1]``."""
    mask = Image.new("L", (SIZE * _SCALE,) * 2, 0)
    draw = ImageDraw.Draw(mask)
    points = (oracle.SHAPES[item.shape] * item.radius + np.array(item.centre)) * _SCALE
    corners = [tuple(p) for p in points]
    draw.polygon(corners, fill=255)
    if grow > 0:
        draw.line([*corners, corners[0], corners[1]], fill=255, width=max(1, round(2 * grow * _SCALE)), joint="curve")
    return np.asarray(mask.resize((SIZE, SIZE), Image.BOX), dtype=np.float32)[..., None] / 255.0


def _paint(item: SceneObject, style: Style) -> np.ndarray:
    """The object's colour at every pixel, paled and shaded, ``[64, 64, 3]``."""
    base = np.array(oracle.COLOURS[item.colour], dtype=np.float32)
    luma = float(base @ np.array([0.299, 0.587, 0.114], dtype=np.float32))
    keep = oracle.MIN_SATURATION + (1 - oracle.MIN_SATURATION) * style.saturation
    colour = luma + keep * (base - luma)
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5
    towards_light = -((x - item.centre[0]) + (y - item.centre[1])) / np.sqrt(2.0) / item.radius
    shade = 1.0 - style.shading * oracle.SHADE_DEPTH * (1.0 - np.clip(towards_light, -1, 1)) / 2
    return colour * shade[..., None]


def _draw_specks(canvas: np.ndarray, scene: Scene) -> np.ndarray:
    """Short strokes on the background, away from the objects."""
    rng = np.random.default_rng(scene.speck_seed)
    count = round(scene.style.clutter * oracle.CLUTTER_SPECKS)
    level = oracle.BACKGROUNDS[scene.background]
    mask = Image.new("L", (SIZE * _SCALE,) * 2, 0)
    draw = ImageDraw.Draw(mask)
    while count > 0:
        at, angle, length = rng.uniform(3, SIZE - 3, 2), rng.uniform(0, np.pi), rng.uniform(3.5, 6.0)
        if any(np.hypot(*(at - o.centre)) < o.radius * 1.15 + 6 for o in scene.objects) and rng.random() > 0.02:
            continue
        half = length / 2 * np.array([np.cos(angle), np.sin(angle)])
        ends = [tuple((at + s * half) * _SCALE) for s in (-1, 1)]
        draw.line(ends, fill=255, width=round(1.6 * _SCALE))
        count -= 1
    cover = np.asarray(mask.resize((SIZE, SIZE), Image.BOX), dtype=np.float32)[..., None] / 255.0
    tone = level - 0.42 if level > 0.3 else level + 0.42
    return canvas * (1 - cover) + tone * cover


# ---------------------------------------------------------------------------------------------------------------- captions


def plain_caption(scene: Scene, rng: np.random.Generator) -> str:
    """What is in the scene, not how it is drawn; sizes and background are sometimes left out."""
    sizes, ground = rng.random() < 0.7, rng.random() < 0.7
    parts = [f"a {o.size + ' ' if sizes else ''}{o.colour} {o.shape}" for o in scene.objects]
    text = f" {scene.relation} ".join(parts) if scene.relation else parts[0]
    return text + (f" on a {scene.background} background" if ground else "")


def style_words(style: Style, rng: np.random.Generator) -> list[str]:
    """One to three words for traits that are marked (in the lowest or highest third)."""
    marked = [(name, value) for name, value in asdict(style).items() if abs(value - 0.5) > 1 / 6]
    rng.shuffle(marked)
    return [STYLE_WORDS[name][int(float(value) > 0.5)] for name, value in marked[: int(rng.integers(1, 4))]]


def styled_caption(scene: Scene, rng: np.random.Generator) -> str:
    """The plain caption, followed by style words after commas."""
    return ", ".join([plain_caption(scene, rng), *style_words(scene.style, rng)])


def split_of(caption: str) -> str:
    """The split that a caption belongs to: train (16 of 20), validation (1) or test (3). Style words do not count."""
    plain = " ".join(caption.lower().split(",")[0].split())
    bucket = int(hashlib.sha256(plain.encode()).hexdigest(), 16) % 20
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def draw_captioned(rng: np.random.Generator, split: str = "train", styled: float = 0.35) -> tuple[Scene, str]:
    """A scene and its caption from one split; a share ``styled`` of the captions has style words."""
    while True:
        scene = draw_scene(rng)
        caption = styled_caption(scene, rng) if rng.random() < styled else plain_caption(scene, rng)
        if split_of(caption) == split:
            return scene, caption


MOST_CAPTIONS = {"train": 40_000, "validation": 2_500, "test": 7_500}
"""How many different plain captions may be asked for, per split. The grammar has about 70,000 in all; near a split's last
one, drawing at random would take for ever."""


def captions(n: int, seed: int, split: str = "test") -> list[str]:
    """``n`` different plain captions of a split. Raises ValueError for more than there are."""
    if n > MOST_CAPTIONS[split]:
        raise ValueError(f"the {split} split has no more than {MOST_CAPTIONS[split]} captions to give; {n} were asked for")
    rng, seen = np.random.default_rng(seed), {}
    while len(seen) < n:
        seen.setdefault(draw_captioned(rng, split, styled=0.0)[1])
    return list(seen)


def stream(seed: int, split: str = "train", styled: float = 0.35) -> Iterator[tuple[Scene, str]]:
    """An endless stream of scenes with captions."""
    rng = np.random.default_rng(seed)
    while True:
        yield draw_captioned(rng, split, styled)
