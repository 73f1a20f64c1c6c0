"""``diffalign score``: scores of folders of pictures by several judges, as a table."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

HELP = "score folders of pictures by any number of judges, into one table"
DESCRIPTION = (
    "Scores folders of pictures into one table, a row per picture and a column per judge. What is scored is kept: a run that was "
    "cut off goes on when the same command is given again. Several folders are several systems, and are compared at the end. "
    "On several devices: accelerate launch -m pipelines.cli score ..."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``diffalign score``."""
    from pipelines.judge_options import add_judge_options, add_scoring_options

    parser.description = DESCRIPTION
    parser.set_defaults(goes_on="The same command goes on where it stopped; with --overwrite it begins anew.")
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="folder of pictures, or a data set with pictures and prompts"
    )
    add_prompt_options(parser)
    add_judge_options(parser)
    parser.add_argument("--out", "--output", required=True, metavar="FILE", help="file for the table: .parquet, .csv or .jsonl")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="file for a plot of win rates with their intervals, where there are several folders",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE.md", help="file for the comparison as Markdown, where there are several folders"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there, and drop what an interrupted run left")
    add_scoring_options(parser)


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the prompts of pictures are."""
    from pipelines.prompts import FORMATS, NAMES
    from pipelines.sampling_options import whole

    parser.add_argument(
        "--prompts",
        metavar="WHERE",
        help=f"prompts: a {', '.join(FORMATS)} file, a list by name ({', '.join(NAMES)}), 'txt' for NAME.txt beside each "
        f"picture, or 'png' for what AUTOMATIC1111 or ComfyUI wrote into it (default: whichever of these the folder holds)",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="one prompt for all pictures")
    several = (
        "number of pictures in a row per prompt of a list that does not name them (default: one, or as the files' names say)"
    )
    parser.add_argument("--n-per-prompt", type=whole(1), metavar="K", help=several)
    parser.add_argument("--column", help="column of the prompts, where the file has several")
    parser.add_argument("--image-column", help="column of the pictures in a data set")
    parser.add_argument("--split", default="train", help="split of a data set (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Score, write the table and print the means; 0 when it is written."""
    from diffalign.errors import UserError
    from pipelines import outputs, scoring
    from pipelines.judge_options import judges_from, scoring_arguments
    from pipelines.progress import Bar
    from pipelines.score_journal import ScoreJournal
    from pipelines.shares import processes
    from reward_models.base import JudgeError

    if len(args.folders) == 1 and (args.plot or args.report):
        raise UserError("--plot and --report are of comparisons, and one folder has nothing to be compared with: name several.")
    share, wait, device = processes()
    out = scoring.check_output(args.out, args.overwrite)
    for file in filter(None, (args.plot, args.report)):
        outputs.check_file(file, args.overwrite)
    args.device = args.device or device
    journal = ScoreJournal(out)
    if args.overwrite and share[0] == 0:
        journal.remove()
    wait()  # or another process's new journal would be removed
    sheet = sheet_from(args)  # before weights are loaded, which takes its time
    panel = judges_from(args)
    if scoring.needs_prompts(panel) and args.prompt is None and not all(sheet.prompts):
        sheet = sheet_from(args, required=True)
    for line in told_pairing(sheet) if share[0] == 0 and args.prompt is None else []:
        print(line)
    try:
        with Bar(shown=share[0] == 0, unit="picture") as bar:
            tell = _told(bar)
            table = scoring.score_sheet(
                sheet, panel, journal=journal, share=share, wait=wait, progress=tell, **scoring_arguments(args)
            )
    except JudgeError as error:
        raise UserError(f"{error}.") from error
    if table is None:
        return 0
    scoring.write_table(table, out)
    journal.remove()
    print(_told_of(table, args))
    for name, cut in table.attrs["prompts_cut"].items():
        if cut:
            print(f"{name} does not read {cut} of {table.attrs['prompts']} prompts to their end: they are too long for it.")
    print(f"\n{len(table)} pictures: {out}")
    return 0


def sheet_from(args: argparse.Namespace, required: bool = False) -> Any:
    """The pictures and prompts that the options name; ``required``: a picture without prompt is an error."""
    from diffalign.errors import UserError
    from pipelines.scoring import sheet_of

    if args.prompt is not None and args.prompts:
        raise UserError("--prompt is one prompt for all pictures, --prompts says where each has its own; give one of them.")
    options = {"column": args.column, "image_column": args.image_column, "split": args.split, "required": required}
    return sheet_of(args.folders, args.prompts, n_per_prompt=args.n_per_prompt, prompt=args.prompt, **options)


def told_pairing(sheet: Any) -> list[str]:
    """A line for each system that has several pictures of every prompt: which ones were taken together."""
    lines = []
    for system in dict.fromkeys(row["system"] for row in sheet.rows):
        rows = [row for row in sheet.rows if row["system"] == system and row["prompt"]]
        names: dict[str, list[str]] = {}
        for row in rows:
            names.setdefault(row["prompt"], []).append(Path(str(row["picture"])).name)
        counts = {len(of_one) for of_one in names.values()}
        if counts not in ({1}, set()):
            many = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(min(counts))
            prompt, first = next(iter(names.items()))
            of = f"each of {len(names)} prompts" if len(names) > 1 else "one prompt"
            lines.append(f"{system}: {many} pictures of {of}; {', '.join(first[:8])}: {prompt!r}")
    return lines


def _told(bar: Any) -> Callable[[int, int], None]:
    return lambda done, of: bar.advance("scoring", done, of)


def _told_of(table: pd.DataFrame, args: argparse.Namespace) -> str:
    """Means of one system, or the comparison of several."""
    if table["system"].nunique() == 1:
        return means(table)
    from diffalign.written_aside import write_file
    from pipelines.comparison import compare
    from pipelines.comparison_plot import as_png

    comparison = compare(table)
    if args.plot:
        write_file(args.plot, as_png(comparison.plot()))
    if args.report:
        write_file(args.report, comparison.to_markdown())
    return comparison.to_markdown()


def means(table: pd.DataFrame) -> str:
    """A line for each judge: mean with its interval over prompts, lowest, highest, and how many could not be judged."""
    from diffalign.evaluate import mean_with_interval
    from pipelines.text_tables import interval, table_lines

    rows = []
    for judge in table.attrs["judges"]:
        scores = table[judge].astype(float)
        found = mean_with_interval(scores.to_numpy(), groups=table["prompt_id"].tolist())
        ends = interval(found.low, found.high, "{:.5g}".format)
        rows.append([judge, f"{found.mean:.5g}", ends, f"{scores.min():.5g}", f"{scores.max():.5g}", str(found.excluded)])
    return "\n".join(table_lines(["judge", "mean", "95 % interval", "lowest", "highest", "not judged"], rows))
