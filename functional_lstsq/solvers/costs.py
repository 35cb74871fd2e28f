"""What methods cost for one matrix, in seconds on two cores: rough speeds, by which `Auto` orders them."""

from __future__ import annotations

from ..sparse.pattern import SparsePattern
from ..sparse.places import Places

_FLOPS = 2e10  # operations a second in a dense or sparse factor
_PRODUCTS = 1e8  # multiplications a second in a sparse product of two matrices
_ENTRY = 7e-8  # seconds that an entry of a sparse factor takes to be stored, and read by some solves
_ORDERED = 1e6  # entries a second in an ordering
_BYTES = 8e9  # bytes a second in a sparse product with vectors
_SUM, _SUMMED = 4e-4, 1.5e8  # seconds of a sum over places, on one machine, and numbers a second in it
_CACHED = 4e10  # bytes a second in a product with A^H A for one column
_CALL = 2e-6  # seconds of a compiled iteration, however small
_CALLS = 1e-4  # seconds of an iteration, however small
_DENSE_PASSES = 20  # over a dense factor, to use it and to know its condition number
ANYWAY = 1e-2  # seconds of any solve, whatever its method

PATIENCE = 100  # iterations whose time a factor must take for iterating to be tried before it
SOLVE = 2.2  # times the iterations that find a known solution, in a solve
FEWEST = 15  # iterations that find a known solution
FACTORED = 4  # iterations that take as long as a solve with a factor


def products_of_iteration(entries: int, m: int, n: int) -> float:
    """The part of an iteration that grows with the problem: A p, A^H r (12 bytes an entry each), and some vectors."""
    return (24 * entries + 64 * (m + n)) / _BYTES


def iteration(products: float) -> float:
    """One iteration of conjugate gradients."""
    return products + _CALLS


def iteration_of_one(entries: int, n: int) -> float:
    """One iteration for one column with a product that reads so many entries of A^H A, in compiled code."""
    return _CALL + (12 * entries + 64 * n) / _CACHED


def total(numbers: int, places: Places) -> float:
    """A sum over places of so many numbers of each."""
    return 0.0 if places.alone else _SUM + numbers / _SUMMED


def gram(multiplications: int) -> float:
    """The values of A^H A."""
    return multiplications / _PRODUCTS


def dense_factor(n: int) -> float:
    """A Cholesky factor of an n x n matrix, n^3 / 3 operations, and what is done with it."""
    return n**3 / 3 / _FLOPS + 8 * _DENSE_PASSES * n**2 / _BYTES


def ordering(entries: int) -> float:
    """An ordering of the pattern of A^H A."""
    return entries / _ORDERED


def sparse_factor(operations: float) -> float:
    """A sparse Cholesky factor."""
    return operations / _FLOPS


def kept_factor(multiplications: int, operations: float, fill: float) -> float:
    """A sparse factor by an ordering that is there already, and a solve and its adjoint with it."""
    return gram(multiplications) + sparse_factor(operations) + _ENTRY * fill


_SPARED = 9  # solves in which iterating is not tried again


class Lately:
    """What is known of iterating with matrices on one pattern: where it gave up for a factor, it would do so again.

    Values change in a training loop, and so may the condition number: every tenth time it is tried again. Once it has
    taken as long as an ordering, which then is made for all solves to come, it gives up for a factor that takes less.
    """

    def __init__(self):
        self.spared: dict[int, int] = {}  # how many solves of so many columns, or of more, are not to try
        self.spent, self.last, self.tried = 0.0, 0.0, False

    @classmethod
    def of(cls, pattern: SparsePattern) -> Lately:
        """That of the pattern, which keeps it."""
        return pattern.keep("lately", cls)

    def begin(self) -> None:
        """A solve begins."""
        self.spared = {columns: left - 1 for columns, left in self.spared.items() if left > 1}

    def is_worth_it(self, columns: int) -> bool:
        """Whether to try."""
        return all(columns < fewest for fewest in self.spared)

    def gave_up(self, columns: int = 1) -> None:
        """It was tried in vain for so many columns, of which each takes its own time."""
        self.spared = {**self.spared, columns: 1 + _SPARED}
        self.tried = self.tried and columns > 1

    def took(self, seconds: float) -> None:
        """One right-hand side was iterated for."""
        self.spent, self.last, self.tried = self.spent + seconds, seconds, True
