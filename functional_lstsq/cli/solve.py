"""Solve min |W^(1/2) (A x - b)|^2 + D^2 |x|^2 for a matrix in Matrix Market format, and say how right it is."""

from __future__ import annotations

import argparse
import time
from typing import Any

import scipy.sparse
import torch
from torch import Tensor

from .. import CGLS, Auto, Cauchy, Dense, Direct, Huber, Solution, SparseMatrix
from .. import solve as solve_problem
from .files import BadInput, check_outputs, read_matrix, read_right, read_weights, write
from .output import Output, Progress, described, figures

NAME, HELP = "solve", "solve min |A x - b| from Matrix Market files"
EXAMPLES = """\
  functional-lstsq solve A.mtx.gz b.mtx -o x.mtx
  functional-lstsq solve A.mtx b.mtx --weights w.mtx --gradient G.mtx  # d sum(x) / d A
  functional-lstsq solve A.mtx b.mtx --weights w.mtx --robust huber
  functional-lstsq solve A.mtx b.mtx --minimum-norm --json | jq .forward_error
"""
LOSSES = {"cauchy": Cauchy, "huber": Huber}
SOLVERS = ("auto", "dense", "direct", "cgls")


def add_arguments(job: argparse.ArgumentParser) -> None:
    """What `solve` takes."""
    job.add_argument("matrix", metavar="A.mtx[.gz]", help="the matrix")
    job.add_argument("right", metavar="b.mtx", nargs="?", help="right-hand sides, one a column (default: A times ones)")
    job.add_argument("-o", "--output", metavar="x.mtx", help="write the solution")
    job.add_argument("--gradient", metavar="G.mtx", help="write the gradient of sum(x) by the entries of A")
    job.add_argument("--weights", metavar="w.mtx", help="weights of the squared residuals, one column: 1 / variance")
    job.add_argument("--robust", choices=sorted(LOSSES), help="a loss that is not led astray by outliers")
    job.add_argument(
        "--threshold",
        type=float,
        metavar="T",
        help="where the loss begins to differ from a square, in "
        "units of residual times sqrt(weight); default: 1.345 for huber, 2.385 for cauchy",
    )
    job.add_argument("--damp", type=float, metavar="D", help="damping, at least 0, in units of A")
    job.add_argument("--minimum-norm", action="store_true", help="accept A without full rank: the x of least norm")
    job.add_argument("--solver", choices=SOLVERS, default="auto", help="default: auto, by predicted cost")
    job.add_argument(
        "--refine",
        choices=("auto", "extended"),
        default="auto",
        help="residuals in twice double precision where it takes that (default), or always",
    )


def run(options: argparse.Namespace, out: Output) -> int:
    """Read, solve, write, tell."""
    check_outputs([options.matrix, options.right, options.weights], [options.output, options.gradient])
    A = read_matrix(options.matrix)
    b = read_right(options.right, A, options.matrix)
    weights = read_weights(options.weights, A, options.matrix)
    start = time.perf_counter()
    with Progress(out) as progress:
        settings = {
            "damp": options.damp,
            "weights": weights,
            "robust": loss_of(options),
            "solver": solver_of(options.solver, CGLS(callback=progress.step)),
            "rank_deficient": "minimum_norm" if options.minimum_norm else "raise",
            "refine": options.refine,
        }
        if options.gradient:
            gradient, solution = torch.func.grad(_loss, has_aux=True)(A, b, settings)
        else:
            solution = solve_problem(A, b, **settings)
    told = figures(A, b, solution, time.perf_counter() - start)
    if options.output:
        write(options.output, solution.x.reshape(A.shape[1], -1).numpy())
    if options.gradient:
        entries = gradient.values.resolve_conj().numpy()
        write(options.gradient, scipy.sparse.coo_array((entries, A.pattern.indices.numpy()), A.shape))
    asked = {name: getattr(options, name) for name in ("weights", "robust", "threshold", "damp")}
    told_too = ", ".join(f"{name} {value}" for name, value in asked.items() if value is not None)
    out.table(described(told, out) + ([("asked for", told_too)] if told_too else []))
    out.record(command=NAME, matrix=options.matrix, **told, **asked, solution=options.output, gradient=options.gradient)
    return 0


def loss_of(options: argparse.Namespace) -> Any:
    """The robust loss that is asked for."""
    if options.robust is None:
        if options.threshold is not None:
            raise BadInput("--threshold is of a robust loss: add --robust huber or --robust cauchy")
        return None
    kind = LOSSES[options.robust]
    return kind() if options.threshold is None else kind(options.threshold)


def solver_of(name: str, cgls: CGLS) -> Any:
    """The solver of that name; `cgls` wherever one iterates."""
    return {"auto": Auto(cgls=cgls), "dense": Dense(), "direct": Direct(), "cgls": cgls}[name]


def _loss(A: SparseMatrix, b: Tensor, settings: dict[str, Any]) -> tuple[Tensor, Solution]:
    solution = solve_problem(A, b, **settings)
    return solution.x.sum().real, solution
