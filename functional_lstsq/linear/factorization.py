"""`Factorization`: a matrix together with its factors, which stands where the matrix stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..result import SolveInfo
from ..sparse.matrix import SparseMatrix
from .factor_cache import keeper


@dataclass(frozen=True, eq=False)
class Factorization:
    """What `factorize` returns: A with its weights, its damping and its factors, which live as long as this does.

    Attributes:
        A: (m, n) SparseMatrix, or a sharded matrix.
        damp, weights, solver, rank_deficient, rank_tolerance: as they were given to `factorize`.
        info: of the solve in which the factors were made, a `SolveInfo`; None where they are made later, in a function
            that is being transformed or compiled.
    """

    A: SparseMatrix
    damp: float | Tensor | None
    weights: Tensor | None
    solver: Any = field(repr=False)
    rank_deficient: str
    token: Tensor = field(repr=False)
    info: SolveInfo | None = None
    rank_tolerance: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)"""
        return self.A.shape

    @property
    def dtype(self) -> torch.dtype:
        """dtype of A."""
        return self.A.dtype

    @property
    def device(self) -> torch.device:
        """Device of A."""
        return self.A.device

    @property
    def values(self) -> Tensor:
        """The values of A."""
        return self.A.values

    def matmul(self, X: Tensor) -> Tensor:
        """A X, as `SparseMatrix.matmul`."""
        return self.A.matmul(X)

    __matmul__ = matmul

    def __reduce__(self):
        # A copy, or what is loaded in another process, makes factors of its own at its first solve.
        return unprepared, (*self.given[:-1], self.info)

    @property
    def given(self) -> tuple[SparseMatrix, float | Tensor | None, Tensor | None, Any, str, float | None, Tensor]:
        """(A, damp, weights, solver, rank_deficient, rank_tolerance, token)"""
        return self.A, self.damp, self.weights, self.solver, self.rank_deficient, self.rank_tolerance, self.token

    def require_alone(self, rank_deficient: str, **others: Any) -> None:
        """Refuse settings that were decided when the factors were made."""
        if rank_deficient != "raise":
            raise ValueError(f"a Factorization allows no rank_deficient={rank_deficient!r}, which factorize takes")
        for name, got in others.items():
            if got is not None:
                kind = f"a tensor of shape {tuple(got.shape)}" if isinstance(got, Tensor) else repr(got)
                raise TypeError(
                    f"{name} must be None beside a Factorization, got {kind}; "
                    + ("its A takes it" if name in ("robust", "bounds") else f"factorize(A, {name}=...) takes it")
                )


def unprepared(
    A: SparseMatrix,
    damp: float | Tensor | None,
    weights: Tensor | None,
    solver: Any,
    rank_deficient: str,
    rank_tolerance: float | None,
    info: SolveInfo | None = None,
) -> Factorization:
    """A `Factorization` whose factors its first solve makes."""
    token = keeper(A.pattern.indices)
    return Factorization(A, damp, weights, solver, rank_deficient, token, info, rank_tolerance)
