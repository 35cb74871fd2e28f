"""Conjugate gradients on A^H A + d^2 in compiled code, with one pass over A, or over A^H A itself, an iteration."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..torch_func.cores import threads
from . import kernels
from .gram_pattern import gram_pattern
from .helpers import call_for_help
from .pattern import SparsePattern

_CHUNKS = 4  # of a product with the rows of A, each with sums of its own for all columns
_MOST_THREADS = 8  # above which torch's products, which take them all, are the faster ones
_PARALLEL = 40_000  # multiplications of a product from which a second thread gains
_LONGEST = 2**29  # multiplications, some 0.5 s, after which an interrupt is heard
_APART = 4  # times the updated gamma, above which the one that is computed anew is of another gradient
_BLOWN_UP = 1e10  # times gamma, after which iterations are of no use
_DENSER = 1.5  # times the entries of A that A^H A may have


class _Whole(NamedTuple):
    """The pattern of A^H A by rows: pointers, indices, and which entry of the lower triangle is where."""

    pointers: np.ndarray
    indices: np.ndarray
    places: Tensor


def _whole(pattern: SparsePattern, kind: torch.dtype) -> _Whole | None:
    """That of `pattern`, which keeps it; None where it has many more entries than A, and of complex numbers."""
    if kind.is_complex:
        return None

    def make() -> _Whole | None:
        if pattern.nnz >= 2**31 or kernels.multiplications(pattern) > 2 * _DENSER * pattern.nnz:
            return None
        lower, n = gram_pattern(pattern), pattern.shape[1]
        mirrored = (lower.rows != lower.columns).nonzero()[:, 0]
        if len(lower.rows) + len(mirrored) > _DENSER * pattern.nnz:
            return None
        rows, columns = (
            torch.cat([lower.rows, lower.columns[mirrored]]),
            torch.cat([lower.columns, lower.rows[mirrored]]),
        )
        places = torch.cat([torch.arange(len(lower.rows)), mirrored])
        order = (rows * n + columns).argsort()
        pointers = torch.searchsorted(rows[order], torch.arange(n + 1))
        return _Whole(
            pointers.numpy().astype(np.uint32), columns[order].numpy().astype(np.uint32), places[order].contiguous()
        )

    return pattern.keep("whole", make)


def work(pattern: SparsePattern, kind: torch.dtype) -> int:
    """Entries that a product with A^H A reads, of A twice each."""
    whole = _whole(pattern, kind)
    return 2 * pattern.nnz if whole is None else len(whole.places)


class NormalProducts:
    """What multiplies by A^H A.

    Args:
        pattern, values: of A, (1, nnz) in the pattern's own order.
        rows: values row by row.
    """

    def __init__(self, pattern: SparsePattern, values: Tensor, rows: Tensor):
        whole, self.work = _whole(pattern, values.dtype), work(pattern, values.dtype)
        if whole is None:
            first = kernels.compressed(pattern)
            given = first.pointers, first.indices, kernels.array(rows)[0]
        else:
            entries = gram_pattern(pattern).values(values[0])[whole.places]
            given = whole.pointers, whole.indices, kernels.array(entries)
        self.n, self.dtype = pattern.shape[1], given[2].dtype
        self.arrays = whole is not None, self.dtype.type(0), *given
        chunks = 2 * _CHUNKS if whole is not None else _CHUNKS
        self.sums = chunks if whole is None else 1  # vectors of n that a product writes to
        # Chunks of as many entries each.
        pointers = given[0].astype(np.int64)
        inner = np.searchsorted(pointers, np.linspace(0, pointers[-1], chunks + 1)[1:-1])
        self.bounds = np.array([0, *inner, len(pointers) - 1], np.uint64)
        self.parts = self.bounds if whole is not None else np.linspace(0, self.n, chunks + 1).astype(np.uint64)

    @property
    def key(self) -> tuple:
        return self.dtype, self.arrays[2].itemsize

    @staticmethod
    def suit(values: Tensor) -> bool:
        """Whether there are such products for values (P, nnz), and whether they take less time than others."""
        copies, entries = values.shape
        few = threads() <= _MOST_THREADS or entries <= kernels.SMALL
        double = values.dtype in (torch.float64, torch.complex128)
        return few and double and copies == 1 and entries > 0 and kernels.available(values.device)


def vector(t: Tensor | None, kind: Any) -> np.ndarray:
    """(n,) of (1, n, 1), or nothing."""
    return np.empty(0, kind) if t is None else kernels.array(t).reshape(-1)


class NormalIteration:
    """Iterations for one column with a diagonal preconditioner.

    Args:
        products: of A.
        inverse: the preconditioner (1, n, 1).
        d2: d^2 (1, n, 1) or None for zero.
        weight, start: (1, n, 1), the latter None for zero; iterations end by the norm of weight (start + y).
        y: (1, n, 1), which is changed where it is.
    """

    def __init__(
        self,
        products: NormalProducts,
        inverse: Tensor,
        d2: Tensor | None,
        weight: Tensor,
        start: Tensor | None,
        y: Tensor,
    ):
        self.products, chunks = products, len(products.bounds) - 1
        self._threads = min(threads(), _CHUNKS) if products.work > _PARALLEL else 1
        queues = 1 if self._threads == 1 else 2 if self._threads == 2 else 4
        loops = kernels.loops()
        self._team, self._g = np.full((queues + 2, 8), loops.OVER), np.empty(products.n, products.dtype)
        p, w = np.zeros(products.n, products.dtype), np.zeros((products.sums, products.n), products.dtype)
        own = [vector(t, np.float64) for t in (inverse, d2, weight)]
        places = self._team, products.bounds, products.parts, np.zeros((4, chunks)), np.zeros(2)
        self._shared = (
            *places,
            *products.arrays,
            p,
            w,
            *own,
            vector(start, products.dtype),
            y.numpy(force=True).reshape(-1),
            self._g,
        )
        self._key = "iterate_normal", *products.key
        self.gamma = self._last = 0.0

    def begin(self, gradient: Tensor, gamma: float) -> None:
        """Go on from the gradient (1, n, 1), of which this is the gamma."""
        # Where rounding has taken over, the last direction is none for this gradient.
        if not gamma < _APART * self.gamma:
            self._last = 0.0
        self._g[:] = gradient.numpy(force=True).reshape(-1)
        self.gamma = gamma

    def advance(self, limit: float, floor: float, least: float, count: int) -> tuple[int, bool]:
        """(how many iterations there were, whether there may be more): see `compiled_normal.iterate_normal`."""
        if self._threads > 1:
            key, helpers = ("help_iterate", *self._key), self._threads - 1
            kernels.call("help_iterate", key, *self._shared)  # which has nothing to do as yet, and is compiled
            self._team[:-2], self._team[-2], self._team[-1] = kernels.loops().NONE, len(self.products.bounds) - 1, 0
            call_for_help(helpers, kernels.call, "help_iterate", key, *self._shared, long=True)
        count = max(1, min(count, _LONGEST // self.products.work))
        gamma, beta = self.gamma, self.gamma / self._last if self._last else 0.0
        numbers = gamma, beta, limit, floor, least, _BLOWN_UP * gamma, count
        done, self._last, self.gamma, goes_on = kernels.call("iterate_normal", self._key, *self._shared, *numbers)
        return done, goes_on
