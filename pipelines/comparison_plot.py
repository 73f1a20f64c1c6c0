"""A comparison as a picture: points for win rates, bars for their intervals, a line at 50 %."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pipelines.comparison_numbers import MACRO

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pipelines.comparison import Comparison

# Okabe and Ito's colours, which the colour-blind can distinguish, too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COLUMNS = 3  # panels in a row
_LINE, _ROW, _FRAME = 0.17, 0.13, 0.75  # inches: of a point, between rows, around a panel


def draw(c: Comparison) -> Figure:
    """Rows are judges above and categories below, one panel of categories for each judge; colours are systems."""
    from matplotlib.figure import Figure

    others = c.systems[1:]
    categories = [*dict.fromkeys(c.by_category["category"])]
    panels = [c.by_category[c.by_category["judge"] == judge] for judge in c.judges] if categories else []
    columns = min(COLUMNS, max(1, len(panels)))
    deep = -(-len(panels) // columns)
    heights = [_height(len(c.judges), len(others)), *[_height(len(categories), len(others))] * deep]
    wide = 8 if columns == 1 else 4 + 3 * columns
    figure = Figure(figsize=(wide, sum(heights) + 0.4 + 0.2 * len(others)), layout="constrained")
    places = figure.add_gridspec(1 + deep, columns, height_ratios=heights)
    top = figure.add_subplot(places[0, :])
    _panel(top, c.win_rates, "judge", list(c.judges), others)
    top.set_yticklabels([_shown(c.label(judge)) for judge in c.judges])
    _numbers(top, c.win_rates, list(c.judges), others)
    top.set_title("all prompts", fontsize=10, loc="left")
    for k, (judge, frame) in enumerate(zip(c.judges, panels)):
        axes = figure.add_subplot(places[1 + k // columns, k % columns])
        _panel(axes, frame, "category", categories, others, apart=MACRO)
        axes.set_title(_shown(c.label(judge)), fontsize=10, loc="left")
        if k % columns:
            axes.set_yticklabels([])
    whose = f"Win rate of {others[0]}" if len(others) == 1 else "Win rate"
    whole = f"{whose} over {c.baseline}, with {100 * c.level:g} % intervals"
    figure.suptitle(_shown(whole, 11 * wide), fontsize=12)
    if len(others) > 1:
        _legend(figure, others)
    # notebooks know how to show figures only once pyplot is imported, which this one does without
    figure._repr_png_ = partial(as_png, figure)
    return figure


def as_png(figure: Figure) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()


def _height(rows: int, systems: int) -> float:
    return _FRAME + rows * (_ROW + _LINE * max(systems, 1.3))


def _panel(
    axes: Axes, frame: pd.DataFrame, column: str, rows: Sequence[str], systems: Sequence[str], apart: str | None = None
) -> None:
    """One point with its bar for each row and system, the first row on top; the row ``apart`` is set off by a line."""
    for k, system in enumerate(systems):
        at = {r[column]: r for r in frame[frame["system"] == system].to_dict("records")}
        points = [(_height_of(i, k, len(systems)), at[row]) for i, row in enumerate(rows) if row in at]
        axes.errorbar(
            [100 * r["win_rate"] for _, r in points],
            [y for y, _ in points],
            xerr=[_lengths(points, "low"), _lengths(points, "high")],
            fmt="o",
            color=COLOURS[k % len(COLOURS)],
            markersize=5,
            elinewidth=1.6,
            capsize=2.5,
            clip_on=False,
        )
    axes.axvline(50, color="0.25", linestyle="--", linewidth=1.0, zorder=1)  # above the grid, below the points
    if apart in rows:
        axes.axhline(rows.index(apart) - 0.5, color="0.8", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [_shown(row) for row in rows])
    axes.set(xlim=(0, 100), ylim=(len(rows) - 0.5, -0.5), xticks=range(0, 101, 25))
    axes.xaxis.set_major_formatter("{x:.0f} %")
    axes.tick_params(labelsize=9, length=0)
    axes.grid(axis="x", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _numbers(axes: Axes, frame: pd.DataFrame, judges: Sequence[str], systems: Sequence[str]) -> None:
    """Write each point's number at its right."""
    for r in frame.to_dict("records"):
        k = systems.index(r["system"])
        rate, low, high = (100 * r[name] for name in ("win_rate", "low", "high"))
        text = "not judged" if math.isnan(rate) else f"{rate:.1f} % ({low:.1f} to {high:.1f})"
        y = _height_of(judges.index(r["judge"]), k, len(systems))
        axes.annotate(
            text, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=COLOURS[k % len(COLOURS)]
        )


def _height_of(row: int, system: int, systems: int) -> float:
    """Height of a system's point in its row: systems are spread over seven tenths of it, in order from the top."""
    return row + 0.7 * ((system + 0.5) / systems - 0.5)


def _legend(figure: Figure, systems: Sequence[str]) -> None:
    points: list[Any] = figure.axes[0].containers
    figure.legend(points, [_shown(s, 90) for s in systems], loc="outside lower left", frameon=False, fontsize=9, ncols=1)


def _shown(name: str, width: int = 24) -> str:
    """A name over two lines at most; of a longer one its beginning and its end, where names tend to differ."""
    lines = textwrap.wrap(" ".join(name.split()), width)
    if len(lines) > 2:
        last = textwrap.wrap(" ".join(name.split())[::-1], width)[0][::-1]
        lines = [lines[0][: width - 1] + "…", last]
    return _no_formula("\n".join(lines))


def _no_formula(text: str) -> str:
    """A dollar is not the beginning of a formula."""
    return text.replace("$", r"\$")


def _lengths(points: Sequence[tuple[float, Mapping[str, Any]]], end: str) -> list[float]:
    """Distances from each rate to one end of its interval; absolute, for Matplotlib refuses the -1e-17 that rounding may give."""
    return [100 * abs(r[end] - r["win_rate"]) for _, r in points]
