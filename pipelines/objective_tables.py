"""The output of ``diffalign objectives``: the objectives and the losses as tables, and one of either in full."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

from diffalign import objectives
from diffalign.errors import UserError, did_you_mean
from pipelines import recipes
from pipelines.text_tables import Table
from pipelines.writers.settings import COMMANDS

WIDTH = 130
_GAP = 2

OBJECTIVES_REMARK = (
    "Samples through the network for one pair (of pictures, trajectories, or rewrites) with the default settings, without and "
    "with a gradient; passes: in forward passes, where a sample with a gradient counts three. * takes any --loss. Judge: "
    "optional, for scores of the data's pairs; needed, to reward what the policy samples."
)
ABSOLUTE_REMARK = (
    "absolute !: the constants stand beside mean denoising errors of 0.01 to 1, because the loss needs a probability; no beta "
    "can make up for other units, and nothing ties the policy to its start. Keep the learning rate low. All other constants "
    "stand beside beta times a log-ratio."
)
LOSSES_REMARK = (
    f"{ABSOLUTE_REMARK} Needs: ratio, the log-ratios of policy and reference; policy or reference, their likelihoods one by one; "
    "rewards, a judge's scores; baseline, a scalar kept during the run. * compares the pairs of a batch: at least two. "
    "Constants are given as --loss-options a=1,b=2."
)


# ------------------------------------------------------------------------------------------------------------- tables


def objectives_table() -> Table:
    """One row for each objective."""
    headings = ("objective", "arXiv", "source", "reference", "loss", "data", "judge", "no grad", "grad", "passes", "recipes")
    return Table("", headings, [_objective_row(name) for name in objectives.names()], OBJECTIVES_REMARK)


def _objective_row(name: str) -> list[str]:
    module = objectives.load(name)
    about, cost = module.ABOUT, module.Objective().cost
    loss = about.loss + (" *" if about.takes_loss else "")
    described = [name, about.paper, about.source, about.reference, loss, ", ".join(about.data), about.judged or "-"]
    return [
        *described,
        *(f"{n:g}" for n in (cost.forward_only, cost.with_gradient, cost.forwards)),
        ", ".join(recipes.names(name)) or "-",
    ]


def losses_table() -> Table:
    """One row for each loss."""
    from diffalign import losses

    rows = []
    for name in losses.names():
        loss = losses.load(name)
        constants = ",".join(f"{field.name}={_value(field.default)}" for field in dataclasses.fields(loss.Settings))
        scale = "absolute !" if loss.scale == "absolute" else "beta"
        rows.append(
            [name + (" *" if loss.mixes_batch else ""), loss.paper, " ".join(sorted(loss.needs)), scale, constants or "-"]
        )
    return Table("", ("loss", "arXiv", "needs", "scale", "constants"), rows, LOSSES_REMARK)


def _value(default: Any) -> str:
    return f"{default:g}" if isinstance(default, float) else "none" if default is None else str(default)


# ---------------------------------------------------------------------------------------------------------- one in full


def objective_in_full(name: str) -> str:
    """The module's docstring, the settings with their defaults, and the recipes. Raises UserError for an unknown name."""
    _refuse_unknown(name, objectives.names(), "objective")
    module = objectives.load(name)
    about, cost = module.ABOUT, module.Objective().cost
    facts = [
        f"data    {' or '.join(about.data)}" + (f"; a judge is {about.judged}" if about.judged else ""),
        f"cost    per pair {cost.forward_only:g} samples without a gradient, {cost.with_gradient:g} with one: "
        f"{cost.forwards:g} passes",
        f"run     diffalign {COMMANDS.get(name, f'train {name}')} --recipe NAME",
        *(f"recipe  {line}" for line in recipes.describe(name)),
    ]
    facts = [line for fact in facts for line in textwrap.wrap(fact, WIDTH, subsequent_indent=" " * 8)]
    return "\n".join([inspect.cleandoc(module.__doc__ or ""), "", *facts, "", *_settings(module.Objective)])


def loss_in_full(name: str) -> str:
    """The function's docstring and its constants. Raises UserError for an unknown name."""
    from diffalign import losses

    _refuse_unknown(name, losses.names(), "loss")
    loss = losses.load(name)
    warning = ["", *textwrap.wrap(ABSOLUTE_REMARK, WIDTH)] if loss.scale == "absolute" else []
    return "\n".join([inspect.getdoc(loss.function) or "", *warning, "", *_settings(loss.Settings)])


def _settings(kind: type) -> list[str]:
    """A line for each field: its name, default and help; longer helps go on below themselves."""
    rows = [[f.name, _value(f.default), _helped(f)] for f in dataclasses.fields(kind)]
    return to_text(Table("", ("setting", "default", "meaning"), rows)).splitlines() if rows else ["No settings."]


def _helped(field: dataclasses.Field) -> str:
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    bounds = ", ".join(f"{words[name]} {bound:g}" for name, bound in field.metadata.get("bounds", {}).items())
    return field.metadata.get("help", "") + (f" ({bounds})" if bounds else "")


def _refuse_unknown(name: str, known: Sequence[str], what: str) -> None:
    if name not in known:
        raise UserError(f"No {what} is called {name!r}; there are: {', '.join(known)}.{did_you_mean(name, known)}")


# --------------------------------------------------------------------------------------------------------------- text


def to_text(table: Table, width: int = WIDTH) -> str:
    """Columns side by side, none wider than it must be; where they do not fit, the widest are wrapped."""
    rows = [list(table.headings), *map(list, table.rows)]
    widths = _widths(rows, width)
    lines = [line for row in rows for line in _wrapped(row, widths)]
    remark = ["", *textwrap.wrap(table.remark, width)] if table.remark else []
    return "\n".join([*lines, *remark])


def _widths(rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Each column's widest cell; as long as together they are too wide, the widest that can be wrapped gives way."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    least = [max(len(word) for cell in column for word in cell.split() or [""]) for column in columns]
    while sum(widths) + _GAP * (len(widths) - 1) > width:
        k = max(range(len(widths)), key=lambda i: widths[i] if widths[i] > least[i] else -1)
        if widths[k] == least[k]:
            break  # nothing gives way any more
        widths[k] -= 1
    return widths


def _wrapped(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    cells = [
        textwrap.wrap(cell, w, break_on_hyphens=False, break_long_words=False) or [""]
        for cell, w in zip(row, widths, strict=True)
    ]
    deep = max(map(len, cells))
    padded = [cell + [""] * (deep - len(cell)) for cell in cells]
    return [
        (" " * _GAP).join(part.ljust(w) for part, w in zip(line, widths, strict=True)).rstrip()
        for line in zip(*padded, strict=True)
    ]
