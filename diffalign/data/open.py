"""One door to all preference data, pairs and single pictures: ``open_pairs``.

Two things are independent: how rows are stored (``readers/``) and what their columns mean (``layouts/``). Each is a
folder of modules, and the folder is the registry: a new form of storage or a new layout is a new file.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from array import array
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from diffalign.data import layouts, readers
from diffalign.data.columns import hint as columns_hint
from diffalign.data.table import LOWER, Layout, PairTable, Rows, score_columns
from diffalign.errors import UserError

TIES = ("keep", "drop")


def open_pairs(
    where: str | Path,
    *,
    split: str = "train",
    ties: str = "keep",
    columns: Mapping[str, str] | None = None,
    scores: str | None = None,
) -> PairTable:
    """Open preference data: a file, a folder, or the id of a data set on the Hugging Face hub.

    ``split`` chooses among the splits where there are several. ``ties="drop"`` leaves out pairs with label 1/2; single
    pictures have no ties. ``columns`` says which column plays a role (``{"prompt": "text", "chosen": "image_a"}``) where
    the names differ from the usual ones. ``scores`` is the judge, as ``diffalign relabel`` called it, whose scores the pairs
    carry. Raises ``UserError`` for an unknown place, split, column, judge or form of data.
    """
    if not isinstance(where, (str, os.PathLike)):
        raise UserError(f"Data are named by a path or a hub id; got a {type(where).__name__}. Save it first: to_parquet(FILE).")
    if ties not in TIES:
        raise UserError(f"ties is {ties!r}; it must be one of {', '.join(TIES)}.")
    rows = open_rows(where, split)
    layout, names = _layout(rows, columns or {})
    if scores is not None:
        names |= _scores(rows, layout, names, columns or {}, scores)
    ties = ties if layout.KIND == "pairs" else "keep"
    kept, left_out = _kept(rows, layout, names, ties)
    table = PairTable(rows, layout, names, kept, ties, left_out)
    if len(table) == 0:
        raise UserError(f"There are no {table.kind} to use in {table.description}.")
    return table


def _modules(package: ModuleType) -> list[Any]:
    found = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
    return [importlib.import_module(f"{package.__name__}.{name}") for name in found]


def open_rows(
    where: str | Path, split: str, known: Sequence[Any] = (), what: str = "Preference data", forms: Sequence[str] = ()
) -> Rows:
    """Open a file, a folder, or the id of a data set on the hub, by the one reader that knows its form of storage.

    Args:
        split: the split of a data set that has several.
        known: the reader modules to choose from; none: all of ``readers/``.
        what: what the rows hold, for messages.
        forms: the forms that the readers know, for messages; none: each reader's ``FORM``.

    Raises:
        UserError: there is no such place, its form is not known, or more than one reader knows it.
    """
    expanded = os.path.expanduser(where)
    place = str(Path(expanded)) if os.path.exists(expanded) else str(where)
    known = known or _modules(readers)
    claims = [reader for reader in known if reader.claims(place)]
    if len(claims) == 1:
        return claims[0].open_rows(place, split)
    can_be = f"{what} can be: {'; '.join(forms or [reader.FORM for reader in known])}."
    if claims:
        both = " and ".join(reader.FORM for reader in claims)
        raise UserError(f"{place} can be read in more than one way: {both}. Point at the file or folder that is meant.")
    if not Path(place).exists():
        raise UserError(f"There is no file or folder {place} (seen from {Path.cwd()}). {can_be}")
    raise UserError(f"{place} exists, but is in none of the known forms of data. {can_be}")


def check_columns(columns: Mapping[str, str], roles: Collection[str], rows: Rows) -> None:
    """Raise ``UserError`` if the user's ``columns`` (role: name) hold a role or the name of a column that does not exist."""
    for role, name in columns.items():
        if role not in roles:
            raise UserError(f"columns: {role!r} is not a role of a column; the roles are {', '.join(sorted(roles))}.")
        if name not in rows.columns:
            has = _list(rows.columns)
            raise UserError(f"columns: {role}={name}, but {rows.description} has no column {name!r}. It has: {has}.")


def _layout(rows: Rows, columns: Mapping[str, str]) -> tuple[Layout, dict[str, str]]:
    """The one layout whose required roles all have a column."""
    known: list[Layout] = _modules(layouts)
    check_columns(columns, {role for layout in known for role in (*layout.REQUIRED, *layout.OPTIONAL)}, rows)
    fitting = []
    for layout in known:
        names = _names(layout, rows.columns, columns)
        if all(role in names for role in layout.REQUIRED) and all(role in names for role in columns):
            fitting.append((layout, names))
    pairs = [found for found in fitting if found[0].KIND == "pairs"]
    if len(fitting := pairs or fitting) == 1:
        if not pairs and "image" not in columns:
            _refuse_halves(rows, known, fitting[0][1])
        return fitting[0]
    needs = "; or ".join(f"{layout.FORM} ({_needs(layout)})" for layout in known)
    if fitting:
        raise UserError(f"{rows.description} has the columns of more than one layout: {needs}. Choose by naming its columns.")
    raise UserError(
        f"{rows.description} does not have the columns that preference data need. It has: {_list(rows.columns)}. "
        f"Needed: {needs}. {columns_hint([_roles(layout) for layout in known], rows.columns)}."
    )


def _names(layout: Layout, present: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Column name of every role that has one; a name given by the user comes before the usual ones."""
    names = {}
    for role, aliases in {**layout.REQUIRED, **layout.OPTIONAL}.items():
        usual = next((alias for alias in aliases if alias in present), None)
        if (name := columns.get(role, usual)) is not None:
            names[role] = name
    return names


def _roles(layout: Layout) -> tuple[dict[str, Sequence[str]], list[str]]:
    return {**layout.REQUIRED, **layout.OPTIONAL}, list(layout.REQUIRED)


def _needs(layout: Layout) -> str:
    required = ", ".join(" or ".join(aliases[:3]) for aliases in layout.REQUIRED.values())
    return f"{required}; optional {', '.join(layout.OPTIONAL)}"


def _refuse_halves(rows: Rows, known: Sequence[Layout], names: Mapping[str, str]) -> None:
    """Raises ``UserError`` where the columns of single pictures stand beside one that belongs to a pair."""
    sides = {alias for layout in known if layout.KIND == "pairs" for role in layout.IMAGES for alias in layout.REQUIRED[role]}
    halves = [name for name in rows.columns if name in sides and len(name) > 1]  # "w" may be a width
    if halves:
        raise UserError(
            f"{rows.description} has columns {', '.join(names.values())}, as a data set of single pictures has, and "
            f"{', '.join(halves)}, as one of pairs has. It has: {_list(rows.columns)}. Say which is meant by naming its columns: "
            f"image={names['image']} for single pictures, or both pictures of a pair (--columns chosen=NAME,rejected=NAME)."
        )


def _scores(rows: Rows, layout: Layout, names: Mapping[str, str], columns: Mapping[str, str], judge: str) -> dict[str, str]:
    """The columns of a judge's scores, by role. Raises ``UserError`` for a judge that has none here."""
    if said := [role for role in layout.SCORES if role in columns]:
        raise UserError(
            f"scores={judge!r} and columns {said[0]}={columns[said[0]]} both say where the scores are; give one of them."
        )
    found = score_columns(layout, judge)
    if all(name in rows.columns for name in found):
        lower = f"{judge}_{LOWER}"
        return dict(zip(layout.SCORES, found, strict=True)) | ({LOWER: lower} if lower in rows.columns else {})
    judges = _judges(rows.columns, layout, set(names.values()))
    have = f"there are those of {', '.join(judges)}" if judges else "there are none; `diffalign relabel` writes them"
    wanted = " and ".join(dict.fromkeys(found))
    raise UserError(f"scores: {rows.description} has no scores by {judge!r} (it lacks {wanted}); {have}.")


def _judges(present: Sequence[str], layout: Layout, taken: set[str]) -> list[str]:
    """The judges whose columns are there; of pairs those with a margin beside, for model_0 and model_1 are no scores."""
    ending = score_columns(layout, "")[0]
    names = [name.removesuffix(ending) for name in present if name.endswith(ending) and name not in taken]
    needed = {name: {*score_columns(layout, name)} | ({f"{name}_margin"} if layout.KIND == "pairs" else set()) for name in names}
    return [name for name in names if name and needed[name] <= set(present)]


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "no columns"


def _kept(rows: Rows, layout: Layout, names: Mapping[str, str], ties: str) -> tuple[Sequence[int], dict[str, int]]:
    """Indices of the rows to use. A row with a label that makes no sense stays: it is a problem to report, not to hide."""
    present = [role for role in layout.LABELS if role in names]
    left_out = {"ties": 0, "unlabelled": 0}
    if not present:
        return range(len(rows)), left_out
    reason_of = partial(_left_out, layout, present, ties)
    remembered = lru_cache(maxsize=1024)(reason_of)  # there are few labels, whatever the number of rows
    kept = array("q")
    for index, cells in enumerate(rows.cells([names[role] for role in present])):
        try:
            reason = remembered(*cells)
        except TypeError:  # a list in a cell cannot be remembered
            reason = reason_of(*cells)
        if reason:
            left_out[reason] += 1
        else:
            kept.append(index)
    return kept, left_out


def _left_out(layout: Layout, roles: Sequence[str], ties: str, *cells: Any) -> str | None:
    """Why a row with these labels is not used; None for one that is."""
    try:
        probability = layout.probability(dict(zip(roles, cells, strict=True)))
    except ValueError:
        return None
    if probability is None:
        return "unlabelled"
    return "ties" if probability == 0.5 and ties == "drop" else None
