"""Numbers of about twice the working precision: a pair (high, low) of doubles stands for its sum.

(Dekker, Numer. Math. 18, 1971.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPS_EXTENDED = 2.0**-100  # of a residual, with a margin for its additions; relative to the terms it is a sum of


class Pair(NamedTuple):
    """high + low, where |low| is at most half a unit in the last place of high."""

    high: Tensor
    low: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Pair:
        return cls(tensor, torch.zeros_like(tensor))

    def plus(self, x: Tensor) -> Pair:
        high, rest = two_sum(self.high, x)
        return Pair(*two_sum(high, self.low + rest))

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


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b as a rounded sum and its error (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _halves(a: Tensor) -> tuple[Tensor, Tensor]:
    """a as a sum of two numbers of 26 bits (Veltkamp)."""
    t = a * (2**27 + 1)
    high = t - (t - a)
    return high, a - high


def two_product(a: Tensor, b: Tensor) -> Pair:
    """a b as a rounded product and its error, for a real a (Dekker)."""
    p = a * b
    (a1, a2), parts = _halves(a), torch.view_as_real(b) if b.is_complex() else b
    b1, b2 = (torch.view_as_complex(h) if b.is_complex() else h for h in _halves(parts))
    return Pair(p, a2 * b2 - (((p - a1 * b1) - a2 * b1) - a1 * b2))


def scaled(a: Tensor, x: Pair) -> Pair:
    """a x for a real a"""
    return two_product(a, x.high).plus(a * x.low)


def minus(x: Pair) -> Pair:
    """-x"""
    return Pair(-x.high, -x.low)
