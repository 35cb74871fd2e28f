"""The library operation behind `solve_augmented`: plain tensors in, solution and report out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..result import CONVERGED, RANK_DEFICIENT, Report, method_code
from ..solvers.auto import Auto
from ..solvers.base import Factors
from ..solvers.cgls import CGLS
from ..solvers.memory import told_as_too_large
from ..solvers.system import System
from ..sparse.normal_iteration import NormalProducts
from ..sparse.numerics import ldexp, power_of_two
from ..sparse.pattern import find_pattern
from ..sparse.plain_products import Operator
from ..torch_func.cores import alone, together
from ..torch_func.operations import define
from .blocks import Asked, solve_in_parts
from .factor_cache import Holder, is_kept, no_token
from .low_parts import LOW, low_parts, told_as_solution
from .refusals import (
    has_uneven_rows,
    refuse_derivative,
    require_finite,
    require_matching,
    require_not_negative,
    require_solved,
)
from .settings import Settings, settings_of
from .small import solve_small
from .verdict import judge_range, tell_zeros
from .weighting import enter, weigh

_PARALLEL = 2**15  # numbers from which torch's operations take several threads


def _solve_kernel(
    values: Tensor,
    weights: Tensor | None,
    damp: Tensor | None,
    b: Tensor | None,
    e: Tensor | None,
    c: Tensor | None,
    known: Tensor | None,
    token: Tensor | None,
    indices: Tensor,
    m: int,
    n: int,
    settings: str,
    on_failure: str,
) -> tuple[Tensor, ...]:
    if not len(values):  # of an empty batch
        *nothing, made = solve_fake(values, weights, damp, b, e, c, known, token, indices, m, n)
        return *nothing, made.zero_()
    values, wanted = values.resolve_conj(), settings_of(settings)
    given = values, weights, damp, b, e, c, known
    if on_failure != "accept":
        found = solve_small(given, token, indices, m, n, wanted, on_failure, _solve_kernel)
        if found is not None:
            return found

    def make() -> System:
        return _system(values, weights, damp, indices, m, n, wanted, on_failure)

    numbers: dict[str, tuple[Tensor, ...]] = {"values": (values,)}
    if weights is not None:
        numbers["weights"] = (weights,)
    solver = wanted.solver
    iterated = isinstance(solver, CGLS) or (isinstance(solver, Auto) and min(m, n) > solver.dense_columns)
    # One column is iterated by threads of our own.
    columns = next(t for t in (b, e, c) if t is not None).shape[2]
    own = iterated and columns == 1 and values.shape[1] > _PARALLEL and NormalProducts.suit(values)
    if own:
        pattern = find_pattern(indices, m, n)
        _ = pattern.rows, pattern.T.rows  # sorted once, by torch's threads
    with alone() if own else together():
        return solve_plainly(values, numbers, indices, damp, b, e, c, known, token, m, n, wanted, on_failure, make)


def _system(
    values: Tensor,
    weights: Tensor | None,
    damp: Tensor | None,
    indices: Tensor,
    m: int,
    n: int,
    wanted: Settings,
    on_failure: str,
) -> System:
    pattern = find_pattern(indices, m, n)
    if on_failure == "raise" and damp is None and not wanted.minimum_norm and not wanted.stops:
        require_matching(pattern, wanted)
    weighting = None
    if damp is not None and bool(damp.isinf().any()):
        # An unknown that is pinned at zero keeps to itself, as an empty column with a damping of its size.
        pinned = damp.isinf().expand(-1, n)
        largest = values.abs().amax(1, keepdim=True) if values.shape[1] else damp.new_ones((len(values), 1))
        values = torch.where(pinned.gather(1, indices[1].expand(len(values), -1)), 0.0, values)
        damp = torch.where(pinned, torch.where(largest > 0, largest, 1.0), damp)
    if weights is not None:
        weighting = weigh(pattern, values, weights)
        damp = None if damp is None else ldexp(damp, -weighting.half)
    return System(
        Operator(pattern, values),
        damp,
        wanted.precision,
        extended=wanted.extended,
        exact=wanted.exact,
        weighting=weighting,
        tolerance=wanted.tolerance,
    )


def solve_plainly(
    like: Tensor,
    numbers: dict[str, tuple[Tensor, ...]],
    indices: Tensor | None,
    damp: Tensor | None,
    b: Tensor | None,
    e: Tensor | None,
    c: Tensor | None,
    known: Tensor | None,
    token: Tensor | None,
    m: int,
    n: int,
    wanted: Settings,
    on_failure: str,
    make: Callable[[], System],
    height: int = 0,
) -> tuple[Tensor, ...]:
    """(r, s, x, report, token), of plain tensors, for the system that `make` gives and the `numbers` it is made of.

    Without weights s, which is r then, is left empty.

    Args:
        like: (P, ...), for the dtype and the device.
        indices: (2, nnz) of the entries; None of an operator that is known by its products.
        token: None; that of the solve which a derivative is of, whose factors are used; or of factors that a user
            keeps, which are made if there are none yet.
        height: of A, where more rows than the m that are here lie in other places.
    """
    copies, weights = like.shape[0], numbers["weights"][0] if "weights" in numbers else None
    forward = token is None or is_kept(token)
    if wanted.stops and not forward:
        refuse_derivative(wanted)
    of_failures = on_failure in ("return", "nan", LOW) and not forward
    b, e, c, start, unknown, idle = _sides(like, b, e, c, known, m, n, of_failures=of_failures)
    finite = {name: tensors for name, tensors in numbers.items() if name != "weights"}
    require_finite(not forward, **finite, b=(b, e), c=(c,), x0=(start,))
    undetermined = damp == -torch.inf if damp is not None and wanted.wide else None
    if damp is not None and undetermined is not None:
        damp = torch.where(undetermined, torch.inf, damp)
    require_not_negative(damp=damp, weights=weights)
    pinned = None if damp is None else damp.isinf().expand(-1, n)[:, :, None]
    if pinned is not None and bool(pinned.any()):
        c = torch.where(pinned, 0.0, c)
        start = None if start is None else torch.where(pinned, 0.0, start)
    if not (copies and max(m, height) and n and b.shape[2]):
        return _without_unknowns(b, e, c, weights)
    keeper, answer = Holder.of(token), "residual_error" if wanted.wide else "solution_error"
    asked_for = wanted, indices, sum(numbers.values(), ()), damp
    if is_kept(token) and keeper.is_filled and not keeper.serves(*asked_for):
        keeper = Holder()  # other solves find there what the user keeps
    with told_as_too_large():
        system, factors = keeper.prepare(*asked_for, make)
        idle = None if idle is None else system.A.everywhere(idle)
        if on_failure == LOW:
            assert known is not None
            low = low_parts(system, factors, b, e, c, known, minimum_norm=wanted.minimum_norm)
            return told_as_solution(*low, weighted=weights is not None)
        shift: Tensor | float = 0.0
        if system.weights is not None:
            b, e, c, shift = enter(system, b, e, c)
        asked = Asked(damp, answer if forward else None, on_failure != "accept", on_failure == "return" and forward)
        r, x, report = solve_in_parts(system, factors, b, c, known, e, asked)
    if forward and wanted.precision > 1e-10:
        solution = r if wanted.wide else x
        report = judge_range(report, answer, solution, (solution == 0).all(1), torch.float32, factors.accept)
    if undetermined is not None and not wanted.minimum_norm:
        missing = undetermined.sum(1, keepdim=True)
        status = torch.where((missing > 0) & (report.status == CONVERGED), float(RANK_DEFICIENT), report.status)
        report = report._replace(rank=report.rank - missing, status=status)
    if on_failure == "raise":
        _require(system, factors, report, wanted, forward=forward)
    elif on_failure != "accept":
        failed = report.status != CONVERGED if on_failure == "nan" else report.status == RANK_DEFICIENT
        failed = failed if unknown is None else failed | unknown
        r, x = (torch.where(failed[:, None], torch.nan, part) for part in (r, x))
        if idle is not None:
            r, x = (torch.where(idle[:, None], 0.0, part) for part in (r, x))
    if forward:
        report = tell_zeros(report, answer, factors.accept)
    s = r.new_zeros((copies, 0, r.shape[2]))
    if system.weights is not None:
        s, r = system.multiplied(r, e), system.slackened(r) - shift
        report = report._replace(norm=report.norm * power_of_two(system.half))
    if pinned is not None:
        x = torch.where(pinned, 0.0, x)
    return r.contiguous(), s.contiguous(), x.contiguous(), report.packed(), keeper.token() if forward else no_token()


def _sides(
    like: Tensor,
    b: Tensor | None,
    e: Tensor | None,
    c: Tensor | None,
    known: Tensor | None,
    m: int,
    n: int,
    *,
    of_failures: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(b, e, c, start, unknown, idle): right-hand sides in full, where iterating starts, and columns of a derivative.

    A column is `unknown` (P, k) if there are numbers in it that are none, as of a member of a batch that has failed. It
    does no harm if nothing depends on it: then it is `idle`, and zero.
    """
    copies, k = like.shape[0], next(t for t in (b, e, c) if t is not None).shape[2]
    b = like.new_zeros((copies, m, k)) if b is None else b.resolve_conj()
    c = like.new_zeros((copies, n, k)) if c is None else c.resolve_conj()
    e = None if e is None else e.resolve_conj()
    start = known if known is not None and known.shape[1] == n else None
    if not of_failures:
        return b, e, c, start, None, None
    every = [t for t in (b, e, c) if t is not None]
    idle = torch.stack([(t == 0).all(1) for t in every]).all(0)
    unknown = ~torch.stack([t.isfinite().all(1) for t in every]).all(0)
    if bool(unknown.any()):
        b, c = [torch.where(unknown[:, None], 0.0, t) for t in (b, c)]
        e = None if e is None else torch.where(unknown[:, None], 0.0, e)
    return b, e, c, start, unknown, idle


def _require(system: System, factors: Factors, report: Report, wanted: Settings, *, forward: bool) -> None:
    by_products = not system.A.has_entries
    require_solved(
        report,
        system.n,
        factors.accept,
        wanted,
        by_products=by_products,
        forward=forward,
        damped=system.d2 is not None,
        dependent=factors.dependent,
        uneven=lambda p: not by_products and has_uneven_rows(system, p),
    )


def _without_unknowns(b: Tensor, e: Tensor | None, c: Tensor, weights: Tensor | None) -> tuple[Tensor, ...]:
    """As `solve_plainly`, where there is nothing to be solved for: r = b."""
    copies, m, k = b.shape
    nothing = Report.unpacked(torch.zeros(Report.shape(copies, k), dtype=torch.float64, device=b.device))
    nothing = nothing._replace(method=torch.full_like(nothing.method, method_code("none")))
    r, s = b.clone(), b.new_zeros((copies, 0 if weights is None else m, k))
    if weights is not None and s.numel():
        s = weights[:, :, None] * r
        s = s if e is None else s + e
    return r, s, torch.zeros_like(c), nothing.packed(), no_token()


def solve_fake(values, weights, damp, b, e, c, known, token, indices, m, n, *_):
    """Tensors of the shapes and dtypes that `solve_kernel` gives."""
    copies, k = values.shape[0], next(t for t in (b, e, c) if t is not None).shape[2]
    report = values.new_empty(Report.shape(copies, k), dtype=torch.float64)
    token = values.new_empty((1,), dtype=torch.int64, device="cpu")
    sizes = (m, 0 if weights is None else m, n)
    return *(values.new_empty((copies, size, k)) for size in sizes), report, token


solve_kernel = define(
    "solve(Tensor values, Tensor? weights, Tensor? damp, Tensor? b, Tensor? e, Tensor? c, Tensor? known, "
    "Tensor? token, Tensor indices, SymInt m, SymInt n, str settings, str on_failure) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _solve_kernel,
    solve_fake,
)
