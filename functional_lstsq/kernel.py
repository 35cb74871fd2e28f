"""The library operation behind `solve_augmented`: plain tensors in, solution and report out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .errors import DAMP, LEAST_NORM, LEAST_NORM_BY_FACTOR, RankDeficientError
from .holder import Holder, Settings, by_name
from .low_parts import Weighted, low_parts
from .memory import told_as_too_large
from .pattern import SparsePattern, find_pattern
from .products import Operator
from .result import CONVERGED, RANK_DEFICIENT, Report, check, method_code, remember_derivative
from .solvers import CGLS
from .solvers.gram import full_matching
from .solvers.numerics import ldexp, power_of_two
from .solvers.system import System
from .transforms import define
from .verdict import judge_range, settle, tell_zeros

# Numbers in the right-hand sides that are solved for together. Larger blocks do not fit into a cache, and lose where
# temporaries are so large that the system hands out their memory anew each time; a sparse factor gains more than that.
_BLOCK = 2**21
_FACTOR_BLOCK, _FACTOR_COLUMNS = 2**24, 32
_NOTHING = -(2**20)  # stands for the exponent of zero
_LIGHT = 2.0**-40  # of the largest weight: below it a row is left to the second equation
_UNEVEN = 1e8  # ratio of the sizes of rows
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, wanted = values.resolve_conj(), by_name(settings)
    if weights is None:
        return solve_plainly(
            values,
            {"values": (values,)},
            damp,
            b,
            c,
            known,
            token,
            m,
            n,
            wanted,
            on_failure,
            lambda: _system(values, None, damp, indices, m, n, wanted, on_failure),
        )
    _require_finite(token is not None, weights=(weights,))
    if bool((weights < 0).any()):
        raise ValueError(f"weights must not be negative, got {float(weights.min()):g}")
    half = _half_exponent(weights)
    unit, scaled = half[:, :, None], ldexp(weights, -2 * half)
    e, c = (None if t is None else ldexp(t.resolve_conj(), -2 * unit) for t in (e, c))
    shift: Tensor | float = 0.0
    if e is not None and on_failure != LOW:
        # What is already weighted goes to b, divided by the weights; where those are nothing beside others, to c.
        light = (scaled <= _LIGHT)[:, :, None]
        shift = torch.where(light, 0.0, e / torch.where(light, 1.0, scaled[:, :, None]))
        e = torch.where(light, e, 0.0)
        moved = Operator(find_pattern(indices, m, n), values).adjoint(e)
        b, c = (shift if b is None else b + shift), (-moved if c is None else c - moved)
    elif e is not None and b is None and c is None:
        b = torch.zeros_like(e)
    r, x, report, token = solve_plainly(
        values,
        {"values": (values,), "weights": (weights,)},
        damp,
        b,
        c,
        known,
        token,
        m,
        n,
        wanted,
        on_failure,
        lambda: _system(
            values, scaled, ldexp(damp, -half[:, 0]) if damp is not None else None, indices, m, n, wanted, on_failure
        ),
        (unit, e),
    )
    report[:, Report._fields.index("norm")] *= power_of_two(half)
    return r - shift, x, report, token


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
    if on_failure == "raise" and damp is None and not wanted.minimum_norm:
        _require_matching(pattern, wanted)
    operator, precision = Operator(pattern, values), wanted.precision
    return System(operator, damp, precision, extended=wanted.extended, exact=wanted.exact, weights=weights)


def _half_exponent(weights: Tensor) -> Tensor:
    """(P, 1): h for which the largest weight is about 4^h: in its units weights are at most 4."""
    largest = weights.amax(1, keepdim=True) if weights.shape[1] else weights.new_ones((len(weights), 1))
    return torch.where(largest > 0, torch.frexp(largest).exponent // 2, 0)


def solve_plainly(
    like: Tensor,
    numbers: dict[str, tuple[Tensor, ...]],
    damp: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    known: Tensor | None,
    token: Tensor | None,
    m: int,
    n: int,
    wanted: Settings,
    on_failure: str,
    make: Callable[[], System],
    weighted: Weighted | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(r, x, report, token), of plain tensors, for the system that `make` gives and the `numbers` that it is made of.

    Args:
        like: (P, ...), for the dtype and the device.
        weighted: of weighted problems the exponents h (P, 1, 1) of a unit, in whose square weights, c and e are, and
            what b and c do not hold of e.
    """
    copies = like.shape[0]
    k = (b if b is not None else c).shape[2]  # type: ignore[union-attr]
    forward = token is None  # derivatives are given that of the solve they are of
    b = like.new_zeros((copies, m, k)) if b is None else b.resolve_conj()
    c = like.new_zeros((copies, n, k)) if c is None else c.resolve_conj()
    start = known if known is not None and known.shape[1] == n else None
    unknown = None
    if on_failure in ("return", "nan") and token is not None:  # a derivative of what failed
        unknown = ~(b.isfinite().all(1) & c.isfinite().all(1))
        b, c = (torch.where(unknown[:, None], 0.0, t) for t in (b, c)) if bool(unknown.any()) else (b, c)
    _require_finite(token is not None, **numbers, damp=(damp,), b=(b,), c=(c,), x0=(start,))
    if damp is not None and bool((damp < 0).any()):
        raise ValueError(f"damp must not be negative, got {float(damp.min()):g}")
    if not (copies and m and n and k):
        nothing = Report(*(torch.zeros((copies, k), dtype=torch.float64, device=like.device) for _ in Report._fields))
        nothing = nothing._replace(method=nothing.method + method_code("none"))
        return b.clone(), torch.zeros_like(c), torch.stack(list(nothing), 1), torch.zeros(1, dtype=torch.int64)
    keeper, answer = Holder.of(token), "residual_error" if wanted.wide else "solution_error"
    with told_as_too_large():
        system, factors = keeper.prepare(wanted, sum(numbers.values(), ()), damp, make)
        if on_failure == LOW:
            assert known is not None
            unjudged = torch.zeros((copies, len(Report._fields), k), dtype=torch.float64, device=like.device)
            low = low_parts(system, factors, b, c, known, weighted, minimum_norm=wanted.minimum_norm)
            return *low, unjudged, torch.zeros(1, dtype=torch.int64)
        with system.accepting_anything() if on_failure == "accept" else nullcontext():
            more = (weighted, damp, answer if forward else None)
            r, x, report = _solve_in_parts(system, factors, b, c, known, *more)
    if forward and wanted.precision > 1e-10:
        solution = r if wanted.wide else x
        zero = (solution == 0).all(1)
        report = judge_range(report, answer, solution, zero, torch.float32, system.accept)
    report = report._replace(ticket=torch.full_like(report.status, keeper.key))
    keeper.solves += 1
    if keeper.solves > 1 and on_failure != "accept":
        remember_derivative(keeper.key, float(torch.maximum(report.residual_error, report.solution_error).max()))
    if on_failure == "raise":
        by_products = not isinstance(system.A, Operator)
        named = lambda p: _name_columns(factors, p, wanted.wide)  # noqa: E731
        uneven = lambda p: not by_products and _has_uneven_rows(system, p)  # noqa: E731
        check(report, n, system.accept, wanted, by_products, forward, system.d2 is not None, named, uneven)
    elif on_failure != "accept":
        failed = report.status != CONVERGED if on_failure == "nan" else report.status == RANK_DEFICIENT
        failed = failed if unknown is None else failed | unknown
        r, x = (torch.where(failed[:, None], torch.nan, part) for part in (r, x))
    if forward:
        report = tell_zeros(report, answer, system.accept)
    token = keeper.token() if token is None else torch.zeros(1, dtype=torch.int64)
    return r.contiguous(), x.contiguous(), torch.stack(list(report), 1), token


def _solve_in_parts(
    system: System, factors: Any, b: Tensor, c: Tensor, known: Tensor | None, of_weights: Any, *more: Any
) -> tuple[Tensor, Tensor, Report]:
    """(r, x, report), some columns at a time, which bounds the memory."""
    (copies, m, k), n = b.shape, c.shape[1]
    parts, first = [], 0
    while first < k:
        part = slice(first, first + _width(factors, copies * (m + n), k))
        told = None if known is None else known[:, :, part]
        rest = of_weights
        if of_weights is not None and of_weights[1] is not None:
            rest = of_weights[0], of_weights[1][:, :, part]
        parts.append(_solve_block(system, factors, b[:, :, part], c[:, :, part], told, rest, *more))
        first = part.stop
    if len(parts) == 1:
        return parts[0]
    r, x = torch.cat([part[0] for part in parts], 2), torch.cat([part[1] for part in parts], 2)
    return r, x, Report(*(torch.cat(numbers, 1) for numbers in zip(*(part[2] for part in parts), strict=True)))


def _width(factors: Any, rows: int, columns: int) -> int:
    """How many columns to solve for together; a solver that chooses a method is told how many there are in all."""
    if hasattr(factors, "expect"):
        factors = factors.expect(columns)
    width, sparse = max(4, _BLOCK // rows), getattr(factors, "sparse_factor", False)
    return max(width, min(_FACTOR_COLUMNS, _FACTOR_BLOCK // rows)) if sparse else width


def _solve_block(
    system: System,
    factors: Any,
    b: Tensor,
    c: Tensor,
    known: Tensor | None,
    weighted: Weighted | None,
    damp: Tensor | None,
    answer: str | None,
) -> tuple[Tensor, Tensor, Report]:
    """(r, x, report) for some of the columns, scaled to sizes of about 1 on the way.

    Args:
        known: None, a start (P, n, k), or what `describe_primal` gives.
        answer: the error of that part of the solution which users see; None for a derivative.
    """
    size = torch.maximum(_exponent(b), _exponent(c, system.exponents))
    size = torch.where(size > _NOTHING, size, 0)
    given = [ldexp(b, -size), system.rescaled(c, -size, -1)]
    if known is not None and known.shape[1] == system.n:
        start, known = system.rescaled(known, -size, 1), None
        given.append(torch.where(start.isfinite(), start, 0.0))
    r, y, report = factors.solve(*given)
    zeros = (r == 0).all(1), (y == 0).all(1)
    r, x = ldexp(r, size), system.rescaled(y, size, -1)
    for name, part, zero in (("residual_error", r, zeros[0]), ("solution_error", x, zeros[1])):
        report = judge_range(report, name, part, zero, torch.float64, system.accept if name == answer else None)
    return r, x, settle(system, report, r, x, b, known, damp, weighted)


def _exponent(t: Tensor, less: Tensor | None = None) -> Tensor:
    """(P, 1, k): the exponent of the largest number in each column of t / 2^less, `_NOTHING` where all are zero."""
    t = t.abs().amax(1, keepdim=True) if less is None else t.abs()
    exponents = torch.frexp(t).exponent - (0 if less is None else less)
    return torch.where(t == 0, _NOTHING, exponents).amax(1, keepdim=True)


def _require_matching(pattern: SparsePattern, wanted: Settings) -> None:
    """Refuse a pattern for which no values have full rank."""
    n, wide = pattern.shape[1], wanted.wide
    rank, unmatched = pattern.keep("matching", lambda: full_matching(pattern))
    if unmatched >= 0:
        what, other = ("row", "column") if wide else ("column", "row")
        raise RankDeficientError(
            f"A has structural rank {rank}, not full rank {n}: its pattern allows no full rank, whatever the values; "
            f"{what} {unmatched} for one is empty or shares too few {other}s with others",
            LEAST_NORM_BY_FACTOR if isinstance(wanted.solver, CGLS) else LEAST_NORM,
            DAMP,
            f"remove such {what}s",
        )


def _has_uneven_rows(system: System, p: int) -> bool:
    """Whether a square matrix has rows of sizes so different that it may have full rank once they are scaled."""
    if system.m != system.n:
        return False
    sizes = system.A.values[p].abs()
    rows = sizes.new_zeros(system.m).scatter_reduce(0, system.A.pattern.indices[0], sizes, "amax")
    return bool(rows.amax() > _UNEVEN * rows.amin()) and bool(rows.amin() > 0)


def _name_columns(factors: Any, p: int, wide: bool) -> str:
    """Which columns are dependent, as a part of an error message."""
    columns = factors.dependent(p) if hasattr(factors, "dependent") else []
    what, which = "row" if wide else "column", ", ".join(map(str, sorted(columns)))
    if len(columns) == 1:
        return f"; {what} {which} takes part in a dependence"
    return f"; {what}s {which} take part in a dependence" if columns else ""


def _require_finite(derivative: bool, **numbers: tuple[Tensor | None, ...]) -> None:
    for name, tensor in ((name, tensor) for name, tensors in numbers.items() for tensor in tensors):
        # A sum needs no temporary; of large finite numbers it may still overflow.
        if tensor is None or bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all()):
            continue
        if derivative and name in ("b", "c"):
            raise ValueError(
                "what came in for a derivative holds NaN or infinity: the cotangent of the solution, from the loss, or "
                "a tangent of A, b, damp or weights; look at the loss, at sqrt or log of 0 for one"
            )
        raise ValueError(f"{name} of the augmented system holds NaN or infinity (or its derivative does)")


def _solve_fake(values, weights, damp, b, e, c, known, token, indices, m, n, settings, on_failure):
    copies, k = values.shape[0], next(t for t in (b, e, c) if t is not None).shape[2]
    report = values.new_empty((copies, len(Report._fields), k), dtype=torch.float64)
    token = values.new_empty((1,), dtype=torch.int64, device="cpu")
    return values.new_empty((copies, m, k)), values.new_empty((copies, n, k)), report, token


solve_kernel = define(
    "solve(Tensor values, Tensor? weights, Tensor? damp, Tensor? b, Tensor? e, Tensor? c, Tensor? known, "
    "Tensor? token, Tensor indices, SymInt m, SymInt n, str settings, str on_failure) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _solve_kernel,
    _solve_fake,
)
