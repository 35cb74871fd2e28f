"""The loops of a sparse product on a known pattern, which Numba compiles; `triple` says what they compute.

Both go row by row through A, and keep one row of C spread out in `row`, n numbers in double precision. `double` is an
array of its dtype, whatever the size.
"""

from __future__ import annotations

import numpy as np

from .compiled import _jit, claim, wide


@_jit
def triple(
    counter, chunk, double, a_pointers, a_indices, b_pointers, b_indices, c_pointers, c_indices, n, order, a, b, out
):
    """out[p, order[e]] = sum of a[p, i, k] b[p, k, j] over k, for the entries e = (i, j) of C."""
    copies, rows = len(a), len(a_pointers) - 1
    row = np.empty(n, double.dtype)
    while True:
        first = claim(counter) * chunk
        if first >= copies * rows:
            return
        for number in range(first, min(first + chunk, copies * rows)):
            p = number // rows
            i = number - p * rows
            left, right, found = a[p], b[p], out[p]
            for t in range(c_pointers[i], c_pointers[i + 1]):
                row[c_indices[t]] = 0
            for e in range(a_pointers[i], a_pointers[i + 1]):
                factor, k = wide(left[e]), np.int64(a_indices[e])
                for f in range(b_pointers[k], b_pointers[k + 1]):
                    row[b_indices[f]] += factor * wide(right[f])
            for t in range(c_pointers[i], c_pointers[i + 1]):
                found[t if order is None else order[t]] = row[c_indices[t]]


@_jit
def triple_of_left(
    counter, chunk, double, a_pointers, a_indices, b_pointers, b_indices, c_pointers, c_indices, n, order, b, c, out
):
    """out[p, order[e]] = sum of b[p, k, j] c[p, i, j] over j, for the entries e = (i, k) of A."""
    copies, rows = len(b), len(a_pointers) - 1
    row = np.empty(n, double.dtype)
    while True:
        first = claim(counter) * chunk
        if first >= copies * rows:
            return
        for number in range(first, min(first + chunk, copies * rows)):
            p = number // rows
            i = number - p * rows
            right, above, found = b[p], c[p], out[p]
            for t in range(c_pointers[i], c_pointers[i + 1]):
                row[c_indices[t]] = wide(above[t])
            for e in range(a_pointers[i], a_pointers[i + 1]):
                k, total = np.int64(a_indices[e]), double[0]
                for f in range(b_pointers[k], b_pointers[k + 1]):
                    total += wide(right[f]) * row[b_indices[f]]
                found[e if order is None else order[e]] = total
