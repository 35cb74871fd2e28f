"""Which unknowns of a bounded problem are at their bounds: block principal pivoting, with single exchanges behind it.

All unknowns that violate a condition of the minimum change sides at once, as long as their number falls; after some
passes in which it does not, only the last of them does (Portugal, Judice, Vicente, Math. Comp. 63, 1994; Kim and Park,
SIAM J. Sci. Comput. 33(6), 2011). Where that comes to no end, or to unknowns without full rank, one is freed at a time,
and x stays within the bounds and falls (Stark and Parker, Comput. Statist. 10, 1995, after Lawson and Hanson). What
is accepted meets the conditions to the errors of its solve; where a multiplier is zero but for its error, the unknown
is freed on trial, and the x it takes then tells its sign, since errors of multipliers may be large beside those of x.

A batch shares its passes: the problems that are not done are one batch of solves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import DAMP, ConvergenceError, RankDeficientError
from ..result import CONVERGED, ITERATION_LIMIT, RANK_DEFICIENT
from ..sparse.numerics import ldexp
from ..torch_func.operations import define
from ..torch_func.primitive import Constant
from .gradient import Static
from .guess import guess
from .pivoting import BY_DAMPING, Bounded, Judged, Problems, Tried, at_bounds, check_order, judge, left_of_shift
from .settings import settings_of

_PATIENCE = 3  # block exchanges in a row that may not lower the number of violations
_SINGLES = 30  # single exchanges before the slower method
_HEAVY = 1e10  # in the place of an infinite weight while x is feasible for the bounds only
_TRIALS = 128  # unknowns that are freed on trial at a time
_BLOCKS, _ONE_BY_ONE, _CHECK, _DONE = range(4)


class _Search:
    """P searches side by side; tensors are (P,) or (P, n)."""

    def __init__(self, problems: Problems):
        self.problems = problems
        weights, damp, lower, upper = problems.weights, problems.damp, problems.lower, problems.upper
        m, n, size, device = problems.m, problems.n, len(problems.b), problems.b.device
        fixed = lower == upper
        nearest = torch.where(lower.abs() <= upper.abs(), -1, 1)
        self.cold = torch.where(lower.isinf() & upper.isinf(), 0, nearest)
        self.cold = torch.where(damp.isinf(), BY_DAMPING, self.cold)
        self.active = torch.where(damp.isinf(), BY_DAMPING, torch.where(fixed, -1, 0))
        determined = ((damp == 0) & (self.active == 0)).sum(1) <= m
        self.active = torch.where(determined[:, None], self.active, self.cold)
        self.capped = weights
        if weights is not None:
            finite = problems.largest(torch.where(weights.isinf(), 0.0, weights))
            heavy = _HEAVY * torch.where(finite > 0, finite, 1.0)
            self.capped = torch.where(weights.isinf(), heavy, weights)

        def each(value: int) -> Tensor:
            return torch.full((size,), value, dtype=torch.int64, device=device)

        self.phase, self.status = each(_BLOCKS), each(CONVERGED)
        self.least, self.patience, self.singles = each(n + 1), each(_PATIENCE), each(0)
        self.freed = each(-1)  # which unknown was freed last, one at a time
        self.x, self.multipliers = torch.zeros_like(lower), torch.zeros_like(lower)
        self.weak = torch.zeros_like(fixed)  # without strict complementarity
        self.banned = torch.zeros_like(fixed)
        self.passes = 0

    def run(self) -> None:
        """Pass after pass, until every search has ended."""
        limit = 100 + 6 * self.problems.n
        while True:
            going = (self.phase != _DONE).nonzero()[:, 0]
            if not len(going):
                return
            if self.passes >= limit:
                self._end(going, ITERATION_LIMIT)
                return
            self.passes += 1
            problems = self.problems.take(going)
            if problems.weights is not None and self.capped is not None:
                alone = (self.phase[going] == _ONE_BY_ONE)[:, None]
                assert isinstance(problems, Bounded)
                problems = problems._replace(weights=torch.where(alone, self.capped[going], problems.weights))
            tried = problems.attempt(self.active[going])
            judged = judge(problems.lower, problems.upper, self.active[going], tried)
            alone = self.phase[going] == _ONE_BY_ONE
            for step, chosen in ((self._exchange, ~alone), (self._free_one, alone)):
                part = chosen.nonzero()[:, 0]
                if len(part):
                    some = Tried(*(t[part] for t in tried)), Judged(*(t[part] for t in judged))
                    step(going[part], problems.take(part), *some)

    def _end(self, which: Tensor, status: int) -> None:
        self.phase[which], self.status[which] = _DONE, status

    def _exchange(self, which: Tensor, problems: Problems, tried: Tried, judged: Judged) -> None:
        """Principal pivoting: those that violate a condition change sides."""
        active, wrong = self.active[which], judged.wrong
        count = wrong.sum(1)
        settled = ~tried.deficient & (count == 0)
        fewer = count < self.least[which]
        self.least[which] = torch.where(fewer, count, self.least[which])
        block = fewer | (self.patience[which] > 0)
        self.patience[which] = torch.where(fewer, _PATIENCE, self.patience[which] - 1)
        self.singles[which] += (~block).to(torch.int64)
        places = torch.arange(wrong.shape[1], device=wrong.device)
        last = places == torch.where(wrong, places, -1).amax(1, keepdim=True)
        chosen = wrong & (block[:, None] | last)
        moved = torch.where(judged.below, -1, torch.where(judged.above, 1, 0))
        active = torch.where(chosen & ~settled[:, None], moved, active)
        self.active[which] = active
        ended = (tried.deficient | (self.singles[which] > _SINGLES)) & ~settled
        self._start_over(which[ended & (self.phase[which] == _BLOCKS)])
        deficient = tried.deficient & (self.phase[which] == _CHECK)
        self._end(which[deficient], RANK_DEFICIENT)
        self._end(which[ended & ~deficient & (self.phase[which] == _CHECK)], ITERATION_LIMIT)
        part = settled.nonzero()[:, 0]
        if len(part):
            some = Tried(*(t[part] for t in tried)), Judged(*(t[part] for t in judged))
            self._settle(which[part], problems.take(part), *some)

    def _start_over(self, which: Tensor) -> None:
        """One at a time, from the bounds nearest to zero."""
        self.phase[which], self.active[which], self.freed[which] = _ONE_BY_ONE, self.cold[which], -1
        zero = at_bounds(self.cold, self.problems.lower, self.problems.upper)
        self.x[which], self.banned[which] = zero[which], False

    def _free_one(self, which: Tensor, problems: Problems, tried: Tried, judged: Judged) -> None:
        """Go from x towards the solution on the free unknowns until one meets its bound; there, free another."""
        lower, upper, active, x = problems.lower, problems.upper, self.active[which], self.x[which]
        freed, rows = self.freed[which], torch.arange(len(which), device=which.device)
        places = torch.arange(lower.shape[1], device=lower.device)
        is_freed = places == freed[:, None]
        deficient = tried.deficient[:, None]
        # What does not determine the unknown that was freed last goes back; where none was, there is no way on.
        self._end(which[tried.deficient & (freed < 0)], RANK_DEFICIENT)
        out = (judged.below | judged.above) & ~deficient
        target = torch.where(tried.x < lower, lower, upper)
        # The one that was freed last may move the wrong way by rounding errors alone, from its bound: a step of zero.
        step = torch.where(out, (target - x) / (tried.x - x), torch.inf).clamp_min(0)
        length = step.amin(1, keepdim=True).clamp(max=1.0)
        blocked, whole = out & (step <= length), ~out.any(1) & ~tried.deficient
        toward = torch.minimum(torch.maximum(torch.where(deficient, x, tried.x), lower), upper)
        self.x[which] = torch.where(whole[:, None], toward, torch.where(deficient, x, x + length * (toward - x)))
        self.x[which] = torch.where(blocked, target, self.x[which])
        back = torch.where(x <= lower, -1, 1)
        active = torch.where(blocked, torch.where(tried.x < lower, -1, 1), active)
        active = torch.where(deficient & is_freed, back, active)
        stuck = (deficient | (length <= 0)) & is_freed & (active != 0)
        moved = (whole & (freed >= 0)) | ((length[:, 0] > 0) & out.any(1))
        banned = torch.where(moved[:, None], False, self.banned[which]) | stuck
        freed = torch.where(stuck.any(1) | whole, -1, freed)
        pull = torch.where(judged.pulled & ~banned & whole[:, None], tried.multipliers.abs(), 0.0)
        pull = torch.where(pull > 0, pull / tried.error_of_multipliers.clamp_min(1e-300), 0.0)
        best = pull.argmax(1)
        more = pull[rows, best] > 0
        active[rows[more], best[more]] = 0
        self.freed[which] = torch.where(more, best, freed)
        self.active[which], self.banned[which] = active, banned
        finished = which[whole & ~more]
        self.phase[finished], self.least[finished] = _CHECK, self.problems.n + 1
        self.patience[finished], self.singles[finished] = _PATIENCE, 0

    def _settle(self, which: Tensor, problems: Problems, tried: Tried, judged: Judged) -> None:
        """No condition is violated; decide those that are too near to tell."""
        active, unclear = self.active[which], judged.unclear
        release = torch.zeros_like(unclear)
        weak = judged.touching.clone()
        some = unclear.any(1).nonzero()[:, 0]
        if len(some):
            # Where all of them stay at their bounds when they are freed together, that is what they do in the minimum.
            few, trial = problems.take(some), torch.where(unclear, 0, active)[some]
            together = few.attempt(trial)
            at_rest = ~unclear[some] | judge(few.lower, few.upper, trial, together).touching
            self._end(which[some[together.deficient]], RANK_DEFICIENT)
            resting = at_rest.all(1) & ~together.deficient
            weak[some[resting]] |= unclear[some[resting]]
            rest = some[~resting & ~together.deficient]
            pairs = unclear[rest].nonzero()
            for part in pairs.split(_TRIALS):
                problem, place = rest[part[:, 0]], part[:, 1]
                one, alone = problems.take(problem), active[problem].clone()
                rows = torch.arange(len(part), device=part.device)
                alone[rows, place] = 0
                tried_one = one.attempt(alone)
                bound = at_bounds(active[problem], one.lower, one.upper)[rows, place]
                inward = (tried_one.x[rows, place] - bound) * -active[problem, place]
                error = tried_one.error[rows, place]
                release[problem, place] = inward > error
                weak[problem, place] = (inward.abs() <= error) | tried_one.deficient
        going = release.any(1)
        self.active[which] = torch.where(release, 0, active)
        ended = which[~going & (self.phase[which] != _DONE)]
        self.phase[ended] = _DONE
        # Where two bounds are one, the multiplier tells which of them it is.
        pinned = active.abs() == 1
        fixed, side = pinned & (problems.lower == problems.upper), torch.where(tried.multipliers > 0, 1, -1)
        self.active[which] = torch.where(fixed, side, self.active[which])
        g = torch.where(pinned, tried.multipliers, 0.0)
        self.multipliers[which] = torch.where(unclear & (g * active < 0), 0.0, g)
        self.weak[which] = weak


def _active_set(
    values: Tensor,
    weights: Tensor | None,
    damp: Tensor,
    b: Tensor,
    lower: Tensor,
    upper: Tensor,
    indices: Tensor,
    m: int,
    n: int,
    settings: str,
    on_failure: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    static = Static(m, n, settings_of(settings), on_failure)
    return find_scaled(Bounded(values, weights, damp, b, lower, upper, indices, static), on_failure)


def find_scaled(problems: Bounded, on_failure: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `find_active_set`, in units in which columns are alike."""
    check_bounds(problems.lower, problems.upper, problems.damp)
    if not (len(problems.b) and problems.m and problems.n):
        return find_active_set(problems, on_failure)
    problems, exponents = problems.scaled()
    active, weak, multipliers, status = find_active_set(problems, on_failure, guess)
    return active, weak, ldexp(multipliers, exponents), status


def find_active_set(
    problems: Any, on_failure: str, guess: Callable[[Any, Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(active, weak, multipliers (P, n), status (P,)) of `Problems`, from what guess(problems, active) begins with."""
    lower = problems.lower
    if not (len(problems.b) and problems.m and problems.n):
        active = torch.zeros_like(lower)
        return active, active.clone(), active.clone(), lower.new_zeros(len(lower))
    search = _Search(problems)
    search.active = search.active if guess is None else guess(problems, search.active)
    search.run()
    failed = search.status != CONVERGED
    if on_failure == "raise" and bool(failed.any()):
        _refuse(search, failed)
    active = torch.where(search.active == BY_DAMPING, 0, search.active).to(lower.dtype)
    return active, search.weak.to(lower.dtype), search.multipliers, search.status.to(lower.dtype)


def check_bounds(lower: Tensor, upper: Tensor, damp: Tensor) -> None:
    """Refuse bounds without a number between, and what they do not go with."""
    check_order(lower, upper)
    beside = damp.isinf() & ((lower > 0) | (upper < 0))
    if bool(beside.any()):
        j = int(beside.nonzero()[0, 1])
        raise ValueError(f"an infinite damping pins unknown {j} at zero, which its bounds exclude")


def _refuse(search: _Search, failed: Tensor) -> None:
    p = int(failed.nonzero()[0, 0])
    where = f" (problem {p} of {len(failed)})" if len(failed) > 1 else ""
    heavy = search.problems.weights is not None and bool(search.problems.weights[p].isinf().any())
    beside = "; the rows of infinite weight may have no solution within the bounds" if heavy else ""
    if int(search.status[p]) == RANK_DEFICIENT:
        raise RankDeficientError(
            f"the solution within the bounds{where} is not unique, or too near to that to tell: A (with its weights) "
            f"has no full rank on the unknowns that may leave their bounds{beside}",
            DAMP,
            "narrower bounds",
        )
    raise ConvergenceError(
        f"no set of unknowns at their bounds was found in {search.passes} solves{where} that meets the conditions of a "
        f"minimum to the errors of its solve{beside}",
        DAMP,
        "scale unknowns and equations to sizes of about 1",
    )


def _fake(values, weights, damp, b, lower, upper, indices, m, n, settings, on_failure):
    return *(torch.empty_like(lower) for _ in range(3)), lower.new_empty(lower.shape[:1])


_kernel = define(
    "active_set(Tensor values, Tensor? weights, Tensor damp, Tensor b, Tensor lower, Tensor upper, Tensor indices, "
    "SymInt m, SymInt n, str settings, str on_failure) -> (Tensor, Tensor, Tensor, Tensor)",
    _active_set,
    _fake,
)
_left = define(
    "left_of_shift(Tensor values, Tensor x, Tensor b, Tensor shifted, Tensor indices, SymInt m, SymInt n) -> Tensor",
    lambda *args: left_of_shift(*args).clone(),
    lambda values, x, b, shifted, indices, m, n: torch.empty_like(b),
)


class ActiveSet(Constant):
    """(active, weak, multipliers (P, n), status (P,)) of (values, weights, damp, b, lower, upper, indices).

    active is -1, 0 or 1; weak is 1 where strict complementarity fails.
    """

    constants, shared = (0, 1, 2, 3), 1

    @classmethod
    def forward(cls, static, values, weights, damp, b, lower, upper, indices):
        tensors = [None if t is None else t.contiguous() for t in (values, weights, damp, b, lower, upper)]
        return _kernel(*tensors, indices, static.m, static.n, static.settings.text, static.on_failure)


class LeftOfShift(Constant):
    """(what rounding has left out of b - A x,) of (values, x, b, b - A x as it is, indices)."""

    constants, shared = (0,), 1

    @classmethod
    def forward(cls, static, values, x, b, shifted, indices):
        return (_left(*(t.contiguous() for t in (values, x, b, shifted)), indices, static.m, static.n),)
