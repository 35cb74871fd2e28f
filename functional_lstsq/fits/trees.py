"""Unknowns and residuals that are pytrees, as one vector each; complex residuals as two real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from ..sparse.trees import TreeShape


def as_vector(x0: Any) -> tuple[Any, Callable[[Tensor], Any]]:
    """(the leaves of a pytree of tensors one after the other, what makes the pytree of such a vector).

    A tensor, and what holds anything else than tensors, is left as it is, for those to refuse who check it.
    """
    leaves = torch_pytree.tree_leaves(x0)
    if isinstance(x0, Tensor) or not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        return x0, lambda x: x
    for leaf in leaves:
        if leaf.layout != torch.strided or leaf.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"x0 must hold dense tensors of float32 or float64, got {leaf.dtype}, {leaf.layout}")
        if leaf.device != leaves[0].device:
            raise ValueError(f"x0 must be on one device, got {leaves[0].device} and {leaf.device}")
    return torch.cat([leaf.reshape(-1) for leaf in leaves]), TreeShape.of(x0).tree


def as_residual(r: Any) -> Any:
    """A vector of real numbers of all in r: the leaves of a pytree in turn, of complex ones the real parts and then the
    imaginary ones. What is no such residual is left as it is.
    """
    leaves = torch_pytree.tree_leaves(r)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves) or (isinstance(r, Tensor) and r.ndim != 1):
        return r
    parts = [part for leaf in leaves for part in ((leaf.real, leaf.imag) if leaf.is_complex() else (leaf,))]
    return parts[0] if len(parts) == 1 and parts[0].ndim == 1 else torch.cat([part.reshape(-1) for part in parts])
