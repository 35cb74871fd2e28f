"""What solvers ask of a matrix: `Products`, plain tensors below every transformation.

A stands for P matrices (m, n) at once, and vectors for columns: X (P, n, k), Y (P, m, k). A class of your own gives
`matmul` and `adjoint`; what follows from these has a default, which a class that knows more of A replaces.

What has m rows may lie in several places, as A does: sums over rows are taken by `adjoint`, `dot`, `norm` and
`largest`, and nowhere else. What has n rows is whole in each place. Decisions are taken on numbers that are the same in
all places, for which `everywhere` asks, since places that do not decide alike would wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .double_double import Pair
from .lazy import lazy
from .numerics import EPS, noise
from .pattern import SparsePattern
from .places import HERE, Places

COARSE = 1e-10  # unit above which products are in single precision
_CHUNK = 2**18  # numbers that a cache holds
_SLACK = 4  # rounding errors of a product whose entries are not known, in units of |A| |x| eps
_SAMPLES = 4  # random vectors whose products tell the size of A


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Real column products: (P, rows, k) -> (P, k)."""
    if x.shape[2] <= 8 or x.numel() <= _CHUNK:
        return torch.linalg.vecdot(x, y, dim=1).real
    # Torch sums large blocks column by column, through memory rather than cache.
    parts = zip(*(t.split(max(1, _CHUNK // (x.shape[0] * x.shape[2])), 1) for t in (x, y)), strict=True)
    total = torch.zeros_like(x[:, 0].real)
    for a, b in parts:
        total += torch.linalg.vecdot(a, b, dim=1).real
    return total


def norm(x: Tensor) -> Tensor:
    """Column norms: (P, rows, k) -> (P, k)."""
    if x.shape[2] <= 8 or x.numel() <= _CHUNK:
        return torch.linalg.vector_norm(x, dim=1)
    return dot(x, x).sqrt()


class Products:
    """P matrices A (m, n), known by their products.

    Attributes:
        copies, m, n: P and the shape of each matrix, m being the rows that are here.
        height: how many there are in all.
        dtype, device: of A; vectors have the same.
        unit: the rounding error of a product, relative to |A| |x|.
        has_entries: whether there are `pattern` and `values` (P, nnz), which methods with a factor work with.
        places: where the rows are.
        has_exact_products: whether there is `exact`.
    """

    copies: int
    m: int
    n: int
    dtype: torch.dtype
    device: torch.device
    unit: float = EPS
    has_entries: bool = False
    pattern: SparsePattern
    values: Tensor
    has_exact_products: bool = False
    steepest: Tensor | None = None  # (P, 1), about the largest singular value, where columns have one scale
    places: Places = HERE
    leads: bool = True  # whether this is the place, of all where there are rows, that counts what belongs to no row
    name: str = "matmul"  # of what the user gave, in a message

    def matmul(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        """A X (P, m, k), into a contiguous `out` if there is one."""
        raise NotImplementedError

    def adjoint(self, Y: Tensor, out: Tensor | None = None) -> Tensor:
        """A^H Y (P, n, k), summed over all rows, into a contiguous `out` if there is one."""
        raise NotImplementedError

    def gram(self) -> Tensor:
        """A^H A as a dense tensor (P, n, n), for a dense factor."""
        raise NotImplementedError(f"{type(self).__name__} has no gram, which a dense factor needs")

    def factor(self, d2: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """(L, extremes (P, 2)) of A^H A + diag(d2) = L L^H and its extreme eigenvalues, for few columns; d2 (P, n, 1).

        The smallest eigenvalue is NaN where there is no L. None where there is no faster way than by `gram`.
        """
        return None

    def with_values(self, values: Tensor) -> Products:
        """Other matrices on the same pattern, for a matrix that has entries."""
        raise NotImplementedError(f"{type(self).__name__} has no entries")

    def stored_matmul(self, X: Tensor) -> Tensor:
        """S X for real X, S having a one where A has an entry, for a matrix that has entries."""
        return self._stored.matmul(X)

    def stored_adjoint(self, Y: Tensor) -> Tensor:
        """S^T Y"""
        return self._stored.adjoint(Y)

    @lazy
    def _stored(self) -> Products:
        one = torch.ones((1, 1), dtype=torch.float64, device=self.device)
        return self.with_values(one.expand(self.copies, self.pattern.nnz))

    def exact(self, *, adjoint: bool) -> Callable[[Pair], Pair]:
        """What multiplies pairs of doubles by A, or by A^H, in about twice double precision."""
        raise NotImplementedError(f"{type(self).__name__} has no products in twice double precision")

    @property
    def height(self) -> int:
        return self.m

    # Over rows.

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """Re <x, y> of each column, for x and y of all rows: (P, m, k) -> (P, k)."""
        return dot(x, y)

    def norm(self, y: Tensor) -> Tensor:
        """The 2-norm of each column over all rows: (P, m, k) -> (P, k)."""
        return norm(y)

    def curvature(self, q: Tensor, r: Tensor) -> Tensor:
        """|q|^2 of each column over all rows, before a step r -= alpha q: (P, m, k) -> (P, k)."""
        return self.dot(q, q)

    def stepped(self, r: Tensor, q: Tensor, alpha: Any, out: Tensor) -> Tensor:
        """A^H r after that step, alpha a number or (P, 1, k): a matrix may have taken A^H q along with |q|^2."""
        return self.adjoint(r, out=out)

    def largest(self, y: Tensor) -> Tensor:
        """The largest absolute value of each column over all rows: (P, m, k) -> (P, k)."""
        return y.abs().amax(1)

    def everywhere(self, flags: Tensor) -> Tensor:
        """Which of the flags, a tensor of bools of any shape, hold in all places where there are rows."""
        return flags

    def stacked(self, R: Tensor) -> Tensor:
        """The triangle (P, n, n) of the QR factorisation of the triangles that all places have, below each other."""
        return R

    # Sizes.

    @lazy
    def typical(self) -> Tensor:
        """About |A|_F / sqrt(n) (P, 1): the mean of |A v| / |v| over random vectors v."""
        shape = torch.ones((), dtype=torch.float64, device=self.device).expand(self.copies, self.n, _SAMPLES)
        v = noise(shape).to(self.dtype)
        image = self.matmul(v)
        largest = self.largest(image).amax(1, keepdim=True)
        if not bool(largest.isfinite().all()):
            raise ValueError(f"{self.name} must give finite numbers for finite x, got NaN or infinity")
        largest = torch.where(largest > 0, largest, 1.0)
        return (self.norm(image / largest[:, :, None]) / norm(v)).mean(1)[:, None] * largest

    def column_sizes(self, damp: Tensor | None) -> tuple[Tensor, Tensor]:
        """(a, s), both (P, n): the columns of [A; diag(damp)] have norms of about a sqrt(s), where no square overflows.

        Args:
            damp: (P, 1) or (P, n), not negative, or None.
        """
        size = self.typical if damp is None else torch.hypot(self.typical, damp)
        size = torch.where(size > 0, size, 1.0).expand(-1, self.n)
        return size, torch.ones_like(size)

    def frobenius(self) -> Tensor:
        """About the Frobenius norm (P, 1)."""
        return self.typical * self.n**0.5

    def absolute_matmul(self, X: Tensor) -> Tensor:
        """About |A| X for X >= 0, which says how large rounding errors are; here spread evenly over the rows."""
        return _SLACK * self.frobenius()[:, :, None] * (norm(X) / self.height**0.5)[:, None].expand(-1, self.m, -1)

    def absolute_adjoint(self, Y: Tensor) -> Tensor:
        """About |A|^H Y for Y >= 0, as `absolute_matmul`."""
        return _SLACK * self.frobenius()[:, :, None] * (self.norm(Y) / self.n**0.5)[:, None].expand(-1, self.n, -1)

    def vanished(self, scale: Tensor) -> Tensor:
        """(P, 1), which matrices have entries that become zero when columns are divided by `scale` (P, n, 1)."""
        return torch.zeros((self.copies, 1), dtype=torch.bool, device=self.device)

    # Matrices that are made of it.

    def scaled(self, scale: Tensor) -> Products:
        """A D^-1 for D = `scale` (P, n, 1), powers of two."""
        return Scaled(self, columns=scale)

    def weighted(self, root: Tensor) -> Products:
        """W^(1/2) A for `root` = W^(1/2) (P, m)."""
        return Scaled(self, rows=root[:, :, None])

    def single(self) -> Products | None:
        """A in single precision, where products with it take much less time and are right to four digits; else None."""
        return None

    def iteration(self, *arguments: Any) -> Any:
        """The compiled `kernels.Iteration` of these arguments but for A; None where there is none."""
        return None

    @property
    def normal_work(self) -> int | None:
        """Entries that such a product reads."""
        return None

    @property
    def normal(self) -> Any:
        """The compiled `normal_iteration.NormalProducts` of A; None where there are none."""
        return None

    def normal_iteration(self, *arguments: Any) -> Any:
        """The compiled `normal_iteration.NormalIteration` of these arguments but for A; None where there is none."""
        return None

    def search(self, wanted: Any, limit: int) -> Any:
        """The compiled `column_search.search` of these arguments but for A; None where there is none."""
        return None


class Scaled(Products):
    """diag(rows) A diag(columns)^-1 for rows (P, m, 1) and columns (P, n, 1), each None for ones."""

    def __init__(self, whole: Products, *, rows: Tensor | None = None, columns: Tensor | None = None):
        self.whole, self.rows, self.columns = whole, rows, columns
        self.copies, self.m, self.n, self.dtype, self.device = whole.copies, whole.m, whole.n, whole.dtype, whole.device
        self.unit = whole.unit

    @property
    def height(self) -> int:
        return self.whole.height

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        return self.whole.dot(x, y)

    def norm(self, y: Tensor) -> Tensor:
        return self.whole.norm(y)

    def curvature(self, q: Tensor, r: Tensor) -> Tensor:
        return self.whole.curvature(q, r) if self.rows is None else super().curvature(q, r)

    def stepped(self, r: Tensor, q: Tensor, alpha: Any, out: Tensor) -> Tensor:
        if self.rows is not None:
            return super().stepped(r, q, alpha, out)
        product = self.whole.stepped(r, q, alpha, out)
        return product if self.columns is None else product.div_(self.columns)

    def largest(self, y: Tensor) -> Tensor:
        return self.whole.largest(y)

    def everywhere(self, flags: Tensor) -> Tensor:
        return self.whole.everywhere(flags)

    def matmul(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        product = self.whole.matmul(X if self.columns is None else X / self.columns)
        product = product if self.rows is None else self.rows * product
        return product if out is None else out.copy_(product)

    def adjoint(self, Y: Tensor, out: Tensor | None = None) -> Tensor:
        product = self.whole.adjoint(Y if self.rows is None else self.rows * Y)
        product = product if self.columns is None else product / self.columns
        return product if out is None else out.copy_(product)

    def frobenius(self) -> Tensor:
        if self.columns is None:
            return super().frobenius()
        return torch.linalg.vector_norm(self.whole.typical[:, :, None] / self.columns, dim=1)
