"""The library operation behind `solve_augmented`: plain tensors in, solution and report out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .holder import Holder, Settings, by_name
from .pattern import SparsePattern, find_pattern
from .products import Operator
from .result import (
    CONVERGED,
    INACCURATE,
    RANK_DEFICIENT,
    SPOILT,
    RankDeficientError,
    Report,
    check,
    least_norm,
    method_code,
    remember_derivative,
)
from .solvers import CGLS
from .solvers.gram import full_matching
from .solvers.system import System, norm, power_of_two
from .transforms import define

# Numbers in the right-hand sides that are solved for together. Larger blocks do not fit into a cache, and lose where
# temporaries are so large that the system hands out their memory anew each time; a sparse factor gains more than that.
_BLOCK = 2**21
_FACTOR_BLOCK, _FACTOR_COLUMNS = 2**24, 32


def _solve_kernel(
    values: Tensor,
    damp: Tensor | None,
    b: Tensor | None,
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

    def make() -> System:
        pattern = find_pattern(indices, m, n)
        if on_failure == "raise" and damp is None and not wanted.minimum_norm:
            _require_matching(pattern, wanted)
        return System(Operator(pattern, values), damp, wanted.precision, extended=wanted.extended, exact=wanted.exact)

    return solve_plainly(values, {"values": (values,)}, damp, b, c, known, token, m, n, wanted, on_failure, make)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(r, x, report, token), of plain tensors, for the system that `make` gives and the `numbers` that it is made of.

    Args:
        like: (P, ...), for the dtype and the device.
    """
    copies = like.shape[0]
    k = (b if b is not None else c).shape[2]  # type: ignore[union-attr]
    # Of an adjoint solve the other part is what the user sees.
    forward = (b if wanted.wide else c) is None and (known is None or known.shape[1] == n)
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
    keeper = Holder.of(token)
    system, factors = keeper.prepare(wanted, sum(numbers.values(), ()), damp, make)
    parts, first = [], 0
    with system.accepting_anything() if on_failure == "accept" else nullcontext():
        while first < k:
            part = slice(first, first + _width(factors, copies * (m + n), k))
            told = None if known is None else known[:, :, part]
            parts.append(_solve_block(system, factors, b[:, :, part], c[:, :, part], told))
            first = part.stop
    r, x, report = parts[0]
    if len(parts) > 1:
        r, x = torch.cat([part[0] for part in parts], 2), torch.cat([part[1] for part in parts], 2)
        report = Report(*(torch.cat(numbers, 1) for numbers in zip(*(part[2] for part in parts), strict=True)))
    if forward and wanted.precision > 1e-10:
        report = _rounded(report, r if wanted.wide else x, "residual_error" if wanted.wide else "solution_error")
    report = report._replace(ticket=torch.full_like(report.status, keeper.key))
    keeper.solves += 1
    if keeper.solves > 1 and on_failure != "accept":
        remember_derivative(keeper.key, float(torch.maximum(report.residual_error, report.solution_error).max()))
    if on_failure == "raise":
        by_products = not isinstance(system.A, Operator)
        check(report, n, system.accept, wanted, by_products, lambda p: _name_columns(factors, p, wanted.wide))
    elif on_failure != "accept":
        failed = report.status != CONVERGED if on_failure == "nan" else report.status == RANK_DEFICIENT
        failed = failed if unknown is None else failed | unknown
        r, x = (torch.where(failed[:, None], torch.nan, part) for part in (r, x))
    token = keeper.token() if token is None else torch.zeros(1, dtype=torch.int64)
    return r.contiguous(), x.contiguous(), torch.stack(list(report), 1), token


def _width(factors: Any, rows: int, columns: int) -> int:
    """How many columns to solve for together; a solver that chooses a method is told how many there are in all."""
    if hasattr(factors, "expect"):
        factors = factors.expect(columns)
    width, sparse = max(4, _BLOCK // rows), getattr(factors, "sparse_factor", False)
    return max(width, min(_FACTOR_COLUMNS, _FACTOR_BLOCK // rows)) if sparse else width


def _solve_block(
    system: System, factors: Any, b: Tensor, c: Tensor, known: Tensor | None
) -> tuple[Tensor, Tensor, Report]:
    """(r, x, report) for some of the columns, scaled to sizes of about 1 on the way.

    Args:
        known: None, a start (P, n, k), or what `describe_primal` gives.
    """
    scaled = c / system.scale
    size = torch.maximum(b.abs().amax(1, keepdim=True), scaled.abs().amax(1, keepdim=True))
    size = power_of_two(torch.frexp(size).exponent)
    if known is not None and known.shape[1] == system.n:
        start = known * system.scale / size
        r, y, report = factors.solve(b / size, scaled / size, torch.where(start.isfinite(), start, 0.0))
        known = None
    else:
        r, y, report = factors.solve(b / size, scaled / size)
    r, x = r * size, y / system.scale * size
    return r, x, _settle(system, report, r, x, b, known)


def _require_matching(pattern: SparsePattern, wanted: Settings) -> None:
    """Refuse a pattern for which no values have full rank."""
    n, wide = pattern.shape[1], wanted.wide
    rank, unmatched = pattern.keep("matching", lambda: full_matching(pattern))
    if unmatched >= 0:
        what = "row" if wide else "column"
        raise RankDeficientError(
            f"A has structural rank {rank}, not full rank {n}: its pattern allows no full rank, whatever the values; "
            f"{what} {unmatched} for one is empty or shares too few {'column' if wide else 'row'}s with others. Pass "
            f"{least_norm(isinstance(wanted.solver, CGLS))} for the solution of least norm, or damp > 0, or remove "
            f"such {what}s"
        )


def _name_columns(factors: Any, p: int, wide: bool) -> str:
    """Which columns are dependent, as a part of an error message."""
    columns = factors.dependent(p) if hasattr(factors, "dependent") else []
    what, which = "row" if wide else "column", ", ".join(map(str, sorted(columns)))
    if len(columns) == 1:
        return f"; {what} {which} takes part in a dependence"
    return f"; {what}s {which} take part in a dependence" if columns else ""


def _rounded(report: Report, solution: Tensor, name: str) -> Report:
    """Claims, given that the solution will be rounded to a single precision whose range it may leave."""
    single = torch.finfo(torch.float32)
    lost = single.smallest_normal * single.eps * solution.shape[1] ** 0.5 / norm(solution).clamp_min(1e-300)
    overflown = solution.abs().amax(1) > single.max
    error = getattr(report, name) + torch.where(solution.abs().amax(1) > 0, lost, 0.0)
    status = torch.where(overflown & (report.status == CONVERGED), float(INACCURATE), report.status)
    return report._replace(status=status, **{name: torch.where(overflown, torch.inf, error)})


def _settle(system: System, report: Report, r: Tensor, x: Tensor, b: Tensor, primal: Tensor | None) -> Report:
    """The verdict on a solution, given what it is for.

    Numbers that overflowed are no success, whatever the solver says. What an adjoint solve l is for is the gradient
    -(l_r x^H + r l_x^H) at the stored entries, by the errors of l and of the `primal` (r, x):

      - a gradient that these errors may spoil is refused, though l itself is right: x may be right in its norm and not
        in those entries that the gradient needs;
      - a gradient that they cannot spoil is accepted, though l_x is wrong: that of |residual|^2 has l_x = 0.

    Args:
        primal: see `describe_primal`.
    """
    if primal is not None:
        judged, relaxed, error_of_r, error_of_x = primal[:, :4].unbind(1)
        of_r, of_x = primal[:, 4 : 4 + system.m], primal[:, 4 + system.m :]
        size_r = norm(r)
        error_r = torch.where(size_r > 0, report.residual_error * size_r, 0.0)
        error_x = torch.where(x.abs().amax(1) > 0, report.solution_error * norm(x), 0.0)
        pattern, copies = system.A.pattern, system.copies
        stored = Operator(pattern, of_r.new_ones((1, pattern.nnz)).expand(copies, -1))
        first = (r.abs().square() * stored.matmul(of_x.square())).sum(1).sqrt()  # |l_r x^H| at the stored entries
        second = (of_r.square() * stored.matmul(x.abs().square())).sum(1).sqrt()
        # A gradient that is zero but for rounding is as right as can be.
        zero = size_r * norm(of_r) / report.norm.clamp_min(1e-300)
        error = error_r * norm(of_x) + error_x * norm(of_r)
        allowed = system.accept * torch.maximum(first + second, system.accept * zero)
        useful = (relaxed > 0) & (error <= system.accept * first)
        useful &= error_r <= system.accept * torch.maximum(size_r, system.accept * norm(b))
        spoilt = (judged > 0) & ~(error + error_of_x * size_r + error_of_r * norm(x) <= allowed)
        status = torch.where(useful & (report.status == INACCURATE), float(CONVERGED), report.status)
        status = torch.where(spoilt & (report.status == CONVERGED), float(SPOILT), status)
        report = report._replace(status=status)
    finite = torch.isfinite(r.sum(1)) & torch.isfinite(x.sum(1))  # without a temporary of that size
    status = torch.where(~finite & (report.status == CONVERGED), float(INACCURATE), report.status)
    none = ~finite | (status == RANK_DEFICIENT)
    return report._replace(
        status=status,
        residual_error=torch.where(none, torch.inf, report.residual_error),
        solution_error=torch.where(none, torch.inf, report.solution_error),
        condition=torch.where(status == RANK_DEFICIENT, torch.inf, report.condition),
    )


def describe_primal(r: Tensor, x: Tensor, report: Tensor, *, relaxed: bool) -> Tensor:
    """(P, 4 + m + n, k): what an adjoint solve is to know of the solution (r, x), in one tensor.

    Whether the gradient is to be judged (without full rank there is more to it), whether it may be accepted for itself,
    estimated errors of r and x; |r|, |x|.
    """
    report, r, x = report.detach(), r.detach().abs(), x.detach().abs()
    fields = Report._fields
    full = report[:, None, fields.index("rank")] >= x.shape[1]
    rows = [full.to(x.dtype), torch.full_like(x[:, :1], float(relaxed))]
    for size, name in ((r, "residual_error"), (x, "solution_error")):
        whole = torch.linalg.vector_norm(size, dim=1, keepdim=True)
        # In double precision, whatever the user's own, whose rounding the estimate includes.
        error = report[:, None, fields.index(name)] - report[:, None, fields.index("rounding")]
        rows.append(torch.where(whole > 0, error * whole, 0.0))
    return torch.cat([*rows, r, x], 1)


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


def _solve_fake(values, damp, b, c, known, token, indices, m, n, settings, on_failure):
    copies, k = values.shape[0], (b if b is not None else c).shape[2]
    report = values.new_empty((copies, len(Report._fields), k), dtype=torch.float64)
    token = values.new_empty((1,), dtype=torch.int64, device="cpu")
    return values.new_empty((copies, m, k)), values.new_empty((copies, n, k)), report, token


solve_kernel = define(
    "solve(Tensor values, Tensor? damp, Tensor? b, Tensor? c, Tensor? known, Tensor? token, Tensor indices, SymInt m, "
    "SymInt n, str settings, str on_failure) -> (Tensor, Tensor, Tensor, Tensor)",
    _solve_kernel,
    _solve_fake,
)
