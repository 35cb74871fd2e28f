"""`sparse_generic_lstsq`: the function of torchsparsegradutils with that name, on this library's primitives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .linear.augmented import Solve
from .linear.factor_cache import no_token
from .linear.gradient import Static
from .linear.settings import Settings
from .lstsq import lstsq as solve_lstsq
from .sparse.matrix import SparseMatrix
from .torch_func.tracing import sparse_beside_graph, unseen_by_transforms

Solver = Callable[[Tensor, Tensor], Tensor]


@sparse_beside_graph
def sparse_generic_lstsq(
    A: Tensor, B: Tensor, lstsq: Solver | None = None, transpose_lstsq: Solver | None = None
) -> Tensor:
    """min |A X - B| for a torch sparse tensor A, with sparse gradients; a drop-in for torchsparsegradutils'.

    Beyond the original: answers whose error is estimated, gradients of gradients, and the transformations of torch.func
    in B with A closed over.

    Args:
        A: (m, n) torch sparse COO (coalesced or not) or CSR tensor, tall and of full rank.
        B: (m,) or (m, k) dense tensor.
        lstsq: solver to use in forward and backward, `lstsq(A, B) -> X` of shape (n,) or (n, k), with A as
            given here. None for this library's.
        transpose_lstsq: solver to use in backward, `transpose_lstsq(A, G) -> Y` with A^T Y = G, of shape (m,) or
            (m, k).

    Returns:
        X: (n,) or (n, k). The gradient with respect to A is sparse, in A's layout and at its stored entries; duplicates
        of an uncoalesced A are one entry of it.

    Raises:
        TypeError: A is not sparse COO or CSR.
        ValueError: the sizes of A and B do not match, or backward meets an A that is not tall.
        RuntimeError: a given solver fails or returns an unexpected shape; also, as `torch.linalg.LinAlgError`, when
            this library's solver has no answer that it can vouch for.

    Cost: one solve, and one more for the gradients by A and B together.

    Source: Golub and Pereyra, SIAM J. Numer. Anal. 10(2), 1973, eq. 4.12.

    >>> import torch, functional_lstsq as fl
    >>> A = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]).to_sparse_coo().requires_grad_()
    >>> X = fl.sparse_generic_lstsq(A, torch.tensor([1.0, 2.0, 4.0]))
    >>> X.sum().backward()
    >>> A.grad.is_sparse
    True
    """
    if not isinstance(A, Tensor) or A.layout not in (torch.sparse_coo, torch.sparse_csr):
        got = f"layout {A.layout}" if isinstance(A, Tensor) else type(A).__name__
        raise TypeError(f"A must be a torch sparse COO or CSR tensor, got {got}")
    if not isinstance(B, Tensor) or B.layout != torch.strided:
        raise TypeError(f"B must be a dense tensor, got {B.layout if isinstance(B, Tensor) else type(B).__name__}")
    if A.ndim != 2 or B.ndim not in (1, 2) or A.shape[0] != B.shape[0]:
        raise ValueError(
            f"B must have shape (m,) or (m, k) for A of shape (m, n), got A {tuple(A.shape)} and B {tuple(B.shape)}"
        )
    for name, solver in (("lstsq", lstsq), ("transpose_lstsq", transpose_lstsq)):
        if solver is not None and not callable(solver):
            raise TypeError(f"{name} must be callable, got {solver!r}")
    if lstsq is None and transpose_lstsq is None:
        X = solve_lstsq(A, B)
    else:
        X = _solve_as_given(A, B, lstsq or solve_lstsq, transpose_lstsq or _solve_transposed)
    return X if A.shape[0] >= A.shape[1] else _TallOnly.apply(X, tuple(A.shape))


def _solve_transposed(A: Tensor, G: Tensor) -> Tensor:
    return solve_lstsq(SparseMatrix.from_torch(A).T, G)


def _solve_as_given(A: Tensor, B: Tensor, lstsq: Solver, transpose_lstsq: Solver) -> Tensor:
    if A.dtype != B.dtype:
        raise TypeError(f"A and B must have one dtype for a given solver, got {A.dtype} and {B.dtype}")
    matrix = SparseMatrix.from_torch(A)
    with unseen_by_transforms():
        given = _Given(A.detach(), lstsq, transpose_lstsq, B.ndim == 1)
    static = _Static(
        *matrix.shape, Settings(None, minimum_norm=False, precision=torch.finfo(A.dtype).eps), "raise", given
    )
    columns = B[None] if B.ndim == 2 else B[None, :, None]
    inputs = (matrix.values[None], None, None, columns, None, None, None, None, matrix.pattern.indices, None)
    X = _SolveAsGiven.apply(static, *inputs)[2][0]
    return X if B.ndim == 2 else X[:, 0]


@dataclass
class _Given:
    A: Tensor
    lstsq: Solver
    transpose_lstsq: Solver
    single: bool

    def call(self, name: str, right: Tensor, rows: int) -> Tensor:
        """Call a solver with (rows, k), or (rows,) if that is what the user has; gives (rows, k)."""
        k = right.shape[1]
        try:
            result = getattr(self, name)(self.A, right[:, 0] if self.single and k == 1 else right)
        except Exception as error:
            raise RuntimeError(f"{name} failed: {error}") from error
        if not isinstance(result, Tensor):
            raise RuntimeError(f"{name} must return a tensor, got {type(result).__name__}")
        if result.shape != (rows, k) and not (k == 1 and result.shape == (rows,)):
            raise RuntimeError(f"{name} must return shape ({rows},) or ({rows}, {k}), got {tuple(result.shape)}")
        return result.detach().reshape(rows, k)


@dataclass(frozen=True)
class _Static(Static):
    given: _Given

    def derivative(self) -> _Static:
        return self


class _SolveAsGiven(Solve):
    """K (r, x) = (b, c) by the two given solvers: y = (A^T)^+ c,  x = A^+ (b - y),  r = b - A x."""

    @classmethod
    def forward(cls, static, values, weights, damp, b, e, c, known, token, indices, unseen):
        m, n, given = static.m, static.n, static.given
        if values.shape[0] != 1:
            raise RuntimeError("a batch of matrices cannot go to a given solver; leave lstsq and transpose_lstsq out")
        zero = values.new_zeros((m, (b if b is not None else c).shape[2]))
        b = zero if b is None else b[0]
        y = zero if c is None else given.call("transpose_lstsq", c[0], m)
        x = given.call("lstsq", b - y, n)
        r = y + (b - y - given.A @ x)
        # There is nothing to report, and no factor.
        empty = r.new_zeros((1, 0, r.shape[1]))
        return r[None], empty, x[None], empty.real, no_token()


class _TallOnly(torch.autograd.Function):
    """The identity, without a derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(X: Tensor, shape: tuple[int, int]) -> Tensor:
        return X.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.shape = inputs[1]

    @staticmethod
    def backward(ctx: Any, *_: Tensor):  # type: ignore[override]
        raise ValueError(f"A must be tall for a gradient, got shape {ctx.shape}; lstsq differentiates wide A too")

    jvp = backward
