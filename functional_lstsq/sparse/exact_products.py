"""Products with a sparse matrix in about twice the working precision, from ordinary sparse products.

Matrix and vectors are cut into slices of so few bits that the products of two slices, and their sums along a row, are
exact in double precision (Ozaki, Ogita, Oishi, Rump, Numer. Algorithms 59, 2012); what is left to do is to add a dozen
exact numbers up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Products
from .double_double import Pair, two_sum
from .numerics import ldexp

BITS = 106  # of a pair of doubles


class ExactProducts:
    """A X or A^H X as pairs, for an A that has entries, by slices of its rows (or columns)."""

    def __init__(self, A: Products, *, adjoint: bool):
        self.adjoint, where = adjoint, A.pattern.T if adjoint else A.pattern
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
        self.slices: list[Products] = []
        rest = parts.contiguous()
        while len(self.slices) < self.count and (not self.slices or bool((rest != 0).any())):
            piece = _leading(rest, exponents - self.bits * len(self.slices), self.bits)
            rest = rest - piece
            values = torch.view_as_complex(piece) if A.dtype.is_complex else piece[..., 0]
            self.slices.append(A.with_values(values))

    def __call__(self, x: Pair) -> Pair:
        high, low = (torch.view_as_real(t) if t.is_complex() else t[..., None] for t in x)
        exponents = torch.frexp(high.abs().amax((1, 3), keepdim=True)).exponent
        pieces = []
        for index in range(self.count):
            piece = _leading(high, exponents - self.bits * index, self.bits)
            high, low = two_sum(high - piece, low)
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


def multiplied_exactly(A: Products, X: Tensor, *, adjoint: bool) -> Tensor:
    """A X, or A^H X, rounded once."""
    return _multiplied(A, X, adjoint=adjoint).value


def left_of_product(A: Products, X: Tensor, product: Tensor) -> Tensor:
    """What rounding has left out of `product`, which is A^H X."""
    high, low = _multiplied(A, X, adjoint=True)
    return (high - product) + low


def _multiplied(A: Products, X: Tensor, *, adjoint: bool) -> Pair:
    of_A, of_X = (torch.frexp(t.abs().amax()).exponent for t in (A.values, X))
    scaled = A.with_values(ldexp(A.values, -of_A))
    whole = ExactProducts(scaled, adjoint=adjoint)(Pair.of(ldexp(X, -of_X)))
    return Pair(*(ldexp(part, of_A + of_X) for part in whole))
