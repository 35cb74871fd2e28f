"""What `lstsq` and `solve` are asked, checked: one clear error for every bad argument, before any work."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from ..solvers import CGLS, Auto, BlockJacobi
from ..solvers.system import check_number
from ..sparse.matrix import DTYPES, SparseMatrix, single
from ..sparse.operator import LinearOperator
from ..sparse.precision import convert
from ..torch_func.cores import quiet
from ..torch_func.layouts import LAYOUTS
from ..torch_func.tracing import concrete, is_dtensor, is_traced, prepare_compiler, refuse_recording, told
from .factorization import Factorization
from .settings import Settings, check_solver, stops_early, text_for_graph

# Above it a truncated problem, whose solution is none of A's normal equations, would have to take the place of A x = b.
_LARGEST_TOLERANCE = 1e-6


_FEW = 128  # columns with which a tall system takes no time to speak of
_LEAST_DAMPING = 1e-6  # in units of the largest entry of A, which bounds the condition number of the tall system


class Problem(NamedTuple):
    """Checked arguments, in double precision, and the dtype of the results."""

    A: SparseMatrix | LinearOperator
    shape: tuple[int, int]
    b: Tensor
    damp: Tensor | None
    weights: Tensor | None
    settings: Settings | str  # its text while a graph is being compiled
    dtype: torch.dtype
    x0: Tensor | None
    on_failure: str
    stops: bool  # short of the solution, as asked
    kept: Tensor | None = None  # the token of factors that the user keeps

    @property
    def wide(self) -> bool:
        """Whether A^H stands in A's place: not beside a damping of each unknown, since [A; D] is tall.

        Iterates of CGLS are not those of A^H.
        """
        return is_wide(self.shape, self.damp) and not self.stops


def is_wide(shape: tuple[int, int], damp: Tensor | None) -> bool:
    return shape[0] < shape[1] and (damp is None or damp.ndim == 0)


def pose(
    A, b, damp, weights, robust, solver, rank_deficient, refine, x0,
    *, rank_tolerance: Any = None, throw: bool = True, bounds: Any = None, of: str | None = None, part: bool = False,
) -> Problem:  # fmt: skip
    """Check every argument before any work; one clear error each.

    Args:
        of: as in `Settings`.
        part: A has some of the rows of a matrix.
    """
    on_failure, kept = "raise" if throw else "nan", None
    if torch.compiler.is_compiling():
        prepare_compiler()
    if isinstance(A, Tensor) and A.layout in LAYOUTS:
        A = SparseMatrix.from_torch(A)
    if isinstance(A, Factorization):
        others = {"weights": weights, "solver": solver, "rank_tolerance": rank_tolerance}
        A.require_alone(rank_deficient, damp=damp, robust=robust, bounds=bounds, **others)
        A, damp, weights, solver, rank_deficient, rank_tolerance, kept = A.given
    if not isinstance(A, (SparseMatrix, LinearOperator)):
        _refuse_matrix(A)
    coarsest = torch.float64  # of what products of an operator work in
    if isinstance(A, LinearOperator):
        solver = _of_operator(solver, rank_deficient, refine)
        numbers, of_A = torch_pytree.tree_leaves(A.params), A.dtype
        of_b = b.dtype if isinstance(b, Tensor) and b.dtype in DTYPES else of_A
        coarsest = of_A if A.given is not None else coarsest
        A, (m, n) = A.posed(torch.promote_types(of_A, of_b), on_failure)
    else:
        single(A, "A")
        numbers, (m, n), of_A = [A.values], A.shape, A.dtype
    b = _right_hand_side(b, A, (m, n), of_A)
    dtype = torch.promote_types(of_A, b.dtype)
    damp, weights = _damping(damp, n, A.device, on_failure), _weights(weights, m, A.device, on_failure)
    check_solver(solver, "" if robust is None else "robust")
    stops = stops_early(solver)
    check_rank(rank_deficient, rank_tolerance)
    if x0 is not None:
        _check_start(x0, (n, *b.shape[1:]), dtype, A.device)
    for tensor in numbers:
        check_numbers("A", tensor)
    check_numbers("b", b)
    sparse = robust is None and not isinstance(A, LinearOperator)
    if damp is not None:
        check_numbers("damp", damp, infinite=sparse and damp.ndim == 1)
    if weights is not None:
        tall = m >= n or damp is not None or part
        check_numbers("weights", weights, infinite=sparse and tall and not stops)
    if x0 is not None:
        check_numbers("x0", x0)
    if refine not in ("auto", "extended"):
        raise ValueError(f"refine must be 'auto' or 'extended', got {refine!r}")
    if stops and refine == "extended":
        raise ValueError(f"refine='extended' needs a solution, and CGLS(steps={solver.steps}) stops short of it")
    if m < n and not part and robust is None and not stops and _is_better_tall(A, damp, weights):
        damp = damp.expand(n)
    wide = is_wide((m, n), damp) and not stops and not part
    make: Any = text_for_graph if torch.compiler.is_compiling() else Settings
    settings = make(
        told(solver) if torch.compiler.is_dynamo_compiling() else solver,
        minimum_norm=rank_deficient == "minimum_norm",
        precision=max(torch.finfo(dtype).eps, torch.finfo(coarsest).eps),
        extended=refine == "extended",
        exact=weights is None or (isinstance(A, SparseMatrix) and not wide),
        wide=True if wide else False,  # noqa: SIM210 (to Dynamo, whose sizes are symbols, a constant)
        tolerance=rank_tolerance,
        of=of or ("lstsq" if bounds is None else "bounds"),
    )
    if robust is not None and damp is not None and damp.ndim:
        raise ValueError(f"damp must be a number with robust, got shape {tuple(damp.shape)}")
    if robust is not None:
        _check_robust(A, b, m, n, refine)
    double = torch.promote_types(dtype, torch.float64)
    if isinstance(A, SparseMatrix):
        A = SparseMatrix(convert(A.values, double, "the derivative by A", on_failure), A.pattern)
    x0, b = None if x0 is None else x0.detach().to(double), convert(b, double, "the derivative by b", on_failure)
    return Problem(A, (m, n), b, damp, weights, settings, dtype, x0, on_failure, stops, kept)


def in_vectors(A: LinearOperator, b: Any, damp: Any, weights: Any, x0: Any, bounds: Any) -> tuple:
    """(A, b, damp, weights, x0, bounds) of vectors, for an operator whose x and b are pytrees."""
    assert A.trees is not None
    of_x, of_b = A.trees

    def of_each(given: Any, name: str) -> Any:
        number = given is None or isinstance(given, (int, float)) or (isinstance(given, Tensor) and not given.ndim)
        return given if number else of_x.vector(given, name)

    weights = None if weights is None else of_b.vector(weights, "weights")
    x0 = None if x0 is None else of_x.vector(x0, "x0")
    if isinstance(bounds, (tuple, list)) and len(bounds) == 2:
        bounds = of_each(bounds[0], "the lower bound"), of_each(bounds[1], "the upper bound")
    return A.of_vectors, of_b.vector(b, "b"), of_each(damp, "damp"), weights, x0, bounds


def _refuse_matrix(A: Any) -> NoReturn:
    got = type(A).__name__
    if isinstance(A, Tensor):
        got = f"a dense tensor of shape {tuple(A.shape)}" if A.layout == torch.strided else f"layout {A.layout}"
    raise TypeError(
        f"A must be a SparseMatrix, a LinearOperator or a torch sparse COO, CSR or CSC tensor, got {got}; "
        "A.to_sparse() makes one of a dense tensor, SparseMatrix.from_scipy(A) of a SciPy matrix"
    )


def _right_hand_side(b: Any, A: Any, shape: tuple[int, int], of_A: torch.dtype) -> Tensor:
    """b, if it is one for an A of this shape whose values are of the dtype `of_A`."""
    m, n = shape
    _require_here("b", b)
    if not isinstance(b, Tensor) or b.layout != torch.strided:
        got = f"layout {b.layout}" if isinstance(b, Tensor) else type(b).__name__
        hint = "; torch.from_numpy(b) or b.to_dense() makes one"
        raise TypeError(f"b must be a dense tensor of shape ({m},) or ({m}, k), got {got}{hint}")
    if b.ndim not in (1, 2) or b.shape[0] != m:
        hint = "; for a batch of right-hand sides use torch.vmap, or columns" if b.ndim > 2 else ""
        raise ValueError(f"b must have shape ({m},) or ({m}, k) for A of shape {(m, n)}, got {tuple(b.shape)}{hint}")
    if b.device != A.device:
        raise ValueError(f"b is on {b.device}, A is on {A.device}; A.to(device) moves values and pattern")
    if b.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(b.device.type):
        b = b.to(torch.float32)  # what a layer gives there, and torch.linalg takes so
    coarse = (b.is_floating_point() or b.is_complex()) and b.dtype not in DTYPES
    if of_A not in DTYPES or coarse:
        raise TypeError(f"A and b must be float32, float64, complex64 or complex128, got {of_A} and {b.dtype}")
    return b


def _require_here(name: str, t: Any) -> None:
    """Refuse a DTensor beside an A that is all here."""
    if is_dtensor(t):
        raise TypeError(
            f"{name} must be a Tensor, got a DTensor, whose rows are on many ranks: it goes with an A that is "
            "functional_lstsq.distributed.shard_rows(A), of the rows that each rank has"
        )


def _damping(damp: Any, n: int, device: torch.device, on_failure: str) -> Tensor | None:
    """damp, a number or one for each of n unknowns, in double precision."""
    if damp is None:
        return None
    real_tensor = isinstance(damp, Tensor) and not damp.is_complex()
    if real_tensor and damp.ndim == 1 and damp.shape != (n,):
        raise ValueError(f"damp must be a number or of shape ({n},), one for each unknown, got {tuple(damp.shape)}")
    if real_tensor and damp.ndim <= 1:
        return convert(damp.to(device), torch.float64, "the derivative by damp", on_failure)
    if isinstance(damp, (int, float)) and not isinstance(damp, bool):
        # torch.full is compiled anew for each number.
        return torch.zeros((), dtype=torch.float64, device=device) + damp
    got = f"shape {tuple(damp.shape)}, {damp.dtype}" if isinstance(damp, Tensor) else repr(damp)
    raise TypeError(f"damp must be a non-negative number or a real tensor of shape () or ({n},), got {got}")


def _weights(weights: Any, m: int, device: torch.device, on_failure: str) -> Tensor | None:
    """weights, one for each of m rows, in double precision."""
    if weights is None:
        return None
    _require_here("weights", weights)
    if not isinstance(weights, Tensor) or weights.is_complex():
        got = str(weights.dtype) if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights must be a real tensor of shape ({m},), got {got}")
    if weights.shape != (m,):
        raise ValueError(f"weights must have shape ({m},), one for each row of A, got {tuple(weights.shape)}")
    return convert(weights.to(device), torch.float64, "the derivative by weights", on_failure)


def _is_better_tall(A: SparseMatrix | LinearOperator, damp: Tensor | None, weights: Tensor | None) -> bool:
    """Whether a wide A with weights and one damping is better solved as the tall [A; d] than by A^H.

    There each row has a damping d / sqrt(weight), rounded, and infinite where a weight is zero, by which it has no
    derivative. It takes as much less time as A is wide, and a small damping has no effect on its condition number.
    """
    if damp is None or damp.ndim or weights is None:
        return False
    if isinstance(A, LinearOperator) and is_traced(damp):
        raise TypeError(
            "torch.compile cannot take weights of a wide LinearOperator with one damping; it takes a damp of shape "
            f"({A.in_size},), one for each unknown: damp.expand({A.in_size})"
        )
    if isinstance(A, LinearOperator):
        return bool((concrete(damp) > 0).all()) and bool((concrete(weights) == 0).any())
    if not A.pattern.nnz or is_traced(damp) or is_traced(weights) or is_traced(A.values):
        return False
    least = _LEAST_DAMPING * concrete(A.values).abs().max()
    small = A.shape[1] <= _FEW or bool((concrete(weights) == 0).any())
    return small and bool((concrete(damp) > least).all())


def _check_start(x0: Any, wanted: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(x0, Tensor) or x0.layout != torch.strided:
        raise TypeError(f"x0 must be a dense tensor of shape {wanted}, got {type(x0).__name__}")
    if x0.shape != wanted:
        raise ValueError(f"x0 must have the shape of x, {wanted}, got {tuple(x0.shape)}")
    if x0.device != device or torch.promote_types(x0.dtype, dtype) != dtype:
        raise ValueError(f"x0 must be {dtype} on {device}, got {x0.dtype} on {x0.device}")


def _of_operator(solver: Any, rank_deficient: str, refine: str) -> CGLS:
    """The solver for a LinearOperator, whose entries are not known."""
    if solver is None or isinstance(solver, Auto):
        solver = CGLS() if solver is None else solver.cgls
    if not isinstance(solver, CGLS):
        raise TypeError(f"solver must be CGLS() or None for a LinearOperator, got {solver!r}")
    if refine == "extended":
        raise ValueError("a LinearOperator allows no refine='extended', which needs the entries of A")
    if rank_deficient == "minimum_norm" and solver.preconditioner is not None:
        raise ValueError(
            "rank_deficient='minimum_norm' allows no preconditioner for a LinearOperator, whose iterates have "
            "another norm least"
        )
    if isinstance(solver.preconditioner, BlockJacobi):
        raise TypeError(
            "preconditioner must be a GramFactor, another callable or None for a LinearOperator, got a BlockJacobi, "
            "which needs the entries of A"
        )
    return solver


def check_rank(rank_deficient: Any, rank_tolerance: Any) -> None:
    """Refuse what says nothing of what to do without full rank, or of what full rank is."""
    if rank_deficient not in ("raise", "minimum_norm"):
        raise ValueError(f"rank_deficient must be 'raise' or 'minimum_norm', got {rank_deficient!r}")
    check_number("rank_tolerance", rank_tolerance, optional=True, below=_LARGEST_TOLERANCE)


def check_numbers(name: str, tensor: Tensor, *, infinite: bool = False) -> None:
    """Refuse NaN and, unless it is to be had, infinity in an argument, and what must not be negative."""
    if is_traced(tensor) or not tensor.numel():
        return
    numbers = concrete(tensor)
    # A sum needs no temporary; of large finite numbers it may still overflow.
    with quiet(numbers.numel()):
        finite = bool(torch.isfinite(numbers.sum()))
    if not finite and not bool(torch.isfinite(numbers).all()):
        what = "NaN" if bool(torch.isnan(numbers).any()) else "infinity"
        if not infinite:
            raise ValueError(f"{name} must be finite, got {what} in it")
        if what == "NaN":
            raise ValueError(f"{name} must be finite or infinity, got NaN in it")
    if name in ("damp", "weights") and bool((numbers < 0).any()):
        raise ValueError(f"{name} must not be negative, got {float(numbers.min()):g}")


def _check_robust(A: Any, b: Any, m: int, n: int, refine: str) -> None:
    """Refuse what a robust fit cannot do, before any work."""
    refuse_recording("robust=")
    if not isinstance(A, SparseMatrix):
        raise TypeError(f"robust needs the entries of A, got {type(A).__name__}")
    if A.dtype.is_complex or b.is_complex():
        raise TypeError(f"robust needs real A and b, got {A.dtype} and {b.dtype}")
    if m < n:
        raise ValueError(f"robust needs A with at least as many rows as columns, got shape ({m}, {n})")
    if refine != "auto":
        raise ValueError(f"robust allows no refine={refine!r}")
