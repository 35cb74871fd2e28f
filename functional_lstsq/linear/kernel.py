"""The library operation behind `solve_augmented`: plain tensors in, solution and report out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..result import CONVERGED, RANK_DEFICIENT, Report, method_code
from ..solvers.base import Factors
from ..solvers.memory import told_as_too_large
from ..solvers.system import System
from ..sparse.numerics import ldexp, power_of_two
from ..sparse.pattern import find_pattern
from ..sparse.plain_products import Operator
from ..torch_func.primitive import define
from .factor_cache import Holder, is_kept
from .low_parts import low_parts
from .refusals import has_uneven_rows, refuse_derivative, require_finite, require_matching, require_solved
from .settings import Settings, settings_of
from .verdict import judge_range, settle, tell_zeros
from .weighting import enter, weigh

# Numbers in the right-hand sides that are solved for together. Larger blocks do not fit into a cache, and lose where
# temporaries are so large that the system hands out their memory anew each time; a sparse factor gains more than that.
_BLOCK = 2**21
_FACTOR_BLOCK, _FACTOR_COLUMNS = 2**24, 32
_NOTHING = -(2**20)  # stands for the exponent of zero
LOW = "low"  # in the place of on_failure: what rounding has left out of a solution is asked for


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not len(values):  # of an empty batch
        *nothing, made = _solve_fake(values, weights, damp, b, e, c, known, token, indices, m, n, settings, on_failure)
        return *nothing, made.zero_()
    values, wanted = values.resolve_conj(), settings_of(settings)

    def make() -> System:
        return _system(values, weights, damp, indices, m, n, wanted, on_failure)

    numbers: dict[str, tuple[Tensor, ...]] = {"values": (values,)}
    if weights is not None:
        numbers["weights"] = (weights,)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(r, s, x, report, token), of plain tensors, for the system that `make` gives and the `numbers` it is made of.

    Without weights s, which is r then, is left empty.

    Args:
        like: (P, ...), for the dtype and the device.
        indices: (2, nnz) of the entries; None of an operator that is known by its products.
        token: None; that of the solve which a derivative is of, whose factors are used; or of factors that a user
            keeps, which are made if there are none yet.
        height: of A, where more rows than the m that are here lie in other places.
    """
    copies, weighted = like.shape[0], "weights" in numbers
    k = next(t for t in (b, e, c) if t is not None).shape[2]
    forward = token is None or is_kept(token)
    if wanted.stops and not forward:
        refuse_derivative(wanted)
    b = like.new_zeros((copies, m, k)) if b is None else b.resolve_conj()
    c = like.new_zeros((copies, n, k)) if c is None else c.resolve_conj()
    start = known if known is not None and known.shape[1] == n else None
    e, unknown, idle = None if e is None else e.resolve_conj(), None, None
    if on_failure in ("return", "nan", LOW) and not forward:  # a derivative of what failed
        # A failed member of a batch that nothing depends on does no harm.
        idle = (b == 0).all(1) & (c == 0).all(1) & (True if e is None else (e == 0).all(1))
        unknown = ~(b.isfinite().all(1) & c.isfinite().all(1))
        unknown = unknown if e is None else unknown | ~e.isfinite().all(1)
        if bool(unknown.any()):
            b, c = [torch.where(unknown[:, None], 0.0, t) for t in (b, c)]
            e = None if e is None else torch.where(unknown[:, None], 0.0, e)
    finite = {name: tensors for name, tensors in numbers.items() if name != "weights"}
    require_finite(not forward, **finite, b=(b, e), c=(c,), x0=(start,))
    undetermined = None
    if damp is not None and wanted.wide:
        undetermined = damp == -torch.inf
        damp = torch.where(undetermined, torch.inf, damp)
    for name, tensor in (("damp", damp), *(("weights", t) for t in numbers.get("weights", ()))):
        if tensor is not None and bool((~(tensor >= 0)).any()):
            what = "be NaN" if bool(tensor.isnan().any()) else f"be negative, got {float(tensor.min()):g}"
            raise ValueError(f"{name} must not {what}")
    pinned = None if damp is None else damp.isinf().expand(-1, n)[:, :, None]
    if pinned is not None and bool(pinned.any()):
        c = torch.where(pinned, 0.0, c)
        start = None if start is None else torch.where(pinned, 0.0, start)
    if not (copies and max(m, height) and n and k):
        nothing = Report.unpacked(torch.zeros(Report.shape(copies, k), dtype=torch.float64, device=like.device))
        nothing = nothing._replace(method=torch.full_like(nothing.method, method_code("none")))
        r, s = b.clone(), b.new_zeros((copies, m if weighted else 0, k))
        if s.numel():
            s = numbers["weights"][0][:, :, None] * r
            s = s if e is None else s + e
        return r, s, torch.zeros_like(c), nothing.packed(), torch.zeros(1, dtype=torch.int64, device="cpu")
    keeper, answer = Holder.of(token), "residual_error" if wanted.wide else "solution_error"
    asked_for = wanted, indices, sum(numbers.values(), ()), damp
    if is_kept(token) and keeper.factors is not None and not keeper.serves(*asked_for):
        keeper = Holder()  # other solves find there what the user keeps
    with told_as_too_large():
        system, factors = keeper.prepare(*asked_for, make)
        idle = None if idle is None else system.A.everywhere(idle)
        if on_failure == LOW:
            assert known is not None
            unjudged = torch.zeros(Report.shape(copies, k), dtype=torch.float64, device=like.device)
            low_s, low_x = low_parts(system, factors, b, e, c, known, minimum_norm=wanted.minimum_norm)
            empty = low_s.new_zeros((copies, m if weighted else 0, k))
            return low_s, empty, low_x, unjudged, torch.zeros(1, dtype=torch.int64, device="cpu")
        shift: Tensor | float = 0.0
        if system.weights is not None:
            b, e, c, shift = enter(system, b, e, c)
        asked = _Asked(damp, answer if forward else None, on_failure != "accept", on_failure == "return" and forward)
        r, x, report = _solve_in_parts(system, factors, b, c, known, e, asked)
    if forward and wanted.precision > 1e-10:
        solution = r if wanted.wide else x
        zero = (solution == 0).all(1)
        report = judge_range(report, answer, solution, zero, torch.float32, factors.accept)
    if undetermined is not None and not wanted.minimum_norm:
        missing = undetermined.sum(1, keepdim=True)
        status = torch.where((missing > 0) & (report.status == CONVERGED), float(RANK_DEFICIENT), report.status)
        report = report._replace(rank=report.rank - missing, status=status)
    if on_failure == "raise":
        by_products = not system.A.has_entries
        require_solved(
            report,
            n,
            factors.accept,
            wanted,
            by_products=by_products,
            forward=forward,
            damped=system.d2 is not None,
            dependent=factors.dependent,
            uneven=lambda p: not by_products and has_uneven_rows(system, p),
        )
    elif on_failure != "accept":
        failed = report.status != CONVERGED if on_failure == "nan" else report.status == RANK_DEFICIENT
        failed = failed if unknown is None else failed | unknown
        r, x = (torch.where(failed[:, None], torch.nan, part) for part in (r, x))
        if idle is not None:
            r, x = (torch.where(idle[:, None], 0.0, part) for part in (r, x))
    if forward:
        report = tell_zeros(report, answer, factors.accept)
    token = keeper.token() if forward else torch.zeros(1, dtype=torch.int64, device="cpu")
    s = r.new_zeros((copies, 0, k))
    if system.weights is not None:
        s, r = system.multiplied(r, e), system.slackened(r) - shift
        report = report._replace(norm=report.norm * power_of_two(system.half))
    if pinned is not None:
        x = torch.where(pinned, 0.0, x)
    return r.contiguous(), s.contiguous(), x.contiguous(), report.packed(), token


class _Asked(NamedTuple):
    """What a solve is for.

    Attributes:
        answer: the error of that part of the solution which users see; None for a derivative.
        judged: whether errors matter.
        reached: whether what failed is given as far as it came.
    """

    damp: Tensor | None
    answer: str | None
    judged: bool
    reached: bool


def _solve_in_parts(
    system: System, factors: Factors, b: Tensor, c: Tensor, known: Tensor | None, e: Tensor | None, asked: _Asked
) -> tuple[Tensor, Tensor, Report]:
    """(r, x, report), some columns at a time, which bounds the memory."""
    copies, n, k = c.shape
    parts, first = [], 0
    while first < k:
        part = slice(first, first + _width(factors, copies * (system.A.height + n), k))
        told = None if known is None else known[:, :, part]
        rest = None if e is None else e[:, :, part]
        parts.append(_solve_block(system, factors, b[:, :, part], c[:, :, part], told, rest, asked))
        first = part.stop
    if len(parts) == 1:
        return parts[0]
    r, x = torch.cat([part[0] for part in parts], 2), torch.cat([part[1] for part in parts], 2)
    return r, x, Report(*(torch.cat(numbers, 1) for numbers in zip(*(part[2] for part in parts), strict=True)))


def _width(factors: Factors, rows: int, columns: int) -> int:
    """How many columns to solve for together; a solver that chooses a method is told how many there are in all."""
    factors.expect(columns)
    width = max(4, _BLOCK // rows)
    return max(width, min(_FACTOR_COLUMNS, _FACTOR_BLOCK // rows)) if factors.blockwise else width


def _solve_block(
    system: System,
    factors: Factors,
    b: Tensor,
    c: Tensor,
    known: Tensor | None,
    e: Tensor | None,
    asked: _Asked,
) -> tuple[Tensor, Tensor, Report]:
    """(r, x, report) for some of the columns, scaled to sizes of about 1 on the way.

    Args:
        known: None, a start (P, n, k), or what `describe_primal` gives.
    """
    size = torch.maximum(_exponent(system.A.largest(b)[:, None]), _exponent(c, system.scaling.exponents))
    size = torch.where(size > _NOTHING, size, 0)
    start = None
    if known is not None and known.shape[1] == system.n:
        start, known = system.scaling.rescaled(known, -size, 1), None
        start = torch.where(start.isfinite(), start, 0.0)
    right = ldexp(b, -size), system.scaling.rescaled(c, -size, -1), start
    found = factors.solve(*right, judged=asked.judged)
    r, y, report = factors.reach(*right, found) if asked.reached else found
    zeros = system.A.largest(r) == 0, (y == 0).all(1)
    r, x = ldexp(r, size), system.scaling.rescaled(y, size, -1)
    for name, part, zero, rows in (("residual_error", r, zeros[0], system.A), ("solution_error", x, zeros[1], None)):
        accept = factors.accept if asked.judged and name == asked.answer else None
        report = judge_range(report, name, part, zero, torch.float64, accept, rows)
    return r, x, settle(system, report, factors.accept, r, x, b, known if asked.judged else None, asked.damp, e)


def _exponent(t: Tensor, less: Tensor | None = None) -> Tensor:
    """(P, 1, k): the exponent of the largest number in each column of t / 2^less, `_NOTHING` where all are zero."""
    t = t.abs().amax(1, keepdim=True) if less is None else t.abs()
    exponents = torch.frexp(t).exponent - (0 if less is None else less)
    return torch.where(t == 0, _NOTHING, exponents).amax(1, keepdim=True)


def _solve_fake(values, weights, damp, b, e, c, known, token, indices, m, n, settings, on_failure):
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
    _solve_fake,
)
