"""Residuals of the augmented system in about twice the working precision, from ordinary sparse products.

Matrix and vectors are cut into slices of so few bits that the products of two slices, and their sums along a row, are
exact in double precision (Ozaki, Ogita, Oishi, Rump, Numer. Algorithms 59, 2012); what is left to do is to add a dozen
exact numbers up. A pair (high, low) of doubles stands for its sum (Dekker, Numer. Math. 18, 1971).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..products import Operator
from .numerics import ldexp

if TYPE_CHECKING:
    from .system import System

BITS = 106  # of a pair of doubles
EPS_EXTENDED = 2.0**-100  # of a residual, with a margin for its additions; relative to the terms it is a sum of


class Pair(NamedTuple):
    """high + low, where |low| is at most half a unit in the last place of high."""

    high: Tensor
    low: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Pair:
        return cls(tensor, torch.zeros_like(tensor))

    def plus(self, x: Tensor) -> Pair:
        high, rest = _two_sum(self.high, x)
        return Pair(*_two_sum(high, self.low + rest))

    def add(self, other: Pair) -> Pair:
        return self.plus(other.low).plus(other.high)

    @property
    def value(self) -> Tensor:
        return self.high + self.low

    def where(self, mask: Tensor, other: Pair) -> Pair:
        """This where `mask` (P, 1, k) holds, `other` elsewhere."""
        return Pair(*(torch.where(mask, new, old) for new, old in zip(self, other, strict=True)))


class Single(NamedTuple):
    """An ordinary number in the place of a pair."""

    high: Tensor

    def plus(self, x: Tensor) -> Single:
        return Single(self.high + x)

    def where(self, mask: Tensor, other: Single) -> Single:
        """This where `mask` (P, 1, k) holds, `other` elsewhere."""
        return self if bool(mask.all()) else Single(torch.where(mask, self.high, other.high))


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b as a rounded sum and its error (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _halves(a: Tensor) -> tuple[Tensor, Tensor]:
    """a as a sum of two numbers of 26 bits (Veltkamp)."""
    t = a * (2**27 + 1)
    high = t - (t - a)
    return high, a - high


def _two_product(a: Tensor, b: Tensor) -> Pair:
    """a b as a rounded product and its error, for a real a (Dekker)."""
    p = a * b
    (a1, a2), parts = _halves(a), torch.view_as_real(b) if b.is_complex() else b
    b1, b2 = (torch.view_as_complex(h) if b.is_complex() else h for h in _halves(parts))
    return Pair(p, a2 * b2 - (((p - a1 * b1) - a2 * b1) - a1 * b2))


class ExactProducts:
    """A X or A^H X as pairs, for one operator, by slices of its rows (or columns)."""

    def __init__(self, A: Operator, *, adjoint: bool):
        self.adjoint, pattern = adjoint, A.pattern
        where = pattern.T if adjoint else pattern
        counts = where.rows.pointers.diff()
        longest = int(counts.max()) if counts.numel() else 1
        terms = max(longest, 1) * (2 if A.dtype.is_complex else 1)
        self.bits = (53 - math.ceil(math.log2(terms))) // 2  # terms * 2^(2 bits) <= 2^53
        self.count = -(-BITS // self.bits)  # slices of a pair, each of `bits` bits
        rows = where.indices[0].expand(A.copies, -1)
        parts = torch.view_as_real(A.values) if A.dtype.is_complex else A.values[..., None]
        sizes = parts.abs().amax(-1)
        largest = sizes.new_zeros((A.copies, where.shape[0])).scatter_reduce(1, rows, sizes, "amax")
        exponents = torch.frexp(largest).exponent.gather(1, rows)[..., None]
        self.slices: list[Operator] = []
        rest = parts.contiguous()
        while len(self.slices) < self.count and (not self.slices or bool((rest != 0).any())):
            piece = _leading(rest, exponents - self.bits * len(self.slices), self.bits)
            rest = rest - piece
            values = torch.view_as_complex(piece) if A.dtype.is_complex else piece[..., 0]
            self.slices.append(Operator(pattern, values))

    def __call__(self, x: Pair) -> Pair:
        high, low = (torch.view_as_real(t) if t.is_complex() else t[..., None] for t in x)
        exponents = torch.frexp(high.abs().amax((1, 3), keepdim=True)).exponent
        pieces = []
        for index in range(self.count):
            piece = _leading(high, exponents - self.bits * index, self.bits)
            high, low = _two_sum(high - piece, low)
            pieces.append(torch.view_as_complex(piece.contiguous()) if x.high.is_complex() else piece[..., 0])
        k, terms = x.high.shape[2], []
        for index, part in enumerate(self.slices):
            block = torch.cat(pieces[: self.count - index], 2)
            product = part.adjoint(block) if self.adjoint else part.matmul(block)
            terms += [(index + place, term) for place, term in enumerate(product.split(k, 2))]
        terms.sort(key=lambda term: -term[0])
        total = Pair.of(terms[0][1])
        for _, term in terms[1:]:  # smallest first
            total = total.plus(term)
        return total


def _leading(x: Tensor, exponents: Tensor, bits: int) -> Tensor:
    """x rounded to multiples of 2^(exponent - bits), for |x| <= 2^exponent."""
    shift = torch.ldexp(torch.full_like(exponents, 0.75, dtype=torch.float64), (exponents + 54 - bits).clamp(-960, 960))
    return (x + shift) - shift


def multiplied_exactly(A: Operator, X: Tensor, adjoint: bool) -> Tensor:
    """A X, or A^H X, rounded once."""
    of_A, of_X = (torch.frexp(t.abs().amax()).exponent for t in (A.values, X))
    scaled = Operator(A.pattern, ldexp(A.values, -of_A))
    return ldexp(ExactProducts(scaled, adjoint=adjoint)(Pair.of(ldexp(X, -of_X))).value, of_A + of_X)


class ExactResiduals:
    """(b - r - A y, c - A^H (W r + e) + d^2 y) for r and y given as pairs."""

    def __init__(self, system: System):
        self.matmul = ExactProducts(system.plain, adjoint=False)
        self.adjoint = ExactProducts(system.plain, adjoint=True)
        self.damp, self.weights = system.damp, system.weights

    def __call__(self, b: Tensor, c: Tensor, r: Pair, y: Pair, e: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first = _minus(self.matmul(y)).plus(-r.low).plus(-r.high).plus(b)
        s = r
        if self.weights is not None:
            W = self.weights[:, :, None]
            s = _two_product(W, r.high).plus(W * r.low)
        second = _minus(self.adjoint(s if e is None else s.plus(e)))
        if self.damp is not None:
            squared = _two_product(self.damp, self.damp)
            for d2 in squared:
                for part in y:
                    second = second.add(_two_product(d2, part))
        return first.value, second.plus(c).value


def _minus(x: Pair) -> Pair:
    return Pair(-x.high, -x.low)
