"""A contact sheet: some pairs of a data set as a picture, winner on the left."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from diffalign.data.pairs import PreferencePair, RowProblem, UnreadableImage
from diffalign.data.table import PairTable
from diffalign.errors import UserError

SIDE = 192  # pixels of one picture
GAP = 6  # between the two pictures of a pair
MARGIN = 14  # between pairs
LINES = 3  # of caption
FONT_SIZE = 13
LINE_HEIGHT = 17
ACROSS = 3  # pairs in a row
CELL = (2 * SIDE + GAP, SIDE + (LINES + 1) * LINE_HEIGHT + 8)
PREFERRED, OTHER, TIE, INK, FAINT = "#2e8b57", "#c8c8c8", "#d99a2b", "#202020", "#707070"


def contact_sheet(table: PairTable, n: int = 12, seed: int = 0) -> Image.Image:
    """``n`` pairs drawn without replacement, each with its caption and label; a tie is marked as one.

    The preferred picture has a green frame, the two of a tie an amber one. Pairs that cannot be read are passed over.
    Raises ``UserError`` if none can be read.
    """
    shown = _readable(table, n, seed)
    across = min(ACROSS, len(shown))
    down = -(-len(shown) // across)
    size = (MARGIN + across * (CELL[0] + MARGIN), MARGIN + down * (CELL[1] + MARGIN))
    sheet = Image.new("RGB", size, "white")
    for place, (pair, pictures) in enumerate(shown):
        row, column = divmod(place, across)
        sheet.paste(_cell(pair, pictures), (MARGIN + column * (CELL[0] + MARGIN), MARGIN + row * (CELL[1] + MARGIN)))
    return sheet


def _readable(table: PairTable, n: int, seed: int) -> list[tuple[PreferencePair, list[Image.Image]]]:
    shown = []
    for index in np.random.default_rng(seed).permutation(len(table)):
        try:
            pair = table[int(index)]
            shown.append((pair, [pair.winner.open(), pair.loser.open()]))
        except (RowProblem, UnreadableImage):
            continue
        if len(shown) == n:
            break
    if not shown:
        raise UserError(f"No pair of {table.description} can be shown.")
    return shown


def _cell(pair: PreferencePair, pictures: list[Image.Image]) -> Image.Image:
    cell = Image.new("RGB", CELL, "white")
    draw = ImageDraw.Draw(cell)
    font = ImageFont.load_default(FONT_SIZE)
    for place, (picture, frame) in enumerate(zip(pictures, (TIE, TIE) if pair.tie else (PREFERRED, OTHER), strict=True)):
        left = place * (SIDE + GAP)
        draw.rectangle((left, 0, left + SIDE - 1, SIDE - 1), fill=frame)
        draw.rectangle((left + 3, 3, left + SIDE - 4, SIDE - 4), fill="white")
        small = ImageOps.contain(picture, (SIDE - 6, SIDE - 6), Image.Resampling.LANCZOS)
        cell.paste(small, (left + (SIDE - small.width) // 2, (SIDE - small.height) // 2))
    top = SIDE + 4
    mark = "tie" if pair.tie else f"left preferred, label {pair.label:.2f}"
    weight = "" if pair.weight == 1.0 else f", weight {pair.weight:g}"
    draw.text((0, top), _wrap(f"{mark}{weight}  ·  {pair.origin}", font, 1)[0], fill=FAINT, font=font)
    for line in _wrap(pair.prompt or "(empty caption)", font, LINES):
        top += LINE_HEIGHT
        draw.text((0, top), line, fill=INK, font=font)
    return cell


def _wrap(text: str, font: ImageFont.FreeTypeFont, lines: int) -> list[str]:
    """At most ``lines`` lines that fit the cell; what does not fit ends in an ellipsis."""
    done, rest = [], " ".join(text.split())
    while rest and len(done) < lines:
        cut = len(rest)
        while font.getlength(rest[:cut]) > CELL[0]:
            space = rest.rfind(" ", 0, cut)
            cut = space if space > 0 else cut - 1
        done.append(rest[:cut])
        rest = rest[cut:].lstrip()
    while rest and font.getlength(done[-1] + "…") > CELL[0]:
        done[-1] = done[-1][:-1]
    return [*done[:-1], done[-1] + "…"] if rest else done
