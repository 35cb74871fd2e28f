"""Solve min |W^(1/2) (A x - b)|^2 + D^2 |x|^2 for a matrix in Matrix Market format, and say how right it is.

On the ranks of torchrun each reads its own rows: some of the lines of a Matrix Market file that is not compressed, in
any order, or some of the files A.part-0.npz, A.part-1.npz and so on, of any format, which hold the rows in parts and
are given as their folder or as 'A.part-*.npz', in quotes. The first rank writes x, and each its rows of a gradient, for
--gradient 'G.part-*.mtx'. What goes wrong on any of them is one error, and one exit status of all; torchrun itself ends
with 1 then.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import scipy.sparse
import torch
from torch import Tensor

from .. import Cauchy, Huber, Solution, SparseMatrix
from . import ranks, sharded
from .errors import BadInput
from .files import Compact, compact, read_bounds, read_matrix, read_right, read_weights
from .output import Output, Progress, described, figures
from .sources import STANDARD
from .timing import solved, warm_up
from .writing import check_outputs, write

NAME, HELP = "solve", "solve min |A x - b| from Matrix Market files"
EXAMPLES = """\
  functional-lstsq solve A.mtx.gz b.mtx -o x.mtx
  functional-lstsq solve A.mtx b.mtx --weights w.mtx --gradient G.mtx  # d sum(x) / d A
  functional-lstsq solve A.mtx b.mtx --weights w.mtx --robust huber
  functional-lstsq solve A.mtx b.mtx --lower 0 --upper u.mtx
  curl -s URL/A.tar.gz | functional-lstsq solve - -o - > x.mtx
  functional-lstsq solve A.mtx b.mtx --minimum-norm --json | jq .forward_error
  torchrun --nproc-per-node 2 -m functional_lstsq solve A.mtx b.mtx -o x.mtx
  torchrun --nproc-per-node 2 -m functional_lstsq solve 'A.part-*.npz' 'b.part-*.npy' -o x.mtx  # the parts of rows
"""
LOSSES = {"cauchy": Cauchy, "huber": Huber}


def add_arguments(job: argparse.ArgumentParser) -> None:
    """What `solve` takes."""
    job.add_argument("matrix", metavar="A.mtx[.gz]", help="the matrix; - for standard input")
    job.add_argument("right", metavar="b.mtx", nargs="?", help="right-hand sides, one a column (default: A times ones)")
    job.add_argument("-o", "--output", metavar="x.mtx", help="write the solution; - to standard output")
    job.add_argument("--gradient", metavar="G.mtx", help="write the gradient of sum(x) by the entries of A")
    job.add_argument("--weights", metavar="w.mtx", help="weights of the squared residuals, one column: 1 / variance")
    job.add_argument("--robust", choices=sorted(LOSSES), help="a loss that is not led astray by outliers")
    job.add_argument(
        "--threshold",
        type=float,
        metavar="T",
        help="where the loss begins to differ from a square, in "
        "units of residual times sqrt(weight); default: 1.345 for huber, 2.385 for cauchy, times the median of "
        "their sizes / 0.6745",
    )
    job.add_argument("--damp", type=float, metavar="D", help="damping, at least 0, in units of A")
    job.add_argument("--nonnegative", action="store_true", help="no x below zero, as --lower 0")
    job.add_argument(
        "--lower", metavar="L", help="no x below this number, or below those of a file, one for each column"
    )
    job.add_argument("--upper", metavar="U", help="no x above this number, or those of a file; 1e300 for none")
    job.add_argument("--minimum-norm", action="store_true", help="accept A without full rank: the x of least norm")
    job.add_argument(
        "--solver", choices=tuple(sharded.SOLVERS), default="auto", help="default: auto, by predicted cost"
    )
    job.add_argument(
        "--refine",
        choices=("auto", "extended"),
        default="auto",
        help="residuals in twice double precision where it takes that (default), or always",
    )
    sharded.add_arguments(job)


def run(options: argparse.Namespace, out: Output) -> int:
    """Read, solve, write, tell; on ranks, if there are any."""
    if ranks.are_many():
        return sharded.run(options, out)
    if options.checkpoint or options.resume:
        raise BadInput("argument --checkpoint: only on the ranks of torchrun")
    outputs = [options.output, options.gradient]
    inputs = [options.matrix, options.right, options.weights, options.lower, options.upper]
    check_outputs(inputs, outputs, json=options.json)
    if STANDARD in outputs:
        out.beside()
    loss = loss_of(options)
    whole = read_matrix(options.matrix)
    b = read_right(options.right, whole, options.matrix)
    weights = read_weights(options.weights, whole, options.matrix)
    bounds = read_bounds(options, whole, b)
    if loss is not None:
        check_robust(options, whole, b)
    if bounds is not None and whole.shape[0] < whole.shape[1]:
        A = Compact(whole, None, None, whole.shape[1])  # an empty column need not be zero between bounds
    else:
        damped = bool(options.damp) and bounds is None
        A = compact(whole, any_rank=loss is None and (options.minimum_norm or damped))
    right = A.A @ torch.ones(A.A.shape[1], dtype=whole.dtype) if b is None else A.of_rows(b)
    settings: dict[str, Any] = {
        "damp": options.damp,
        "weights": None if weights is None else A.of_rows(weights),
        "bounds": bounds,
        "robust": loss,
        "rank_deficient": "minimum_norm" if options.minimum_norm else "raise",
        "refine": options.refine,
    }
    settings["solver"] = sharded.SOLVERS[options.solver]
    warm_up(settings["solver"], derivatives=bool(options.gradient), robust=loss)
    start = time.perf_counter()
    with Progress(out):
        solution, gradient = solved(A.A, right, settings, gradient=bool(options.gradient))
    seconds = time.perf_counter() - start
    told = figures(whole, right if b is None else b, left_out(A, b, solution), seconds)
    if options.damp:
        told["rank"] = min(whole.shape)  # of the matrix with its damping, empty rows and columns too
    if bounds is not None:
        told["at_lower"], told["at_upper"] = (int((solution.info.active == side).sum()) for side in (-1, 1))
    if options.output:
        x = A.of_columns(solution.x)
        write(options.output, x.reshape(x.shape[0], -1 if x.ndim == 2 else 1).numpy())
    if gradient is not None:
        entries = gradient.values.resolve_conj().numpy()
        write(options.gradient, scipy.sparse.coo_array((entries, whole.pattern.indices.numpy()), whole.shape))
    asked = {name: getattr(options, name) for name in ("weights", "robust", "threshold", "damp", "lower", "upper")}
    if options.nonnegative:
        asked["lower"] = "0"
    told_too = ", ".join(f"{name} {value}" for name, value in asked.items() if value is not None)
    out.table(described(told, out) + ([("asked for", told_too)] if told_too else []))
    out.record(command=NAME, matrix=options.matrix, **told, **asked, solution=options.output, gradient=options.gradient)
    return 0


def left_out(A: Compact, b: Tensor | None, solution: Solution) -> Solution:
    """With the residuals of rows that were left out, which are b there."""
    if b is None or A.rows is None:
        return solution
    return solution._replace(residual=b.index_copy(0, A.rows, solution.residual))


def check_robust(options: argparse.Namespace, A: SparseMatrix, b: Tensor | None) -> None:
    """Refuse what a robust fit cannot do, in the words of the command line."""
    if options.minimum_norm or options.refine != "auto":
        other = "--minimum-norm" if options.minimum_norm else f"--refine {options.refine}"
        raise BadInput(f"argument --robust: not allowed with {other}")
    if A.dtype.is_complex or (b is not None and b.is_complex()):
        raise BadInput("argument --robust: the numbers must be real, got complex ones")
    if A.shape[0] < A.shape[1]:
        size = f"{A.shape[0]} x {A.shape[1]}"
        raise BadInput(f"argument --robust: the matrix must have no more columns than rows, got {size}")


def loss_of(options: argparse.Namespace) -> Any:
    """The robust loss that is asked for."""
    if options.robust is None:
        if options.threshold is not None:
            raise BadInput("--threshold is of a robust loss: add --robust huber or --robust cauchy")
        return None
    kind = LOSSES[options.robust]
    return kind() if options.threshold is None else kind(options.threshold)
