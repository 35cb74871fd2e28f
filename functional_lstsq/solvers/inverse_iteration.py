"""Weak directions of [A; d] by block inverse iteration and a Ritz projection through A, which squares nothing.

    V = orthonormal((A^H A + d^2)^-1 V)            eight times at most
    [A; d] V = Q R,   R = U diag(sigma) W^H,   V W right singular vectors of [A; d], sigma their singular values

(Parlett, The Symmetric Eigenvalue Problem, SIAM 1998, chapters 11 and 14.) The block grows until it holds a direction
that is not weak: then there are no other weak ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..sparse.base import Products
from ..sparse.numerics import noise

WIDTHS = (8, 32, 128, 512)  # vectors in a block, which are iterated with together
# Times the threshold: where two steps with four random vectors find nothing weaker than that, nothing is below it. A
# step makes a weak direction larger by the square of such a factor beside the others.
_CLEAR = 100.0
# Relative to the largest singular value: where all are above, the smallest ones lie close together, and two steps may
# give the smallest one 1.4 times too large.
_EVEN = 0.1
_BLOCK = 2**27  # numbers in a block at most: a gigabyte


class Weak(NamedTuple):
    """Singular values below a threshold, ascending, and their right singular vectors (n, q).

    Attributes:
        known: whether there are no others.
        beyond: the next singular value, about.
        rest: (n, 4), about the next singular vectors, where there are none below the threshold; else None.
    """

    known: bool
    sigma: Tensor
    V: Tensor
    beyond: float
    rest: Tensor | None = None

    def split(self, limit: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """(null vectors, the other vectors and their singular values, the smallest of all that are above `limit`)."""
        lost = self.sigma <= limit
        return self.V[:, lost], self.V[:, ~lost], self.sigma[~lost], min([self.beyond, *self.sigma[~lost].tolist()])


class InverseIteration:
    """The weak directions of one matrix.

    Args:
        A: with copies = 1.
        damp: d (n, 1), or None.
        empty: (n, 1), columns of zeros, which take no part.
        invert: g (n, k) -> about (A^H A + d^2)^-1 g.
        threshold: singular values below it are wanted.
        project: V (n, k) -> V without its part in what is known of the null space, of dimension `nullity`.
    """

    def __init__(
        self,
        A: Products,
        damp: Tensor | None,
        empty: Tensor,
        invert: Callable[[Tensor], Tensor],
        threshold: float,
        project: Callable[[Tensor], Tensor] | None = None,
        nullity: int = 0,
    ):
        self.A, self.damp, self.empty, self.invert, self.threshold = A, damp, empty, invert, threshold
        self.project, self.dimension = project, len(empty) - int(empty.sum()) - nullity

    def explore(self, largest: float, widths: Iterable[int] = WIDTHS) -> Weak:
        """What there is below the threshold; `largest` is the largest singular value."""
        n = self.dimension
        none = self.A.values.new_zeros((len(self.empty), 0))
        if not n:
            return Weak(True, none[0].real, none, largest)
        V = self._random(min(4, n))
        for steps, above, below in ((2, _CLEAR * self.threshold, _EVEN * largest), (1, self.threshold, torch.inf)):
            sigma, V = self._iterate(V, steps=steps, until_settled=False)
            smallest = float(sigma.min())
            if above < smallest < below:
                return Weak(True, none[0].real, none, smallest, V)
        for size in widths:
            width = min(size, n)
            if width * len(self.empty) > _BLOCK:
                break
            sigma, V = self._iterate(self._random(width), steps=8, until_settled=True)
            weak = sigma <= self.threshold
            if width == n or not bool(weak.all()):
                beyond = float(sigma[~weak].min()) if bool((~weak).any()) else largest
                return Weak(True, *self._sharpen(V[:, weak]), beyond)
        return Weak(False, sigma, V, largest)

    def _sharpen(self, V: Tensor) -> tuple[Tensor, Tensor]:
        """Weak directions without what rounding errors in the factor have mixed into them.

        Inverse iteration leaves eps / sigma_i^2 of a stronger direction i in them, so that |A v| stays above
        eps / sigma_i. A correction of the residual A^H A V - V sigma^2, which is small, does better.
        """
        sigma = V[0].real
        for _ in range(3):
            residual = self.A.adjoint(self.A.matmul(V[None]))[0]
            if self.damp is not None:
                residual = residual + self.damp.square() * V
            residual = residual - V @ (V.mH @ residual)
            moved = self.invert(residual)
            V = self._orthonormal(V - (moved - V @ (V.mH @ moved)))
            sigma, turn = self._ritz(V)
            V = V @ turn
        return sigma, V

    def _random(self, width: int) -> Tensor:
        return torch.where(self.empty, 0.0, noise(self.empty.expand(-1, width))).to(self.A.dtype)

    def _iterate(self, V: Tensor, *, steps: int, until_settled: bool) -> tuple[Tensor, Tensor]:
        """The smallest singular values, about, and their vectors, from any V (n, width)."""
        before = None
        for step in range(steps):
            V = self._orthonormal(self.invert(V))
            if step < steps - 1 and (step < 2 or not until_settled):
                continue
            sigma, turn = self._ritz(V)
            V = V @ turn
            weak = (sigma <= self.threshold) & (sigma > 1e-14)
            if before is not None and bool(((sigma - before).abs() <= 0.01 * sigma)[weak].all()):
                break
            before = sigma
        return sigma, V

    def _orthonormal(self, V: Tensor) -> Tensor:
        Q = torch.linalg.qr(V).Q
        # Where columns of V nearly depend on each other, those of Q are made of rounding errors, which have a part in
        # the null space that is known.
        return Q if self.project is None else torch.linalg.qr(self.project(Q)).Q

    def _ritz(self, V: Tensor) -> tuple[Tensor, Tensor]:
        """Singular values of [A; d] V, and its right singular vectors; ascending."""
        _, s, Wh = torch.linalg.svd(triangle(self.A, self.damp, V))
        return s.flip(0), Wh.mH.flip(1)


def triangle(A: Products, damp: Tensor | None, V: Tensor) -> Tensor:
    """R (q, q) of the QR factorisation of [A; d] V, of all rows of A, for V (n, q)."""
    image = A.matmul(V[None])[0]
    image = image if damp is None or not A.leads else torch.cat([image, damp * V])
    R = torch.linalg.qr(image, mode="r").R
    R = torch.nn.functional.pad(R, (0, 0, 0, V.shape[1] - len(R)))  # where fewer rows are here
    return A.stacked(R[None])[0]
