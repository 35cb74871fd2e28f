"""Where the rows of a matrix are: all of them here, or some in each of several places, which decide alike."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from torch import Tensor

from .gram_pattern import Gram, gram_pattern
from .pattern import SparsePattern

Made = TypeVar("Made")


class Places:
    """All rows are here; a subclass knows of others, and gives the same answers there."""

    alone = True

    def total(self, t: Tensor) -> Tensor:
        """The sum of the t of all places, in the place of t."""
        return t

    def largest(self, t: Tensor) -> Tensor:
        """The largest over all places of each number in t, in the place of t."""
        return t

    def least(self, number: float) -> float:
        """The least of the numbers of all places."""
        return number

    def before(self, count: int) -> int:
        """The sum of the counts of the places before this one."""
        return 0

    def together(self, make: Callable[[], Made]) -> Made:
        """What `make` gives here, or an error in all places if it fails in one; it asks nothing of other places."""
        return make()

    def kept(self, pattern: SparsePattern, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives, kept on the `pattern` of the rows that are here: made anew in all places or in none."""
        return pattern.keep(key, make)

    def gram_pattern(self, pattern: SparsePattern) -> Gram:
        """A^H A of all rows, for the pattern of those that are here."""
        return gram_pattern(pattern)


HERE = Places()
