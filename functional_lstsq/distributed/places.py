"""Rows on many ranks, as solvers with a sparse factor see them: A^H A on the union of the patterns that ranks have.

Each rank puts the lower triangle of its own A^H A into its places in the union, and one sum over ranks makes that of
all rows, of which every rank then factors the same bits.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import BY_CGLS, TooLarge
from ..solvers.memory import available_bytes, told_as_too_large
from ..sparse.gram_pattern import Gram, gram_pattern
from ..sparse.pattern import SparsePattern, plainly
from ..sparse.places import Places
from .ranks import Ranks

Made = TypeVar("Made")
_BYTES = 64  # that a position takes while the union is made


class OnRanks(Places):
    """The places are ranks, all of which call these methods in the same order."""

    alone = False

    def __init__(self, ranks: Ranks, device: torch.device):
        self.ranks, self.device = ranks, device

    def total(self, t: Tensor) -> Tensor:
        return self.ranks.sum(t)

    def largest(self, t: Tensor) -> Tensor:
        return self.ranks.max(t)

    def least(self, number: float) -> float:
        return -float(self.ranks.max(torch.tensor([-float(number)], dtype=torch.float64, device=self.device)))

    def before(self, count: int) -> int:
        return sum(of_rank for (of_rank,) in self.counts([count])[: self.ranks.place])

    def counts(self, own: list[int]) -> list[list[int]]:
        """The counts of every rank."""
        return [of_rank.tolist() for of_rank in self.ranks.each(torch.tensor(own, device=self.device))]

    def together(self, make: Callable[[], Made]) -> Made:
        def check() -> tuple[Made, dict[str, object]]:
            with told_as_too_large():
                made = make()
            return made, {"what a method makes": type(made).__name__}

        return self.ranks.checked(check, self.device)

    def kept(self, pattern: SparsePattern, key: Hashable, make: Callable[[], Made]) -> Made:
        """By a number that was drawn for it: a rank may have had its pattern beside other patterns of other ranks."""
        kept: dict = pattern.keep(("on ranks", self.ranks.name, key), dict)
        number = kept.get("number", 0)
        most, least = self.ranks.max(torch.tensor([number, -number], device=self.device)).tolist()
        if most != -least or not most:
            kept.clear()
            with plainly():
                made = make()
            drawn = self.ranks.max(torch.tensor([secrets.randbits(62)], device=self.device))
            kept.update(number=int(drawn), made=made)
        return kept["made"]

    def gram_pattern(self, pattern: SparsePattern) -> Gram:
        return _Union(pattern, self)


class _Union(Gram):
    """The lower triangle of A^H A on all ranks.

    Args:
        pattern: of the rows that are here.
    """

    def __init__(self, pattern: SparsePattern, places: OnRanks):
        n, self.places = pattern.shape[1], places
        self.here: Gram | None = None

        def make() -> Tensor:
            if not pattern.nnz:
                return torch.zeros(0, dtype=torch.int64, device=pattern.device)
            self.here = gram_pattern(pattern)
            return self.here.columns * n + self.here.rows

        own = places.together(make)
        whole = _united(own, n, places)
        self.place = torch.searchsorted(whole, own)
        self.rows, self.columns = whole % n, whole // n

    def values(self, values: Tensor) -> Tensor:
        def make() -> Tensor:
            whole = values.new_zeros(len(self.rows))
            return whole if self.here is None else whole.index_copy_(0, self.place, self.here.values(values))

        return self.places.total(self.places.together(make))


def _united(own: Tensor, n: int, places: OnRanks) -> Tensor:
    """The numbers, ascending, that any rank has, of its `own` (k,), ascending and below n^2.

    Each rank sorts those of a part of the columns of all ranks, and then gives them to all.
    """
    ranks, bound = places.ranks, int(places.total(torch.tensor(len(own), device=own.device)))
    size, room = _BYTES * min(bound, n**2), places.least(available_bytes() / 2)
    if size > room:
        raise TooLarge(f"a sparse factor was not started: A^H A would take {size:.1e} bytes, of {room:.1e}", BY_CGLS)
    ends = torch.arange(1, ranks.size + 1, device=own.device) * n // ranks.size * n
    sent = torch.searchsorted(own, ends).diff(prepend=own.new_zeros(1)).tolist()
    taken = [of_rank[ranks.place] for of_rank in places.counts(sent)]
    part = ranks.exchange(own, sent, taken).unique()
    sizes = places.counts([len(part)])
    padded = torch.nn.functional.pad(part, (0, max(sizes)[0] - len(part)))
    return torch.cat([of_rank[:size] for (size,), of_rank in zip(sizes, ranks.each(padded), strict=True)])
