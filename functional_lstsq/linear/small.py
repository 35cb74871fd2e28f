"""Small systems on their way through `solvers.small`: which may go there, and what becomes of those that come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..solvers.small import is_small
from ..sparse.pattern import SparsePattern, find_pattern
from .factor_cache import Holder, is_kept, no_token
from .low_parts import LOW, none_of_small, told_as_solution
from .settings import Settings

_Asked = tuple[Settings, SparsePattern, tuple[Tensor, ...], Tensor | None]  # (settings, pattern, matrix, damp)
_Slots = tuple[Tensor | None, Tensor | None, Tensor | None]  # (b, e, c)


def solve_small(
    given: tuple[Tensor | None, ...],
    token: Tensor | None,
    indices: Tensor,
    m: int,
    n: int,
    wanted: Settings,
    on_failure: str,
    solve: Callable[..., tuple[Tensor, ...]],
) -> tuple[Tensor, ...] | None:
    """(r, s, x, report, token), in compiled code; None where that is not to be had, whatever the reason.

    Args:
        given: (values, weights, damp, b, e, c, known), as of `solve`, which solves in any way.
    """
    values, weights, damp, b, e, c, known = given
    assert values is not None
    low, forward = on_failure == LOW, token is None or is_kept(token)
    k = next(t for t in (b, e, c) if t is not None).shape[2]
    if low:
        if Holder.of(token).small is None:
            return None
    elif not (m and _is_plain(wanted, known, forward) and is_small(wanted.solver, values, n, k)):
        return None
    matrix = (values,) if weights is None else (values, weights)
    asked = wanted, find_pattern(indices, m, n), matrix, damp
    if low:
        return _low_parts(asked, known, token)
    found, failed = _solve(asked, (b, e, c), known, token, forward=forward)
    if found is None or not len(failed):
        return found
    others: list[Any] = [None if t is None else t[failed] for t in given]
    own = Holder()
    of_derivative = None if forward else own.token()
    try:
        rest = solve(*others, of_derivative, indices, m, n, wanted.text, on_failure)
    except torch.linalg.LinAlgError:  # which is to tell of all
        return None
    for whole, part in zip(found[:4], rest[:4], strict=True):
        whole[failed] = part
    return found


def _is_plain(wanted: Settings, known: Tensor | None, forward: bool) -> bool:
    """Whether nothing is asked for that the loops do not know."""
    return not (wanted.minimum_norm or wanted.extended or wanted.tolerance) and (known is None or not forward)


def _solve(
    asked: _Asked, slots: _Slots, known: Tensor | None, token: Tensor | None, *, forward: bool
) -> tuple[tuple[Tensor, ...] | None, Tensor]:
    """(what was found, the matrices of which that is nothing); None where it is of most of them."""
    wanted, _, (values, *_), _ = asked
    none = torch.empty(0, dtype=torch.int64, device=values.device)
    keeper = Holder.of(token)
    if is_kept(token) and keeper.is_filled and not keeper.serves_small(*asked):
        keeper = Holder()
    small = keeper.prepare_small(*asked)
    if small is None:
        return None, none
    answer = None if not forward else "residual_error" if wanted.wide else "solution_error"
    *found, failed = small.solve(slots, known, answer)
    if 2 * len(failed) >= len(values):
        return None, none
    token = keeper.token() if forward else no_token()
    return (*found, token), failed


def _low_parts(asked: _Asked, known: Tensor | None, token: Tensor | None) -> tuple[Tensor, ...] | None:
    """Low parts of a solution that `_solve` gave, where there are none; else None."""
    keeper = Holder.of(token)
    if known is None or keeper.small is None or not keeper.serves_small(*asked):
        return None
    found = none_of_small(keeper.small, known)
    if found is None:
        return None
    return told_as_solution(*found, weighted=len(asked[2]) > 1)
