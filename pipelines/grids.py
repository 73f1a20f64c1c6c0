"""Sheets of pictures with captions that can be read: plain grids, and base beside tuned.

Small pictures are enlarged by a whole factor without smoothing, so that every pixel of a 64-pixel picture can be seen;
large ones are reduced. All lengths are in pixels of the sheet.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

SMALLEST = 192  # pictures below this side are enlarged
LARGEST = 512  # pictures above this side are reduced
GAP = 12
MARGIN = 16
TEXT_SIZE = 15
_INK, _FAINT, _PAPER = (24, 24, 27), (107, 114, 128), (255, 255, 255)
_LINES = 4  # a caption longer than this is cut

Size = tuple[int, int]


def grid(
    images: Sequence[Image.Image], columns: int, captions: Sequence[str] | None = None, header: str | None = None
) -> Image.Image:
    """Pictures in rows of ``columns``, each above its caption, under one header.

    Raises:
        ValueError: no pictures, no columns, or not one caption for each picture.
    """
    _check(images, columns, captions)
    size = _shown_size(images)
    cells = [_cell([image], "" if captions is None else caption, [], size) for image, caption in _captioned(images, captions)]
    return _sheet(cells, columns, header)


def side_by_side(
    base: Sequence[Image.Image],
    tuned: Sequence[Image.Image],
    captions: Sequence[str],
    scores: Sequence[tuple[str, str]] | None = None,
    *,
    columns: int = 2,
    header: str | None = None,
    names: tuple[str, str] = ("base", "tuned"),
) -> Image.Image:
    """Pairs in rows of ``columns``: base left, tuned right, what each scored, and the caption below both.

    ``scores`` are shown as they are, one text for each side of each pair.

    Raises:
        ValueError: the lengths differ.
    """
    _check(base, columns, captions)
    if len(tuned) != len(base) or (scores is not None and len(scores) != len(base)):
        raise ValueError(f"got {len(base)} base pictures, {len(tuned)} tuned ones and {len(scores or base)} pairs of scores")
    size = _shown_size([*base, *tuned])
    shown = scores or [("", "")] * len(base)
    cells = [
        _cell([left, right], caption, [f"{name}  {score}".strip() for name, score in zip(names, pair, strict=True)], size)
        for left, right, caption, pair in zip(base, tuned, captions, shown, strict=True)
    ]
    return _sheet(cells, columns, header)


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets below each other, on the width of the widest."""
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), _PAPER)
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


# --------------------------------------------------------------------------------------------------------------- pieces


def _check(images: Sequence[Image.Image], columns: int, captions: Sequence[str] | None) -> None:
    if not images or columns < 1:
        raise ValueError(f"a grid needs pictures and columns; got {len(images)} pictures in {columns} columns")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"got {len(images)} pictures and {len(captions)} captions; there must be one for each")


def _captioned(images: Sequence[Image.Image], captions: Sequence[str] | None) -> list[tuple[Image.Image, str]]:
    return list(zip(images, captions or [""] * len(images), strict=True))


def _shown_size(images: Sequence[Image.Image]) -> Size:
    """The box that every picture of a sheet is shown in: the largest picture, enlarged or reduced."""
    width, height = max(i.width for i in images), max(i.height for i in images)
    factor = _factor(max(width, height))
    return round(width * factor), round(height * factor)


def _factor(side: int) -> float:
    return float(-(-SMALLEST // side)) if side < SMALLEST else min(1.0, LARGEST / side)


def _fitted(image: Image.Image, box: Size) -> Image.Image:
    """The picture as large as the box allows; a whole factor when it grows."""
    fit = min(box[0] / image.width, box[1] / image.height)
    if fit >= 2:
        fit = int(fit)
    size = max(1, round(image.width * fit)), max(1, round(image.height * fit))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if fit >= 1 else Image.Resampling.LANCZOS)


def _cell(images: Sequence[Image.Image], caption: str, labels: Sequence[str], box: Size) -> Image.Image:
    """Pictures beside each other, a label under each, a caption under all."""
    inner = 4
    width = len(images) * box[0] + (len(images) - 1) * inner
    label_lines = [_wrap(label, box[0], 2) for label in labels]
    label_height = max((len(lines) for lines in label_lines), default=0) * _line_height()
    lines = _wrap(caption, width, _LINES)
    cell = Image.new("RGB", (width, box[1] + label_height + len(lines) * _line_height() + 4), _PAPER)
    draw = ImageDraw.Draw(cell)
    for k, image in enumerate(images):
        left, shown = k * (box[0] + inner), _fitted(image, box)
        cell.paste(shown, (left + (box[0] - shown.width) // 2, (box[1] - shown.height) // 2))
    for k, text in enumerate(label_lines):
        _write(draw, (k * (box[0] + inner), box[1] + 2), text, _FAINT)
    _write(draw, (0, box[1] + label_height + 2), lines, _INK)
    return cell


def _sheet(cells: Sequence[Image.Image], columns: int, header: str | None) -> Image.Image:
    columns = min(columns, len(cells))
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    width = 2 * MARGIN + columns * cells[0].width + (columns - 1) * GAP
    title = _wrap(header or "", width - 2 * MARGIN, _LINES, TEXT_SIZE + 4)
    top = MARGIN + (len(title) * _line_height(TEXT_SIZE + 4) + GAP if title else 0)
    sheet = Image.new("RGB", (width, top + sum(heights) + (len(rows) - 1) * GAP + MARGIN), _PAPER)
    _write(ImageDraw.Draw(sheet), (MARGIN, MARGIN - 2), title, _INK, TEXT_SIZE + 4)
    for row, height in zip(rows, heights, strict=True):
        for k, cell in enumerate(row):
            sheet.paste(cell, (MARGIN + k * (cells[0].width + GAP), top))
        top += height + GAP
    return sheet


# ----------------------------------------------------------------------------------------------------------------- text


_WIDER_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf")


@lru_cache(maxsize=8)
def _own_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that comes with Pillow: English looks the same on every machine, but there are no accents in it."""
    return ImageFont.load_default(size)


@lru_cache(maxsize=8)
def _wider_font(size: int) -> ImageFont.FreeTypeFont | None:
    """A font of this machine that knows more than English, if there is one."""
    for name in _WIDER_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:  # this machine has no such font
            continue
    return None


def _font(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return _own_font(size) if text.isascii() else _wider_font(size) or _own_font(size)


def _length(text: str, size: int) -> float:
    return _font(text, size).getlength(text)


def _drawable(text: str, size: int) -> str:
    """The text as it is, or with its accents dropped where no font at hand can draw them."""
    if text.isascii() or _wider_font(size) is not None:
        return text
    return unicodedata.normalize("NFKD", text.replace("\u2019", "'")).encode("ascii", "ignore").decode()


def _line_height(size: int = TEXT_SIZE) -> int:
    return round(size * 1.3)


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], ink: tuple[int, int, int], size: int = TEXT_SIZE
) -> None:
    for k, line in enumerate(lines):
        draw.text((at[0], at[1] + k * _line_height(size)), line, fill=ink, font=_font(line, size))


def _wrap(text: str, width: int, most: int, size: int = TEXT_SIZE) -> list[str]:
    """Lines no wider than ``width``; words wider than that are broken, and what exceeds ``most`` lines is cut with '...'."""
    lines: list[str] = []
    for word in _short_words(_drawable(text, size), width, size):
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and _length(joined, size) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    if len(lines) > most:
        last = lines[most - 1]
        while last and _length(last + "...", size) > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last.rstrip() + "..."]
    return lines


def _short_words(text: str, width: int, size: int) -> list[str]:
    out: list[str] = []
    for word in text.split():
        while len(word) > 1 and _length(word, size) > width:
            cut = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or _length(word[:n], size) <= width)
            out.append(word[:cut])
            word = word[cut:]
        out.append(word)
    return out
