"""Patterns made of patterns: unions, stacks, selections and products, each made once and kept on the first pattern.

Patterns go by their names here, which a compiler takes for constants: a graph that is compiled for some patterns is
compiled again for others. `recall` of `pattern` calls these functions.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..torch_func.tracing import concrete, is_mapped, unseen_by_transforms
from .csr_product import sparse_product
from .pattern import SparsePattern, new_name, pattern_named, recall, sort


class Merged:
    """A pattern, and where in it the entries are of the one or two that it is made of.

    Attributes:
        pattern, nnz: the pattern, and its number of entries.
        first, second: of a union, the numbers in it of the entries of either pattern; of a selection, `first` has the
            numbers that its entries had before. None: all, in order.
    """

    def __init__(self, pattern: SparsePattern, first: Tensor | None, second: Tensor | None = None):
        self.pattern, self.nnz, self.first, self.second = pattern, pattern.nnz, first, second
        self.name = new_name()


def union(first: str, second: str) -> Merged:
    """The positions that either of two patterns of one shape has. Cost: one sort of all entries.

    Entries of the first come first, in their order, then those of the second alone, in theirs.
    """
    A, B = pattern_named(first), pattern_named(second)
    return A.relate(("union", second), lambda: Merged(A, None) if A == B else _union(A, B))


def _union(A: SparsePattern, B: SparsePattern) -> Merged:
    both = torch.cat([A.indices, B.indices], 1)
    rows, columns, order = sort(both[0], both[1], A.shape)
    if order is None:
        order = torch.arange(both.shape[1], device=A.device)
    new = torch.ones(len(rows), dtype=torch.bool, device=A.device)
    new[1:] = (rows[1:] != rows[:-1]) | (columns[1:] != columns[:-1])
    leaders = order[new]  # of each position the first entry, which is that of A where A has one
    fresh = torch.zeros(both.shape[1], dtype=torch.bool, device=A.device)
    fresh[leaders] = True
    numbers = fresh.cumsum(0) - 1  # entries of A keep theirs, since no two of them share a position
    second = torch.empty_like(order)
    second[order] = numbers[leaders][new.cumsum(0) - 1]
    second = second[A.nnz :].contiguous()
    if len(leaders) == A.nnz:
        return Merged(A, None, second)
    return Merged(SparsePattern(both[:, fresh], A.shape), torch.arange(A.nnz, device=A.device), second)


def stacked(names: tuple[str, ...], down: bool, right: bool) -> SparsePattern:
    """Patterns below each other (`down`), beside each other (`right`), or, for both, along the diagonal.

    Entries are those of the first pattern, then those of the second, and so on.
    """
    patterns = [pattern_named(name) for name in names]

    def make() -> SparsePattern:
        parts, m, n = [], 0, 0
        for pattern in patterns:
            rows, columns = pattern.indices
            parts.append(torch.stack([rows + m * down, columns + n * right]))
            m, n = m + pattern.shape[0], n + pattern.shape[1]
        shape = m if down else patterns[0].shape[0], n if right else patterns[0].shape[1]
        return SparsePattern(torch.cat(parts, 1), shape)

    return patterns[0].relate(("stack", down, right, *names[1:]), make)


def product_pattern(first: str, second: str) -> SparsePattern:
    """The positions (i, j) where some k has entries (i, k) and (k, j).

    Cost: one product of sparse matrices, SciPy's on the CPU.
    """
    A, B = pattern_named(first), pattern_named(second)

    def make() -> SparsePattern:
        parts = [
            torch.sparse_csr_tensor(
                pattern.rows.pointers,
                pattern.rows.indices,
                torch.ones(pattern.nnz, dtype=torch.float64, device=pattern.device),
                pattern.shape,
                device=pattern.device,
                check_invariants=False,
            )
            for pattern in (A, B)
        ]
        found = sparse_product(*parts)  # of ones, so that nothing cancels
        rows = torch.repeat_interleave(found.crow_indices().diff())
        return SparsePattern(torch.stack([rows, found.col_indices().long()]), (A.shape[0], B.shape[1]))

    return A.relate(("product", second), make)


_AXES = ("rows", "columns")


def select(pattern: SparsePattern, key: Any, axis: int) -> Merged:
    """Some rows or columns of a pattern, in the order asked for, whose entries go along them.

    Args:
        key: a slice, numbers or a mask.
        axis: 0 for rows, 1 for columns.
    """
    what = _AXES[axis]
    if isinstance(key, slice):
        return recall(_select_range, pattern.name, *key.indices(pattern.shape[axis]), axis)
    if isinstance(key, (list, tuple, range)):
        return recall(_select_listed, pattern.name, tuple(key), axis)
    if not hasattr(key, "__len__") or not hasattr(key, "dtype"):
        one = f"the single one {key!r}; write A[[{key!r}]]" if hasattr(key, "__index__") else repr(key)
        raise TypeError(f"A[{what}] takes a slice, a list, or a tensor of integers or of bools, got {one}")
    if torch.compiler.is_compiling():
        raise TypeError(f"A[{what}] takes slices and lists in a compiled function, got a tensor: index outside of it")
    key = torch.as_tensor(key)
    if is_mapped(key):
        raise ValueError(f"A[{what}] must be the same for the whole batch; a pattern cannot be vmapped")
    return _select_numbered(pattern, concrete(key).detach(), axis)


def _select_range(name: str, start: int, stop: int, step: int, axis: int) -> Merged:
    pattern, numbers = pattern_named(name), range(start, stop, step)
    return pattern.relate(
        ("select", axis, numbers),
        lambda: _select(pattern, torch.tensor(numbers, dtype=torch.int64, device=pattern.device), axis),
    )


def _select_listed(name: str, key: tuple, axis: int) -> Merged:
    listed = np.asarray(key) if key else np.zeros(0, np.int64)
    if listed.dtype.kind not in "bui":
        raise TypeError(f"A[{_AXES[axis]}] takes a list of integers or of bools, got {list(key)!r}")
    return _select_numbered(pattern_named(name), torch.from_numpy(listed), axis)


def _select_numbered(pattern: SparsePattern, key: Tensor, axis: int) -> Merged:
    size, what = pattern.shape[axis], _AXES[axis]
    if key.ndim != 1 or key.is_floating_point() or key.is_complex():
        raise TypeError(f"A[{what}] takes integers or bools of shape (k,), got {key.dtype}, shape {tuple(key.shape)}")
    with unseen_by_transforms():
        if key.dtype == torch.bool:
            if len(key) != size:
                raise IndexError(f"A[{what}]: a mask must have shape ({size},), got ({len(key)},)")
            key = key.nonzero()[:, 0]
        key = key.to(torch.int64)
        if key.numel():
            low, high = int(key.min()), int(key.max())
            if low < -size or high >= size:
                raise IndexError(f"A[{what}]: index {low if low < -size else high} lies outside of {size} {what}")
        key = torch.where(key < 0, key + size, key)
        known = hashlib.blake2b(key.cpu().numpy().tobytes(), digest_size=16).digest()
    return pattern.relate(("select", axis, known), lambda: _select(pattern, key, axis))


def _select(pattern: SparsePattern, numbers: Tensor, axis: int) -> Merged:
    numbers, along = numbers.to(pattern.device), pattern.T if axis else pattern
    pointers, others, order = along.rows
    counts = pointers.diff().long()[numbers]
    own = torch.repeat_interleave(torch.arange(len(numbers), device=pattern.device), counts)
    shifts = pointers.long()[numbers] - (counts.cumsum(0) - counts)
    entries = torch.arange(len(own), device=pattern.device) + shifts[own]
    pair, (m, n) = torch.stack([own, others[entries].long()]), (len(numbers), along.shape[1])
    selected = SparsePattern(pair.flip(0), (n, m)) if axis else SparsePattern(pair, (m, n))
    return Merged(selected, entries if order is None else order[entries])
