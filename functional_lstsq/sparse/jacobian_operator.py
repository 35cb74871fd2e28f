"""JacobianOperator(function, point): the Jacobian of a function, known by its products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..torch_func.forward_mode import jvp
from ..torch_func.tracing import load_forward_mode
from .operator import LinearOperator, register


@dataclass(frozen=True)
class _Push:
    function: Callable[[Tensor], Tensor]

    def __call__(self, point: Tensor, x: Tensor) -> Tensor:
        return jvp(self.function, (point,), (x,))[1]


@dataclass(frozen=True)
class _Pull:
    function: Callable[[Tensor], Tensor]

    def __call__(self, point: Tensor, y: Tensor) -> Tensor:
        return torch.func.vjp(self.function, point)[1](y)[0]


class JacobianOperator(LinearOperator):
    """The Jacobian of `function` at `point` as a LinearOperator, never formed: for Gauss-Newton steps.

    Its parameter is the point, so that a derivative by it takes the second derivatives of the function.

    Args:
        function: takes a tensor of shape (n,), gives one of shape (m,) and the same dtype.
        point: (n,), floating or complex.

    >>> import torch, functional_lstsq as fl
    >>> t = torch.linspace(0, 1, 5, dtype=torch.float64)
    >>> residual = lambda p: p[0] * torch.exp(p[1] * t) - 2 * torch.exp(-t)
    >>> p = torch.tensor([1.5, -0.5], dtype=torch.float64)
    >>> for _ in range(5):
    ...     p = p - fl.lstsq(fl.JacobianOperator(residual, p), residual(p))
    >>> p
    tensor([ 2., -1.], dtype=torch.float64)
    """

    __slots__ = ()

    def __init__(self, function: Callable[[Tensor], Tensor], point: Tensor):
        if not callable(function):
            raise TypeError(f"function must be callable, got {function!r}")
        if not isinstance(point, Tensor) or point.ndim != 1:
            got = f"shape {tuple(point.shape)}" if isinstance(point, Tensor) else type(point).__name__
            raise TypeError(f"point must be a tensor of shape (n,), got {got}")
        if torch.compiler.is_dynamo_compiling():
            raise TypeError("torch.compile cannot take a JacobianOperator; compile what makes its point")
        load_forward_mode()
        super().__init__(_Push(function), point, point.shape[0], rmatvec=_Pull(function))


register(JacobianOperator)
