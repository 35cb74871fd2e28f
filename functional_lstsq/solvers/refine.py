"""Iterative refinement on the augmented system, and the estimate of the forward error that decides acceptance.

Refinement in fixed precision of both r and x is what makes an answer that rests on a Cholesky factor of A^H A as
accurate as one from a backward stable method (Björck, BIT 7, 1967; Numerical Methods for Least Squares Problems, SIAM
1996, sections 2.9 and 6.6). What the last correction still moves is an estimate of the error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..result import CONVERGED, INACCURATE, ITERATION_LIMIT, Report
from .conjugate import Run
from .extended import EPS_EXTENDED, Pair, Single
from .numerics import noise
from .system import EPS, System, norm

_TINY = torch.finfo(torch.float64).tiny
Number = TypeVar("Number", Single, Pair)


class Errors(NamedTuple):
    """Sizes of something in r, in y = D x, and (in units of the smallest scale) in x; each (P, k)."""

    r: Tensor
    y: Tensor
    x: Tensor

    def plus(self, other: Errors) -> Errors:
        return Errors(*map(torch.add, self, other))


class Refined(NamedTuple):
    """A solution of the scaled system, the estimate of its absolute errors, and the iterations spent (P, k)."""

    r: Tensor
    y: Tensor
    errors: Errors
    iterations: Tensor


class Measure:
    """Relative errors of solutions to one pair of right-hand sides.

    A solution is measured against itself. Where it is zero but for rounding (b orthogonal to the range, the residual of
    a consistent system, a cotangent without effect) noise around it is no error, so below `accept` times the largest
    solution that data of this size have, it is measured against that: y then stands for x, whose columns may have any
    scale.
    """

    def __init__(self, system: System, b: Tensor, c: Tensor, largest: Tensor):
        self.weight, self.weigh = system.weight, system.weigh
        of_b, of_c = norm(system.weigh(b)), norm(c) / largest
        self.least_r = system.accept * (of_b + of_c)
        # Beside a large damping A, which b goes through, is far smaller than [A; d].
        self.least_y = system.accept * (of_b * (system.size / largest).clamp(max=1) + of_c) / largest

    def sizes(self, r: Tensor, y: Tensor) -> Errors:
        """Of a solution or of a correction to it."""
        return Errors(norm(self.weigh(r)), norm(y), norm(self.weight * y))

    @staticmethod
    def finite(errors: Errors) -> Tensor:
        return errors.r.isfinite() & errors.y.isfinite()

    def relative(self, errors: Errors, whole: Errors) -> Tensor:
        """The larger of the relative errors of r and x."""
        of_r = _ratio(errors.r, torch.maximum(whole.r, self.least_r))
        of_zero = torch.where(whole.y > self.least_y, torch.inf, _ratio(errors.y, self.least_y))
        return torch.maximum(of_r, torch.minimum(_ratio(errors.x, whole.x), of_zero))


def refine(
    system: System,
    b: Tensor,
    c: Tensor,
    correct: Callable[[Tensor | None, Tensor], Run],
    *,
    largest: Tensor,
    smallest: Tensor,
    contraction: float,
    target: float,
    bound: float,
    consistent: bool = False,
) -> Refined:
    """Solve K (r, y) = (b, c) by corrections until they reach `target` or stop shrinking, each column on its own.

    Columns in which rounding makes larger errors than `bound` (all of them on request) go on with residuals in twice
    the working precision, r and y carried in it (Demmel, Hida, Riedy, Li, ACM TOMS 35(4), 2009).

    Args:
        correct: an approximate solution of K d = f, right to some digits.
        largest, smallest: extreme singular values (P, 1).
        contraction: what `correct` may leave, as a fraction of the d it is to find.
        target: size of a correction, relative to what it corrects, that is small enough.
        consistent: `correct` gives r = b - A y but for rounding, so that the first equation is owed no correction; it
            takes None for a b of zeros then.
        bound: rounding errors, relative, that are small enough. Where a bound on them is larger, two solves more give a
            sharper estimate: the larger of two samples.
    """
    if system.weights is not None:
        correct = _unweighed(system, correct)
    measure = Measure(system, b, c, largest)
    run = correct(b, c)

    def residuals(r: Single, y: Single) -> tuple[Tensor | None, Tensor]:
        if consistent:
            return None, -system.gradient(system.weigh(r.high), y.high, c)
        return system.residuals(b, c, r.high, y.high)

    # No correction leaves less of a weak direction.
    slowest = (10 * EPS * (largest / smallest).square()).clamp(min=contraction)
    first, second, moves, iterations = _iterate(
        measure, Single(run.r), Single(run.y), residuals, correct,
        target, slowest, run.iterations, first_is_all=True,
    )  # fmt: skip
    r, y = first.high, second.high
    rounding = _bound(system, b, c, r, y, largest, smallest)
    bound = bound if system.accept < 1 else torch.inf
    if bool((measure.relative(rounding, measure.sizes(r, y)) > bound).any()):
        blurred = correct(*system.rounding(b, c, r, y))
        samples = (size.unflatten(1, (2, -1)).amax(1) for size in measure.sizes(blurred.r, blurred.y))
        rounding = Errors(*samples)
    errors = moves.plus(rounding)
    poor = measure.relative(rounding, measure.sizes(r, y)) > bound
    wanted = torch.ones_like(poor) if system.extended else poor & system.exact
    if not bool(wanted.any()):
        return Refined(r, y, errors, iterations)
    which = wanted.any(0).nonzero()[:, 0]
    b, c, start = b[:, :, which], c[:, :, which], (Pair.of(r[:, :, which]), Pair.of(y[:, :, which]))
    r_exact, y_exact, moves, spent = _iterate(
        Measure(system, b, c, largest), *start, lambda r, y: system.exact_residuals(b, c, r, y), correct,
        target / 64, slowest, torch.zeros_like(iterations[:, which]), first_is_all=False,
    )  # fmt: skip
    left = Errors(*(size[:, which] * (EPS_EXTENDED / EPS if system.exact else 1) for size in rounding))
    left = _sliced(system, r_exact.high, y_exact.high, left, correct, largest, smallest)
    found = moves.plus(left)
    measure = Measure(system, b, c, largest)
    # What was there is at least as wrong as it is far from what came out now, but for the errors of that.
    apart = measure.sizes(r_exact.high - r[:, :, which], y_exact.high - y[:, :, which])
    seen = (torch.fmax(size[:, which], far - new) for size, far, new in zip(errors, apart, found, strict=True))
    old = Errors(*seen)
    # Where extended precision does not get anywhere, it stays.
    whole = measure.sizes(r_exact.high, y_exact.high)
    better = ~(measure.relative(found, whole) > measure.relative(old, whole)) & Measure.finite(found)
    r, y, iterations = r.clone(), y.clone(), iterations.clone()
    r[:, :, which] = torch.where(better[:, None], r_exact.value, r[:, :, which])
    y[:, :, which] = torch.where(better[:, None], y_exact.value, y[:, :, which])
    iterations[:, which] += spent
    merged = [size.clone() for size in errors]
    for size, new, before in zip(merged, found, old, strict=True):
        size[:, which] = torch.where(better, new, before)
    return Refined(r, y, Errors(*merged), iterations)


def _unweighed(
    system: System, correct: Callable[[Tensor | None, Tensor], Run]
) -> Callable[[Tensor | None, Tensor], Run]:
    """`correct` for right-hand sides and solutions r of the system with weights, by one for those that are weighed."""

    def corrected(b: Tensor | None, c: Tensor) -> Run:
        run = correct(None if b is None else system.weigh(b), c)
        reached = system.plain.matmul(run.y)
        return run._replace(r=reached.neg_() if b is None else torch.sub(b, reached, out=reached))

    return corrected


def _iterate(
    measure: Measure,
    r: Number,
    y: Number,
    residuals: Callable[[Number, Number], tuple[Tensor | None, Tensor]],
    correct: Callable[[Tensor | None, Tensor], Run],
    target: float,
    slowest: Tensor,
    iterations: Tensor,
    *,
    first_is_all: bool,
    limit: int = 30,
) -> tuple[Number, Number, Errors, Tensor]:
    """Corrections until they are small or do not shrink; with an estimate of what is left, but for rounding.

    Corrections that shrink by a factor of q leave an error of q / (1 - q) of the last one. `first_is_all`: what is
    there came from one correction of zero, whose size is that of the solution itself.
    """
    unknown = torch.full_like(iterations, torch.inf)
    errors = previous = Errors(unknown, unknown, unknown)
    active = torch.ones_like(iterations, dtype=torch.bool)
    for step in range(limit):
        moved = correct(*residuals(r, y))
        iterations = iterations + torch.where(active, moved.iterations, 0)
        moves, before = measure.sizes(moved.r, moved.y), measure.sizes(r.high, y.high)
        next_r, next_y = r.plus(moved.r), y.plus(moved.y)
        # A first solution may be far too large, so corrections are held against one and the same size.
        whole = measure.sizes(next_r.high, next_y.high)
        relative = measure.relative(moves, whole)
        if step:
            rate = relative / measure.relative(previous, whole)
        else:
            rate = measure.relative(moves, before) if first_is_all else torch.ones_like(relative)
        # The first correction with exact residuals meets the errors that plain ones left, and rounds in proportion: the
        # second may be as large, or larger where plain ones had hidden a direction. From then on corrections shrink or
        # are the last.
        second = step == 1 and not first_is_all
        shrinks = (rate < 1) | (relative == 0) | (relative < 1 if second else False)
        better = active & (shrinks if step else torch.isfinite(relative))
        r, y = next_r.where(better[:, None], r), next_y.where(better[:, None], y)
        left = torch.where(better, torch.maximum(10 * rate, slowest).clamp(max=1), 1.0)
        errors = Errors(*(torch.where(active, left * move, old) for move, old in zip(moves, errors, strict=True)))
        active = better & (left * relative > target) & ((rate < 0.25) | (step == 0) | second)
        previous = Errors(*(torch.where(better, move, old) for move, old in zip(moves, previous, strict=True)))
        if not bool(active.any()):
            break
    return r, y, errors, iterations


def _bound(system: System, b: Tensor, c: Tensor, r: Tensor, y: Tensor, largest: Tensor, smallest: Tensor) -> Errors:
    """What rounding errors (f_1, f_2) in the residuals can do.

    |e_y| <= |f_1| / sigma + |f_2| / sigma^2,  |e_r| <= |f_1| + |f_2| / sigma
    """
    sigma = smallest / 2  # an estimate is on the large side
    of_b, of_r = norm(system.weigh(b)), norm(system.weigh(r))
    first = 2 * system.unit * (of_b + of_r + largest * norm(y))
    second = 2 * system.unit * (norm(c) + largest * of_r)
    if system.d2 is not None:
        second = second + 2 * EPS * norm(system.d2 * y)
    shift = first / sigma * (system.size / sigma).clamp(max=1) + second / sigma.square()
    return Errors(first + second / sigma, shift, shift)  # of x at most that of y: all weights are at most 1


def _sliced(
    system: System,
    r: Tensor,
    y: Tensor,
    left: Errors,
    correct: Callable[[Tensor | None, Tensor], Run],
    largest: Tensor,
    smallest: Tensor,
) -> Errors:
    """`left`, or more where slices of r and y, which end 2^-100 below their largest entries, cut off what x is made of.

    Columns of very different scales can make small entries of y the large ones of x = D^-1 y.
    """
    whole_r, whole_y = norm(system.weigh(r)), norm(y)
    bound = EPS_EXTENDED * (largest / smallest) * (whole_y + whole_r / smallest)
    if not bool((bound > 1e-3 * EPS * norm(system.weight * y)).any()):
        return left
    first, second = (
        torch.ones_like(part) * (EPS_EXTENDED * size)[:, None] for part, size in ((r, whole_y), (y, whole_r))
    )
    blurred = correct(first * noise(first.real), second * noise(second.real))
    sizes = Errors(norm(system.weigh(blurred.r)), norm(blurred.y), norm(system.weight * blurred.y))
    return Errors(*map(torch.fmax, left, sizes))


def _at_least(errors: Errors, first: Tensor, second: Tensor, largest: Tensor, noise: Tensor) -> Errors:
    """What errors must at least be for residuals of the norms `first` and `second`, whatever a factor may say.

    Residuals are (e_r + A e_y, A^H e_r - d^2 e_y), so e_r or A e_y is at least half as large as either.
    """
    least = (torch.maximum(first, second / largest) - 10 * noise).clamp_min(0) / 2
    both = (errors.r < least) & (largest * errors.y < least)
    return Errors(torch.where(both, least, errors.r), errors.y, errors.x)


def report(
    system: System,
    b: Tensor,
    c: Tensor,
    refined: Refined,
    *,
    method: int | Tensor,
    largest: Tensor,
    smallest: Tensor,
    rank: int | Tensor,
    limited: Tensor | None = None,
    given: Tensor | None = None,
) -> Report:
    """Judge a solution; `largest` and `smallest` are singular values (P, 1), `limited` marks columns that ran out.

    `given` is the c that was asked about, where c is a projection of it.
    """
    r, y, errors, iterations = refined
    measure = Measure(system, b, c if given is None else given, largest)
    whole = measure.sizes(r, y)
    left_of_b, left_of_c = system.residuals(b, c, r, y)
    first, second, of_b = norm(system.weigh(left_of_b)), norm(left_of_c), norm(system.weigh(b))
    errors = _at_least(errors, first, second, largest, EPS * (of_b + norm(c) + whole.r + largest * whole.y))
    # Where scales differ so much that squares of x in units of the smallest may underflow, nothing could be claimed.
    zero_r, zero_y = (r == 0).all(1), (y == 0).all(1)
    measured = (whole.x > 2.0**-450) | zero_y
    accepted = (measure.relative(errors, whole) + system.precision / 2 <= system.accept) & measured
    failed = INACCURATE if limited is None else torch.where(limited, ITERATION_LIMIT, INACCURATE)
    ones = torch.ones_like(iterations)
    slack = EPS * (of_b + largest * whole.y)

    def claim(error: Tensor, size: Tensor, zero: Tensor) -> Tensor:
        relative = _ratio(error, size)
        if bool(zero.any()):
            relative = torch.where(zero & accepted, _of_zero(system, b, c, r, y), relative)
        return torch.where(measured, relative + system.precision / 2, torch.inf)

    return Report(
        status=torch.where(accepted, CONVERGED, failed) * ones,
        method=method * ones,
        iterations=iterations,
        optimality=_ratio(second, largest * torch.maximum(whole.r, slack) + norm(c)),
        residual_error=claim(errors.r, whole.r, zero_r),
        solution_error=claim(errors.x, whole.x, zero_y),
        condition=largest / smallest * ones,
        rank=rank * ones,
        norm=system.frobenius * ones,
        tried=method * ones,
        ticket=0 * ones,
        rounding=system.precision / 2 * ones,
    )


def _of_zero(system: System, b: Tensor, c: Tensor, r: Tensor, y: Tensor) -> Tensor:
    """The relative error (P, k) of a solution of zeros: 0 where its gradient is but rounding, else 1.

    A solver may end with zeros because its numbers were too small for their squares.
    """
    rounding = system.rounding(b, c, r, y)[1][:, :, : b.shape[2]]
    other = (system.gradient(system.weigh(r), y, c).abs() > 16 * rounding.abs()).any(1)
    return (other | (system.lost & ((b != 0).any(1) | (c != 0).any(1)))).to(torch.float64)


def _ratio(size: Tensor, whole: Tensor) -> Tensor:
    return size / whole.clamp_min(_TINY)  # NaN stays NaN, which nothing accepts; nothing is 0 of nothing
