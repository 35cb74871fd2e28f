"""The k smallest singular values of A, their right singular vectors, and how these move: for one matrix, plain tensors.

Found by block inverse iteration with a sparse factor of A^H A + shift and Ritz projections through A, which square
nothing (Parlett, The Symmetric Eigenvalue Problem, SIAM 1998, sections 11 and 14). A vector v_j of sigma_j moves by

    w = C g,   (A^H A - sigma_j^2) w = g   off the vectors,   v_i^H w = v_i^H g / (sigma_i^2 - sigma_j^2)   among them

where g is the change of the residual; off the vectors that is positive definite, and solved by conjugate gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import MEMORY, OTHER_COUNT, SCALE, ConvergenceError, TooLarge
from ..sparse.numerics import noise
from ..sparse.plain_products import Operator
from .direct import Direct, analyse
from .shifted import ShiftedFactor
from .sparse_factor import method_name
from .system import EPS, System

_GUARD = 8  # vectors beyond those that are wanted
_ROUNDS, _ENOUGH = 200, 1e-13
_ACCEPT = EPS ** (1 / 3)
_EQUAL = 1e-7  # relative difference up to which singular values count as one
_STEPS = 200


class Weakest:
    """Of a matrix A (m, n), m >= n.

    Args:
        A: with copies = 1.
        count: k.

    Attributes:
        V: (n, k), orthonormal.
        sigma: (k,), ascending.
        beyond: the next singular value, about; infinite if there is none.
        limit: values up to it are zero but for rounding.
    """

    def __init__(self, A: Operator, count: int):
        self.A = A
        system = System(A, None, EPS)
        analysis, solver = analyse(system), Direct()
        reason = solver.too_large(analysis, 1)
        if reason:
            raise TooLarge(f"method {method_name()} was not started: {reason}", MEMORY)
        self.scale = system.scale[0]
        self.factor = ShiftedFactor(system.A, None, system.norms[0], system.empty[0, :, None], analysis)
        self.empty = system.empty[0, :, None]
        self._search(count)

    def _invert(self, g: Tensor) -> Tensor:
        """About (A^H A)^-1 g; the weight of columns of zeros is as large as any, but finite."""
        if bool(self.empty.any()):
            g = torch.where(self.empty, 0.0, g)
        return self.factor._invert(g / self.scale) / self.scale

    def _gram(self, V: Tensor) -> Tensor:
        return self.A.adjoint(self.A.matmul(V[None]))[0]

    def _ritz(self, V: Tensor) -> tuple[Tensor, Tensor]:
        """(singular values of A V, ascending, V turned into their vectors)."""
        R = torch.linalg.qr(self.A.matmul(V[None])[0], mode="r").R
        _, s, Wh = torch.linalg.svd(R, full_matrices=False)
        return s.flip(0), V @ Wh.mH.flip(1)

    def _search(self, count: int) -> None:
        n, zeros = self.A.n, self.empty[:, 0].nonzero()[:, 0]
        unit = self.A.values.new_zeros((n, min(len(zeros), count)))
        unit[zeros[: unit.shape[1]], torch.arange(unit.shape[1])] = 1.0  # columns of zeros are null vectors
        wanted, rest = count - unit.shape[1], n - len(zeros)
        width = min(rest, wanted + max(_GUARD, wanted // 2))
        V = torch.where(self.empty, 0.0, noise(self.empty.expand(-1, width))).to(self.A.dtype)
        for _ in range(3):
            V = torch.linalg.qr(self._invert(V)).Q
        sigma, V = self._ritz(V)
        norm = torch.linalg.vector_norm(self.A.values)
        self.limit = 4 * EPS * float(norm) * max(self.A.m, 1) ** 0.5
        best, stalled = torch.inf, 0
        for _ in range(_ROUNDS):
            left = self._gram(V) - V * sigma.square()
            left = left - V @ (V.mH @ left)
            error = self._error(left, sigma, wanted)
            if error < best / 2:
                best, stalled = error, 0
            else:
                stalled += 1
            if error <= _ENOUGH or stalled > 5 or width == rest:
                break
            moved = self._invert(left)
            V = torch.linalg.qr(V - (moved - V @ (V.mH @ moved))).Q
            sigma, V = self._ritz(V)
        if width < rest and not best <= _ACCEPT:
            raise ConvergenceError(
                f"the {count} smallest singular values were not found: estimated error of their space {best:.1e}, of "
                f"{_ACCEPT:.1e} that are accepted",
                OTHER_COUNT,
                SCALE,
            )
        V = V[:, :wanted]
        foremost = V.gather(0, V.abs().argmax(0, keepdim=True)) if n else V[:0]
        self.V = torch.cat([unit, V / torch.sgn(foremost)], 1)  # of one sign, or phase
        self.sigma = torch.cat([sigma.new_zeros(unit.shape[1]), sigma[:wanted]])
        more = len(zeros) > count or wanted < width
        self.beyond = 0.0 if len(zeros) > count else float(sigma[wanted]) if more else torch.inf

    def _error(self, left: Tensor, sigma: Tensor, wanted: int) -> float:
        """Of the directions: what A^H A V has outside of V's span, over the gap to what is there, the largest."""
        if not wanted or wanted >= len(sigma):
            return 0.0
        size = torch.linalg.vector_norm(left[:, :wanted], dim=0)
        gap = (sigma[-1].square() - sigma[:wanted].square()).clamp_min(EPS * sigma[-1].square() + 1e-300)
        return float((size / gap).max())


def clusters(sigma: Tensor, limit: Tensor) -> Tensor:
    """Numbers (P, k) of groups of singular values (P, k), ascending, that are equal but for rounding; zeros are one.

    Args:
        limit: (P,), up to which values are zero.
    """
    apart = (sigma[:, :-1] < (1 - _EQUAL) * sigma[:, 1:]) & (sigma[:, 1:] > limit[:, None])
    return torch.nn.functional.pad(apart.cumsum(1), (1, 0))


def correct(weak: Weakest, g: Tensor) -> Tensor:
    """C g (n, q k) for g (n, q k), with columns of each vector in turn; NaN where no derivative exists.

    Raises:
        ConvergenceError: values inside and outside lie so close together that it takes too many iterations.
    """
    V, sigma, k = weak.V, weak.sigma, len(weak.sigma)
    times = g.shape[1] // k
    ends = clusters(torch.cat([sigma, sigma.new_full((1,), weak.beyond)])[None], sigma.new_full((1,), weak.limit))[0]
    shift, label = sigma.square().repeat(times), ends[:-1]
    difference = sigma.square()[:, None] - sigma.square()
    between = torch.where(label[:, None] == label, 0.0, 1 / difference).repeat(1, times).to(g.dtype)

    def off(w: Tensor) -> Tensor:
        return w - V @ (V.mH @ w)

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return (x.conj() * y).sum(0).real

    inside = V @ (between * (V.mH @ g))
    # What is equal to the next value has no vectors of its own.
    mixed = (label == ends[-1]).repeat(times) & (g != 0).any(0)
    r = off(off(g))
    # Rounding errors of what lies within the vectors are nothing to solve for.
    size = torch.linalg.vector_norm(r, dim=0)
    nothing = mixed | (size <= 1e-13 * torch.linalg.vector_norm(g, dim=0)) | (k == len(g))
    r = given = torch.where(nothing, 0.0, r)
    w = torch.zeros_like(r)
    z = off(weak._invert(r))
    p, gamma = z, dot(r, z)
    first = gamma
    for _ in range(_STEPS):
        live = gamma > 1e-28 * first
        if not bool(live.any()):
            break
        q = off(weak._gram(p)) - shift * p
        curvature = dot(p, q)
        live = live & (curvature > 0)
        alpha = torch.where(live, gamma / curvature, 0.0)
        w, r = w + alpha * p, r - alpha * q
        z = off(weak._invert(r))
        last, gamma = gamma, torch.where(live, dot(r, z), 0.0)
        p = z + torch.where(last > 0, gamma / last, 0.0) * p
    left = torch.linalg.vector_norm(off(weak._gram(w)) - shift * w - given, dim=0)
    if bool((left > 1e-6 * size).any()):
        worst = float((left / size).nan_to_num().max())
        raise ConvergenceError(
            f"the derivative of singular vectors was not found: a residual of {worst:.1e} is left, for singular values "
            f"{float(sigma[-1]):.6e} inside and {weak.beyond:.6e} outside",
            OTHER_COUNT,
            SCALE,
        )
    return torch.where(mixed, torch.nan, inside + off(w))
