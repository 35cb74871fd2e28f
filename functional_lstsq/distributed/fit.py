"""Nonlinear least squares over ranks: each has some of the residuals; x and all decisions are the same on all ranks.

    f(x) = sum over ranks of |r(x)|^2 / 2        g = grad f        H = grad^2 f

Levenberg and Marquardt's steps, -(J^T J + mu diag(J^T J))^-1 g (Nielsen's rule for mu), then Newton's, until what is
left are rounding errors. The minimum is a primitive, as `fits.minimum` has it: g(x, args) = 0 defines x, and

    JVP   H dx + (dg/dargs) dargs = 0            VJP   H l + x_bar = 0,   args_bar = (dg/dargs)^T l

g and H are totals of what ranks have, so args, which may differ from rank to rank, have derivatives of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ITERATIONS, ConvergenceError, nearer_start, other_start
from ..fits.arguments import check_asked, check_tensors, closed_residual, taken_apart
from ..fits.minimum import along, pull_back
from ..fits.report import FitInfo
from ..result import CONVERGED
from ..sparse.numerics import EPS
from ..sparse.precision import convert, double
from ..torch_func.cores import steady
from ..torch_func.forward_mode import jvp
from ..torch_func.primitive import Primitive
from ..torch_func.tracing import concrete, fit_beside_graph, load_forward_mode
from .collectives import shared_by, total_of
from .ranks import Ranks, digest

_LARGEST = 500  # unknowns, whose H is dense
_CHUNK = 64  # directions that are followed side by side
_NEAR = 1e-6  # relative size of a step from which Newton's take over
_NEWTON = 30
_STEPS = 2000


class ShardedFit(NamedTuple):
    """What `gauss_newton` over ranks gives: x (n,), the same on all ranks; this rank's residual (m_r,); a `FitInfo`."""

    x: Tensor
    residual: Tensor
    info: FitInfo


# Not a tuple, which torch.func would take apart at every call.
@dataclass(eq=False)
class _Objective:
    residual: Callable[..., Tensor]
    ranks: Ranks
    max_iterations: int
    accept: float

    def cost(self, x: Tensor, *leaves: Tensor) -> Tensor:
        """|r|^2 / 2 of this rank, which depends on all that it may depend on, on a rank without rows too."""
        nothing = sum((leaf.reshape(-1)[:0].sum() for leaf in leaves if leaf.is_floating_point()), x[:0].sum())
        return self.residual(x, *leaves).square().sum() / 2 + torch.expm1(nothing)

    def gradient(self, x: Tensor, *leaves: Tensor) -> Tensor:
        return self._total(torch.func.grad(self.cost)(self._shared(x), *leaves))

    def curvature(self, x: Tensor, *leaves: Tensor) -> Tensor:
        here: Any = torch.func.jacrev(torch.func.grad(self.cost), chunk_size=_CHUNK)(self._shared(x), *leaves)
        return self._total(here)

    def _total(self, t: Tensor) -> Tensor:
        return total_of(t, self.ranks.name)

    def _shared(self, t: Tensor) -> Tensor:
        return shared_by(t, self.ranks.name)

    def costs(self, x: Tensor, leaves: tuple) -> float:
        """f of all ranks."""
        return float(self.ranks.sum(self.residual(x, *leaves).square().sum() / 2))

    def linearised(self, x: Tensor, leaves: tuple) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(f, g, J^T J, |J|^T |r|), in one sum over ranks."""
        n = len(x)
        eye = torch.eye(n, dtype=x.dtype, device=x.device)
        column = lambda v: jvp(lambda x: self.residual(x, *leaves), (x,), (v,))[1]  # noqa: E731
        r, columns = self.residual(x, *leaves), torch.vmap(column, chunk_size=_CHUNK)(eye)
        parts = r.square().sum()[None] / 2, columns @ r, columns.abs() @ r.abs(), (columns @ columns.T).reshape(-1)
        f, g, sizes, gram = self.ranks.sum(torch.cat(parts)).split([1, n, n, n * n])
        return f, g, gram.reshape(n, n), sizes


class _Minimum(Primitive):
    """(objective, x0 (n,), *leaves) -> x (n,), numbers (6,)"""

    constants = (1,)

    @classmethod
    @steady()
    def forward(cls, objective, x0, *leaves):
        x, numbers = _found(objective, x0, leaves)
        told = {"the minimum": digest(x), "its report": digest(numbers)}
        objective.ranks.checked(lambda: (None, told), x.device)
        return x, numbers

    @classmethod
    def vjp_rule(cls, objective, inputs, outputs, cotangents, needed):
        _, *leaves = inputs
        x, x_bar = outputs[0], cotangents[0]
        if x_bar is None:
            return (None,) * len(inputs)
        l = -_solve(objective.curvature(x, *leaves), x_bar)  # noqa: E741
        return None, *pull_back(lambda *leaves: objective.gradient(x, *leaves), leaves, needed[1:], l)

    @classmethod
    def jvp_rule(cls, objective, inputs, outputs, tangents):
        _, *leaves = inputs
        x = outputs[0]
        if all(dot is None for dot in tangents[1:]):
            return torch.zeros_like(x), None
        moved = along(lambda *leaves: objective.gradient(x, *leaves), leaves, tangents[1:])[1]
        return -_solve(objective.curvature(x, *leaves), moved), None

    @classmethod
    def vmap(cls, info, in_dims, objective, *tensors):
        """One problem after the other, as many steps as each takes."""
        found = []
        for i in range(info.batch_size):
            pairs = zip(tensors, in_dims[1:], strict=True)
            found.append(cls.apply(objective, *(t if dim is None else t.select(dim, i) for t, dim in pairs)))
        return tuple(torch.stack(parts) for parts in zip(*found, strict=True)), (0, 0)


def _solve(H: Tensor, v: Tensor) -> Tensor:
    """H^-1 v, unknowns scaled."""
    scale = H.detach().diagonal().abs().sqrt()
    return torch.linalg.solve(H / scale[:, None] / scale, v / scale) / scale


def _found(objective: _Objective, x: Tensor, leaves: tuple) -> tuple[Tensor, Tensor]:
    """(x, numbers) of the minimum that is reached from x; every decision is one on totals."""
    x, iterations = _descend(objective, x.clone(), leaves)
    before, steps = float("inf"), 0
    while True:
        f, g, gram, sizes = objective.linearised(x, leaves)
        scale = torch.where(gram.diagonal() > 0, gram.diagonal(), 1.0).sqrt()
        H = objective.curvature(x, *leaves) / scale[:, None] / scale
        if not bool(H.isfinite().all()):
            raise ConvergenceError("residual has second derivatives that are no numbers", other_start("x0"))
        values, vectors = torch.linalg.eigh((H + H.T) / 2)
        least, most = float(values[0]), float(values[-1])
        if not least > EPS / objective.accept * most:  # beyond it derivatives are rounding errors
            raise ConvergenceError(
                f"no strict minimum: the smallest curvature is {least:.1e} of scaled unknowns, the largest {most:.1e}",
                nearer_start("x0"),
                "a prior on x",
            )
        step = -(vectors @ ((vectors.T @ (g / scale)) / values)) / scale
        moved = float(torch.linalg.vector_norm(scale * step))
        size = max(float(torch.linalg.vector_norm(scale * (x + step))), EPS * float((2 * f).sqrt()), 1e-300)
        steps += 1
        if not moved < before / 2 or steps > _NEWTON:
            break
        x, before = x + step, moved
        if moved <= EPS * size:
            break
    # What rounding in J^T r may do, and what Newton's last step has left.
    rounding = 4 * EPS * float(torch.linalg.vector_norm(sizes / scale)) / least
    error = (moved + rounding) / size + EPS
    left = float(torch.linalg.vector_norm(g / scale))
    optimality = left / max(float((2 * f).sqrt()), 1e-300)
    if not error <= objective.accept:
        raise ConvergenceError(
            f"the minimum is known to {error:.1e} only, where {objective.accept:.1e} is accepted",
            nearer_start("x0"),
            ITERATIONS,
        )
    numbers = iterations, iterations + steps, optimality, error, (most / least) ** 0.5, float(f)
    return x, x.new_tensor(numbers)


def _descend(objective: _Objective, x: Tensor, leaves: tuple) -> tuple[Tensor, int]:
    """(x, steps): by damped steps to where they are small."""
    f, g, gram, _ = objective.linearised(x, leaves)
    if not bool(f.isfinite() & g.isfinite().all() & gram.isfinite().all()):
        raise ValueError("residual and its Jacobian must be finite at x0")
    mu, factor = 1e-3, 2.0
    for step in range(1, objective.max_iterations + 1):
        scale = torch.where(gram.diagonal() > 0, gram.diagonal(), 1.0).sqrt()
        damped = gram / scale[:, None] / scale + mu * torch.eye(len(x), dtype=x.dtype, device=x.device)
        p = -torch.linalg.solve(damped, g / scale)
        predicted = float(mu * p.square().sum() - (g / scale * p).sum()) / 2
        near = float(torch.linalg.vector_norm(p)) <= _NEAR * float(torch.linalg.vector_norm(scale * x)) + 1e-300
        tried = objective.costs(x + p / scale, leaves)
        ratio = (float(f) - tried) / predicted if predicted > 0 else 0.0
        if ratio > 0:  # not of NaN
            x = x + p / scale
            f, g, gram, _ = objective.linearised(x, leaves)
            mu, factor = mu * max(1 / 3, 1 - (2 * ratio - 1) ** 3), 2.0
        else:
            mu, factor = mu * factor, 2 * factor
        if near or predicted <= EPS * float(f) * EPS or float(f) == 0:
            return x, step
    raise ConvergenceError(f"no minimum in {objective.max_iterations} steps", ITERATIONS, other_start("x0"))


@fit_beside_graph
def gauss_newton(
    residual: Callable[..., Tensor],
    x0: Tensor,
    args: tuple = (),
    *,
    group: Any = None,
    max_iterations: int | None = None,
) -> ShardedFit:
    """A minimum of the sum of squares of the residuals of all ranks, differentiable to any order by args.

    Every rank calls it, with the same x0 and a residual of its own rows. Composes with torch.func as `gauss_newton`
    does; what is in args and is the same on all ranks goes through `shared`, and so does x where it enters a part of
    the loss that `total` sums up. vmap solves one problem after the other.

    Args:
        residual: residual(x, *args) -> (m_r,) for x (n,), twice differentiable by torch.func; m_r may be 0.
        x0: (n,) float32 or float64, where the search starts; n up to 500.
        args: a tuple of what the residual depends on besides x, pytrees of tensors; derivatives are taken by these.
        group: of torch.distributed; None for all ranks.
        max_iterations: damped steps; None for 100 (n + 1), at most 2000.

    Returns:
        `ShardedFit(x, residual, info)`.

    Raises:
        TypeError, ValueError: on every rank, where an argument on any rank is none.
        ConvergenceError: no strict minimum was found, or its estimated error is above eps^(1/3), as it is where the
            Jacobian, columns scaled, has a condition number above about 2e5 (on every rank).
        RankError: a rank was lost.

    Cost: for each step n tangents of this rank's residual and one all-reduce of n^2 + 2 n + 1 numbers, and one of a
    number; for each of Newton's, and for each derivative, a dense H, n^2 numbers. Memory: m_r n numbers, and n^2.

    >>> import torch, functional_lstsq as fl
    >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    >>> t = torch.linspace(0, 1, 5, dtype=torch.float64)
    >>> y = 2 * torch.exp(-3 * t)
    >>> fit = fl.distributed.gauss_newton(lambda x, y: x[0] * torch.exp(-x[1] * t) - y, torch.ones(2), (y,))
    >>> fit.x
    tensor([2., 3.], dtype=torch.float64)
    >>> torch.distributed.destroy_process_group()
    """
    ranks = Ranks.of(group)
    device = x0.device if isinstance(x0, Tensor) else torch.device("cpu")
    load_forward_mode()

    def checked() -> tuple[tuple[Callable[..., Tensor], Tensor, list[Tensor], torch.dtype, int], dict[str, object]]:
        check_asked(residual, x0, args, None, max_iterations, "gauss_newton", "x0")
        if len(x0) > _LARGEST:
            raise ValueError(f"x0 must have at most {_LARGEST} numbers over ranks, got {len(x0)}")
        tensors, rebuild = taken_apart(args)
        check_tensors(x0, "x0", tensors)
        doubled = [double(t, "the derivative by args") for t in tensors]
        start = x0.detach().to(torch.float64)
        function, r = closed_residual(lambda x, *t: residual(x, *rebuild(t)), "residual", "x0", start, doubled)
        exact = any(t.dtype == torch.float64 for t in tensors)
        dtype = torch.float64 if exact else x0.dtype
        facts = {"the size of x0": len(x0), "the dtype of the minimum": dtype, "max_iterations": max_iterations}
        facts["x0"] = digest(concrete(start))
        facts["torch.get_num_threads()"] = torch.get_num_threads()
        return (function, start, doubled, dtype, r.shape[0]), facts

    function, start, leaves, dtype, here = ranks.checked(checked, device)
    height = int(ranks.sum(torch.tensor([here], device=device)))
    if height < len(start):
        raise ValueError(
            f"residual must give at least as many numbers on all ranks as x0 has, {len(start)}, got {height}"
        )
    steps = min(100 * (len(start) + 1), _STEPS) if max_iterations is None else max_iterations
    objective = _Objective(lambda x, *t: function(x, *t).to(torch.float64), ranks, steps, EPS ** (1 / 3))
    x, numbers = _Minimum.apply(objective, start, *leaves)
    r = objective.residual(shared_by(x, ranks.name), *leaves)
    iterations, evaluations, optimality, error, condition, cost = numbers.detach().unbind(-1)
    status = torch.full_like(iterations, float(CONVERGED)).to(torch.int64)
    info = FitInfo(
        status_code=status,
        iterations=iterations.to(torch.int64),
        evaluations=evaluations.to(torch.int64),
        optimality=optimality,
        forward_error=error,
        condition=condition,
        cost=cost,
        scale=torch.full_like(cost, torch.nan),
    )
    x, r = (
        convert(x, dtype, "the derivative of x", "raise"),
        convert(r, dtype, "the derivative of the residual", "raise"),
    )
    return ShardedFit(x, r, info)
