"""What solvers with a factor share: refinement around it, the null space, the verdict.

A factor of A^H A, or of A, is a preconditioner with which conjugate gradients on the augmented system need one to three
iterations; the refinement around them gives the accuracy of a backward stable method and more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..result import RANK_DEFICIENT, Report
from .conjugate import Run, cgls
from .extended import EPS_EXTENDED, Pair, Single
from .numerics import noise
from .refine import Refined, refine, report
from .system import EPS, System, dot, norm

_BOUND = 1e-11  # a bound on rounding errors that needs no sharpening
_PLAIN = 1e4  # condition number up to which the factor alone makes four digits and more of a correction


class Factored:
    """(A^H A + d^2)^+ as `apply`, with extreme singular values, rank and null space; a subclass fills these in.

    Attributes:
        method: codes (P, 1) of how each matrix was factored.
        largest, smallest: extreme singular values that are not zero (P, 1).
        rank: (P, 1), in double precision.
        null: orthonormal basis of the null space of the unscaled A (P, n, q), zeros where a matrix has fewer vectors;
            None if all have full rank.
        null_slip: estimate of its errors (P, n, q).
    """

    method: Tensor
    largest: Tensor
    smallest: Tensor
    rank: Tensor
    null: Tensor | None = None
    null_slip: Tensor

    def __init__(self, system: System, minimum_norm: bool):
        self.system, self.minimum_norm = system, minimum_norm

    def apply(self, g: Tensor) -> Tensor:
        """(A^H A + d^2)^+ g, to some digits."""
        raise NotImplementedError

    def solve(self, b: Tensor, c: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor, Report]:
        """Solve K (r, y) = (b, c) in the scaled unknowns; with a null space, K^+ in the unscaled ones."""
        system, given = self.system, c
        if self.null is not None:
            unscaled = c * system.scale
            c = self._project(unscaled) / system.scale
        plain = self.null is None and bool((self.largest < _PLAIN * self.smallest).all())
        refined = refine(
            system,
            b,
            c,
            self._apply_once if plain else self._iterate,
            largest=self.largest,
            smallest=self.smallest,
            contraction=0.0 if plain else 0.01,
            target=4 * EPS,
            bound=_BOUND,
            consistent=plain,
        )
        if self.null is not None:
            refined = self._without_null_space(refined, unscaled)
        answer = report(
            system,
            b,
            c,
            refined,
            method=self.method,
            largest=self.largest,
            smallest=self.smallest,
            rank=self.rank,
            given=given,
        )
        if not self.minimum_norm:
            deficient = self.rank < system.n
            answer = answer._replace(status=torch.where(deficient, RANK_DEFICIENT, answer.status))
        return refined.r, refined.y, answer

    def dependent(self, p: int) -> list[int]:
        """Some columns that take part in a dependence among the columns of matrix p, the foremost first."""
        if self.null is None:
            return []
        shares = torch.linalg.vector_norm(self.null[p] * self.system.scale[p], dim=1) * self.system.norms[p, :, 0]
        top = shares.topk(min(5, len(shares)))
        return top.indices[top.values > 0.1 * top.values[0]].tolist()

    def _project(self, x: Tensor) -> Tensor:
        """x without its part in the null space of the unscaled A."""
        assert self.null is not None
        return x - self.null @ (self.null.mH @ x)

    def _without_null_space(self, refined: Refined, unscaled: Tensor) -> Refined:
        """The solution of least norm, with what errors of the null space do to it and did to c (`unscaled`)."""
        system, null, slip = self.system, self.null, self.null_slip
        assert null is not None
        r, y, errors, iterations = refined
        x = y / system.scale
        size = system.scale.amin(1)
        # Of P x = x - Z Z^H x: dZ Z^H x + Z dZ^H x. In c, the second is in the null space and without effect.
        of_x = size * (norm(slip @ (null.mH @ x)) + norm(null @ (slip.mH @ x))) + EPS * norm(system.weight * y)
        lost = null.mH @ unscaled
        blur = slip @ lost
        blur = (blur + EPS * noise(blur) * (null.abs() @ lost.abs())) / system.scale
        moved = self.apply(blur)
        of_r = norm(system.A.matmul(moved)) + EPS * norm(system.weigh(r))
        errors = errors._replace(x=errors.x + of_x, r=errors.r + of_r)
        return Refined(r, self._project(x) * system.scale, errors, iterations)

    def _apply_once(self, b: Tensor | None, c: Tensor) -> Run:
        """K^-1 (b, c) by the factor alone; a b of None is zero."""
        g = -c if b is None else self.system.A.adjoint(b).sub_(c)
        y = self.apply(g)
        r, gamma = self.system.A.matmul(y), dot(g, y)
        return Run(r.neg_() if b is None else torch.sub(b, r, out=r), y, gamma, torch.ones_like(gamma))

    def _iterate(self, b: Tensor | None, c: Tensor) -> Run:
        """K^-1 (b, c) to three digits."""
        assert b is not None
        g = self.system.gradient(b, torch.zeros_like(c), c)
        goal = 1e-6 * dot(g, self.apply(g))
        return cgls(self.system, b, c, self.apply, lambda r, y, live: goal[:, live], limit=30, rises=3)

    def _find_null_space(self, Z: Tensor, lost: Tensor) -> None:
        """An orthonormal basis of the null space of A, from approximate null vectors of the scaled matrix.

        The null space is D^-1 times that of the scaled matrix; D^-1 magnifies errors of Z in columns of small norm, so
        they are corrected: Z - A^+ A Z, and again for an orthonormal basis of what D^-1 makes of it.

        Args:
            Z: (P, n, q), zeros where a matrix has fewer vectors.
            lost: (P, 1, q), which are vectors.
        """
        system = self.system
        # Rounding errors in A Z and in Z itself would be magnified by the condition number and its square, and by D^-1.
        spread = system.scale.amax(1) / system.scale.amin(1)
        exact = bool((self.largest * spread > _PLAIN * self.smallest).any())
        null = Z / system.scale
        for _ in range(2):
            null = null / torch.where(lost, torch.linalg.vector_norm(null, dim=1, keepdim=True), 1.0)
            # QR makes up directions for the columns of zeros.
            Z = torch.where(lost, torch.linalg.qr(null).Q, 0.0) * system.scale
            whole: Pair | Single = Pair.of(Z) if exact else Single(Z)
            for _ in range(3):
                if isinstance(whole, Pair):
                    image = system.weigh(system.exact_residuals.matmul(whole).value)
                else:
                    image = system.A.matmul(whole.high)
                moved = self.apply(system.A.adjoint(image))
                whole = whole.plus(-moved)
            null = whole.high / system.scale
        self.null = torch.where(lost, torch.linalg.qr(null).Q, 0.0)
        self.null_slip = moved / system.scale + EPS * self.null * noise(self.null)
        if exact:  # slices of Z end there, whatever D^-1 makes of it
            cut = EPS_EXTENDED * (self.null * system.scale).abs().amax(1, keepdim=True) / system.scale
            self.null_slip = self.null_slip + cut * noise(cut)


def power(apply, system: System) -> Tensor:
    """Largest eigenvalue (P, 1) of a positive definite operator, by ten power iterations on four vectors."""
    v = noise(system.scale.expand(-1, -1, 4)).to(system.A.dtype)
    size = torch.ones_like(v[:, :1].real)
    for _ in range(10):
        v = v / size
        v = apply(v)
        size = torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return size[:, 0].amax(1, keepdim=True)
