"""One door to all preference data: ``open_pairs``.

Two things are independent: how rows are stored (``readers/``) and what their columns mean (``layouts/``). Each is a
folder of modules, and the folder is the registry: a new form of storage or a new layout is a new file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from diffalign.data import layouts, readers
from diffalign.data.table import Layout, PairTable, Rows
from diffalign.errors import UserError

TIES = ("keep", "drop")


def open_pairs(
    where: str | Path, *, split: str = "train", ties: str = "keep", columns: Mapping[str, str] | None = None
) -> PairTable:
    """Open preference data: a file, a folder, or the id of a data set on the Hugging Face hub.

    ``split`` chooses among the splits where there are several. ``ties="drop"`` leaves out pairs with label 1/2.
    ``columns`` says which column plays a role (``{"prompt": "text", "chosen": "image_a"}``) where the names differ from
    the usual ones. Raises ``UserError`` for an unknown place, split, column or form of data.
    """
    if ties not in TIES:
        raise UserError(f"ties is {ties!r}; it must be one of {', '.join(TIES)}.")
    place = str(Path(where).expanduser()) if Path(where).expanduser().exists() else str(where)
    rows = _reader(place).open_rows(place, split)
    layout, names = _layout(rows, columns or {})
    kept, left_out = _kept(rows, layout, names, ties)
    table = PairTable(rows, layout, names, kept, ties, left_out)
    if len(table) == 0:
        raise UserError(f"There are no pairs to use in {table.description}.")
    return table


def _modules(package: ModuleType) -> list[Any]:
    found = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
    return [importlib.import_module(f"{package.__name__}.{name}") for name in found]


def _reader(place: str) -> Any:
    known = _modules(readers)
    claims = [reader for reader in known if reader.claims(place)]
    if len(claims) == 1:
        return claims[0]
    forms = "; ".join(reader.FORM for reader in known)
    if claims:
        both = " and ".join(reader.FORM for reader in claims)
        raise UserError(f"{place} can be read in more than one way: {both}. Point at the file or folder that is meant.")
    if not Path(place).exists():
        raise UserError(f"There is no file or folder {place} (seen from {Path.cwd()}). Preference data can be: {forms}.")
    raise UserError(f"{place} exists, but is in none of the known forms of preference data. They are: {forms}.")


def _layout(rows: Rows, columns: Mapping[str, str]) -> tuple[Layout, dict[str, str]]:
    """The one layout whose required roles all have a column."""
    known: list[Layout] = _modules(layouts)
    roles = [role for layout in known for role in (*layout.REQUIRED, *layout.OPTIONAL)]
    for role, name in columns.items():
        if role not in roles:
            raise UserError(f"columns: {role!r} is not a role of a column; the roles are {', '.join(sorted(set(roles)))}.")
        if name not in rows.columns:
            has = _list(rows.columns)
            raise UserError(f"columns: {role}={name}, but {rows.description} has no column {name!r}. It has: {has}.")
    fitting = []
    for layout in known:
        names = _names(layout, rows.columns, columns)
        if all(role in names for role in layout.REQUIRED) and all(role in names for role in columns):
            fitting.append((layout, names))
    if len(fitting) == 1:
        return fitting[0]
    needs = "; or ".join(f"{layout.FORM} ({_needs(layout)})" for layout in known)
    if fitting:
        raise UserError(f"{rows.description} has the columns of more than one layout: {needs}. Choose by naming its columns.")
    raise UserError(
        f"{rows.description} does not have the columns that preference pairs need. It has: {_list(rows.columns)}. "
        f"Needed: {needs}. If they go by other names, say which column plays which role (columns: role=name)."
    )


def _names(layout: Layout, present: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Column name of every role that has one; a name given by the user comes before the usual ones."""
    names = {}
    for role, aliases in {**layout.REQUIRED, **layout.OPTIONAL}.items():
        usual = next((alias for alias in aliases if alias in present), None)
        if (name := columns.get(role, usual)) is not None:
            names[role] = name
    return names


def _needs(layout: Layout) -> str:
    required = ", ".join(" or ".join(aliases[:3]) for aliases in layout.REQUIRED.values())
    return f"{required}; optional {', '.join(layout.OPTIONAL)}"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "no columns"


def _kept(rows: Rows, layout: Layout, names: Mapping[str, str], ties: str) -> tuple[Sequence[int], dict[str, int]]:
    """Indices of the rows to use. A row with a label that makes no sense stays: it is a problem to report, not to hide."""
    present = [role for role in layout.LABELS if role in names]
    left_out = {"ties": 0, "unlabelled": 0}
    if not present:
        return range(len(rows)), left_out
    kept = []
    for index, cells in enumerate(zip(*(rows.column(names[role]) for role in present), strict=True)):
        try:
            probability = layout.probability(dict(zip(present, cells, strict=True)))
        except ValueError:
            probability = 1.0
        if probability is None:
            left_out["unlabelled"] += 1
        elif probability == 0.5 and ties == "drop":
            left_out["ties"] += 1
        else:
            kept.append(index)
    return kept, left_out
