"""The default: methods in the order of their predicted cost, until one has an answer that is accepted.

What a factor would cost is predicted from the pattern (entries of A^H A, then the operations of its factor) and held
against the cost of iterating; nothing is started that would not fit into memory. A method that does not reach
`accept` is followed by the next, and what was tried is told in `info.tried`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..result import CONVERGED, RANK_DEFICIENT, STATUSES, Report, method_code
from .cgls import CGLS
from .dense import Dense
from .direct import Direct, TooLarge, analyse
from .system import System, check_number

_DENSE_LIMIT = 3200  # columns of a dense factor that are still tolerable where nothing else has succeeded
# Rough speeds on two cores; they decide an order and never an answer.
_FLOPS = 1e10  # operations a second in a factor
_PRODUCTS = 1e8  # multiplications a second in a sparse product of matrices
_ORDERED = 1e6  # entries a second in an ordering
_BYTES = 8e9  # bytes a second in a sparse product with vectors
_PATIENCE = 2000  # iterations whose time a factor may take before iterating is tried first


@dataclass(frozen=True)
class Auto:
    """`Dense` for few columns; else `Direct` or, where its factor would be too much work or memory, `CGLS`.

    Args:
        dense_columns: largest smaller dimension of A that is factored densely.
        dense_bytes: largest memory for the dense factors of a batch.
        cgls, direct: settings of these methods, where they are chosen.
    """

    dense_columns: int = 500
    dense_bytes: int = 2**31
    cgls: CGLS = field(default_factory=CGLS)
    direct: Direct = field(default_factory=Direct)

    def __post_init__(self):
        check_number("dense_columns", self.dense_columns)
        check_number("dense_bytes", self.dense_bytes)
        for name, kind in (("cgls", CGLS), ("direct", Direct)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}(...), got {getattr(self, name)!r}")

    def prepare(self, system: System, *, minimum_norm: bool) -> _Chain:
        """Choose methods; the first is prepared when it is first needed."""
        return _Chain(self.plan(system), system, minimum_norm)

    def plan(self, system: System) -> list[tuple[Any, str]]:
        """Methods in the order to try them, each with the reason for its place."""
        n, copies = system.n, system.copies
        dense_fits = 3 * copies * n**2 * system.A.values.element_size() <= self.dense_bytes
        if n <= self.dense_columns and dense_fits:
            return [(Dense(), "few columns")]
        few = n <= _DENSE_LIMIT and dense_fits
        last = [(Dense(), "last resort")] if few else []
        analysis = analyse(system)
        iteration = 24 * copies * analysis.pattern.nnz / _BYTES + 1e-4
        room = self.direct.room
        if analysis.bytes_before > room:
            return [(self.cgls, "A^H A would not fit into memory"), *last]
        before = copies * analysis.products / _PRODUCTS + min(analysis.products, n**2) / _ORDERED
        if few or before <= _PATIENCE * iteration:
            if few and analysis.fill > n**2 / 4:  # half of what there is to fill
                quick = Dense(orthogonal=False)
                return [(quick, "a factor would be dense"), (self.direct, "ill-conditioned"), *last]
            flops, size = analysis.predicted
            if copies * size > room:
                return [(self.cgls, "a factor would not fit into memory"), *last]
            before += copies * flops / _FLOPS
            if few or before <= _PATIENCE * iteration:
                return [(self.direct, "a factor costs little"), (self.cgls, "no factor"), *last]
        limit = min(self.cgls.max_iterations, int(before / iteration))
        short = replace(self.cgls, max_iterations=limit)
        return [(short, "a factor costs much"), (self.direct, "iterating costs more"), (self.cgls, "no factor"), *last]


class _Chain:
    """Solves by the first method whose answer is accepted; starts with the one that was, last time."""

    def __init__(self, plan: list[tuple[Any, str]], system: System, minimum_norm: bool):
        self.plan, self.system, self.minimum_norm = plan, system, minimum_norm
        self.prepared: dict[int, Any] = {}
        self.failures: dict[int, str] = {}
        self.first = 0

    def solve(self, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Report]:
        """Solve K (r, y) = (b, c) in the scaled unknowns."""
        best = None
        for index in range(self.first, len(self.plan)):
            solver, reason = self.plan[index]
            name = type(solver).__name__
            try:
                if index not in self.prepared:
                    self.prepared = {}  # one factor at a time
                    self.prepared[index] = solver.prepare(self.system, minimum_norm=self.minimum_norm)
                r, y, answer = self.prepared[index].solve(b, c)
            except (torch.linalg.LinAlgError, MemoryError) as error:
                if best is None and index == len(self.plan) - 1:
                    raise
                self.failures[index] = f"{name} ({reason}): {'too large' if isinstance(error, TooLarge) else 'failed'}"
                continue
            settled = _settled(answer)
            done = bool(settled.all())
            worst = "" if done else STATUSES[int(answer.status[~settled].max())]
            tried = [self.failures[i] for i in sorted(self.failures) if i < index] + [f"{name} ({reason})"]
            answer = answer._replace(tried=torch.full_like(answer.status, method_code(", ".join(tried))))
            best = (r, y, answer) if best is None else _better(best, (r, y, answer))
            if done:
                self.first = index
                break
            self.failures[index] = f"{name} ({reason}): {worst}"
        assert best is not None
        return best

    def dependent(self, p: int) -> list[int]:
        """Some columns that take part in a dependence, where the method that was used last knows."""
        known = [factors.dependent(p) for factors in self.prepared.values() if hasattr(factors, "dependent")]
        return known[0] if known else []


def _settled(answer: Report) -> Tensor:
    """A rank below n is a verdict only where the method knows which."""
    return (answer.status == CONVERGED) | ((answer.status == RANK_DEFICIENT) & (answer.rank >= 0))


def _better(old: tuple[Tensor, Tensor, Report], new: tuple[Tensor, Tensor, Report]) -> tuple[Tensor, Tensor, Report]:
    """Column by column: what is settled, else the smaller error."""
    smaller = new[2].solution_error < old[2].solution_error
    take = ~_settled(old[2]) & (_settled(new[2]) | smaller)
    r, y = (torch.where(take[:, None], n, o) for n, o in zip(new[:2], old[:2], strict=True))
    return r, y, Report(*(torch.where(take, n, o) for n, o in zip(new[2], old[2], strict=True)))
