"""Draw the pattern of a matrix and how conjugate gradients converge on it, to a PNG or SVG file."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import CGLS, SparseMatrix, solve
from .errors import BadInput
from .files import read_matrix, read_right
from .output import Output, Progress, worst
from .writing import check_outputs, save

NAME, HELP = "plot", "draw the pattern and the convergence to PNG or SVG"
EXAMPLES = """\
  functional-lstsq plot A.mtx.gz -o pattern.png --pattern-only
  functional-lstsq plot A.mtx b.mtx -o convergence.svg
  functional-lstsq plot A.mtx b.mtx -o long.png --iterations 20000
"""
_CELLS = 300  # rows and columns of the picture of a pattern, at most: larger matrices show densities
_HEIGHT = 4.6  # inches
_SEARCH, _SOLVE = "search for the weakest direction", "solution and its corrections"
_COLOURS = {_SEARCH: "tab:orange", _SOLVE: "tab:blue"}


def add_arguments(job: argparse.ArgumentParser) -> None:
    """What `plot` takes."""
    job.add_argument("matrix", metavar="A.mtx[.gz]", help="the matrix; - for standard input")
    job.add_argument("right", metavar="b.mtx", nargs="?", help="right-hand sides, one a column (default: A times ones)")
    job.add_argument("-o", "--output", metavar="picture.png|.svg", required=True, help="the picture to write")
    job.add_argument("--pattern-only", action="store_true", help="draw the pattern and solve nothing")
    job.add_argument(
        "--iterations", type=positive, default=2000, metavar="N", help="of a run of conjugate gradients (default: 2000)"
    )


def positive(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def run(options: argparse.Namespace, out: Output) -> int:
    """Read, iterate, draw, tell."""
    Figure = _figure()
    check_outputs([options.matrix, options.right], [options.output])
    kind = Path(options.output).suffix.lower()
    if kind not in (".png", ".svg"):
        raise BadInput(f"cannot draw {options.output}: its name must end in .png or .svg")
    if options.pattern_only and options.right:
        raise BadInput(f"argument --pattern-only: solves nothing, so it takes no {options.right}")
    A = read_matrix(options.matrix)
    m, n = A.shape
    told: dict[str, Any] = {"rows": m, "columns": n, "entries": A.nnz}
    rows = [("matrix", f"{options.matrix}   {m} x {n}, {A.nnz} entries")]
    history = None
    if not options.pattern_only:
        b = read_right(options.right, A, options.matrix)
        b = A @ torch.ones(n, dtype=A.dtype) if b is None else b
        with Progress(out) as progress:
            history = _Watched(options.iterations, progress)
            info = solve(A, b, solver=history, throw=False).info
        told |= {
            "status": info.status,
            "iterations": sum(len(gradients) for _, gradients in history.runs),
            "forward_error": worst(info.forward_error),
            "condition": worst(info.condition),
            "runs": [{"phase": phase, "gradients": gradients} for phase, gradients in history.runs],
        }
        error, condition = _figures(told)
        rows += [
            ("status", out.status(info.status)),
            ("iterations", f"{told['iterations']}, runs: {len(history.runs)}"),
            ("estimated error", f"{error}   |x - exact| / |exact|"),
            ("condition", f"{condition}   {'columns' if m >= n else 'rows'} scaled"),
        ]
    widths = [_HEIGHT / _aspect(A) + 2, 7.0][: 1 if history is None else 2]
    figure = Figure(figsize=(sum(widths), _HEIGHT + 1), layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    figure.suptitle(Path(options.matrix).name)
    _draw_pattern(figure, axes[0], A)
    if history is not None:
        _draw_history(axes[1], history, told)
    _save(figure, options.output, kind[1:])
    out.table([*rows, ("picture", options.output)])
    out.record(command=NAME, matrix=options.matrix, **told, picture=options.output)
    return 0


def _figures(told: dict[str, Any]) -> tuple[str, str]:
    """The estimated error and the condition number, in words where they are not known."""
    error, condition = told["forward_error"], told["condition"]
    more = "" if told["status"] == "converged" else " or more"
    return (
        f"{error:.1e}" if math.isfinite(error) else "not known",
        f"{condition:.1e}{more}" if math.isfinite(condition) else "infinite",
    )


def _figure() -> Any:
    """matplotlib is loaded for this command alone, and not everyone has it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("plot needs matplotlib: pip install 'functional-lstsq[plot]'") from None
    return Figure


@dataclass(frozen=True)
class _Watched:
    """`CGLS` that notes the gradients of every run, and whether the run was part of the search or of a solution."""

    iterations: int
    progress: Progress
    runs: list[tuple[str, list[float]]] = field(default_factory=list, hash=False, compare=False)
    phase: list[str] = field(default_factory=lambda: [_SEARCH], hash=False, compare=False)

    def prepare(self, system: Any, *, minimum_norm: bool) -> Any:
        """The search is all that comes before the first right-hand side."""
        cgls = CGLS(max_iterations=self.iterations, callback=self.step)
        factors = cgls.prepare(system, minimum_norm=minimum_norm)
        self.phase[0] = _SOLVE
        return factors

    def step(self, iteration: int, gradient: float) -> None:
        """Called after each iteration; a run begins at 1."""
        if iteration == 1:
            self.runs.append((self.phase[0], []))
        self.runs[-1][1].append(gradient)
        self.progress.step(iteration, gradient)


def pattern_image(indices: Tensor, shape: tuple[int, int], cells: int = _CELLS) -> np.ndarray:
    """The share of stored positions in each cell of a grid that is laid over the matrix, NaN where there is none.

    No cell is smaller than a position. Shares rather than counts, since not all cells are of the same size.
    """
    sizes = [max(1, min(size, cells)) for size in shape]
    place = [(index.numpy() * k) // max(1, size) for index, k, size in zip(indices, sizes, shape, strict=True)]
    counts = np.bincount(place[0] * sizes[1] + place[1], minlength=sizes[0] * sizes[1]).reshape(sizes).astype(float)
    # Position i lies in cell i k // size, so cell j begins at the least such i.
    edges = [-(-np.arange(k + 1) * size // k) for k, size in zip(sizes, shape, strict=True)]
    image = counts / np.maximum(1, np.outer(*(np.diff(edge) for edge in edges)))
    image[counts == 0] = np.nan
    return image


def _draw_pattern(figure: Any, axes: Any, A: SparseMatrix) -> None:
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.ticker import MaxNLocator

    m, n = A.shape
    image = pattern_image(A.pattern.indices, A.shape)
    exact = max(m, n) <= _CELLS
    low, high = (float(np.nanmin(image)), float(np.nanmax(image))) if A.nnz else (1.0, 1.0)
    blues = ListedColormap(_blues())
    # An image, also in an SVG: a marker for each entry would make a file that nothing opens.
    shown = axes.imshow(
        image,
        cmap=blues,
        norm=LogNorm(min(low, high / 10), high),
        extent=(0, max(1, n), max(1, m), 0),
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_box_aspect(_aspect(A))
    axes.set(xlabel="column", ylabel="row", xlim=(0, max(1, n)), ylim=(max(1, m), 0))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    density = 100 * A.nnz / max(1, m * n)
    axes.set_title(f"{m:,} x {n:,}, {A.nnz:,} entries, density {density:.2g} %", fontsize="medium")
    if not exact:
        rows, columns = (math.ceil(size / cells) for size, cells in zip(A.shape, image.shape, strict=True))
        figure.colorbar(shown, ax=axes, label=f"share stored, in cells of up to {rows:,} x {columns:,}", shrink=0.8)


def _aspect(A: SparseMatrix) -> float:
    """Height by width of the picture: that of the matrix, unless it is too long to be seen."""
    return min(max(A.shape[0] / max(1, A.shape[1]), 0.75), 1.6)


def _blues() -> Any:
    """Without the palest: a lone entry must show on white."""
    from matplotlib import colormaps

    return colormaps["Blues"](np.linspace(0.4, 1, 256))


def _draw_history(axes: Any, history: _Watched, told: dict[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    first, seen = 1, set()
    marker = "." if told["iterations"] <= 100 else ""
    for phase, gradients in history.runs:
        label = None if phase in seen else phase
        seen.add(phase)
        steps, sizes = np.arange(first, first + len(gradients)), np.array(gradients)
        axes.plot(steps, np.where(sizes > 0, sizes, np.nan), color=_COLOURS[phase], marker=marker, label=label)
        first += len(gradients)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    scaled = "columns" if told["rows"] >= told["columns"] else "rows"
    axes.set(xlabel="iteration, all runs one after another", ylabel=f"norm of the gradient, {scaled} scaled")
    axes.grid(alpha=0.3)
    if seen:
        axes.legend()
    error, condition = _figures(told)
    known = f"estimated forward error {error}, " if math.isfinite(told["forward_error"]) else ""
    axes.set_title(f"{told['status']}: {known}condition {condition}", fontsize="medium")


def _save(figure: Any, name: str, kind: str) -> None:
    from matplotlib import rc_context

    # Text as text, and nothing that differs from one run to the next.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "functional_lstsq"}):
        metadata = {"Date": None} if kind == "svg" else None
        save(name, lambda file: figure.savefig(file, format=kind, dpi=150, metadata=metadata))
