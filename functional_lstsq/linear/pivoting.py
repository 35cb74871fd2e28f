"""The systems of bounded problems with some unknowns at their bounds, and what each says of the minimum.

    min |W^(1/2) (b - A x)|^2 + |D x|^2     l <= x <= u

With x_j pinned at a bound for j outside of the free set F, the rest is a solve with an infinite damping on these, after
the shift by the bounds. x is the minimum where no free unknown is outside its bounds, and where the multiplier
g = A^T W r - D^2 x of a pinned one pushes against its bound: g_j <= 0 at l_j, g_j >= 0 at u_j. Both are read here with
the errors that the solve claims, so that three things may be said of each unknown: yes, no, and too near to tell.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import RankDeficientError
from ..result import CONVERGED, INACCURATE, RANK_DEFICIENT, ZERO, Report
from ..solvers.system import EPS
from ..sparse.double_double import Pair, two_sum
from ..sparse.exact_products import ExactProducts
from ..sparse.numerics import ldexp
from ..sparse.pattern import find_pattern
from ..sparse.plain_products import Operator
from .gradient import Static

BY_DAMPING = 2  # the mark of an unknown that an infinite damping pins at zero; -1 and 1 are the bounds, 0 is free


class Bounded(NamedTuple):
    """P bounded problems on one pattern; weights are None, or (P, m); the last four are of all."""

    values: Tensor
    weights: Tensor | None
    damp: Tensor
    b: Tensor
    lower: Tensor
    upper: Tensor
    indices: Tensor
    static: Static

    @property
    def m(self) -> int:
        """How many rows there are in all places."""
        return self.static.height

    @property
    def n(self) -> int:
        return self.static.n

    def largest(self, t: Tensor) -> Tensor:
        """The largest (P, 1) of numbers (P, m)."""
        return self.static.largest(t)

    def take(self, which: Tensor) -> Bounded:
        """The problems of these numbers, in this order, as often as they are named."""
        tensors = (None if t is None else t[which] for t in self[:6])
        return Bounded(*tensors, self.indices, self.static)  # type: ignore[call-arg,arg-type]

    def attempt(self, active: Tensor) -> Tried:
        """Solve with the unknowns pinned that are not 0 in `active` (P, n)."""
        return attempt(self, active)

    def scaled(self) -> tuple[Bounded, Tensor]:
        """(this in the unknowns 2^e x, e (P, n)), whose columns have norms of about 1, weights included.

        Errors of x are known in its norm; in these units one unknown does not hide another.
        """
        static, indices = self.static, self.indices
        weights = self.values.new_ones((len(self.values), static.m)) if self.weights is None else self.weights
        largest = self.largest(torch.where(weights.isinf(), 0.0, weights))
        weights = (weights / torch.where(largest > 0, largest, 1.0)).clamp(max=1.0)
        norms = static.multiply(self.values.square(), weights[:, :, None], indices, adjoint=True)[:, :, 0].sqrt()
        usual = norms.isfinite() & (norms > 0)
        e = torch.where(usual, torch.frexp(torch.where(usual, norms, 1.0)).exponent, 0)
        of_entries = e.gather(1, indices[1].expand(len(e), -1))
        values, damp = ldexp(self.values, -of_entries), ldexp(self.damp, -e)
        return self._replace(values=values, damp=damp, lower=ldexp(self.lower, e), upper=ldexp(self.upper, e)), e


class Problems(Protocol):
    """What the search for an active set asks of P bounded problems, whoever solves them; tensors as of `Bounded`."""

    @property
    def weights(self) -> Tensor | None: ...

    @property
    def damp(self) -> Tensor: ...

    @property
    def b(self) -> Tensor: ...

    @property
    def lower(self) -> Tensor: ...

    @property
    def upper(self) -> Tensor: ...

    @property
    def m(self) -> int: ...

    @property
    def n(self) -> int: ...

    def largest(self, t: Tensor) -> Tensor: ...

    def take(self, which: Tensor) -> Problems: ...

    def attempt(self, active: Tensor) -> Tried: ...


def shaken(
    static: Static, values: Tensor, weights: Tensor | None, moved: Tensor, free: Tensor, indices: Tensor
) -> Tensor:
    """How far (P,) the `free` unknowns may be from their minimum where some are moved (P, n), but for a factor.

    In columns of norm 1 the others follow by as much times the condition number of these.
    """
    weights = (
        values.new_ones((len(values), static.m)) if weights is None else torch.where(weights.isinf(), 0.0, weights)
    )
    norms = static.multiply(values.square(), weights[:, :, None], indices, adjoint=True)[:, :, 0].sqrt()
    smallest = torch.where(free & (norms > 0), norms, torch.inf).amin(1)
    return torch.linalg.vector_norm(norms * moved, dim=1) / smallest


class Tried(NamedTuple):
    """A solve with some unknowns pinned, (P, n) each; `deficient` is (P,)."""

    x: Tensor
    multipliers: Tensor
    error: Tensor  # of x
    error_of_multipliers: Tensor
    deficient: Tensor


def check_order(lower: Tensor, upper: Tensor) -> None:
    """Refuse bounds (P, n) between which there is no number, NaN among them."""
    wrong = ~(lower <= upper) | (lower == torch.inf) | (upper == -torch.inf)
    if bool(wrong.any()):
        p, j = (int(i) for i in wrong.nonzero()[0])
        least, most = float(lower[p, j]), float(upper[p, j])
        raise ValueError(f"bounds must be lower <= upper, with a number between, got {least:g} and {most:g} at {j}")


def at_bounds(active: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """x (P, n) where it is pinned, zero elsewhere."""
    zero = torch.zeros_like(lower)
    return torch.where(active == -1, lower, torch.where(active == 1, upper, zero))


def left_of_shift(values: Tensor, x: Tensor, b: Tensor, shifted: Tensor, indices: Tensor, m: int, n: int) -> Tensor:
    """b - A x - shifted (P, m, 1), which is what rounding has left out of the shifted right-hand side."""
    if not bool((x != 0).any()) or not indices.shape[1]:
        return b - shifted
    operator = Operator(find_pattern(indices, m, n), values)
    of_A, of_x = (torch.frexp(t.abs().amax()).exponent for t in (values, x))
    scaled = Operator(operator.pattern, ldexp(values, -of_A))
    high, low = (ldexp(t, of_A + of_x) for t in ExactProducts(scaled, adjoint=False)(Pair.of(ldexp(x, -of_x))))
    # b - shifted need not be a number, so that it is a pair as well.
    difference, rest = two_sum(b, -shifted)
    whole, more = two_sum(difference, -high)
    return whole + (more + (rest - low))


def attempt(problems: Bounded, active: Tensor) -> Tried:
    """Solve with the unknowns pinned that are not 0 in `active` (P, n)."""
    try:
        return _attempt(problems, active)
    except RankDeficientError:
        # Constraints without a free unknown, or with too few, are refused for a whole batch: find which they are of.
        size = len(active)
        if size > 1:
            halves = torch.arange(size, device=active.device).split((size + 1) // 2)
            parts = [attempt(problems.take(half), active[half]) for half in halves]
            return Tried(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
        nothing = torch.full_like(problems.lower, torch.nan)
        return Tried(*(nothing,) * 4, torch.ones(1, dtype=torch.bool, device=active.device))


def _attempt(problems: Bounded, active: Tensor) -> Tried:
    values, weights, damp, b, lower, upper, indices, static = problems
    bound = at_bounds(active, lower, upper)[:, :, None]
    right = b
    if bool((bound != 0).any()):
        right = b - static.multiply(values, bound, indices, exact=True)
        right = torch.cat([right, left_of_shift(values, bound, b, right, indices, static.m, static.n)], 2)
    pinned = torch.where(active != 0, torch.inf, damp)
    tensors = [values, weights, pinned, right, None, None, None]
    r, s, x, numbers, _ = replace(static, on_failure="return").solve(tensors, None, indices)
    report, s = Report(*numbers.unbind(1)), r if weights is None else s
    sizes = torch.linalg.vector_norm(x, dim=1), static.norm(s)
    # The rounding of results to the user's precision is no error of these, which are in double precision. What is zero
    # but for rounding is as large as its error.
    of_x = (report.solution_error - report.rounding).clamp_min(0) + EPS
    of_x = torch.where(report.status == ZERO, 2.0, of_x)
    of_s = (report.weighted_error - report.rounding).clamp_min(0) + EPS
    errors = [
        torch.where(size > 0, of * size, 0.0).nan_to_num(nan=torch.inf).sum(1, keepdim=True)
        for of, size in zip((of_x, of_s), sizes, strict=True)
    ]
    x, s = x.sum(2) + bound[:, :, 0], s.sum(2)[:, :, None]
    finite = torch.where(damp.isinf(), 0.0, damp).square()
    columns = static.multiply(values.square(), torch.ones_like(s), indices, adjoint=True)[:, :, 0].sqrt()
    terms = static.multiply(values.abs(), s.abs(), indices, adjoint=True)[:, :, 0] + finite * x.abs()
    count = int(find_pattern(indices, static.m, static.n).T.rows.pointers.diff().max()) if indices.shape[1] else 0
    count = int(static.total(torch.tensor(float(count), device=x.device)))
    of_s = torch.where(columns > 0, columns * errors[1], 0.0)
    g = static.multiply(values, s, indices, adjoint=True)[:, :, 0] - finite * x
    error_of_g = of_s + (count + 2) * EPS * terms
    if bool(((active.abs() == 1) & (g.abs() <= error_of_g)).any()):
        # Sums of terms that cancel; an exact one has the rounding of each term of s, which is not in its norm's error.
        g = static.multiply(values, s, indices, adjoint=True, exact=True)[:, :, 0] - finite * x
        error_of_g = of_s + 2 * EPS * terms
    deficient = (report.status == RANK_DEFICIENT).any(1) | ~(x.isfinite().all(1) & g.isfinite().all(1))
    return Tried(x, g, errors[0] + EPS * x.abs(), error_of_g.nan_to_num(nan=torch.inf), deficient)


class Judged(NamedTuple):
    """What an attempt says of each unknown, (P, n)."""

    below: Tensor  # free, and less than its lower bound by more than its error
    above: Tensor
    touching: Tensor  # free, and at a bound but for its error
    pulled: Tensor  # pinned, with a multiplier that pulls it off its bound by more than its error
    unclear: Tensor  # pinned, with a multiplier that is zero but for its error

    @property
    def wrong(self) -> Tensor:
        return self.below | self.above | self.pulled


def judge(lower: Tensor, upper: Tensor, active: Tensor, tried: Tried) -> Judged:
    """Hold an attempt against the conditions of a minimum."""
    free, held = active == 0, (active.abs() == 1) & (lower < upper)
    x, g, error, of_g, _ = tried
    near = ((x - lower).abs() <= error) | ((x - upper).abs() <= error)
    outward = g * active  # positive where the multiplier pushes against the bound
    return Judged(
        below=free & (lower - x > error),
        above=free & (x - upper > error),
        touching=free & near,
        pulled=held & (-outward > of_g),
        unclear=held & (outward.abs() <= of_g),
    )


def report_of_whole(report: Tensor, y: Tensor, x: Tensor, status: Tensor) -> Tensor:
    """The report of x (k, fields) from those of the parts of y that rounding keeps apart."""
    told = Report(*report.detach().unbind(1))
    sizes, whole = (torch.linalg.vector_norm(t.detach(), dim=1) for t in (y, x))
    error = torch.where(sizes > 0, told.solution_error * sizes, 0.0).sum(1) / whole[:, 0]
    error = torch.where(whole[:, 0] > 0, error, told.solution_error[:, 0])
    worst = torch.maximum(told.status.amax(1), status)
    first = Report(*(field[:, 0] for field in told))
    error = torch.where(status == CONVERGED, error, torch.inf)
    return torch.stack(list(first._replace(status=worst, solution_error=error)), 1)


def farther(numbers: Tensor, far: Tensor, x: Tensor, accept: float) -> Tensor:
    """A report (k, fields) of x with an error that is `far`, times the condition number, larger."""
    told = Report(*numbers.unbind(1))
    more = torch.where(far > 0, told.condition * far / torch.linalg.vector_norm(x.detach()[:, :, 0], dim=1), 0.0)
    error = told.solution_error + more
    status = torch.where((told.status == CONVERGED) & (error > accept), float(INACCURATE), told.status)
    return torch.stack(list(told._replace(solution_error=error, status=status)), 1)
