"""One attempt at a minimum, for P problems at once: Levenberg-Marquardt steps, then Newton's.

Far from a minimum steps are those of Levenberg and Marquardt, damped after Nielsen (IMM-REP-1999-05, DTU, 1999) in the
scale of More (LNM 630, 1978); a robust loss is replaced by the parabolas that touch it from above, which is iteratively
reweighted least squares. These converge linearly where residuals are large, and a small step or decrease says little
of the error. So the end is Newton's: steps H^-1 g shrink quadratically until they are the rounding errors of g,
carried into x, which is what the error is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linear.factor_cache import no_token
from ..result import CONVERGED, INACCURATE, ITERATION_LIMIT, NO_MINIMUM, RANK_DEFICIENT
from ..solvers.system import EPS
from ..solvers.watching import is_watched, tell
from . import rounding as errors
from .geodesic import acceleration, lowest
from .hessian import conjugate, relative
from .model import model_at
from .objective import Leaves, Objective, each, slopes_at
from .report import FitReport

_CLOSE = (1e-3, 1e-5, 1e-7, 1e-9)  # relative steps that call for Newton's, one after the other where his fail
_NEWTON = 20
_SLOW = 20  # reweighted solves after which Newton's steps are tried beside them
# Of the decrease that the model predicts: where it is so nearly right, damping delays the end and goes in larger steps.
_LIKE = 0.99
_SAMPLES = 3  # of rounding errors, before a minimum is judged
# Relative steps, and gradients in units of their rounding errors in double precision: after one more of Newton's steps
# these errors are all that is left, whatever the precision of the input.
_TARGET, _SMALL = 10 * EPS**0.5, 1e8
_SMALLEST = 1e-140  # residual whose squares, and those of their errors, are numbers
_TINY = torch.finfo(torch.float64).tiny


@dataclass
class _State:
    """Where each of the problems is; `put` writes what a subset of them has become."""

    x: Tensor
    f: Tensor
    r: Tensor
    weights: Tensor
    J: Tensor
    scale: Tensor
    mu: Tensor
    grow: Tensor
    floor: Tensor  # what rounding errors of the residual are to f
    stale: Tensor  # r is of this x, J and weights are not
    last: Tensor  # sizes of the last step

    def take(self, which: Tensor) -> _State:
        return _State(**{name: tensor[which] for name, tensor in vars(self).items()})

    def put(self, which: Tensor, part: _State) -> None:
        for name, tensor in vars(part).items():
            vars(self)[name][which] = tensor


class Descent:
    """One attempt, from x (P, n), on plain tensors.

    Args:
        spent: iterations and evaluations (P,) before this attempt.
        even: whether the scale of the steps is the same for all unknowns, that of the largest.
    """

    def __init__(
        self,
        objective: Objective,
        x: Tensor,
        leaves: Leaves,
        *,
        spent: tuple[Tensor, Tensor] | None = None,
        even: bool = False,
    ):
        self.objective, self.leaves, self.even = objective, leaves, even
        f, r = each(objective.cost, x, *leaves)
        self.broken = self._refused(f, r.abs() * leaves[2].sqrt())
        f, r = torch.where(self.broken, 0.0, f), torch.where(self.broken[:, None], 0.0, r)
        zeros, ones = torch.zeros_like(f), torch.ones_like(f)
        empty = x.new_zeros((len(x), objective.pattern.nnz))
        self.state = _State(
            x=x.clone(), f=f, r=r, weights=torch.ones_like(r), J=empty, scale=torch.zeros_like(x),
            mu=1e-3 * ones, grow=2 * ones, floor=zeros, stale=~self.broken,
            last=torch.full_like(x, torch.inf),
        )  # fmt: skip
        self.start, self.begin = f.clone(), x
        before, evaluated = (zeros, zeros) if spent is None else spent
        self.iterations, self.evaluations, self.limit = before.clone(), evaluated + 1, before + objective.max_iterations
        self.status = torch.full_like(f, float(INACCURATE))

    def _refused(self, f: Tensor, sizes: Tensor) -> Tensor:
        """Which problems cannot start (an error, unless that is not wanted)."""
        largest = self.objective.rows.largest(sizes)
        range_left = largest.isfinite() & (~f.isfinite() | ((largest > 0) & (largest < _SMALLEST)))
        bad = ~largest.isfinite() | range_left
        if self.objective.on_failure == "raise" and bool(bad.any()):
            if bool(range_left[bad].all()):
                size = float(largest[bad][0])
                raise ValueError(
                    f"{self.objective.name}: residuals of sizes of {size:.1e} have squares that are no numbers: scale "
                    "them to sizes of about 1"
                )
            raise ValueError(f"{self.objective.start}, got NaN or infinity")
        return bad

    def run(self) -> tuple[Tensor, FitReport, Tensor, Tensor]:
        """(x, report, blur, token); blur (P, n) is a sample of what rounding errors may have made of x."""
        going = ~self.broken
        for close in _CLOSE:
            which = self._approach(going.nonzero()[:, 0], close)
            if not len(which):
                break
            going = torch.zeros_like(going).index_fill(0, which[~self._polish(which)], True)
        told = self.status, self.iterations, self.evaluations, self.state.x
        report, blur, token = FitReport.of_nothing(*told) if bool(self.broken.all()) else self._judge()
        return self.state.x, report, blur, token

    def _approach(self, which: Tensor, close: float) -> Tensor:
        """Damped steps until they are small; gives the problems of `which` for which they came to be."""
        objective, arrived = self.objective, torch.zeros_like(self.status, dtype=torch.bool)
        while len(which):
            limit = self.iterations[which] >= self.limit[which]
            self.status[which[limit]] = float(ITERATION_LIMIT)
            which = which[~limit]
            if not len(which):
                break
            s, leaves = self._linearised(which)
            if bool(self.broken[which].any()):
                which = which[~self.broken[which]]
                continue
            p, predicted, sound = self._step(s, leaves, which)
            f, r = each(objective.cost, s.x + p, *leaves)
            self.evaluations[which] += 1
            self.iterations[which] += 1
            if is_watched():
                step = relative(p, s.x + p, s.scale, self._least(which, s))
                tell(float(step.max()), phase="fit", total=int(self.limit.max()))
            better = sound & (f <= s.f - 1e-4 * predicted + 10 * EPS * s.f + s.floor)
            small = relative(p, s.x + p, s.scale, self._least(which, s))
            gain = ((s.f - f) / predicted.clamp_min(_TINY)).clamp(0, 1)
            shrinks = (1 - (2 * gain - 1) ** 3).clamp_min(torch.where(gain > _LIKE, 1 / 100, 1 / 3))
            s.mu = torch.where(better, s.mu * shrinks, s.mu * s.grow).clamp(1e-30, 1e30)
            s.grow = torch.where(better, 2.0, 2 * s.grow)
            s.x, s.r = torch.where(better[:, None], s.x + p, s.x), torch.where(better[:, None], r, s.r)
            s.f, s.stale = torch.where(better, f, s.f), better
            before, s.last = s.last, torch.where(better[:, None], p.abs(), s.last)
            self.state.put(which, s)
            if objective.callback is not None:
                objective.callback(int(self.iterations.max()), float(self.state.f.max()))
            # In one norm a large unknown may hide that the others are far from where they belong: f does not, nor does
            # each of them by itself, where its steps shrink and are not merely held back by damping.
            each_is_near = p.abs() <= torch.minimum(close / 10 * s.x.abs(), before / 10)
            near = (predicted <= close * f + s.floor) | each_is_near.all(1)
            done = better & (small <= close) & near | (small <= EPS)
            stuck = ~sound & objective.linear  # without damping that could grow
            arrived[which] = done
            self.status[which[stuck]] = float(RANK_DEFICIENT)
            which = which[~(done | stuck)]
        return arrived.nonzero()[:, 0]

    def _linearised(self, which: Tensor) -> tuple[_State, Leaves]:
        """The state of some problems, with J and weights for their x."""
        stale = which[self.state.stale[which]]
        if len(stale):
            s, leaves = self.state.take(stale), self._of(stale)
            J, s.weights = slopes_at(self.objective, s.x, leaves), self.objective.weights(s.r, leaves)
            self.broken[stale] |= ~self.objective.rows.everywhere(J.isfinite())
            s.J = J.where(~self.broken[stale, None], 0.0)
            model = model_at(self.objective, s.J, s.weights, leaves)
            s.scale, s.stale = torch.maximum(s.scale, model.norms), torch.zeros_like(s.stale)
            s.floor = errors.floor_of_cost(model, s.weights, s.r, s.x) + EPS**2 * self.start[stale]
            self.state.put(stale, s)
            self.evaluations[stale] += 1
        return self.state.take(which), self._of(which)

    def _least(self, which: Tensor, s: _State) -> Tensor:
        """Below this an x, scaled, is zero but for rounding: beside the residuals that it leaves, or those at x0."""
        left = errors.length_of_influence(self.objective.rows, s.weights * s.r, self._of(which)[2])
        return self.objective.accept * left + EPS**2 * self.start[which].sqrt()

    def _of(self, which: Tensor) -> Leaves:
        return self.leaves if len(which) == len(self.status) else tuple(leaf[which] for leaf in self.leaves)

    def _step(self, s: _State, leaves: Leaves, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(step, decrease that the model predicts, whether there is a step)"""
        model = model_at(self.objective, s.J, s.weights, leaves)
        g = model.gradient(s.r, s.x)
        if self.objective.linear:
            p = -model.inverse(g[:, :, None])[:, :, 0]
            predicted = -(g * p).sum(1) / 2
            if int(self.iterations[which].max()) >= _SLOW:
                p = lowest(self.objective, s.x, s.r, s.weights, s.J, leaves, g, p)
        else:
            scale = torch.where(s.scale > 0, s.scale, 1.0)
            scale = scale.amax(1, keepdim=True).expand_as(scale) if self.even else scale
            damped = model.damped(scale, s.mu)
            p = damped(s.r)
            predicted = (-(g * p).sum(1) + s.mu * (scale * p).square().sum(1)) / 2
            p = p + acceleration(self.objective, s.x, s.r, leaves, model, scale, p, damped)
            if self.objective.settings.minimum_norm:
                p = model.determined(p[:, :, None])[:, :, 0]  # J p stays as it is
            self.evaluations[which] += 1
        sound = p.isfinite().all(1)
        return torch.where(sound[:, None], p, 0.0), predicted.clamp_min(0), sound

    def _polish(self, which: Tensor) -> Tensor:
        """Newton's steps until they are small enough for one more to be the last; gives for which problems they are."""
        objective, found = self.objective, torch.zeros(len(which), dtype=torch.bool, device=which.device)
        place = torch.arange(len(which), device=which.device)
        s, leaves = self.state.take(which), self._of(which)
        model = model_at(objective, s.J, s.weights, leaves)  # of one step before: it is a preconditioner, no more
        x, previous, least = s.x, torch.full_like(s.f, torch.inf), self._least(which, s)
        blur = errors.blur_of_gradient(model, s.weights, s.r, s.x)
        for _ in range(_NEWTON):
            g = each(objective.gradient, x, *leaves)
            step, definite, products = conjugate(objective, x, leaves, model, g[:, :, None], 1e-6)
            self.evaluations[which[place]] += 1 + products
            p = -step[:, :, 0]
            moved = relative(p, x + p, model.norms, least[place])
            length = torch.linalg.vector_norm(model.norms * p, dim=1)
            shrinks = definite[:, 0] & (length < previous / 2)  # not of NaN
            x = torch.where(shrinks[:, None], x + p, x)
            # In one norm a large unknown may hide the others, so every component of g is held against its rounding
            # errors. Where they end to shrink, steps are rounding errors, or else Newton's method is far away.
            small = (g.abs() <= _SMALL * EPS / objective.arithmetic * blur[place]).all(1)
            right = shrinks & (moved <= _TARGET) & small
            stays = definite[:, 0] & ~shrinks & (moved <= objective.accept)
            if bool(stays.any()):
                points = [t[stays] for t in (x, blur[place], moved, least[place])]
                some = tuple(leaf[stays] for leaf in leaves)
                right[stays] = errors.is_rounding(objective, points[0], some, model.take(stays), *points[1:])
            self.state.x[which[place[right]]] = x[right]
            found[place[right]] = True
            self.status[which[place[~definite[:, 0]]]] = float(NO_MINIMUM)
            rest = shrinks & ~right
            if not bool(rest.any()):
                break
            place, x, previous = place[rest], x[rest], length[rest]
            leaves, model = tuple(leaf[rest] for leaf in leaves), model.take(rest)
        at, s, leaves = which[found], s.take(found), tuple(leaf[found] for leaf in self._of(which))
        if len(at):
            f, r = each(objective.cost, self.state.x[at], *leaves)
            lower = f <= s.f * (1 + 1e-6) + s.floor
            self.evaluations[at] += 1
            self.state.x[at] = torch.where(lower[:, None], self.state.x[at], s.x)
            self.state.f[at], self.state.r[at] = torch.where(lower, f, s.f), torch.where(lower[:, None], r, s.r)
            self.state.stale[at], self.status[at[lower]] = True, float(CONVERGED)
            found[found.clone()] = lower
        return found

    def _judge(self) -> tuple[FitReport, Tensor, Tensor]:
        """A last step of Newton's, and what can be said of the points that were reached.

        The last step is made of rounding errors; beside it stand those that rounding in the residual, in J and in
        their product may make, which one step may not show.
        """
        objective, leaves = self.objective, self.leaves
        s, _ = self._linearised(torch.arange(len(self.status), device=self.status.device))
        model = model_at(objective, s.J, s.weights, leaves)
        psi = s.weights * s.r
        spread = errors.spread_of_influence(model, s.weights, s.r, s.x)
        # A sample of errors may by chance have a small part in the weakest direction: the largest of these counts.
        samples = [model.rounding(psi[:, :, None], spread[:, :, None], seed) for seed in range(_SAMPLES)]
        g = each(objective.gradient, s.x, *leaves)
        # Neither sees a direction that it has no part in: at a saddle point that symmetry leads to, the one downwards.
        # This one has as large a part in every direction, in the norm of M, by which conjugate gradients measure.
        right = torch.cat([g[:, :, None], model.probe(s.x, leaves)[:, :, None], *samples], 2)
        steps, definite, products = conjugate(objective, s.x, leaves, model, right, 1e-3)
        self.evaluations += 1 + products
        told, definite = model.told, definite.all(1)
        norms = torch.where(model.norms > 0, model.norms, 1.0)
        left = errors.length_of_influence(objective.rows, psi, leaves[2])
        optimality = torch.linalg.vector_norm(g / norms, dim=1) / (s.x.shape[1] ** 0.5 * left).clamp_min(_TINY)
        # Residuals make x zero but for rounding only if they are orthogonal to the range, not where J nearly vanishes.
        left = torch.where(optimality <= objective.accept, left, 0.0)
        least = objective.accept * left + EPS**2 * self.start.sqrt()
        last, _, *sizes = (relative(p, s.x, model.norms, least) for p in steps.unbind(2))
        rounding, largest = torch.stack(sizes, 1).max(1)
        blur = steps[:, :, 2:].take_along_dim(largest[:, None, None], 2)[:, :, 0]
        found = (self.status == CONVERGED) & ~self.broken
        if objective.arithmetic > EPS and bool(found.any()):
            # Errors of single precision may reach where Newton's steps do not: from there one must lead back.
            x = s.x + blur
            back, seen, _ = conjugate(
                objective, x, leaves, model, each(objective.gradient, x, *leaves)[:, :, None], 1e-3
            )
            missed = relative(back[:, :, 0] - steps[:, :, 0] - blur, s.x, model.norms, least)
            rounding = rounding + torch.where(seen.all(1), 10 * missed, torch.inf)
        error = torch.where(found, last + rounding, torch.inf) + objective.precision / 2
        status = torch.where(found & ~(error <= objective.accept), float(INACCURATE), self.status)
        status = torch.where(found & ~definite, float(NO_MINIMUM), status)
        # Not where H is positive definite nevertheless, which is all that a strict minimum needs.
        status = torch.where(told.deficient & (status != CONVERGED), float(RANK_DEFICIENT), status)
        near = objective.accept * torch.maximum(s.x.abs(), self.begin.abs())
        lost = errors.undetermined(model, s.scale, s.x, least, steps[:, :, [0, *range(2, 2 + _SAMPLES)]], near)
        status = torch.where(found & lost.any(1), float(RANK_DEFICIENT), status)
        if objective.settings.minimum_norm:
            status = torch.where(found & ~model.is_gauge(s.x, leaves), float(RANK_DEFICIENT), status)
        status = torch.where(self.broken, float(INACCURATE), status)
        s.x = torch.where((status == CONVERGED)[:, None], s.x - steps[:, :, 0], s.x)
        report = FitReport(
            status=status,
            iterations=self.iterations,
            evaluations=self.evaluations,
            optimality=optimality,
            forward_error=torch.where(status == RANK_DEFICIENT, torch.inf, error),
            condition=torch.where(self.broken, torch.nan, told.condition),
            rank=told.rank - lost.sum(1),
            norm=told.norm,
            cost=s.f,
        )
        self.state.x, blur = s.x, torch.where((status == CONVERGED)[:, None], blur, 0.0)
        return report, blur, no_token() if model.token is None else model.token
