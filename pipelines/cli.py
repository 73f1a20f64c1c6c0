"""The console script ``diffalign``: finds the commands in ``pipelines/commands`` and runs one.

A ``UserError`` becomes one paragraph on stderr and exit status 2, Ctrl-C one line and status 130; ``--debug`` shows the
traceback of either. A command that can resume says so in ``goes_on``, a default of its parser.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import pkgutil
import re
import sys
import textwrap
from typing import NoReturn

from diffalign.errors import INTERRUPTED_STATUS, UserError
from pipelines import commands
from pipelines.several import told_unknown

BROKEN_PIPE_STATUS = 141
"""What a shell reports of a program that SIGPIPE ended: 128 and the signal's number."""
REFUSED_BY_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


class Parser(argparse.ArgumentParser):
    """A parser whose error for an unknown choice names the one that is spelled most like it, in subcommands too."""

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            from diffalign.objectives import nearest

            near = nearest(found[1], re.findall(r"[\w.+-]+", found[2]))
            message += f"; did you mean {near}?" if near else ""
        super().error(message)


def command_names() -> list[str]:
    """The commands; the folder is the registry."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(commands.__path__))


def build_parser(asked: str | None) -> argparse.ArgumentParser:
    """The parser; only the command that was asked for declares its options, so that ``--help`` stays quick."""
    parser = Parser("diffalign", description="Preference alignment of diffusion models: train, sample, judge.")
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    sub = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in command_names():
        module = importlib.import_module(f"pipelines.commands.{name.replace('-', '_')}")
        own = sub.add_parser(name, help=module.HELP, description=module.HELP)
        own.set_defaults(run=module.run, refuse=own.error)
        if name == asked:
            own.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
            module.add_arguments(own)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    asked = next((a for a in argv if not a.startswith("-")), None)
    try:
        parser = build_parser(asked)
        args, unknown = parser.parse_known_args(argv)
    except KeyboardInterrupt:  # the options of objectives are read from their modules, and torch takes seconds to import
        if "--debug" in argv:
            raise
        print("Interrupted before anything was begun.", file=sys.stderr)
        return INTERRUPTED_STATUS
    except UserError as error:  # an objective of a user's own cannot have the options that it asks for
        if "--debug" in argv:
            raise
        print(paragraph(f"diffalign {asked}: {error}"), file=sys.stderr)
        return 2
    if args.version:
        from importlib.metadata import version

        print(version("diffalign"))
        return 0
    if args.command is None:
        parser.print_help()
        return 2 if argv else 0
    if unknown and not getattr(args, "takes_unknown", False):
        args.refuse(told_unknown(unknown))
    args.unknown = unknown
    try:
        return args.run(args)
    except (UserError, ValueError) as error:
        if args.debug or not _is_user_error(error):
            raise
        print(paragraph(f"diffalign {args.command}: {error}"), file=sys.stderr)
        return 2
    except OSError as error:
        if args.debug or error.errno not in REFUSED_BY_THE_DISK:
            raise
        told = f"{error.filename or 'a file'} could not be written: {error.strerror}. {getattr(args, 'goes_on', '')}"
        print(paragraph(f"diffalign {args.command}: {told}".rstrip()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if args.debug:
            raise
        print(f"Interrupted. {getattr(args, 'goes_on', '')}".rstrip(), file=sys.stderr)
        return INTERRUPTED_STATUS


def _is_user_error(error: Exception) -> bool:
    """Judges have an error of their own, for their room imports nothing of ours."""
    from reward_models.base import JudgeError

    return isinstance(error, (UserError, JudgeError))


def paragraph(text: str) -> str:
    """Wrapped at 110 columns; existing line breaks stay."""
    return "\n".join(
        textwrap.fill(line, 110, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )


def script() -> None:
    """The program ``diffalign``: ends without a word where the reader of its output, such as ``head``, has seen enough."""
    _print_whatever_it_is()
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would try again at its end
        status = BROKEN_PIPE_STATUS
    sys.exit(status)


def _print_whatever_it_is() -> None:
    """Prompts and names of files may have letters that stdout's encoding lacks, as a pipe's does on Windows: they are escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    script()
