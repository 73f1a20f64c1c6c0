"""``diffalign relabel``: judges score preference data, to find where they disagree with people and to clean or soften labels."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffalign.data.table import PairTable

HELP = "judge preference data again: scores beside the human's labels, cleaned if asked; or the best pictures by themselves"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``diffalign relabel``."""
    from pipelines.judge_options import add_judge_options, add_scoring_options
    from pipelines.sampling_options import whole

    parser.description = "The human's labels stay as they are unless --labels says otherwise. The first of --judges decides."
    parser.add_argument("data", metavar="DATA", help="data set: a file, a folder, an id on the Hugging Face hub, or tiny")
    parser.add_argument(
        "--out",
        "--output",
        required=True,
        metavar="FILE",
        help="output file: .parquet with the pictures inside, or .jsonl, .csv or .tsv with their paths",
    )
    parser.add_argument("--split", default="train", help="split of the data set, where there are several (default: %(default)s)")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="ROLE=NAME",
        help="names of the data set's columns, by role: prompt=text chosen=image_a",
    )
    add_judge_options(parser)
    parser.add_argument("--drop-conflicts", action="store_true", help="leave out pairs on which the first judge disagrees")
    parser.add_argument(
        "--min-margin",
        type=float,
        default=0.0,
        metavar="X",
        help="leave out pairs whose scores by the first judge are closer than X",
    )
    parser.add_argument(
        "--labels",
        choices=("human", "flip", "soft"),
        default="human",
        help="labels to write: human (as they are, the default), flip (reversed where the first judge disagrees) or soft (the "
        "first judge's own probability); the human's stay in the column human_label",
    )
    parser.add_argument(
        "--top",
        type=whole(1),
        metavar="K",
        help="write the K best pictures by a judge instead, a row for each with its prompt and scores; labels are not used",
    )
    parser.add_argument("--by", metavar="JUDGE", help="judge among --judges that decides what --top keeps (default: the first)")
    add_scoring_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")


def run(args: argparse.Namespace) -> int:
    """Judge, write and print the report; 0 when it is written."""
    from diffalign.data.open import open_pairs
    from pipelines.commands.data import parse_columns
    from pipelines.judge_options import judges_from, parse_judges, scoring_arguments
    from pipelines.progress import Bar
    from pipelines.relabel import check_request, relabel
    from pipelines.tiny.shipped import pairs_called

    check_options(args)
    table = open_pairs(pairs_called(args.data), split=args.split, columns=parse_columns(args.columns))
    if args.top is not None:
        return _write_top(args, table)
    wishes = {"labels": args.labels, "overwrite": args.overwrite}
    check_request(table, list(parse_judges(args.judges)), args.out, data=args.data, **wishes)
    wishes |= {"drop_conflicts": args.drop_conflicts, "min_margin": args.min_margin}
    judges = judges_from(args)
    with Bar(unit="pair") as bar:
        report = relabel(table, judges, args.out, **wishes, **scoring_arguments(args), progress=bar.advance)
    print(report.to_text())
    return 0


def check_options(args: argparse.Namespace) -> None:
    """Raises ``UserError`` for options that make no sense together."""
    from diffalign.errors import UserError

    if args.top is None and args.by is not None:
        raise UserError("--by says which judge decides what --top keeps; add --top K, or leave --by out.")
    of_pairs = {"--labels": args.labels != "human", "--drop-conflicts": args.drop_conflicts, "--min-margin": args.min_margin != 0}
    given = [name for name, said in of_pairs.items() if said]
    if args.top is not None and given:
        raise UserError(
            f"--top writes single pictures, whatever the labels say, and {', '.join(given)} is about pairs; got both."
        )


def _write_top(args: argparse.Namespace, table: PairTable) -> int:
    from pipelines.judge_options import judges_from, parse_judges, scoring_arguments
    from pipelines.progress import Bar
    from pipelines.relabel_top import check_top, write_best

    wishes = {"by": args.by, "overwrite": args.overwrite}
    check_top(table, list(parse_judges(args.judges)), args.out, args.top, data=args.data, **wishes)
    judges = judges_from(args)
    with Bar(unit="row") as bar:
        report = write_best(table, judges, args.out, args.top, **wishes, **scoring_arguments(args), progress=bar.advance)
    print(report.to_text())
    return 0
