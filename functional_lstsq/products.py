"""Products with a sparse matrix: the primitives `multiply` and `sample`, and the one place that picks sparse kernels.

    multiply(values, X) = A X  or  A^H Y            sample(U, W)[k] = U[i_k] . conj(W[j_k])

Both are bilinear, and each is the derivative of the other:

    Y = A X          X_bar = A^H Y_bar     values_bar = sample(Y_bar, X)
    X = A^H Y        Y_bar = A X_bar       values_bar = sample(Y, X_bar)
    v = sample(U, W) U_bar = A(v_bar) W    W_bar = A(v_bar)^H U

A product of `multiply` may be asked for exactly, where its sums cancel and what is left is what counts.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import scipy.sparse
import torch
from torch import Tensor

from .lazy import lazy
from .pattern import Orientation, SparsePattern, find_pattern
from .transforms import (
    Primitive,
    define,
    differentiate,
    in_graph,
    join_columns,
    join_matrices,
    lead,
    split_columns,
    split_matrices,
)

with warnings.catch_warnings():  # torch says once per process that CSR tensors are in beta; we know what we use of them
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), dtype=torch.float64, check_invariants=False)

_GRAM_ENTRIES = 2**24  # of A^H A that are formed at a time
_CANCELLED = 0.1  # of the sum of absolute terms: a sum that is smaller than that has lost digits
# A dense product makes so many multiplications in the time of one of a sparse product, and so many before it counts.
_DENSE_SPEED, _SMALL = 100, 10**7


class Operator:
    """P matrices on one pattern with their values gathered into both orientations, for repeated products.

    Plain tensors only: this is what solvers work with, below every transformation. P matrices act as one
    block-diagonal matrix, so that a batch is one call of one kernel.

    Args:
        pattern: positions of the entries, shape (m, n).
        values: (P, nnz) in the pattern's own order.
    """

    def __init__(self, pattern: SparsePattern, values: Tensor):
        self.pattern, self.values = pattern, values.resolve_conj()
        self.copies, self.dtype, self.device = values.shape[0], values.dtype, values.device
        self.m, self.n = pattern.shape

    @lazy
    def rows(self) -> Tensor:
        """The block-diagonal matrix as torch CSR."""
        return self._compressed(self.values, self.pattern.repeated(self.copies), self.m, self.n)

    @lazy
    def columns(self) -> Tensor:
        """Its adjoint as torch CSR of its own: a product with a CSR's transpose would sort anew every time."""
        values = self.values.conj().resolve_conj()
        return self._compressed(values, self.pattern.T.repeated(self.copies), self.n, self.m)

    def _compressed(self, values: Tensor, where: Orientation, m: int, n: int) -> Tensor:
        if where.order is not None:  # gather is several times faster than index_select along rows
            values = values.gather(1, where.order.expand(self.copies, -1))
        size = (self.copies * m, self.copies * n)
        return torch.sparse_csr_tensor(where.pointers, where.indices, values.reshape(-1), size, check_invariants=False)

    def matmul(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        """A X for X of shape (P, n, k), into a contiguous `out` if there is one."""
        return self._product("rows", X, self.m, out)

    def adjoint(self, Y: Tensor, out: Tensor | None = None) -> Tensor:
        """A^H Y for Y of shape (P, m, k), into a contiguous `out` if there is one."""
        return self._product("columns", Y, self.n, out)

    def _product(self, which: str, X: Tensor, rows: int, out: Tensor | None) -> Tensor:
        k = X.shape[2]
        if out is None:
            out = X.new_empty((self.copies, rows, k))
        if not (self.pattern.nnz and k and self.copies):
            return out.zero_()
        if k == 1:  # as a vector, which has a faster kernel
            torch.mv(getattr(self, which), X.reshape(-1), out=out.view(-1))
        else:
            torch.mm(getattr(self, which), X.reshape(-1, k).contiguous(), out=out.view(-1, k))
        return out

    def gram(self) -> Tensor:
        """A^H A as a dense tensor (P, n, n), from a sparse product."""
        n = self.n
        if not self.pattern.nnz:
            return self.values.new_zeros((self.copies, n, n))
        multiplications = self.pattern.keep("multiplications", lambda: _multiplications(self.pattern))
        cheap = self.m * n**2 <= _DENSE_SPEED * multiplications + _SMALL
        if cheap and self.copies * self.m * n <= _GRAM_ENTRIES // 4:
            A = self.dense()
            return A.mH @ A
        dense = self.values.new_zeros((self.copies * n, n))
        pointers, indices, values = self.columns.crow_indices(), self.columns.col_indices(), self.columns.values()
        # Some rows at a time, since sparse products take several times the memory of a dense one.
        height = max(1, _GRAM_ENTRIES // n)
        for top in range(0, self.copies * n, height):
            bottom = min(top + height, self.copies * n)
            first, last = pointers[[top, bottom]].tolist()
            part = torch.sparse_csr_tensor(
                pointers[top : bottom + 1] - first,
                indices[first:last],
                values[first:last],
                (bottom - top, self.columns.shape[1]),
                check_invariants=False,
            )
            product = sparse_product(part, self.rows)
            rows = torch.repeat_interleave(product.crow_indices().diff())
            dense[top + rows, product.col_indices() % n] = product.values()
        return dense.view(self.copies, n, n)

    def dense(self) -> Tensor:
        """A as a dense tensor (P, m, n), for matrices that are small."""
        rows, columns = self.pattern.indices
        places = (rows * self.n + columns).expand(self.copies, -1)
        flat = self.values.new_zeros((self.copies, self.m * self.n)).scatter_(1, places, self.values)
        return flat.view(self.copies, self.m, self.n)

    def absolute(self) -> Operator:
        """The operator of the absolute values."""
        return Operator(self.pattern, self.values.abs())


def sparse_product(left: Tensor, right: Tensor) -> Tensor:
    """The product of two torch CSR matrices, without entries that cancel to zero.

    On the CPU by SciPy: torch's own loses memory at every call (2.13 and 2.14), half a MiB for a million entries.
    """
    if left.device.type != "cpu":
        return left @ right
    parts = [
        scipy.sparse.csr_array((A.values().numpy(), A.col_indices().numpy(), A.crow_indices().numpy()), A.shape)
        for A in (left, right)
    ]
    product = parts[0] @ parts[1]
    pointers, indices, values = map(torch.from_numpy, (product.indptr, product.indices, product.data))
    return torch.sparse_csr_tensor(pointers, indices, values, product.shape, check_invariants=False)


def _multiplications(pattern: SparsePattern) -> int:
    """Of a sparse product for A^H A."""
    return int(pattern.rows.pointers.diff().long().square().sum())


def _multiply_kernel(values: Tensor, X: Tensor, indices: Tensor, m: int, n: int, adjoint: bool, exact: bool) -> Tensor:
    operator = Operator(find_pattern(indices, m, n), values)
    X = X.resolve_conj()
    product = operator.adjoint(X) if adjoint else operator.matmul(X)
    if not (exact and product.numel() and X.dtype in (torch.float64, torch.complex128)):
        return product
    if int((values != 0).sum(1).max()) <= 1:  # as in a whole Jacobian: no sums
        return product
    bound = operator.absolute()
    terms = bound.adjoint(X.abs()) if adjoint else bound.matmul(X.abs())
    if not bool((product.abs() < _CANCELLED * terms).any()):
        return product
    from .solvers.extended import multiplied_exactly  # which is made of operators

    return multiplied_exactly(operator, X, adjoint)


def _sample_kernel(U: Tensor, W: Tensor, indices: Tensor, m: int, n: int) -> Tensor:
    pattern, (copies, _, k) = find_pattern(indices, m, n), U.shape
    if not (pattern.nnz and k and copies):
        return U.new_zeros((copies, pattern.nnz))
    if U.device.type == "cpu" and not torch.backends.mkl.is_available():
        return _sample_by_gathers(U, W, pattern)
    where = pattern.repeated(copies)
    mask = torch.sparse_csr_tensor(
        where.pointers,
        where.indices,
        U.new_zeros(copies * pattern.nnz),
        (copies * m, copies * n),
        check_invariants=False,
    )
    left, right = U.reshape(-1, k).resolve_conj(), W.reshape(-1, k).mH.resolve_conj()
    found = torch.sparse.sampled_addmm(mask, left, right, beta=0.0).values().view(copies, -1)
    if where.order is None:
        return found.clone()  # not a view of a sparse tensor, which torch.func could not take
    result = torch.empty_like(found)
    result[:, where.order] = found
    return result


def _sample_by_gathers(U: Tensor, W: Tensor, pattern: SparsePattern) -> Tensor:
    """For torch builds whose sampled product is missing; a few columns at a time, to bound the memory."""
    rows, columns = pattern.indices
    width = max(1, 2**24 // max(1, U.shape[0] * pattern.nnz))
    total = U.new_zeros((U.shape[0], pattern.nnz))
    for u, w in zip(U.split(width, 2), W.split(width, 2), strict=True):
        total += (u.index_select(1, rows) * w.index_select(1, columns).conj()).sum(2)
    return total


def _multiply_fake(values: Tensor, X: Tensor, indices: Tensor, m: int, n: int, adjoint: bool, exact: bool) -> Tensor:
    return X.new_empty((X.shape[0], n if adjoint else m, X.shape[2]))


def _sample_fake(U: Tensor, W: Tensor, indices: Tensor, m: int, n: int) -> Tensor:
    return U.new_empty((U.shape[0], indices.shape[1]))


_multiply = define(
    "multiply(Tensor values, Tensor X, Tensor indices, SymInt m, SymInt n, bool adjoint, bool exact) -> Tensor",
    _multiply_kernel,
    _multiply_fake,
)
_sample = define(
    "sample(Tensor U, Tensor W, Tensor indices, SymInt m, SymInt n) -> Tensor", _sample_kernel, _sample_fake
)


# Not a tuple, which torch.func would take apart at every call.
@dataclass(frozen=True)
class _Shape:
    m: int
    n: int
    adjoint: bool = False
    exact: bool = False


class _Multiply(Primitive):
    @classmethod
    def forward(cls, static: _Shape, values: Tensor, X: Tensor, indices: Tensor) -> Tensor:
        values, X = values.contiguous(), X.contiguous()
        return _multiply(values, X, indices, static.m, static.n, static.adjoint, static.exact)

    @classmethod
    def vjp_rule(cls, static, inputs, outputs, cotangents, needed):
        (values, X, indices), (bar,), m, n, adjoint = inputs, cotangents, static.m, static.n, static.adjoint
        values_bar = X_bar = None
        if needed[0]:
            left, right = (X, bar) if adjoint else (bar, X)
            values_bar = sample(left, right, indices, m, n)
        if needed[1]:
            X_bar = multiply(values, bar, indices, m, n, not adjoint)
        return values_bar, X_bar, None

    @classmethod
    def jvp_rule(cls, static, inputs, outputs, tangents):
        (values, X, indices), (values_dot, X_dot, _) = inputs, tangents
        terms = []
        if values_dot is not None:
            terms.append(cls.apply(static, values_dot, X, indices))
        if X_dot is not None:
            terms.append(cls.apply(static, values, X_dot, indices))
        return sum(terms[1:], terms[0])

    @classmethod
    def vmap(cls, info, in_dims, static, values, X, indices):
        _, of_values, of_X, _ = in_dims
        size = info.batch_size
        if of_values is None:
            return split_columns(cls.apply(static, values, join_columns(X, of_X, size), indices), size), 2
        values, X = join_matrices(values, of_values, size), join_matrices(X, of_X, size)
        return split_matrices(cls.apply(static, values, X, indices), size), 0


class _Sample(Primitive):
    @classmethod
    def forward(cls, static: _Shape, U: Tensor, W: Tensor, indices: Tensor) -> Tensor:
        return _sample(U.contiguous(), W.contiguous(), indices, static.m, static.n)

    @classmethod
    def vjp_rule(cls, static, inputs, outputs, cotangents, needed):
        (U, W, indices), (bar,), m, n = inputs, cotangents, static.m, static.n
        U_bar = multiply(bar, W, indices, m, n, False) if needed[0] else None
        W_bar = multiply(bar, U, indices, m, n, True) if needed[1] else None
        return U_bar, W_bar, None

    @classmethod
    def jvp_rule(cls, static, inputs, outputs, tangents):
        (U, W, indices), (U_dot, W_dot, _), m, n = inputs, tangents, static.m, static.n
        terms = []
        if U_dot is not None:
            terms.append(sample(U_dot, W, indices, m, n))
        if W_dot is not None:
            terms.append(sample(U, W_dot, indices, m, n))
        return sum(terms[1:], terms[0])

    @classmethod
    def vmap(cls, info, in_dims, static, U, W, indices):
        _, of_U, of_W, _ = in_dims
        size = info.batch_size
        U, W = (lead(tensor, dim, size).flatten(0, 1) for tensor, dim in ((U, of_U), (W, of_W)))
        return split_matrices(sample(U, W, indices, static.m, static.n), size), 0


differentiate(
    _multiply,
    lambda values, X, indices, m, n, adjoint, exact: _Multiply.apply(_Shape(m, n, adjoint, exact), values, X, indices),
)
differentiate(_sample, lambda U, W, indices, m, n: _Sample.apply(_Shape(m, n), U, W, indices))


@in_graph
def multiply(values: Tensor, X: Tensor, indices: Tensor, m: int, n: int, adjoint: bool, exact: bool = False) -> Tensor:
    """A X of shape (P, m, k), or A^H X of shape (P, n, k), for values (P, nnz) and X (P, n or m, k).

    Args:
        exact: sums are taken in about twice the working precision, and so are those of its tangents.
    """
    return _Multiply.apply(_Shape(m, n, adjoint, exact), values, X, indices)


@in_graph
def sample(U: Tensor, W: Tensor, indices: Tensor, m: int, n: int) -> Tensor:
    """The entries (P, nnz) of U W^H at the stored positions, for U (P, m, k) and W (P, n, k)."""
    return _Sample.apply(_Shape(m, n), U, W, indices)
