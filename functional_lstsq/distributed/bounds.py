"""Bounds over ranks: the search for an active set, which all ranks make on the same numbers, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from ..linear.active_set import ActiveSet, find_scaled
from ..linear.bounds import Found, Posed, Ways, solve_bounded
from ..linear.pivoting import Bounded
from ..linear.settings import settings_of
from ..linear.strict import Judged, Strict, require_known, without_refused
from ..torch_func.cores import steady
from .ranks import Ranks, digest
from .sparse_rows import ShardedRows


class ActiveSetOfRanks(ActiveSet):
    @classmethod
    @steady()
    def forward(cls, static: Any, values, weights, damp, b, lower, upper, indices):
        facts = {"the lower bound": digest(lower), "the upper bound": digest(upper), "damp": digest(damp)}
        static.ranks.checked(lambda: (None, facts), b.device)
        tensors = (None if t is None else t.contiguous() for t in (values, weights, damp, b, lower, upper))
        problems = Bounded(*tensors, indices, static)  # type: ignore[call-arg,arg-type]
        return find_scaled(problems, static.on_failure)


@dataclass(frozen=True)
class _Judged(Judged):
    ranks: Ranks | None = None


class _Strict(Strict):
    @classmethod
    def forward(cls, static: Any, r, x, weak, refused, unknown):
        if not static.derivative:
            require_known(unknown, weak, static.on_failure)
        if not static.derivative or not bool(refused.any()):
            return r.clone(), x.clone()
        moved = ~static.ranks.everywhere((r == 0).all(2).all(1))
        return without_refused(r, x, weak, refused, moved, static.on_failure)


def solve_bounded_together(posed: Posed, on_failure: str, height: int, ranks: Ranks) -> Found:
    """`solve_bounded` of all rows."""
    problem = posed.problem
    static = ShardedRows(*problem.shape, settings_of(problem.settings), on_failure, height, ranks)
    strict = partial(_Strict.apply, _Judged(on_failure, ranks=ranks))
    return solve_bounded(posed, on_failure, Ways(static, ActiveSetOfRanks, strict))
