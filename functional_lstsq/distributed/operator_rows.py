"""A solve over ranks with operators that are known by their products: `linear.matrix_free`, of rows in many places.

Each rank has the products of its own rows, with params of its own. x is the same on all ranks, so it is `shared` where
a product takes it, and A^H y is the `total` of the products of all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from torch import Tensor

from ..linear.matrix_free import SolveMatrixFree, solve_operator
from ..linear.operator_static import OperatorStatic
from ..torch_func.cores import steady
from .agreement import solve_together
from .collectives import shared_by, total_of, zero_of
from .products import OperatorOverRanks
from .ranks import Ranks


@dataclass(frozen=True)
class ShardedOperator(OperatorStatic):
    """Of the rows that are here; `product` is what rules differentiate, of all rows."""

    whole: int  # rows on all ranks
    ranks: Ranks

    @property
    def height(self) -> int:
        return self.whole

    def total(self, t: Tensor) -> Tensor:
        return total_of(t, self.ranks.name)

    def product(self, leaves: Sequence[Tensor], X: Tensor, *, adjoint: bool) -> Tensor:
        X = X if adjoint else shared_by(X, self.ranks.name)
        zero = zero_of(leaves, X)
        if self.m:
            here = super().product(leaves, X, adjoint=adjoint) + zero
        else:
            here = zero.expand(-1, self.n, -1) if adjoint else X[:, :0] + zero
        return self.total(here) if adjoint else here

    def plainly(self, leaves: Sequence[Tensor], X: Tensor, *, adjoint: bool) -> Tensor:
        """Of this rank's rows alone."""
        if not self.m:
            return X.new_zeros((X.shape[0], self.n if adjoint else 0, X.shape[2]))
        return super().plainly(leaves, X, adjoint=adjoint)


@steady()
def _solved(static: ShardedOperator, tensors: Sequence, token: Tensor | None, leaves: tuple) -> tuple[Tensor, ...]:
    damp, weights, b, e, c, start = (None if t is None else t.resolve_conj() for t in tensors)
    given = next(t for t in (b, e, c) if t is not None)
    if not given.shape[0]:  # of an empty batch
        return solve_operator(static, damp, weights, b, e, c, start, token, leaves)
    own: dict[str, tuple[Tensor, ...]] = {"params": tuple(t for t in leaves if t.is_floating_point() or t.is_complex())}
    if weights is not None:
        own["weights"] = (weights,)
    if token is None:
        static.ranks.checked(lambda: _tried(static, leaves, given), given.device)
    kept = leaves if weights is None else (*leaves, weights.sqrt())
    return solve_together(
        static, own, damp, {"b": b, "e": e, "c": c}, start, token, (None, kept),
        lambda b, e, c, token: solve_operator(
            static, damp, weights, b, e, c, start, token, leaves, products=OperatorOverRanks
        ),
    )  # fmt: skip


def _tried(static: ShardedOperator, leaves: tuple, like: Tensor) -> tuple[None, Mapping[str, object]]:
    """A product of each kind, before others wait for those of this rank."""
    for rows, adjoint in ((static.n, False), (static.m, True)):
        static.plainly(leaves, like.new_zeros((like.shape[0], rows, 1), dtype=static.dtype), adjoint=adjoint)
    return None, {}


class SolveOverRanks(SolveMatrixFree):
    """Its rules are those of the one place, with the products of `ShardedOperator`."""

    @classmethod
    def forward(cls, static, damp, weights, b, e, c, start, token, *leaves):
        return _solved(static, (damp, weights, b, e, c, start), token, leaves)


def over_ranks(static: OperatorStatic, whole: int, ranks: Ranks) -> ShardedOperator:
    """What a solve is given of the rows that are here, for all rows."""
    of_rows = {field.name: getattr(static, field.name) for field in fields(static)}
    return ShardedOperator(**of_rows, whole=whole, ranks=ranks)
