"""Functions of the user's as the rules of a primitive need them: free of tensors that belong to transformations.

A rule calls them on levels of torch.func other than the one they were written on. A tensor that a function closes over
may be wrapped for a level that is not there then: torch fails on it (with an internal error). What is not being
differentiated or mapped over is replaced by the plain tensor in it; what is would lose its derivative, and is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    maybe_get_bdim,
    maybe_get_level,
)
from torch.overrides import TorchFunctionMode

from .tracing import concrete, unseen_by_transforms


def close(function: Callable, name: str, where: str, *examples: Any) -> tuple[Callable, Any]:
    """(`function` without wrapped tensors in its closure, what it gives for `examples`). Cost: one call.

    Args:
        name, where: what the function is called in an error, and where the tensors should have been handed over.
        examples: pytrees; tensors in them may be wrapped, and are taken for one plain element of theirs.

    Raises:
        ValueError: the result depends on tensors, other than the examples, that are being transformed.
    """
    differentiating = torch.is_grad_enabled()
    given = torch_pytree.tree_map(lambda leaf: plain(leaf) if isinstance(leaf, Tensor) else leaf, examples)
    seen = _Seen(leaf for leaf in torch_pytree.tree_leaves(given) if isinstance(leaf, Tensor))
    with torch.enable_grad(), seen:
        try:
            result = function(*given)
        except Exception as error:
            if not torch._C._are_functorch_transforms_active():
                raise
            try:  # NumPy takes no tensor that torch.func has wrapped, as it does all that is made while it is about
                with unseen_by_transforms():
                    result = function(*given)
            except Exception:
                raise error from None
    for leaf in torch_pytree.tree_leaves(result):
        if isinstance(leaf, Tensor) and _transformed(leaf, differentiating):
            raise ValueError(
                f"{name} depends on tensors that are not in {where} and are being differentiated or transformed; "
                f"their derivatives would be lost: hand them over in {where} (or detach them)"
            )
    return (_Closed(function, name, where, list(seen.met.values())) if seen.met else function), result


def columns(function: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
    """`function` of every column of X (rows, k), side by side: by torch.vmap, or one after the other where it cannot.

    NumPy, C and sparse tensors are what torch.vmap does not see through. An error of the function's own comes up again.
    """
    if X.shape[1] != 1:
        try:
            return torch.vmap(function, 1, 1)(X)
        except Exception:
            if not X.shape[1]:
                raise
    return torch.stack([function(x).clone() for x in X.unbind(1)], 1)  # results may share one buffer


def plain(tensor: Tensor) -> Tensor:
    """One element of `tensor`, detached: of the shape that it has on this level, without tangent or batch."""
    dims = []
    for wrapped in _chain(tensor):
        dims.append(maybe_get_bdim(wrapped))
        tensor = get_unwrapped(wrapped)
    tensor = tensor.detach()
    for dim in reversed(dims):
        if dim >= 0:  # of an empty batch no element is there, and ones are as good as any numbers
            tensor = (
                tensor.select(dim, 0)
                if tensor.shape[dim]
                else tensor.new_ones((*tensor.shape[:dim], *tensor.shape[dim + 1 :]))
            )
    return concrete(tensor)  # every operation wraps its result for the levels there are


def _chain(tensor: Tensor) -> Iterator[Tensor]:
    """The wrappers of torch.func around a tensor, the outermost first."""
    while is_functorch_wrapped_tensor(tensor):
        yield tensor
        tensor = get_unwrapped(tensor)


def _transformed(tensor: Tensor, differentiating: bool) -> bool:
    """Whether any level of torch.func, or autograd outside of them, maps over `tensor` or differentiates it."""
    kinds = {level.level(): level.key() for level in get_interpreter_stack() or ()}
    for wrapped in _chain(tensor):
        kind = kinds.get(maybe_get_level(wrapped))
        if kind == TransformType.Vmap or wrapped.requires_grad:
            return True
        if kind == TransformType.Jvp and torch._VF._unpack_dual(wrapped, level=0)[1] is not None:  # type: ignore[attr-defined]
            return True
        tensor = get_unwrapped(wrapped)
    return differentiating and tensor.requires_grad


class _Seen(TorchFunctionMode):
    """Collects the tensors that operations are given and did not make themselves."""

    def __init__(self, known: Iterator[Tensor]):
        self.met: dict[int, Tensor] = {}
        self.made: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._kept = list(known)  # a number stands for an object while that lives
        self._note(self._kept)

    def _note(self, tensors: Any) -> None:
        for leaf in torch_pytree.tree_leaves(tensors):
            if isinstance(leaf, Tensor):
                self.made[id(leaf)] = leaf

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for leaf in torch_pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and id(leaf) not in self.made:
                self.met[id(leaf)] = leaf
        result = func(*args, **(kwargs or {}))
        self._note(result)
        return result


class _Closed:
    """`function`, with plain tensors in place of the `met` ones that are wrapped, which nothing may change."""

    def __init__(self, function: Callable, name: str, where: str, met: list[Tensor]):
        self.function, self.name, self.where = function, name, where
        self.used = [tensor for tensor in map(concrete, met) if not tensor.is_inference()]
        self.versions = [tensor._version for tensor in self.used]
        self.met = met  # a number stands for an object while that lives
        foreign = [tensor for tensor in met if is_functorch_wrapped_tensor(tensor) or tensor.requires_grad]
        self.instead = {id(tensor): plain(tensor) for tensor in foreign}

    def __call__(self, *args: Any) -> Any:
        # As autograd does for tensors that it has saved: a rule would take the derivative at other numbers.
        if [tensor._version for tensor in self.used] != self.versions:
            raise ValueError(
                f"{self.name} uses a tensor that has been changed in place since the solve; hand over in {self.where} "
                "what changes"
            )
        with _Substitution(self.instead) if self.instead else nullcontext():
            return self.function(*args)


class _Substitution(TorchFunctionMode):
    def __init__(self, instead: dict[int, Tensor]):
        self.instead = instead

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        def replaced(leaf: Any) -> Any:
            return self.instead.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf

        return func(*torch_pytree.tree_map(replaced, args), **torch_pytree.tree_map(replaced, kwargs or {}))
