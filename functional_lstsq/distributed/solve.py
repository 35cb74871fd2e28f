"""A linear solve over ranks: the augmented system of `linear.augmented`, of which each rank has some of the rows.

    r + A x = b          A^H s - d^2 x = c          s = W r + e          W = diag(weights)

One sum over ranks is in it, A^H s. b, e, r, s, the values of A and weights are a rank's own; x, c and d are the same on
all ranks. So its primitive and the rules are those of `linear.augmented`, on products with `shared` where something
that is the same on all ranks meets a rank's rows, and with `total` for A^H s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..linear.arguments import Problem, pose
from ..linear.augmented import Solve
from ..linear.factor_cache import Holder, no_token
from ..linear.gradient import Static
from ..linear.kernel import solve_plainly
from ..linear.low_parts import LOW
from ..linear.settings import Settings
from ..result import Report, Solution, info_of
from ..solvers import CGLS, Auto, Dense
from ..solvers.system import System, Weighting
from ..sparse.matrix import SparseMatrix
from ..sparse.numerics import ldexp
from ..sparse.pattern import SparsePattern, find_pattern
from ..sparse.plain_products import Operator
from ..sparse.precision import convert
from ..sparse.products import multiply, sample
from ..torch_func.cores import steady
from ..torch_func.tracing import concrete
from .collectives import shared_by, total_of
from .matrix import ShardedMatrix
from .products import RowsOverRanks
from .ranks import Ranks, digest

_GONE = 0  # a token that no factors have


@dataclass(frozen=True)
class _Static(Static):
    whole: int  # rows on all ranks
    ranks: Ranks

    @property
    def height(self) -> int:
        return self.whole

    def solve(self, tensors: list[Tensor | None], token: Tensor | None, indices: Tensor) -> tuple[Tensor, ...]:
        return _solved(self, [None if t is None else t.resolve_conj() for t in tensors], token, indices)

    def multiply(self, values: Tensor, X: Tensor, indices: Tensor, **how: bool) -> Tensor:
        if how.get("adjoint"):
            return self.total(multiply(values, X, indices, self.m, self.n, **how))
        return multiply(values, self.shared(X), indices, self.m, self.n, **how)

    def left_out(self, values: Tensor, X: Tensor, product: Tensor, indices: Tensor) -> Tensor:
        return torch.zeros_like(product)

    def sample(self, U: Tensor, W: Tensor, indices: Tensor) -> Tensor:
        return sample(U, self.shared(W), indices, self.m, self.n)

    def total(self, t: Tensor) -> Tensor:
        return total_of(t, self.ranks.name)

    def shared(self, t: Tensor) -> Tensor:
        return shared_by(t, self.ranks.name)


@steady()
def _solved(static: _Static, tensors: Sequence[Any], token: Tensor | None, indices: Tensor) -> tuple[Tensor, ...]:
    """What `solve_plainly` gives, on ranks that have agreed on what is theirs together, before and after."""
    values, weights, damp, b, e, c, known = tensors
    if not len(values):  # of an empty batch
        k = next(t for t in (b, e, c) if t is not None).shape[2]
        sizes = (static.m, 0 if weights is None else static.m, static.n)
        report = values.new_empty(Report.shape(0, k), dtype=torch.float64)
        return *(values.new_empty((0, size, k)) for size in sizes), report, no_token()
    ranks, wanted, device = static.ranks, static.settings, values.device
    numbers: dict[str, tuple[Tensor, ...]] = {"values": (values,)}
    if weights is not None:
        numbers["weights"] = (weights,)
    columns = {"b": b, "e": e, "c": c}
    lenient = token is not None and static.on_failure != "raise"  # of a derivative, what failed is NaN there

    def check() -> tuple[None, Mapping[str, object]]:
        found = {"A": values, "weights": weights} if lenient else {"A": values, "weights": weights, **columns}
        for name, t in found.items():
            if t is not None and not bool(t.isfinite().all()):
                what = f"{name} of the augmented system" if token is None else "what came in for a derivative"
                raise ValueError(f"{what} holds NaN or infinity")
        given = {name: None if t is None else (len(t), t.shape[2]) for name, t in columns.items()}
        start = known if known is not None and known.shape[1] == static.n else None
        alike = {"x0": start, "damp": damp, "the cotangent of x, which is shared, or the tangent of damp": c}
        facts = {"what is solved for": (given, wanted), "torch.get_num_threads()": torch.get_num_threads()}
        return None, facts | {name: digest(t) for name, t in alike.items()}

    ranks.checked(check, device)
    everything = RowsOverRanks(Operator(find_pattern(indices, static.m, static.n), values), ranks, static.whole)
    unknown = None
    if lenient:
        finite = [t.isfinite().all(1) for t in columns.values() if t is not None]
        unknown = ~everything.everywhere(torch.stack(finite).all(0))
        b, e, c = (None if t is None else torch.where(unknown[:, None], 0.0, t) for t in columns.values())
    if token is not None:
        # Another rank's values may have been changed in place since, and it makes factors anew.
        serves = Holder.of(token).serves(wanted, indices, sum(numbers.values(), ()), damp)
        if not bool(everything.everywhere(torch.tensor(serves, device=device))):
            token = torch.full((1,), _GONE, dtype=torch.int64, device="cpu")
    r, s, x, report, token = solve_plainly(
        values, numbers, indices, damp, b, e, c, known, token, static.m, static.n, wanted, static.on_failure,
        lambda: _system(everything, weights, damp, wanted), height=static.whole,
    )  # fmt: skip
    ranks.checked(lambda: (None, {"the solution": digest(x), "its report": digest(report)}), device)
    if unknown is not None and static.on_failure != LOW:
        r, s, x = (torch.where(unknown[:, None], torch.nan, t) for t in (r, s, x))
    return r, s, x, report, token


def _system(everything: RowsOverRanks, weights: Tensor | None, damp: Tensor | None, wanted: Settings) -> System:
    weighting = None
    if weights is not None:
        largest = everything.largest(weights[:, :, None])
        half = torch.where(largest > 0, torch.frexp(largest).exponent // 2, 0)
        weighting = Weighting(ldexp(weights, -2 * half), half, None)
        damp = None if damp is None else ldexp(damp, -half)
    return System(
        everything, damp, wanted.precision, exact=wanted.exact, weighting=weighting, tolerance=wanted.tolerance
    )


def solve_sharded(
    A: ShardedMatrix,
    b,
    damp,
    weights,
    robust,
    solver,
    rank_deficient,
    refine,
    x0,
    rank_tolerance,
    bounds,
    *,
    throw: bool,
) -> Solution:
    """`solve` for a sharded matrix; arguments are checked on all ranks together, before any work."""

    def checked() -> tuple[tuple[Problem, Settings], Mapping[str, object]]:
        _refuse(A, damp, robust, solver, rank_deficient, bounds)
        given = pose(
            A.rows, b, damp, weights, None, solver, "raise", refine, x0,
            rank_tolerance=rank_tolerance, throw=throw, part=True,
        )  # fmt: skip
        if given.stops:
            raise ValueError(f"a sharded matrix needs solutions, and solver={solver!r} stops short of them")
        for name, t in (("damp", given.damp), ("weights", given.weights)):
            if t is not None and bool(concrete(t).isinf().any()):
                raise ValueError(f"{name} must be finite for a sharded matrix, got infinity in it")
        # A rank may have fewer rows than columns, without the matrix being wide.
        settings = Settings(
            solver, False, torch.finfo(given.dtype).eps, extended=refine == "extended", tolerance=rank_tolerance
        )
        facts = {
            "the dtype of the solution": given.dtype,
            "solver, refine and rank_tolerance": settings,
            "the columns of b": tuple(b.shape[1:]),
            "the shape of damp": None if given.damp is None else tuple(given.damp.shape),
            "whether there are weights": weights is not None,
            "whether there is x0": x0 is not None,
            "throw": throw,
        }
        return (given, settings), facts

    problem, settings = A.ranks.checked(checked, A.device)
    assert isinstance(problem.A, SparseMatrix)
    columns, of_rows = problem.b, None if problem.weights is None else problem.weights[None]
    columns = columns[None] if columns.ndim == 2 else columns[None, :, None]
    start = None if problem.x0 is None else problem.x0.reshape(1, problem.x0.shape[0], columns.shape[2])
    damps = None if problem.damp is None else problem.damp.reshape(1, -1)
    pattern: SparsePattern = A.rows.pattern
    static = _Static(*pattern.shape, settings, "raise" if throw else "return", A.height, A.ranks)
    r, _, x, numbers, _ = Solve.apply(
        static, problem.A.values[None], of_rows, damps, columns, None, None, start, None, pattern.indices, None
    )
    single = problem.b.ndim == 1
    info = info_of(Report.unpacked(numbers), wide=False, single=single)

    def rounded(t: Tensor, name: str) -> Tensor:
        t = t[0, :, 0] if single else t[0]
        return convert(t, problem.dtype, f"the derivative of {name}", problem.on_failure)

    return Solution(rounded(x, "x"), rounded(r, "the residual"), info)


def _refuse(A: ShardedMatrix, damp: Any, robust: Any, solver: Any, rank_deficient: Any, bounds: Any) -> None:
    """What a sharded matrix cannot do."""
    for name, got in (("robust", robust), ("bounds", bounds)):
        if got is not None:
            raise ValueError(f"a sharded matrix allows no {name}, got {got!r}")
    if rank_deficient != "raise":
        raise ValueError(f"rank_deficient must be 'raise' for a sharded matrix, got {rank_deficient!r}")
    if solver is not None and not isinstance(solver, (Auto, Dense, CGLS)):
        raise TypeError(f"solver must be Auto(), Dense(), CGLS() or None for a sharded matrix, got {solver!r}")
    iterating = solver.cgls if isinstance(solver, Auto) else solver
    for name in ("preconditioner", "callback"):
        if getattr(iterating, name, None) is not None:
            raise ValueError(f"a sharded matrix allows no {name} of CGLS, got {getattr(iterating, name)!r}")
    if A.height < A.shape[1] and damp is None:
        raise ValueError(f"a sharded matrix with fewer rows than columns needs damp, got shape {A.shape}")
