"""Bounded least squares as a differentiable function: the active set first, then one solve on the free unknowns.

    x = x_B + y      y_j = 0 on the active set (an infinite damping)      y of least squares for b - A x_B

x_B holds the bounds of the active set, and zero elsewhere. While the set stays, this is all there is to differentiate;
and it stays where each multiplier of a pinned unknown, and each distance of a free one from its bounds, is more than
its error: strict complementarity. Where it fails x has no derivative, and none is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from ..result import CONVERGED, INACCURATE, RANK_DEFICIENT, Report, SolveInfo, html_table, info_rows, of_solve, show
from ..solvers.system import EPS
from ..sparse.matrix import SparseMatrix
from ..sparse.operator import LinearOperator
from ..sparse.precision import convert
from ..torch_func.tracing import concrete, is_traced
from .active_set import ActiveSet, LeftOfShift
from .arguments import Problem
from .augmented import Solve
from .bounded_operator import solve_each_by_products
from .gradient import Static
from .matrix_free import static_of
from .pivoting import at_bounds, farther, report_of_whole, shaken
from .settings import Settings, check_solver, settings_of
from .strict import Judged, Strict


class BoundedInfo(NamedTuple):
    """What is known of a bounded solution: all of `SolveInfo`, by the same names, and what its bounds do.

    Attributes:
        solve: the `SolveInfo` of the solve on the free unknowns, `forward_error` that of the whole of x. `info.status`
            is `info.solve.status`, and so on.
        active: (n,) or (n, k), int64: -1 for an unknown at its lower bound, 1 at its upper one, 0 for a free one. Where
            both are one, the bound that its multiplier pushes against.
        multipliers: (n,) or (n, k): A^T W (b - A x) - damp^2 x where an unknown is at a bound, else 0. Not above zero
            at a lower bound, not below zero at an upper one: half of what the sum of squares falls by as the bound
            rises by one unit.
        weak: (n,) or (n, k), bool: where strict complementarity fails, so that x has no derivative: a multiplier that
            is zero, or a free unknown that touches a bound, to the errors of either.
    """

    solve: SolveInfo
    active: Tensor
    multipliers: Tensor
    weak: Tensor

    def __getattr__(self, name: str) -> Any:
        return of_solve(self, name)

    def __repr__(self) -> str:
        numbers = (f"{name}={show(concrete(getattr(self, name)))}" for name in self._fields[1:])
        return f"BoundedInfo({', '.join(numbers)}, solve={self.solve!r})"

    def _repr_html_(self) -> str:
        active = concrete(self.active)
        counts = ", ".join(f"{int((active == side).sum())} {name}" for side, name in ((-1, "lower"), (1, "upper")))
        return html_table("BoundedInfo", [*info_rows(self.solve), ("at bounds", counts)])


torch_pytree._register_namedtuple(BoundedInfo, serialized_type_name="functional_lstsq.BoundedInfo")


class Found(NamedTuple):
    """A bounded solution as a solve gives it, (1, rows, k), with its numbers (1, fields of `Report`, k)."""

    r: Tensor
    x: Tensor
    numbers: Tensor
    active: Tensor
    multipliers: Tensor
    weak: Tensor

    def told(self, info: SolveInfo, single: bool) -> BoundedInfo:
        """With what is known of the solve; `single` for b (m,)."""
        active, multipliers, weak = (t[0, :, 0] if single else t[0] for t in self[3:])
        return BoundedInfo(info, active.to(torch.int64), multipliers, weak != 0)


class Posed(NamedTuple):
    """A problem that counts as tall, whatever its shape, and its bounds (k, n), in double precision."""

    problem: Problem
    lower: Tensor
    upper: Tensor


def pose_bounds(problem: Problem, bounds: Any, robust: Any) -> Posed:
    """Check what is asked for beside a checked problem: one clear error for each thing that is refused."""
    A, (_, n), b = problem.A, problem.shape, problem.b
    if torch.compiler.is_compiling():
        raise TypeError("torch.compile cannot take bounds=; compile what makes the arguments")
    if A.dtype.is_complex or b.is_complex():
        raise TypeError(f"bounds need real A and b, got {A.dtype} and {b.dtype}")
    if robust is not None:
        raise ValueError("bounds allow no robust=")
    settings = settings_of(problem.settings)
    check_solver(settings.solver, "bounds=")
    if settings.minimum_norm:
        raise ValueError("bounds allow no rank_deficient='minimum_norm'")
    lower, upper = (_bound(problem, name, t) for name, t in zip(("lower", "upper"), pair_of(bounds), strict=True))
    damp = b.new_zeros(()) if problem.damp is None else problem.damp
    settings = replace(settings, wide=False, exact=True)
    # With a damping of each unknown [A; D] is tall, and the solution is the x of the system.
    problem = problem._replace(damp=damp.expand(n), settings=settings)
    return Posed(problem, lower, upper)


def pair_of(bounds: Any) -> tuple[Any, Any]:
    """(lower, upper), of `bounds=`."""
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        got = f"{len(bounds)} of them" if isinstance(bounds, (tuple, list)) else type(bounds).__name__
        raise TypeError(f"bounds must be a pair (lower, upper), got {got}")
    return bounds[0], bounds[1]


def bound_of(name: str, bound: Any, shapes: tuple, device: torch.device, owner: str, on_failure: str) -> Tensor:
    """A bound, in double precision: a number, or a tensor of one of the shapes, on the device of its owner."""
    if isinstance(bound, (int, float)) and not isinstance(bound, bool):
        bound = torch.full((), float(bound), dtype=torch.float64, device=device)
    if not isinstance(bound, Tensor) or bound.layout != torch.strided or bound.is_complex():
        got = f"a tensor of {bound.dtype}, {bound.layout}" if isinstance(bound, Tensor) else repr(bound)
        raise TypeError(f"the {name} bound must be a number or a dense real tensor, got {got}")
    if bound.shape not in shapes:
        wanted = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"the {name} bound must be a number or of shape {wanted}, got {tuple(bound.shape)}")
    if bound.device != device:
        raise ValueError(f"the {name} bound is on {bound.device}, {owner} is on {device}")
    return convert(bound, torch.float64, f"the derivative by the {name} bound", on_failure)


def _bound(problem: Problem, name: str, bound: Any) -> Tensor:
    """(k, n)"""
    (_, n), b, k = problem.shape, problem.b, 1 if problem.b.ndim == 1 else problem.b.shape[1]
    shapes = ((), (n,)) if b.ndim == 1 else ((), (n,), (n, k))
    bound = bound_of(name, bound, shapes, b.device, "A", problem.on_failure)
    return bound.T if bound.ndim == 2 else bound.expand(k, n)


class Ways(NamedTuple):
    """How the problems of a sparse matrix are solved: what a solve is given, and the primitives."""

    static: Static
    active_set: type[ActiveSet]
    strict: Callable[..., tuple[Tensor, Tensor]]


def solve_bounded(posed: Posed, on_failure: str, ways: Ways | None = None) -> Found:
    """The solution; each column of b, with a free set of its own, is a matrix of a batch."""
    problem, lower, upper = posed
    A, (m, n), weights, settings = problem.A, problem.shape, problem.weights, settings_of(problem.settings)
    b = problem.b[:, None] if problem.b.ndim == 1 else problem.b
    k, b = b.shape[1], b.T[:, :, None]
    assert problem.damp is not None
    ways = ways or Ways(Static(m, n, settings, on_failure), ActiveSet, partial(Strict.apply, Judged(on_failure)))
    rest = problem.damp.expand(k, n), b, lower, upper
    of_each = None if weights is None else weights.expand(k, m)
    if isinstance(A, SparseMatrix):
        found, y, report = solve_each(
            ways.static, A.values.expand(k, -1), of_each, *rest, A.pattern.indices, ways.active_set
        )
    else:
        found, y, report = _by_products(A, (m, n), weights, settings, on_failure, *rest)
    r, x, status, active, multipliers, weak = found
    # A free unknown that touches its bound may be beyond it by its error; x has no derivative there.
    inside = torch.minimum(torch.maximum(x, lower[:, :, None]), upper[:, :, None])
    touching = ((weak != 0) & (active == 0))[:, :, None]
    # What it presses with, or would, is less than is known: the others may follow a change of its last digit.
    moved = torch.where(touching, torch.maximum((inside - x).abs(), EPS * x.abs()), 0.0).detach()[:, :, 0]
    x = torch.where(touching, inside, x)
    numbers, refused = report_of_whole(report, y, x, status), weak.any(1) | (status != CONVERGED)
    if isinstance(A, SparseMatrix) and (is_traced(moved) or bool((concrete(moved) != 0).any())):
        values, of_each = A.values.detach().expand(k, -1), None if of_each is None else of_each.detach()
        far = shaken(ways.static, values, of_each, moved, active == 0, A.pattern.indices)
        numbers = farther(numbers, far, x, settings.solver.threshold(settings.precision))
    unknown = Report(*numbers.unbind(1)).status == INACCURATE
    r, x = ways.strict(r, x, weak, refused.to(x.dtype), unknown.to(x.dtype))
    x = torch.where((status == RANK_DEFICIENT)[:, None, None], torch.nan, x)
    columns = (t.movedim(0, -1).reshape(1, t.shape[1], k) for t in (r, x, numbers, active, multipliers, weak))
    return Found(*columns)


def _by_products(
    A: LinearOperator,
    shape: tuple[int, int],
    weights: Tensor | None,
    settings: Settings,
    on_failure: str,
    damp: Tensor,
    b: Tensor,
    lower: Tensor,
    upper: Tensor,
) -> tuple[Found, Tensor, Tensor]:
    """As `solve_each`, of an operator."""
    static, leaves = static_of(A, *shape, settings, on_failure)
    every = [leaf.expand(len(b), *leaf.shape) for leaf in leaves]
    of_each = None if weights is None else weights.expand(len(b), -1)
    found, y, report = solve_each_by_products(static, every, of_each, damp, b, lower, upper)
    return Found(*found), y, report


def solve_each(
    static: Static,
    values: Tensor,
    weights: Tensor | None,
    damp: Tensor,
    b: Tensor,
    lower: Tensor,
    upper: Tensor,
    indices: Tensor,
    active_set: type[ActiveSet] = ActiveSet,
) -> tuple[Found, Tensor, Tensor]:
    """(what is found, with a status (P,) for its numbers; x without its bounds, in parts, (P, n, parts); their report).

    Of P problems: weights (P, m), damp, lower and upper (P, n), b (P, m, 1).
    """
    active, weak, multipliers, status = active_set.apply(static, values, weights, damp, b, lower, upper, indices)
    bound = at_bounds(active, lower, upper)[:, :, None]
    damp = torch.where(active != 0, torch.inf, damp)
    if weights is not None:
        # Where no set was found constraints may have no free unknown, which is refused for a whole batch.
        lost = (status != CONVERGED)[:, None] & weights.isinf()
        weights = torch.where(lost, 1.0, weights)
    right = b - static.multiply(values, bound, indices, exact=True)
    lost = LeftOfShift.apply(static, values, bound, b, right, indices)[0]
    if is_traced(lost) or static.anywhere((concrete(lost) != 0).any()):
        right = torch.cat([right, lost], 2)
    r, _, y, report, _ = Solve.apply(static, values, weights, damp, right, *(None,) * 4, indices, None)
    x = y.sum(2, keepdim=True) + bound
    return Found(r.sum(2, keepdim=True), x, status, active, multipliers, weak), y, report
