"""Bounds on the unknowns of a fit: which of them are at their bounds, and the fit of the others.

    min f(x)     l <= x <= u

Damped Gauss-Newton steps, each the solution of a bounded linear problem, go to where a set of unknowns stays at its
bounds (Kanzow, Yamashita and Fukushima, J. Comput. Appl. Math. 172, 2004). While it stays there, the minimum is that of

    r'(y) = [r(x); y - bound on the set]     x = y on the free unknowns, the bound on the others

without bounds, which `Minimum` finds, judges and differentiates as any other; the rows below have weight 1 on the set
and 0 elsewhere. What it finds is a minimum within the bounds where x is, and where the gradient g of f pushes against
them: g_j >= 0 at l_j, g_j <= 0 at u_j. Where g_j is zero but for its error, or a free unknown touches a bound, x has no
derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ITERATIONS, ConvergenceError, nearer_start
from ..linear.bounds import solve_each
from ..linear.pivoting import at_bounds
from ..linear.strict import Judged, Strict
from ..result import CONVERGED, ITERATION_LIMIT
from ..solvers.system import EPS
from ..solvers.watching import is_watched, tell
from ..sparse.pattern import SparsePattern
from ..torch_func.primitive import Constant
from .attempts import minimise
from .hessian import relative
from .model import model_at
from .objective import Leaves, Objective, each
from .report import FitReport
from .rounding import blur_of_gradient, floor_of_cost
from .rows import Rows

_CLOSE = (1e-3, 1e-5, 1e-7, 1e-9)  # relative steps after which the set is tried, one after the other while it is wrong
_ERRORS = 30.0  # times the rounding errors of a gradient that it may have and be zero
_TINY = torch.finfo(torch.float64).tiny


class AtBounds(NamedTuple):
    """Where P fits ended, all (P, n) but for the last two, (P,): the x there; -1, 0 or 1 for each unknown; -g on the
    set; 1 where x has no derivative; the status; damped steps.
    """

    x: Tensor
    active: Tensor
    multipliers: Tensor
    weak: Tensor
    status: Tensor
    iterations: Tensor


def on_set(objective: Objective) -> Objective:
    """The objective of y above; to the leaves of the other come the set (n,) and the bounds (n,) of the unknowns in it.

    They stand behind the weights.
    """
    (m, n), indices = objective.pattern.shape, objective.pattern.indices
    each_unknown = torch.arange(n, device=indices.device)
    pattern = SparsePattern(torch.cat([indices, torch.stack([m + each_unknown, each_unknown])], 1), (m + n, n))

    def residual(y: Tensor, active: Tensor, bound: Tensor, *given: Tensor) -> Tensor:
        shared = objective.rows.shared
        held = torch.where(active == 0, 0.0, shared(y) - shared(bound))
        r = objective.residual(_placed(y, active, bound), *given)
        # torch.cat gives a part without numbers cotangents without a batch, which sums over many places must have.
        return torch.nn.functional.pad(r, (0, n)) + torch.nn.functional.pad(held, (m, 0))

    def pull(y: Tensor, *given: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        r, pulled = torch.func.vjp(lambda y: residual(y, *given), y)  # type: ignore[misc]
        return r, lambda u: pulled(u)[0]

    def jacobian(y: Tensor, active: Tensor, bound: Tensor, *given: Tensor) -> Tensor:
        free = (active == 0).to(y.dtype)
        return torch.cat([objective.jacobian(_placed(y, active, bound), *given) * free[indices[1]], 1 - free])

    return replace(objective, residual=residual, pull=pull, jacobian=jacobian, pattern=pattern, whole=False)


def _placed(y: Tensor, active: Tensor, bound: Tensor) -> Tensor:
    return torch.where(active == 0, y, bound)


def _leaves_on(rows: Rows, active: Tensor, lower: Tensor, upper: Tensor, leaves: Any) -> Leaves:
    t, d, w, *given = leaves
    of_set = active.abs() if rows.leads else torch.zeros_like(active)
    return t, d, torch.cat([w, of_set], 1), active, at_bounds(active, lower, upper), *given


class OnSet(NamedTuple):
    """A bounded fit as one without bounds, and what is known of it."""

    objective: Objective
    start: Tensor
    leaves: Leaves
    found: AtBounds

    def finished(self, y: Tensor) -> Tensor:
        """x (P, n) of the y (P, n) that is the minimum."""
        found, (_, _, _, active, bound, *_) = self.found, self.leaves
        x, refused = _placed(y, active, bound), found.weak.any(1).to(y.dtype)
        # A free unknown that touches its bound may be beyond it by its error; x has no derivative there.
        x = torch.where((found.weak != 0) & (active == 0), found.x, x)
        judged = Judged(self.objective.on_failure)
        told = found.weak, refused, torch.zeros_like(refused)
        return Strict.apply(judged, x.new_zeros(len(x), 0, 1), x[:, :, None], *told)[1][:, :, 0]


def within_bounds(objective: Objective, x0: Tensor, bounds: tuple[Tensor, Tensor], leaves: Leaves) -> OnSet:
    """The fit of P problems from x0 (P, n) within the bounds (P, n), which are differentiated."""
    inner, (lower, upper) = on_set(objective), bounds
    found = AtBounds(*SetOfUnknowns.apply((objective, inner), x0, lower, upper, *leaves))
    return OnSet(inner, found.x, _leaves_on(objective.rows, found.active, lower, upper, leaves), found)


class SetOfUnknowns(Constant):
    """((objective, that on the set), x0, lower, upper (P, n), *leaves (P, ...)) -> the fields of `AtBounds`"""

    constants = (0, 1, 2, 3, 4, 5)

    @classmethod
    def forward(cls, static, x0, lower, upper, *leaves):
        if not len(x0):
            return (*(x0.clone() for _ in range(4)), x0.new_empty(0), x0.new_empty(0))
        objective, inner = static
        return tuple(_Search(objective, inner, x0, lower, upper, leaves).run())


class _Search:
    """P searches side by side, on plain tensors (P, ...)."""

    def __init__(
        self, objective: Objective, inner: Objective, x0: Tensor, lower: Tensor, upper: Tensor, leaves: Leaves
    ):
        self.objective, self.inner, self.leaves = objective, replace(inner, on_failure="nan", again=False), leaves
        self.lower, self.upper, self.pinned = lower, upper, lower == upper
        self.x = torch.minimum(torch.maximum(x0, lower), upper)
        self.f, self.r = each(objective.cost, self.x, *leaves)
        if objective.on_failure == "raise" and not bool(self.f.isfinite().all()):
            raise ValueError(f"{objective.start}, once moved into its bounds, got NaN or infinity")
        self.mu, self.grow = torch.full_like(self.f, 1e-3), torch.full_like(self.f, 2.0)
        self.scale, self.iterations = torch.zeros_like(x0), torch.zeros_like(self.f)
        self.status = torch.full_like(self.f, float(ITERATION_LIMIT))
        (m, n), settings = objective.pattern.shape, replace(objective.settings, exact=False)
        self.static = objective.rows.static(m, n, settings, "nan")
        self.active, self.g, self.weak = (torch.zeros_like(x0) for _ in range(3))

    def run(self) -> AtBounds:
        """Until the set is right for all, or nothing is left to try."""
        going = self.f.isfinite().nonzero()[:, 0]
        for close in _CLOSE:
            self._approach(going, close)
            going = going[~self._settled(going, last=close == _CLOSE[-1])]
            if not len(going):
                break
        failed = self.status != CONVERGED
        if self.objective.on_failure == "raise" and bool(failed.any()):
            raise ConvergenceError(
                f"{self.objective.name} found no set of unknowns at their bounds within {int(self.iterations.max())} "
                f"damped steps that is that of a minimum; cost {float(self.f[failed][0]):.3e}",
                ITERATIONS,
                nearer_start(self.objective.point),
            )
        x = torch.where(failed[:, None], torch.nan, self.x)
        multipliers = torch.where(self.active != 0, -self.g, 0.0)
        return AtBounds(x, self.active, multipliers, self.weak, self.status, self.iterations)

    def _of(self, which: Tensor) -> Leaves:
        return tuple(leaf[which] for leaf in self.leaves)

    def _approach(self, which: Tensor, close: float) -> None:
        """Damped steps until they are small."""
        objective = self.objective
        while len(which := which[self.iterations[which] < objective.max_iterations]):
            leaves, x, r, f = self._of(which), self.x[which], self.r[which], self.f[which]
            J, weights = each(objective.slopes, x, *leaves), objective.weights(r, leaves)
            model = model_at(objective, J, weights, leaves)
            self.scale[which] = torch.maximum(self.scale[which], model.norms)
            scale = torch.where(self.scale[which] > 0, self.scale[which], 1.0)
            lower, upper = self.lower[which], self.upper[which]
            p = self._step(J, weights, x, r, lower, upper, scale, self.mu[which])
            to = torch.minimum(torch.maximum(x + p, lower), upper)
            p = to - x
            squares = objective.rows.total((weights * model.along(p).square()).sum(1))
            predicted = (-(model.gradient(r, x) * p).sum(1) - squares / 2).clamp_min(0)
            new, r_new = each(objective.cost, to, *leaves)
            floor = floor_of_cost(model, weights, r, x)
            better = new <= f - 1e-4 * predicted + 10 * EPS * f + floor
            gain = ((f - new) / predicted.clamp_min(_TINY)).clamp(0, 1)
            mu, grow = self.mu[which], self.grow[which]
            self.mu[which] = torch.where(better, mu * (1 - (2 * gain - 1) ** 3).clamp_min(1 / 3), mu * grow).clamp(
                1e-30, 1e30
            )
            self.grow[which] = torch.where(better, 2.0, 2 * grow)
            self.x[which] = torch.where(better[:, None], to, x)
            self.f[which], self.r[which] = torch.where(better, new, f), torch.where(better[:, None], r_new, r)
            self.iterations[which] += 1
            if objective.callback is not None:
                objective.callback(int(self.iterations.max()), float(self.f.max()))
            small = relative(p, to, scale)
            if is_watched():
                tell(float(small.max()), phase="fit", total=objective.max_iterations)
            which = which[~(better & (small <= close) & (predicted <= close * f + floor) | (small <= EPS))]

    def _step(
        self, J: Tensor, weights: Tensor, x: Tensor, r: Tensor, lower: Tensor, upper: Tensor, scale: Tensor, mu: Tensor
    ) -> Tensor:
        """The p of |W^(1/2) (r + J p)|^2 + mu |scale p|^2 at its least within the bounds; NaN where there is none."""
        damp, sound = mu.sqrt()[:, None] * scale, J.isfinite().all(1)[:, None]
        found, _, _ = solve_each(
            self.static, J.where(sound, 0.0), weights, damp, -r[:, :, None], lower - x, upper - x,
            self.objective.pattern.indices, self.objective.rows.active_set,
        )  # fmt: skip
        return found.x[:, :, 0].where((found.numbers == CONVERGED)[:, None] & sound, torch.nan)

    def _settled(self, which: Tensor, *, last: bool) -> Tensor:
        """Find the minimum on the set, and decide whether it is one within the bounds."""
        objective, leaves, lower, upper = self.objective, self._of(which), self.lower[which], self.upper[which]
        x, pinned = self.x[which], self.pinned[which]
        active = torch.where(x <= lower, -1, torch.where(x >= upper, 1, 0)).to(x.dtype)
        y, numbers, _, _ = minimise(self.inner, x, _leaves_on(objective.rows, active, lower, upper, leaves))
        report = FitReport.unpacked(numbers)
        good = report.status == CONVERGED
        self.iterations[which] += report.iterations
        y = _placed(y.where(good[:, None], x), active, at_bounds(active, lower, upper))
        _, r = each(objective.cost, y, *leaves)
        weights, J = objective.weights(r, leaves), each(objective.slopes, y, *leaves)
        model = model_at(objective, J, weights, leaves)
        g, blur = each(objective.gradient, y, *leaves), _ERRORS * blur_of_gradient(model, weights, r, y)
        norms = torch.where(model.norms > 0, model.norms, 1.0)
        length = torch.linalg.vector_norm(norms * y, dim=1, keepdim=True)
        error = torch.where(good, report.forward_error, 0.0)[:, None] * torch.maximum(y.abs(), length / norms)
        outside = (active == 0) & ((y < lower - error) | (y > upper + error))
        touches = (active == 0) & ((y <= lower + error) | (y >= upper - error))
        held = (active != 0) & ~pinned
        right = ~(outside | (held & (g * active > blur))).any(1)
        # What failed for another reason than its set, in the end too, is left to what says why.
        settled = torch.where(good, right, torch.full_like(good, last))
        self.x[which] = torch.minimum(torch.maximum(y, lower), upper).where(settled[:, None], x)
        self.active[which] = torch.where(pinned & (g < 0), 1.0, active)
        self.g[which] = g
        self.weak[which] = (touches | (held & (g.abs() <= blur))).to(y.dtype)
        self.status[which[settled]] = float(CONVERGED)
        return settled
