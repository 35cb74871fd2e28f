"""Compiled kernels of sparse matrices on the CPU: products, sampled products, and the values of A^H A.

They take plain tensors and are called by `products` and `gram_pattern`, which keep torch's operations for every other
device, and for where Numba cannot be imported. Numba is imported when a kernel is first called, and compiles each one
for a dtype when that is first met: a few tenths of a second, kept on disk beside the package or in the user's home, or
in the folder NUMBA_CACHE_DIR.

Threads: the caller works through all of a kernel by itself, chunk by chunk, and threads that happen to have a core take
some of them away. A region of OpenMP would wait for all of its threads, which takes milliseconds on a busy machine, and
would not survive a fork.
"""

from __future__ import annotations

import functools
import operator
import os
import threading
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..torch_func.cores import threads
from .helpers import call_for_help, uncollected
from .numerics import at
from .pattern import SparsePattern

SMALL = 100_000  # multiplications up to which one thread has done a product before two of torch's have begun it
_PARALLEL = 300_000  # multiplications above which another thread is asked for help, which takes some 30 microseconds
_LONG = 2_000_000  # multiplications above which it is worth 5 microseconds to choose where that thread runs
_CHUNKS = 8  # that each thread gets about
_first = threading.RLock()  # held while Numba is imported and while it compiles
_ready: set[tuple] = set()  # what has been compiled


@functools.cache
def loops() -> Any:
    """All compiled loops by their names, or None."""
    with _first:
        try:
            from . import compiled, compiled_bounds, compiled_colors, compiled_dense, compiled_iteration, compiled_small
            from . import compiled_entries as entries
            from . import compiled_normal as normal
            from . import compiled_triple as triples
        except Exception:  # whatever is wrong with Numba here, torch's operations do
            return None
        parts = [compiled, compiled_bounds, compiled_colors, compiled_dense, compiled_iteration, compiled_small]
        parts += [entries, normal, triples]
        return SimpleNamespace(**functools.reduce(operator.or_, map(vars, parts)))


def available(device: torch.device) -> bool:
    """Whether there are kernels for tensors on `device`."""
    return device.type == "cpu" and loops() is not None


class Compressed(NamedTuple):
    """Compressed rows as unsigned numbers: `order[k]` is the caller's position of the k-th stored entry."""

    pointers: np.ndarray
    indices: np.ndarray
    order: np.ndarray | None


def _unsigned(t: Tensor) -> np.ndarray:
    numbers = t.numpy()
    return numbers.view(f"u{numbers.itemsize}")


def compressed(pattern: SparsePattern) -> Compressed:
    """The compressed rows of `pattern`, which keeps them."""

    def make() -> Compressed:
        pointers, indices, order = pattern.rows
        short = None if order is None else order.to(indices.dtype)
        return Compressed(_unsigned(pointers), _unsigned(indices), None if short is None else _unsigned(short))

    return pattern.keep("compressed", make)


def array(t: Tensor) -> np.ndarray:
    """The memory of a tensor, which is contiguous, or a copy of it."""
    return t.contiguous().numpy(force=True)


def _zero(dtype: torch.dtype) -> complex:
    return 0j if dtype.is_complex else 0.0


class Matrix(NamedTuple):
    """P matrices on one pattern, in compressed rows: values (P, nnz) row by row, and the zero of their kind."""

    pointers: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    zero: complex

    @classmethod
    def of(cls, pattern: SparsePattern, values: Tensor) -> Matrix:
        """For values (P, nnz) row by row."""
        return cls(*compressed(pattern)[:2], array(values), _zero(values.dtype))


def multiply(A: Matrix, X: Tensor, out: Tensor) -> Tensor:
    """A X into a contiguous `out` (P, m, k), for X (P, n, k)."""
    x, y = array(X), out.numpy(force=True)
    copies, rows, k = out.shape
    name = "multiply_one" if k == 1 else "multiply_block"
    if k == 1:
        x, y = x.reshape(copies, -1), y.reshape(copies, rows)
    key = name, out.dtype, A.pointers.itemsize
    run(name, key, copies * rows, A.values.size * k, A.zero, A.pointers, A.indices, A.values, x, y)
    return out


def add_up(pattern: SparsePattern, X: Tensor) -> Tensor:
    """S X (1, m, k) for real X (1, n, k) in double precision, S being the pattern with ones for its entries."""
    where, k = compressed(pattern), X.shape[2]
    out = X.new_empty((1, pattern.shape[0], k))
    x, y = array(X)[0], out.numpy(force=True)[0]
    key = "add_up", where.pointers.itemsize
    run("add_up", key, pattern.shape[0], pattern.nnz * k, where.pointers, where.indices, x, y)
    return out


def sample(pattern: SparsePattern, U: Tensor, W: Tensor) -> Tensor:
    """The entries (P, nnz) of U W^H at the stored positions, for U (P, m, k) and W (P, n, k)."""
    (copies, rows, k), where = U.shape, compressed(pattern)
    out = U.new_empty((copies, pattern.nnz))
    u, w, y = array(U), array(W), out.numpy(force=True)
    key = "sample", out.dtype, where.pointers.itemsize, where.order is None
    run("sample", key, copies * rows, out.numel() * k, _zero(U.dtype), *where, u, w, y)
    return out


class GramPlan(NamedTuple):
    """Where the entries of A are, and where those of the lower triangle of A^H A."""

    places: np.ndarray  # of the entries column by column, their numbers row by row
    starts: np.ndarray
    rows: np.ndarray
    work: int  # multiplications


def gram_plan(pattern: SparsePattern, rows: Tensor, columns: Tensor) -> GramPlan:
    """For positions (rows, columns) of the lower triangle of A^H A, column by column."""
    by_rows, by_columns = pattern.rows, pattern.columns
    places, kind = torch.arange(pattern.nnz, dtype=by_rows.indices.dtype), by_rows.indices.dtype
    if by_rows.order is not None:
        places = torch.empty_like(places).scatter_(0, by_rows.order, places)
    if by_columns.order is not None:
        places = places[by_columns.order]
    starts = torch.searchsorted(columns, torch.arange(pattern.shape[1] + 1))
    kind = kind if len(rows) < 2**31 else torch.int64
    lengths = by_rows.pointers.diff().long()
    work = int((lengths * (lengths + 1) // 2).sum())
    return GramPlan(_unsigned(places), _unsigned(starts.to(kind)), _unsigned(rows.to(kind)), work)


def gram(pattern: SparsePattern, plan: GramPlan, values: Tensor) -> Tensor:
    """(entries,) of the lower triangle of A^H A, for values (nnz,) in the caller's order."""
    rows, columns = compressed(pattern), compressed(pattern.T)
    order = pattern.rows.order
    given = array(values if order is None else values[order])
    out = values.new_empty(len(plan.rows))
    run(
        "gram",
        ("gram", out.dtype, rows.pointers.itemsize, plan.starts.itemsize),
        pattern.shape[1],
        plan.work,
        _zero(values.dtype),
        rows.pointers,
        rows.indices,
        plan.places,
        columns.pointers,
        columns.indices,
        plan.starts,
        plan.rows,
        given,
        out.numpy(force=True),
    )
    return out


def multiplications(pattern: SparsePattern) -> int:
    """Of a sparse product for A^H A."""
    return pattern.keep("multiplications", lambda: int(pattern.rows.pointers.diff().long().square().sum()))


def triple(A: SparsePattern, B: SparsePattern, C: SparsePattern, x: Tensor, y: Tensor, *, of_left: bool) -> Tensor:
    """Values (P, nnz) of C = A B for those of A and B, or `of_left` those of A for those of B and C; see `triple`."""
    name, of_x, of_y, wanted = ("triple_of_left", B, C, A) if of_left else ("triple", A, B, C)
    places = [compressed(pattern) for pattern in (A, B, C)]
    order = compressed(wanted).order
    out = x.new_empty((len(x), wanted.nnz))
    double = np.zeros(1, np.complex128 if x.is_complex() else np.float64)
    given = [array(_by_rows(*pair)) for pair in ((of_x, x), (of_y, y))]
    key = name, out.dtype, *(part.pointers.itemsize for part in places), order is None
    where = [part for place in places for part in place[:2]]
    work = len(x) * A.relate(("multiplications", B.name), lambda: _pairs(A, B))
    run(name, key, len(x) * A.shape[0], work, double, *where, C.shape[1], order, *given, out.numpy(force=True))
    return out


def _pairs(A: SparsePattern, B: SparsePattern) -> int:
    """Multiplications in A B."""
    return int(B.rows.pointers.diff().long()[A.rows.indices.long()].sum())


def _by_rows(pattern: SparsePattern, values: Tensor) -> Tensor:
    """Values (P, nnz) row by row."""
    order = pattern.rows.order
    return values if order is None else at(values, order)


def color_columns(pattern: SparsePattern, order: Tensor) -> Tensor:
    """Colours (n,) from 0 of columns that are taken in this order (n,); those of one colour share no row."""
    by_rows, by_columns, color = compressed(pattern), compressed(pattern.T), torch.full_like(order, -1)
    given = *by_rows[:2], *by_columns[:2], array(order), color.numpy()
    _call_first("color_columns", *given)
    return color


class Iteration:
    """Iterations of conjugate gradients for one column with a diagonal preconditioner, in one call for several of them.

    Args:
        pattern: of A.
        rows, columns: the values (1, nnz) of A row by row, and those of A^H.
        inverse: the preconditioner (1, n, 1).
        shift, d2: c and d^2, both (1, n, 1) or None for zero.
        r, y: iterates (1, m, 1) and (1, n, 1), which are changed where they are.
        gradient: A^H r - d^2 y - c.
        gamma: its square in the norm of the preconditioner.
    """

    def __init__(
        self,
        pattern: SparsePattern,
        rows: Tensor,
        columns: Tensor,
        inverse: Tensor,
        shift: Tensor | None,
        d2: Tensor | None,
        r: Tensor,
        y: Tensor,
        gradient: Tensor,
        gamma: float,
    ):
        first, second = compressed(pattern), compressed(pattern.T)
        p, q = torch.zeros_like(y), torch.empty_like(r)
        tensors = rows, columns, inverse, shift, d2, r, y, p, q, gradient
        v, t, *others = (None if tensor is None else array(tensor).reshape(-1) for tensor in tensors)
        self._given = first.pointers, first.indices, v, second.pointers, second.indices, t, *others
        self._key = "iterate", r.dtype, first.pointers.itemsize, shift is None, d2 is None
        self.gamma, self._beta = gamma, 0.0

    def advance(self, count: int, target: float, ceiling: float) -> tuple[int, bool]:
        """(how many iterations there were, whether there may be more): at most `count`, while gamma is in between."""
        numbers = self.gamma, self._beta, float(target), float(ceiling), count
        done, last, self.gamma, well = call("iterate", self._key, *self._given, *numbers)
        self._beta = self.gamma / last if last else 0.0
        return done, well


def call(name: str, key: tuple, *arguments: Any) -> Any:
    """What a loop gives; `key` says what is compiled for it."""
    if key in _ready:
        return getattr(loops(), name)(*arguments)
    result = _call_first(name, *arguments)
    _ready.add(key)
    return result


def run(name: str, key: tuple, rows: int, work: int, *arguments: Any) -> None:
    """Call a kernel for so many rows, alone or with help; `key` says what is compiled for it."""
    counter = np.zeros(1, np.int64)
    if key not in _ready:
        call(name, key, counter, max(rows, 1), *arguments)
        return
    kernel = getattr(loops(), name)
    workers = min(threads(), rows) if work > _PARALLEL else 1
    chunk = max(1, rows if workers == 1 else -(-rows // (_CHUNKS * workers)))
    given, long = (counter, chunk, *arguments), work > _LONG
    helpers = call_for_help(workers - 1, kernel, *given, long=long) if workers > 1 else []
    try:
        kernel(*given)
    finally:
        for helper in helpers:
            if not helper.cancel():  # it has begun
                helper.result()


def _call_first(name: str, *arguments: Any) -> Any:
    """Call what may have to be loaded or compiled before."""
    with _first, uncollected():
        every = loops()
        try:
            return getattr(every, name)(*arguments)
        except Exception:  # a file that cannot be read or written, and nothing was done; or it comes again
            setattr(every, name, every.uncached(getattr(every, name).py_func))
            return getattr(every, name)(*arguments)


if hasattr(os, "register_at_fork"):
    # Nobody else's thread compiles while this one forks: in the child nobody would ever give its lock back.
    os.register_at_fork(before=_first.acquire, after_in_parent=_first.release, after_in_child=_first.release)
