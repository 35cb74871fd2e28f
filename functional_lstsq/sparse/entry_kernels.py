"""Passes over the entries of one matrix in compiled code, a few numbers each, where torch makes temporaries of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import kernels
from .kernels import array, compressed, run
from .pattern import SparsePattern

_MANY = 10_000  # entries from which that takes less time than torch's operations
_PARTS = 8  # of the entries, at most, with sums of their own for all columns


def suit(values: Tensor) -> bool:
    """Whether to make these passes over values (P, nnz)."""
    return len(values) == 1 and values.shape[1] > _MANY and values.stride(1) == 1 and kernels.available(values.device)


def take_rows(pattern: SparsePattern, values: Tensor) -> Tensor:
    """Values (1, nnz) row by row, of a pattern whose own order is another."""
    order, out = compressed(pattern).order, torch.empty_like(values)
    assert order is not None
    _run("take", pattern, values, order, array(values)[0], out.numpy()[0])
    return out


def scale_columns(pattern: SparsePattern, values: Tensor, factors: Tensor) -> Tensor:
    """Values (1, nnz) times the numbers (1, n) of their columns."""
    out = torch.empty_like(values)
    _run("scale", pattern, values, _columns(pattern), array(values)[0], array(factors)[0], out.numpy()[0])
    return out


def column_squares(pattern: SparsePattern, values: Tensor) -> Tensor:
    """The squares (1, n) of the norms of the columns, which may leave the range of numbers."""
    n = pattern.shape[1]
    parts = min(_PARTS, max(1, pattern.nnz // (4 * n)))
    bounds, out = np.linspace(0, pattern.nnz, parts + 1).astype(np.uint64), np.zeros((parts, n))
    given, columns = array(values)[0], _columns(pattern)
    key = "column_squares", given.dtype, columns.itemsize
    run("column_squares", key, parts, 2 * pattern.nnz, columns, given, bounds, out)
    return torch.from_numpy(out.sum(0, keepdims=True))


def _run(name: str, pattern: SparsePattern, values: Tensor, places: np.ndarray, *arrays: np.ndarray) -> None:
    run(name, (name, values.dtype, places.itemsize), pattern.nnz, 2 * pattern.nnz, places, *arrays)


def _columns(pattern: SparsePattern) -> np.ndarray:
    """The columns of the entries, in the pattern's own order, as unsigned numbers."""
    where = compressed(pattern)
    if where.order is None:
        return where.indices
    return pattern.indices[1].numpy().view(np.uint64)
