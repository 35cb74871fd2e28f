"""What a method is: a `Solver`, its settings, makes `Factors` of a matrix, which solve for any right-hand side.

    K (r, y) = (b, c)      K = [ I    A    ]     for P matrices on one pattern: b, r (P, m, k), c, y (P, n, k)
                               [ A^H  -d^2 ]

One preparation serves the solve, its adjoint, every row of a Jacobian and every derivative after that. A method of your
own is a frozen dataclass that inherits from `Solver`; where it is a factor of A^H A or of A, its factors inherit from
`factored.Factored`, which refines around `apply` and judges what comes out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..result import Report

if TYPE_CHECKING:
    from .system import System


class Solver:
    """How a system is solved: settings, hashable and compared by value.

    Attributes:
        accept: largest estimated forward error, relative, of an answer that is given; None for eps^(1/3), with eps
            that of the user's dtype.
    """

    accept: float | None = None

    def threshold(self, precision: float) -> float:
        """The largest estimated error of an answer that is given, for data of this machine epsilon."""
        return self.accept or precision ** (1 / 3)

    def prepare(self, system: System, *, minimum_norm: bool) -> Factors:
        """Do what is needed once for a matrix, or raise a `torch.linalg.LinAlgError`.

        Args:
            system: the augmented system in double precision, its columns scaled: `system.A`, with products `matmul`
                and `adjoint`, and `system.d2`.
            minimum_norm: without full rank, answers are those of least norm; otherwise they have the status
                `RANK_DEFICIENT`.
        """
        raise NotImplementedError


class Factors:
    """What a solver has made of a system.

    Attributes:
        accept: `threshold` of the solver, by which answers were accepted.
        null: the null space of the unscaled A, as a `NullSpace`; None for full rank.
        blockwise: whether solving for a block of columns takes much less time than for each.
    """

    accept: float
    null: Any = None
    blockwise: bool = False

    def solve(
        self, b: Tensor, c: Tensor, start: Tensor | None = None, *, judged: bool = True
    ) -> tuple[Tensor, Tensor, Report]:
        """(r, y, report) for K (r, y) = (b, c), in the scaled unknowns y = D x.

        Args:
            start: (P, n, k), about y; a method that cannot make use of it need not.
            judged: refine until the estimated error is accepted; otherwise errors do no harm, and the first solution
                is what is wanted.
        """
        raise NotImplementedError

    def reach(
        self, b: Tensor, c: Tensor, start: Tensor | None, found: tuple[Tensor, Tensor, Report]
    ) -> tuple[Tensor, Tensor, Report]:
        """What `solve` has `found`, or what can be reached where it failed before it solved anything."""
        return found

    def expect(self, columns: int) -> None:
        """Be told how many right-hand sides there will be in all."""

    def dependent(self, p: int) -> list[int]:
        """Some columns that take part in a dependence among the columns of matrix p, the foremost first, if known."""
        return []
