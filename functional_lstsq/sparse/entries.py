"""The primitives `take` and `place`: entries of a vector of values by number, and back to their places.

    take(v, index)[k] = v[index[k]]          place(v, index, size)[i] = sum of v[k] over the k with index[k] = i

Each is the adjoint of the other. Gathers written in plain torch are silently wrong in compiled second derivatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..torch_func.operations import define, differentiate
from ..torch_func.primitive import Primitive, extent, join_matrices, split_matrices
from ..torch_func.tracing import in_graph
from .numerics import at


def _take_kernel(values: Tensor, index: Tensor) -> Tensor:
    return at(values, index)


def _place_kernel(values: Tensor, index: Tensor, size: int) -> Tensor:
    # Sums of half a million float32 in float32 would lose three of their seven digits.
    dtype = torch.promote_types(values.dtype, torch.float64)
    out = values.new_zeros((len(values), size), dtype=dtype)
    return out.scatter_add_(1, index.expand(len(values), -1), values.to(dtype)).to(values.dtype)


_take = define(
    "take(Tensor values, Tensor index) -> Tensor",
    _take_kernel,
    lambda values, index: values.new_empty((values.shape[0], index.shape[0])),
)
_place = define(
    "place(Tensor values, Tensor index, SymInt size) -> Tensor",
    _place_kernel,
    lambda values, index, size: values.new_empty((values.shape[0], size)),
)


# Not a tuple, which torch.func would take apart at every call.
@dataclass(frozen=True)
class _Size:
    size: int


class _Move(Primitive):
    """Linear in its values, the first argument, and without a derivative by the second, the index."""

    @classmethod
    def jvp_rule(cls, static, inputs, outputs, tangents):
        return cls.apply(static, tangents[0], inputs[1])

    @classmethod
    def vmap(cls, info, in_dims, static, values, index):
        size, copies = info.batch_size, extent([values], [in_dims[1]], 0)
        moved = cls.apply(static, join_matrices(values, in_dims[1], size), index)
        return split_matrices(moved, size, copies), 0


class _Take(_Move):
    @classmethod
    def forward(cls, static: None, values: Tensor, index: Tensor) -> Tensor:
        return _take(values.contiguous(), index)

    @classmethod
    def vjp_rule(cls, static, inputs, outputs, cotangents, needed):
        values, index = inputs
        return _Place.apply(_Size(values.shape[1]), cotangents[0], index), None


class _Place(_Move):
    @classmethod
    def forward(cls, static: _Size, values: Tensor, index: Tensor) -> Tensor:
        return _place(values.contiguous(), index, static.size)

    @classmethod
    def vjp_rule(cls, static, inputs, outputs, cotangents, needed):
        return _Take.apply(None, cotangents[0], inputs[1]), None


differentiate(_take, lambda values, index: _Take.apply(None, values, index))
differentiate(_place, lambda values, index, size: _Place.apply(_Size(size), values, index))


@in_graph
def take(values: Tensor, index: Tensor) -> Tensor:
    """(P, k): the entries of values (P, size) that `index` (k,), int64, numbers."""
    return _Take.apply(None, values, index)


@in_graph
def place(values: Tensor, index: Tensor, size: int) -> Tensor:
    """(P, size): values (P, k) added up at the places that `index` (k,), int64, numbers."""
    return _Place.apply(_Size(size), values, index)
