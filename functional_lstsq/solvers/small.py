"""Whole solves of small systems in compiled code: as `Dense` solves them, where there is nothing special about them.

A solve is some two hundred tensor operations of a few microseconds each, whatever they are of. The loops of
`sparse.compiled_small` take the same steps in one call, and leave to them what needs more.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..result import CONVERGED, Report, method_code, tried_code
from ..sparse import small_kernels
from ..sparse.kernels import SMALL, available
from ..sparse.pattern import SparsePattern
from .auto import FEW_COLUMNS, Auto
from .base import Solver
from .dense import SMALL as FEW
from .dense import Dense
from .memory import fits
from .watching import is_watched

_NUMBERS = 6400  # of right-hand sides of one matrix; more columns than that go through LAPACK together


class Small(NamedTuple):
    """The factors of P small matrices on one pattern, by a solver that has chosen them."""

    factors: small_kernels.Factors
    accept: float
    precision: float
    tried: int

    @classmethod
    def of(
        cls, solver: Solver, precision: float, pattern: SparsePattern, matrix: tuple[Tensor, ...], damp: Tensor | None
    ) -> Small:
        """For a `matrix` of values (P, nnz), and of weights (P, m) if there are any, and a damping (P, 1) or (P, n)."""
        tried = _by_choice() if type(solver) is Auto else 0
        accept = Solver().threshold(precision) if type(solver) is Auto else solver.threshold(precision)
        weights = matrix[1] if len(matrix) > 1 else None
        return cls(small_kernels.factor(pattern, matrix[0], weights, damp), accept, precision, tried)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)"""
        return self.factors.m, self.factors.D.shape[1]

    @property
    def is_whole(self) -> bool:
        """Whether there are factors of all matrices."""
        return bool((self.factors.told[:, 0] > 0).all())

    @property
    def scale(self) -> Tensor:
        """D (P, n, 1), by which columns are divided, infinite of a pinned unknown."""
        return torch.from_numpy(self.factors.D)[:, :, None]

    @property
    def weights(self) -> Tensor | None:
        """(P, m), None for ones."""
        weights = self.factors.weights
        return torch.from_numpy(weights) if weights.shape[1] else None

    def solve(
        self, slots: tuple[Tensor | None, Tensor | None, Tensor | None], known: Tensor | None, answer: str | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(r, s, x, packed report, the matrices that are left to others) for `slots` (b, e, c), None for zeros.

        Args:
            known: as of `verdict.settle`.
            answer: as of `blocks.Asked`.
        """
        whose = {None: 0.0, "residual_error": small_kernels.RESIDUAL, "solution_error": small_kernels.SOLUTION}[answer]
        codes = float(CONVERGED), float(method_code("dense-cholesky")), float(self.tried), whose
        return small_kernels.solve(
            self.factors, slots, known, (self.precision, self.accept), codes, len(Report._fields)
        )


def is_small(solver: Solver, values: Tensor, n: int, columns: int) -> bool:
    """Whether the loops may be asked: of plain tensors, and a solver that would factor such matrices densely."""
    copies, entries = values.shape
    if not (0 < n <= FEW and 0 < n * columns <= _NUMBERS and 0 < entries <= SMALL):
        return False
    chosen = type(solver) is Dense
    if type(solver) is Auto:
        chosen = n <= solver.dense_columns and solver.dense_bytes is None
    if not chosen or is_watched() or not available(values.device):
        return False
    return fits(copies * (n**2 + 2 * entries) * values.element_size(), None, values.device)


@functools.cache
def _by_choice() -> int:
    return tried_code([("Dense", FEW_COLUMNS, "")])
