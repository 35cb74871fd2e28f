"""`lstsq` and `solve`: from A, b, damp and weights to the augmented system, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from .augmented import solve_augmented
from .holder import name_of
from .layouts import LAYOUTS
from .matrix import DTYPES, SparseMatrix, single
from .matrix_free import solve_matrix_free
from .operator import LinearOperator
from .products import sample
from .result import Report, Solution, SolveInfo
from .solvers import CGLS, Auto
from .transforms import concrete, is_traced, prepare_compiler


def lstsq(
    A: SparseMatrix | LinearOperator | Tensor,
    b: Tensor,
    *,
    damp: float | Tensor | None = None,
    weights: Tensor | None = None,
    solver: Any = None,
    rank_deficient: str = "raise",
    refine: str = "auto",
    x0: Tensor | None = None,
) -> Tensor:
    """The least-squares solution of A x = b for a sparse A, differentiable to any order by everything it is given.

    Minimises sum_i weights_i |b - A x|_i^2 + damp^2 |x|^2 over x. Where A has fewer rows than columns and there is no
    damping, x is the solution of least norm. Composes with every transformation of torch.func: gradients with
    respect to A are values at its stored entries only.

    Args:
        A: (m, n) SparseMatrix, or torch sparse COO (coalesced or not), CSR or CSC tensor, of full rank; or a
            LinearOperator, which is solved by `CGLS`, with unscaled columns and rank_deficient="raise".
        b: (m,) or (m, k); every column is a problem of its own. Dtypes of A and b are promoted as in A @ b.
        damp: non-negative number or 0-d real tensor, in units of A; None for no damping.
        weights: (m,) non-negative real tensor, in units of 1 / variance of b; None for ones. A row of weight 0 is left
            out; the derivative by a weight that is 0 is NaN. (A wide A that loses a row has no full rank: see
            rank_deficient.)
        solver: `Dense()`, `Direct()`, `CGLS()`, or another solver object; None is `Auto()`, which chooses by predicted
            cost and moves on where a method has no answer that is accepted.
        rank_deficient: "raise", or "minimum_norm" for A^+ b, with the derivatives for changes that keep the rank.
        refine: "auto" takes residuals in about twice double precision where rounding would make errors above 1e-11
            (1e-9 with `CGLS`); "extended" always does. Errors then are of the size of rounding x itself while the
            condition number is below about 1e13, unless there are weights: rounding of weighted values stays.
        x0: (n,) or (n, k) as x, where iterating starts: the last solution of a training loop, say. It saves time and
            changes neither what is accepted nor any derivative; none flows through it. Only `CGLS` makes use of it,
            for m >= n.

    Returns:
        x: (n,) or (n, k).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or with NaN or infinity in it.
        RankDeficientError: A has no full rank (a `torch.linalg.LinAlgError`).
        ConvergenceError: the estimated forward error of x, or of the residual, is above eps^(1/3) of the dtype, or that
            of a gradient by A is (a `torch.linalg.LinAlgError`). Errors are relative, except where the whole of x is
            below eps^(1/3) |b| / |A|, columns scaled, as for b orthogonal to the range: there an error of
            eps^(2/3) |b| / |A| is accepted.

    Cost: one solve, factorisation included; each derivative costs one further solve that reuses the factorisation, up
    to six where rank_deficient="minimum_norm".
    All arithmetic of a solve is in double precision; results are rounded to the dtype of the input.

    Source: the augmented system (Björck, Numerical Methods for Least Squares Problems, SIAM 1996, section 2.1);
    derivatives of the pseudoinverse by Golub and Pereyra, SIAM J. Numer. Anal. 10(2), 1973.

    >>> import functional_lstsq as fl
    >>> pattern = fl.SparsePattern(torch.tensor([[0, 1, 2, 2], [0, 1, 0, 1]]), (3, 2))
    >>> values = torch.tensor([1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    >>> b = torch.tensor([1.0, 2.0, 3.5], dtype=torch.float64)
    >>> fl.lstsq(fl.SparseMatrix(values, pattern), b)
    tensor([0.1667, 2.8333], dtype=torch.float64)
    >>> torch.func.jacrev(lambda b: fl.lstsq(fl.SparseMatrix(values, pattern), b))(b)
    tensor([[ 0.6667,  0.3333, -0.3333],
            [ 0.3333,  0.6667,  0.3333]], dtype=torch.float64)
    """
    problem = pose(A, b, damp, weights, solver, rank_deficient, refine, x0)
    r, x, _ = run(problem, "raise")
    return shaped(r if problem.wide else x, problem).to(problem.dtype)


def solve(
    A: SparseMatrix | LinearOperator | Tensor,
    b: Tensor,
    *,
    damp: float | Tensor | None = None,
    weights: Tensor | None = None,
    solver: Any = None,
    rank_deficient: str = "raise",
    refine: str = "auto",
    x0: Tensor | None = None,
    throw: bool = True,
) -> Solution:
    """Like `lstsq`, with the residual and with what is known of the solution.

    Args:
        throw: False returns what was reached instead of raising; `info.status` tells. Where there is no solution (rank
            deficient) x is NaN, and so are derivatives through a column that failed.
        The others are those of `lstsq`.

    Returns:
        `Solution(x, residual, info)`: x (n,) or (n, k), residual b - A x (m,) or (m, k), both differentiable, and a
        `SolveInfo`, which is not.

    Raises, cost and source: as `lstsq`; the residual is free where m >= n and there are no weights.

    >>> import functional_lstsq as fl
    >>> A = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]], dtype=torch.float64).to_sparse_csr()
    >>> solution = fl.solve(A, torch.tensor([1.0, 2.0, 3.5], dtype=torch.float64))
    >>> solution.residual
    tensor([ 0.8333, -0.8333,  0.8333], dtype=torch.float64)
    >>> solution.info.status, bool(solution.info.forward_error < 1e-14)
    ('converged', True)
    """
    problem = pose(A, b, damp, weights, solver, rank_deficient, refine, x0)
    r, x, numbers = run(problem, "raise" if throw else "return")
    report = Report(*(shaped(numbers[:, i, None], problem, 0) for i in range(len(Report._fields))))
    info = SolveInfo(
        status_code=report.status.to(torch.int64),
        method_code=report.method.to(torch.int64),
        iterations=report.iterations.to(torch.int64),
        optimality=report.optimality,
        forward_error=report.residual_error if problem.wide else report.solution_error,
        condition=report.condition,
        rank=report.rank.to(torch.int64),
        norm=report.norm,
        tried_code=report.tried.to(torch.int64),
        ticket=report.ticket.to(torch.int64),
    )
    solution = shaped(r if problem.wide else x, problem)
    is_residual = not problem.wide and weights is None
    residual = shaped(r, problem) if is_residual else problem.b - problem.A.matmul(solution)
    return Solution(solution.to(problem.dtype), residual.to(problem.dtype), info)


class _Problem(NamedTuple):
    """Checked arguments, in double precision, and the dtype of the results."""

    A: SparseMatrix | LinearOperator
    shape: tuple[int, int]
    b: Tensor
    damp: Tensor | None
    weights: Tensor | None
    settings: str
    dtype: torch.dtype
    x0: Tensor | None

    @property
    def wide(self) -> bool:
        return self.shape[0] < self.shape[1]


def run(problem: _Problem, on_failure: str, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(r, x, report) of K (r, x) = (b, c); of A^H in A's place and (0, b) where A is wide: there r is the solution."""
    A, (m, n), b, damp, weights, settings, _, x0 = problem
    columns = b[None] if b.ndim == 2 else b[None, :, None]
    damp = None if damp is None else damp[None]
    start = None if x0 is None or problem.wide else x0[None] if x0.ndim == 2 else x0[None, :, None]
    if isinstance(A, LinearOperator):
        if weights is not None:
            root = weights.sqrt()
            A, columns = A.weighted(root), root.to(columns.dtype)[None, :, None] * columns
        return solve_matrix_free(A, m, n, damp, columns, start, settings, on_failure)
    pattern, values = A.pattern, A.values
    if weights is not None:
        root = weights.sqrt().to(values.dtype)[None, :, None]
        ones = values.new_ones((1, pattern.shape[1], 1))
        values = values * sample(root, ones, pattern.indices, *pattern.shape)[0]  # root[i_k]
        columns = root * columns
    if not problem.wide:
        return solve_augmented(values[None], damp, columns, c, pattern.indices, m, n, settings, on_failure, start)
    values = torch.conj_physical(values)
    return solve_augmented(values[None], damp, None, columns, pattern.T.indices, n, m, settings, on_failure)


def shaped(columns: Tensor, problem: _Problem, single_dims: int = 1) -> Tensor:
    """(1, rows, k) -> (rows, k) or (rows,); (1, 1, k) -> (k,) or () for numbers of columns."""
    columns = columns[0]
    if problem.b.ndim == 1:
        columns = columns[:, 0]
    return columns if single_dims else columns[0]


def pose(A, b, damp, weights, solver, rank_deficient, refine, x0) -> _Problem:
    """Check every argument before any work; one clear error each."""
    if torch.compiler.is_compiling():
        prepare_compiler()
    if isinstance(A, Tensor) and A.layout in LAYOUTS:
        A = SparseMatrix.from_torch(A)
    if not isinstance(A, (SparseMatrix, LinearOperator)):
        got = type(A).__name__
        if isinstance(A, Tensor):
            got = f"a dense tensor of shape {tuple(A.shape)}" if A.layout == torch.strided else f"layout {A.layout}"
        raise TypeError(
            f"A must be a SparseMatrix, a LinearOperator or a torch sparse COO, CSR or CSC tensor, got {got}"
        )
    if isinstance(A, LinearOperator):
        solver = _of_operator(solver, rank_deficient, refine)
        numbers = torch_pytree.tree_leaves(A.params)
        A, (m, n) = A.closed()
    else:
        single(A, "A")
        numbers, (m, n) = [A.values], A.shape
    if not isinstance(b, Tensor) or b.layout != torch.strided:
        got = f"layout {b.layout}" if isinstance(b, Tensor) else type(b).__name__
        raise TypeError(f"b must be a dense tensor of shape ({m},) or ({m}, k), got {got}")
    if b.ndim not in (1, 2) or b.shape[0] != m:
        hint = "; for a batch of right-hand sides use torch.vmap, or columns" if b.ndim > 2 else ""
        raise ValueError(f"b must have shape ({m},) or ({m}, k) for A of shape {(m, n)}, got {tuple(b.shape)}{hint}")
    if b.device != A.device:
        raise ValueError(f"b is on {b.device}, A is on {A.device}")
    dtype = torch.promote_types(A.dtype, b.dtype)
    coarse = (b.is_floating_point() or b.is_complex()) and b.dtype not in DTYPES
    if A.dtype not in DTYPES or coarse:
        raise TypeError(f"A and b must be float32, float64, complex64 or complex128, got {A.dtype} and {b.dtype}")
    real = torch.float64
    if damp is not None:
        if isinstance(damp, Tensor) and damp.ndim == 0 and not damp.is_complex():
            damp = damp.to(device=A.device, dtype=real)
        elif isinstance(damp, (int, float)) and not isinstance(damp, bool):
            damp = torch.zeros((), dtype=real, device=A.device) + damp  # torch.full is compiled anew for each number
        else:
            got = f"shape {tuple(damp.shape)}, {damp.dtype}" if isinstance(damp, Tensor) else repr(damp)
            raise TypeError(f"damp must be a non-negative number or a 0-d real tensor, got {got}")
    if weights is not None:
        if not isinstance(weights, Tensor) or weights.is_complex():
            got = str(weights.dtype) if isinstance(weights, Tensor) else type(weights).__name__
            raise TypeError(f"weights must be a real tensor of shape ({m},), got {got}")
        if weights.shape != (m,):
            raise ValueError(f"weights must have shape ({m},), one for each row of A, got {tuple(weights.shape)}")
        weights = weights.to(device=A.device, dtype=real)
    if isinstance(solver, type) or (solver is not None and not callable(getattr(solver, "prepare", None))):
        raise TypeError(f"solver must be None or a solver such as Dense() or CGLS(), got {solver!r}")
    if type(solver).__hash__ is None:
        raise TypeError(f"solver must be hashable, a frozen dataclass for example, got {solver!r}")
    if rank_deficient not in ("raise", "minimum_norm"):
        raise ValueError(f"rank_deficient must be 'raise' or 'minimum_norm', got {rank_deficient!r}")
    if x0 is not None:
        wanted = (n, *b.shape[1:])
        if not isinstance(x0, Tensor) or x0.layout != torch.strided:
            raise TypeError(f"x0 must be a dense tensor of shape {wanted}, got {type(x0).__name__}")
        if x0.shape != wanted:
            raise ValueError(f"x0 must have the shape of x, {wanted}, got {tuple(x0.shape)}")
        if x0.device != A.device or torch.promote_types(x0.dtype, dtype) != dtype:
            raise ValueError(f"x0 must be {dtype} on {A.device}, got {x0.dtype} on {x0.device}")
    for name, tensor in (*(("A", t) for t in numbers), ("b", b), ("damp", damp), ("weights", weights), ("x0", x0)):
        _check_numbers(name, tensor)
    if refine not in ("auto", "extended"):
        raise ValueError(f"refine must be 'auto' or 'extended', got {refine!r}")
    settings = name_of(
        solver,
        minimum_norm=rank_deficient == "minimum_norm",
        precision=torch.finfo(dtype).eps,
        extended=refine == "extended",
        exact=weights is None,
        wide=True if m < n else False,  # noqa: SIM210 (to Dynamo, whose sizes are symbols, a constant)
        keep=torch.compiler.is_compiling(),
    )
    double = torch.promote_types(dtype, torch.float64)
    A = A.double(double) if isinstance(A, LinearOperator) else SparseMatrix(A.values.to(double), A.pattern)
    x0 = None if x0 is None else x0.detach().to(double)
    return _Problem(A, (m, n), b.to(double), damp, weights, settings, dtype, x0)


def _of_operator(solver: Any, rank_deficient: str, refine: str) -> CGLS:
    """The solver for a LinearOperator, whose entries are not known."""
    if torch.compiler.is_compiling():
        raise TypeError("torch.compile cannot take a LinearOperator; compile what makes its parameters")
    if solver is None or isinstance(solver, Auto):
        solver = CGLS() if solver is None else solver.cgls
    if not isinstance(solver, CGLS):
        raise TypeError(f"solver must be CGLS() or None for a LinearOperator, got {solver!r}")
    if rank_deficient == "minimum_norm" or refine == "extended":
        got = "refine='extended'" if refine == "extended" else "rank_deficient='minimum_norm'"
        raise ValueError(f"a LinearOperator allows no {got}, which needs the entries of A")
    return solver


def _check_numbers(name: str, tensor: Tensor | None) -> None:
    if tensor is None or is_traced(tensor) or not tensor.numel():
        return
    numbers = concrete(tensor)
    # A sum needs no temporary; of large finite numbers it may still overflow.
    if not bool(torch.isfinite(numbers.sum())) and not bool(torch.isfinite(numbers).all()):
        what = "NaN" if bool(torch.isnan(numbers).any()) else "infinity"
        raise ValueError(f"{name} must be finite, got {what} in it")
    if name in ("damp", "weights") and bool((numbers < 0).any()):
        raise ValueError(f"{name} must not be negative, got {float(numbers.min()):g}")
