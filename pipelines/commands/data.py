"""``diffalign data``: look at preference data before training on it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


HELP = "check preference data and show a contact sheet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="read everything; report counts, sizes, ties, duplicates and whatever cannot be read",
        description="Exit status 0 if the data can be used, 1 if more pairs (or single pictures) than the limit cannot.",
    )
    check.add_argument("path", metavar="PATH", help="data set: a file, a folder, an id on the Hugging Face hub, or tiny")
    check.add_argument("--split", default="train", help="split of the data set, where there are several (default: %(default)s)")
    check.add_argument(
        "--ties", choices=("keep", "drop"), default="keep", help="treatment of ties, pairs with label 1/2 (default: %(default)s)"
    )
    check.add_argument("--scores", metavar="JUDGE", help="judge whose scores are read, as `diffalign relabel` called it")
    check.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="ROLE=NAME",
        help="names of the data set's columns, by role: prompt=text chosen=image_a",
    )
    check.add_argument(
        "--max-unreadable",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="largest share of unusable pairs with which the exit status is 0 (default: %(default)s)",
    )
    check.add_argument("--sheet", type=Path, metavar="FILE.png", help="contact sheet of pairs or pictures to write")
    check.add_argument(
        "--pairs",
        type=int,
        default=12,
        metavar="N",
        help="number of pairs or pictures on the contact sheet (default: %(default)s)",
    )
    check.add_argument("--seed", type=int, default=0, help="random seed that chooses them (default: %(default)s)")
    check.add_argument("--json", type=Path, metavar="FILE", help="file for the whole report as JSON")
    check.add_argument("--overwrite", action="store_true", help="replace a contact sheet and a report that are there")


def run(args: argparse.Namespace) -> int:
    """0 if the data can be used, 1 if the share of rows that cannot exceeds the limit. Raises ``UserError``."""
    from diffalign.data.open import open_pairs
    from diffalign.data.validate import check, contact_sheet
    from diffalign.errors import UserError
    from pipelines import outputs
    from pipelines.progress import Bar
    from pipelines.tiny.shipped import pairs_called

    if args.pairs < 1:
        raise UserError(f"--pairs counts what the sheet shows, from 1; got {args.pairs}.")
    for file in filter(None, (args.sheet, args.json)):
        outputs.check_file(file, args.overwrite)
    columns = parse_columns(args.columns)
    table = open_pairs(pairs_called(args.path), split=args.split, ties=args.ties, columns=columns, scores=args.scores)
    with Bar(unit="picture") as bar:
        report = check(table, progress=bar.advance)
    print(report.to_text())
    if args.json:
        _write_json(args.json, report.to_dict())
    if args.sheet and report.usable:
        _write_sheet(args.sheet, contact_sheet(table, n=args.pairs, seed=args.seed))
    if report.unusable > args.max_unreadable * report.pairs:
        share = report.unusable / report.pairs
        found = f"{report.unusable} of {report.pairs} {report.kind} ({share:.2%})"
        print(f"\n{found} cannot be used; the limit is {args.max_unreadable:.2%}.")
        return 1
    return 0


def parse_columns(items: list[str]) -> dict[str, str]:
    """``["prompt=text", ...]``, or ``["prompt=text,chosen=a", ...]``, as a mapping. Raises ``UserError`` for anything else."""
    from diffalign.errors import UserError
    from pipelines.several import assignments

    pairs = assignments(items)
    for pair in pairs:
        role, sign, name = pair.partition("=")
        if not (role and sign and name):
            raise UserError(f"--columns: found {pair!r}; expected ROLE=NAME, as in prompt=text.")
    return dict(pair.split("=", 1) for pair in pairs)


def _write_json(path: Path, report: dict) -> None:
    import json

    _write(path, lambda: path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"))


def _write_sheet(path: Path, sheet: Image.Image) -> None:
    _write(path, lambda: sheet.save(path))
    print(f"\nContact sheet: {path}")


def _write(path: Path, write: Callable[[], object]) -> None:
    from diffalign.errors import UserError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written: {error}.") from error
