"""Weak directions as a differentiable function: the smallest singular values of A and their right singular vectors.

What is found on plain tensors has no derivative; what is made of it here has. With the residual

    F(V) = A^H A V - V (V^H A^H A V)    within groups of equal singular values

the steps V - C F(V) leave V as it is, and take an error of order d t^p in it, after a change d t of A, to one of order
d t^(p+1), where C is the inverse of the derivative of F that was found with V, held fixed (the chord method; Kelley,
Iterative Methods for Linear and Nonlinear Equations, SIAM 1995, section 5.4). So three steps have the derivatives of V
to third order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..solvers.memory import told_as_too_large
from ..solvers.weakest import Weakest, clusters, correct
from ..sparse.pattern import find_pattern
from ..sparse.plain_products import Operator
from ..sparse.products import multiply
from ..torch_func.operations import define
from ..torch_func.primitive import Primitive, extent, join_columns, join_matrices, split_columns, split_matrices
from .factor_cache import Holder

_ORDERS = 3


def _found(values: Tensor, indices: Tensor, m: int, n: int, count: int) -> list[Weakest]:
    pattern = find_pattern(indices, m, n)
    with told_as_too_large():
        return [Weakest(Operator(pattern, one[None]), count) for one in values.resolve_conj()]


def _search_kernel(
    values: Tensor, indices: Tensor, m: int, n: int, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = _found(values, indices, m, n, count)
    holder = Holder()
    holder.factors = cast(Any, found)
    if not found:
        return *_search_fake(values, indices, m, n, count)[:3], holder.token()
    limits = torch.tensor([one.limit for one in found], dtype=torch.float64, device=values.device)
    return torch.stack([one.V for one in found]), torch.stack([one.sigma for one in found]), limits, holder.token()


def _search_fake(values: Tensor, indices: Tensor, m: int, n: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    copies = values.shape[0]
    real = values.new_empty((copies, count), dtype=torch.float64)
    token = values.new_empty((1,), dtype=torch.int64, device="cpu")
    return values.new_empty((copies, n, count)), real, real.new_empty((copies,)), token


def _correct_kernel(
    G: Tensor, values: Tensor, V: Tensor, token: Tensor, indices: Tensor, m: int, n: int, count: int
) -> Tensor:
    holder = Holder.of(token)
    if holder.factors is None:  # it lives as long as the graph that its token is in
        found = _found(values, indices, m, n, count)
        for one, own in zip(found, V, strict=True):
            one.V = own  # signs and turns as they were
    else:
        found = cast(Any, holder.factors)
    if not found:
        return G.clone()
    return torch.stack([correct(one, g) for one, g in zip(found, G.resolve_conj(), strict=True)])


_search = define(
    "weakest(Tensor values, Tensor indices, SymInt m, SymInt n, SymInt count) -> (Tensor, Tensor, Tensor, Tensor)",
    _search_kernel,
    _search_fake,
)
_correct = define(
    "move_weakest(Tensor G, Tensor values, Tensor V, Tensor token, Tensor indices, SymInt m, SymInt n, SymInt count) "
    "-> Tensor",
    _correct_kernel,
    lambda G, values, V, token, indices, m, n, count: torch.empty_like(G),
)


# Not a tuple, which torch.func would take apart at every call.
@dataclass(frozen=True)
class _Static:
    m: int
    n: int
    count: int
    order: int = 0  # of the derivative that is asked for


class _Search(Primitive):
    """(values (P, nnz), indices) -> V (P, n, k), sigma (P, k), limits (P,), a token; none has a derivative."""

    constants = (0, 1, 2, 3)

    @classmethod
    def forward(cls, static: _Static, values: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        return _search(values.contiguous(), indices, static.m, static.n, static.count)

    @classmethod
    def jvp_rule(cls, static, inputs, outputs, tangents):
        return None, None, None, None

    @classmethod
    def vmap(cls, info, in_dims, static, values, indices):
        size, copies = info.batch_size, extent([values], [in_dims[1]], 0)
        *found, token = cls.apply(static, join_matrices(values, in_dims[1], size), indices)
        return (*(split_matrices(part, size, copies) for part in found), token), (0, 0, 0, None)


class _Correct(Primitive):
    """C G for G (P, n, q k), zero where no derivative is asked for: V is right as it is. C is Hermitian."""

    @classmethod
    def forward(cls, static: _Static, G: Tensor, values: Tensor, V: Tensor, token: Tensor, indices: Tensor) -> Tensor:
        if not static.order:
            return torch.zeros_like(G, memory_format=torch.contiguous_format)
        if static.order > _ORDERS:
            raise NotImplementedError(f"weakest has derivatives to order {_ORDERS}, got order {static.order}")
        return _correct(G.contiguous(), values, V, token, indices, static.m, static.n, static.count)

    @classmethod
    def vjp_rule(cls, static, inputs, outputs, cotangents, needed):
        return cls.apply(replace(static, order=static.order + 1), cotangents[0], *inputs[1:]), None, None, None, None

    @classmethod
    def jvp_rule(cls, static, inputs, outputs, tangents):
        return cls.apply(replace(static, order=static.order + 1), tangents[0], *inputs[1:])

    @classmethod
    def vmap(cls, info, in_dims, static, G, values, V, token, indices):
        _, of_G, of_values, of_V, _, _ = in_dims
        size = info.batch_size
        if of_V is None:
            columns = extent([G], [of_G], 2)
            return split_columns(
                cls.apply(static, join_columns(G, of_G, size), values, V, token, indices), size, columns
            ), 0
        copies = extent([V], [of_V], 0)
        parts = ((G, of_G), (values, of_values), (V, of_V))
        joined = (join_matrices(part, dim, size) for part, dim in parts)
        return split_matrices(cls.apply(static, *joined, token, indices), size, copies), 0


def weakest_of(values: Tensor, indices: Tensor, m: int, n: int, count: int) -> tuple[Tensor, Tensor]:
    """(sigma (P, k), V (P, n, k)) of matrices (P, nnz) on one pattern, m >= n, in double precision."""
    static, still = _Static(m, n, count), values.detach()
    V, found, limits, token = _Search.apply(static, still, indices)
    frozen, null = V, found <= limits[:, None]
    label = clusters(found, limits)
    same = (label[:, :, None] == label[:, None]).to(V.dtype)
    for _ in range(_ORDERS):
        image = multiply(values, V, indices, m, n)
        left = multiply(values, image, indices, m, n, adjoint=True) - V @ (same * (image.mH @ image))
        V = V - _Correct.apply(static, left, still, frozen, token, indices)
        V = 1.5 * V - 0.5 * V @ (V.mH @ V)
    V = frozen + (V - V.detach())  # the numbers that were found, to the last bit
    squares = multiply(values, V, indices, m, n).abs().square().sum(1)
    sigma = torch.where(null, 1.0, squares).sqrt()
    return torch.where(null, found, found + (sigma - sigma.detach())), V
