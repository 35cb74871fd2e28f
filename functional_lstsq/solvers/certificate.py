"""What certifies the answers of conjugate gradients: extreme singular values, from solves whose solutions are known.

    A^H A y = A^H (A y_k)  for a random y_k:    e = y_k - y,  r = A e,  sigma_min <= |r| / |e|,  sigma_max >= |g| / |r|

A small gradient g = A^H r says nothing of directions in which A is weak and which the iteration has not found yet. But
here the errors e are known. So the iteration goes on until y_k is found in every direction, to 1e-3 |y_k| / sqrt(n). By
then |r| / |e| has come close to sigma_min, and |error| <= |gradient| / sigma_min^2 certifies any answer. Two random y_k
go side by side. Norms are those of columns of norm 1: of N y, with the norms N that powers of two have left over.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..result import INACCURATE, ITERATION_LIMIT, RANK_DEFICIENT
from ..sparse.base import COARSE, norm
from ..sparse.column_search import Wanted
from ..sparse.lazy import lazy
from ..sparse.numerics import noise
from .conjugate_gradients import Normal, iterate
from .ritz import condition_met
from .single_precision import SINGLE_CONDITION, SingleSystem
from .system import System
from .watching import is_watched, searching

_SOLVES = 5  # a solve and its adjoint take about so many times the iterations that find the known solutions


class Certificate:
    """The extreme singular values of one system, and whether they could be found.

    Args:
        given: a preconditioner, or None for columns scaled to norm 1.
        limit: iterations of a run.
        patience: iterations for a solve and its derivative above which it gives up, as soon as it expects them.
        known: solutions (P, n, k) to find, random but for what A does not see, where it has no full rank.
    """

    def __init__(
        self,
        system: System,
        given: Callable[[Tensor], Tensor] | None,
        *,
        limit: int,
        patience: float,
        known: Tensor | None = None,
    ):
        self.system, self.given, self.limit, self.patience = system, given, limit, patience
        self.errors: list[float] = []  # of known solutions, relative, after each iteration, if there is a patience
        with searching():
            self._measure(known)

    @property
    def passes_once(self) -> bool:
        """Whether there are products with A^H A."""
        return self.given is None and self.system.A.normal is not None

    @lazy
    def _single(self) -> SingleSystem | None:
        return SingleSystem.of(self.system) if self.given is None else None

    @property
    def _is_fit_for_single(self) -> bool:
        return bool((self.largest < SINGLE_CONDITION * self.smallest).all())

    @property
    def single(self) -> SingleSystem | None:
        """The system in single precision, where iterating with that takes less time and is right to some digits."""
        return self._single if self._is_fit_for_single else None

    def _measure(self, given: Tensor | None) -> None:
        """Solve for a known solution y: r = A (y - y_k), so |r| / |y - y_k| bounds sigma_min from above, for free.

        Singular values are those of the matrix with columns of norm 1: y is measured as N y, with the norms N.
        """
        system = self.system
        # A random vector has less than 1e-3 of its usual part in a given direction with a chance of about 1e-3, so that
        # all are blind to one with a chance of 1e-6: two that are found to 1e-3, or six to 0.1, which is as near as
        # products in single precision may come.
        known = noise(system.scale.expand(-1, -1, 2 if system.A.unit < COARSE else 6)).to(system.A.dtype)
        known = known if given is None else given
        self.whole = norm(system.norms * known)
        self.smallest, self.largest = torch.full_like(self.whole, torch.inf), torch.ones_like(self.whole)
        self.condition = torch.ones_like(self.whole)
        self.iterations, self.unfound = torch.zeros_like(self.whole), torch.zeros_like(self.whole, dtype=torch.bool)
        single = None if self.passes_once else self._single
        if single is not None:
            left = self._find(single, known)
            if self._is_fit_for_single:
                known = left
            else:  # rounding in single precision may have made `smallest` too small, so nothing of it is used
                self._single = single = None
                self.smallest = torch.full_like(self.smallest, torch.inf)
        if single is None or bool(self._missed(known).any()):
            known = self._find(system, known)
        if self.given is not None:
            self._look_for_the_weakest(self.given)
        smallest, largest = self.smallest.amin(1, keepdim=True), self.largest.amax(1, keepdim=True)
        self.smallest, self.largest = smallest, largest
        self.deficient = (smallest <= system.tolerance * largest) & (given is None)
        self.condition = torch.maximum(self.condition.amax(1, keepdim=True), largest / smallest)
        self.iterations = self.iterations.amax(1, keepdim=True)
        self.unseen = ~self.deficient & (self._missed(known) | self.unfound).any(1, keepdim=True)
        # Below sigma_min = 1e-7 sigma_max the rounding errors of A^H A, about 1e-16 sigma_max^2, hide the weakest
        # direction, so nothing can be certified.
        self.failed = self.deficient | self.unseen | (smallest < max(1e-7, system.A.unit**0.5) * largest)

    def _look_for_the_weakest(self, apply: Callable[[Tensor], Tensor]) -> None:
        """Two steps of inverse iteration: a good preconditioner finds known solutions before singular values show.

        A^H A z = v - g with |g| far below |v| / sqrt(n), in the plain norm, misses no direction, whatever the
        preconditioner thinks of it: z is as large in it as v / sigma^2.
        """
        system = self.system
        v = noise(system.scale.expand(-1, -1, 2)).to(system.A.dtype)
        zero = torch.zeros((system.copies, system.m, 2), dtype=v.dtype, device=v.device)
        goal = self._threshold
        for _ in range(2):
            v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
            run = iterate(
                system,
                zero,
                -v,
                apply,
                lambda r, y, g, gamma, live: norm(g) <= goal,
                limit=self.limit,
                drop=False,
            )
            left = norm(system.gradient(-system.A.matmul(run.y), run.y, -v))
            self.unfound = self.unfound | ~(left <= 10 * goal)
            v = torch.where(run.y.isfinite(), run.y, 0.0)
            energy = system.A.norm(system.A.matmul(v)).square()
            if system.d2 is not None:
                energy = energy + norm(system.d2.sqrt() * v).square()
            ratio = torch.where(energy > 0, energy.sqrt() / norm(system.norms * v), torch.inf)
            self.smallest = torch.minimum(self.smallest, ratio)
            self.iterations = self.iterations + run.iterations

    def _missed(self, left: Tensor) -> Tensor:
        return norm(self.system.norms * left) > self._threshold * self.whole

    @property
    def _threshold(self) -> float:
        """A direction that is missing altogether leaves an error of about |y| / sqrt(n)."""
        return (1e-3 if self.system.A.unit < COARSE else 0.1) / self.system.n**0.5

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
                return target.A.norm(r)
            return (target.A.norm(r).square() + norm(target.d2.sqrt() * missing).square()).sqrt()

        at_first = norm(norms * wanted)
        ratio = torch.where(at_first > 0, energy_of(b, wanted) / at_first, torch.inf)
        self.smallest = torch.minimum(self.smallest, ratio.to(torch.float64))
        threshold, errors = self._threshold, []
        first = target.A.adjoint(b) if target.d2 is None else target.A.adjoint(b) + target.d2 * wanted
        gradients, energies = [norm(first / norms)], [energy_of(b, wanted)]
        # In single precision an energy |A e| below this is but rounding. In double precision e may be a null vector,
        # which is to be seen.
        unit, exact = system.A.unit, target is system and system.A.unit < COARSE
        floor = 0.0 if exact else (unit if target is system else 100 * torch.finfo(real).eps) * energy_of(b, wanted)
        # One step may find all of a few unknowns; the ratio of what is left then is one of rounding errors.
        least = max(torch.finfo(real).eps, unit) ** 0.5 * whole if target is system else 0.0

        def note(error: Tensor, energy: Tensor, gradient: Tensor) -> Tensor:
            """Extreme singular values by numbers (..., P, k) of iterations; the gradients that count."""
            seen = ((energy > floor) | exact) & (error > least)
            ratios = torch.where(seen, energy / error, torch.inf).to(torch.float64)
            self.smallest = torch.minimum(self.smallest, ratios.reshape(-1, *self.smallest.shape).amin(0))
            slopes = torch.where(seen & (energy > 0), gradient / energy, 0.0).to(torch.float64)
            self.largest = torch.maximum(self.largest, slopes.reshape(-1, *self.largest.shape).amax(0))
            return torch.where(seen, gradient, 0.0)

        def converged(r: Tensor, y: Tensor, g: Tensor, gamma: Tensor, live: Tensor) -> Tensor:
            missing = wanted - y
            error, energy = norm(norms * missing), energy_of(r, missing)
            gradients.append(note(error, energy, gamma.sqrt() if self.given is None else norm(g / norms)))
            energies.append(energy)
            found = error <= threshold * whole
            if target is not system and bool((self.largest > SINGLE_CONDITION * self.smallest).any()):
                return torch.ones_like(found)
            errors.append(float((error / whole).max()) if self.patience < float("inf") else 0.0)
            self.errors.append(errors[-1])
            if self._hopeless(errors, threshold):
                return torch.ones_like(found)
            # One column that proves a dependence ends the search for this matrix.
            smallest, largest = self.smallest.amin(1, keepdim=True), self.largest.amax(1, keepdim=True)
            return found | (energy <= floor) | (smallest <= system.tolerance * largest)

        run = None
        if self.given is None and not is_watched():
            columns = self.smallest, threshold * whole, floor, -1.0 if exact else floor, least
            numbers = [torch.as_tensor(number, device=b.device).expand_as(whole)[0].double() for number in columns]
            rules = [*numbers[1:], torch.full_like(numbers[0], system.tolerance)]
            rules.append(torch.full_like(numbers[0], math.inf if target is system else SINGLE_CONDITION))
            extremes = torch.stack([numbers[0], self.largest[0]], 1)
            sought = Wanted(
                wanted, b, c, first, inverse, norms, target.d2, extremes, torch.stack(rules, 1), self.patience, _SOLVES
            )
            run = target.A.search(sought, self.limit)
            if run is not None and len(run.errors):  # none where no gradient says anything, as of a matrix of zeros
                noted = [part.to(real) for part in (run.errors, run.energies, run.gradients)]
                gradients += note(*noted)
                energies += noted[1].nan_to_num(0.0)
                self.errors += (noted[0] / whole).nan_to_num(0.0).amax((1, 2)).tolist()
        if run is None:
            run = iterate(
                target,
                b,
                c,
                self.given or (lambda g: g * inverse),
                converged,
                limit=self.limit,
                drop=False,
            )
        self.iterations = self.iterations + run.iterations
        if self.given is None:
            self.condition = torch.maximum(self.condition, condition_met(gradients, energies, run.iterations))
        return known - run.y.to(known.dtype) * size

    def _hopeless(self, errors: list[float], threshold: float) -> bool:
        """Whether the errors so far promise more iterations than there is patience for."""
        if self.patience == float("inf") or len(errors) < 24 or min(errors[-1], errors[-9]) <= threshold:
            return False
        return _SOLVES * _extrapolated(errors, threshold) > self.patience

    @property
    def expected(self) -> float:
        """About how many iterations find the known solutions, by the errors of those that there were."""
        if not bool(self.unseen.any()):
            return float(self.iterations.max())
        return _extrapolated(self.errors, self._threshold) if len(self.errors) > 8 else math.inf

    def verdict(self) -> Tensor:
        """Why a matrix failed, before any right-hand side was seen."""
        given_up = self.patience < float("inf")
        ran_out = self.unseen & ((self.iterations >= self.limit) | given_up)
        return torch.where(self.deficient, RANK_DEFICIENT, torch.where(ran_out, ITERATION_LIMIT, INACCURATE))


def _extrapolated(errors: list[float], threshold: float) -> float:
    """After how many iterations an error falls to the threshold, if it goes on as in the last eight."""
    if not 0 < errors[-1] < errors[-9]:
        return math.inf
    rate = math.log(errors[-9] / errors[-1]) / 8
    return len(errors) + math.log(errors[-1] / threshold) / rate
