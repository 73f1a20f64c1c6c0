"""``diffalign devices``: configurations for ``accelerate launch``, by name."""

from __future__ import annotations

import argparse

HELP = "configurations for several devices: a list, or the path of one for accelerate launch --config_file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``diffalign devices``."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="print the path of this one")


def run(args: argparse.Namespace) -> int:
    """Print; 0 when done. Raises ``UserError`` for an unknown name."""
    from pipelines import recipes

    print(recipes.path("accelerate", args.name) if args.name else "\n".join(recipes.describe("accelerate")))
    return 0
