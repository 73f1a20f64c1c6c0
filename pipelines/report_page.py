"""The summary of an evaluation for people: a Markdown table for the terminal and a page for the browser.

The page needs nothing from elsewhere: styles are in it, pictures lie beside it, and there is no script.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from pipelines.text_tables import change, interval, number, p_value, percent, table_lines

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt and seed: files relative to the page, and (base, tuned) scores by judge."""

    prompt: str
    category: str | None
    seed: int
    base: str
    tuned: str
    scores: Mapping[str, tuple[float, float]]


# -------------------------------------------------------------------------------------------------------------- terminal


HEADINGS = ("judge", "base", "tuned", "tuned - base (95 %)", "win rate (95 %)", "won / tied / lost", "sign test p")


def as_text(values: Values, output: Path) -> str:
    """Markdown: what was compared, one row per judge, details, notes, and where the report is."""
    lines = table_lines(HEADINGS, [_cells(name, judge) for name, judge in values["judges"].items()])
    details = [
        f"{name}: {key} {number(d['base'])} -> {number(d['tuned'])}"
        for name, judge in values["judges"].items()
        for key, d in judge["details"].items()
    ]
    notes = [f"Note: {note}" for note in values["notes"]]
    return "\n".join([_headline(values), "", *lines, "", *details, *notes, f"Report: {output / 'index.html'}"])


def _headline(values: Values) -> str:
    return (
        f"{values['tuned']} against {values['base']}: {values['prompts']} prompts, {values['images_per_prompt']} per prompt, "
        f"{values['steps']} steps of {values['sampler']}, guidance {values['guidance_scale']:g}, seed {values['seed']}, "
        f"{values['seconds']:.0f} s"
    )


def _cells(name: str, judge: Values) -> tuple[str, ...]:
    difference, (low, high) = judge["difference"], judge["win_rate_interval"]
    return (
        name,
        number(judge["base"]["mean"]),
        number(judge["tuned"]["mean"]),
        f"{change(difference['mean'])} ({interval(difference['low'], difference['high'], change)})",
        f"{percent(judge['win_rate'])} ({interval(low, high, percent)})",
        f"{judge['wins']} / {judge['ties']} / {judge['losses']}",
        p_value(judge["sign_test_p"]),
    )


# ------------------------------------------------------------------------------------------------------------------ page


STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1f;
  --faint: #6b7280; --paper: #fff; --line: #e3e5e9; --card: #f6f7f9; --mark: #2563eb }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --faint: #9aa1ad; --paper: #17181b; --line: #34363c; --card: #202227; --mark: #7aa7ff }
}
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 72rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem }
p { margin: .4rem 0; max-width: 46rem } .faint { color: var(--faint); font-size: .9rem }
.cards, .pairs { display: grid; gap: 1rem }
.cards { grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); margin-top: 1.5rem }
.pairs { grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)) }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem }
.card b { font-size: 1.7rem; font-variant-numeric: tabular-nums }
.bar { position: relative; height: .9rem; margin: .6rem 0 .3rem; border-radius: .45rem; background: var(--line) }
.bar i { position: absolute; top: .2rem; height: .5rem; border-radius: .25rem; background: var(--mark);
  opacity: .45; min-width: 2px }
.bar u { position: absolute; top: 0; width: 3px; margin-left: -1px; height: .9rem; background: var(--mark) }
.bar s { position: absolute; top: -.2rem; left: 50%; width: 1px; height: 1.3rem; background: var(--faint) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); white-space: nowrap }
figure { margin: 0; display: flex; flex-direction: column } .two { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem }
.two img { width: 100%; display: block; border-radius: .3rem; background: var(--card) } .small img { image-rendering: pixelated }
figcaption { font-size: .9rem; padding: .35rem 0 } .score { display: flex; justify-content: space-between; gap: 1rem;
  color: var(--faint); font-size: .85rem; font-variant-numeric: tabular-nums }
.note { border-left: 3px solid var(--mark); padding-left: .75rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.25rem; font-size: .92rem }
dt { color: var(--faint) } dd { margin: 0 }
"""


def render(values: Values, pairs: Sequence[Pair], best: Sequence[int], worst: Sequence[int], small: bool = False) -> str:
    """The whole page. ``best`` and ``worst`` are positions in ``pairs``; ``small`` shows pictures without smoothing."""
    first = next(iter(values["judges"]))
    title = f"{values['tuned']} against {values['base']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">{escape(_headline(values))}</p>',
        '<div class="cards">' + "".join(_card(name, judge) for name, judge in values["judges"].items()) + "</div>",
        *(f'<p class="note">{escape(note)}</p>' for note in values["notes"]),
        "<h2>Scores</h2>",
        _table(HEADINGS, [_cells(name, judge) for name, judge in values["judges"].items()]),
        *_details(values),
        f"<h2>Where tuned gains most, by {escape(first)}</h2>",
        _gallery([pairs[i] for i in best], small),
        f"<h2>Where it gains least or loses most, by {escape(first)}</h2>",
        _gallery([pairs[i] for i in worst], small),
        "<h2>All pairs</h2>",
        _gallery(pairs, small),
        "<h2>How this was made</h2>",
        _provenance(values),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title>\n<style>{STYLE}</style>"
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _card(name: str, judge: Values) -> str:
    rate, (low, high) = judge["win_rate"], judge["win_rate_interval"]
    if math.isnan(rate):
        return f'<div class="card"><h3>{escape(name)}</h3><p>No pair could be judged.</p></div>'
    left, width, at = (f"{100 * x:.2f}%" for x in (low, high - low, rate))
    ties = f", {judge['ties']} ties counted half" if judge["ties"] else ""
    return (
        f'<div class="card"><div>{escape(name)}</div><b>{percent(rate)}</b> of pairs won by tuned{ties}'
        f'<div class="bar" title="win rate with its 95 % interval; the line is 50 %"><s></s>'
        f'<i style="left:{left};width:{width}"></i><u style="left:{at}"></u></div>'
        f'<div class="faint">95 % interval {percent(low)} to {percent(high)}, sign test p = {p_value(judge["sign_test_p"])}</div>'
        f'<div class="faint">{escape(judge["description"])}</div></div>'
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _details(values: Values) -> list[str]:
    rows = [
        (name, key.replace("_", " "), number(d["base"]), number(d["tuned"]), change(d["tuned"] - d["base"]))
        for name, judge in values["judges"].items()
        for key, d in judge["details"].items()
    ]
    return ["<h2>Measured besides</h2>", _table(("judge", "measurement", "base", "tuned", "difference"), rows)] if rows else []


def _gallery(pairs: Sequence[Pair], small: bool) -> str:
    return f'<div class="pairs{" small" if small else ""}">' + "\n".join(_figure(pair) for pair in pairs) + "</div>"


def _figure(pair: Pair) -> str:
    images = "".join(
        f'<a href="{escape(file)}"><img src="{escape(file)}" alt="{side}: {escape(pair.prompt)}" loading="lazy"></a>'
        for side, file in (("base", pair.base), ("tuned", pair.tuned))
    )
    scores = "".join(
        f'<div class="score"><span>{escape(name)} {number(base)}</span><span>{number(tuned)}</span></div>'
        for name, (base, tuned) in pair.scores.items()
    )
    category = f"{escape(pair.category)}, " if pair.category else ""
    caption = f'<figcaption>{escape(pair.prompt)}<div class="faint">{category}seed {pair.seed}</div></figcaption>'
    labels = '<div class="score"><span>base</span><span>tuned</span></div>'
    return f'<figure><div class="two">{images}</div>{labels}{scores}{caption}</figure>'


def _provenance(values: Values) -> str:
    skipped = ("judges", "versions", "notes", "faithfulness", "height", "width")
    plain = {k.replace("_", " "): v for k, v in values.items() if k not in skipped}
    plain |= {k: values[k] for k in ("height", "width") if values[k] is not None}
    plain |= {name: version for name, version in values["versions"].items() if version is not None}
    rows = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in plain.items())
    files = (
        '<p class="faint">Intervals are BCa bootstraps over prompts; the sign test counts each prompt once. '
        'The same numbers: <a href="summary.json">summary.json</a>; every score: <a href="scores.csv">scores.csv</a>; '
        'sheets: <a href="side_by_side.png">side by side</a>, <a href="best_and_worst.png">best and worst</a>.</p>'
    )
    return f"<dl>{rows}</dl>{files}"
