"""Iterative refinement on the augmented system, and the estimate of the forward error that it ends with.

    f_1 = b - T r - A y,    f_2 = c - A^H W r + d^2 y    residuals, in double precision or in about twice that
    K (e_r, e_y) = (f_1, f_2)                            by a factor, or by conjugate gradients, to some digits
    r += e_r,    y += e_y                                until corrections are small, or shrink no more

Refinement of both r and y is what makes an answer that rests on a Cholesky factor of A^H A as accurate as one from a
backward stable method (Björck, BIT 7, 1967; Numerical Methods for Least Squares Problems, SIAM 1996, sections 2.9 and
6.6). With residuals in twice double precision, and r and y carried in it, errors are of the size of rounding y itself
(Demmel, Hida, Riedy, Li, ACM TOMS 35(4), 2009). What the last correction still moves is an estimate of the error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..sparse.base import norm
from ..sparse.double_double import EPS_EXTENDED, Pair, Single
from ..sparse.numerics import noise
from .conjugate_gradients import Run
from .system import EPS, System

# In units of the largest solution that data of this size have.
_NOTHING = 2.0**-200  # what `strict` takes for zero: constraints alone may make x as small as this beside b
_ANYTHING = 1e300  # larger than any solution: everything is taken for zero
_FURTHER = 64  # corrections in extended precision are to be so many times smaller than in double precision
_TINY = torch.finfo(torch.float64).tiny
Number = TypeVar("Number", Single, Pair)


Correct = Callable[[Tensor | None, Tensor], Run]


class Errors(NamedTuple):
    """Norms (P, k) of solutions, corrections or errors: of W^(1/2) r, of y = D x, and of x in units of min D^-1."""

    r: Tensor
    y: Tensor
    x: Tensor

    def plus(self, other: Errors) -> Errors:
        """For what may add up."""
        return Errors(*map(torch.add, self, other))

    def at(self, columns: Tensor) -> Errors:
        """Of some of the columns."""
        return Errors(self.r[:, columns], self.y[:, columns], self.x[:, columns])

    def where(self, condition: Tensor, other: Errors) -> Errors:
        """These where `condition` (P, k) holds, else the others."""
        return Errors(*[torch.where(condition, one, two) for one, two in zip(self, other, strict=True)])


class Refined(NamedTuple):
    """A solution of the scaled system, the estimate of its absolute errors, and the iterations spent (P, k)."""

    r: Tensor
    y: Tensor
    errors: Errors
    iterations: Tensor


class Measure:
    """Relative errors of solutions to one pair of right-hand sides.

    An error is measured against the solution. Where that is zero but for rounding (b orthogonal to the range, the
    residual of a consistent system, a cotangent without effect) the noise around it would be an error of 100 %. So a
    solution smaller than `accept` times the largest that data of this size have is measured against that size, and y
    in the place of x, whose columns may have any scale. `accept` = None, where nothing is judged, takes every solution
    for zero; `strict` none, for solutions that constraints (T < 1) make small beside b.
    """

    def __init__(
        self, system: System, b: Tensor, c: Tensor, largest: Tensor, accept: float | None, *, strict: bool = False
    ):
        self.system = system
        self.of_b, self.of_c = system.row_norm(b), norm(c)
        share = _ANYTHING if accept is None else accept
        self.least_r = (share * (self.of_b + self.of_c / largest)).clamp_min(_TINY)
        # |A^H b| <= |A| |b|, and beside a large damping |A| is far smaller than `largest`, which is that of [A; d].
        self.least_y = share * (self.of_b * (system.size / largest).clamp(max=1) + self.of_c / largest) / largest
        if strict:
            self.least_y = self.least_y * _NOTHING

    def sizes(self, r: Tensor, y: Tensor) -> Errors:
        """Of a solution or of a correction to it."""
        system = self.system
        return Errors(system.row_norm(r), norm(y), norm(system.weight * y))

    @staticmethod
    def finite(errors: Errors) -> Tensor:
        return errors.r.isfinite() & errors.y.isfinite()

    def relative(self, errors: Errors, whole: Errors) -> Tensor:
        """The larger of the relative errors of r and x."""
        of_r = errors.r / torch.maximum(whole.r, self.least_r)
        of_zero = torch.where(whole.y > self.least_y, torch.inf, ratio(errors.y, self.least_y))
        return torch.maximum(of_r, torch.minimum(ratio(errors.x, whole.x), of_zero))


def refine(
    system: System,
    b: Tensor,
    c: Tensor,
    correct: Correct,
    *,
    largest: Tensor,
    smallest: Tensor,
    contraction: float,
    target: float,
    bound: float,
    accept: float | None,
    consistent: bool = False,
    strict: bool = False,
) -> Refined:
    """Solve K (r, y) = (b, c) by corrections until they reach `target` or stop shrinking, each column on its own.

    Columns in which rounding makes larger errors than `bound` (all of them on request) go on in extended precision.

    Args:
        correct: f -> an approximate solution of K e = f, right to some digits.
        largest, smallest: extreme singular values (P, 1).
        contraction: what `correct` may leave, as a fraction of the e it is to find.
        target: size of a correction, relative to what it corrects, that is small enough.
        bound: rounding errors, relative, that are small enough. Where a bound on them is larger, two solves more give a
            sharper estimate: the larger of two samples.
        accept: the largest relative error of a solution that is given; None for any, which is not made more accurate
            than it comes.
        consistent: `correct` gives r = b - A y but for rounding, so that f_1 = 0; it is given None for that.
        strict: of `Measure`.
    """
    if system.weights is not None:
        correct = _unweighed(system, correct)
    measure = Measure(system, b, c, largest, accept, strict=strict)
    run = correct(b, c)

    def residuals(r: Single, y: Single) -> tuple[Tensor | None, Tensor]:
        if consistent:
            return None, -system.gradient(system.weigh(r.high), y.high, c)
        return system.residuals(b, c, r.high, y.high)

    # A weak direction keeps eps cond^2 of its error, whatever the corrections.
    slowest = (10 * EPS * (largest / smallest).square()).clamp(min=contraction)
    first, second, moves, iterations = _iterate(
        measure, Single(run.r), Single(run.y), residuals, correct,
        target, slowest, run.iterations, first_is_all=True,
    )  # fmt: skip
    r, y = first.high, second.high
    whole = measure.sizes(r, y)
    rounding = _bound(system, measure, whole, y, largest, smallest)
    poor = measure.relative(rounding, whole) > bound
    if accept is None:
        poor = torch.zeros_like(poor)
    if bool(poor.any()):
        sampled = correct(*system.rounding(b, c, r, y))
        rounding = Errors(*[s.unflatten(1, (2, -1)).amax(1) for s in measure.sizes(sampled.r, sampled.y)])
        poor = measure.relative(rounding, whole) > bound
    plain = Refined(r, y, moves.plus(rounding), iterations)
    wanted = torch.ones_like(poor) if system.extended else poor & system.exact
    if not bool(wanted.any()):
        return plain
    which = wanted.any(0).nonzero()[:, 0]
    b, c = b[:, :, which], c[:, :, which]
    measure = Measure(system, b, c, largest, accept, strict=strict)
    start = Pair.of(r[:, :, which]), Pair.of(y[:, :, which])
    r_pair, y_pair, moves, spent = _iterate(
        measure, *start, lambda r, y: system.exact_residuals(b, c, r, y), correct,
        target / _FURTHER, slowest, torch.zeros_like(iterations[:, which]), first_is_all=False,
    )  # fmt: skip
    # In extended precision rounding is smaller by as much, unless the values of A carry rounding errors themselves.
    share = EPS_EXTENDED / EPS if system.exact else 1.0
    left = Errors(*[size * share for size in rounding.at(which)])
    left = _with_cut_off(measure, r_pair.high, y_pair.high, left, correct, largest, smallest)
    return _merged(plain, which, r_pair, y_pair, moves.plus(left), spent, measure)


def _merged(plain: Refined, which: Tensor, r: Pair, y: Pair, found: Errors, spent: Tensor, measure: Measure) -> Refined:
    """`plain`, with its columns `which` replaced by r and y of the errors `found`, where these are more accurate."""
    moved = measure.sizes(r.high - plain.r[:, :, which], y.high - plain.y[:, :, which])
    # An old solution is at least as wrong as it is far from the new one, but for the errors of that.
    least = Errors(*[far - new for far, new in zip(moved, found, strict=True)])
    old = Errors(*map(torch.fmax, plain.errors.at(which), least))
    whole = measure.sizes(r.high, y.high)
    better = ~(measure.relative(found, whole) > measure.relative(old, whole)) & Measure.finite(found)
    merged = Refined(
        plain.r.clone(), plain.y.clone(), Errors(*[size.clone() for size in plain.errors]), plain.iterations.clone()
    )
    merged.r[:, :, which] = torch.where(better[:, None], r.value, merged.r[:, :, which])
    merged.y[:, :, which] = torch.where(better[:, None], y.value, merged.y[:, :, which])
    for size, new in zip(merged.errors, found.where(better, old), strict=True):
        size[:, which] = new
    merged.iterations[:, which] += spent
    return merged


def _unweighed(system: System, correct: Correct) -> Correct:
    """Solves for f_1 and e_r of the system with weights, by `correct` for W^(1/2) f_1 and W^(1/2) A.

    e_r = f_1 - A e_y is computed anew where a weight is small: of a row without weight W^(1/2) e_r tells nothing of it.
    """

    def corrected(b: Tensor | None, c: Tensor) -> Run:
        run = correct(None if b is None else system.weigh(b), c)
        if system.even:
            return run._replace(r=run.r.div_(system.root[:, :, None]))
        reached = system.plain.matmul(run.y)
        return run._replace(r=reached.neg_() if b is None else torch.sub(b, reached, out=reached))

    return corrected


def _iterate(
    measure: Measure,
    r: Number,
    y: Number,
    residuals: Callable[[Number, Number], tuple[Tensor | None, Tensor]],
    correct: Correct,
    target: float,
    slowest: Tensor,
    iterations: Tensor,
    *,
    first_is_all: bool,
    limit: int = 30,
) -> tuple[Number, Number, Errors, Tensor]:
    """(r, y, errors but for rounding, iterations): corrected until corrections are small, or do not shrink.

    Corrections that shrink by a factor of q (`rate`) leave an error of q / (1 - q) times the last one.

    Args:
        first_is_all: r and y are the first correction, of zero.
    """
    unknown = torch.full_like(iterations, torch.inf)
    errors = previous = Errors(unknown, unknown, unknown)
    active = torch.ones_like(iterations, dtype=torch.bool)
    for step in range(limit):
        moved = correct(*residuals(r, y))
        iterations = iterations + torch.where(active, moved.iterations, 0)
        moves = measure.sizes(moved.r, moved.y)
        next_r, next_y = r.plus(moved.r), y.plus(moved.y)
        # The first solution may be far too large, so the last two corrections are held against the same new size.
        whole = measure.sizes(next_r.high, next_y.high)
        relative = measure.relative(moves, whole)
        if step:
            rate = relative / measure.relative(previous, whole)
        else:
            rate = measure.relative(moves, measure.sizes(r.high, y.high)) if first_is_all else torch.ones_like(relative)
        # The first correction with exact residuals takes away the errors that plain ones left, and makes rounding
        # errors in proportion to them. The second takes these away, and may be as large as the first, or larger where
        # rounding had hidden a direction. From then on a correction that does not shrink is the last.
        # Where eps cond^2 is above 1, the residuals that these leave may be what hides a direction, so that a third is
        # taken however small the second was.
        third = (slowest >= 1) & (step == 2 and not first_is_all)
        early = third | (step == 1 and not first_is_all)
        shrinks = (rate < 1) | (relative == 0) | (early & (relative < 1))
        better = active & (shrinks if step else torch.isfinite(relative))
        r, y = next_r.where(better[:, None], r), next_y.where(better[:, None], y)
        left = torch.where(better, torch.maximum(10 * rate, slowest).clamp(max=1), 1.0)
        errors = Errors(*[left * move for move in moves]).where(active, errors)
        unsure = (slowest >= 1) & (step == 1 and not first_is_all)
        active = better & ((left * relative > target) | unsure) & ((rate < 0.25) | (step == 0) | early)
        previous = moves.where(better, previous)
        if not bool(active.any()):
            break
    return r, y, errors, iterations


def _bound(system: System, measure: Measure, whole: Errors, y: Tensor, largest: Tensor, smallest: Tensor) -> Errors:
    """What rounding errors (f_1, f_2) in the residuals of a solution of the sizes `whole` can do.

    |e_y| <= |f_1| / sigma + |f_2| / sigma^2,  |e_r| <= |f_1| + |f_2| / sigma
    """
    sigma = smallest / 2  # which is estimated, and rather too large
    first = 2 * system.A.unit * (measure.of_b + whole.r + largest * whole.y)
    second = 2 * system.A.unit * (measure.of_c + largest * whole.r)
    if system.d2 is not None:
        second = second + 2 * EPS * norm(system.d2 * y)
    shift = first / sigma * (system.size / sigma).clamp(max=1) + second / sigma.square()
    return Errors(first + second / sigma, shift, shift)  # |e_x| <= |e_y| in units of min D^-1


def _with_cut_off(
    measure: Measure, r: Tensor, y: Tensor, left: Errors, correct: Correct, largest: Tensor, smallest: Tensor
) -> Errors:
    """The errors `left`, or larger ones where the exact products cut off what x is made of.

    Their slices of r and y end 2^-100 below the largest entry of a column. Where columns of A have very different
    scales, entries of y as small as that may be the large ones of x = D^-1 y.
    """
    whole = measure.sizes(r, y)
    bound = EPS_EXTENDED * (largest / smallest) * (whole.y + whole.r / smallest)
    if not bool((bound > 1e-3 * EPS * whole.x).any()):
        return left
    first, second = (EPS_EXTENDED * size[:, None].expand_as(part) for part, size in ((r, whole.y), (y, whole.r)))
    sampled = correct((first * noise(first)).to(r.dtype), (second * noise(second)).to(y.dtype))
    return Errors(*map(torch.fmax, left, measure.sizes(sampled.r, sampled.y)))


def ratio(size: Tensor, whole: Tensor) -> Tensor:
    """size / whole, where both may be zero."""
    return size / whole.clamp_min(_TINY)  # 0 / 0 is 0, and NaN stays NaN, which nothing accepts
