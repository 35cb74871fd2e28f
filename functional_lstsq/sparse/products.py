"""Products with a sparse matrix: the primitives `multiply` and `sample`.

    multiply(values, X) = A X  or  A^H Y            sample(U, W)[k] = U[i_k] . conj(W[j_k])

Both are bilinear, and each is the derivative of the other:

    Y = A X          X_bar = A^H Y_bar     values_bar = sample(Y_bar, X)
    X = A^H Y        Y_bar = A X_bar       values_bar = sample(Y, X_bar)
    v = sample(U, W) U_bar = A(v_bar) W    W_bar = A(v_bar)^H U

A product of `multiply` may be asked for exactly, where its sums cancel and what is left is what counts.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from ..torch_func.operations import define, differentiate
from ..torch_func.primitive import (
    Constant,
    Primitive,
    extent,
    join_columns,
    join_matrices,
    lead,
    split_columns,
    split_matrices,
)
from ..torch_func.tracing import in_graph
from . import kernels
from .exact_products import left_of_product, multiplied_exactly
from .pattern import SparsePattern, find_pattern
from .plain_products import Operator

_CANCELLED = 0.1  # of the sum of absolute terms: a sum that is smaller than that has lost digits


def _multiply_kernel(values: Tensor, X: Tensor, indices: Tensor, m: int, n: int, adjoint: bool, exact: bool) -> Tensor:
    if not len(X):
        return _multiply_fake(values, X, indices, m, n, adjoint, exact)
    if exact and not bool((X != 0).any()):  # as bounds of zero are
        return _multiply_fake(values, X, indices, m, n, adjoint, exact).zero_()
    operator = Operator(find_pattern(indices, m, n), values)
    X = X.resolve_conj()
    product = operator.adjoint(X) if adjoint else operator.matmul(X)
    if not (exact and product.numel() and X.dtype in (torch.float64, torch.complex128)):
        return product
    if int((values != 0).sum(1).max()) <= 1:  # as in a whole Jacobian: no sums
        return product
    terms = operator.absolute_adjoint(X.abs()) if adjoint else operator.absolute_matmul(X.abs())
    if not bool((product.abs() < _CANCELLED * terms).any()):
        return product
    return multiplied_exactly(operator, X, adjoint=adjoint)


def _left_kernel(values: Tensor, X: Tensor, product: Tensor, indices: Tensor, m: int, n: int) -> Tensor:
    if not (product.numel() and X.numel() and values.numel() and X.dtype in (torch.float64, torch.complex128)):
        return torch.zeros_like(product)
    return left_of_product(Operator(find_pattern(indices, m, n), values), X.resolve_conj(), product.resolve_conj())


def _sample_kernel(U: Tensor, W: Tensor, indices: Tensor, m: int, n: int) -> Tensor:
    pattern, (copies, _, k) = find_pattern(indices, m, n), U.shape
    if not (pattern.nnz and k and copies):
        return U.new_zeros((copies, pattern.nnz))
    if kernels.available(U.device):
        return kernels.sample(pattern, U, W)
    if U.device.type == "cpu" and not torch.backends.mkl.is_available():
        return _sample_by_gathers(U, W, pattern)
    where = pattern.repeated(copies)
    mask = torch.sparse_csr_tensor(
        where.pointers,
        where.indices,
        U.new_zeros(copies * pattern.nnz),
        (copies * m, copies * n),
        device=U.device,
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


_left = define(
    "left_of_product(Tensor values, Tensor X, Tensor product, Tensor indices, SymInt m, SymInt n) -> Tensor",
    _left_kernel,
    lambda values, X, product, indices, m, n: product.new_empty(product.shape),
)


# Not a tuple, which torch.func would take apart at every call.
@dataclass(frozen=True)
class _Shape:
    m: int
    n: int
    _: KW_ONLY
    adjoint: bool = False
    exact: bool = False
    exact_bar: bool = False


class OfProduct(Primitive):
    """A primitive of a product: (values (P, nnz), X (P, rows, k), indices) -> (P, other rows, k)."""

    @classmethod
    def vmap(cls, info, in_dims, static, values, X, indices):
        _, of_values, of_X, _ = in_dims
        size = info.batch_size
        if of_values is None:
            product = cls.apply(static, values, join_columns(X, of_X, size), indices)
            return split_columns(product, size, extent([X], [of_X], 2)), 0
        copies = extent([values], [of_values], 0)
        values, X = join_matrices(values, of_values, size), join_matrices(X, of_X, size)
        return split_matrices(cls.apply(static, values, X, indices), size, copies), 0


class _Multiply(OfProduct):
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
            X_bar = multiply(values, bar, indices, m, n, adjoint=not adjoint, exact=static.exact_bar)
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


class _Left(Constant):
    constants = (0,)
    shared = 1

    @classmethod
    def forward(cls, static: _Shape, values: Tensor, X: Tensor, product: Tensor, indices: Tensor) -> tuple[Tensor]:
        tensors = (t.contiguous() for t in (values, X, product))
        return (_left(*tensors, indices, static.m, static.n),)


class _Sample(Primitive):
    @classmethod
    def forward(cls, static: _Shape, U: Tensor, W: Tensor, indices: Tensor) -> Tensor:
        return _sample(U.contiguous(), W.contiguous(), indices, static.m, static.n)

    @classmethod
    def vjp_rule(cls, static, inputs, outputs, cotangents, needed):
        (U, W, indices), (bar,), m, n = inputs, cotangents, static.m, static.n
        U_bar = multiply(bar, W, indices, m, n) if needed[0] else None
        W_bar = multiply(bar, U, indices, m, n, adjoint=True) if needed[1] else None
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
        size, copies = info.batch_size, extent([U], [of_U], 0)
        U, W = (lead(tensor, dim, size).flatten(0, 1) for tensor, dim in ((U, of_U), (W, of_W)))
        return split_matrices(sample(U, W, indices, static.m, static.n), size, copies), 0


differentiate(
    _multiply,
    lambda values, X, indices, m, n, adjoint, exact: _Multiply.apply(
        _Shape(m, n, adjoint=adjoint, exact=exact), values, X, indices
    ),
)
differentiate(
    _left,
    lambda values, X, product, indices, m, n: _Left.apply(_Shape(m, n), values, X, product, indices)[0],
)
differentiate(_sample, lambda U, W, indices, m, n: _Sample.apply(_Shape(m, n), U, W, indices))


@in_graph
def multiply(
    values: Tensor,
    X: Tensor,
    indices: Tensor,
    m: int,
    n: int,
    *,
    adjoint: bool = False,
    exact: bool = False,
    exact_bar: bool = False,
) -> Tensor:
    """A X of shape (P, m, k) for values (P, nnz) and X (P, n, k).

    Args:
        adjoint: A^H X of shape (P, n, k) instead, for X (P, m, k).
        exact: sums are taken in about twice the working precision, and so are those of its tangents.
        exact_bar: so are those of the gradient by X.
    """
    return _Multiply.apply(_Shape(m, n, adjoint=adjoint, exact=exact, exact_bar=exact_bar), values, X, indices)


@in_graph
def left_out(values: Tensor, X: Tensor, product: Tensor, indices: Tensor, m: int, n: int) -> Tensor:
    """What rounding has left out of `product`, A^H X (P, n, k); a constant."""
    return _Left.apply(_Shape(m, n), values, X, product, indices)[0]


@in_graph
def sample(U: Tensor, W: Tensor, indices: Tensor, m: int, n: int) -> Tensor:
    """The entries (P, nnz) of U W^H at the stored positions, for U (P, m, k) and W (P, n, k)."""
    return _Sample.apply(_Shape(m, n), U, W, indices)
