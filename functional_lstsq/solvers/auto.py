"""The default: methods in the order of their predicted cost, until one has an answer that is accepted.

What a factor would cost is predicted from the pattern (entries of A^H A, then the operations of its factor) and held
against the cost of iterating; nothing is started that would not fit into memory. A method that does not reach
`accept` is followed by the next, and what was tried is told in `info.tried`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import TooLarge
from ..matrix import SparseMatrix, single
from ..memory import fits, told_as_too_large
from ..products import Operator
from ..result import CONVERGED, RANK_DEFICIENT, STATUSES, Report, method_code
from .cgls import CGLS, Iteration
from .dense import Dense, factor_bytes
from .direct import Direct, analyse
from .system import System, check_number

_QR_LIMIT = 3200  # columns of a dense QR factor that are still tolerable where nothing else has succeeded
# Rough speeds on two cores; they decide an order and never an answer.
_FLOPS = 2e10  # operations a second in a factor
_PRODUCTS = 1e8  # multiplications a second in a sparse product of matrices
_ORDERED = 1e6  # entries a second in an ordering
_BYTES = 8e9  # bytes a second in a sparse product with vectors
_CALLS = 1e-4  # seconds of an iteration on small problems
_PASSES = 20  # over a dense factor, to use it and to know its condition number
_PATIENCE = 100  # iterations whose time a factor must take for iterating to be tried before it
_SOLVE = 2.2  # times the iterations that find a known solution, in a solve
_FEW = 15  # of these iterations, at least
_ANYWAY = 1e-2  # seconds of any solve, whatever its method
_FEW_COLUMNS = "few columns"
_FACTORED = 4  # iterations that take as long as a solve with a factor


@dataclass(frozen=True)
class Auto:
    """`Dense` for few columns; else `CGLS` while it promises to take less than a factor, then `Direct` or `Dense`.

    Args:
        dense_columns: largest smaller dimension of A that is factored densely.
        dense_bytes: largest memory for the dense factors of a batch; None for half of what is available.
        cgls, direct: settings of these methods, where they are chosen.
    """

    dense_columns: int = 500
    dense_bytes: float | None = None
    cgls: CGLS = field(default_factory=CGLS)
    direct: Direct = field(default_factory=Direct)

    def __post_init__(self):
        check_number("dense_columns", self.dense_columns)
        check_number("dense_bytes", self.dense_bytes, optional=True)
        for name, kind in (("cgls", CGLS), ("direct", Direct)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}(...), got {getattr(self, name)!r}")

    def prepare(self, system: System, *, minimum_norm: bool) -> _Chain:
        """Choose methods; the first is prepared when it is first needed."""
        return _Chain(self._plan_in_memory(system), system, minimum_norm)

    def plan(self, system: System) -> Iterator[_Step]:
        """Methods in the order to try them; what is not asked for is not thought about."""
        n, copies = system.n, system.copies
        dense_fits = fits(factor_bytes(system), self.dense_bytes, system.A.device)
        if n <= self.dense_columns and dense_fits:
            yield _Step(Dense(), _FEW_COLUMNS)
            return
        analysis = analyse(system)
        iteration = (24 * analysis.pattern.nnz + 64 * (system.m + n)) * copies / _BYTES
        products = copies * analysis.products / _PRODUCTS
        dense = products + copies * _dense_factor(n) if dense_fits else math.inf
        sparse_fits = analysis.bytes_before <= self.direct.room
        sparse = products + min(analysis.products, n**2) / _ORDERED if sparse_fits else math.inf
        factor, tried, why = min(dense, sparse), 0.0, "" if sparse_fits else "A^H A would not fit into memory"
        if _PATIENCE * (iteration + _CALLS) < factor < math.inf:
            yield _Step(_Tentative(self.cgls, factor / (iteration + _CALLS)), "a factor costs more", iteration, factor)
            tried = factor
        choice: Dense | Direct | None = Dense(orthogonal=False) if dense_fits else None
        if sparse < dense:
            if not (dense_fits and analysis.fill > n**2 / 4):  # half of what there is to fill
                flops, size = analysis.predicted
                sparse += copies * flops / _FLOPS
                within = copies * size <= self.direct.room
                choice, why = (self.direct, "") if within else (choice, "a factor would not fit into memory")
            factor = dense if isinstance(choice, Dense) else sparse
        if choice is not None:
            if tried and factor > 4 * tried:
                patience = factor / (iteration + _CALLS)
                yield _Step(_Tentative(self.cgls, patience), "a factor costs much more", iteration, factor)
            why_this = "a factor would be dense" if isinstance(choice, Dense) else "a factor costs less"
            yield _Step(choice, why_this, seconds=factor)
            if isinstance(choice, Dense) and sparse_fits:
                yield _Step(self.direct, "ill-conditioned")
        yield _Step(self.cgls, why or "no factor", iteration)
        if n <= _QR_LIMIT and dense_fits:
            yield _Step(Dense(), "last resort")

    def _plan_in_memory(self, system: System) -> Iterator[_Step]:
        """As `plan`; what has no memory to be thought about is iterated."""
        try:
            with told_as_too_large():
                yield from self.plan(system)
        except torch.linalg.LinAlgError:
            yield _Step(self.cgls, "A^H A could not be analysed")

    def predict(self, A: SparseMatrix | Tensor) -> list[Prediction]:
        """What a solve with A, a SparseMatrix or a torch sparse tensor, would try in turn, with its predicted cost.

        Cost: the analysis of the pattern, which is kept for a solve.

        >>> import functional_lstsq as fl
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
        if steps[0].reason == _FEW_COLUMNS:  # chosen without a thought of its cost
            seconds = analyse(system).products / _PRODUCTS + _dense_factor(system.n)
            steps = [steps[0]._replace(seconds=seconds)]
        return [step.prediction for step in steps]


class Prediction(NamedTuple):
    """A method that `Auto` would try, and what it is predicted to cost on two cores, to a factor of a few.

    Attributes:
        method, reason: in words, as `SolveInfo.tried` has them.
        seconds: of a solve by a factor; of iterating, the time after which it is left for a factor. NaN where nothing
            is predicted: what iterating takes in all depends on the values.
        iteration: seconds of one iteration, of a method that iterates; else NaN.
    """

    method: str
    reason: str
    seconds: float
    iteration: float


def _dense_factor(n: int) -> float:
    """Seconds, without those of A^H A."""
    return n**3 / 3 / _FLOPS + 8 * _PASSES * n**2 / _BYTES


@dataclass(frozen=True)
class _Tentative:
    """`CGLS` that gives up when its errors promise more iterations than `patience`."""

    cgls: CGLS
    patience: float

    def prepare(self, system: System, *, minimum_norm: bool) -> Iteration:
        return Iteration(self.cgls, system, self.patience)


class _Step(NamedTuple):
    """A method, why it has its place, and the seconds that an iteration and a factor in its stead would take.

    `seconds` are those of its own factor, where they are known.
    """

    solver: Any
    reason: str
    iteration: float = 0.0
    factor: float = math.inf
    seconds: float = math.nan

    @property
    def prediction(self) -> Prediction:
        iterates = isinstance(self.solver, (CGLS, _Tentative))
        seconds = _ANYWAY + (self.factor if isinstance(self.solver, _Tentative) else self.seconds)
        return Prediction(self.name, self.reason, seconds, self.iteration + _CALLS if iterates else math.nan)

    @property
    def name(self) -> str:
        return "CGLS" if isinstance(self.solver, _Tentative) else type(self.solver).__name__

    def too_dear(self, prepared: Any, columns: int) -> bool:
        """Whether so many right-hand sides are better left to a factor, by the iterations that are known of."""
        if self.factor == math.inf:
            return False
        iterations = _FEW if prepared is None else float(prepared.iterations.max())
        seconds = _SOLVE * iterations * columns * self.iteration / 2
        return seconds > self.factor + _FACTORED * columns * self.iteration


class _Chain:
    """Solves by the first method whose answer is accepted; starts with the one that was, last time."""

    def __init__(self, plan: Iterator[_Step], system: System, minimum_norm: bool):
        self.plan, self.system, self.minimum_norm = plan, system, minimum_norm
        self.steps: list[_Step] = []
        self.prepared: dict[int, Any] = {}
        self.failures: dict[int, str] = {}
        self.first, self.columns = 0, 1

    def expect(self, columns: int) -> Any:
        """Note how many right-hand sides there will be, and give what will solve for them as far as that is known."""
        self.columns = columns
        step = self._step(self.first)
        if step is not None and step.too_dear(self.prepared.get(self.first), columns):
            step = self._step(self.first + 1)
        return self.prepared.get(self.first, step.solver if step else None)

    def solve(self, b: Tensor, c: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor, Report]:
        """Solve K (r, y) = (b, c) in the scaled unknowns."""
        best = None
        for index in itertools.count(self.first):
            step = self._step(index)
            if step is None:
                break
            said = f"{step.name} ({step.reason})"
            try:
                if index not in self.prepared and not step.too_dear(None, self.columns):
                    self.prepared = {}  # one factor at a time
                    with told_as_too_large():
                        self.prepared[index] = step.solver.prepare(self.system, minimum_norm=self.minimum_norm)
                if step.too_dear(self.prepared.get(index), self.columns):
                    self.failures[index] = f"{said}: many right-hand sides"
                    self.first = index + 1
                    continue
                with told_as_too_large():
                    r, y, answer = self.prepared[index].solve(b, c, start)
            except torch.linalg.LinAlgError as error:
                if best is None and self._step(index + 1) is None:
                    raise
                self.failures[index] = f"{said}: {'too large' if isinstance(error, TooLarge) else 'failed'}"
                continue
            settled = _settled(answer)
            done = bool(settled.all())
            worst = "" if done else STATUSES[int(answer.status[~settled].max())]
            tried = [self.failures[i] for i in sorted(self.failures) if i < index] + [said]
            answer = answer._replace(tried=torch.full_like(answer.status, method_code(", ".join(tried))))
            best = (r, y, answer) if best is None else _better(best, (r, y, answer))
            if done:
                self.first = index
                break
            self.failures[index] = f"{said}: {worst}"
        assert best is not None
        return best

    def _step(self, index: int) -> _Step | None:
        while len(self.steps) <= index:
            step = next(self.plan, None)
            if step is None:
                return None
            self.steps.append(step)
        return self.steps[index]

    @property
    def null(self) -> Tensor | None:
        """An orthonormal basis of the null space, if the method that was used last found one."""
        return next((factors.null for factors in self.prepared.values() if hasattr(factors, "null")), None)

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
