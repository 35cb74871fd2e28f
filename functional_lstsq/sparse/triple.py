"""The primitive `triple`: the values of C = A B on a pattern that is known, and its derivatives.

All three are of one trilinear form, the sum of a[i,k] b[k,j] c[i,j] over the stored entries:

    c[i,j] = sum_k a[i,k] b[k,j]        a[i,k] = sum_j b[k,j] c[i,j]        b[k,j] = sum_i a[i,k] c[i,j]

The derivative of each by one of its factors is another of them. Where there are compiled kernels no pair of entries is
ever stored: they go row by row through A, with n numbers of memory a thread (Gustavson, ACM TOMS 4(3), 1978).
Elsewhere pairs are made some at a time, and kept on the pattern if they are few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..torch_func.operations import define, differentiate
from ..torch_func.primitive import Primitive, extent, join_matrices, split_matrices
from ..torch_func.tracing import in_graph
from . import kernels
from .pattern import SparsePattern, find_pattern

_PAIRS = 2**20  # of entries that are formed at a time, of 24 bytes each, and that a pattern keeps


class _Pairs(NamedTuple):
    """Products of entries number a[t] of A and b[t] of B, which belong to entry c[t] of C, all in callers' orders."""

    a: Tensor
    b: Tensor
    c: Tensor


def _lengths(A: SparsePattern, B: SparsePattern) -> Tensor:
    """Of the entries of A, row by row: in how many products each occurs."""
    return B.rows.pointers.diff().long()[A.rows.indices.long()]


def _pairs(A: SparsePattern, B: SparsePattern, C: SparsePattern, first: int, last: int) -> _Pairs:
    """Those of the entries of A from number `first` to `last`, row by row."""
    pointers, columns, order = A.rows
    counts = _lengths(A, B)[first:last]
    own = torch.repeat_interleave(torch.arange(first, last, device=A.device), counts)
    starts = B.rows.pointers.long()[columns[first:last].long()] - (counts.cumsum(0) - counts)
    other = torch.arange(len(own), device=A.device) + torch.repeat_interleave(starts, counts)
    rows = torch.searchsorted(pointers.long(), own, right=True) - 1
    n = C.shape[1]
    keys = torch.repeat_interleave(C.rows.pointers.diff()) * n + C.rows.indices.long()
    found = torch.searchsorted(keys, rows * n + B.rows.indices.long()[other])
    numbers = ((own, order), (other, B.rows.order), (found, C.rows.order))
    return _Pairs(*(number if order is None else order[number] for number, order in numbers))


def _all_pairs(A: SparsePattern, B: SparsePattern, C: SparsePattern):
    """Parts of all pairs, of bounded size, or the whole of them, kept, where they are few."""
    ends = _lengths(A, B).cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    if total <= _PAIRS:
        yield A.relate(("pairs", B.name, C.name), lambda: _pairs(A, B, C, 0, A.nnz))
        return
    targets = torch.arange(_PAIRS, total + _PAIRS, _PAIRS, device=A.device)
    bounds = torch.cat([ends.new_zeros(1), torch.searchsorted(ends, targets)]).unique().clamp(max=A.nnz).tolist()
    for first, last in zip(bounds, [*bounds[1:], A.nnz], strict=True):
        yield _pairs(A, B, C, first, last)


def _triple_kernel(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor, m: int, k: int, n: int, wanted: str
) -> Tensor:
    A, B, C = find_pattern(a, m, k), find_pattern(b, k, n), find_pattern(c, m, n)
    x, y = x.resolve_conj(), y.resolve_conj()
    if kernels.available(x.device) and x.numel() and y.numel():
        if wanted == "b":  # C^T = B^T A^T
            return kernels.triple(B.T, A.T, C.T, x, y, of_left=True)
        return kernels.triple(A, B, C, x, y, of_left=wanted == "a")
    dtype = torch.promote_types(x.dtype, torch.float64)
    out = x.new_zeros((len(x), {"a": A, "b": B, "c": C}[wanted].nnz), dtype=dtype)
    for pairs in _all_pairs(A, B, C):
        left, right, where = (pairs[i] for i in _ROLES[wanted])
        terms = x[:, left].to(dtype) * y[:, right]
        out.scatter_add_(1, where.expand(len(x), -1), terms)
    return out.to(x.dtype)


# Which of A, B and C the factors x and y belong to, and the result.
_ROLES = {"c": (0, 1, 2), "a": (1, 2, 0), "b": (0, 2, 1)}


def _triple_fake(x: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor, m: int, k: int, n: int, wanted: str) -> Tensor:
    return x.new_empty((x.shape[0], {"a": a, "b": b, "c": c}[wanted].shape[1]))


_triple = define(
    "triple(Tensor x, Tensor y, Tensor a, Tensor b, Tensor c, SymInt m, SymInt k, SymInt n, str wanted) -> Tensor",
    _triple_kernel,
    _triple_fake,
)


# Not a tuple, which torch.func would take apart at every call.
@dataclass(frozen=True)
class _Static:
    m: int
    k: int
    n: int
    wanted: str


class _Triple(Primitive):
    """(x (P, nnz of one), y (P, nnz of another), indices of A, B and C) -> (P, nnz of the third)."""

    @classmethod
    def forward(cls, static: _Static, x: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return _triple(x.contiguous(), y.contiguous(), a, b, c, static.m, static.k, static.n, static.wanted)

    @classmethod
    def vjp_rule(cls, static, inputs, outputs, cotangents, needed):
        factors, where, (bar,) = inputs[:2], inputs[2:], cotangents
        names = ["abc"[i] for i in _ROLES[static.wanted][:2]]
        bars: list[Tensor | None] = []
        for own, other, factor, is_needed in zip(names, names[::-1], factors[::-1], needed[:2], strict=True):
            if not is_needed:
                bars.append(None)
                continue
            given = {other: factor.conj(), static.wanted: bar}
            pair = (given[name] for name in sorted(given))
            bars.append(triple(*pair, *where, static.m, static.k, static.n, own))
        return *bars, None, None, None

    @classmethod
    def jvp_rule(cls, static, inputs, outputs, tangents):
        (x, y, *where), (x_dot, y_dot, *_) = inputs, tangents
        terms = []
        if x_dot is not None:
            terms.append(cls.apply(static, x_dot, y, *where))
        if y_dot is not None:
            terms.append(cls.apply(static, x, y_dot, *where))
        return sum(terms[1:], terms[0])

    @classmethod
    def vmap(cls, info, in_dims, static, x, y, *where):
        size, dims = info.batch_size, in_dims[1:3]
        copies = extent([x], [dims[0]], 0)
        x, y = (join_matrices(factor, dim, size) for factor, dim in zip((x, y), dims, strict=True))
        return split_matrices(cls.apply(static, x, y, *where), size, copies), 0


differentiate(_triple, lambda x, y, a, b, c, m, k, n, wanted: _Triple.apply(_Static(m, k, n, wanted), x, y, a, b, c))


@in_graph
def triple(x: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor, m: int, k: int, n: int, wanted: str = "c") -> Tensor:
    """The values (P, nnz) of one of A (m, k), B (k, n) and C (m, n) in the trilinear form, for those of the other two.

    Args:
        x, y: values (P, nnz) of the two that are not `wanted`, in the order of the alphabet.
        a, b, c: indices of the patterns; that of C has every position that A B has.
    """
    return _Triple.apply(_Static(m, k, n, wanted), x, y, a, b, c)
