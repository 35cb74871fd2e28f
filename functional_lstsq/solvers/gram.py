"""Sparse factors of A^H A + shift: what depends on the pattern is analysed once, each set of values factored once.

The analysis belongs to the pattern and is kept there. rslab (supernodal L D L^T) is used where it imports; SciPy's
SuperLU in symmetric mode where it does not.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.sparse import csc_matrix, csr_matrix, diags
from scipy.sparse.csgraph import maximum_bipartite_matching, reverse_cuthill_mckee
from scipy.sparse.linalg import splu
from torch import Tensor

from ..pattern import SparsePattern
from ..products import Operator

try:
    import rslab
except ImportError:  # no wheel for this platform
    rslab = None  # type: ignore[assignment]

_HEAVY = 128  # rows at most that are left out of A^H A for having many entries
_HEAVY_ROW = 100  # entries at least of such a row
_HEAVY_WORK = 1e7  # multiplications of heavy rows that can be afforded
_ENTRY_BYTES = 80  # that an entry of A^H A takes while its order is found
_FAST_ORDERING = 2e9  # operations of a factor above which a slower, better ordering is tried


class NotPositive(ArithmeticError):
    """The matrix is not positive definite to working precision."""


class GramAnalysis:
    """The pattern of A^H A and the analysis of its factor.

    Rows with so many entries that they alone would fill A^H A are left out of it: `heavy` are their numbers, and the
    caller brings them back as a low-rank update.
    """

    def __init__(self, pattern: SparsePattern, *, complex_values: bool):
        self.pattern, self.complex_values, self.n = pattern, complex_values, pattern.shape[1]
        counts = pattern.rows.pointers.diff().to(torch.int64)
        work = counts.square()
        heavy = counts > max(_HEAVY_ROW, 4 * pattern.nnz / max(1, pattern.shape[0]))
        few = 0 < int(heavy.sum()) <= _HEAVY and int(work[heavy].sum()) > max(_HEAVY_WORK, int(work[~heavy].sum()))
        heavy = heavy if few else torch.zeros_like(heavy)
        self.heavy = heavy.nonzero()[:, 0]
        self.products = int(work[~heavy].sum())  # multiplications of A^H A, a bound on its entries too
        self.kept = None if not few else (~heavy[pattern.indices[0]]).nonzero()[:, 0]

    @property
    def bytes_before(self) -> int:
        """A bound on what A^H A itself takes, known before it is formed."""
        return _ENTRY_BYTES * min(self.products, self.n**2)

    @cached_property
    def light(self) -> SparsePattern:
        """The pattern without its heavy rows."""
        if self.kept is None:
            return self.pattern
        return SparsePattern(self.pattern.indices[:, self.kept], self.pattern.shape)

    def gram(self, values: Tensor) -> Tensor:
        """A^H A (n, n) as torch CSR, entries in no particular order, for the values (nnz,) of one matrix."""
        values = values if self.kept is None else values[self.kept]
        operator = Operator(self.light, values[None])
        return operator.columns @ operator.rows

    @cached_property
    def _layout(self) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Pointers and columns of the product as it comes; pointers and rows of its sorted lower triangle by columns,
        the place in the product of each entry there, and where the diagonal is."""
        dtype = torch.complex128 if self.complex_values else torch.float64
        product = self.gram(torch.ones(self.pattern.nnz, dtype=dtype, device=self.pattern.device))
        pointers, columns = product.crow_indices(), product.col_indices()
        rows = np.repeat(np.arange(self.n), np.diff(pointers.cpu().numpy()))
        i, j = columns.cpu().numpy().astype(np.int64), rows  # by symmetry, row j of it holds column j
        source = np.arange(len(i))
        lower = i >= j
        i, j, source = i[lower], j[lower], source[lower]
        missing = np.setdiff1d(np.arange(self.n), i[i == j])
        zero = len(rows) * (3 if self.complex_values else 1)  # the place of a zero behind all values
        if self.complex_values:
            # x + iy stands for [[x, -y], [y, x]]. Row j of the product holds the conjugates of column j.
            re, im, minus = source, source + len(rows), source + 2 * len(rows)
            off = i > j
            i, j, source = (
                np.concatenate(parts)
                for parts in (
                    (2 * i, 2 * i + 1, 2 * i + 1, (2 * i)[off]),
                    (2 * j, 2 * j + 1, 2 * j, (2 * j + 1)[off]),
                    (re, re, minus, im[off]),
                )
            )
            missing = np.concatenate([2 * missing, 2 * missing + 1])
        i, j = np.concatenate([i, missing]), np.concatenate([j, missing])
        source = np.concatenate([source, np.full(len(missing), zero)])
        order = np.lexsort((i, j))
        i, j, source = i[order], j[order], source[order]
        size = self.size
        starts = np.searchsorted(j, np.arange(size + 1))
        return pointers, columns, starts, i, source, (i == j).nonzero()[0]

    @property
    def size(self) -> int:
        """Dimension of the real matrix that is factored."""
        return 2 * self.n if self.complex_values else self.n

    @property
    def fill(self) -> float:
        """Predicted entries of the factor, or those of A^H A where there is no rslab to tell."""
        return len(self._layout[1]) if rslab is None else self._symbolic.factor_nnz

    @cached_property
    def _symbolic(self) -> Any:
        _, _, starts, i, _, _ = self._layout
        lower = csc_matrix((np.ones(len(i)), i, starts), shape=(self.size, self.size))
        analysis = rslab.analyze(lower, path="ldlt", ordering="amf")
        if analysis.estimate_memory()["factor_flops"] > _FAST_ORDERING:
            other = rslab.analyze(lower, path="ldlt", ordering="metis")
            if other.estimate_memory()["factor_flops"] < analysis.estimate_memory()["factor_flops"]:
                return other
        return analysis

    @cached_property
    def predicted(self) -> tuple[float, float]:
        """(operations, bytes) of a factor; a bound, that of a band factor, where there is no rslab to tell."""
        if rslab is not None:
            plan = self._symbolic.memory_plan()
            return float(self._symbolic.estimate_memory()["factor_flops"]), float(plan["peak_bytes"])
        _, _, starts, i, _, _ = self._layout
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
        pointers, columns, starts, i, source, on_diagonal = self._layout
        product = self.gram(values)
        numbers = product.values().clone()  # as a view of a sparse tensor it could not be taken apart
        if not (torch.equal(product.crow_indices(), pointers) and torch.equal(product.col_indices(), columns)):
            del self._layout, self._symbolic  # entries came in another order this time
            raise RuntimeError("the sparse product A^H A changed its pattern between two calls with one pattern")
        stacked = torch.cat([numbers.real, numbers.imag, -numbers.imag] if self.complex_values else [numbers])
        data = np.append(stacked.cpu().numpy(), 0.0)[source]
        data[on_diagonal] += shift * np.repeat(diagonal, 2 if self.complex_values else 1)
        if rslab is not None:
            try:
                numeric = self._symbolic.factor(data)
            except RuntimeError as error:
                raise NotPositive(str(error)) from error
            if numeric.inertia[1] or numeric.inertia[2]:
                raise NotPositive(f"inertia {numeric.inertia}")
            return SparseFactor(numeric.solve_many, self.complex_values)
        lower = csc_matrix((data, i, starts), shape=(self.size, self.size))
        whole = (lower + lower.T - diags(lower.diagonal())).tocsc()
        options = {"SymmetricMode": True, "DiagPivotThresh": 0.0}
        try:
            numeric = splu(whole, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)
        except RuntimeError as error:
            raise NotPositive(str(error)) from error
        if not (numeric.U.diagonal() > 0).all() or (numeric.perm_r != numeric.perm_c).any():
            raise NotPositive("a pivot is negative")
        return SparseFactor(numeric.solve, self.complex_values)

    def heavy_rows(self, values: Tensor) -> Tensor:
        """The rows left out, as columns of a dense (n, p) tensor U: A^H A is the factored matrix and U U^H."""
        U = values.new_zeros((self.n, len(self.heavy)))
        for place, row in enumerate(self.heavy.tolist()):
            where = (self.pattern.indices[0] == row).nonzero()[:, 0]
            U[self.pattern.indices[1, where], place] = values[where].conj()
        return U


class SparseFactor:
    """Solves with one factor, on the CPU whatever the device of the right-hand sides."""

    def __init__(self, solve, complex_values: bool):
        self._solve, self.complex_values = solve, complex_values

    def __call__(self, g: Tensor) -> Tensor:
        """(n, k) -> (n, k)"""
        n, k = g.shape
        plain = torch.view_as_real(g).movedim(2, 1).reshape(2 * n, k) if self.complex_values else g
        found = torch.from_numpy(np.ascontiguousarray(self._solve(np.ascontiguousarray(plain.cpu().numpy()))))
        found = found.to(g.device)
        return torch.view_as_complex(found.view(n, 2, k).movedim(1, 2).contiguous()) if self.complex_values else found


def method_name() -> str:
    """Of the backend in use."""
    return "direct-superlu" if rslab is None else "direct-rslab"


def available_bytes(device: torch.device | None = None) -> int:
    """Memory that can still be had; half of what the machine has where the system does not say."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return 2**32


def full_matching(pattern: SparsePattern) -> tuple[int, int]:
    """(structural rank, a column that no row can be matched to or -1), from the pattern alone."""

    where = pattern.rows
    ones = np.ones(pattern.nnz, dtype=np.int8)
    graph = csr_matrix((ones, where.indices.cpu().numpy(), where.pointers.cpu().numpy()), shape=pattern.shape)
    rows = maximum_bipartite_matching(graph, perm_type="row")
    unmatched = np.flatnonzero(rows < 0)
    return pattern.shape[1] - len(unmatched), int(unmatched[0]) if len(unmatched) else -1
