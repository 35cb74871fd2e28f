"""`Products` over ranks: each has some of the rows of A, and only sums and maxima over rows go from rank to rank."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sparse.base import Products, dot
from ..sparse.double_double import Pair
from ..sparse.numerics import EPS
from ..sparse.plain_products import Operator
from .ranks import Ranks


class RowsOverRanks(Products):
    """P matrices of which this rank has the rows `local`; all methods are called by all ranks, in the same order.

    `adjoint` brings the norms of what it is given along in its sum, n + 1 numbers a column, since an iteration of
    conjugate gradients asks for that of the residual next: so an iteration takes two sums, this one and that of
    |A p|^2.

    Args:
        height: the number of rows on all ranks.
    """

    has_exact_products = True
    unit = EPS

    def __init__(self, local: Operator, ranks: Ranks, height: int):
        self.local, self.ranks, self._height = local, ranks, height
        self.copies, self.m, self.n, self.dtype, self.device = local.copies, local.m, local.n, local.dtype, local.device
        self.pattern, self.values = local.pattern, local.values
        self._seen: tuple[Tensor, int, Tensor] | None = None  # what `adjoint` was given last, its version and its norms

    @property
    def height(self) -> int:
        return self._height

    def matmul(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        return self.local.matmul(X, out)

    def adjoint(self, Y: Tensor, out: Tensor | None = None) -> Tensor:
        whole = Y.new_empty((self.copies, self.n + 1, Y.shape[2]))
        whole[:, :-1] = self.local.adjoint(Y)
        whole[:, -1] = dot(Y, Y)
        self.ranks.sum(whole)
        self._seen = None if Y.is_inference() else (Y, Y._version, whole[:, -1].real.sqrt())
        return whole[:, :-1].contiguous() if out is None else out.copy_(whole[:, :-1])

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        return self.ranks.sum(dot(x, y).contiguous())

    def norm(self, y: Tensor) -> Tensor:
        if self._seen is not None and self._seen[0] is y and self._seen[1] == y._version:
            return self._seen[2]
        return self.dot(y, y).sqrt()

    def largest(self, y: Tensor) -> Tensor:
        here = y.abs().amax(1) if y.shape[1] else y.real.new_zeros((len(y), y.shape[2]))
        # A maximum of NaN and a number may be either.
        unknown = here.isnan()
        flagged = self.ranks.max(torch.stack([torch.where(unknown, 0.0, here), unknown.to(here.dtype)]))
        return torch.where(flagged[1] > 0, torch.nan, flagged[0])

    def everywhere(self, flags: Tensor) -> Tensor:
        return self.ranks.max((~flags).to(torch.int64)) == 0

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
        return RowsOverRanks(local, self.ranks, self._height)
