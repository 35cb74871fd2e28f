"""Pictures: `fl.plot.pattern`, `convergence`, `leverage`, `residuals`, `weakest` and `jacobian`.

Each is one call that draws into matplotlib axes and returns them: those given as `ax`, or new ones of pyplot. Colours
of text and ground are those of the style in use, light or dark. It takes the extra `plot`:
`pip install 'functional-lstsq[plot]'`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .diagnostics import leverage as leverage_of
from .lstsq import solve
from .plot_parts import axes_of, draw_image, pattern_image, show_whole
from .result import Solution, SolveInfo
from .solvers import CGLS
from .solvers.watching import Step, progress
from .sparse.matrix import SparseMatrix, single
from .sparse.pattern import SparsePattern
from .weak_directions import weakest as weakest_of

__all__ = ["convergence", "jacobian", "leverage", "pattern", "residuals", "weakest"]
_SEARCH, _SOLVE = "search for the weakest direction", "solution and its corrections"
_COLOURS = {_SEARCH: "tab:orange", _SOLVE: "tab:blue"}
_MARKED = 2000  # points above which each is drawn as a pixel
_ROWS = 300  # unknowns whose derivatives are drawn at most, evenly chosen


def pattern(A: SparseMatrix | SparsePattern | Tensor, ax: Any = None) -> Any:
    """Where the entries are; of a large matrix which share of each cell of a grid of 300 x 300 is stored.

    Args:
        A: SparseMatrix (values, and a batch of them, do not matter), SparsePattern or torch sparse tensor.
        ax: axes of matplotlib; None for new ones.

    Returns:
        The axes.

    Raises:
        TypeError: A is of another type.
        ImportError: matplotlib is not there.

    >>> import torch, functional_lstsq as fl
    >>> fl.plot.pattern(fl.eye(5)).get_title()
    '5 x 5, 5 entries, density 20 %'
    """
    if isinstance(A, Tensor):
        A = SparseMatrix.from_torch(A)
    where = A.pattern if isinstance(A, SparseMatrix) else A
    if not isinstance(where, SparsePattern):
        raise TypeError(f"A must be a SparseMatrix, SparsePattern or torch sparse tensor, got {type(A).__name__}")
    ax, (m, n) = axes_of(ax), where.shape
    image = pattern_image(where.indices.cpu(), where.shape)
    exact = image.shape == (max(1, m), max(1, n))
    label = ""
    if not exact:
        rows, columns = (math.ceil(size / cells) for size, cells in zip(where.shape, image.shape, strict=True))
        label = f"share stored, in cells of up to {rows:,} x {columns:,}"
    draw_image(ax, image, (m, n), label)
    ax.set_box_aspect(min(max(m / max(1, n), 0.75), 1.6))  # that of the matrix, unless it is too long to be seen
    ax.set(xlabel="column", ylabel="row")
    density = 100 * where.nnz / max(1, m * n)
    ax.set_title(f"{m:,} x {n:,}, {where.nnz:,} entries, density {density:.2g} %", fontsize="medium")
    return ax


class History:
    """The gradients of a solve by conjugate gradients, first those of the search; to be called by `progress`."""

    def __init__(self, show: Callable[[Step], object] | None = None):
        self.show, self.phases = show, {_SEARCH: list[float](), _SOLVE: list[float]()}

    def __call__(self, step: Step) -> None:
        self.phases[_SEARCH if step.phase == "search" else _SOLVE].append(step.error)
        if self.show is not None:
            self.show(step)

    @property
    def iterations(self) -> int:
        """Of both phases."""
        return sum(map(len, self.phases.values()))


def convergence(A: SparseMatrix | Tensor, b: Tensor, ax: Any = None, *, iterations: int = 2000, **options: Any) -> Any:
    """How conjugate gradients converge on A x = b: the norm of the gradient by iteration, the search for the weakest
    direction first, which tells how far a gradient may be trusted.

    Args:
        A, b: as in `solve`.
        ax: axes of matplotlib; None for new ones.
        iterations: of a run, at most.
        options: `damp` and `weights` of `solve`.

    Returns, raises: as `pattern`, and as `solve` for bad arguments; a run that does not converge is drawn.

    Cost: one solve by `CGLS`.

    >>> import torch, functional_lstsq as fl
    >>> fl.plot.convergence(fl.vstack([fl.eye(3), fl.eye(3)]), torch.ones(6)).get_yscale()
    'log'
    """
    history, ax = History(), axes_of(ax)
    with progress(history):
        info = solve(A, b, solver=CGLS(max_iterations=iterations), throw=False, **options).info
    return draw_history(ax, history, info, "columns" if A.shape[0] >= A.shape[1] else "rows")


def draw_history(ax: Any, history: History, info: SolveInfo, scaled: str) -> Any:
    """The gradients of all runs, one after another; what is known of the solution in the title."""
    first, marker = 1, "." if history.iterations <= 100 else ""
    for phase, gradients in history.phases.items():
        if gradients:
            steps, sizes = np.arange(first, first + len(gradients)), np.array(gradients)
            ax.plot(steps, np.where(sizes > 0, sizes, np.nan), color=_COLOURS[phase], marker=marker, label=phase)
        first += len(gradients)
    ax.set_yscale("log")
    ax.set(xlabel="iteration, all runs one after another", ylabel=f"norm of the gradient, {scaled} scaled")
    ax.grid(alpha=0.3)
    if history.iterations:
        ax.legend()
    error, condition = in_words(info)
    known = "" if error == "not known" else f"estimated forward error {error}, "
    ax.set_title(f"{info.status}: {known}condition {condition}", fontsize="medium")
    return ax


def in_words(info: SolveInfo) -> tuple[str, str]:
    """The estimated error and the condition number of the worst column, in words where they are not known."""
    error, condition = (float(t.max()) if t.numel() else 0.0 for t in (info.forward_error, info.condition))
    more = "" if info.status == "converged" else " or more"
    return (
        f"{error:.1e}" if math.isfinite(error) else "not known",
        f"{condition:.1e}{more}" if math.isfinite(condition) else "infinite",
    )


def _points(ax: Any, numbers: Tensor) -> None:
    y = numbers.detach().cpu().numpy()
    marker, size = ("o", 3) if len(y) <= _MARKED else (",", 1)
    ax.plot(np.arange(len(y)), y, linestyle="", marker=marker, markersize=size, color="tab:blue")
    ax.set_xlabel("row")
    ax.grid(alpha=0.3)


def leverage(A: SparseMatrix | Tensor, weights: Tensor | None = None, ax: Any = None, **options: Any) -> Any:
    """The leverage of each row, with a line at twice the mean, beyond which rows are worth a look.

    Args:
        A, weights, options: as in `leverage`; `samples=64` is quick for large problems.
        ax: axes of matplotlib; None for new ones.

    Returns, raises: as `pattern` and `leverage`. Cost: as `leverage`. Source: Hoaglin and Welsch, The American
    Statistician 32(1), 1978, for twice the mean.

    >>> import torch, functional_lstsq as fl
    >>> fl.plot.leverage(fl.vstack([fl.eye(3), fl.eye(3)])).get_ylabel()
    'leverage'
    """
    ax, found = axes_of(ax), leverage_of(A, weights, **options)
    _points(ax, found)
    high = 2 * A.shape[1] / max(1, A.shape[0])
    count = int((found > high).sum())
    if high < 1:
        ax.axhline(high, color="tab:orange", label=f"twice the mean, {high:.2g}: {count} rows above")
        ax.legend()
    ax.set(ylabel="leverage", ylim=(min(0.0, float(found.min()) if len(found) else 0.0), 1.02))
    ax.set_title(f"{A.shape[0]:,} rows, {A.shape[1]:,} unknowns", fontsize="medium")
    return ax


def residuals(solution: Solution | Tensor, weights: Tensor | None = None, ax: Any = None) -> Any:
    """The residual of each row, times the square root of its weight, with lines at 3 robust standard deviations.

    Args:
        solution: what `solve` gave for b of shape (m,), or a residual (m,), real.
        weights: (m,), those of the solve; None for ones. Rows of infinite weight are left out.
        ax: axes of matplotlib; None for new ones.

    Returns, raises: as `pattern`; TypeError or ValueError for a residual of another kind or shape. The standard
    deviation is 1.4826 times the median of absolute values (Huber and Ronchetti, Robust Statistics, Wiley 2009).

    >>> import torch, functional_lstsq as fl
    >>> fl.plot.residuals(torch.tensor([0.1, -0.2, 0.1, 3.0])).get_legend().get_texts()[0].get_text()
    '3 robust standard deviations, 0.44: 1 row beyond'
    """
    r = solution.residual if isinstance(solution, Solution) else solution
    if not isinstance(r, Tensor) or r.is_complex():
        raise TypeError(f"solution must be a Solution or a real tensor, got {type(solution).__name__}")
    if r.ndim != 1:
        raise ValueError(f"solution must have a residual of shape (m,), got {tuple(r.shape)}")
    if weights is not None:
        if not isinstance(weights, Tensor) or weights.shape != r.shape:
            got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(f"weights must be a tensor of shape {tuple(r.shape)}, got {got}")
        r = torch.where(weights.isinf(), torch.nan, r * weights.sqrt())
    ax, known = axes_of(ax), r[r.isfinite()]
    _points(ax, r)
    if known.numel():
        limit = 3 * 1.4826 * float(known.abs().median())
        count = int((known.abs() > limit).sum())
        rows = "1 row" if count == 1 else f"{count} rows"
        told = f"3 robust standard deviations, {limit:.2g}: {rows} beyond"
        ax.axhline(limit, color="tab:orange", label=told)
        ax.axhline(-limit, color="tab:orange")
        if float(known.abs().max()) > 10 * limit > 0:  # else outliers would leave nothing to be seen of the others
            ax.set_yscale("symlog", linthresh=limit)
        ax.legend()
    ax.set_ylabel("residual" if weights is None else "residual, weighted")
    return ax


def weakest(A: SparseMatrix | Tensor, k: int = 6, ax: Any = None) -> Any:
    """Which unknowns take part in the k weakest directions of A: sizes of the entries of each singular vector.

    Args:
        A: as in `weakest`.
        k: how many directions, at most the number of columns.
        ax: axes of matplotlib; None for new ones.

    Returns, raises, cost: as `pattern` and `weakest`.

    >>> import torch, functional_lstsq as fl
    >>> fl.plot.weakest(fl.diags(torch.tensor([1.0, 0.1, 10.0])), 2).get_yticklabels()[0].get_text()
    '0.1'
    """
    ax, (values, vectors) = axes_of(ax), weakest_of(A, min(k, A.shape[1]) if isinstance(k, int) else k)
    size = vectors.detach().abs().T.cpu()
    draw_image(ax, show_whole(size), (size.shape[0], size.shape[1]), "size in the direction", linear=True)
    ax.set_yticks(np.arange(len(values)) + 0.5, [f"{value:.2g}" for value in values.tolist()])
    ax.set(xlabel="unknown", ylabel="singular value")
    return ax


def jacobian(A: SparseMatrix, b: Tensor, ax: Any = None, **options: Any) -> Any:
    """How each unknown of lstsq(A, b) moves with each entry of A: sizes of d x / d values.

    Args:
        A: (m, n) SparseMatrix.
        b: (m,).
        ax: axes of matplotlib; None for new ones.
        options: those of `lstsq`.

    Returns, raises: as `pattern` and `jacobian_operator`. Of more than 300 unknowns 300 are drawn, evenly chosen; of
    entries the largest of each cell.

    Cost: two solves with one factorisation, with a column for each unknown that is drawn; memory for 300 rows of the
    Jacobian.

    >>> import torch, functional_lstsq as fl
    >>> fl.plot.jacobian(fl.vstack([fl.eye(3), fl.eye(3)]), torch.arange(6.0)).get_xlabel()
    'entry of A'
    """
    from .sensitivity import jacobian_operator

    single(A, "A")
    J, n = jacobian_operator(A, b, **options), A.shape[1]
    chosen = torch.linspace(0, max(0, n - 1), min(n, _ROWS), dtype=torch.float64).round().long()
    units = torch.zeros(n, len(chosen), dtype=J.dtype, device=A.device)
    units[chosen.to(A.device), torch.arange(len(chosen), device=A.device)] = 1.0
    size = J.adjoint(units).detach().abs().T.cpu()
    ax = axes_of(ax)
    draw_image(ax, show_whole(size), (n, A.nnz), "|d x / d entry|")
    ax.set(xlabel="entry of A", ylabel="unknown")
    return ax


def __dir__() -> list[str]:
    return __all__
