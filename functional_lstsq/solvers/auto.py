"""The default: methods in the order of their predicted cost, until one has an answer that is accepted.

What a factor would cost is predicted from the pattern (entries of A^H A, then the operations of its factor) and held
against the cost of iterating; nothing is started that would not fit into memory. A method that does not reach
`accept` is followed by the next, and what was tried is told in `info.tried`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import TooLarge
from ..result import CONVERGED, RANK_DEFICIENT, STATUSES, Report, tried_code
from ..sparse.matrix import SparseMatrix, single
from ..sparse.plain_products import Operator
from ..torch_func.cores import together
from . import costs
from .base import Factors, Solver
from .certificate import Certificate
from .cgls import CGLS
from .dense import Dense, factor_bytes
from .direct import Direct, analyse
from .memory import fits, hand_back, told_as_too_large
from .plan import Prediction, Step
from .system import System, check_number

_QR_LIMIT = 3200  # columns of a dense QR factor that are still tolerable where nothing else has succeeded
FEW_COLUMNS = "few columns"
_PREDICTING = 80, 0.5  # iterations, and seconds of them, from which it is predicted how many there will be
_ENDLESS = 1e300  # iterations, for which there is patience while that is found out
_DENSE = Dense()


@dataclass(frozen=True)
class Auto(Solver):
    """`Dense` for few columns; else `CGLS` while it promises to take less than a factor, then `Direct` or `Dense`.

    Args:
        dense_columns: largest smaller dimension of A that is factored densely.
        dense_bytes: largest memory for the dense factors of a batch; None for half of what is available.
        cgls, direct: settings of these methods, where they are chosen.
        factor: whether to factor wherever the factors fit into memory, and iterating is only a last resort: for factors
            that serve many solves.

    >>> import torch, functional_lstsq as fl
    >>> A = fl.vstack([fl.eye(3), fl.eye(3)])
    >>> fl.solve(A, torch.ones(6), solver=fl.Auto(dense_columns=2)).info.tried
    'Dense (a factor would be dense)'
    """

    dense_columns: int = 500
    dense_bytes: float | None = None
    cgls: CGLS = field(default_factory=CGLS)
    direct: Direct = field(default_factory=Direct)
    factor: bool = False

    def __post_init__(self):
        check_number("dense_columns", self.dense_columns)
        check_number("dense_bytes", self.dense_bytes, optional=True)
        for name, kind in (("cgls", CGLS), ("direct", Direct)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}(...), got {getattr(self, name)!r}")
        if not isinstance(self.factor, bool):
            raise TypeError(f"factor must be True or False, got {self.factor!r}")
        if self.cgls.steps is not None:
            raise ValueError("cgls must have no steps, which stop short of a solution: use solver=CGLS(steps=...)")

    def prepare(self, system: System, *, minimum_norm: bool) -> _Chain:
        """Choose methods; the first is prepared when it is first needed."""
        if system.A.has_entries:
            costs.Lately.of(system.A.pattern).begin()
        return _Chain(self._plan_in_memory(system), system, minimum_norm)

    def plan(self, system: System) -> Iterator[Step]:
        """Methods in the order to try them; what is not asked for is not thought about.

        For a batch as for one of its matrices: times are those of one, memory is that of all.
        """
        n, copies = system.n, system.copies
        device = system.A.device
        room = torch.tensor(fits(factor_bytes(system), self.dense_bytes, device), device=device)
        dense_fits = bool(system.A.everywhere(room))
        if n <= self.dense_columns and dense_fits:
            yield Step(_DENSE, FEW_COLUMNS)
            return
        # A product alone makes no factor. Fewer rows than columns, which are not turned where they are in several
        # places, leave more directions weak than a search for them by a sparse factor finds.
        if not system.A.has_entries or (system.A.height < n and system.damp is None):
            yield Step(self.cgls, "no factor")
            if n <= _QR_LIMIT and dense_fits:
                yield Step(_DENSE, "last resort")
            return
        analysis, places = analyse(system), system.A.places
        (entries, rows, work), bound = analysis.most, min(analysis.products, n**2)
        iteration = costs.products_of_iteration(entries, rows, n) + costs.total(n, places)
        products, each = costs.gram(work), costs.iteration(iteration)
        if system.A.normal_work is not None and self.cgls.preconditioner is None:
            each = costs.iteration_of_one(system.A.normal_work, n)
        dense = products + costs.total(n**2, places) + costs.dense_factor(n) if dense_fits else math.inf
        sparse_fits = analysis.bytes_before <= self.direct.room(places)
        sparse = products + costs.total(bound, places) + costs.ordering(bound) if sparse_fits else math.inf
        factor, tried, why = min(dense, sparse), 0.0, "" if sparse_fits else "A^H A would not fit into memory"
        patience, lately = factor / each, costs.Lately.of(system.A.pattern)
        if places.alone and sparse_fits and lately.tried and lately.spent > costs.ordering(bound):
            flops, size = analysis.predicted
            kept = costs.kept_factor(work, flops, analysis.fill)
            if kept < 2 * lately.last and copies * size <= self.direct.room(places):
                lately.gave_up()
        worth_it = bool(places.least(lately.is_worth_it(1)))
        if not self.factor and costs.PATIENCE < patience < math.inf and worth_it:
            yield Step(self.cgls, "a factor costs more", iteration, each, factor, patience=patience)
            tried = factor
        choice: Dense | Direct | None = Dense(orthogonal=False) if dense_fits else None
        if sparse < dense:
            if not (dense_fits and analysis.fill > n**2 / 4):  # half of what there is to fill
                flops, size = analysis.predicted
                sparse += costs.sparse_factor(flops)
                within = copies * size <= self.direct.room(places)
                choice, why = (self.direct, "") if within else (choice, "a factor would not fit into memory")
            factor = dense if isinstance(choice, Dense) else sparse
        if choice is not None:
            if tried and factor > 4 * tried:
                patience = factor / each
                yield Step(self.cgls, "a factor costs much more", iteration, each, factor, patience=patience)
            why_this = "a factor would be dense" if isinstance(choice, Dense) else "a factor costs less"
            yield Step(choice, why_this, seconds=factor)
            if isinstance(choice, Dense) and sparse_fits:
                yield Step(self.direct, "ill-conditioned")
        yield Step(self.cgls, why or "no factor", iteration, each)
        if n <= _QR_LIMIT and dense_fits:
            yield Step(_DENSE, "last resort")

    def _plan_in_memory(self, system: System) -> Iterator[Step]:
        """As `plan`; what has no memory to be thought about is iterated."""
        try:
            with told_as_too_large():
                yield from self.plan(system)
        except torch.linalg.LinAlgError:
            yield Step(self.cgls, "A^H A could not be analysed")

    def predict(self, A: SparseMatrix | Tensor) -> list[Prediction]:
        """What a solve with A, a SparseMatrix or a torch sparse tensor, would try in turn, with its predicted cost.

        Cost: the analysis of the pattern, which is kept for a solve, and where it would iterate half
            a second of iterations, or 160 if that is longer.

        >>> import torch, functional_lstsq as fl
        >>> [(step.method, step.reason) for step in fl.Auto().predict(torch.eye(3).to_sparse())]
        [('Dense', 'few columns')]
        """
        A = A if isinstance(A, SparseMatrix) else SparseMatrix.from_torch(A)
        single(A, "A")
        if 0 in A.shape:  # there is nothing to do
            return []
        pattern = A.pattern if A.shape[0] >= A.shape[1] else A.pattern.T
        values = A.values.detach().to(torch.promote_types(A.dtype, torch.float64))
        system = System(Operator(pattern, values[None]), None, torch.finfo(A.dtype).eps)
        steps = list(self.plan(system))
        if steps[0].reason == FEW_COLUMNS:  # chosen without a thought of its cost
            seconds = costs.gram(analyse(system).products) + costs.dense_factor(system.n)
            steps = [steps[0]._replace(seconds=seconds)]
        iterations, (least, seconds) = math.nan, _PREDICTING
        if any(step.iterates for step in steps):
            each = next(step.each for step in steps if step.iterates)
            limit = max(least, int(seconds / each))
            iterations = Certificate(system, None, limit=limit, patience=_ENDLESS).expected
        return [step.predicted(iterations) for step in steps]


class _Chain(Factors):
    """Solves by the first method whose answer is accepted; starts with the one that was, last time."""

    def __init__(self, plan: Iterator[Step], system: System, minimum_norm: bool):
        self.plan, self.system, self.minimum_norm = plan, system, minimum_norm
        self.steps: list[Step] = []
        self.prepared: dict[int, Factors] = {}
        self.failures: dict[int, tuple[str, str, str]] = {}
        self.first, self.columns, self.accept = 0, 1, Solver().threshold(system.precision)

    def expect(self, columns: int) -> None:
        """Be told how many right-hand sides there will be: so many may be better left to a factor."""
        self.columns = columns
        step = self._step(self.first)
        if step is not None and step.too_dear(self.prepared.get(self.first), columns):
            step = self._step(self.first + 1)
        self.blockwise = step is not None and isinstance(step.solver, Direct)

    def solve(
        self, b: Tensor, c: Tensor, start: Tensor | None = None, *, judged: bool = True
    ) -> tuple[Tensor, Tensor, Report]:
        """Solve K (r, y) = (b, c) in the scaled unknowns."""
        best = None
        for index in itertools.count(self.first):
            step = self._step(index)
            if step is None:
                break
            said = step.name, step.reason
            try:
                found = self._by(index, step, b, c, start, judged=judged)
            except torch.linalg.LinAlgError as error:
                too_large = isinstance(error, TooLarge)
                # What an attempt with a limit of its own has reached says nothing where the next one has no memory.
                in_vain = best is None or (too_large and isinstance(step.solver, CGLS))
                if in_vain and self._step(index + 1) is None:
                    raise
                self.failures[index] = *said, "too large" if too_large else "failed"
                continue
            if found is None:
                if index in self.prepared:
                    costs.Lately.of(self.system.A.pattern).gave_up(self.columns)
                self.failures[index] = *said, "many right-hand sides"
                self.first = index + 1
                continue
            r, y, answer = found
            self.accept = self.prepared[index].accept
            settled = _settled(answer)
            done = bool(settled.all())
            worst = "" if done else STATUSES[int(answer.status[~settled].max())]
            tried = [self.failures[i] for i in sorted(self.failures) if i < index] + [(*said, "")]
            answer = answer._replace(tried=torch.full_like(answer.status, tried_code(tried)))
            best = (r, y, answer) if best is None else _better(best, (r, y, answer))
            if done:
                self.first = index
                if step.patience < math.inf and answer.status.numel() == 1:
                    costs.Lately.of(self.system.A.pattern).took(float(answer.iterations) * step.each)
                break
            self.failures[index] = *said, worst
            if step.patience < math.inf:
                costs.Lately.of(self.system.A.pattern).gave_up()
        assert best is not None
        return best

    def _by(
        self, index: int, step: Step, b: Tensor, c: Tensor, start: Tensor | None, *, judged: bool
    ) -> tuple[Tensor, Tensor, Report] | None:
        """By one method, which is prepared first; None where so many right-hand sides are left to the next."""
        iterates = isinstance(step.solver, CGLS)
        if index not in self.prepared and step.patience < math.inf and self.columns > 1:
            lately, places = costs.Lately.of(self.system.A.pattern), self.system.A.places
            if not places.least(lately.is_worth_it(self.columns)):
                return None
        for last in (not iterates, True):
            try:
                with told_as_too_large(), nullcontext() if iterates else together():
                    if index not in self.prepared and not step.too_dear(None, self.columns):
                        self.prepared = {}  # one factor at a time
                        self.prepared[index] = step.prepare(self.system, minimum_norm=self.minimum_norm)
                    if step.too_dear(self.prepared.get(index), self.columns):
                        return None
                    return self.prepared[index].solve(b, c, start, judged=judged)
            except TooLarge:
                if last:
                    raise
            hand_back()  # iterating takes little, which earlier attempts may still hold
        raise AssertionError

    def reach(
        self, b: Tensor, c: Tensor, start: Tensor | None, found: tuple[Tensor, Tensor, Report]
    ) -> tuple[Tensor, Tensor, Report]:
        """By the method that was used last."""
        return next((factors.reach(b, c, start, found) for factors in self.prepared.values()), found)

    def _step(self, index: int) -> Step | None:
        while len(self.steps) <= index:
            step = next(self.plan, None)
            if step is None:
                return None
            self.steps.append(step)
        return self.steps[index]

    @property
    def null(self) -> Any:  # type: ignore[override]
        """Of the method that was used last."""
        return next((factors.null for factors in self.prepared.values()), None)

    def dependent(self, p: int) -> list[int]:
        """Of the method that was used last."""
        return next((factors.dependent(p) for factors in self.prepared.values()), [])


def _settled(answer: Report) -> Tensor:
    """A rank below n is a verdict only where the method knows which."""
    return (answer.status == CONVERGED) | ((answer.status == RANK_DEFICIENT) & (answer.rank >= 0))


def _better(old: tuple[Tensor, Tensor, Report], new: tuple[Tensor, Tensor, Report]) -> tuple[Tensor, Tensor, Report]:
    """Column by column: what is settled, else the smaller error."""
    smaller = new[2].solution_error < old[2].solution_error
    take = ~_settled(old[2]) & (_settled(new[2]) | smaller)
    r, y = (torch.where(take[:, None], n, o) for n, o in zip(new[:2], old[:2], strict=True))
    return r, y, Report(*(torch.where(take, n, o) for n, o in zip(new[2], old[2], strict=True)))
