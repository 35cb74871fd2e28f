"""The augmented system as solvers see it: plain tensors in double precision, its columns scaled.

    K s = t      K = [ I    A    ]     s = [ r ]     t = [ b ]
                     [ A^H  -d^2 ]         [ x ]         [ c ]

Columns of [A; d I] are scaled to norms of about 1 by powers of two, and right-hand sides to size about 1, so that
scaling itself makes no rounding error: y = D x, A D^-1, c D^-1. (Scaling by norms is within sqrt(n) of the best column
scaling: van der Sluis, Numer. Math. 14, 1969.)
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor

from ..lazy import lazy
from ..products import Operator
from .extended import ExactResiduals
from .numerics import ldexp, noise, power_of_two

EPS = torch.finfo(torch.float64).eps
_CHUNK = 2**18  # numbers that a cache holds
_MODERATE = 400  # exponents, of which a sum of two and those of a solution stay within the range


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


class System:
    """The scaled augmented system of P matrices on one pattern.

    Args:
        operator: A, in double precision.
        damp: d (P,) or None for none.
        precision: machine epsilon of the user's dtype, which decides what counts as rank and what is accepted.
        extended: refine with residuals in twice the working precision, whether or not it takes that to be accepted.
        exact: the values are the user's own. Otherwise they carry rounding errors, and an answer cannot be more
            accurate than those allow.
        weights: W (P, m), at most 4, or None for ones. What is factored and iterated with, `A`, is then W^(1/2) A,
            rounded; right-hand sides, solutions and residuals are those of the system with W in it.
    """

    weights: Tensor | None = None

    def __init__(
        self,
        operator: Operator,
        damp: Tensor | None,
        precision: float,
        *,
        extended: bool = False,
        exact: bool = True,
        weights: Tensor | None = None,
    ):
        self.precision, self.extended, self.exact = precision, extended, exact
        self.tolerance = tolerance_of(precision, operator.m, operator.n)
        self.accept = precision ** (1 / 3)  # largest relative error that is accepted; a solver may set it
        self.m, self.n, self.copies = operator.m, operator.n, operator.copies
        self.entries = operator.values.numel()
        self.unit = EPS  # rounding of a product
        rows, columns = (part.expand(self.copies, -1) for part in operator.pattern.indices)
        values = operator.values
        if weights is not None:
            self.weights, self.root = weights, weights.sqrt()
            values = values * self.root.gather(1, rows)
        damp = None if damp is None else damp.abs()[:, None]
        largest, squares = column_sizes(values.abs(), columns, damp, self.n)
        self.empty = squares == 0  # columns of zeros
        exponents = torch.frexp(largest).exponent + torch.frexp(squares.sqrt()).exponent - 1
        scale = power_of_two(exponents)
        self.scale = scale[:, :, None]  # D
        norms = largest / scale * torch.where(self.empty, 1.0, squares).sqrt()
        whole = torch.where(self.empty, 0.0, norms * scale)
        largest = whole.amax(1, keepdim=True)
        self.frobenius = largest * norm((whole / torch.where(largest > 0, largest, 1.0))[:, :, None])
        self.norms = norms[:, :, None]  # of the scaled columns: what powers of two have left over, 1/2 to 2
        self.weight = self.scale.amin(1, keepdim=True) / self.scale  # D^-1 in units in which it cannot overflow
        of_entries = scale.gather(1, columns)
        self.given, self.A = values, Operator(operator.pattern, values / of_entries)
        if weights is not None:
            self._plain = Operator(operator.pattern, operator.values / of_entries)
        self.damp = None if damp is None else (damp / scale)[:, :, None]  # d D^-1
        self.d2 = None if self.damp is None else self.damp.square()

    @lazy
    def exponents(self) -> Tensor:
        """Those of the scale: D = 2^exponents."""
        return torch.frexp(self.scale).exponent - 1

    def rescaled(self, t: Tensor, size: Tensor, power: int) -> Tensor:
        """D^power t 2^size for t (P, n, k), a power of 1 or -1, size (P, 1, k); nothing leaves the range half way."""
        if self._moderate and bool((size.abs() <= _MODERATE).all()):
            return (t * self.scale if power > 0 else t / self.scale) * power_of_two(size)
        return ldexp(t, size + power * self.exponents)

    @lazy
    def _moderate(self) -> bool:
        return bool((self.exponents.abs() <= _MODERATE).all())

    @contextmanager
    def accepting_anything(self):
        """For solves whose errors do no harm: none is refused, and none made more accurate than it comes."""
        kept, self.accept = self.accept, 1e300
        try:
            yield
        finally:
            self.accept = kept

    @lazy
    def size(self) -> Tensor:
        """Frobenius norm of A alone (P, 1)."""
        return torch.linalg.vector_norm(self.A.values, dim=1, keepdim=True)

    @lazy
    def lost(self) -> Tensor:
        """Which matrices (P, 1) have entries that became zero beside a damping or others of their columns."""
        return ((self.A.values == 0) & (self.given != 0)).any(1, keepdim=True)

    @lazy
    def magnitude(self) -> Operator:
        """|A|, entry by entry."""
        return self.A.absolute()

    @lazy
    def exact_residuals(self) -> ExactResiduals:
        """As `residuals`, in twice the working precision."""
        return ExactResiduals(self)

    @property
    def plain(self) -> Operator:
        """A itself, columns scaled, where `A` has weights in it."""
        return self.A if self.weights is None else self._plain

    def weigh(self, f: Tensor) -> Tensor:
        """W^(1/2) f"""
        return f if self.weights is None else self.root[:, :, None] * f

    def damped(self, y: Tensor) -> Tensor | float:
        """d^2 y"""
        return 0.0 if self.d2 is None else self.d2 * y

    def gradient(self, r: Tensor, y: Tensor, c: Tensor) -> Tensor:
        """A^H r - d^2 y - c, the negative gradient of the (extended) normal equations, for an r that is weighed."""
        return self.A.adjoint(r) - self.damped(y) - c

    def residuals(self, b: Tensor, c: Tensor, r: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(b - r - A y, c - A^H W r + d^2 y)"""
        reached = self.plain.matmul(y).add_(r)
        return torch.sub(b, reached, out=reached), -self.gradient(self.weigh(r), y, c)

    def rounding(self, b: Tensor, c: Tensor, r: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Two samples, side by side, of errors as large as the rounding errors in `residuals`, entry by entry."""
        size = r.abs(), y.abs()
        plain = self.magnitude if self.weights is None else self.plain.absolute()
        first = EPS * (b.abs() + size[0] + plain.matmul(size[1]))
        second = EPS * (c.abs() + self.magnitude.adjoint(self.weigh(size[0])) + self.damped(size[1]))
        first, second = (torch.cat([s, s], 2) for s in (first, second))
        return (first * noise(first)).to(b.dtype), (second * noise(second)).to(b.dtype)


def tolerance_of(precision: float, m: int, n: int) -> float:
    """The fraction of the largest below which singular values are zero: noise in the data, and of computing them."""
    return 4 * (precision + EPS * max(m, n, 1) ** 0.5)


def column_sizes(sizes: Tensor, columns: Tensor, damp: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    """(a (P, n), s (P, n)): the norms of the columns are a sqrt(s), where no square has under- or overflown."""
    copies = len(sizes)
    whole = sizes.amax(1, keepdim=True) if columns.shape[1] else sizes.new_zeros((copies, 1))
    whole = whole if damp is None else torch.maximum(whole, damp)
    whole = torch.where(whole == 0, 1.0, whole)
    squares = sizes.new_zeros((copies, n)).scatter_add_(1, columns, (sizes / whole).square_())
    squares = squares if damp is None else squares + (damp / whole).square()
    if not bool((squares < 2.0**-900).any()):
        return whole.expand(-1, n), squares
    # Each in units of its own largest entry.
    largest = sizes.new_zeros((copies, n)).scatter_reduce(1, columns, sizes, "amax")
    largest = largest if damp is None else torch.maximum(largest, damp)
    largest = torch.where(largest == 0, 1.0, largest)
    squares = torch.zeros_like(largest).scatter_add(1, columns, (sizes / largest.gather(1, columns)).square())
    return largest, squares if damp is None else squares + (damp / largest).square()


def check_number(name: str, value: object, *, optional: bool = False, below: float = float("inf")) -> None:
    """Refuse a setting that is not a positive number below `below` (or None, where it is optional)."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < value < below:
        raise ValueError(f"{name} must be above 0 and below {below:g}, got {value!r}")
