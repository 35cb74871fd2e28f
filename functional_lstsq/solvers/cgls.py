"""Conjugate gradients on the extended normal equations, without a factor: for problems of any size.

    A^H A x + d^2 x = A^H b - c,    r = b - A x      (columns scaled to norm about 1)

A small gradient says nothing of directions in which A is weak and which the iteration has not found yet. So before
anything is solved, two problems with known random solutions are, side by side: the iteration goes on until those are
found in every direction, which costs up to one solve per matrix and gives the extreme singular values. From then on
|error| <= |gradient| / sigma_min^2 holds, and a last correction measures the error that is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..result import INACCURATE, ITERATION_LIMIT, RANK_DEFICIENT, Report, method_code
from .refine import refine, report
from .system import EPS, Run, System, cgls, check_number, noise, norm

_CONTRACTION = 0.05  # of corrections after the first solve


@dataclass(frozen=True)
class CGLS:
    """Preconditioned conjugate gradients; each iteration is one product with A and one with A^H, for all columns.

    Args:
        tolerance: forward error to aim at, relative; None for 1e-11 (1e-9 for single precision).
        accept: largest estimated forward error, relative, of an answer that is given; None for eps^(1/3), or ten
            times the tolerance if that is larger.
        max_iterations: per run; an answer that is not reached by then raises `ConvergenceError`.
        callback: called with (iteration, norm of the gradient) after every iteration.
    """

    tolerance: float | None = None
    accept: float | None = None
    max_iterations: int = 20_000
    callback: Callable[[int, float], object] | None = None

    def __post_init__(self):
        check_number("tolerance", self.tolerance, optional=True, below=1)
        check_number("accept", self.accept, optional=True)
        if not isinstance(self.max_iterations, int):
            raise TypeError(f"max_iterations must be an integer, got {self.max_iterations!r}")
        check_number("max_iterations", self.max_iterations)
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback must be callable, got {self.callback!r}")

    def prepare(self, system: System, *, minimum_norm: bool) -> _Prepared:
        """Find the extreme singular values of `system`; the result solves for any right-hand side."""
        system.accept = self.accept or max(system.accept, 10 * (self.tolerance or 0))
        return _Prepared(self, system)


class _Prepared:
    def __init__(self, settings: CGLS, system: System):
        self.settings, self.system = settings, system
        self.target = settings.tolerance or (1e-11 if system.precision < 1e-10 else 1e-9)
        self._measure()

    def _measure(self) -> None:
        """Solve for a known solution y: r = A (y - y_k), so |r| / |y - y_k| bounds sigma_min from above, for free.

        Singular values are those of the matrix with columns of norm 1: y is measured as N y, with the norms N.
        """
        system = self.system
        # Two of them: that both are blind to a direction takes a chance of one in a million.
        known = noise(system.scale.expand(-1, -1, 2)).to(system.A.dtype)
        b = system.A.matmul(known)
        c = -torch.zeros_like(known) if system.d2 is None else -system.d2 * known
        whole = norm(system.norms * known)
        smallest, error = norm(b) / whole, whole
        largest = torch.ones_like(smallest)

        def converged(r: Tensor, y: Tensor, g: Tensor, gamma: Tensor) -> Tensor:
            nonlocal smallest, largest, error
            missing = known - y
            error, energy = norm(system.norms * missing), norm(r).square()
            if system.d2 is not None:
                energy = energy + norm(system.d2.sqrt() * missing).square()
            smallest = torch.where(error > 0, torch.minimum(smallest, energy.sqrt() / error), smallest)
            largest = torch.where(energy > 0, torch.maximum(largest, gamma.sqrt() / energy.sqrt()), largest)
            # A direction that is missing altogether leaves an error of about |y| / sqrt(n).
            found = error <= 1e-3 / system.n**0.5 * whole
            return found | (smallest <= system.tolerance * largest)

        run = cgls(
            system,
            b,
            c,
            self._precondition,
            converged,
            limit=self.settings.max_iterations,
            callback=self.settings.callback,
        )
        smallest, largest = smallest.amin(1, keepdim=True), largest.amax(1, keepdim=True)
        self.smallest, self.largest = smallest, largest
        self.deficient = smallest <= system.tolerance * largest
        self.iterations = run.iterations.amax(1, keepdim=True)
        missed = (error > 1e-3 / system.n**0.5 * whole).any(1, keepdim=True)
        self.unseen = ~self.deficient & missed
        # So weak a direction is hidden in the rounding errors of A^H A.
        self.failed = self.deficient | self.unseen | (smallest < 1e-7 * largest)

    def solve(self, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Report]:
        """Solve K (r, y) = (b, c) in the scaled unknowns."""
        system, failed = self.system, self.failed
        limited = self.unseen.expand(-1, b.shape[2])
        # Where nothing can be certified nothing is iterated: a zero right-hand side ends at once.
        b, c = (torch.where(failed[:, None], 0.0, tensor) for tensor in (b, c))
        first = True

        def correct(b: Tensor, c: Tensor) -> Run:
            nonlocal first, limited
            run = self._run(b, c, self.target if first else _CONTRACTION)
            ran_out = run.iterations >= self.settings.max_iterations
            # Other columns than those that were asked about are samples of rounding errors.
            limited = limited | (ran_out if ran_out.shape == limited.shape else ran_out.any(1, keepdim=True))
            first = False
            return run

        refined = refine(
            system,
            b,
            c,
            correct,
            largest=self.largest,
            smallest=self.smallest,
            contraction=_CONTRACTION,
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
        )
        return refined.r, refined.y, answer

    def _verdict(self) -> Tensor:
        """Why a matrix failed, before any right-hand side was seen."""
        return torch.where(self.deficient, RANK_DEFICIENT, torch.where(self.unseen, ITERATION_LIMIT, INACCURATE))

    def _precondition(self, g: Tensor) -> Tensor:
        return g / self.system.norms.square()

    def _run(self, b: Tensor, c: Tensor, tolerance: float) -> Run:
        system = self.system
        # Relative to x, not to y, which may be far larger in other columns: |W e| <= |e| for the weights W <= 1. The
        # norms N of the columns, which gamma knows of, are at least 1/2: |e| <= 2 |N e| <= 2 gradient / sigma_min^2.
        limit, size = tolerance / 2 * self.smallest.square(), norm(c / system.norms)

        def converged(r: Tensor, y: Tensor, g: Tensor, gamma: Tensor) -> Tensor:
            gradient = gamma.sqrt()
            rounding = 10 * EPS * (self.largest * norm(r) + size)
            return (gradient <= limit * norm(system.weight * y)) | (gradient <= rounding)

        settings = self.settings
        return cgls(
            system, b, c, self._precondition, converged, limit=settings.max_iterations, callback=settings.callback
        )
