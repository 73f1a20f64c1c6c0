"""``diffalign objectives``: what can be trained, with which losses, on what data, at what cost."""

from __future__ import annotations

import argparse

HELP = "list objectives, losses and recipes, or explain one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``diffalign objectives``."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="an objective (with --losses: a loss) to explain in full")
    parser.add_argument("--losses", action="store_true", help="list the losses that --loss may name, instead of the objectives")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")


def run(args: argparse.Namespace) -> int:
    """Print; 0 when done. Raises ``UserError`` for an unknown name, or for one in full as Markdown."""
    from diffalign.errors import UserError
    from pipelines import objective_tables as tables

    if args.name and args.markdown:
        raise UserError("--markdown prints the tables; without it, NAME is explained in full.")
    if args.name:
        print(tables.loss_in_full(args.name) if args.losses else tables.objective_in_full(args.name))
        return 0
    table = tables.losses_table() if args.losses else tables.objectives_table()
    print(table.to_markdown() if args.markdown else tables.to_text(table))
    return 0
