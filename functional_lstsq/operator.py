"""LinearOperator(matvec, params, in_size, dtype): a matrix known by its products, differentiable by its parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import optree
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from .closures import close
from .matrix import DTYPES
from .precision import double
from .transforms import load_forward_mode

Product = Callable[[Any, Tensor], Tensor]


class LinearOperator:
    """A linear map x -> matvec(params, x) for `lstsq` and `solve`, which need its products only.

    A pytree for torch.func and optree with the leaves of `params` for leaves: `torch.func.grad(loss)(operator)` is a
    LinearOperator whose params are the gradient.

    Args:
        matvec: `matvec(params, x)`, linear in x of shape (n,), gives (m,); of torch operations that torch.func can
            transform. Columns and batches are made of it by `torch.vmap`.
        params: any pytree of tensors, which derivatives are taken by where they are floating or complex.
        in_size: n.
        dtype: of the matrix: float32, float64, complex64 or complex128. A solve works in double precision, with params
            and x converted, whatever this is; `A @ x` converts x to it, and takes params as they are.
        rmatvec: `rmatvec(params, y)`, the adjoint, A^H y of shape (n,); None to have `torch.func.vjp` make it.

    Raises:
        TypeError, ValueError: an argument of the wrong type or size. A solve raises ValueError where products of random
            vectors are not linear, not each other's adjoints, or depend on other tensors that are being differentiated.

    Estimated errors are those of x and of the adjoint solution; that a gradient by params keeps its digits where its
    terms cancel is not judged.

    >>> import functional_lstsq as fl
    >>> def blur(kernel, x):
    ...     return torch.nn.functional.conv1d(x[None, None], kernel[None, None], padding=2)[0, 0]
    >>> operator = fl.LinearOperator(blur, torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64), 6)
    >>> operator
    LinearOperator(shape=(8, 6), dtype=torch.float64)
    >>> b = operator @ torch.arange(1.0, 7.0, dtype=torch.float64)
    >>> fl.lstsq(operator, b)
    tensor([1.0000, 2.0000, 3.0000, 4.0000, 5.0000, 6.0000], dtype=torch.float64)
    >>> torch.func.grad(lambda operator: fl.lstsq(operator, b).sum())(operator).params
    tensor([-19.7143, -22.0000, -20.2857], dtype=torch.float64)
    """

    __slots__ = ("dtype", "in_size", "matvec", "params", "rmatvec")
    matvec: Product
    params: Any
    in_size: int
    dtype: torch.dtype
    rmatvec: Product | None

    def __init__(
        self,
        matvec: Product,
        params: Any,
        in_size: int,
        dtype: torch.dtype = torch.float64,
        *,
        rmatvec: Product | None = None,
    ):
        for name, function in (("matvec", matvec), ("rmatvec", rmatvec)):
            if not callable(function) and not (name == "rmatvec" and function is None):
                raise TypeError(f"{name} must be callable, got {function!r}")
        if isinstance(in_size, bool) or not isinstance(in_size, int):
            raise TypeError(f"in_size must be an integer, got {in_size!r}")
        if in_size < 0:
            raise ValueError(f"in_size must not be negative, got {in_size}")
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be float32, float64, complex64 or complex128, got {dtype}")
        leaves = torch_pytree.tree_leaves(params)
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(f"params must be a pytree of tensors, got a leaf of type {type(leaf).__name__}")
        if len({leaf.device for leaf in leaves}) > 1:
            raise ValueError(f"params must be on one device, got {sorted({str(leaf.device) for leaf in leaves})}")
        self.matvec, self.params, self.in_size, self.dtype, self.rmatvec = matvec, params, in_size, dtype, rmatvec

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        leaves = torch_pytree.tree_leaves(self.params)
        return leaves[0].device if leaves else torch.device("cpu")

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n). Cost: one product."""
        origin = torch.zeros(self.in_size, dtype=self.dtype, device=self.device)
        return self._checked(self.matvec(self.params, origin))

    def closed(self) -> tuple[LinearOperator, tuple[int, int]]:
        """(the same, with products that hold no wrapped tensors, and its shape). Cost: one product, or one of each.

        What products take from elsewhere than `params` is out of sight of the rules that differentiate a solve.
        """

        def example(size: int) -> Tensor:
            return torch.zeros(size, dtype=self.dtype, device=self.device)

        matvec, y = close(self.matvec, "matvec", "params", self.params, example(self.in_size))
        shape, rmatvec = self._checked(y), self.rmatvec
        if rmatvec is not None:
            rmatvec, _ = close(rmatvec, "rmatvec", "params", self.params, example(shape[0]))
        return LinearOperator(matvec, self.params, self.in_size, self.dtype, rmatvec=rmatvec), shape

    def _checked(self, y: Any) -> tuple[int, int]:
        """(m, n), from what `matvec` gave for one vector."""
        if not isinstance(y, Tensor) or y.ndim != 1 or y.dtype != self.dtype:
            got = f"{y.dtype}, shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"matvec must give a tensor of {self.dtype}, shape (m,), for x of {self.dtype}, shape "
                f"({self.in_size},), got {got}"
            )
        return y.shape[0], self.in_size

    def matmul(self, X: Tensor) -> Tensor:
        """A X for X of shape (n,) or (n, k)."""
        if not isinstance(X, Tensor) or X.ndim not in (1, 2) or X.shape[0] != self.in_size:
            got = f"shape {tuple(X.shape)}" if isinstance(X, Tensor) else type(X).__name__
            raise ValueError(f"A @ X needs X of shape ({self.in_size},) or ({self.in_size}, k), got {got}")
        X = X.to(self.dtype)
        if X.ndim == 1:
            return self.matvec(self.params, X)
        return torch.vmap(lambda x: self.matvec(self.params, x), 1, 1)(X)

    __matmul__ = matmul

    def adjoint(self, Y: Tensor) -> Tensor:
        """A^H Y for Y of shape (m,) or (m, k)."""
        if Y.ndim == 2:
            return torch.vmap(self.adjoint, 1, 1)(Y)
        if self.rmatvec is not None:
            return self.rmatvec(self.params, Y.to(self.dtype))
        origin = torch.zeros(self.in_size, dtype=self.dtype, device=self.device)
        return torch.func.vjp(lambda x: self.matvec(self.params, x), origin)[1](Y.to(self.dtype))[0]

    def weighted(self, root: Tensor) -> LinearOperator:
        """diag(root) A, of which `root` (m,) is a parameter too."""
        adjoint = None if self.rmatvec is None else _WeightedAdjoint(self.rmatvec)
        return LinearOperator(_Weighted(self.matvec), (self.params, root), self.in_size, self.dtype, rmatvec=adjoint)

    def double(self, dtype: torch.dtype, on_failure: str = "raise") -> LinearOperator:
        """With parameters in double precision, and products of `dtype`; `on_failure` as of `convert`."""
        params = torch_pytree.tree_map(lambda leaf: double(leaf, "the derivative by params", on_failure), self.params)
        return LinearOperator(self.matvec, params, self.in_size, dtype, rmatvec=self.rmatvec)

    def __repr__(self) -> str:
        try:
            return f"LinearOperator(shape={self.shape}, dtype={self.dtype})"
        except Exception:  # a pytree's leaf may be anything
            return f"LinearOperator(params={self.params!r}, in_size={self.in_size}, dtype={self.dtype})"


@dataclass(frozen=True)
class _Weighted:
    matvec: Product

    def __call__(self, params: Any, x: Tensor) -> Tensor:
        return params[1].to(x.dtype) * self.matvec(params[0], x)


@dataclass(frozen=True)
class _WeightedAdjoint:
    rmatvec: Product

    def __call__(self, params: Any, y: Tensor) -> Tensor:
        return self.rmatvec(params[0], params[1].to(y.dtype) * y)


@dataclass(frozen=True)
class _Push:
    function: Callable[[Tensor], Tensor]

    def __call__(self, point: Tensor, x: Tensor) -> Tensor:
        return torch.func.jvp(self.function, (point,), (x,))[1]


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

    >>> import functional_lstsq as fl
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
        load_forward_mode()
        super().__init__(_Push(function), point, point.shape[0], point.dtype, rmatvec=_Pull(function))


def _flatten(A: LinearOperator) -> tuple[list, tuple]:
    return [A.params], (A.matvec, A.in_size, A.dtype, A.rmatvec)


def _unflatten(leaves: Any, context: tuple) -> LinearOperator:
    A = object.__new__(LinearOperator)  # no checks: a pytree holds axes, None or any other object in place of a leaf
    (A.params,) = leaves
    A.matvec, A.in_size, A.dtype, A.rmatvec = context
    return A


for _kind in (LinearOperator, JacobianOperator):
    torch_pytree.register_pytree_node(_kind, _flatten, _unflatten)
    cast(Any, optree.register_pytree_node)(
        _kind,
        lambda A: ((A.params,), _flatten(A)[1], ("params",)),
        lambda context, leaves: _unflatten(leaves, context),
        namespace=optree.registry.__GLOBAL_NAMESPACE,
    )
