"""Pictures of one or several systems, scored by several judges into one table.

    table = score_table({"base": "pictures/base", "tuned": "pictures/tuned"}, "prompts.jsonl", ["pickscore", "clip"])

One row per picture, with the columns ``KEYS`` of ``pipelines.comparison_table`` and one column per judge; ``compare(table)``
goes on from there. All pictures go through the judges in one pass (``reward_models._scoring``). With a ``ScoreJournal`` the pass
can be cut off at any time and goes on where it was, in whole batches, so that the table is the same to the bit.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import reward_models
from diffalign.digests import digest_of
from diffalign.errors import UserError
from diffalign.written_aside import write_file
from pipelines import outputs
from pipelines.comparison_table import KEYS
from pipelines.counterparts import numbered
from pipelines.own_judges import judge_digest, provenance_of
from pipelines.picture_prompts import NAMED, pictures_with_prompts, prompts_and_pictures_of_dataset
from pipelines.score_journal import ScoreJournal
from reward_models._pictures import ENDINGS, Pictures, list_folder
from reward_models.base import JudgeError, check_text

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import Tensor

    from reward_models._judge import Scorer
    from reward_models._scoring import CacheLike

BATCH = 16
FORMATS = (".parquet", ".csv", ".jsonl")
TEXTS = ("system", "picture", "prompt", "category")
"""Columns of a table that are read as they stand: a folder may be called ``null`` or ``007``."""
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Sheet:
    """N pictures of all systems in one list: for each its row of ``KEYS``, and the picture itself or where it is."""

    rows: tuple[dict[str, Any], ...]
    pictures: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def prompts(self) -> list[str]:
        return [row["prompt"] for row in self.rows]

    def fingerprint(self) -> str:
        """A hash of names, sizes and times of the files, of the content of pictures that are no files, and of the prompts."""
        sha = hashlib.sha256()
        for row, picture in zip(self.rows, self.pictures, strict=True):
            sha.update(json.dumps([row["system"], row["prompt"], *_state(picture, row["picture"])]).encode())
        return sha.hexdigest()


def _state(picture: Any, name: Any) -> list[Any]:
    if not isinstance(picture, Path):
        return [str(name), Pictures([picture]).digest(0)]
    try:
        state = picture.stat()
    except OSError:
        return [str(picture), None]
    return [str(picture), state.st_size, state.st_mtime_ns]


def score_table(
    systems: Mapping[str, Any] | Sequence[str | Path],
    prompts: str | Path | Sequence[str] | Mapping[str, Any] | None = None,
    judges: Sequence[str | Scorer] | Mapping[str, Scorer] = (),
    *,
    categories: Sequence[str] | None = None,
    column: str | None = None,
    n_per_prompt: int | None = None,
    batch_size: int = BATCH,
    cache: CacheLike = None,
    progress: bool | Tell | None = None,
) -> pd.DataFrame:
    """One row per picture, one column per judge; NaN where a picture could not be read.

    Args:
        systems: name -> pictures: a folder, a data set, or whatever judges take. Folders in a list are named by the
            ends of their paths.
        prompts: a list with one for each picture of every system; or where a folder's prompts are, as
            ``pictures_with_prompts`` takes it (None: listed in the folder, beside the pictures or inside them); or a mapping from
            system to either.
        judges: names, judges, or a mapping from the name of a column to a judge.
        categories: one for each picture of every system; taken from the file of prompts if not given.
        column: where that file has its prompts.
        n_per_prompt: how many pictures in a row each of its prompts has, where it does not name the pictures.
        batch_size, cache, progress: as ``Judge.score`` takes them.

    ``table.attrs`` holds, under ``judges``, which way each is better and how sharp it is, and under ``provenance`` what its
    numbers rest on.

    Raises:
        UserError: no such folder, prompts that do not fit the pictures.
        JudgeError: an unknown judge, missing weights, judges that do not go into one table.
    """
    from reward_models._scoring import check_judges

    panel = reward_models.panel_of(judges)
    check_judges(panel.values())
    how = {"categories": categories, "column": column, "n_per_prompt": n_per_prompt, "required": needs_prompts(panel)}
    sheet = sheet_of(systems, prompts, **how)
    return score_sheet(sheet, panel, batch_size=batch_size, cache=cache, progress=progress)


def needs_prompts(panel: Mapping[str, Scorer]) -> bool:
    """Whether any judge reads prompts."""
    return any(judge.info.needs_prompt for judge in panel.values())


# ------------------------------------------------------------------------------------------------------------------ input


def sheet_of(
    systems: Mapping[str, Any] | Sequence[str | Path],
    prompts: Any = None,
    *,
    categories: Sequence[str] | None = None,
    column: str | None = None,
    image_column: str | None = None,
    split: str = "train",
    required: bool = True,
    n_per_prompt: int | None = None,
    prompt: str | None = None,
) -> Sheet:
    """The pictures with their prompts; arguments as ``score_table``. ``image_column`` and ``split`` are for data sets; ``prompt``
    is one for all pictures, whatever else is known of them.

    Raises:
        UserError: see ``score_table``.
    """
    rows: list[dict[str, Any]] = []
    pictures: list[Any] = []
    for system, where in named_systems(systems).items():
        mine = prompts[system] if isinstance(prompts, Mapping) else prompts
        found = list(_found(where, mine, column, image_column, split, required and prompt is None, n_per_prompt))
        found = found if prompt is None else [{**one, "prompt": prompt} for one in found]
        if categories is not None and len(categories) != len(found):
            raise UserError(f"The system {system!r} has {len(found)} pictures and {len(categories)} categories; each needs one.")
        for i, one in enumerate(found):
            category = categories[i] if categories is not None else one.get("category")
            _check_prompt(one)
            known = {"prompt": one["prompt"], "category": _writable(category), "seed": one.get("seed")}
            rows.append({"system": _writable(system), "picture": _writable(one["name"]), **known})
            pictures.append(one["picture"])
    numbers = [dict(zip(("prompt_id", "sample"), pair, strict=True)) for pair in numbered(rows)]
    return Sheet(tuple(row | more for row, more in zip(rows, numbers, strict=True)), tuple(pictures))


def _check_prompt(one: Mapping[str, Any]) -> None:
    name = one["name"] if isinstance(one["name"], str) else f"picture {one['name']}"
    try:
        check_text(one["prompt"] or "", f"the prompt of {_writable(name)}")
    except JudgeError as error:
        raise UserError(f"{error}.") from error


def _writable(name: Any) -> Any:
    """Names of files may hold bytes that are no text, and no table can hold: those are spelt out, as ``\\udcff``."""
    return name.encode("utf-8", "backslashreplace").decode() if isinstance(name, str) else name


def named_systems(systems: Any) -> dict[str, Any]:
    """Name -> pictures; folders in a list have their own names, or as much of their paths as makes these unique."""
    if isinstance(systems, Mapping):
        named = dict(systems)
    else:
        places = [systems] if isinstance(systems, str | Path) else list(systems)
        if not all(isinstance(place, str | Path) for place in places):
            raise UserError("Systems in a list are folders; other pictures need a name: {'base': pictures}.")
        named = dict(zip(_short_names([Path(place) for place in places]), places, strict=True))
    if not named:
        raise UserError("There is nothing to score: no folder and no pictures were given.")
    return named


def _short_names(places: Sequence[Path]) -> list[str]:
    whole = [place.expanduser().absolute() for place in places]
    for depth in range(1, max(len(p.parts) for p in whole) + 1 if whole else 1):
        names = ["/".join(p.parts[-depth:]) for p in whole]
        if len(set(names)) == len(names):
            return names
    raise (
        UserError(f"The folder {places[0]} is given twice; every system has one of its own.")
        if whole
        else UserError("No folder.")
    )


def _found(
    where: Any, prompts: Any, column: str | None, image_column: str | None, split: str, required: bool, each: int | None
) -> Iterator[dict[str, Any]]:
    """Picture by picture: ``name``, ``picture``, ``prompt``, and what else is known."""
    listed = prompts is not None and not isinstance(prompts, str | Path)
    if not isinstance(where, str | Path):
        return _with_list(Pictures(where).items, prompts, required)
    place = Path(where).expanduser()
    if place.is_dir() and _has_pictures(place):
        _warn_of_subfolders(place)
        if listed:
            return _with_list(list_folder(place), prompts, required)
        return _in_folder(place, prompts, column, required, each)
    if place.is_dir() and not any(place.iterdir()):
        raise UserError(f"The folder {place} is empty; there is nothing to score.")
    if listed:
        raise UserError(f"{where} is a data set and has prompts of its own; a list of prompts goes with a folder.")
    return _in_data_set(where, split, image_column, column or (str(prompts) if prompts else None), required)


def _has_pictures(folder: Path) -> bool:
    try:
        return bool(list_folder(folder))
    except JudgeError:
        return False


def _warn_of_subfolders(folder: Path) -> None:
    places = ((Path(place), files) for place, _, files in os.walk(folder))
    below = [str(place) for place, files in places if place != folder and not place.name.startswith(".") and _any_picture(files)]
    if below:
        some = ", ".join(below[:NAMED]) + (", ..." if len(below) > NAMED else "")
        warnings.warn(f"{folder} has subfolders with pictures, which are not scored ({some}); name each by itself.", stacklevel=4)


def _any_picture(names: Sequence[str]) -> bool:
    return any(Path(name).suffix.lower() in ENDINGS for name in names)


def _with_list(pictures: Sequence[Any], prompts: Any, required: bool) -> Iterator[dict[str, Any]]:
    if isinstance(prompts, str | Path):
        raise UserError(f"Pictures that are not in a folder need a list of prompts; got {str(prompts)!r}.")
    if prompts is None and required:
        raise UserError(f"A judge reads prompts, and there are none for {len(pictures)} pictures.")
    texts = [""] * len(pictures) if prompts is None else list(prompts)
    if len(texts) != len(pictures):
        raise UserError(f"There are {len(pictures)} pictures and {len(texts)} prompts; each picture needs one.")
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        yield {"name": str(picture) if isinstance(picture, Path) else i, "picture": picture, "prompt": text}


def _in_folder(folder: Path, prompts: Any, column: str | None, required: bool, each: int | None) -> Iterator[dict[str, Any]]:
    for one in pictures_with_prompts(folder, prompts, column, required=required, n_per_prompt=each):
        yield {
            "name": str(one.path),
            "picture": one.path,
            "prompt": one.prompt,
            "category": one.category,
            "seed": one.seed,
        }


def _in_data_set(where: Any, split: str, image: str | None, column: str | None, required: bool) -> Iterator[dict[str, Any]]:
    pictures, texts = prompts_and_pictures_of_dataset(where, split, image, column, required=required)
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        yield {"name": str(picture) if isinstance(picture, Path) else i, "picture": picture, "prompt": text}


# ---------------------------------------------------------------------------------------------------------------- scoring


def score_sheet(
    sheet: Sheet,
    panel: Mapping[str, Scorer],
    *,
    journal: ScoreJournal | None = None,
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
    batch_size: int = BATCH,
    cache: CacheLike = None,
    progress: bool | Tell | None = None,
) -> pd.DataFrame | None:
    """The table; with a journal, of what it holds and what is missing there.

    ``share`` (r, n): this process takes every n-th batch from the r-th on and leaves its scores in the journal; the first makes
    the table from all journals, and the others return None. ``wait`` returns when all processes have come to it.
    """
    parts = list(dict.fromkeys(part for judge in panel.values() for part in judge.parts))
    pictures = Pictures(list(sheet.pictures))
    book = _Book(len(sheet), len(parts))
    batches = [list(range(i, min(i + batch_size, len(sheet)))) for i in range(0, len(sheet), batch_size)]
    done = journal.begin(_purpose(sheet, parts, batch_size), share[0]) if journal else {}
    wait()  # before any writes: all have to see the same batches done, or they would share out different ones
    todo = [k for k in range(len(batches)) if k not in done][share[0] :: share[1]]
    for k, scores, broken in _batches(parts, pictures, sheet, [batches[i] for i in todo], todo, batch_size, cache, progress):
        if journal:
            journal.add(k, scores, broken)
        else:
            book.enter(batches[k], scores, broken)
    wait()
    if share[0] != 0:
        return None
    if journal:
        written = journal.read()
        assert len(written) == len(batches), f"{len(batches) - len(written)} batches were scored by nobody"
        for k, (scores, broken) in written.items():
            book.enter(batches[k], scores, broken)
    pictures.broken = book.broken
    pictures.warn()
    columns = {name: judge.combine([book.of(parts.index(part)) for part in judge.parts]) for name, judge in panel.items()}
    return _frame(sheet, panel, {name: column.numpy() for name, column in columns.items()}, len(book.broken))


def _purpose(sheet: Sheet, parts: Sequence[Any], batch_size: int) -> str:
    """A digest of everything that the scores in a journal depend on."""
    judges = [part.fingerprint if part.says_what_it_is else judge_digest(part) for part in parts]
    return digest_of([sheet.fingerprint(), judges, batch_size])


def _batches(
    parts: Sequence[Any],
    pictures: Pictures,
    sheet: Sheet,
    batches: Sequence[Sequence[int]],
    names: Sequence[int],
    batch_size: int,
    cache: CacheLike,
    progress: bool | Tell | None,
) -> Iterator[tuple[int, list[list[float]], dict[int, str]]]:
    """Batch by batch its name, the scores of each part, and the pictures that could not be read."""
    from reward_models._scoring import stream

    numbers = [i for batch in batches for i in batch]
    prompts = [sheet.prompts] * len(parts)
    how = {"batch_size": batch_size, "cache": cache, "progress": progress}
    for name, (batch, scores) in zip(names, stream(parts, pictures, prompts, numbers, **how), strict=True):
        broken = {i: pictures.broken[i] for i in batch if i in pictures.broken}
        yield name, [column.tolist() for column in scores], broken


class _Book:
    """Scores [N] of each part, and the pictures that could not be read."""

    def __init__(self, pictures: int, parts: int) -> None:
        import torch

        self._scores = torch.full((parts, pictures), float("nan"))
        self.broken: dict[int, str] = {}

    def enter(self, batch: Sequence[int], scores: Sequence[Sequence[float]], broken: Mapping[int, str]) -> None:
        import torch

        self._scores[:, list(batch)] = torch.tensor(scores, dtype=torch.float32)
        self.broken.update(broken)

    def of(self, part: int) -> Tensor:
        return self._scores[part]


def _frame(sheet: Sheet, panel: Mapping[str, Scorer], scores: Mapping[str, np.ndarray], unreadable: int) -> pd.DataFrame:
    import pandas as pd

    table = pd.DataFrame(list(sheet.rows), columns=list(KEYS))
    if table["picture"].map(type).nunique() > 1:  # a column of a file is of one type
        table["picture"] = table["picture"].astype(str)
    seeds = [row["seed"] for row in sheet.rows]
    # some programs draw seeds below 2**64; frames would make floats of them where a picture has none
    table["seed"] = pd.array(seeds, dtype="UInt64" if max((s or 0 for s in seeds), default=0) >= 2**63 else "Int64")
    for name, values in scores.items():
        if name in KEYS:
            raise UserError(f"A judge cannot be called {name!r}: the table has a column of that name.")
        table[name] = values
    table.attrs = {
        "judges": {name: _facts(judge) for name, judge in panel.items()},
        "provenance": {name: provenance_of(judge) for name, judge in panel.items()},
        "unreadable": unreadable,
        "prompts": len(set(sheet.prompts)),
        "prompts_cut": {name: judge.n_cut(sorted(set(sheet.prompts))) for name, judge in panel.items()},
    }
    return table


def _facts(judge: Scorer) -> dict[str, Any]:
    info = judge.info
    return {
        "higher_is_better": info.higher_is_better,
        "sharpness": judge.sharpness,
        "description": info.description,
        "licence": info.licence,
    }


# ----------------------------------------------------------------------------------------------------------------- output


def check_output(path: str | Path, overwrite: bool) -> Path:
    """The path for the table. Raises UserError: an ending that is none of ``FORMATS``, or a file that is there already."""
    place = Path(path).expanduser()
    if place.suffix.lower() not in FORMATS:
        raise UserError(f"A table of scores ends in one of {', '.join(FORMATS)}; got {str(path)!r}.")
    return outputs.check_file(place, overwrite)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """The table, and beside it ``NAME.provenance.json`` with what its numbers rest on. Raises UserError: cannot be written."""
    buffer = io.BytesIO()
    if path.suffix.lower() == ".parquet":
        table.to_parquet(buffer, index=False)
    elif path.suffix.lower() == ".csv":
        texts = (cell for column in TEXTS for cell in table[column])
        table.to_csv(buffer, index=False, quoting=outputs.quoting(texts))
    else:
        table.to_json(buffer, orient="records", lines=True, force_ascii=False, double_precision=15)
    outputs.write_json(path.with_suffix(".provenance.json"), {**table.attrs, "versions": outputs.versions()})
    write_file(path, buffer.getvalue())


def read_table(path: str | Path) -> pd.DataFrame:
    """A table that ``write_table`` wrote. Raises UserError: there is none, or it is something else."""
    import pandas as pd

    place = Path(path).expanduser()
    readers = {".parquet": pd.read_parquet, ".csv": _read_csv, ".jsonl": _read_lines}
    if not place.is_file() or place.suffix.lower() not in readers:
        raise UserError(f"There is no table of scores {place}; it should be a file that ends in one of {', '.join(FORMATS)}.")
    table = readers[place.suffix.lower()](place)
    missing = [key for key in KEYS[:-1] if key not in table.columns]
    if missing:
        raise UserError(f"{place} is no table of scores: it has no column {', '.join(map(repr, missing))}.")
    beside = place.with_suffix(".provenance.json")
    if not table.attrs and beside.is_file():
        table.attrs = json.loads(beside.read_text(encoding="utf-8"))
    return table


def _read_csv(path: Path) -> pd.DataFrame:
    import pandas as pd

    columns = pd.read_csv(path, nrows=0).columns
    empty = {column: [""] if column in TEXTS else ["", "nan", "NaN"] for column in columns}
    return pd.read_csv(path, keep_default_na=False, na_values=empty, dtype=dict.fromkeys(TEXTS, str))


def _read_lines(path: Path) -> pd.DataFrame:
    import pandas as pd

    table = pd.read_json(path, lines=True, dtype=False)
    return table.astype({column: float for column in table.columns.difference(TEXTS) if table[column].isna().all()})
