"""Conjugate gradients on the extended normal equations, without a factor: for problems of any size.

    A^H A y + d^2 y = A^H b - c,    r = b - A y          (columns scaled to norm about 1)

1. `certificate`: sigma_min and sigma_max of [A; d], from two problems with known random solutions, side by side, which
   costs up to one solve for each matrix.
2. `conjugate_gradients`, until |gradient| / sigma_min^2, a bound on the error, is what was asked for.
3. `refinement`: a last correction measures the error that is left; where rounding asks for it, residuals are taken in
   twice double precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..result import RANK_DEFICIENT, Report, method_code
from ..sparse.base import COARSE, norm
from ..sparse.numerics import noise
from . import one_pass
from .acceptance import report
from .base import Factors, Solver
from .certificate import Certificate
from .conjugate_gradients import Normal, Run, cgls, iterate
from .corrections import CONTRACTION, Corrections
from .preconditioners import prepared
from .refinement import ratio, refine
from .single_precision import SINGLE_CONTRACTION
from .stopped import Stopped
from .system import System, check_number
from .watching import iterate_shown

_BOUND = 1e-9  # relative rounding errors that need no residuals in extended precision


@dataclass(frozen=True)
class CGLS(Solver):
    """Preconditioned conjugate gradients; each iteration is one product with A and one with A^H, for all columns.

    For one column without a preconditioner, up to a condition number of 3000, both are one pass over A on the CPU.

    Args:
        tolerance: forward error to aim at, relative; None for 1e-11 (1e-9 for single precision).
        accept: largest estimated forward error, relative, of an answer that is given; None for eps^(1/3), or ten
            times the tolerance if that is larger.
        max_iterations: per run; an answer that is not reached by then raises `ConvergenceError`.
        callback: called with (iteration, norm of the gradient) after every iteration towards a solution, as many times
            as `info.iterations` says; corrections begin at 1 again. `progress` tells of the search before it too.
        preconditioner: about (A^H A + damp^2)^-1, Hermitian and positive definite: `BlockJacobi`, a `GramFactor`, or
            any callable that takes g of shape (n, k) in double precision and gives as much; where A is wide, A A^H is
            meant. It is called with plain tensors, whatever the transformation. None: columns scaled to norm 1.
        steps: stop early, as regularisation: after so many products with A and with A^H each, with no more spent, x is
            the iterate of so many steps of CGLS, with unscaled columns unless there is a preconditioner (of
            A^H A + damp^2, for a wide A too). Its status is "stopped as asked", it has no estimate of an error, and a
            derivative of it is refused. For `lstsq` and `solve`.

    >>> import torch, functional_lstsq as fl
    >>> A = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)).to_sparse()
    >>> fl.lstsq(A, torch.ones(3, dtype=torch.float64), solver=fl.CGLS(steps=1))
    tensor([0.3077, 0.1538, 0.0769], dtype=torch.float64)
    """

    tolerance: float | None = None
    accept: float | None = None
    max_iterations: int = 20_000
    callback: Callable[[int, float], object] | None = None
    preconditioner: Any = None
    steps: int | None = None

    def __post_init__(self):
        check_number("tolerance", self.tolerance, optional=True, below=0.1)
        check_number("accept", self.accept, optional=True, below=1)
        for name, value in (("max_iterations", self.max_iterations), ("steps", self.steps)):
            if not isinstance(value, int) and not (name == "steps" and value is None):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            check_number(name, value, optional=name == "steps")
        if self.steps is not None and (self.tolerance is not None or self.accept is not None):
            raise ValueError("steps say when to stop, and tolerance and accept say so too: give one of them")
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback must be callable, got {self.callback!r}")
        given = self.preconditioner
        if given is not None and (isinstance(given, type) or not (callable(given) or hasattr(given, "prepare"))):
            raise TypeError(f"preconditioner must be callable, or a BlockJacobi, got {given!r}")

    def prepare(self, system: System, *, minimum_norm: bool) -> Factors:
        """Find the extreme singular values of `system`; the result solves for any right-hand side."""
        if self.steps is None:
            return (
                LeastNorm(self, system) if minimum_norm and system.A.steepest is not None else Iteration(self, system)
            )
        given = None if self.preconditioner is None else prepared(self.preconditioner, system)
        return Stopped(system, self.steps, given, self.callback, self.threshold(system.precision))

    def threshold(self, precision: float) -> float:
        """As of every solver; at least ten times what was aimed at."""
        return self.accept or max(super().threshold(precision), 10 * (self.tolerance or 0))


class Iteration(Factors):
    """CGLS for one system, with the extreme singular values that certify its answers.

    Args:
        patience: iterations for a solve and its derivative above which it gives up, as soon as it expects them.
        known: as of `Certificate`.
    """

    def __init__(self, settings: CGLS, system: System, patience: float = float("inf"), known: Tensor | None = None):
        self.settings, self.system, self.accept = settings, system, settings.threshold(system.precision)
        self.target = settings.tolerance or (1e-11 if system.precision < 1e-10 else 1e-9)
        self.given = None if settings.preconditioner is None else prepared(settings.preconditioner, system)
        limit = settings.max_iterations
        self.certificate = Certificate(system, self.given, limit=limit, patience=patience, known=known)
        self.iterations = self.certificate.iterations  # by which others know what a solve costs

    def solve(
        self, b: Tensor, c: Tensor, start: Tensor | None = None, *, judged: bool = True
    ) -> tuple[Tensor, Tensor, Report]:
        """Solve K (r, y) = (b, c) in the scaled unknowns, from y = `start` if there is one."""
        system, certificate, accept = self.system, self.certificate, self.accept if judged else None
        # Where nothing can be certified nothing is iterated: a right-hand side of zeros ends at once.
        failed, given, of_c = certificate.failed, b, c
        if bool(failed.any()):
            b, c = (torch.where(failed[:, None], 0.0, tensor) for tensor in (b, c))
        correct = Corrections(self, b, start)
        refined = refine(
            system,
            b,
            c,
            correct,
            largest=certificate.largest,
            smallest=certificate.smallest,
            contraction=CONTRACTION if correct.single is None else 20 * SINGLE_CONTRACTION,
            target=10 * self.target,
            bound=_BOUND,
            accept=accept,
            consistent=system.weights is None and self.passes_once(b.shape[2]),
        )
        answer = report(
            system,
            b,
            c,
            refined,
            method=method_code("cgls"),
            largest=certificate.largest,
            smallest=certificate.smallest,
            rank=torch.where(failed, -1, system.n),
            accept=accept,
            limited=correct.limited,
        )
        # Zeros solve for zeros, whatever A may be, unless a lack of rank leaves other solutions.
        failed = failed & ~((system.A.largest(given) == 0) & (of_c == 0).all(1) & ~self.certificate.deficient)
        answer = answer._replace(
            condition=certificate.condition * torch.ones_like(answer.condition),
            status=torch.where(failed, certificate.verdict(), answer.status),
            residual_error=torch.where(failed, torch.inf, answer.residual_error),
            solution_error=torch.where(failed, torch.inf, answer.solution_error),
            iterations=torch.where(failed, self.iterations, answer.iterations),
            optimality=torch.where(failed, torch.nan, answer.optimality),
        )
        return torch.where(failed[:, None], given, refined.r), refined.y, answer  # r = b - A y for y = 0

    def passes_once(self, columns: int) -> bool:
        """Whether so many columns are iterated with one pass over A."""
        moderate = self.certificate.passes_once and float(self.certificate.condition) <= one_pass.CONDITION
        return columns == 1 and moderate

    def reach(
        self, b: Tensor, c: Tensor, start: Tensor | None, found: tuple[Tensor, Tensor, Report]
    ) -> tuple[Tensor, Tensor, Report]:
        """The iterate at which a run ends, where nothing was iterated for want of a certificate."""
        (r, y, answer), system = found, self.system
        missing = answer.optimality.isnan() & (answer.status != RANK_DEFICIENT)
        if not bool(missing.any()):
            return found
        left, rest = system.weigh(b), c
        if start is not None:
            left, rest = left - system.A.matmul(start), c + system.damped(start)
        run = self.run(system, left, rest, self.target, start)
        reached = run.y if start is None else start + run.y
        slope = norm(system.gradient(run.r, reached, c))
        optimality = ratio(slope, self.certificate.largest * system.A.norm(run.r) + norm(c))
        y = torch.where(missing[:, None], reached, y)
        r = torch.where(missing[:, None], b - system.plain.matmul(y), r)
        return (
            r,
            y,
            answer._replace(
                iterations=answer.iterations + torch.where(missing, run.iterations, 0.0),
                optimality=torch.where(missing, optimality, answer.optimality),
            ),
        )

    def run(self, system: Normal, b: Tensor | None, c: Tensor, tolerance: float, start: Tensor | None = None) -> Run:
        """Iterate until the error of x is at most `tolerance` times |x|; of start + y, where there is a start.

        x has the norm |D^-1 y|, here in units of min D^-1, in which an error of x is at most |e| for an error e of y.
        The norms N of the columns are at least 1/2, so that |e| <= 2 |N e| <= 2 sqrt(gamma) / sigma_min^2: gamma is the
        square of the gradient in the norm of N^-2, the preconditioner. b is None for zero.
        """
        norms, weight = self.system.norms.to(c.real.dtype), self.system.weight.to(c.real.dtype)
        inverse, eps = norms.square().reciprocal(), max(torch.finfo(c.dtype).eps, self.system.A.unit / 10)
        limit = tolerance / 2 * self.certificate.smallest.square()
        # Rounding errors of the gradient, below which it does not fall, are those of A^H r and of c. Beside a large
        # damping |A| is far smaller than the largest singular value of [A; d].
        size = torch.minimum(self.certificate.largest, self.system.size)
        floor, slope = 10 * eps * norm(c / norms), 10 * eps * size
        show = iterate_shown(c if tolerance == self.target else None)

        def goal(r: Tensor, y: Tensor, live: Tensor) -> Tensor:
            whole = y if start is None else start[:, :, live] + y
            if show is not None:
                show(whole, live)
            return torch.maximum(limit * norm(weight * whole), slope * system.A.norm(r) + floor[:, live]).square()

        settings = self.settings
        if self.passes_once(c.shape[2]):
            numbers = one_pass.Goal(float(limit), float(slope), float(floor), weight, start)
            limits = float(self.certificate.condition), settings.max_iterations
            return one_pass.iterate(system, b, c, inverse, numbers, *limits, callback=settings.callback, show=show)
        if b is None:
            b = torch.zeros((len(c), system.A.m, c.shape[2]), dtype=c.dtype, device=c.device)
        if self.given is None:
            return cgls(
                system,
                b,
                c,
                lambda g: g * inverse,
                goal,
                limit=settings.max_iterations,
                callback=settings.callback,
                inverse=inverse,
            )

        def converged(r: Tensor, y: Tensor, g: Tensor, gamma: Tensor, live: Tensor) -> Tensor:
            return norm(g / norms).square() <= goal(r, y, live)  # gamma is in a norm unknown here

        return iterate(system, b, c, self.given, converged, limit=settings.max_iterations, callback=settings.callback)


class LeastNorm(Iteration):
    """K^+ for a system whose columns have one scale, so that the least norm is that of x; its null space is checked.

    Iterates that start from zero stay in the range of A^H, where A^+ b is. What certifies them must be there too: the
    part y of a random v that solves A y = A v. What is left, v - y, is in the null space: |A (v - y)| is below the
    tolerance of rank, and every direction in which A is larger was found in y.
    """

    def __init__(self, settings: CGLS, system: System):
        self.limit = settings.max_iterations
        v = noise(system.scale.expand(-1, -1, 2 if system.A.unit < COARSE else 6)).to(system.A.dtype)
        self.system = system
        y = self._project(v)
        lost = norm(v - y) > 1e-6 * norm(v)
        self.deficient = lost.any(1, keepdim=True)
        super().__init__(settings, system, known=torch.where(self.deficient[:, None], y, v))
        # What is neither found nor in the null space has a singular value that no iterate could tell from zero.
        left = system.A.norm(system.A.matmul(v - y)) > 2 * self._goal(v)
        self.certificate.failed = self.certificate.failed | (self.deficient & left.any(1, keepdim=True))

    def _goal(self, v: Tensor) -> Tensor:
        """|A z| for a z in one direction alone, as large there as v, whose singular value is at the limit of rank."""
        assert self.system.A.steepest is not None
        return self.system.tolerance * self.system.A.steepest * norm(v) / self.system.n**0.5

    def _project(self, v: Tensor) -> Tensor:
        """The part of v (P, n, k) in the range of [A; d]^H."""
        system = self.system
        c = torch.zeros_like(v) if system.d2 is None else -system.d2 * v
        goal = self._goal(v)

        def converged(r: Tensor, y: Tensor, g: Tensor, gamma: Tensor, live: Tensor) -> Tensor:
            left = system.A.norm(r)
            if system.d2 is not None:
                left = torch.hypot(left, norm(system.d2.sqrt() * (v - y)))
            return left <= goal

        b = system.A.matmul(v)
        return iterate(system, b, c, torch.clone, converged, limit=self.limit, drop=False).y

    def solve(
        self, b: Tensor, c: Tensor, start: Tensor | None = None, *, judged: bool = True
    ) -> tuple[Tensor, Tensor, Report]:
        """K^+ (b, c), from no start, whose part in the null space would stay."""
        r, y, answer = super().solve(b, self._seen(c), judged=judged)
        return r, y, answer._replace(rank=torch.where(self.deficient, -1.0, answer.rank))

    def run(self, system: Normal, b: Tensor | None, c: Tensor, tolerance: float, start: Tensor | None = None) -> Run:
        """As of `Iteration`: rounding errors in c have a part in the null space, which no iterate makes smaller."""
        return super().run(system, b, self._seen(c), tolerance, start)

    def _seen(self, c: Tensor) -> Tensor:
        needed = self.deficient & (c != 0).any(1)
        return torch.where(needed[:, None], self._project(c), c) if bool(needed.any()) else c
