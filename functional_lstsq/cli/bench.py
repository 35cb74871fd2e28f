"""Time this library's solvers on a matrix: a solve, and a solve with its gradient, each with its estimated error."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import CGLS, Auto, Dense, Direct, RankDeficientError, SparseMatrix, SparsePattern, TooLarge, solve
from .demo import levelling_network
from .files import read_matrix, read_right
from .output import Output, worst
from .plot import positive
from .timing import gradient, warm_up
from .words import line_of
from .writing import check_outputs

NAME, HELP = "bench", "time the solvers on a matrix, with their errors"
EXAMPLES = """\
  functional-lstsq bench                               # a levelling network of 2,000 stations
  functional-lstsq bench A.mtx.gz b.mtx --repeats 9
  functional-lstsq bench A.mtx --limit 10 --json | jq -c '.solvers[] | [.name, .solve]'
"""
_DENSE = 3200  # columns above which a dense factor is not tried
_STATIONS, _LINES = 2000, 6000


def add_arguments(job: argparse.ArgumentParser) -> None:
    """What `bench` takes."""
    job.add_argument("matrix", metavar="A.mtx[.gz]", nargs="?", help="the matrix (default: a made levelling network)")
    job.add_argument("right", metavar="b.mtx", nargs="?", help="right-hand sides, one a column (default: A times ones)")
    job.add_argument("--repeats", type=positive, default=5, metavar="N", help="timed calls of each (default: 5)")
    job.add_argument(
        "--limit",
        type=positive,
        default=60,
        metavar="S",
        help="seconds: what takes longer in its first call is not repeated, and an iteration is ended (default: 60)",
    )


class _TimeUp(Exception):
    """An iteration has taken longer than it may."""


def run(options: argparse.Namespace, out: Output) -> int:
    """Call each once on a new pattern, then all in turn, and tell medians."""
    A, b = _problem(options)
    m, n = A.shape
    about = {"rows": m, "columns": n, "entries": A.nnz, "torch": torch.__version__, "threads": torch.get_num_threads()}
    contestants = [_Contestant(name, solver) for name, solver in _solvers().items()]
    calls = len(contestants) * (1 + 2 * options.repeats)
    with tqdm(total=calls, desc="timing", unit=" call", disable=True if out.quiet else None, leave=False) as bar:
        for contestant in contestants:
            warm_up(contestant.solver)
            contestant.begin(A, b, options.limit)
            bar.update()
        live = [contestant for contestant in contestants if contestant.repeatable]
        bar.total -= 2 * options.repeats * (len(contestants) - len(live))
        for turn in range(options.repeats):
            for contestant in live if turn % 2 else live[::-1]:
                contestant.measure(A, b)
                bar.update(2)
    told = [contestant.told() for contestant in contestants]
    for name in ("solve", "gradient"):
        fastest = min((row[name] for row in told if row[name] is not None), default=math.nan)
        for row in told:
            row[f"{name}_ratio"] = None if row[name] is None else row[name] / fastest
    out.line(f"{options.matrix or 'a levelling network'}: {m} x {n}, {A.nnz} entries")
    out.line(f"torch {about['torch']}, threads: {about['threads']}")
    out.line(f"medians of {options.repeats} calls, one solver after another, the analysis of the pattern kept;")
    out.line("first: one call, on a new pattern; x: times the fastest\n")
    _print(told, out)
    out.record(command=NAME, matrix=options.matrix, **about, repeats=options.repeats, solvers=told)
    return out.error("no solver has an answer", 1) if all(row["refused"] for row in told) else 0


def _problem(options: argparse.Namespace) -> tuple[SparseMatrix, Tensor]:
    """What is to be solved: the files, or a made network whose weights are multiplied in."""
    if options.matrix:
        check_outputs([options.matrix, options.right], [])
        A = read_matrix(options.matrix)
        b = read_right(options.right, A, options.matrix)
        return A, A @ torch.ones(A.shape[1], dtype=A.dtype) if b is None else b
    pattern, values, measured, weights = levelling_network(_STATIONS, _LINES)
    root = weights.sqrt()
    return SparseMatrix(values * root[pattern.indices[0]], pattern), root * measured


def _solvers() -> dict[str, Callable[[CGLS], Any]]:
    """Each made of the settings of iterations, which are watched in the first call only."""
    return {
        "auto": lambda cgls: Auto(cgls=cgls),
        "dense": lambda cgls: Dense(),
        "direct": lambda cgls: Direct(),
        "cgls": lambda cgls: cgls,
    }


class _Contestant:
    """A solver, its times, and why it has none."""

    def __init__(self, name: str, make: Callable[[CGLS], Any]):
        self.name, self.make, self.solver = name, make, make(CGLS())
        self.first: float | None = None
        self.solves: list[float] = []
        self.gradients: list[float] = []
        self.refused, self.reason, self.repeatable = "", "", False
        self.info: Any = None

    def begin(self, A: SparseMatrix, b: Tensor, limit: float) -> None:
        """The first call, whose time holds the analysis of the pattern; nothing is begun that cannot end in time."""
        if self.name == "dense" and min(A.shape) > _DENSE:
            self._refuse(f"not tried: {min(A.shape)} columns", "")
            return
        if self.name == "direct":
            predicted = [step.seconds for step in Auto(dense_columns=1, dense_bytes=1).predict(A)]
            if any(seconds > limit for seconds in predicted):
                self._refuse(f"not tried: predicted {max(predicted):.0f} s", "")
                return
        fresh = SparseMatrix(A.values, SparsePattern(A.pattern.indices, A.shape))
        start = time.perf_counter()

        def watch(iteration: int, gradient: float) -> None:
            if time.perf_counter() - start > limit:
                raise _TimeUp

        try:
            self.info = solve(fresh, b, solver=self.make(CGLS(callback=watch))).info
        except _TimeUp:
            self._refuse(f"ended after {limit} s", "")
        except torch.linalg.LinAlgError as error:
            self._refuse(_short(error), line_of(error))
        else:
            self.first = time.perf_counter() - start
            self.repeatable = self.first <= limit

    def measure(self, A: SparseMatrix, b: Tensor) -> None:
        """One call for the solution, one for solution and gradient."""
        start = time.perf_counter()
        solve(A, b, solver=self.solver)
        self.solves.append(time.perf_counter() - start)
        start = time.perf_counter()
        try:
            gradient(A, b, self.solver)
        except torch.linalg.LinAlgError as error:  # the solution may be good and its gradient not
            self.reason = line_of(error)
        else:
            self.gradients.append(time.perf_counter() - start)

    def _refuse(self, short: str, reason: str) -> None:
        self.refused, self.reason = short, reason or short

    def told(self) -> dict[str, Any]:
        """For scripts; None for what was not measured."""
        gradients = [] if self.reason else self.gradients
        return {
            "name": self.name,
            "first": self.first,
            "solve": statistics.median(self.solves) if self.solves else self.first,
            "gradient": statistics.median(gradients) if gradients else None,
            "solve_times": self.solves,
            "gradient_times": gradients,
            "forward_error": None if self.info is None else worst(self.info.forward_error),
            "method": None if self.info is None else self.info.method,
            "refused": self.refused or None,
            "reason": self.reason or None,
        }


def _short(error: Exception) -> str:
    """Why there is no answer, in some words."""
    if isinstance(error, TooLarge):
        return "a factor would not fit into memory"
    return "rank deficient" if isinstance(error, RankDeficientError) else "no answer to vouch for"


def _print(told: list[dict[str, Any]], out: Output) -> None:
    def time_of(seconds: float | None) -> str:
        return "-" if seconds is None else f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"

    def ratio_of(ratio: float | None) -> str:
        return "" if ratio is None else f"{ratio:.2f}"

    line = "{:<7} {:>10} {:>10} {:>7} {:>14} {:>7} {:>9}   {}"
    out.line(line.format("solver", "first", "solve", "x", "with gradient", "x", "error", "method"))
    for row in told:
        if row["refused"]:
            out.line(f"{row['name']:<7} {out.status('refused')}: {row['refused']}")
            continue
        times = [time_of(row[name]) for name in ("first", "solve", "gradient")]
        ratios = [ratio_of(row[f"{name}_ratio"]) for name in ("solve", "gradient")]
        error = f"{row['forward_error']:.1e}"
        note = row["method"] + ("" if row["solve_times"] else ", not repeated")
        note += ", gradient refused" if row["reason"] else ""
        out.line(line.format(row["name"], times[0], times[1], ratios[0], times[2], ratios[1], error, note))
