"""The default: chooses the method from the size of the problem."""

from __future__ import annotations

from dataclasses import dataclass, field

from .cgls import CGLS
from .dense import Dense
from .system import System, check_number


@dataclass(frozen=True)
class Auto:
    """`Dense` where its factor is small enough, `CGLS` above.

    Args:
        dense_columns: largest smaller dimension of A that is factored densely.
        dense_bytes: largest memory for the dense factors of a batch.
        cgls: settings for the iteration, where it is chosen.
    """

    dense_columns: int = 3200
    dense_bytes: int = 2**31
    cgls: CGLS = field(default_factory=CGLS)

    def __post_init__(self):
        check_number("dense_columns", self.dense_columns)
        check_number("dense_bytes", self.dense_bytes)
        if not isinstance(self.cgls, CGLS):
            raise TypeError(f"cgls must be a CGLS(...), got {self.cgls!r}")

    def prepare(self, system: System, *, minimum_norm: bool):
        """Prepare the chosen method."""
        size = system.copies * system.n**2 * system.A.values.element_size()
        small = system.n <= self.dense_columns and 3 * size <= self.dense_bytes
        return (Dense() if small else self.cgls).prepare(system, minimum_norm=minimum_norm)
