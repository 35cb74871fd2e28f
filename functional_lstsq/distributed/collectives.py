"""The primitives `total` and `shared`: the sum over ranks, and the identity that is its adjoint.

    T = total(t) = sum of the t of all ranks         t_bar = shared(T_bar)
    s = shared(theta) = theta                         theta_bar = total(s_bar)

What is the same on all ranks has a cotangent that is the same on all ranks, as it is where all run the same program. A
function of such a theta that differs from rank to rank has cotangents that do too, whose sum is that of theta. (JAX has
these as psum and pbroadcast, of shard_map.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..torch_func.operations import define, differentiate
from ..torch_func.primitive import Primitive
from ..torch_func.tracing import in_graph, prepare_compiler
from .ranks import Ranks


def _sum_kernel(t: Tensor, group: str) -> Tensor:
    return Ranks(group).sum(t.clone(memory_format=torch.contiguous_format).resolve_conj())


def _same_kernel(t: Tensor, group: str) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def _fake(t: Tensor, group: str) -> Tensor:
    return t.new_empty(t.shape)


_sum = define("sum_over_ranks(Tensor t, str group) -> Tensor", _sum_kernel, _fake)
_same = define("same_on_ranks(Tensor t, str group) -> Tensor", _same_kernel, _fake)


class _Linear(Primitive):
    """Linear in its one tensor, entry by entry; the static argument is `Ranks`."""

    @classmethod
    def jvp_rule(cls, static, inputs, outputs, tangents):
        return cls.apply(static, tangents[0])

    @classmethod
    def vmap(cls, info, in_dims, static, t):
        return cls.apply(static, t.movedim(in_dims[1], 0).contiguous()), 0


class _Total(_Linear):
    @classmethod
    def forward(cls, static: Ranks, t: Tensor) -> Tensor:
        return _sum(t, static.name)

    @classmethod
    def vjp_rule(cls, static, inputs, outputs, cotangents, needed):
        return (_Shared.apply(static, cotangents[0]),)


class _Shared(_Linear):
    @classmethod
    def forward(cls, static: Ranks, t: Tensor) -> Tensor:
        return _same(t, static.name)

    @classmethod
    def vjp_rule(cls, static, inputs, outputs, cotangents, needed):
        return (_Total.apply(static, cotangents[0]),)


differentiate(_sum, lambda t, group: _Total.apply(Ranks(group), t))
differentiate(_same, lambda t, group: _Shared.apply(Ranks(group), t))


@in_graph
def total_of(t: Tensor, group: str) -> Tensor:
    """`total`, by the name of the group."""
    return _Total.apply(Ranks(group), t)


@in_graph
def shared_by(t: Tensor, group: str) -> Tensor:
    """`shared`, by the name of the group."""
    return _Shared.apply(Ranks(group), t)


def zero_of(leaves: Sequence[Tensor], X: Tensor) -> Tensor:
    """Zeros (P, 1, k) that depend on X (P, rows, k) and on leaves (P, ...) as any product of a matrix of them may.

    Ranks whose products depend on less than those of others would not take part in sums of derivatives, to any order:
    this is exp(sum of leaves) X, of no numbers of each.
    """
    exponent = X[:, :0, 0].real
    for leaf in leaves:
        if leaf.is_floating_point() or leaf.is_complex():
            real = leaf.real if leaf.is_complex() else leaf
            exponent = exponent + real[:, None].flatten(1)[:, :0].to(exponent.dtype)
    return (exponent.exp()[:, :, None] * X[:, :0]).sum(1, keepdim=True)


def total(t: Tensor, group: Any = None) -> Tensor:
    """The sum over ranks of a tensor of which each has its own: of the parts of a loss, say. Its derivative is one.

    Args:
        t: a floating or complex tensor, of the same shape and dtype on all ranks.
        group: of torch.distributed; None for all ranks.

    Returns:
        A tensor like t, the same on all ranks to the bit. All of torch.func goes through, to any order.

    Raises:
        TypeError, RuntimeError: t is no such tensor; torch.distributed is not initialised.
        RankError: a rank was lost, or has a tensor of another size.

    Cost: one all-reduce; none of a derivative in reverse mode.

    >>> import torch, functional_lstsq as fl
    >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    >>> fl.distributed.total(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    >>> torch.distributed.destroy_process_group()
    """
    _require_numbers("t", t)
    return total_of(t, _name_of(group))


def shared(theta: Any, group: Any = None) -> Any:
    """Parameters that are the same on all ranks, where each makes its own rows of them: their gradient is the sum.

    The identity, whose derivative in reverse mode is the sum over ranks. Without it the gradient by theta on a rank
    would be that of its own rows alone. A derivative by theta needs it wherever theta goes into what belongs to a rank:
    rows of A and b, weights, a part of the loss that `total` sums up. Where the solution x itself goes into what
    belongs to a rank, it is x that is shared.

    Args:
        theta: a floating or complex tensor, the same on all ranks, or a pytree of such tensors.
        group: of torch.distributed; None for all ranks.

    Returns:
        What it is given. All of torch.func goes through, to any order.

    Raises:
        TypeError, RuntimeError: theta holds something else; torch.distributed is not initialised.

    Cost: nothing; of a derivative in reverse mode one all-reduce.

    >>> import torch, functional_lstsq as fl
    >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    >>> loss = lambda theta: fl.distributed.total(fl.distributed.shared(theta).square().sum())
    >>> torch.func.grad(loss)(torch.tensor([1.0, 2.0]))
    tensor([2., 4.])
    >>> torch.distributed.destroy_process_group()
    """
    name = _name_of(group)

    def one(leaf: Any) -> Tensor:
        _require_numbers("theta", leaf)
        return shared_by(leaf, name)

    return torch.utils._pytree.tree_map(one, theta)


def _name_of(group: Any) -> str:
    if torch.compiler.is_compiling():
        prepare_compiler()
    return Ranks.of(group).name


def _require_numbers(name: str, t: Any) -> None:
    if not (isinstance(t, Tensor) and t.layout == torch.strided and (t.is_floating_point() or t.is_complex())):
        got = f"{t.dtype}, layout {t.layout}" if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} must be a floating or complex dense tensor, got {got}")
