"""Sparse least squares from the shell, for matrices in Matrix Market files and in many others.

A matrix may also be a Rutherford-Boeing, Harwell-Boeing or SVMlight file, a .npz of SciPy or a .mat of MATLAB; columns
of numbers also a .npy, .txt or .csv, or the labels of an SVMlight file. Indices in text count from 1.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from .. import __version__
from ..distributed import RankError
from ..solvers.memory import told_as_too_large
from . import bench, command, demo, info, plot, ranks, solve
from .errors import BadInput, reason_of
from .output import Output
from .words import line_of

_EXAMPLES = """\
examples:
  functional-lstsq demo
  functional-lstsq info A.mtx.gz
  functional-lstsq solve A.mtx.gz b.mtx -o x.mtx
  torchrun --nproc-per-node 2 -m functional_lstsq solve A.mtx b.mtx -o x.mtx  # each rank has some of the rows

functional-lstsq COMMAND --help has more, and the options of each.
"""
_EXIT = """\
exit status: 0 done, also where a reader of the output ends early; 1 no answer that can be vouched for, or another rank
was lost; 2 bad input, or a result that cannot be written; 129, 130, 143 ended by SIGHUP, SIGINT (Ctrl-C), SIGTERM,
without half a file"""


class _Parser(argparse.ArgumentParser):
    """Its errors are one line, as all others are."""

    def error(self, message: str):
        raise BadInput(f"{message}; see {self.prog} --help")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse would say nothing of a full disk.
        if message:
            print(message, end="", file=file or sys.stdout, flush=True)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    if arguments is None and command.is_running():
        command.begin()
        return command.watched(lambda: _run(sys.argv[1:]))
    return _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: list[str]) -> int:
    # Until it is parsed, whatever looks like the option is.
    rank = ranks.rank()
    out = Output(quiet="--quiet" in arguments or "-q" in arguments, json="--json" in arguments, rank=rank)
    try:
        options = _parser().parse_args(arguments)
        if options.quiet and options.json:  # one before the command, one behind it
            raise BadInput("argument --json: not allowed with argument -q/--quiet")
        out = Output(quiet=options.quiet, json=options.json, colour=not options.no_color, rank=rank)
        if ranks.are_many() and options.command != solve.NAME:
            raise BadInput(f"{options.command} is for one process, and not for the ranks of torchrun")
        if out.file is None and not out.quiet:
            raise BadInput("standard output is closed, so that nothing could be told: add --quiet")
        with told_as_too_large():
            status = options.run(options, out)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads our output has seen enough
        command.abandon(sys.stdout)
        return 0
    except KeyboardInterrupt:
        return out.error("interrupted", 130)
    except torch.linalg.LinAlgError as error:
        return out.error(line_of(error), 1, shared=not isinstance(error, MemoryError))
    except OSError as error:  # of our own output: files have told theirs
        command.abandon(sys.stdout)
        return out.error(f"cannot write to standard output: {reason_of(error)}", 2)
    except RankError as error:
        return out.error(line_of(error), 1, shared=False)
    except (BadInput, ValueError, TypeError) as error:
        return out.error(line_of(error), 2)
    except (MemoryError, RuntimeError) as error:
        # What one rank finds on its own is told to all before it is raised, but for an end of memory.
        return out.error(line_of(error), 2, shared=str(error).startswith("on rank "))


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
    for module in (solve, info, plot, bench, demo):
        job = commands.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.__doc__,
            epilog=f"examples:\n{module.EXAMPLES}\n{_EXIT}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            parents=[common],
        )
        module.add_arguments(job)
        job.set_defaults(run=module.run)
    return parser
