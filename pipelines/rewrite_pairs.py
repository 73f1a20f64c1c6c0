"""Read and write preferences between rewrites of a prompt, and pairs of plain and expanded prompts.

    table = read_rewrites("pairs.jsonl")
    table[0].prompt, table[0].chosen, table[0].rejected

Rows come from JSON, JSON lines, CSV, TSV, Parquet, a data set saved on disk, or one of the hub. Texts may be plain, or
conversations in TRL's form (lists of turns with role and content): then the user's last turn is the prompt and the assistant's
last turn the rewrite. Conversations with more turns, which are not read, are counted, as are those of them with a system turn.
Rows that cannot be used are kept as problems, each with its place and the reason. A pair of two equal rewrites teaches nothing
and is left out, as is a row that repeats an earlier one; both are counted.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from diffalign.data.columns import hint as columns_hint
from diffalign.data.open import TIES, check_columns, open_rows
from diffalign.data.pairs import RowProblem, number_from, score_from, text_from
from diffalign.data.readers import arrow, hub, listing, parquet, saved
from diffalign.errors import UserError
from diffalign.written_aside import write_file
from reward_models._pictures import ENDINGS as PICTURES

ENDINGS = (".jsonl", ".ndjson", ".parquet")
"""Endings of the files that ``write_rewrites`` writes."""
FORMS = (
    "a .jsonl, .json, .csv, .tsv or .parquet file",
    "a folder of parquet shards",
    saved.FORM,
    "the id of a data set on the Hugging Face hub (owner/name)",
)


@dataclass(frozen=True)
class RewritePair:
    """A prompt, two rewrites of it, and which of them was preferred."""

    prompt: str
    chosen: str
    rejected: str
    label: float = 1.0  # probability that ``chosen`` is preferred, in [1/2, 1]
    weight: float = 1.0  # factor on the pair's loss, >= 0
    distance: float | None = None  # 1 - cos between prompt and ``chosen``, in [0, 2]
    chosen_score: float | None = None  # a judge's score, larger is better
    rejected_score: float | None = None
    gold: str | None = None  # a reference rewrite, better than both
    origin: str = field(default="", compare=False)  # file and row, for messages
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)  # all other columns

    @property
    def tie(self) -> bool:
        return self.label == 0.5


@dataclass(frozen=True)
class Expansion:
    """A plain prompt and a rewrite of it to be imitated."""

    prompt: str
    rewrite: str
    weight: float = 1.0
    origin: str = field(default="", compare=False)
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)


Row = TypeVar("Row", RewritePair, Expansion)


@dataclass(frozen=True)
class RewriteTable(Generic[Row]):
    """The rows of a data set that can be used, in its order."""

    rows: tuple[Row, ...]
    where: str
    left_out: Mapping[str, int]  # number of rows by reason: ties, identical, repeated, unwanted, unusable
    problems: tuple[RowProblem, ...]  # place and reason of each unusable row
    multi_turn: int = 0  # conversations with turns before the user's last, which are not read
    system_turns: int = 0  # those of them with a system turn

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def description(self) -> str:
        """A line for the terminal: the data's place, the number of rows, and what was left out."""
        left = "".join(f", {n} {why} left out" for why, n in self.left_out.items() if n)
        first = f" (the first: {self.problems[0]})" if self.problems else ""
        turns = f"; of {self.multi_turn} conversations only the last turns are read" if self.multi_turn else ""
        if self.system_turns:
            turns += f" ({self.system_turns} have a system turn: the writer's own is given with --system TEXT)"
        return f"{self.where}: {len(self)} {'rewrites' if isinstance(self.rows[0], Expansion) else 'pairs'}{left}{first}{turns}"

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of everything that training sees of the rows, whatever their form of storage."""
        sha = hashlib.sha256()
        for row in self.rows:
            sha.update(json.dumps(_seen(row)).encode())
        return sha.hexdigest()


def _seen(row: RewritePair | Expansion) -> list[Any]:
    return [getattr(row, f.name) for f in fields(row) if f.compare]


# ------------------------------------------------------------------------------------------------------------------- columns

_PROMPT = ("prompt", "plain", "plain_prompt", "original", "original_prompt", "caption", "input", "instruction", "query", "text")
_CHOSEN = ("chosen", "winner", "preferred", "chosen_rewrite", "chosen_prompt", "response_chosen")
_REJECTED = ("rejected", "loser", "unpreferred", "rejected_rewrite", "rejected_prompt", "response_rejected")
_REWRITE = ("rewrite", "rewritten", "expanded", "expansion", "expanded_prompt", "optimized", "optimized_prompt", "completion")
_NUMBERS = {"label": ("label",), "weight": ("weight",)}


@dataclass(frozen=True)
class _Form:
    """The columns that a row must have and may have: for each role of a column its usual names."""

    what: str
    required: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]]
    conversation_role: str  # role of the column that may hold a whole conversation, the prompt included

    @property
    def roles(self) -> Mapping[str, tuple[str, ...]]:
        return {**self.required, **self.optional}


_PAIRS = _Form(
    "preferences between rewrites",
    {"prompt": _PROMPT, "chosen": _CHOSEN, "rejected": _REJECTED},
    {
        **_NUMBERS,
        "distance": ("distance", "chosen_distance"),
        "chosen_score": ("chosen_score", "score_chosen"),
        "rejected_score": ("rejected_score", "score_rejected"),
        "gold": ("gold", "reference", "gold_rewrite"),
    },
    "chosen",
)
_EXPANSIONS = _Form(
    "rewrites to imitate",
    {"prompt": _PROMPT, "rewrite": (*_REWRITE, *_CHOSEN, "response", "output", "target", "messages")},
    {**_NUMBERS, "rejected": _REJECTED},
    "rewrite",
)


class _Rows(Protocol):
    """The part of ``diffalign.data.table.Rows`` that is needed here."""

    columns: tuple[str, ...]
    description: str

    def __len__(self) -> int: ...

    def row(self, index: int, columns: Sequence[str]) -> Mapping[str, Any]: ...

    def origin(self, index: int) -> str: ...


# ------------------------------------------------------------------------------------------------------------------- reading


def read_rewrites(
    where: str | Path, *, columns: Mapping[str, str] | None = None, split: str = "train", ties: str = "keep"
) -> RewriteTable[RewritePair]:
    """Read preferences between rewrites.

    Columns without a role become ``provenance``. A ``label`` below 1/2 swaps the two rewrites of a pair.

    Args:
        where: a file, a folder, or the id of a data set on the hub.
        columns: names of columns by role (``{"prompt": "text", "gold": "best"}``), where they differ from the usual ones.
        split: split of a data set that has several.
        ties: ``keep`` pairs with label 1/2, or ``drop`` them.

    Raises:
        UserError: the place, split, a column or the form of the data is unknown, or no row can be used.
    """
    if ties not in TIES:
        raise UserError(f"ties is {ties!r}; it must be one of {', '.join(TIES)}.")
    return _table(where, split, columns or {}, _PAIRS, lambda cells, names: _pair(cells, names, ties))


def read_expansions(
    where: str | Path, *, columns: Mapping[str, str] | None = None, split: str = "train"
) -> RewriteTable[Expansion]:
    """Read prompts with one rewrite each, for supervised fine-tuning; preferences give their preferred rewrite.

    The column of rewrites is called ``rewrite``, ``completion`` or ``chosen``, say, or ``messages`` for conversations. Without a
    column of rejected rewrites, rows with a ``label`` below 1/2 are left out.

    Args:
        where, columns, split: see ``read_rewrites``.

    Raises:
        UserError: see ``read_rewrites``.
    """
    return _table(where, split, columns or {}, _EXPANSIONS, _expansion)


class _LeftOut(Exception):
    """A valid row that is not used; the message is the reason."""


def _table(
    where: str | Path,
    split: str,
    columns: Mapping[str, str],
    form: _Form,
    parse: Callable[[Mapping[str, Any], Mapping[str, str]], Row],
) -> RewriteTable[Row]:
    rows = _open(where, split)
    names = _names(rows, form, columns)
    known = set(form.roles)
    others = [name for name in rows.columns if name not in names.values() and name not in known]
    found: dict[str, Row] = {}
    left_out = {"ties": 0, "identical": 0, "repeated": 0, "unwanted": 0}
    problems, multi_turn, systems = [], 0, 0
    for index in range(len(rows)):
        try:
            row, cells = _parsed(rows, index, names, others, parse)
            earlier = [_earlier_turns(cells[name]) for name in dict.fromkeys(names.values())]
            multi_turn += any(earlier)
            systems += any(turn["role"] == "system" for turns in earlier for turn in turns)
        except RowProblem as problem:
            problems.append(problem)
        except _LeftOut as reason:
            left_out[str(reason)] += 1
        else:
            key = json.dumps(_seen(row))
            left_out["repeated"] += key in found
            found.setdefault(key, row)
    left_out["unusable"] = len(problems)
    table = RewriteTable(tuple(found.values()), rows.description, left_out, tuple(problems), multi_turn, systems)
    if not found:
        why = ", ".join(f"{n} {reason}" for reason, n in table.left_out.items() if n) or "it has no rows"
        first = f" The first that is unusable: {problems[0]}." if problems else ""
        raise UserError(f"There are no {form.what} to use in {rows.description}: {why}.{first}")
    _refuse_pictures(table)
    return table


def _refuse_pictures(table: RewriteTable) -> None:
    """Raise ``UserError`` for preferences between pictures.

    They have the columns of preferences between rewrites, and a writer would learn to write names of files.
    """
    texts = [row.rewrite if isinstance(row, Expansion) else row.chosen for row in table]
    named = [text for text in texts if Path(text).suffix.lower() in PICTURES]
    if 2 * len(named) > len(texts):
        raise UserError(
            f"{table.where} holds names of pictures ({named[0]!r}), and a prompt writer learns from texts: rewrites of prompts, "
            "as `diffalign prompts build` makes them. From pairs of pictures `diffalign train` learns."
        )


def _parsed(
    rows: _Rows,
    index: int,
    names: Mapping[str, str],
    others: Sequence[str],
    parse: Callable[[Mapping[str, Any], Mapping[str, str]], Row],
) -> tuple[Row, Mapping[str, Any]]:
    """A row, and the cells that it was made of: they are read together, as readers are fast only with the same columns."""
    cells = rows.row(index, (*dict.fromkeys(names.values()), *others))
    try:
        row = parse({role: cells.get(name) for role, name in names.items()}, names)
    except ValueError as error:
        raise RowProblem(rows.origin(index), None, str(error)) from error
    return replace(row, origin=rows.origin(index), provenance={name: cells.get(name) for name in others}), cells


def _names(rows: _Rows, form: _Form, columns: Mapping[str, str]) -> dict[str, str]:
    """The column of every role that has one; a name given by the user takes precedence over the usual ones."""
    check_columns(columns, form.roles, rows)
    names = {}
    for role, usual in form.roles.items():
        name = columns.get(role) or next((u for u in usual if u in rows.columns and u not in columns.values()), None)
        if name is not None:
            names[role] = name
    lacking = [role for role in form.required if role not in names]
    if lacking == ["prompt"] and _is_conversation(rows, names[form.conversation_role]):
        return names  # the prompt is the first part of the conversation
    if lacking:
        needed = ", ".join(" or ".join(usual[:3]) for usual in form.required.values())
        only = ""
        if form is _PAIRS and all(any(u in rows.columns for u in usual) for usual in _EXPANSIONS.required.values()):
            only = " One rewrite for each prompt can be imitated (supervised fine-tuning), but says nothing of preferences."
        missing = f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} missing"
        has = ", ".join(rows.columns) or "no columns"
        raise UserError(
            f"{rows.description} does not have the columns that {form.what} need: {missing}. It has: {has}. Needed: {needed}; "
            f"optional {', '.join(form.optional)}. {columns_hint([(form.roles, list(form.required))], rows.columns)}.{only}"
        )
    return names


def _is_conversation(rows: _Rows, column: str) -> bool:
    """Whether the first readable cell of the column is a conversation."""
    for index in range(len(rows)):
        try:
            return _turns(rows.row(index, (column,)).get(column)) is not None
        except RowProblem:
            continue
    return False


# ---------------------------------------------------------------------------------------------------------------------- rows


def _pair(cells: Mapping[str, Any], names: Mapping[str, str], ties: str) -> RewritePair:
    prompt = _prompt(cells, names, "chosen")
    if "prompt" not in names and _prompt(cells, names, "rejected", or_else=prompt) != prompt:
        raise ValueError(f"{names['chosen']} and {names['rejected']} answer different prompts")
    chosen, rejected = (_text(cells[side], names[side], "assistant") for side in ("chosen", "rejected"))
    gold = cells.get("gold")
    gold = None if gold in (None, "", []) else _text(gold, names["gold"], "assistant")
    scores = [score_from(cells.get(role), names.get(role, role)) for role in ("chosen_score", "rejected_score")]
    label, distance = _label(cells, names), _distance(cells, names)
    if label < 0.5:  # the distance was that of the other rewrite
        chosen, rejected, scores, label, distance = rejected, chosen, scores[::-1], 1.0 - label, None
    if label == 0.5 and ties == "drop":
        raise _LeftOut("ties")
    if chosen.split() == rejected.split():
        raise _LeftOut("identical")
    return RewritePair(prompt, chosen, rejected, label, _weight(cells, names), distance, *scores, gold)


def _expansion(cells: Mapping[str, Any], names: Mapping[str, str]) -> Expansion:
    prompt, side = _prompt(cells, names, "rewrite"), "rewrite"
    if _label(cells, names) < 0.5:
        if "rejected" not in names:
            raise _LeftOut("unwanted")
        side = "rejected"
    return Expansion(prompt, _text(cells[side], names[side], "assistant"), _weight(cells, names))


def _prompt(cells: Mapping[str, Any], names: Mapping[str, str], role: str, or_else: str | None = None) -> str:
    """The prompt: the cell of its column, or the user's last turn of the conversation of ``role``.

    A conversation without a turn of the user gives ``or_else``, if that is not None.
    """
    if "prompt" in names:
        return _text(cells["prompt"], names["prompt"], "user")
    turns = _turns(cells[role])
    if or_else is not None and not (turns and any(turn["role"] == "user" for turn in turns)):
        return or_else
    if turns is None:
        raise ValueError(f"there is no prompt: {names[role]} is not a conversation as it is in other rows")
    return _text(turns, names[role], "user")


def _text(cell: Any, name: str, speaker: str) -> str:
    """A cell's text; the speaker's last turn if it is a conversation.

    Raises:
        ValueError: there is no text; the message says why.
    """
    turns = _turns(cell)
    if turns is not None:
        said = [turn["content"] for turn in turns if turn["role"] == speaker]
        if not said:
            raise ValueError(f"the conversation in {name} has no turn of the {speaker}")
        cell = said[-1]
        if isinstance(cell, list) and all(isinstance(part, dict) and "text" in part for part in cell):
            cell = "".join(str(part["text"]) for part in cell)
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        raise ValueError(f"{name} is empty")
    if isinstance(cell, (bytes, bytearray)) or (isinstance(cell, dict) and "bytes" in cell):
        raise ValueError(f"{name} is a picture, not text: these are preferences between pictures")
    return text_from(cell, name)


def _turns(cell: Any) -> list[Mapping[str, Any]] | None:
    """The turns of a conversation, which a CSV file holds as JSON text; None for anything else."""
    if isinstance(cell, str) and cell.lstrip().startswith("[{"):
        try:
            cell = json.loads(cell)
        except ValueError:
            return None
    if isinstance(cell, list) and cell and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in cell):
        return cell
    return None


def _earlier_turns(cell: Any) -> list[Mapping[str, Any]]:
    """The turns before the user's last turn, or before the last turn if the user has none; none if the cell is text."""
    turns = _turns(cell) or []
    last = max((k for k, turn in enumerate(turns) if turn["role"] == "user"), default=len(turns) - 1)
    return turns[:last]


def _label(cells: Mapping[str, Any], names: Mapping[str, str]) -> float:
    """Probability that ``chosen`` is preferred; 1 where the cell is missing or empty."""
    value = cells.get("label")
    if value in (None, ""):
        return 1.0
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        value = value.strip().lower() == "true"
    return number_from(value, names["label"], 0.0, 1.0)


def _weight(cells: Mapping[str, Any], names: Mapping[str, str]) -> float:
    value = cells.get("weight")
    return 1.0 if value in (None, "") else number_from(value, names["weight"], 0.0, math.inf)


def _distance(cells: Mapping[str, Any], names: Mapping[str, str]) -> float | None:
    """A cosine distance; a value that rounding put just outside of [0, 2] is clamped."""
    value = score_from(cells.get("distance"), names.get("distance", "distance"))
    return None if value is None else min(max(number_from(value, names["distance"], -1e-5, 2 + 1e-5), 0.0), 2.0)


# ------------------------------------------------------------------------------------------------------------------- storage


def _open(where: str | Path, split: str) -> _Rows:
    path = Path(where).expanduser()
    if path.is_file() and path.suffix.lower() == ".json":
        return _json_rows(path)
    return open_rows(where, split, (listing, parquet, arrow, saved, hub), "Rewrites", FORMS)


def _json_rows(path: Path) -> _Rows:
    """The rows of a JSON list of objects. A .json file of JSON lines is read, too."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return listing.ListingRows(path)
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text (UTF-8): {error}.") from error
    if not isinstance(content, list):
        raise UserError(f"{path} holds one {type(content).__name__}; it should be a list of objects, one for each row.")
    return _JsonRows(path, content)


class _JsonRows:
    """The rows of a JSON list; an item that is no object is a problem of its row."""

    def __init__(self, path: Path, items: list[Any]) -> None:
        self._path, self._items = path, items
        self.columns = tuple(dict.fromkeys(key for item in items if isinstance(item, dict) for key in item))
        self.description = str(path)

    def __len__(self) -> int:
        return len(self._items)

    def row(self, index: int, columns: Sequence[str]) -> Mapping[str, Any]:
        item = self._items[index]
        if not isinstance(item, dict):
            raise RowProblem(self.origin(index), None, f"expected a JSON object, found {type(item).__name__}")
        return {name: item.get(name) for name in columns}

    def origin(self, index: int) -> str:
        return f"{self._path.name}:item {index + 1}"


# ------------------------------------------------------------------------------------------------------------------- writing


def write_rewrites(rows: Sequence[RewritePair] | Sequence[Expansion], path: str | Path) -> None:
    """Write rows as JSON lines or Parquet, by the file's ending, with a column for each key of ``provenance``.

    Columns in which every row has the default value are left out. If writing fails, an existing file stays as it was.

    Raises:
        UserError: the ending is another, there are no rows, or the file cannot be written.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"{path} ends in {path.suffix or 'nothing'}; rewrites are written as {', '.join(ENDINGS)}.")
    if not rows:
        raise UserError(f"There are no rewrites to write to {path}.")
    columns = _columns(rows)
    if path.suffix.lower() == ".parquet":
        write_file(path, _parquet(columns))
        return
    lines = (dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True))
    write_file(path, "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines))


def _columns(rows: Sequence[RewritePair] | Sequence[Expansion]) -> dict[str, list[Any]]:
    own = [f for f in fields(rows[0]) if f.compare]
    found = {f.name: [_plain(getattr(row, f.name)) for row in rows] for f in own}
    kept = {f.name: found[f.name] for f in own if any(cell != f.default for cell in found[f.name])}
    others = dict.fromkeys(name for row in rows for name in row.provenance)
    if clash := [name for name in others if name in found]:
        raise ValueError(f"provenance has {clash[0]}, which is a column of its own")
    return kept | {name: [_plain(row.provenance.get(name)) for row in rows] for name in others}


def _plain(value: Any) -> Any:
    """The value in JSON's types: numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parquet(columns: Mapping[str, list[Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    pq.write_table(pa.table({name: _array(cells) for name, cells in columns.items()}), stream)
    return stream.getvalue()


def _array(cells: list[Any]) -> Any:
    """An Arrow array of the cells; cells of several types become JSON text."""
    import pyarrow as pa

    try:
        return pa.array(cells)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([c if c is None or isinstance(c, str) else json.dumps(c, ensure_ascii=False) for c in cells])
