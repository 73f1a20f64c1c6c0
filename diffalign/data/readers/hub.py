"""A data set on the Hugging Face hub, by its id."""

from __future__ import annotations

import re
from pathlib import Path

from diffalign.data.readers._dataset import DatasetRows
from diffalign.errors import UserError

FORM = "the id of a data set on the Hugging Face hub (owner/name)"
FILE_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".zip")


def claims(where: str) -> bool:
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", where) is not None
    return named and not Path(where).exists() and Path(where).suffix.lower() not in FILE_SUFFIXES


def open_rows(where: str, split: str) -> DatasetRows:
    """Downloads on first use, to the cache of ``datasets``."""
    import datasets

    try:
        found = datasets.load_dataset(where, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"There is no file or folder {where} (seen from {Path.cwd()}), and as the id of a data set on the Hugging Face hub "
            f"it could not be loaded (split {split!r}): {error}. Check the spelling, or the connection; a copy on disk "
            "(parquet, arrow, save_to_disk) works without one."
        ) from error
    return DatasetRows(found, f"{where}[{split}]", None)
