"""Sparse least squares from the shell, for matrices in Matrix Market format."""

from __future__ import annotations

import argparse
import os
import sys

import torch

from .. import __version__
from . import bench, demo, info, plot, solve
from .files import BadInput, line_of
from .output import Output

_EXAMPLES = """\
examples:
  functional-lstsq demo
  functional-lstsq info A.mtx.gz
  functional-lstsq solve A.mtx.gz b.mtx -o x.mtx

functional-lstsq COMMAND --help has more, and the options of each.
"""
_EXIT = "exit status: 0 done, 1 no answer that can be vouched for, 2 bad input, 130 interrupted"


class _Parser(argparse.ArgumentParser):
    """Its errors are one line, as all others are."""

    def error(self, message: str):
        raise BadInput(f"{message}; see {self.prog} --help")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Until it is parsed, whatever looks like the option is.
    out = Output(quiet="--quiet" in arguments or "-q" in arguments, json="--json" in arguments)
    try:
        options = _parser().parse_args(arguments)
        if options.quiet and options.json:  # one before the command, one behind it
            raise BadInput("argument --json: not allowed with argument -q/--quiet")
        out = Output(quiet=options.quiet, json=options.json, colour=not options.no_color)
        status = options.run(options, out)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return out.error("interrupted", 130)
    except torch.linalg.LinAlgError as error:
        return out.error(line_of(error), 1)
    except (BadInput, ValueError, TypeError, MemoryError, OSError, RuntimeError) as error:
        return out.error(line_of(error), 2)


def _parser() -> _Parser:
    parser = _Parser(
        prog="functional-lstsq",
        description=__doc__,
        epilog=_EXAMPLES + _EXIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(quiet=False, json=False, no_color=False)
    # Before the command and behind it; there they have no default, which would undo what stands before.
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for place in (parser, common):
        either = place.add_mutually_exclusive_group()
        either.add_argument("-q", "--quiet", action="store_true", help="print nothing; files are written all the same")
        either.add_argument("--json", action="store_true", help="print one JSON object, null for what is not finite")
        place.add_argument("--no-color", action="store_true", help="no colour, as with NO_COLOR set or into a pipe")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for command in (solve, info, plot, bench, demo):
        job = commands.add_parser(
            command.NAME,
            help=command.HELP,
            description=command.__doc__,
            epilog=f"examples:\n{command.EXAMPLES}\n{_EXIT}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            parents=[common],
        )
        command.add_arguments(job)
        job.set_defaults(run=command.run)
    return parser
