"""What solvers with a factor share: refinement around it, the null space, the verdict.

    G g = about (A^H A + d^2)^+ g          by the factor, which is all that a subclass gives
    e_y = G (A^H f_1 - f_2),   e_r = f_1 - A e_y          a correction, where cond <= 1e4; or a few steps of
                                                          conjugate gradients with G for the preconditioner
    r += e_r,   y += e_y                                  `refinement`

A factor of A^H A, or of A, is such a good preconditioner that one to three iterations do, and the refinement around
them gives the accuracy of a backward stable method and more (Björck, Numerical Methods for Least Squares Problems, SIAM
1996, section 6.6). Without full rank, solutions are projected on the row space of the unscaled A.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..result import RANK_DEFICIENT, Report
from ..sparse.base import dot, norm
from ..sparse.double_double import Pair
from ..sparse.lazy import lazy
from ..sparse.numerics import noise
from .acceptance import report
from .base import Factors
from .conjugate_gradients import Run, cgls
from .null_space import NullSpace, SparseVectors
from .refinement import Refined, refine
from .system import EPS, System
from .watching import tell

_BOUND = 1e-11  # relative rounding errors that need no closer look, and no residuals in extended precision
_PASSES = 12  # corrections at most of a solution of least norm
_PLAIN = 1e4  # condition number up to which the factor alone is right to four digits: eps cond^2 is 2e-8, times some n
_CONTRACTION = 0.01  # of a correction by conjugate gradients, to three digits, with room
_GOAL = 1e-6  # of what gamma, the square of a norm of the gradient, was: three digits


class Factored(Factors):
    """(A^H A + d^2)^+ as `apply`, with extreme singular values, rank and null space; a subclass fills these in.

    Attributes:
        method: codes (P, 1) of how each matrix was factored.
        largest, smallest: extreme singular values that are not zero (P, 1).
        rank: (P, 1), in double precision.
        null: the null space, None if all have full rank.
        smallest_of_columns: the smallest singular values (P, 1) of [A; d] N^-1, None where they are not known.
    """

    method: Tensor
    largest: Tensor
    smallest: Tensor
    rank: Tensor
    null: NullSpace | None = None
    smallest_of_columns: Tensor | None = None

    def __init__(self, system: System, minimum_norm: bool, accept: float):
        self.system, self.minimum_norm, self.accept = system, minimum_norm, accept

    def apply(self, g: Tensor) -> Tensor:
        """(A^H A + d^2)^+ g, to some digits."""
        raise NotImplementedError

    def solve(
        self, b: Tensor, c: Tensor, start: Tensor | None = None, *, judged: bool = True
    ) -> tuple[Tensor, Tensor, Report]:
        """Solve K (r, y) = (b, c) in the scaled unknowns; with a null space, K^+ in the unscaled ones."""
        system, given, accept = self.system, c, self.accept if judged else None
        if self.null is not None:
            unscaled = c * system.scale
            seen, (slip, _) = self.null.project(unscaled), self.null.errors(unscaled)
            c, blur = seen / system.scale, slip / system.scale
            # What is left of c is reported on as zero where it may be nothing but errors of the projection.
            given = torch.where((norm(seen) <= 16 * norm(slip))[:, None], given, c)
        plain = self.null is None and bool((self.largest < _PLAIN * self.smallest).all())
        refined = refine(
            system,
            b,
            c,
            self._apply_once if plain else self._iterate,
            largest=self.largest,
            smallest=self.smallest,
            contraction=0.0 if plain and system.slack is None else _CONTRACTION,
            target=4 * EPS,
            bound=_BOUND,
            accept=accept,
            consistent=plain and system.slack is None,
            strict=system.slack is not None,
        )
        if self.null is not None:
            refined = self._without_null_space(refined, b, blur)
        answer = report(
            system,
            b,
            c,
            refined,
            method=self.method,
            largest=self.largest,
            smallest=self.smallest,
            rank=self.rank,
            accept=accept,
            given=given,
        )
        answer = answer._replace(condition=self.condition * torch.ones_like(answer.condition))
        if not self.minimum_norm:
            deficient = self.rank < system.n
            answer = answer._replace(status=torch.where(deficient, RANK_DEFICIENT, answer.status))
        return refined.r, refined.y, answer

    @lazy
    def condition(self) -> Tensor:
        """Condition number (P, 1) of B = [A; d] N^-1, whose columns have norm 1, by the largest eigenvalues of

            B^H B = N^-1 (A^H A + d^2) N^-1   and   (B^H B)^+ = P N (A^H A + d^2)^+ N P

        where P projects off N times the null space of the scaled A: only there do the pseudoinverses of both differ.
        Without P, where null vectors are sparse, it comes out at most 2 times too large, as N is between 1/2 and 2.
        """
        system, null = self.system, None
        N = system.norms
        if self.null is not None and isinstance(basis := self.null.basis(system.scale), Tensor):
            null = torch.where((basis != 0).any(1, keepdim=True), torch.linalg.qr(N * basis).Q, 0.0)

        def square(v: Tensor) -> Tensor:
            return system.normal(v / N) / N

        def inverse(v: Tensor) -> Tensor:
            if null is None:
                return N * self.apply(N * v)
            v = N * self.apply(N * (v - null @ (null.mH @ v)))
            return v - null @ (null.mH @ v)

        like = system.scale, system.A.dtype
        # Power iteration on the inverse takes fewer steps, since its largest eigenvalues lie further apart. The result
        # comes out 1 to 1.2 times too small in all.
        known = self.smallest_of_columns
        smallest = power(inverse, *like, steps=3).rsqrt() if known is None else known
        return (power(square, *like).sqrt() / smallest).clamp_min(1)

    def dependent(self, p: int) -> list[int]:
        """Some columns that take part in a dependence among the columns of matrix p, the foremost first."""
        if self.null is None:
            return []
        system = self.system
        basis = self.null.basis(system.scale)
        if isinstance(basis, SparseVectors):
            shares = basis.norms_of_rows()[p] * system.scale[p, :, 0]
        else:
            shares = torch.linalg.vector_norm(torch.linalg.qr(basis[p, :, (basis[p] != 0).any(0)]).Q, dim=1)
        shares = shares * system.norms[p, :, 0]
        top = shares.topk(min(5, len(shares)))
        return top.indices[top.values > 0.1 * top.values[0]].tolist()

    def _without_null_space(self, refined: Refined, b: Tensor, blur: Tensor) -> Refined:
        """The solution of least norm, with what errors of the null space do to it, and an error `blur` of c.

        Of an error of c only what lies in the row space has an effect.
        """
        system, null = self.system, self.null
        assert null is not None
        r, y, errors, iterations = refined
        x = y / system.scale
        size = system.scale.amin(1)
        of_x = size * sum(norm(error) for error in null.errors(x)) + EPS * norm(system.weight * y)
        x = null.project(x)
        if bool((errors.x + of_x > _BOUND * size * norm(x)).any()):
            x, moved = self._of_least_norm(b, r, x)
            errors, of_x = errors._replace(x=size * moved), size * (norm(null.errors(x)[1]) + EPS * norm(x))
        moved = self.apply(blur)
        of_r = system.A.norm(system.A.matmul(moved)) + EPS * system.row_norm(r)
        errors = errors._replace(x=errors.x + of_x, r=errors.r + of_r)
        y = x * system.scale
        unseen = None if system.weights is None else system.weights == 0
        if unseen is not None and not bool(system.A.everywhere(~unseen.any())):
            # Rows without weight see of A what has no effect on the others, and was projected off x.
            left = system.exact_residuals(b, torch.zeros_like(y), Pair.of(torch.zeros_like(r)), Pair.of(y))[0]
            r = torch.where(unseen[:, :, None], left, r)
        return Refined(r, y, errors, iterations)

    def _of_least_norm(self, b: Tensor, r: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x, how far the last correction moved it) of A x = b - r, in the row space as the x that this begins with.

        Where columns have very different norms, x may be much shorter than what it is a projection of, whose rounding
        errors then are large in A x. Each pass solves for what they leave of b - r - A x and projects again, which
        makes them smaller by about eps times the ratio of the norms.
        """
        system = self.system
        assert self.null is not None
        none, moved = torch.zeros_like(x), torch.full_like(norm(x), torch.inf)
        for _ in range(_PASSES):
            left = system.exact_residuals(b, none, Pair.of(r), Pair.of(x * system.scale))[0]
            step = self.null.project(self._iterate(system.weigh(left), none).y / system.scale)
            shrinks = norm(step) < moved / 4
            x = torch.where(shrinks[:, None], self.null.project(x + step), x)
            moved = torch.where(shrinks, norm(step), moved)
            if not bool(shrinks.any()):
                break
        return x, moved

    def _apply_once(self, b: Tensor | None, c: Tensor) -> Run:
        """K^-1 (b, c) by the factor alone; a b of None is zero."""
        g = -c if b is None else self.system.A.adjoint(b).sub_(c)
        y = self.apply(g)
        tell()
        r, gamma = self.system.A.matmul(y), dot(g, y)
        return Run(r.neg_() if b is None else torch.sub(b, r, out=r), y, gamma, torch.ones_like(gamma))

    def _iterate(self, b: Tensor | None, c: Tensor) -> Run:
        """K^-1 (b, c) to three digits."""
        assert b is not None
        g = self.system.gradient(b, torch.zeros_like(c), c)
        goal = _GOAL * dot(g, self.apply(g))
        return cgls(self.system, b, c, self.apply, lambda r, y, live: goal[:, live], limit=30, rises=3)


def power(apply: Callable[[Tensor], Tensor], like: Tensor, dtype: torch.dtype, *, steps: int = 5) -> Tensor:
    """Largest eigenvalue (P, 1) of a positive semidefinite operator on (P, n, 1), by power iterations on four vectors.

    `like` is real and has the shape and the device of what it is applied to, and `dtype` is the type of that.
    """
    v = noise(like.expand(-1, -1, 4)).to(dtype)
    size = torch.ones_like(v[:, :1].real)
    for _ in range(steps):
        v = v / size
        v = apply(v)
        size = torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return size[:, 0].amax(1, keepdim=True)
