"""The sparse factor of A^H A plus a small shift, for one matrix, with its weak directions solved for on their own.

    G = (A^H A + d^2 + shift N^2)^-1               exists whatever the rank; N are the norms of the columns
    (A^H A + d^2)^+ = G + V diag(1 / sigma^2 - v^H G v) V^H, about

V are the right singular vectors of singular values sigma so small that the shift hides them; null vectors are projected
off. Rows U^H with most entries are left out of the factor, and come back by the Woodbury identity:

    (M + U U^H)^-1 = M^-1 - M^-1 U (I + U^H M^-1 U)^-1 U^H M^-1
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import OTHER_SOLVER, SolveError
from ..sparse.base import Products
from ..sparse.numerics import noise
from .inverse_iteration import WIDTHS, InverseIteration, triangle
from .sparse_factor import GramAnalysis, NotPositive, method_name

_SHIFTS = (1e-14, 1e-12, 1e-10)  # relative to the squares of the norms of columns
# Where rows are left out, M may have no full rank but for the shift; the two terms of the Woodbury identity, each up to
# 1 / shift large, then cancel, and leave fewer digits the smaller the shift.
_SHIFTS_WITHOUT_ROWS = (1e-10, 1e-9)


class ShiftedFactor:
    """About (A^H A + d^2)^+, from a factor of A^H A + d^2 + shift N^2 with the norms N of the columns.

    Args:
        A: with copies = 1.
        damp: d (n, 1), or None.
        norms: (n, 1), of the columns of [A; d].
        empty: (n, 1), which columns are zeros.

    Attributes:
        null: null vectors (n, q), once `explore` has looked for them.
        smallest: the smallest singular value that is not zero.
        floor: what damping keeps singular values above; those above `threshold` the shift hardly changes.
        smallest_of_columns: that of [A; d] N^-1, whose columns have norm 1; None where there are weak directions.
    """

    def __init__(self, A: Products, damp: Tensor | None, norms: Tensor, empty: Tensor, analysis: GramAnalysis):
        self.A, self.damp, self.empty, self.norms = A, damp, empty, norms
        self.smallest_of_columns: Tensor | None = None
        values, norms2 = A.values[0], norms.square()
        extra = torch.where(empty, 1.0, 0.0 * norms2)  # a 1 on the diagonal where a column of zeros leaves nothing else
        if damp is not None:
            extra = extra + damp.square()
        shifts = _SHIFTS_WITHOUT_ROWS if analysis.left_out else _SHIFTS
        for shift in shifts:
            # The factor adds shift times a diagonal, which holds what is on the diagonal anyway too.
            diagonal = (norms2 + extra / shift)[:, 0].cpu().numpy()
            try:
                self._solve = analysis.factor(values, diagonal, shift)
                break
            except NotPositive:
                if shift == shifts[-1]:
                    raise SolveError(
                        f"method {method_name()} could not factor A^H A + {shift:g}", OTHER_SOLVER
                    ) from None
        # The shift changes squares of singular values below this by more than a thirtieth, too much for the iteration.
        self.threshold = (30 * shift) ** 0.5
        self.U: Tensor | None = None
        if analysis.left_out:
            self.U = analysis.heavy_rows(values)
            self.inverse_U = self._solve(self.U)
            inner = self.U.mH @ self.inverse_U
            inner = (inner + inner.mH) / 2 + torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
            self.inner, _ = torch.linalg.cholesky_ex(inner)
            self._check_inverse(extra + shift * norms2)
        self.floor = 0.0 if damp is None else float(damp.min())
        self.V: Tensor | None = None
        self.null = A.values.new_zeros((A.n, 0))

    @property
    def nullity(self) -> int:
        return self.null.shape[1]

    def explore(self, largest: float, limit: float, widths: Iterable[int] = WIDTHS) -> bool:
        """Find the weak directions, those below `limit` as the null space; whether that are all."""
        weak = InverseIteration(self.A, self.damp, self.empty, self._invert, self.threshold).explore(largest, widths)
        self.null, V, sigma, self.smallest = weak.split(limit)
        if weak.rest is not None:
            self.smallest_of_columns = self._within(weak.rest)
        if V.shape[1]:
            self.V = V
            seen = (V.conj() * self._invert(V)).sum(0).real
            self.gain = (1 / sigma.square() - seen).clamp_min(0)[:, None].to(V.dtype)
        return weak.known

    def apply(self, g: Tensor) -> Tensor:
        """(A^H A + d^2)^+ g, to some digits: weak directions by what is known of them, none of the null space."""
        null = self.null if self.null.shape[1] else None
        if null is not None:
            g = g - null @ (null.mH @ g)
        x = self._invert(g)
        if self.V is not None:
            x = x + self.V @ (self.gain * (self.V.mH @ g))
        return x if null is None else x - null @ (null.mH @ x)

    def _within(self, V: Tensor) -> Tensor:
        """The least |[A; d] v| / |N v| over the span of V (n, q), whose columns have norm 1."""
        of_A, of_N = triangle(self.A, self.damp, V), torch.linalg.qr(self.norms * V, mode="r").R
        return torch.linalg.svdvals(torch.linalg.solve_triangular(of_N, of_A, upper=True, left=False)).min()

    def _invert(self, g: Tensor) -> Tensor:
        """(A^H A + d^2 + shift N^2)^-1 g"""
        x = self._solve(g)
        if self.U is not None:
            x = x - self.inverse_U @ torch.cholesky_solve(self.U.mH @ x, self.inner)
        return torch.where(self.empty, 0.0, x)

    def _check_inverse(self, diagonal: Tensor) -> None:
        """Raise if cancellation has spoilt the inverse in any direction: four random vectors have a part in each."""
        v = torch.where(self.empty, 0.0, noise(self.empty.expand(-1, 4))).to(self.A.dtype)
        found = self._invert(self.A.adjoint(self.A.matmul(v[None]))[0] + diagonal * v)
        error = (torch.linalg.vector_norm(found - v, dim=0) / torch.linalg.vector_norm(v, dim=0)).max()
        if not bool(error < 0.01 / len(v) ** 0.5):
            raise SolveError(
                f"method {method_name()}: without its {len(self.inner)} rows with most entries, which would fill the "
                "factor, A is too far from full rank",
                OTHER_SOLVER,
            )
