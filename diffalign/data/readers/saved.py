"""A folder written by ``datasets``' ``save_to_disk``: one data set, or several splits."""

from __future__ import annotations

from pathlib import Path

from diffalign.data.readers._dataset import DatasetRows
from diffalign.errors import UserError

FORM = "a folder written by datasets' save_to_disk"


def claims(where: str) -> bool:
    return any((Path(where) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def open_rows(where: str, split: str) -> DatasetRows:
    import datasets

    try:
        found = datasets.load_from_disk(where)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{where} looks like a data set saved by datasets, but cannot be loaded: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise UserError(f"{where} has no split {split!r}; it has: {', '.join(found)}.")
        return DatasetRows(found[split], f"{where}[{split}]", Path(where))
    return DatasetRows(found, where, Path(where))
