"""What `lstsq` and `solve` are asked, checked: one clear error for every bad argument, before any work."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from .holder import check_solver, name_of
from .layouts import LAYOUTS
from .matrix import DTYPES, SparseMatrix, single
from .operator import LinearOperator
from .precision import convert
from .robust import check_robust
from .solvers import CGLS, Auto, BlockJacobi
from .transforms import concrete, is_traced, prepare_compiler


class Problem(NamedTuple):
    """Checked arguments, in double precision, and the dtype of the results."""

    A: SparseMatrix | LinearOperator
    shape: tuple[int, int]
    b: Tensor
    damp: Tensor | None
    weights: Tensor | None
    settings: str
    dtype: torch.dtype
    x0: Tensor | None
    on_failure: str

    @property
    def wide(self) -> bool:
        return self.shape[0] < self.shape[1]


def pose(A, b, damp, weights, robust, solver, rank_deficient, refine, x0, *, throw: bool = True) -> Problem:
    """Check every argument before any work; one clear error each."""
    on_failure = "raise" if throw else "nan"
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
        numbers, of_A = torch_pytree.tree_leaves(A.params), A.dtype
        A, (m, n) = A.double(torch.promote_types(of_A, torch.float64), on_failure).closed()
    else:
        single(A, "A")
        numbers, (m, n), of_A = [A.values], A.shape, A.dtype
    if not isinstance(b, Tensor) or b.layout != torch.strided:
        got = f"layout {b.layout}" if isinstance(b, Tensor) else type(b).__name__
        raise TypeError(f"b must be a dense tensor of shape ({m},) or ({m}, k), got {got}")
    if b.ndim not in (1, 2) or b.shape[0] != m:
        hint = "; for a batch of right-hand sides use torch.vmap, or columns" if b.ndim > 2 else ""
        raise ValueError(f"b must have shape ({m},) or ({m}, k) for A of shape {(m, n)}, got {tuple(b.shape)}{hint}")
    if b.device != A.device:
        raise ValueError(f"b is on {b.device}, A is on {A.device}")
    dtype = torch.promote_types(of_A, b.dtype)
    coarse = (b.is_floating_point() or b.is_complex()) and b.dtype not in DTYPES
    if of_A not in DTYPES or coarse:
        raise TypeError(f"A and b must be float32, float64, complex64 or complex128, got {of_A} and {b.dtype}")
    real = torch.float64
    if damp is not None:
        if isinstance(damp, Tensor) and damp.ndim == 0 and not damp.is_complex():
            damp = convert(damp.to(A.device), real, "the derivative by damp", on_failure)
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
        weights = convert(weights.to(A.device), real, "the derivative by weights", on_failure)
    check_solver(solver)
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
        check_numbers(name, tensor)
    if refine not in ("auto", "extended"):
        raise ValueError(f"refine must be 'auto' or 'extended', got {refine!r}")
    settings = name_of(
        solver,
        minimum_norm=rank_deficient == "minimum_norm",
        precision=torch.finfo(dtype).eps,
        extended=refine == "extended",
        exact=weights is None or (isinstance(A, SparseMatrix) and m >= n),
        wide=True if m < n else False,  # noqa: SIM210 (to Dynamo, whose sizes are symbols, a constant)
        keep=torch.compiler.is_compiling(),
    )
    if robust is not None:
        check_robust(A, b, m, n, rank_deficient, refine)
    double = torch.promote_types(dtype, torch.float64)
    if isinstance(A, LinearOperator):
        A = A.double(double, on_failure)
    else:
        A = SparseMatrix(convert(A.values, double, "the derivative by A", on_failure), A.pattern)
    x0, b = None if x0 is None else x0.detach().to(double), convert(b, double, "the derivative by b", on_failure)
    return Problem(A, (m, n), b, damp, weights, settings, dtype, x0, on_failure)


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
    if isinstance(solver.preconditioner, BlockJacobi):
        raise TypeError(
            "preconditioner must be a GramFactor, another callable or None for a LinearOperator, got a BlockJacobi, "
            "which needs the entries of A"
        )
    return solver


def check_numbers(name: str, tensor: Tensor | None) -> None:
    """Refuse NaN and infinity in an argument, and what must not be negative."""
    if tensor is None or is_traced(tensor) or not tensor.numel():
        return
    numbers = concrete(tensor)
    # A sum needs no temporary; of large finite numbers it may still overflow.
    if not bool(torch.isfinite(numbers.sum())) and not bool(torch.isfinite(numbers).all()):
        what = "NaN" if bool(torch.isnan(numbers).any()) else "infinity"
        raise ValueError(f"{name} must be finite, got {what} in it")
    if name in ("damp", "weights") and bool((numbers < 0).any()):
        raise ValueError(f"{name} must not be negative, got {float(numbers.min()):g}")
