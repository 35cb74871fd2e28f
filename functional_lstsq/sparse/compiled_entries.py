"""The loops over the entries of one matrix, which Numba compiles; `entry_kernels` says what they are for."""

from __future__ import annotations

import numpy as np

from .compiled import _jit, claim, square


@_jit
def take(counter, chunk, order, values, out):
    """out[e] = values[order[e]]"""
    entries = len(out)
    while True:
        first = claim(counter) * chunk
        if first >= entries:
            return
        for e in range(np.uint64(first), np.uint64(min(first + chunk, entries))):
            out[e] = values[order[e]]


@_jit
def scale(counter, chunk, columns, values, factors, out):
    """out[e] = values[e] factors[columns[e]]"""
    entries = len(out)
    while True:
        first = claim(counter) * chunk
        if first >= entries:
            return
        for e in range(np.uint64(first), np.uint64(min(first + chunk, entries))):
            out[e] = values[e] * factors[columns[e]]


@_jit
def column_squares(counter, chunk, columns, values, bounds, out):
    """out[p, j] += |values[e]|^2 over the entries e of column j with bounds[p] <= e < bounds[p + 1]."""
    parts = len(out)
    while True:
        first = claim(counter) * chunk
        if first >= parts:
            return
        for p in range(first, min(first + chunk, parts)):
            sums = out[p]
            for e in range(bounds[p], bounds[p + 1]):
                sums[columns[e]] += square(values[e])
