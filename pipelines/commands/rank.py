"""``diffalign rank``: the pictures of a folder in order, best first."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.commands.score import add_prompt_options

if TYPE_CHECKING:
    import pandas as pd

HELP = "put the pictures of a folder in order, best first, or find the best of each prompt"
SHOWN = 24
"""Pictures on the sheet."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``diffalign rank``."""
    from pipelines.judge_options import add_judge_options, add_scoring_options
    from pipelines.sampling_options import whole

    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="folder of pictures, or a data set with pictures and prompts"
    )
    add_prompt_options(parser)
    add_judge_options(parser)
    parser.add_argument(
        "--best", type=whole(1), metavar="K", help="number of pictures to show, the best only; with --per-prompt, of each prompt"
    )
    parser.add_argument("--per-prompt", action="store_true", help="rank the pictures of each prompt by themselves")
    parser.add_argument("--out", "--output", metavar="FILE", help="file for the ranking: .parquet, .csv or .jsonl")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help=f"contact sheet to write of the first {SHOWN} pictures")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    add_scoring_options(parser)


def run(args: argparse.Namespace) -> int:
    """Rank, print, write; 0 when done. Several judges rank by the mean of their ranks."""
    from functools import partial

    from diffalign.errors import UserError
    from pipelines import outputs, scoring
    from pipelines.commands.score import sheet_from
    from pipelines.judge_options import judges_from, scoring_arguments
    from pipelines.progress import Bar
    from reward_models.base import JudgeError

    out = scoring.check_output(args.out, args.overwrite) if args.out else None
    if args.sheet and args.sheet.suffix.lower() != ".png":
        raise UserError(f"--sheet is a picture, a .png; got {args.sheet}.")
    if args.sheet:
        outputs.check_file(args.sheet, args.overwrite)
    sheet = sheet_from(args)
    panel = judges_from(args)
    if scoring.needs_prompts(panel) and args.prompt is None and not all(sheet.prompts):
        sheet = sheet_from(args, required=True)
    try:
        with Bar(unit="picture") as bar:
            advance = partial(bar.advance, "scoring")
            table = scoring.score_sheet(sheet, panel, progress=advance, **scoring_arguments(args))
    except JudgeError as error:
        raise UserError(f"{error}.") from error
    ranked = ranked_table(table, list(panel), per_prompt=args.per_prompt, best=args.best)
    print(_text(ranked, list(panel)))
    if out:
        scoring.write_table(ranked, out)
    if args.sheet:
        _write_sheet(args.sheet, ranked, sheet, list(panel))
    return 0


def ranked_table(table: pd.DataFrame, judges: list[str], per_prompt: bool = False, best: int | None = None) -> pd.DataFrame:
    """The rows in order with a column ``rank`` from 1; equal ones share a rank, what could not be judged comes last without one.

    By several judges a picture's place is the mean of its places; a picture that one could not judge has none.
    """
    facts, groups = table.attrs["judges"], table["prompt_id"] if per_prompt else table["prompt_id"] * 0
    places = [
        table[judge].groupby(groups).rank(ascending=not facts[judge]["higher_is_better"], method="average", na_option="keep")
        for judge in judges
    ]
    mean = sum(places) / len(places)
    ranked = table.assign(rank=mean.groupby(groups).rank(method="min").astype("Int64"))
    ranked = ranked.sort_values(["prompt_id", "rank"] if per_prompt else ["rank"], kind="stable", na_position="last")
    ranked.attrs = table.attrs
    if best is None:
        return ranked
    return ranked[ranked["rank"].notna()].groupby(groups.loc[ranked.index]).head(best)


def _text(ranked: pd.DataFrame, judges: list[str]) -> str:
    from pipelines.text_tables import table_lines

    many = ranked["prompt"].nunique() > 1
    rows = [
        ["-" if row["rank"] is None else str(row["rank"]), *(f"{row[judge]:.5g}" for judge in judges), str(row["picture"])]
        + ([row["prompt"]] if many else [])
        for row in ranked.assign(rank=ranked["rank"].astype(object).where(ranked["rank"].notna(), None)).to_dict("records")
    ]
    return "\n".join(table_lines(["rank", *judges, "picture", *(["prompt"] if many else [])], rows))


def _write_sheet(path: Path, ranked: pd.DataFrame, sheet: Any, judges: list[str]) -> None:
    from pipelines import grids, outputs
    from reward_models._pictures import Pictures

    first = ranked[ranked["rank"].notna()].iloc[:SHOWN]
    pictures = Pictures(list(sheet.pictures))
    labels = [f"{row['rank']}.  {row[judges[0]]:.4g}  {row['prompt']}" for row in first.to_dict("records")]
    images = [pictures[i].convert("RGB") for i in first.index]
    outputs.write_png(
        path, grids.grid(images, columns=min(6, len(images)), captions=labels, header=f"by {', '.join(judges)}, best first")
    )
    print(f"\nSheet: {path}")
