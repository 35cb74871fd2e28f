"""Between torch's sparse layouts and (values, indices), differentiable both ways.

torch's own rules for compressed layouts are not differentiable a second time, so these are Functions of their own. A
sparse tensor has no strides, which torch.func asks of every tensor it meets (pytorch#136357): take it apart with
torch.func switched off, before its values go any further.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    maybe_get_level,
)
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

LAYOUTS = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)
_PARTS = {
    torch.sparse_csr: (Tensor.crow_indices, Tensor.col_indices, torch.sparse_csr_tensor),
    torch.sparse_csc: (Tensor.ccol_indices, Tensor.row_indices, torch.sparse_csc_tensor),
}


def take_apart(A: Tensor) -> tuple[Tensor, Tensor]:
    """(values, indices) of a COO tensor, whose duplicates are added up, or of a CSR or CSC tensor.

    What a transformation of torch.func is about cannot be taken apart outside of it: torch lets `grad` and its like
    through COO tensors, and nothing else.
    """
    if is_functorch_wrapped_tensor(A):
        if A.layout != torch.sparse_coo or any(kind != TransformType.Grad for kind in _transformations(A)):
            raise TypeError(
                f"A is a torch sparse tensor (layout {A.layout}) that depends on what torch.func transforms; torch "
                "allows that for grad and vjp of COO tensors only: make it a SparseMatrix(values, pattern) instead"
            )
        A = _added_up(A)
        return A.values(), A.indices()
    with torch._C._DisableFuncTorch():
        return _take_apart(A)


def _added_up(A: Tensor) -> Tensor:
    """A COO tensor without duplicates, which are added up in double precision: 300 ones of int8 are 300, and not 44."""
    if A.is_coalesced():
        return A
    dtype = A.dtype
    if not (A.is_floating_point() or A.is_complex()):
        return A.to(torch.float64).coalesce()
    return A.to(torch.promote_types(dtype, torch.float64)).coalesce().to(dtype)


def _transformations(tensor: Tensor) -> list[TransformType | None]:
    """The transformations that `tensor` depends on."""
    kinds = {level.level(): level.key() for level in get_interpreter_stack() or ()}
    found = []
    while is_functorch_wrapped_tensor(tensor):
        found.append(kinds.get(maybe_get_level(tensor)))
        tensor = get_unwrapped(tensor)
    return found


def _take_apart(A: Tensor) -> tuple[Tensor, Tensor]:
    if A.layout == torch.sparse_coo:
        A = _added_up(A)
        return A.values().clone(), A.indices()  # not a view of a sparse tensor, which Dynamo could not take
    pointers, inner = (part(A) for part in _PARTS[A.layout][:2])
    outer = torch.repeat_interleave(torch.arange(len(pointers) - 1, device=A.device), pointers.diff())
    pair = (outer, inner) if A.layout == torch.sparse_csr else (inner, outer)
    return _plain(_Values, A), torch.stack([index.long() for index in pair])


def put_together(values: Tensor, pointers: Tensor, inner: Tensor, shape: tuple, layout: torch.layout) -> Tensor:
    """A CSR or CSC tensor."""
    return _plain(_Compressed, values, pointers, inner, tuple(shape), layout)


def _plain(function: type[_SingleLevelFunction], *args: Any) -> Tensor:
    """`function.apply` for plain autograd, whatever transformation of torch.func is under way."""
    with enable_single_level_autograd_function():
        return cast(Any, function).apply(*args)


class _Values(_SingleLevelFunction):
    @staticmethod
    def forward(A: Tensor) -> Tensor:
        return A.detach().values().clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        (A,) = inputs
        pointers, inner = (part(A) for part in _PARTS[A.layout][:2])
        ctx.save_for_backward(pointers, inner)
        ctx.shape, ctx.layout = A.shape, A.layout

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Tensor:  # type: ignore[override]
        pointers, inner = ctx.saved_tensors
        return put_together(bar, pointers, inner, ctx.shape, ctx.layout)


class _Compressed(_SingleLevelFunction):
    @staticmethod
    def forward(values: Tensor, pointers: Tensor, inner: Tensor, shape: tuple, layout: torch.layout) -> Tensor:
        return _PARTS[layout][2](
            pointers, inner, values.contiguous(), shape, device=values.device, check_invariants=False
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, pointers, inner, _, ctx.layout = inputs
        ctx.save_for_backward(pointers, inner)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple:  # type: ignore[override]
        pointers, inner = ctx.saved_tensors
        if bar.layout == ctx.layout:
            parts = [part(bar) for part in _PARTS[bar.layout][:2]]
            if not (torch.equal(parts[0], pointers) and torch.equal(parts[1], inner)):
                raise RuntimeError("a gradient of a sparse tensor must have the pattern of that tensor")
            return _plain(_Values, bar), None, None, None, None
        outer = torch.repeat_interleave(torch.arange(len(pointers) - 1, device=inner.device), pointers.diff())
        where = (outer, inner) if ctx.layout == torch.sparse_csr else (inner, outer)
        return (bar if bar.layout == torch.strided else bar.to_dense())[where], None, None, None, None
