"""The prompts of pictures: from a file that lists them, a text beside each picture, or the metadata inside it.

    for picture in pictures_with_prompts("folder"):
        print(picture.path, picture.prompt)

A wrong pairing gives believable scores that mean nothing, so nothing is paired by a guess: pictures without a prompt, numbers
that do not match and rows that contradict each other are errors.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.errors import UserError
from pipelines.prompts import PROMPT_COLUMNS, Prompt, read_prompts, read_text
from pipelines.written_in_pictures import Made, as_name, made_from, whole

if TYPE_CHECKING:
    from reward_models._pictures import NoPicture

BESIDE, INSIDE = "txt", "png"
"""Names of the sources that are no file: a text beside each picture, the metadata inside each picture."""
LISTS = (
    "metadata.jsonl",
    "metadata.csv",
    "prompts.jsonl",
    "prompts.json",
    "prompts.csv",
    "prompts.tsv",
    "prompts.txt",
)
"""Files that are looked for among the pictures, the first first. ``diffalign generate`` writes ``metadata.jsonl``."""
NAME_COLUMNS = ("file_name", "filename", "file", "image", "path", "picture")
NUMBER_COLUMNS = ("index", "idx")
"""Name a picture only where every picture's name is a number; elsewhere such a column counts the rows."""
IMAGE_COLUMNS = ("image", "img", "picture", "file_name", "filename", "file", "path", "jpg", "jpeg", "png", "webp")
GRID, RECORD = "grid.png", "generation.json"
"""``diffalign generate`` lays a contact sheet beside its pictures, and this record with it."""
NAMED = 5
"""Pictures that a message names; it counts all."""


@dataclass(frozen=True)
class PromptedPicture:
    """A picture and its prompt; ``seed`` and ``metadata`` are whatever else is known of how it was made."""

    path: Path
    prompt: str
    category: str | None = None
    seed: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)


Found = dict[Path, PromptedPicture]


def pictures_with_prompts(
    folder: str | Path,
    prompts: str | Path | None = None,
    column: str | None = None,
    *,
    required: bool = True,
    n_per_prompt: int | None = None,
) -> list[PromptedPicture]:
    """The pictures of a folder (not of its subfolders), sorted by name, 2 before 10, each with its prompt.

    Args:
        prompts: a file or list as ``pipelines.prompts.read_prompts`` takes them; ``"txt"`` for ``NAME.txt`` beside each picture;
            ``"png"`` for what AUTOMATIC1111 or ComfyUI wrote into it (PNG text, or EXIF in other formats). None looks for a
            file of ``LISTS`` in the folder, then for texts beside the pictures, then inside the pictures: the first of these
            that there is for any picture is taken for all.
        column: where the file has its prompts; see ``read_prompts``.
        required: False allows pictures without a prompt, which is then ``""``: some judges need none.
        n_per_prompt: how many pictures in a row each prompt of a list has that does not name its pictures.

    Rows of a file name their picture in one of ``NAME_COLUMNS``: by path, name, stem, or number where the stem is one; a stem or
    number that several pictures have names none. In a file without such a column, and in a list that has a name, they belong to
    the pictures in order, the numbers in file names being counted as numbers. Several pictures in a row belong to one of several
    prompts only where that is said: by ``n_per_prompt``, by their names (``0a``, ``0b``, ``1a``, ``1b``), or by what
    ``diffalign generate`` wrote beside them.

    Raises:
        UserError: no pictures, pictures without a prompt, or prompts that do not fit the pictures.
    """
    place = Path(folder).expanduser()
    pictures = _pictures(place)
    if prompts is None:
        found, source = _whatever_there_is(place, pictures, column, required, n_per_prompt)
    elif prompts in (BESIDE, INSIDE):
        found, source = _SOURCES[prompts](pictures), _DESCRIPTIONS[prompts]
    else:
        found, source = _listed(place, pictures, prompts, column, n_per_prompt)
    missing = [picture.name for picture in pictures if picture not in found]
    if missing and required:
        raise UserError(f"{len(missing)} of {len(pictures)} pictures in {place} have no prompt {source}: {_some(missing)}.")
    return [found.get(picture) or PromptedPicture(picture, "") for picture in pictures]


def prompts_and_pictures_of_dataset(
    where: str | Path,
    split: str = "train",
    image_column: str | None = None,
    prompt_column: str | None = None,
    *,
    required: bool = True,
) -> tuple[list[Path | bytes | NoPicture], list[str]]:
    """The pictures of a data set, still encoded, and the prompt of each: lists of one length, as judges take them.

    ``where`` is a folder written by ``save_to_disk``, parquet or arrow (a file, or a folder of shards), a ``.jsonl``, ``.csv``
    or ``.tsv`` file with paths, a folder of pictures with ``metadata.jsonl`` or ``metadata.csv`` (``imagefolder``), or an id on
    the Hugging Face hub. Columns that are not named are the first of ``IMAGE_COLUMNS`` and of ``PROMPT_COLUMNS`` there are. A
    row without a picture is a ``NoPicture``, which judges score NaN and name. ``required`` False allows rows without a prompt.

    Raises:
        UserError: nothing that can be read, no such split or column, or rows without a prompt.
    """
    path = Path(where).expanduser()
    rows = _rows_of(str(path) if path.exists() else str(where), split)
    image = _column_of(rows, image_column, IMAGE_COLUMNS, "pictures")
    if not required and prompt_column is None and not _among(rows.columns, PROMPT_COLUMNS):
        prompts: list[Any] = [None] * len(rows)
    else:
        prompts = [prompt for (prompt,) in rows.cells([_column_of(rows, prompt_column, PROMPT_COLUMNS, "prompts")])]
    texts = [text.strip() if isinstance(text, str) else "" for text in prompts]
    missing = [rows.origin(i) for i, text in enumerate(texts) if not text]
    if missing and required:
        raise UserError(f"{len(missing)} of {len(rows)} rows of {rows.description} have no prompt: {_some(missing)}.")
    return [_picture_in(rows, i, image) for i in range(len(rows))], texts


# ------------------------------------------------------------------------------------------------------------- pictures


def _pictures(folder: Path) -> list[Path]:
    from reward_models._pictures import list_folder
    from reward_models.base import JudgeError

    if not folder.is_dir():
        raise UserError(f"{folder} is {'a file, not a folder' if folder.exists() else 'no folder'} of pictures.")
    try:
        found = list_folder(folder)
    except JudgeError as error:
        raise UserError(f"{error}.") from error
    return [p for p in found if p.name != GRID] if (folder / RECORD).is_file() else found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


# -------------------------------------------------------------------------------------------------------------- sources


def _whatever_there_is(
    folder: Path, pictures: Sequence[Path], column: str | None, required: bool, each: int | None
) -> tuple[Found, str]:
    """The first source there is, and how to call it."""
    if file := next((folder / name for name in LISTS if (folder / name).is_file()), None):
        try:
            return _listed(folder, pictures, file, column, each)
        except UserError as error:
            if required:
                raise
            warnings.warn(f"The pictures in {folder} are taken without prompts. {error}", stacklevel=3)
            return {}, ""
    for name, source in _SOURCES.items():
        found = source(pictures)
        if any(picture.prompt for picture in found.values()):
            return found, _DESCRIPTIONS[name]
    if required:
        raise UserError(
            f"The pictures in {folder} come without prompts. They can stand in a file in the folder ({', '.join(LISTS)}) or "
            f"elsewhere (--prompts FILE), in NAME.txt beside each picture (--prompts {BESIDE}), or in the pictures as "
            f"AUTOMATIC1111 and ComfyUI write them (--prompts {INSIDE}); or all pictures have one prompt (--prompt TEXT)."
        )
    return {}, ""


def _beside(pictures: Sequence[Path]) -> Found:
    files = {picture: picture.with_suffix(".txt") for picture in pictures}
    texts = {picture: read_text(file).strip() for picture, file in files.items() if file.is_file()}
    return {picture: PromptedPicture(picture, text) for picture, text in texts.items() if text}


def _inside(pictures: Sequence[Path]) -> Found:
    """What is written in the pictures. One that cannot be opened has the empty prompt: it gets no score, whatever it shows."""
    found: Found = {}
    for picture in pictures:
        made = made_from(picture)
        if made is None or made.prompt:
            made = made or Made("")
            found[picture] = PromptedPicture(picture, made.prompt, None, made.seed, made.metadata)
    return found


_SOURCES: dict[str, Callable[[Sequence[Path]], Found]] = {BESIDE: _beside, INSIDE: _inside}
_DESCRIPTIONS = {BESIDE: "in a NAME.txt beside them", INSIDE: "written in them (by AUTOMATIC1111 or ComfyUI)"}


# ---------------------------------------------------------------------------------------------------------------- lists


def _listed(folder: Path, pictures: Sequence[Path], where: str | Path, column: str | None, each: int | None) -> tuple[Found, str]:
    prompts = read_prompts(where, column)
    named = _naming_column(pictures, prompts)
    if named is None:
        return _in_order(folder, pictures, prompts, where, each), ""
    found = _by_name(pictures, prompts, named)
    others = "" if found else ", which names other files; without it the rows would be taken in order"
    source = f"in {where} (by its column {named!r}{others})"
    return {picture: _prompted(picture, prompt, named) for picture, prompt in found.items()}, source


def _by_name(pictures: Sequence[Path], prompts: Sequence[Prompt], named: str) -> dict[Path, Prompt]:
    rows = _Rows([(prompt.metadata.get(named), prompt) for prompt in prompts], pictures)
    return {picture: prompt for picture in pictures if (prompt := rows.of(picture))}


def _naming_column(pictures: Sequence[Path], prompts: Sequence[Prompt]) -> str | None:
    """The column by which rows name their pictures, if there is one."""
    columns = dict.fromkeys(c for prompt in prompts for c, value in prompt.metadata.items() if as_name(value))
    numbered = all(picture.stem.isdecimal() for picture in pictures)
    return _among(columns, (*NAME_COLUMNS, *(NUMBER_COLUMNS if numbered else ())))


def _among(columns: Iterable[str], names: Sequence[str]) -> str | None:
    lower = {str(c).lower(): c for c in columns}
    return next((lower[name] for name in names if name in lower), None)


def _prompted(picture: Path, prompt: Prompt, named: str | None = None) -> PromptedPicture:
    seed = whole(next((value for c, value in prompt.metadata.items() if c.lower() == "seed"), None))
    rest = {c: value for c, value in prompt.metadata.items() if c != named and c.lower() != "seed"}
    return PromptedPicture(picture, prompt.text, prompt.category, seed, rest)


class _Rows:
    """Rows by the picture they name: by the end of its path, else by its stem, else by its number.

    A stem or a number names a picture only where it is no other's: ``a.png`` says nothing of ``a.jpg`` beside it.
    """

    def __init__(self, rows: Iterable[tuple[Any, Prompt]], pictures: Sequence[Path]) -> None:
        from reward_models._pictures import ENDINGS

        self._with_stem = Counter(picture.stem for picture in pictures)
        self._with_number = Counter(_number(picture) for picture in pictures)
        self._names: dict[str, list[tuple[tuple[str, ...], Prompt]]] = {}
        self._stems: dict[str, list[tuple[tuple[str, ...], Prompt]]] = {}
        self._numbers: dict[int, list[tuple[tuple[str, ...], Prompt]]] = {}
        for value, prompt in rows:
            parts = tuple(part for part in as_name(value).replace("\\", "/").split("/") if part not in ("", "."))
            if not parts:
                continue
            stem, dot, ending = parts[-1].rpartition(".")
            stem = stem if dot + ending.lower() in ENDINGS else parts[-1]
            self._names.setdefault(parts[-1], []).append((parts, prompt))
            self._stems.setdefault(stem, []).append((parts, prompt))
            if stem.isdecimal():
                self._numbers.setdefault(int(stem), []).append((parts, prompt))

    def of(self, picture: Path) -> Prompt | None:
        """The prompt of ``picture``, None if no row names it.

        Raises:
            UserError: rows that name it equally well have different prompts.
        """
        rows = self._names.get(picture.name) or []
        if not rows and self._with_stem[picture.stem] == 1:
            rows = self._stems.get(picture.stem) or []
        if not rows and self._with_number[_number(picture)] == 1:
            rows = self._numbers.get(_number(picture)) or []
        if not rows:
            return None
        # of base/00000.png and tuned/00000.png, the one that ends as the picture's own path does
        folders = picture.absolute().parent.parts
        fits = [_common_end(parts[:-1], folders) for parts, _ in rows]
        best = [prompt for (_, prompt), fit in zip(rows, fits, strict=True) if fit == max(fits)]
        if other := next((prompt for prompt in best if prompt.text != best[0].text), None):
            raise UserError(
                f"Two rows name the picture {picture.name} and have different prompts: {best[0].origin} ({best[0].text!r}) and "
                f"{other.origin} ({other.text!r})."
            )
        return best[0]


def _number(picture: Path) -> int:
    """The number that is the picture's name; -1, which no row has, if it is none."""
    return int(picture.stem) if picture.stem.isdecimal() else -1


def _common_end(one: Sequence[str], other: Sequence[str]) -> int:
    count = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        count += 1
    return count


def _in_order(folder: Path, pictures: Sequence[Path], prompts: Sequence[Prompt], where: str | Path, asked: int | None) -> Found:
    """Pictures in order with a list's prompts: ``asked`` in a row per prompt, by default one or the number known to be right."""
    each, left = divmod(len(pictures), len(prompts))
    has = f"{folder} has {len(pictures)} pictures and {where} has {len(prompts)} prompts"
    if left or not each or (asked or each) != each:
        wanted = "as many pictures as prompts" if asked in (None, 1) else f"{asked} times as many pictures as prompts"
        raise UserError(
            f"{has}. As its rows do not name their pictures (in a column {', '.join(NAME_COLUMNS[:3])} or the like), there "
            f"should be {wanted}{', or with --n-per-prompt K just K times as many' if asked is None else ''}."
        )
    found = {picture: _prompted(picture, prompts[i // each]) for i, picture in enumerate(pictures)}
    alone = len(prompts) == 1  # which leaves no choice
    if each > 1 and asked is None and not (alone or _in_groups(pictures, each) or _on_record(folder, pictures, each)):
        raise UserError(
            f"{has}, which do not name their pictures. If these are {each} pictures in a row for each prompt ("
            f"{_some([picture.name for picture in pictures[:each]])} of {prompts[0].text!r}), say so: --n-per-prompt {each}."
        )
    return found


_SAMPLE = re.compile(r"([\W_]*\d+|[\W_]+[a-zA-Z]|(?<=\d)[a-zA-Z])$")
"""The end of a name by which pictures of one prompt differ: 0a and 0b, 00001_0 and 00001_1."""


def _in_groups(pictures: Sequence[Path], each: int) -> bool:
    """Whether the pictures' names form groups of exactly ``each``, which differ in their last number or letter."""
    groups = [_SAMPLE.sub("", picture.stem) for picture in pictures]
    return all(groups) and groups == [name for name in dict.fromkeys(groups) for _ in range(each)]


def _on_record(folder: Path, pictures: Sequence[Path], each: int) -> bool:
    """Whether a list in the folder that names its pictures has one prompt for every ``each`` of them in a row."""
    file = folder / LISTS[0]
    if not file.is_file():
        return False
    prompts = read_prompts(file)
    named = _naming_column(pictures, prompts)
    known = _by_name(pictures, prompts, named) if named else {}
    texts = [known[picture].text if picture in known else None for picture in pictures]
    return None not in texts and all(len(set(texts[i : i + each])) == 1 for i in range(0, len(texts), each))


# ------------------------------------------------------------------------------------------------------------ data sets


def _rows_of(place: str, split: str) -> Any:
    """Rows in one of the forms that ``diffalign.data`` reads, or a folder of pictures as ``datasets`` reads it."""
    from diffalign.data.readers import arrow, hub, listing, parquet, saved

    known = (saved, parquet, arrow, listing, hub)
    if reader := next((reader for reader in known if reader.claims(place)), None):
        return reader.open_rows(place, split)
    if Path(place).is_dir():
        return _image_folder(place, split)
    forms = "; ".join(["a folder written by save_to_disk", "parquet", "arrow", "a .jsonl, .csv or .tsv file", "imagefolder"])
    what = "is in none of the known forms" if Path(place).exists() else f"is no file or folder (seen from {Path.cwd()})"
    raise UserError(f"{place} {what}. A data set of pictures can be: {forms}; {hub.FORM}.")


def _image_folder(place: str, split: str) -> Any:
    import datasets

    from diffalign.data.readers._dataset import DatasetRows

    try:
        found = datasets.load_dataset("imagefolder", data_dir=place, drop_labels=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{place} cannot be read as a folder of pictures (imagefolder): {error}") from error
    if split not in found:
        raise UserError(f"{place} has no split {split!r}; it has: {', '.join(found)}.")
    return DatasetRows(found[split], f"{place}[{split}]", Path(place))


def _column_of(rows: Any, asked: str | None, names: Sequence[str], what: str) -> str:
    has = ", ".join(rows.columns) or "none"
    if asked is not None and asked not in rows.columns:
        raise UserError(f"{rows.description} has no column {asked!r}; it has: {has}.")
    found = asked or _among(rows.columns, names)
    if found is None:
        raise UserError(f"{rows.description} has no column of {what} ({', '.join(names)}); it has: {has}. Name one of them.")
    return found


def _picture_in(rows: Any, i: int, column: str) -> Path | bytes | NoPicture:
    from diffalign.data.pairs import RowProblem, image_from
    from reward_models._pictures import NoPicture

    try:
        source = image_from(rows.row(i, (column,))[column], rows.base)
    except RowProblem as problem:
        return NoPicture(problem.origin, problem.reason)
    except ValueError as error:
        return NoPicture(f"{rows.origin(i)}, {column}", str(error))
    return source.path if source.data is None else source.data
