"""Numbers as text, and tables of text: as Markdown for terminals and files, as HTML for notebooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_CELL = 'style="text-align:left;white-space:nowrap;padding:.2rem .9rem .2rem 0"'


def number(x: float) -> str:
    """A score, short enough for a table."""
    if not math.isfinite(x):
        return "not judged" if math.isnan(x) else str(x)
    return f"{x:.3f}" if abs(x) < 10 else f"{x:.2f}" if abs(x) < 1000 else f"{x:.4g}"


def change(x: float) -> str:
    """A difference of scores; one that is not zero never reads as zero."""
    return f"{x:.2g}" if 0 < abs(x) < 0.01 else number(x)


def percent(x: float) -> str:
    """A share in [0, 1] as a percentage."""
    return "not known" if math.isnan(x) else f"{100 * x:.1f} %"


def interval(low: float, high: float, shown: Callable[[float], str] = number) -> str:
    """The two ends of an interval; ``-`` where they are NaN, as they are for a single prompt."""
    return "-" if math.isnan(low) or math.isnan(high) else f"{shown(low)} to {shown(high)}"


def p_value(p: float) -> str:
    """A p value with one or two digits that count."""
    return f"{p:.2f}" if p >= 0.1 else f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def count(n: int, noun: str) -> str:
    """A number and the noun that it counts, with the plural's s where it belongs."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def in_cell(text: str) -> str:
    """Text with what would end a table's cell escaped: bars, line breaks and tags."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def table_lines(headings: Sequence[str], rows: Sequence[Sequence[str]], padded: bool = True) -> list[str]:
    """The lines of a Markdown table; ``padded`` columns line up where the text is read as it stands, as in a terminal."""
    cells = [[in_cell(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(3, *(len(row[k]) for row in cells)) if padded else 0 for k in range(len(headings))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * max(5, w + 2) for w in widths) + "|")
    return lines


@dataclass(frozen=True)
class Table:
    """Rows of text under headings, with a title and a remark on how to read it."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    remark: str = ""

    def __post_init__(self) -> None:
        ragged = [row for row in self.rows if len(row) != len(self.headings)]
        assert not ragged, f"{self.title}: {len(self.headings)} headings and the row {ragged[0]}"

    def to_markdown(self) -> str:
        lines = [f"## {in_cell(self.title)}", ""] if self.title else []
        lines += table_lines(self.headings, self.rows)
        return "\n".join([*lines, "", self.remark] if self.remark else lines)

    def to_html(self) -> str:
        title = f"<h3>{escape(self.title)}</h3>" if self.title else ""
        head = "".join(f"<th {_CELL}>{escape(h)}</th>" for h in self.headings)
        body = "".join("<tr>" + "".join(f"<td {_CELL}>{escape(c)}</td>" for c in row) + "</tr>" for row in self.rows)
        remark = f"<p><small>{escape(self.remark)}</small></p>" if self.remark else ""
        wide = f'<div style="overflow-x:auto"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        return title + wide + remark
