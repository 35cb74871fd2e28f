"""Sparse factorisation of the Gram matrix, for problems of any size whose factor fits into memory.

    (A^H A + s N^2) = P L L^H P^T,   N the norms of the columns, s as small as rounding allows

is the preconditioner of refinement on the augmented system, so the accuracy is that of a backward stable method and
not that of the normal equations. The shift s makes the factor exist whatever the rank. Directions so weak that it
hides them (singular values below some sqrt(s)) are found by block inverse iteration with a Ritz projection through A,
which squares nothing: they are solved for on their own, and those on which A vanishes are the null space. Where there
are too many of them, A is factored in a basis that is local.

Rows that are nearly dense are left out of the factor and come back by the Woodbury identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import BY_CGLS, MEMORY, TooLarge
from ..result import INACCURATE, Report, method_code
from ..sparse.double_double import Pair, Single
from ..sparse.lazy import lazy
from ..sparse.places import Places
from .base import Solver
from .factored import Factored, power
from .inverse_iteration import WIDTHS
from .local import LocalFactor, local_factor
from .memory import available_bytes
from .null_space import NullSpace, NullVectors, SparseVectors, orthonormal, refine_null_space
from .shifted import ShiftedFactor
from .sparse_factor import GramAnalysis, method_name
from .system import System, check_number
from .watching import tell

_EXACT = 1e4  # condition number, times the ratio of norms of columns, from which null vectors are carried as pairs
_FIRST = 2  # of the widths of blocks that are tried before a local basis, which takes less time than the next


@dataclass(frozen=True)
class Direct(Solver):
    """Factor A^H A sparsely and refine; finds the rank.

    The analysis is made once for each pattern, a factor once for each set of values; a batch of values shares the
    analysis. The factor itself is always on the CPU; of rows on many ranks, every rank makes that of all rows.

    Args:
        accept: largest estimated forward error, relative, of an answer that is given; None for eps^(1/3).
        memory: bytes that a factor may take; None for half of what is available. A factor predicted to take more is
            not started: `TooLarge`, a `torch.linalg.LinAlgError` and a `MemoryError`.

    >>> import torch, functional_lstsq as fl
    >>> pattern = fl.SparsePattern(torch.tensor([[0, 1, 2], [0, 0, 1]]), (3, 2))
    >>> A = fl.SparseMatrix(torch.tensor([1.0, 2.0, 3.0]), pattern)
    >>> fl.lstsq(A, torch.tensor([1.0, 2.0, 3.0]), solver=fl.Direct())
    tensor([1., 1.])
    """

    accept: float | None = None
    memory: float | None = None

    def __post_init__(self):
        check_number("accept", self.accept, optional=True, below=1)
        check_number("memory", self.memory, optional=True)

    def prepare(self, system: System, *, minimum_norm: bool) -> _Factors:
        """Factor `system`; the result solves for any right-hand side."""
        analysis = analyse(system)
        reason = self.too_large(analysis, system.copies)
        if reason:
            raise TooLarge(f"method {method_name()} was not started: {reason}", BY_CGLS, MEMORY)
        return _Factors(self, system, analysis, minimum_norm)

    def room(self, places: Places) -> float:
        """Bytes that factors may take, in each of the places where there are rows."""
        return self.memory or places.least(available_bytes() / 2)

    def too_large(self, analysis: GramAnalysis, copies: int) -> str:
        """Why a factor is not to be started; empty if it fits."""
        for wanted in (lambda: analysis.bytes_before, lambda: copies * analysis.predicted[1]):
            size = wanted()
            room = self.room(analysis.places)  # which the analysis, that predicts, has made smaller
            if size > room:
                return f"it would take about {size:.1e} bytes, of {room:.1e} that it may"
        return ""


def analyse(system: System) -> GramAnalysis:
    """The analysis for the pattern of `system`, kept on the pattern."""
    pattern, places, complex_values = system.A.pattern, system.A.places, system.A.dtype.is_complex
    return places.kept(
        pattern,
        ("gram", complex_values),
        lambda: GramAnalysis(pattern, complex_values=complex_values, places=places),
    )


class _Known(NamedTuple):
    """What is known of matrices once their weak directions are, as of `Factored`; which of them were not found."""

    smallest: Tensor
    rank: Tensor
    null: NullSpace | None
    smallest_of_columns: Tensor | None
    gave_up: Tensor


class _Factors(Factored):
    blockwise = True

    def __init__(self, solver: Direct, system: System, analysis: GramAnalysis, minimum_norm: bool):
        super().__init__(system, minimum_norm, solver.threshold(system.precision))
        self.solver, self.analysis = solver, analysis
        code, device = method_code(method_name()), system.A.device
        self.method = torch.full((system.copies, 1), code, device=device)
        self.blocks: list[ShiftedFactor | LocalFactor] = []
        for p in range(system.copies):
            A = system.A if system.copies == 1 else system.A.with_values(system.A.values[p : p + 1])
            damp = None if system.damp is None else system.damp[p]
            self.blocks.append(ShiftedFactor(A, damp, system.norms[p], system.empty[p, :, None], analysis))
            tell(phase="factor", total=system.copies)
        if not self._is_clear:
            _ = self.known  # before several threads may share the factors

    @lazy
    def largest(self) -> Tensor:  # type: ignore[override]
        size = power(self.system.normal, self.system.scale, self.system.A.dtype).sqrt()
        return torch.where(size > 0, size, 1.0)

    @lazy
    def known(self) -> _Known:
        """By a search, which takes as much time as a factor, or more."""
        copies, largest = self.system.copies, self.largest
        smallest, nullity = torch.ones_like(largest), torch.zeros_like(largest)
        gave_up = torch.zeros_like(largest, dtype=torch.bool)
        for p, whole in enumerate(self.blocks):
            assert isinstance(whole, ShiftedFactor)
            self.blocks[p], gave_up[p] = self._explored(p, whole)
            smallest[p] = self.blocks[p].smallest
            nullity[p] = self.blocks[p].nullity + int(self.system.empty[p].sum())
        found = [block.smallest_of_columns for block in self.blocks if isinstance(block, ShiftedFactor)]
        seen = [number for number in found if number is not None]
        of_columns = torch.stack(seen)[:, None] if len(seen) == copies else None
        null = self._collect(smallest) if bool((nullity > 0).any()) else None
        return _Known(smallest, self.system.n - nullity, null, of_columns, gave_up)

    @property
    def smallest(self) -> Tensor:  # type: ignore[override]
        return self.known.smallest

    @property
    def rank(self) -> Tensor:  # type: ignore[override]
        return self.known.rank

    @property
    def null(self) -> NullSpace | None:  # type: ignore[override]
        return self.known.null

    @property
    def smallest_of_columns(self) -> Tensor | None:  # type: ignore[override]
        return self.known.smallest_of_columns

    def _explored(self, p: int, whole: ShiftedFactor) -> tuple[ShiftedFactor | LocalFactor, bool]:
        """A factor of matrix p whose weak directions are known, and whether that was given up."""
        largest = float(self.largest[p])
        limit = self.system.tolerance * largest
        if whole.explore(largest, limit, WIDTHS[:_FIRST]):
            return whole, False
        here = self.analysis.places.alone  # a local basis is made of whole columns
        local = local_factor(self.system, p, limit, self.analysis, self.solver.too_large) if here else None
        if local is None:
            return whole, not whole.explore(largest, limit, WIDTHS[_FIRST:])
        return local, not local.explore(largest)

    @lazy
    def _is_clear(self) -> bool:
        """Whether damping leaves no direction weak in any matrix, so that the factors alone give some digits."""
        limit = self.system.tolerance * 2 * self.system.n**0.5  # no column is longer than 2
        clear = (
            isinstance(block, ShiftedFactor) and block.floor > max(block.threshold, limit) for block in self.blocks
        )
        return all(clear)

    def _collect(self, smallest: Tensor) -> NullVectors:
        """The null space, refined; columns of zeros are unit vectors of it."""
        weak, copies = [block.null for block in self.blocks], self.system.copies
        width = max(z.shape[1] for z in weak)
        Z = torch.stack([torch.nn.functional.pad(z, (0, width - z.shape[1])) for z in weak])
        lost = torch.stack([torch.arange(width, device=Z.device) < z.shape[1] for z in weak])[:, None]
        in_parts = [(p, block) for p, block in enumerate(self.blocks) if isinstance(block, LocalFactor)]
        parts = [(p, found) for p, block in in_parts if (found := block.local_null_space())]
        local = SparseVectors.together([(p, null) for p, (null, _) in parts], copies) if parts else None
        dense = self._null_space(Z, lost, smallest, local) if width else (Z, Z)
        if local is None:
            return NullVectors(*dense, self.system.empty)

        def together(which: int) -> SparseVectors:
            weak = [(p, SparseVectors.from_dense(dense[which][p], lost[p, 0])) for p in range(copies)]
            return SparseVectors.together([(p, found[which]) for p, found in parts] + weak, copies)

        return NullVectors(together(0), together(1), self.system.empty)

    def _null_space(
        self, Z: Tensor, lost: Tensor, smallest: Tensor, local: SparseVectors | None = None
    ) -> tuple[Tensor, Tensor]:
        """An orthonormal basis of the null space of A and its errors, from null vectors of the scaled matrix, about.

        Args:
            Z: (P, n, q), zeros where a matrix has fewer vectors.
            lost: (P, 1, q), which are vectors.
            local: an orthonormal basis of a part of the null space that is known already.
        """
        system = self.system
        # Rounding errors of A Z are magnified by the condition number, those of Z by its square, and both by D^-1:
        # where these are large, Z is carried as a pair of doubles.
        spread = system.scale.amax(1) / system.scale.amin(1)
        exact = bool((self.largest * spread > _EXACT * smallest).any())

        def correction(whole: Pair | Single) -> Tensor:
            if isinstance(whole, Pair):
                image = system.weigh(system.exact_residuals.matmul(whole).value)
            else:
                image = system.A.matmul(whole.high)
            return self.apply(system.A.adjoint(image))

        def beside(null: Tensor, *, by_rows: bool = False) -> Tensor:
            return orthonormal(null if local is None else null - local @ (local.mH @ null), lost, by_rows=by_rows)

        return refine_null_space(Z, system.scale, beside, correction, exact=exact)

    def apply(self, g: Tensor) -> Tensor:
        """(A^H A + d^2)^+ g, to some digits."""
        return torch.stack([block.apply(part) for block, part in zip(self.blocks, g, strict=True)])

    def dependent(self, p: int) -> list[int]:
        """Some columns that take part in a dependence among the columns of matrix p."""
        zeros = self.system.empty[p].nonzero()[:5, 0].tolist()
        return zeros or super().dependent(p)

    def solve(
        self, b: Tensor, c: Tensor, start: Tensor | None = None, *, judged: bool = True
    ) -> tuple[Tensor, Tensor, Report]:
        """As of `Factored`; what could not be explored is no success.

        A damped step of a fit is to be near its solution, and the cost tells what it is worth: one solve by the factor,
        without a search for directions that damping keeps from being weak.
        """
        system = self.system
        if not judged and system.weights is None and self._is_clear:
            run = self._apply_once(b, c)
            told = torch.zeros(Report.shape(*run.gamma.shape), dtype=torch.float64, device=b.device)
            return run.r, run.y, Report(*Report.unpacked(told))
        r, y, answer = super().solve(b, c, judged=judged)
        if bool((gave_up := self.known.gave_up).any()):
            answer = answer._replace(
                status=torch.where(gave_up, INACCURATE, answer.status),
                solution_error=torch.where(gave_up, torch.inf, answer.solution_error),
                rank=torch.where(gave_up, -1, answer.rank),
            )
        return r, y, answer
