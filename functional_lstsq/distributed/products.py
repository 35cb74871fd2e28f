"""`Products` over ranks: each has some of the rows of A, and only sums and maxima over rows go from rank to rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..linear.operator_products import OperatorProducts
from ..sparse.base import Products, dot
from ..sparse.double_double import Pair
from ..sparse.numerics import EPS
from ..sparse.plain_products import Operator
from .places import OnRanks
from .ranks import Ranks

_FRESH = 8  # steps after which A^H r is taken of r itself, before rounding errors of its updates add up
_SAFE = 1e-4  # of |r|^2 before a step: what is left after it is as accurate as 12 digits down to this


@dataclass
class _Norm:
    """The norms (P, k) over all rows of a tensor, as long as that is at this version."""

    of: Tensor
    version: int
    norms: Tensor


@dataclass
class _Step:
    """A step r -= alpha q of conjugate gradients, whose sums over rows are made before alpha is known."""

    r: Tensor
    version: int  # of r, after the last step
    image: Tensor  # A^H r, then
    of_q: Tensor  # A^H q, and behind it the rows |q|^2, Re <r, q> and |r|^2
    age: int  # steps since A^H r was taken of r itself


class OverRanks(Products):
    """P matrices of which this rank has some rows; all methods are called by all ranks, in the same order.

    A step of conjugate gradients takes one sum, of n + 3 numbers a column: with A^H q come |q|^2 and what the norm of
    the next r is made of, and A^H (r - alpha q) follows without another one. Each eighth step takes A^H r along too.
    """

    ranks: Ranks
    whole: int  # rows on all ranks
    _norm: _Norm | None = None
    _step: _Step | None = None

    def adjoint_here(self, Y: Tensor) -> Tensor:
        """A^H Y of this rank's rows alone."""
        raise NotImplementedError

    @property
    def height(self) -> int:
        return self.whole

    @property
    def leads(self) -> bool:  # type: ignore[override]
        return self.ranks.place == 0

    def adjoint(self, Y: Tensor, out: Tensor | None = None) -> Tensor:
        whole = Y.new_empty((self.copies, self.n + 1, Y.shape[2]))
        whole[:, :-1], whole[:, -1] = self.adjoint_here(Y), dot(Y, Y)
        self.ranks.sum(whole)
        self._step, self._norm = None, None
        if not Y.is_inference():  # which has no version
            self._norm = _Norm(Y, Y._version, whole[:, -1].real.sqrt())
        return whole[:, :-1].contiguous() if out is None else out.copy_(whole[:, :-1])

    def curvature(self, q: Tensor, r: Tensor) -> Tensor:
        k, last = q.shape[2], self._step
        fresh = last is None or last.r is not r or r.is_inference() or last.version != r._version or last.age >= _FRESH
        whole = q.new_empty((self.copies, self.n + 3, 2 * k if fresh else k))
        whole[:, :-3] = self.adjoint_here(torch.cat([q, r], 2) if fresh else q)
        whole[:, -3:, k:] = 0
        for row, pair in zip((-3, -2, -1), ((q, q), (r, q), (r, r)), strict=True):
            whole[:, row, :k] = dot(*pair)
        self.ranks.sum(whole)
        if last is None or fresh:
            image, age = whole[:, :-3, k:], 0
        else:
            image, age = last.image, last.age
        self._step = _Step(r, 0, image, whole[:, :, :k], age)
        return whole[:, -3, :k].real

    def stepped(self, r: Tensor, q: Tensor, alpha: Any, out: Tensor) -> Tensor:
        step = self._step
        assert step is not None
        step.image = step.image - alpha * step.of_q[:, :-3]
        step.age += 1
        square, inner, before = step.of_q[:, -3:].real.unbind(1)
        alpha = alpha[:, 0].real if isinstance(alpha, Tensor) else alpha
        after = before - 2 * alpha * inner + alpha * alpha * square
        self._norm = None
        if not r.is_inference():
            step.version = r._version
            if bool((after >= _SAFE * before).all()):
                self._norm = _Norm(r, r._version, after.sqrt())
        return out.copy_(step.image)

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        return self.ranks.sum(dot(x, y).contiguous())

    def norm(self, y: Tensor) -> Tensor:
        if self._norm is not None and self._norm.of is y and self._norm.version == y._version:
            return self._norm.norms
        return self.dot(y, y).sqrt()

    def largest(self, y: Tensor) -> Tensor:
        here = y.abs().amax(1) if y.shape[1] else y.real.new_zeros((len(y), y.shape[2]))
        # A maximum of NaN and a number may be either.
        unknown = here.isnan()
        flagged = self.ranks.max(torch.stack([torch.where(unknown, 0.0, here), unknown.to(here.dtype)]))
        return torch.where(flagged[1] > 0, torch.nan, flagged[0])

    def everywhere(self, flags: Tensor) -> Tensor:
        return self.ranks.everywhere(flags)


class RowsOverRanks(OverRanks):
    """Of matrices whose entries are known: this rank has the rows `local`."""

    has_entries = has_exact_products = True
    unit = EPS

    def __init__(self, local: Operator, ranks: Ranks, height: int):
        self.local, self.ranks, self.whole = local, ranks, height
        self.copies, self.m, self.n, self.dtype, self.device = local.copies, local.m, local.n, local.dtype, local.device
        self.pattern, self.values, self.places = local.pattern, local.values, OnRanks(ranks, local.device)

    def matmul(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        return self.local.matmul(X, out)

    def adjoint_here(self, Y: Tensor) -> Tensor:
        return self.local.adjoint(Y)

    def gram(self) -> Tensor:
        return self.ranks.sum(self.local.gram().contiguous())

    def stacked(self, R: Tensor) -> Tensor:
        whole = torch.zeros_like(R)
        for of_rank in self.ranks.each(R):
            whole = torch.linalg.qr(torch.cat([whole, of_rank], 1), mode="r").R
        return whole

    def exact(self, *, adjoint: bool):
        multiply = self.local.exact(adjoint=adjoint)

        def summed(x: Pair) -> Pair:
            if self.local.pattern.nnz:
                here = multiply(x)
            else:
                here = Pair.of(x.high.new_zeros((self.copies, self.n if adjoint else self.m, x.high.shape[2])))
            if not adjoint:
                return here
            whole = Pair.of(torch.zeros_like(here.high))
            for of_rank in self.ranks.each(torch.stack([here.high, here.low])):
                whole = whole.add(Pair(of_rank[0], of_rank[1]))
            return whole

        return summed

    # Sizes.

    def column_sizes(self, damp: Tensor | None) -> tuple[Tensor, Tensor]:
        sizes, columns = self.values.abs(), self.pattern.indices[1].expand(self.copies, -1)
        largest = sizes.new_zeros((self.copies, self.n)).scatter_reduce(1, columns, sizes, "amax")
        self.ranks.max(largest)
        largest = largest if damp is None else torch.maximum(largest, damp)
        largest = torch.where(largest == 0, 1.0, largest)
        squares = torch.zeros_like(largest).scatter_add(1, columns, (sizes / largest.gather(1, columns)).square())
        self.ranks.sum(squares)
        return largest, squares if damp is None else squares + (damp / largest).square()

    def frobenius(self) -> Tensor:
        return self.ranks.sum(self.local.frobenius().square()).sqrt()

    def absolute_matmul(self, X: Tensor) -> Tensor:
        return self.local.absolute_matmul(X)

    def absolute_adjoint(self, Y: Tensor) -> Tensor:
        return self.ranks.sum(self.local.absolute_adjoint(Y))

    def vanished(self, scale: Tensor) -> Tensor:
        return ~self.everywhere(~self.local.vanished(scale))

    # Matrices that are made of it.

    def with_values(self, values: Tensor) -> RowsOverRanks:
        return self._of(self.local.with_values(values))

    def scaled(self, scale: Tensor) -> RowsOverRanks:
        return self._of(self.local.scaled(scale))

    def weighted(self, root: Tensor) -> RowsOverRanks:
        return self._of(self.local.weighted(root))

    def _of(self, local: Operator) -> RowsOverRanks:
        return RowsOverRanks(local, self.ranks, self.whole)


class OperatorOverRanks(OverRanks, OperatorProducts):
    """Of an operator that is known by the products of each rank's rows."""

    def __init__(self, static: Any, leaves: Sequence[Tensor], like: Tensor):
        super().__init__(static, leaves, like)
        self.ranks, self.whole = static.ranks, static.whole

    def adjoint_here(self, Y: Tensor) -> Tensor:
        return self.product(Y, adjoint=True)
