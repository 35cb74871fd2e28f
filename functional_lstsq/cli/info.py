"""Tell what a matrix is like, what the solver would do with it, and how well its least-squares problems are posed."""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch

from .. import Auto, SparseMatrix, solve
from ..result import RANK_DEFICIENT
from ..solvers.plan import Prediction
from ..solvers.sparse_factor import full_matching
from .files import compact, matrix_of
from .formats import read
from .output import Output, Progress, worst
from .timing import warm_up
from .words import line_of
from .writing import check_outputs

NAME, HELP = "info", "sizes, structural rank, condition, what the solver would do and its predicted cost"
EXAMPLES = """\
  functional-lstsq info A.mtx.gz
  functional-lstsq info A.mtx --no-condition           # the file and its pattern alone, nothing is solved
  functional-lstsq info A.mtx --json | jq '.condition, .plan[0].seconds'
"""


def add_arguments(job: argparse.ArgumentParser) -> None:
    """What `info` takes."""
    job.add_argument("matrix", metavar="A.mtx[.gz]", help="the matrix; - for standard input")
    job.add_argument(
        "--no-condition", action="store_true", help="no condition number and no numerical rank, which take a solve"
    )


def run(options: argparse.Namespace, out: Output) -> int:
    """Read, count, predict, and solve once for the condition number."""
    check_outputs([options.matrix], [])
    found = read(options.matrix)
    A = matrix_of(found)
    told: dict[str, Any] = {"format": found.format, "field": found.field, "symmetry": found.symmetry}
    told |= {"stored": found.stored, **_counts(A)}
    A = compact(A).A  # for all that follows, what is empty makes no difference
    plan = Auto().predict(A)
    told["plan"] = [step._asdict() for step in plan]
    if not options.no_condition:
        with Progress(out):
            told |= _solved(A, Auto())
    out.table(_rows(options.matrix, told, plan, out))
    out.record(command=NAME, matrix=options.matrix, **told)
    return 0


def _counts(A: SparseMatrix) -> dict[str, Any]:
    """What the pattern tells, in memory for its entries."""
    m, n = A.shape
    rows, columns = (part.unique(return_counts=True)[1] for part in A.pattern.indices)
    structural, _ = full_matching(A.pattern if m >= n else A.pattern.T)
    return {
        "rows": m,
        "columns": n,
        "entries": A.nnz,
        "zeros": int((A.values == 0).sum()),
        "density": A.nnz / (m * n) if m * n else 0.0,
        "dtype": str(A.dtype).removeprefix("torch."),
        "empty_rows": m - len(rows),
        "empty_columns": n - len(columns),
        "longest_row": int(rows.max()) if len(rows) else 0,
        "longest_column": int(columns.max()) if len(columns) else 0,
        "structural_rank": structural,
    }


def _solved(A: SparseMatrix, solver: Auto) -> dict[str, Any]:
    """What a solve tells, for A times ones."""
    b = A @ torch.ones(A.shape[1], dtype=A.dtype)
    warm_up(Auto(), derivatives=False)
    start = time.perf_counter()
    told: dict[str, Any] = {"condition": math.nan, "rank": None, "status": "refused", "forward_error": math.nan}
    try:
        info = solve(A, b, solver=solver, throw=False).info
        deficient, rank = int(info.status_code) == RANK_DEFICIENT, int(info.rank)
        told = {
            "condition": worst(info.condition),
            "rank": rank if rank >= 0 else None,
            "status": info.status,
            "forward_error": math.nan if deficient else worst(info.forward_error),
            "tried": info.tried,
        }
    except torch.linalg.LinAlgError as error:  # no method could even begin; what the pattern tells is told all the same
        told["tried"] = line_of(error)
    return {**told, "seconds": time.perf_counter() - start}


def _rows(name: str, told: dict[str, Any], plan: list[Prediction], out: Output) -> list[tuple[str, str]]:
    m, n = told["rows"], told["columns"]
    full = min(m, n)

    def rank(number: int | None) -> str:
        if number is None:
            return f"below {full}" if told["status"] == "rank deficient" else "not found"
        return f"{number}, {'full' if number == full else f'not full: {full - number} of {full} missing'}"

    rows = [
        ("matrix", f"{name}   {told['format']} {told['field']} {told['symmetry']}, {told['stored']} numbers stored"),
        ("size", f"{m} x {n}, {'tall' if m > n else 'wide' if m < n else 'square'}, solved in {told['dtype']}"),
        ("entries", f"{told['entries']}, {told['zeros']} of them zero, density {100 * told['density']:.2g} %"),
        ("longest", f"row of {told['longest_row']} entries, column of {told['longest_column']}"),
        ("empty", f"rows: {told['empty_rows']}, columns: {told['empty_columns']}"),
        ("structural rank", rank(told["structural_rank"])),
    ]
    rows += [("plan" if step is plan[0] else "  or else", _step(step)) for step in plan]
    if "condition" not in told:
        return rows
    scaled = "columns" if m >= n else "rows"
    error = "" if math.isnan(told["forward_error"]) else f", estimated error {told['forward_error']:.1e}"
    found = f"{told['condition']:.2e}   estimated, {scaled} scaled to norm 1"
    if not math.isfinite(told["condition"]):
        found = "infinite" if told["condition"] == math.inf else "not found"
    return [
        *rows,
        ("condition", found),
        ("rank", rank(told["rank"])),
        ("status", f"{out.status(told['status'])}{error}, for b = A times ones"),
        ("tried", told["tried"]),
        ("seconds", f"{told['seconds']:.3f}"),
    ]


def _step(step: Prediction) -> str:
    """A line of the plan."""
    cost = [] if math.isnan(step.iteration) else [f"{_time(step.iteration)} an iteration"]
    if math.isinf(step.seconds):
        cost.append("no end in sight")
    elif not math.isnan(step.seconds):
        cost.append(f"predicted {_time(step.seconds)}" + (" in all" if cost else ""))
    return f"{step.method} ({step.reason}){': ' if cost else ''}{', '.join(cost)}"


def _time(seconds: float) -> str:
    if seconds >= 10:
        return f"{seconds:.0f} s"
    return f"{seconds:.2g} s" if seconds >= 0.1 else f"{1e3 * seconds:.2g} ms"
