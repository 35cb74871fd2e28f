"""Right-hand sides in blocks of columns, each scaled to sizes of about 1 by powers of two on the way."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..result import Report
from ..solvers.base import Factors
from ..solvers.system import System
from ..solvers.watching import seen_as
from ..sparse.numerics import ldexp
from .verdict import judge_range, settle

# Numbers in the right-hand sides that are solved for together. Larger blocks do not fit into a cache, and lose where
# temporaries are so large that the system hands out their memory anew each time; a sparse factor gains more than that.
_BLOCK = 2**21
_FACTOR_BLOCK, _FACTOR_COLUMNS = 2**24, 32
_NOTHING = -(2**20)  # stands for the exponent of zero


class Asked(NamedTuple):
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


def solve_in_parts(
    system: System, factors: Factors, b: Tensor, c: Tensor, known: Tensor | None, e: Tensor | None, asked: Asked
) -> tuple[Tensor, Tensor, Report]:
    """(r, x, report), some columns at a time, which bounds the memory."""
    copies, n, k = c.shape
    parts: list[tuple[Tensor, Tensor, Report]] = []
    first = 0
    while first < k:
        part = slice(first, first + _width(factors, copies * (system.A.height + n), k))
        told = None if known is None else known[:, :, part]
        rest = None if e is None else e[:, :, part]
        with seen_as(partial(_beside, parts, c if known is None or known.shape[1] != n else known, part.stop)):
            parts.append(_solve_block(system, factors, b[:, :, part], c[:, :, part], told, rest, asked))
        first = part.stop
    if len(parts) == 1:
        return parts[0]
    r, x = torch.cat([part[0] for part in parts], 2), torch.cat([part[1] for part in parts], 2)
    return r, x, Report(*(torch.cat(numbers, 1) for numbers in zip(*(part[2] for part in parts), strict=True)))


def _beside(parts: list[tuple[Tensor, Tensor, Report]], start: Tensor, first: int, x: Tensor) -> Tensor:
    """x of some columns, with those that are there already, and where those begin that come yet."""
    return torch.cat([*[part[1] for part in parts], x, start[:, :, first:]], 2)


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
    asked: Asked,
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
    with seen_as(lambda y: system.scaling.rescaled(y, size, -1)):
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
