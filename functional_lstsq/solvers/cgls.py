"""Conjugate gradients on the extended normal equations, without a factor: for problems of any size.

    A^H A x + d^2 x = A^H b - c,    r = b - A x      (columns scaled to norm about 1)

A small gradient says nothing of directions in which A is weak and which the iteration has not found yet. So before
anything is solved, two problems with known random solutions are, side by side: the iteration goes on until those are
found in every direction, which costs up to one solve per matrix and gives the extreme singular values. From then on
|error| <= |gradient| / sigma_min^2 holds, and a last correction measures the error that is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..products import Operator
from ..result import INACCURATE, ITERATION_LIMIT, RANK_DEFICIENT, Report, method_code
from .conjugate import Normal, Run, cgls, iterate
from .numerics import noise
from .precondition import prepared
from .refine import refine, report
from .system import System, check_number, norm

_CONTRACTION = 0.05  # of corrections after the first solve
# Products in single precision take half the time where memory bounds them; corrections by them are right to some digits
# while eps cond^2 is small, and refinement in double precision makes up the others (Carson, Higham, Pranesh, SIAM J.
# Sci. Comput. 42(6), 2020).
_SINGLE_CONTRACTION = 1e-4
_SINGLE_CONDITION = 30
_SINGLE_ENTRIES = 500_000
_SINGLE_TERMS = 2000  # of a sum in single precision, whose rounding errors grow with them
_SOLVES = 5  # a solve and its adjoint take about so many times the iterations that find the known solutions


@dataclass(frozen=True)
class CGLS:
    """Preconditioned conjugate gradients; each iteration is one product with A and one with A^H, for all columns.

    Args:
        tolerance: forward error to aim at, relative; None for 1e-11 (1e-9 for single precision).
        accept: largest estimated forward error, relative, of an answer that is given; None for eps^(1/3), or ten
            times the tolerance if that is larger.
        max_iterations: per run; an answer that is not reached by then raises `ConvergenceError`.
        callback: called with (iteration, norm of the gradient) after every iteration.
        preconditioner: about (A^H A + damp^2)^-1, Hermitian and positive definite: `BlockJacobi`, a `GramFactor`, or
            any callable that takes g of shape (n, k) in double precision and gives as much; where A is wide, A A^H is
            meant. It is called with plain tensors, whatever the transformation. None: columns scaled to norm 1.
    """

    tolerance: float | None = None
    accept: float | None = None
    max_iterations: int = 20_000
    callback: Callable[[int, float], object] | None = None
    preconditioner: Any = None

    def __post_init__(self):
        check_number("tolerance", self.tolerance, optional=True, below=1)
        check_number("accept", self.accept, optional=True)
        if not isinstance(self.max_iterations, int):
            raise TypeError(f"max_iterations must be an integer, got {self.max_iterations!r}")
        check_number("max_iterations", self.max_iterations)
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback must be callable, got {self.callback!r}")
        given = self.preconditioner
        if given is not None and (isinstance(given, type) or not (callable(given) or hasattr(given, "prepare"))):
            raise TypeError(f"preconditioner must be callable, or a BlockJacobi, got {given!r}")

    def prepare(self, system: System, *, minimum_norm: bool) -> Iteration:
        """Find the extreme singular values of `system`; the result solves for any right-hand side."""
        system.accept = self.accept or max(system.accept, 10 * (self.tolerance or 0))
        return Iteration(self, system)


def _longest(system: System) -> int:
    """The number of entries in the fullest row or column."""
    pattern = system.A.pattern
    counts = (where.pointers.diff() for where in (pattern.rows, pattern.T.rows))
    return pattern.keep("longest", lambda: max(int(count.max()) if len(count) else 0 for count in counts))


class _Single(NamedTuple):
    """What the iteration needs of a system, in single precision."""

    A: Operator
    d2: Tensor | None

    @classmethod
    def of(cls, system: System) -> _Single:
        A, dtype = system.A, torch.complex64 if system.A.dtype.is_complex else torch.float32
        return cls(Operator(A.pattern, A.values.to(dtype)), None if system.d2 is None else system.d2.float())


class Iteration:
    """CGLS for one system, with the extreme singular values that certify its answers.

    Args:
        patience: iterations for a solve and its derivative above which it gives up, as soon as it expects them.
    """

    def __init__(self, settings: CGLS, system: System, patience: float = float("inf")):
        self.settings, self.system, self.patience = settings, system, patience
        self.target = settings.tolerance or (1e-11 if system.precision < 1e-10 else 1e-9)
        large = system.entries >= _SINGLE_ENTRIES and system.accept < 1 and _longest(system) <= _SINGLE_TERMS
        self.single = _Single.of(system) if large and settings.preconditioner is None else None
        self.given = None if settings.preconditioner is None else prepared(settings.preconditioner, system)
        self._measure()

    def _measure(self) -> None:
        """Solve for a known solution y: r = A (y - y_k), so |r| / |y - y_k| bounds sigma_min from above, for free.

        Singular values are those of the matrix with columns of norm 1: y is measured as N y, with the norms N.
        """
        system = self.system
        # Two of them: that both are blind to a direction takes a chance of one in a million.
        known = noise(system.scale.expand(-1, -1, 2)).to(system.A.dtype)
        self.whole = norm(system.norms * known)
        self.smallest, self.largest = torch.full_like(self.whole, torch.inf), torch.ones_like(self.whole)
        self.iterations, self.unfound = torch.zeros_like(self.whole), torch.zeros_like(self.whole, dtype=torch.bool)
        if self.single is not None:
            left = self._find(self.single, known)
            if bool((self.largest < _SINGLE_CONDITION * self.smallest).all()):
                known = left
            else:  # rounding may have made the smallest too small: all over again
                self.single, self.smallest = None, torch.full_like(self.smallest, torch.inf)
        if self.single is None or bool(self._missed(known).any()):
            known = self._find(system, known)
        if self.given is not None:
            self._look_for_the_weakest(self.given)
        smallest, largest = self.smallest.amin(1, keepdim=True), self.largest.amax(1, keepdim=True)
        self.smallest, self.largest = smallest, largest
        self.deficient = smallest <= system.tolerance * largest
        self.iterations = self.iterations.amax(1, keepdim=True)
        self.unseen = ~self.deficient & (self._missed(known) | self.unfound).any(1, keepdim=True)
        # So weak a direction is hidden in the rounding errors of A^H A.
        self.failed = self.deficient | self.unseen | (smallest < 1e-7 * largest)

    def _look_for_the_weakest(self, apply: Callable[[Tensor], Tensor]) -> None:
        """Two steps of inverse iteration: a good preconditioner finds known solutions before singular values show.

        A^H A z = v - g with |g| far below |v| / sqrt(n), in the plain norm, misses no direction, whatever the
        preconditioner thinks of it: z is as large in it as v / sigma^2.
        """
        system = self.system
        v = noise(system.scale.expand(-1, -1, 2)).to(system.A.dtype)
        zero = torch.zeros((system.copies, system.m, 2), dtype=v.dtype, device=v.device)
        goal = 1e-3 / system.n**0.5
        for _ in range(2):
            v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
            run = iterate(
                system,
                zero,
                -v,
                apply,
                lambda r, y, g, gamma, live: norm(g) <= goal,
                limit=self.settings.max_iterations,
                drop=False,
                callback=self.settings.callback,
            )
            left = norm(system.gradient(-system.A.matmul(run.y), run.y, -v))
            self.unfound = self.unfound | ~(left <= 10 * goal)
            v = torch.where(run.y.isfinite(), run.y, 0.0)
            energy = norm(system.A.matmul(v)).square()
            if system.d2 is not None:
                energy = energy + norm(system.d2.sqrt() * v).square()
            ratio = torch.where(energy > 0, energy.sqrt() / norm(system.norms * v), torch.inf)
            self.smallest = torch.minimum(self.smallest, ratio)
            self.iterations = self.iterations + run.iterations

    def _missed(self, left: Tensor) -> Tensor:
        # A direction that is missing altogether leaves an error of about |y| / sqrt(n).
        return norm(self.system.norms * left) > 1e-3 / self.system.n**0.5 * self.whole

    def _find(self, target: Normal, known: Tensor) -> Tensor:
        """What is left of `known` when it has been solved for; notes extreme singular values on the way."""
        system = self.system
        real = torch.float64 if target is system else torch.float32
        size = known.abs().amax(1, keepdim=True)  # single precision has a small range
        wanted, norms = (known / size).to(target.A.dtype), system.norms.to(real)
        b = target.A.matmul(wanted)
        c = torch.zeros_like(wanted) if target.d2 is None else -target.d2 * wanted
        whole, inverse = self.whole / size[:, 0], norms.square().reciprocal()

        def energy_of(r: Tensor, missing: Tensor) -> Tensor:
            """|[A; d] missing|"""
            if target.d2 is None:
                return norm(r)
            return (norm(r).square() + norm(target.d2.sqrt() * missing).square()).sqrt()

        at_first = norm(norms * wanted)
        ratio = torch.where(at_first > 0, energy_of(b, wanted) / at_first, torch.inf)
        self.smallest = torch.minimum(self.smallest, ratio.to(torch.float64))
        threshold, errors = 1e-3 / system.n**0.5, []
        # Below it is rounding: in single precision, of nothing; in double precision, of a matrix without full rank.
        floor = 0.0 if target is system else 100 * torch.finfo(real).eps * energy_of(b, wanted)
        # Few unknowns may all be found in one step, after which the ratio is one of rounding errors.
        least = torch.finfo(real).eps ** 0.5 * whole if target is system else 0.0

        def converged(r: Tensor, y: Tensor, g: Tensor, gamma: Tensor, live: Tensor) -> Tensor:
            missing = wanted - y
            error, energy = norm(norms * missing), energy_of(r, missing)
            gradient = gamma.sqrt() if self.given is None else norm(g / norms)
            seen = ((energy > floor) | (target is system)) & (error > least)
            ratio = torch.where(seen, energy / error, torch.inf).to(torch.float64)
            self.smallest = torch.minimum(self.smallest, ratio)
            slope = torch.where(seen & (energy > 0), gradient / energy, 0.0)
            self.largest = torch.maximum(self.largest, slope.to(torch.float64))
            found = error <= threshold * whole
            if target is not system and bool((self.largest > _SINGLE_CONDITION * self.smallest).any()):
                return torch.ones_like(found)
            errors.append(float((error / whole).max()) if self.patience < float("inf") else 0.0)
            if self._hopeless(errors, threshold):
                return torch.ones_like(found)
            # One that proves a dependence ends the search of all.
            smallest, largest = self.smallest.amin(1, keepdim=True), self.largest.amax(1, keepdim=True)
            return found | (energy <= floor) | (smallest <= system.tolerance * largest)

        settings = self.settings
        run = iterate(
            target,
            b,
            c,
            self.given or (lambda g: g * inverse),
            converged,
            limit=settings.max_iterations,
            drop=False,
            callback=settings.callback,
        )
        self.iterations = self.iterations + run.iterations
        return known - run.y.to(known.dtype) * size

    def _hopeless(self, errors: list[float], threshold: float) -> bool:
        """Whether the errors so far promise more iterations than there is patience for."""
        if self.patience == float("inf") or len(errors) < 24 or min(errors[-1], errors[-9]) <= threshold:
            return False
        rate = math.log(errors[-9] / errors[-1]) / 8
        expected = len(errors) + math.log(errors[-1] / threshold) / rate if rate > 0 else float("inf")
        return _SOLVES * expected > self.patience

    def solve(self, b: Tensor, c: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor, Report]:
        """Solve K (r, y) = (b, c) in the scaled unknowns, from y = `start` if there is one."""
        system, failed = self.system, self.failed
        limited = self.unseen.expand(-1, b.shape[2])
        # Where nothing can be certified nothing is iterated: a zero right-hand side ends at once.
        given = b
        b, c = (torch.where(failed[:, None], 0.0, tensor) for tensor in (b, c))
        if start is not None:
            weighed = system.weigh(b)
            left = weighed - system.A.matmul(start)
            # A start that is worse than none would leave rounding errors of its own size.
            lost = norm(left).square() + (0.0 if system.d2 is None else norm(system.d2.sqrt() * start).square())
            better = (lost < norm(weighed).square())[:, None]
            start, left = torch.where(better, start, 0.0), torch.where(better, left, weighed)
        first, contraction = True, _CONTRACTION if self.single is None else 20 * _SINGLE_CONTRACTION

        def correct(b: Tensor | None, c: Tensor) -> Run:
            nonlocal first, limited
            assert b is not None
            if first and start is not None:
                b, c = left, c + system.damped(start)
            if self.single is not None:
                run = self._run_single(b, c)
            else:
                run = self._run(system, b, c, self.target if first else _CONTRACTION, start if first else None)
            ran_out = run.iterations >= self.settings.max_iterations
            # Other columns than those that were asked about are samples of rounding errors.
            limited = limited | (ran_out if ran_out.shape == limited.shape else ran_out.any(1, keepdim=True))
            if first and start is not None:
                run = run._replace(y=start + run.y)
            first = False
            return run

        refined = refine(
            system,
            b,
            c,
            correct,
            largest=self.largest,
            smallest=self.smallest,
            contraction=contraction,
            target=10 * self.target,
            bound=1e-9,
        )
        answer = report(
            system,
            b,
            c,
            refined,
            method=method_code("cgls"),
            largest=self.largest,
            smallest=self.smallest,
            rank=torch.where(failed, -1, system.n),
            limited=limited,
        )
        answer = answer._replace(
            status=torch.where(failed, self._verdict(), answer.status),
            solution_error=torch.where(failed, torch.inf, answer.solution_error),
            iterations=torch.where(failed, self.iterations, answer.iterations),
            optimality=torch.where(failed, torch.nan, answer.optimality),
        )
        return torch.where(failed[:, None], given, refined.r), refined.y, answer  # r = b - A y for y = 0

    def _verdict(self) -> Tensor:
        """Why a matrix failed, before any right-hand side was seen."""
        given_up = self.patience < float("inf")
        ran_out = self.unseen & ((self.iterations >= self.settings.max_iterations) | given_up)
        return torch.where(self.deficient, RANK_DEFICIENT, torch.where(ran_out, ITERATION_LIMIT, INACCURATE))

    def _run(self, system: Normal, b: Tensor, c: Tensor, tolerance: float, start: Tensor | None = None) -> Run:
        # Relative to x, not to y, which may be far larger in other columns: |W e| <= |e| for the weights W <= 1. The
        # norms N of the columns, which gamma knows of, are at least 1/2: |e| <= 2 |N e| <= 2 gradient / sigma_min^2.
        norms, weight = self.system.norms.to(b.real.dtype), self.system.weight.to(b.real.dtype)
        inverse, eps = norms.square().reciprocal(), torch.finfo(b.dtype).eps
        limit = tolerance / 2 * self.smallest.square()
        # Of A^H r alone: beside a large damping A is far smaller than [A; d].
        size = torch.minimum(self.largest, self.system.size)
        floor, slope = 10 * eps * norm(c / norms), 10 * eps * size

        def goal(r: Tensor, y: Tensor, live: Tensor) -> Tensor:
            whole = y if start is None else start[:, :, live] + y
            return torch.maximum(limit * norm(weight * whole), slope * norm(r) + floor[:, live]).square()

        settings = self.settings
        if self.given is None:
            return cgls(
                system, b, c, lambda g: g * inverse, goal, limit=settings.max_iterations, callback=settings.callback
            )

        def converged(r: Tensor, y: Tensor, g: Tensor, gamma: Tensor, live: Tensor) -> Tensor:
            return norm(g / norms).square() <= goal(r, y, live)  # gamma is of a norm of which nothing is known

        return iterate(system, b, c, self.given, converged, limit=settings.max_iterations, callback=settings.callback)

    def _run_single(self, b: Tensor, c: Tensor) -> Run:
        """As `_run`, in single precision, for right-hand sides of any size."""
        assert self.single is not None
        size = (norm(b) + norm(c))[:, None]
        size = torch.where(size > 0, size, 1.0)
        dtype = self.single.A.dtype
        run = self._run(self.single, (b / size).to(dtype), (c / size).to(dtype), _SINGLE_CONTRACTION)
        r, y = (part.to(b.dtype) * size for part in (run.r, run.y))
        return Run(r, y, run.gamma.to(size.dtype), run.iterations.to(size.dtype))
