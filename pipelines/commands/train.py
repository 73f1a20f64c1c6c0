"""``diffalign train OBJECTIVE``: align a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

HELP = "align a checkpoint with preference pairs"
GOES_ON = (
    "Once there is a checkpoint, go on from it with --resume and without --overwrite; until then, give the same command again: "
    "what is encoded is kept."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from diffalign import objectives

    parser.set_defaults(takes_unknown=True)
    sub = parser.add_subparsers(dest="objective_name", metavar="OBJECTIVE", required=True)
    for name in objectives.names(of_prompts=False):
        module = objectives.load(name)
        own = sub.add_parser(name, help=citation(module), description=citation(module))
        add_run_options(own)
        own.add_argument(
            "--prepare",
            nargs="?",
            const="1/1",
            metavar="K/N",
            help="fill the cache (--cache) and train nothing; with K/N the K-th of N parts, which may be filled at the same time",
        )
        from pipelines import config

        config.add_options(own, module.Objective)


def citation(module: ModuleType) -> str:
    """The first paragraph of an objective's own text, for argparse."""
    return " ".join(module.__doc__.split("\n\n")[0].split()).replace("%", "%%")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(goes_on=GOES_ON)
    group = parser.add_argument_group("how to run")
    group.add_argument("--recipe", metavar="NAME", help="start from a shipped recipe (`--recipe list` shows them)")
    group.add_argument(
        "--config", metavar="FILE", help="settings from a YAML file; they win over the recipe's, options win over both"
    )
    group.add_argument(
        "--dry-run", action="store_true", help="check and print everything, estimate memory and time, train nothing"
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in the output folder, with more --steps if you like",
    )
    group.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")
    group.add_argument("--quiet", action="store_true", help="no progress bars")
    group.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")


def run(args: argparse.Namespace) -> int:
    def start(*given: Any, **how: Any) -> Any:
        from pipelines import training  # not before it is needed: a dry run and a mistake should answer at once

        return training.train(*given, **how)

    if args.prepare and not args.dry_run:
        from diffalign.errors import UserError
        from pipelines import preparing

        if args.resume or args.overwrite:
            raise UserError(
                "--prepare always goes on where it stopped, and makes anew what is lost: leave --resume and --overwrite out."
            )

        args.goes_on = "The same command goes on where it stopped."
        preparing.prepare(resolve_settings(args), args.prepare, progress=not args.quiet)
        return 0
    return carry_out(args, start, _dry_run)


DryRun = Callable[[str, Any, Callable[[], None]], int]
"""Called with an objective's name, the settings, and a check of the output folder; returns the exit status."""


def carry_out(args: argparse.Namespace, train: Callable[..., Any], dry_run: DryRun) -> int:
    """List recipes, look without training, or train, as the options of ``add_run_options`` say."""
    from pipelines import recipes

    name = args.objective_name
    if args.recipe == "list":
        print("\n".join(recipes.describe(name)))
        return 0
    settings = resolve_settings(args)
    if args.dry_run:
        return dry_run(name, settings, lambda: _check_output(args, settings.output))
    from diffalign.errors import INTERRUPTED_STATUS

    finished = train(name, settings, resume=args.resume, overwrite=args.overwrite, progress=not args.quiet)
    return INTERRUPTED_STATUS if finished.interrupted else 0


def _check_output(args: argparse.Namespace, output: Path) -> None:
    """Check that the run may write into its folder; with ``--prepare`` any folder will do."""
    from pipelines.run_folder import check_output

    if not getattr(args, "prepare", None):
        check_output(output, resume=args.resume, overwrite=args.overwrite)


def resolve_settings(args: argparse.Namespace) -> Any:
    """Recipe, then file, then options; checked."""
    from diffalign import objectives
    from pipelines import config, recipes

    objective = objectives.load(args.objective_name).Objective
    recipe = recipes.load(args.objective_name, args.recipe) if args.recipe else {}
    file = config.read_yaml(Path(args.config)) if args.config else {}
    tree = config.layered(objective, recipe, file, config.given_options(args, objective))
    return config.resolve(tree, objective, getattr(args, "unknown", []))


def _dry_run(name: str, settings: Any, check_output: Callable[[], None]) -> int:
    from diffalign.errors import UserError
    from pipelines import dry_run, estimate, memory_presets, training
    from pipelines.image_settings import remarks
    from pipelines.sizing import Sizing

    sizing = Sizing()
    settings, told = memory_presets.applied(settings, sizing)
    print(training.to_yaml(f"train {name}", settings))
    looked = dry_run.look(settings)
    found = estimate.estimate(settings, sizing, looked.table)
    print("\n".join([*remarks(settings), *looked.remarks, *([told] if told else []), found.to_text()]))
    if not found.unknown:
        print("\n".join(memory_presets.advice(settings, sizing)))
    looked.check(check_output)
    for line in looked.unchecked:
        print(f"Not checked: {line}")
    if looked.mistakes:
        raise UserError("The run would be refused:\n" + "\n".join(f"  {mistake}" for mistake in looked.mistakes))
    return 0
