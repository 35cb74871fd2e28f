"""Products of operators around those of the user: in a precision, of pytrees, with weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from .operator_algebra import Product
from .trees import TreeShape

_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def in_precision(leaf: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter in the precision of `dtype`, if it holds real or complex numbers."""
    if leaf.is_complex():
        return leaf.to(torch.promote_types(dtype, torch.complex64))
    return leaf.to(_REAL.get(dtype, dtype)) if leaf.is_floating_point() else leaf


@dataclass(frozen=True)
class InPrecision:
    """A product in a precision of its own, between numbers in another; what it is given it may overwrite."""

    function: Product
    name: str
    dtype: torch.dtype
    apart: bool = False  # a real map of complex numbers, by their real and imaginary parts

    def __call__(self, params: Any, x: Tensor) -> Tensor:
        params = torch_pytree.tree_map(lambda leaf: in_precision(leaf, self.dtype), params)
        own = x.to(self.dtype, copy=True)
        try:
            if self.apart:
                y: Any = self.function(params, own.real.clone()) + 1j * self.function(params, own.imag.clone())
            else:
                y = self.function(params, own)
        except RuntimeError as error:
            if "dtype" not in str(error):
                raise
            raise TypeError(
                f"{self.name} must take params and a vector of {self.dtype}, got an error of torch: {error}. The dtype "
                "of LinearOperator says what it is given"
            ) from error
        if not isinstance(y, Tensor) or y.ndim != 1 or y.dtype != self.dtype:
            got = f"{y.dtype}, shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            size = "m" if self.name == "matvec" else "n"
            raise ValueError(
                f"{self.name} must give a tensor of {self.dtype}, shape ({size},), for one of {self.dtype}, shape "
                f"{tuple(x.shape)}, got {got}; the dtype= of LinearOperator says what it is given"
            )
        return y.to(x.dtype)


@dataclass(frozen=True)
class OfTrees:
    """A product of vectors, made of one of pytrees."""

    function: Product
    name: str
    given: TreeShape
    found: TreeShape

    def __call__(self, params: Any, x: Tensor) -> Tensor:
        return self.found.vector(self.function(params, self.given.tree(x)), f"what {self.name} gives")


@dataclass(frozen=True)
class Weighted:
    """x -> root A x for params (those of A, root)."""

    matvec: Product

    def __call__(self, params: Any, x: Tensor) -> Tensor:
        return params[1].to(x.dtype) * self.matvec(params[0], x)


@dataclass(frozen=True)
class WeightedAdjoint:
    """y -> A^H root y"""

    rmatvec: Product

    def __call__(self, params: Any, y: Tensor) -> Tensor:
        return self.rmatvec(params[0], params[1].to(y.dtype) * y)
