"""What a solve is given of an operator, and its products for one vector or many, one matrix or a batch of them.

`product` is what rules differentiate. Solvers multiply plain tensors, for which functions serve that torch.func cannot
transform: with NumPy, C or a sparse tensor in them they are called for one column after the other, and torch's autograd
makes an adjoint that did not come with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from ..sparse.operator import Product
from ..torch_func.closures import columns
from ..torch_func.tracing import without_hooks
from .settings import Settings

# Those of graphs, which live as long as the process.
_HERE = "a LinearOperator of one process only, number"
_numbers: dict[Any, int] = {}
_known: dict[int, OperatorStatic] = {}


def operator_of(text: str) -> OperatorStatic:
    """What has this text."""
    found = _known.get(int(text.rsplit(" ", 1)[1]))
    if found is None:
        raise ValueError(f"this graph was saved with {text}, which does not exist here: make the graph where it runs")
    return found


@dataclass(frozen=True)
class OperatorStatic:
    """What a solve is given of an operator, and for what; `product` multiplies with A, which may be its adjoint."""

    matvec: Product
    rmatvec: Product | None
    spec: Any
    m: int
    n: int
    dtype: torch.dtype
    wide: bool  # the user's operator is the adjoint of A
    working: torch.dtype  # in which the products are made
    settings: Settings
    on_failure: str

    @property
    def height(self) -> int:
        """How many rows there are in all places; m are here."""
        return self.m

    @property
    def unit(self) -> float:
        """Machine epsilon of the products."""
        return torch.finfo(self.working).eps

    @property
    def text(self) -> str:
        """What stands for this in a graph, in this process alone: functions cannot be written down."""
        others = (
            self.m,
            self.n,
            self.dtype,
            self.wide,
            self.working,
            self.settings.text,
            self.on_failure,
            str(self.spec),
        )
        number = _numbers.setdefault((*map(_identities, (self.matvec, self.rmatvec)), *others), len(_numbers))
        _known.setdefault(number, self)
        return f"{_HERE} {number}"

    def total(self, t: Tensor) -> Tensor:
        """t, a sum over the rows that are here, summed over all places."""
        return t

    def derivative(self) -> OperatorStatic:
        """For the solves of a rule: what failed under throw=False has NaN for a derivative."""
        return self if self.on_failure == "raise" else replace(self, on_failure="nan")

    def product(self, leaves: Sequence[Tensor], X: Tensor, *, adjoint: bool) -> Tensor:
        """A X or A^H X of shape (P, rows, k), for leaves (P, ...)."""
        forward = adjoint == self.wide
        if forward or self.rmatvec is not None:
            return self._batch(self.matvec if forward else self.rmatvec, leaves, X)
        origin = X.new_zeros((X.shape[0], self.m if self.wide else self.n, X.shape[2]))
        pulled: Any = torch.func.vjp(lambda Y: self._batch(self.matvec, leaves, Y), origin)
        return pulled[1](X)[0]

    def plainly(self, leaves: Sequence[Tensor], X: Tensor, *, adjoint: bool) -> Tensor:
        """As `product`, of plain tensors."""
        forward, X = adjoint == self.wide, X.resolve_conj()
        leaves = [leaf.detach() for leaf in leaves]
        if forward or self.rmatvec is not None:
            return self._batch(self.matvec if forward else self.rmatvec, leaves, X)
        with torch.inference_mode(False), torch.enable_grad(), without_hooks():
            leaves = [leaf.clone() if leaf.is_inference() else leaf for leaf in leaves]
            size = X.shape[0], self.m if self.wide else self.n, X.shape[2]
            origin = torch.zeros(size, dtype=X.dtype, device=X.device, requires_grad=True)
            try:
                result = self._batch(self.matvec, leaves, origin)
            except RuntimeError as error:  # NumPy refuses what is being differentiated
                raise ValueError(f"torch cannot make the adjoint of matvec ({error}): pass rmatvec") from error
            if not result.requires_grad:
                raise ValueError("torch cannot make the adjoint of matvec (it gives no derivative): pass rmatvec")
            return torch.autograd.grad(result, origin, X.clone() if X.is_inference() else X)[0]

    def _batch(self, function: Product | None, leaves: Sequence[Tensor], X: Tensor) -> Tensor:
        assert function is not None

        def one(leaves: Sequence[Tensor], X: Tensor) -> Tensor:
            params = torch_pytree.tree_unflatten(list(leaves), self.spec)
            return columns(lambda x: function(params, x), X)

        alone = X.shape[0] == 1
        result = one([leaf[0] for leaf in leaves], X[0])[None] if alone else _each(one, leaves, X)
        rows = self.m if (function is self.matvec) != self.wide else self.n
        if result.shape[1] != rows:
            name = "matvec" if function is self.matvec else "rmatvec"
            raise ValueError(f"{name} must give a tensor of shape ({rows},), got shape ({result.shape[1]},)")
        return result


def _each(one: Any, leaves: Sequence[Tensor], X: Tensor) -> Tensor:
    """`one` of each matrix of a batch, as `columns` has it of columns."""
    try:
        return torch.vmap(one)(list(leaves), X)
    except Exception:
        if not X.shape[0]:
            raise
    return torch.stack([one([leaf[p] for leaf in leaves], X[p]) for p in range(X.shape[0])])


def _identities(thing: Any) -> Any:
    """What tells a product from others: functions of the user's may be equal that are not the same."""
    if is_dataclass(thing) and type(thing).__module__.startswith("functional_lstsq."):
        return type(thing), *(_identities(getattr(thing, field.name)) for field in fields(thing))
    if isinstance(thing, tuple):
        return tuple(map(_identities, thing))
    return thing if isinstance(thing, (int, float, str, torch.dtype, type(None))) else id(thing)


@contextmanager
def transformed():
    """Tell what a derivative by params asks of products, where one fails."""
    try:
        yield
    except (RuntimeError, NotImplementedError, TypeError) as error:
        if isinstance(error, torch.linalg.LinAlgError):
            raise
        raise TypeError(
            f"a derivative by params needs a matvec that torch.func can transform, got an error: {error}. In the place "
            "of a torch sparse tensor use SparseMatrix, whose A.matmul(x) it can"
        ) from error
