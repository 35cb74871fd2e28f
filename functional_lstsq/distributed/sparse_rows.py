"""A linear solve over ranks: the augmented system of `linear.augmented`, of which each rank has some of the rows.

    r + A x = b          A^H s - d^2 x = c          s = W r + e          W = diag(weights)

One sum over ranks is in it, A^H s. b, e, r, s, the values of A and weights are a rank's own; x, c and d are the same on
all ranks. So its primitive and the rules are those of `linear.augmented`, on products with `shared` where something
that is the same on all ranks meets a rank's rows, and with `total` for A^H s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linear.augmented import Solve
from ..linear.gradient import LowParts, Static
from ..linear.kernel import solve_fake, solve_plainly
from ..linear.low_parts import LOW
from ..linear.settings import Settings, settings_of
from ..linear.weighting import weigh
from ..solvers.system import System
from ..sparse.numerics import ldexp
from ..sparse.pattern import find_pattern
from ..sparse.plain_products import Operator
from ..sparse.products import multiply, sample
from ..torch_func.cores import steady
from ..torch_func.operations import define, differentiate
from ..torch_func.tracing import in_graph
from .agreement import solve_together
from .collectives import shared_by, total_of
from .heavy_rows import RowsOfAll
from .products import RowsOverRanks
from .ranks import Ranks


@dataclass(frozen=True)
class ShardedRows(Static):
    """What a solve is asked for, of the m rows that are here and of all others."""

    whole: int  # rows on all ranks
    ranks: Ranks

    @property
    def height(self) -> int:
        return self.whole

    def solve(self, tensors: list[Tensor | None], token: Tensor | None, indices: Tensor) -> tuple[Tensor, ...]:
        of_ranks = self.whole, self.ranks.name, self.settings.text, self.on_failure
        return _solve(*tensors, token, indices, self.m, self.n, *of_ranks)

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

    def norm(self, t: Tensor) -> Tensor:
        return self.total(t.abs().square().sum(1)).sqrt()

    def largest(self, t: Tensor) -> Tensor:
        return self.ranks.max(super().largest(t).contiguous())

    def anywhere(self, flag: Tensor) -> bool:
        return not bool(self.ranks.everywhere(~flag))

    def shared(self, t: Tensor) -> Tensor:
        return shared_by(t, self.ranks.name)


@steady()
def _solve_kernel(values, weights, damp, b, e, c, known, token, indices, m, n, whole, group, settings, on_failure):
    given = values, weights, damp, b, e, c, known
    if not len(values):  # of an empty batch
        *nothing, made = solve_fake(*given, token, indices, m, n)
        return *nothing, made.zero_()
    static = ShardedRows(m, n, settings_of(settings), on_failure, whole, Ranks(group))
    values, weights, damp, b, e, c, known = (None if t is None else t.resolve_conj() for t in given)
    own: dict[str, tuple[Tensor, ...]] = {"A": (values,)}
    numbers: dict[str, tuple[Tensor, ...]] = {"values": (values,)}
    if weights is not None:
        own["weights"] = numbers["weights"] = (weights,)
    asked = indices, sum(numbers.values(), ())
    pattern = find_pattern(indices, static.m, static.n)

    def make() -> System:
        return _system(RowsOverRanks(Operator(pattern, values), static.ranks, static.whole), weights, damp, static)

    def solve(b: Tensor | None, e: Tensor | None, c: Tensor | None, token: Tensor | None) -> tuple[Tensor, ...]:
        return solve_plainly(
            values, numbers, indices, damp, b, e, c, known, token, static.m, static.n, static.settings,
            static.on_failure, make, height=static.whole,
        )  # fmt: skip

    return solve_together(static, own, damp, {"b": b, "e": e, "c": c}, known, token, asked, solve)


_solve = define(
    "solve_over_ranks(Tensor values, Tensor? weights, Tensor? damp, Tensor? b, Tensor? e, Tensor? c, Tensor? known, "
    "Tensor? token, Tensor indices, SymInt m, SymInt n, SymInt whole, str group, str settings, str on_failure) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _solve_kernel,
    solve_fake,
)


def _with_rules(values, weights, damp, b, e, c, known, token, indices, m, n, whole, group, settings, on_failure):
    static = ShardedRows(m, n, settings_of(settings), on_failure, whole, Ranks(group))
    tensors = values, weights, damp, b, e, c, known, token, indices
    return LowParts.apply(static, *tensors) if on_failure == LOW else Solve.apply(static, *tensors, None)


differentiate(_solve, _with_rules)


@in_graph
def solve_rows(
    values: Tensor,
    weights: Tensor | None,
    damp: Tensor | None,
    b: Tensor,
    c: Tensor | None,
    start: Tensor | None,
    kept: Tensor | None,
    indices: Tensor,
    m: int,
    n: int,
    whole: int,
    group: str,
    settings: Settings | str,
    on_failure: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(r, x, report) as `solve_augmented`, of `whole` rows on the ranks of a group."""
    static = ShardedRows(m, n, settings_of(settings), on_failure, whole, Ranks(group))
    r, _, x, report, _ = Solve.apply(static, values, weights, damp, b, None, c, start, kept, indices, None)
    return r, x, report


def _system(everything: RowsOverRanks, weights: Tensor | None, damp: Tensor | None, static: ShardedRows) -> System:
    weighting, wanted = None, static.settings
    if damp is not None and bool(damp.isinf().any()):
        # As `kernel` has it: an unknown that is pinned at zero keeps to itself, as an empty column.
        pinned, values = damp.isinf().expand(-1, static.n), everything.values
        largest = everything.largest(values[:, :, None])
        in_columns = pinned.gather(1, everything.pattern.indices[1].expand(len(values), -1))
        everything = everything.with_values(torch.where(in_columns, 0.0, values))
        damp = torch.where(pinned, torch.where(largest > 0, largest, 1.0), damp)
    if weights is not None:
        weighting = weigh(everything.pattern, everything.values, weights, RowsOfAll(static.ranks))
        damp = None if damp is None else ldexp(damp, -weighting.half)
    return System(
        everything, damp, wanted.precision, exact=wanted.exact, weighting=weighting, tolerance=wanted.tolerance,
        extended=wanted.extended,
    )  # fmt: skip
