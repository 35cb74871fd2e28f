"""Sparse factors of A^H A + shift: what depends on the pattern is analysed once, each set of values factored once.

The analysis belongs to the pattern and is kept there. rslab (supernodal L D L^T) is used where it imports; SciPy's
SuperLU in symmetric mode where it does not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse import csc_matrix, csr_matrix, diags
from scipy.sparse.csgraph import maximum_bipartite_matching, reverse_cuthill_mckee
from scipy.sparse.linalg import splu
from torch import Tensor

from ..errors import OTHER_SOLVER, SolveError
from ..sparse.gram_pattern import Gram
from ..sparse.lazy import lazy
from ..sparse.pattern import SparsePattern
from ..sparse.places import HERE, Places
from ..torch_func.process import pool_of

try:
    import rslab
except ImportError:  # no wheel for this platform
    rslab = None  # type: ignore[assignment]

_HEAVY = 128  # rows at most that are left out of A^H A for having many entries
_HEAVY_ROW = 100  # entries at least of such a row
_HEAVY_WORK = 1e7  # multiplications of heavy rows that can be afforded
_ENTRY_BYTES = 80  # that an entry of A^H A takes while its order is found
_FAST_ORDERING = 2e9  # operations of a factor above which a slower, better ordering is tried
# Entries of A^H A, and operations of a factor, below which more threads than one gain nothing (measured on two cores).
_PARALLEL_ENTRIES, _PARALLEL_FLOPS = 1e6, 1e10


class NotPositive(ArithmeticError):
    """The matrix is not positive definite to working precision."""


class GramAnalysis:
    """The pattern of A^H A and the analysis of its factor, which is the same in all `places` where rows of A are.

    Rows with so many entries that they alone would fill A^H A are left out of it: `heavy` are the numbers of those that
    are here, and the caller brings them back as a low-rank update.

    Attributes:
        left_out: how many rows are left out in all places.
        products: multiplications of A^H A in all places, a bound on its entries too.
        most: entries, rows and multiplications of the place that has most of each.
    """

    def __init__(self, pattern: SparsePattern, *, complex_values: bool, places: Places = HERE):
        self.pattern, self.complex_values, self.n, self.places = pattern, complex_values, pattern.shape[1], places
        counts = pattern.rows.pointers.diff().to(torch.int64)
        entries, rows = self._of_all(pattern.nnz, pattern.shape[0])
        work, heavy = counts.square(), counts > max(_HEAVY_ROW, 4 * entries / max(1, rows))
        of_heavy, of_others = int(work[heavy].sum()), int(work[~heavy].sum())
        count, of_heavy, others = self._of_all(int(heavy.sum()), of_heavy, of_others)
        few = 0 < count <= _HEAVY and of_heavy > max(_HEAVY_WORK, others)
        heavy = heavy if few else torch.zeros_like(heavy)
        self.heavy = heavy.nonzero()[:, 0]
        here = int(work[~heavy].sum())
        self.left_out, self.products = (count, others) if few else (0, others + of_heavy)
        most = torch.tensor([pattern.nnz, pattern.shape[0], here], device=pattern.device)
        self.most: tuple[int, ...] = tuple(places.largest(most).tolist())
        self.kept = None if not few else (~heavy[pattern.indices[0]]).nonzero()[:, 0]

    def _of_all(self, *counts: int) -> list[int]:
        return self.places.total(torch.tensor(counts, device=self.pattern.device)).tolist()

    @property
    def bytes_before(self) -> int:
        """A bound on what A^H A of the rows in one place takes, known before it is formed."""
        return _ENTRY_BYTES * min(self.most[2], self.n**2)

    @lazy
    def light(self) -> SparsePattern:
        """The pattern without its heavy rows."""
        if self.kept is None:
            return self.pattern
        return SparsePattern(self.pattern.indices[:, self.kept], self.pattern.shape)

    @lazy
    def _pattern(self) -> Gram:
        return self.places.gram_pattern(self.light)

    def _gram(self, values: Tensor) -> Tensor:
        """The lower triangle of A^H A (entries,), column by column, for the values (nnz,) of one matrix."""
        return self._pattern.values(values if self.kept is None else values[self.kept])

    def cosines(self, values: Tensor, norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(i, j, cosine of the angle between columns i > j), where light rows couple them; for norms (n,) of all."""
        i, j = self._pattern.rows, self._pattern.columns
        off = (i > j) & (norms[i] > 0) & (norms[j] > 0)
        i, j = i[off], j[off]
        return i, j, self._gram(values)[off].abs() / (norms[i] * norms[j])

    @lazy
    def _layout(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Pointers and rows, by columns, of the lower triangle of the real matrix that is factored; for each of its
        entries the place among real parts, imaginary parts, their negatives and a zero; where the diagonal is."""
        i, j = self._pattern.rows.cpu().numpy(), self._pattern.columns.cpu().numpy()
        count = len(i)
        source = np.arange(count)
        missing = np.setdiff1d(np.arange(self.n), i[i == j])
        if self.complex_values:
            # x + iy stands for [[x, -y], [y, x]].
            re, im, minus = source, source + count, source + 2 * count
            off = i > j
            i, j, source = (
                np.concatenate(parts)
                for parts in (
                    (2 * i, 2 * i + 1, 2 * i + 1, (2 * i)[off]),
                    (2 * j, 2 * j + 1, 2 * j, (2 * j + 1)[off]),
                    (re, re, im, minus[off]),
                )
            )
            missing = np.concatenate([2 * missing, 2 * missing + 1])
        if self.complex_values or len(missing):
            zero = count * (3 if self.complex_values else 1)
            i, j = np.concatenate([i, missing]), np.concatenate([j, missing])
            source = np.concatenate([source, np.full(len(missing), zero)])
            order = np.lexsort((i, j))
            i, j, source = i[order], j[order], source[order]
        return np.searchsorted(j, np.arange(self.size + 1)), i, source, (i == j).nonzero()[0]

    @property
    def size(self) -> int:
        """Dimension of the real matrix that is factored."""
        return 2 * self.n if self.complex_values else self.n

    @property
    def fill(self) -> float:
        """Predicted entries of the factor, or those of A^H A where there is no rslab to tell."""
        return 2 * len(self._layout[1]) if rslab is None else self._symbolic.factor_nnz

    @lazy
    def _symbolic(self) -> Any:
        _ = self._pattern  # which places make together

        def analyze(lower: Any, ordering: str, threads: int) -> Any:
            return _without_panic(lambda: rslab.analyze(lower, path="ldlt", ordering=ordering, threads=threads))

        def make() -> Any:
            starts, i, _, _ = self._layout
            lower = csc_matrix((np.ones(len(i)), i, starts), shape=(self.size, self.size))
            threads = pool_of(torch.get_num_threads() if len(i) > _PARALLEL_ENTRIES else 1)
            analysis = analyze(lower, "amf", threads)
            if analysis.estimate_memory()["factor_flops"] > _FAST_ORDERING:
                other = analyze(lower, "metis", threads)
                if other.estimate_memory()["factor_flops"] < analysis.estimate_memory()["factor_flops"]:
                    return other
            return analysis

        return self.places.together(make)

    @property
    def _threads(self) -> int:
        """For a factor."""
        large = self._symbolic.estimate_memory()["factor_flops"] > _PARALLEL_FLOPS
        return pool_of(torch.get_num_threads() if large else 1)

    @lazy
    def predicted(self) -> tuple[float, float]:
        """(operations, bytes) of a factor; a bound, that of a band factor, where there is no rslab to tell."""
        if rslab is not None:
            plan = self._symbolic.memory_plan(threads=self._threads)
            return float(self._symbolic.estimate_memory()["factor_flops"]), float(plan["peak_bytes"])
        starts, i, _, _ = self._layout
        lower = csc_matrix((np.ones(len(i)), i, starts), shape=(self.size, self.size))
        order = reverse_cuthill_mckee((lower + lower.T).tocsr(), symmetric_mode=True)
        place = np.empty_like(order)
        place[order] = np.arange(self.size)
        j = np.repeat(np.arange(self.size), np.diff(starts))
        first, last = np.minimum(place[i], place[j]), np.maximum(place[i], place[j])
        reach = np.arange(self.size)
        np.minimum.at(reach, last, first)
        widths = (np.arange(self.size) - reach + 1).astype(float)
        return float((widths**2).sum()), 24 * float(widths.sum())

    def factor(self, values: Tensor, diagonal: np.ndarray, shift: float) -> SparseFactor:
        """Factor A^H A + shift diag(diagonal) for values (nnz,); heavy rows are left out.

        Raises:
            NotPositive: the shift is too small.
        """
        numbers = self._gram(values)

        def make() -> SparseFactor | None:
            _, _, source, on_diagonal = self._layout
            stacked = torch.cat([numbers.real, numbers.imag, -numbers.imag] if self.complex_values else [numbers])
            data = np.append(stacked.cpu().numpy(), 0.0)[source]
            data[on_diagonal] += shift * np.repeat(diagonal, 2 if self.complex_values else 1)
            try:
                return SparseFactor(lambda: self._numeric(data), self.complex_values)
            except NotPositive:
                return None

        found = self.places.together(make)
        if found is None:
            raise NotPositive(f"A^H A + {shift:g} is not positive definite")
        return found

    def _numeric(self, data: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """What solves with the factor of the real matrix whose lower triangle `data` is."""
        if rslab is not None:
            symbolic, threads = self._symbolic, self._threads
            try:
                numeric = _without_panic(lambda: symbolic.factor(data, threads=threads))
            except RuntimeError as error:
                raise NotPositive(str(error)) from error
            if numeric.inertia[1] or numeric.inertia[2]:
                raise NotPositive(f"inertia {numeric.inertia}")
            return numeric.solve_many
        starts, i, _, _ = self._layout
        lower = csc_matrix((data, i, starts), shape=(self.size, self.size))
        whole = (lower + lower.T - diags(lower.diagonal())).tocsc()
        options = {"SymmetricMode": True, "DiagPivotThresh": 0.0}
        try:
            numeric = splu(whole, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)
        except RuntimeError as error:
            raise NotPositive(str(error)) from error
        if not (numeric.U.diagonal() > 0).all() or (numeric.perm_r != numeric.perm_c).any():
            raise NotPositive("a pivot is negative")
        return numeric.solve

    def heavy_rows(self, values: Tensor) -> Tensor:
        """The rows left out, as columns of a dense (n, p) tensor U: A^H A is the factored matrix and U U^H."""
        U = values.new_zeros((self.n, self.left_out))
        rows, columns = self.pattern.indices
        place = torch.full((self.pattern.shape[0],), -1, device=values.device)
        place[self.heavy] = self.places.before(len(self.heavy)) + torch.arange(len(self.heavy), device=values.device)
        which = (place[rows] >= 0).nonzero()[:, 0]
        U[columns[which], place[rows[which]]] = values[which].conj().resolve_conj()
        return self.places.total(U)


class SparseFactor:
    """Solves with one factor, on the CPU whatever the device of the right-hand sides.

    A process that is forked makes it anew: that of its parent may wait for threads that only the parent has.

    Args:
        make: gives what solves for a real array (rows, columns).
    """

    def __init__(self, make: Callable[[], Callable[[np.ndarray], np.ndarray]], complex_values: bool):
        self._make, self.complex_values = make, complex_values
        self._solve, self._process = make(), os.getpid()

    def __call__(self, g: Tensor) -> Tensor:
        """(n, k) -> (n, k)"""
        if self._process != os.getpid():
            self._solve, self._process = self._make(), os.getpid()
        n, k = g.shape
        plain = torch.view_as_real(g).movedim(2, 1).reshape(2 * n, k) if self.complex_values else g
        found = torch.from_numpy(np.ascontiguousarray(self._solve(np.ascontiguousarray(plain.cpu().numpy()))))
        found = found.to(g.device)
        return torch.view_as_complex(found.view(n, 2, k).movedim(1, 2).contiguous()) if self.complex_values else found


def _without_panic(call: Callable[[], Any]) -> Any:
    """`call()`; a panic of Rust, which is no Exception, as an error that other methods can follow."""
    try:
        return call()
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise SolveError(f"method {method_name()} failed: {error}", OTHER_SOLVER) from error


def method_name() -> str:
    """Of the backend in use."""
    return "direct-superlu" if rslab is None else "direct-rslab"


def full_matching(pattern: SparsePattern) -> tuple[int, int]:
    """(structural rank, a column that no row can be matched to or -1), from the pattern alone."""

    ones, (m, n) = np.ones(pattern.nnz, dtype=np.int8), pattern.shape
    if pattern.nnz >= max(m, n):
        where = pattern.rows
        graph = csr_matrix((ones, where.indices.cpu().numpy(), where.pointers.cpu().numpy()), shape=(m, n))
        unmatched = np.flatnonzero(maximum_bipartite_matching(graph, perm_type="row") < 0)
        return n - len(unmatched), int(unmatched[0]) if len(unmatched) else -1
    # Of rows and columns that have entries only, which take no more memory than these.
    (rows, i), (columns, j) = (np.unique(part, return_inverse=True) for part in pattern.indices.cpu().numpy())
    graph = csr_matrix((ones, (i, j)), shape=(len(rows), len(columns)))
    matched = columns[maximum_bipartite_matching(graph, perm_type="row") >= 0]
    gap = np.append(np.flatnonzero(matched != np.arange(len(matched))), len(matched))
    return len(matched), int(gap[0]) if len(matched) < n else -1
