"""Loops that Numba compiles, as those of `compiled`: dense Gram matrices of sparse ones, and their Cholesky factors."""

from __future__ import annotations

import numpy as np

from .compiled import _ONE, _jit, claim, conjugate, square

_STEPS = 5  # of power iterations


@_jit
def _lower_gram(pointers, indices, values, zero, G):
    """The lower triangle of A^H A into G (n, n), for values row by row, indices ascending."""
    n = len(G)
    for i in range(n):
        for j in range(i + 1):
            G[i, j] = zero
    for r in range(len(pointers) - 1):
        first, last = pointers[r], pointers[r + 1]
        for e in range(first, last):
            row, factor = G[indices[e]], conjugate(values[e])
            for f in range(first, e + _ONE):
                row[indices[f]] += factor * values[f]


@_jit
def dense_gram(counter, chunk, zero, pointers, indices, values, out):
    """out[p] = A^H A (n, n) of every matrix, for values (P, nnz) row by row."""
    copies, n = len(out), out.shape[1]
    while True:
        first = claim(counter) * chunk
        if first >= copies:
            return
        for p in range(first, min(first + chunk, copies)):
            G = out[p]
            _lower_gram(pointers, indices, values[p], zero, G)
            for i in range(n):
                for j in range(i):
                    G[j, i] = conjugate(G[i, j])


@_jit
def _factor(L, zero):
    """L of L L^H in the place of the lower triangle of a matrix, zeros above; whether there is one."""
    for i in range(len(L)):
        row = L[i]
        for j in range(i):
            other, total = L[j], zero
            for k in range(j):
                total += row[k] * conjugate(other[k])
            row[j] = (row[j] - total) / other[j]
            other[i] = zero
        rest = row[i].real
        for k in range(i):
            rest -= square(row[k])
        if not rest > 0:
            return False
        row[i] = np.sqrt(rest)
    return True


@_jit
def _times(G, v, w, zero):
    """w = G v for the lower triangle of a Hermitian G."""
    for i in range(len(v)):
        row, factor, total = G[i], v[i], G[i, i] * v[i]
        for j in range(i):
            total += row[j] * v[j]
            w[j] += conjugate(row[j]) * factor
        w[i] = total


@_jit
def _divide(L, v, w):
    """w = (L L^H)^-1 v"""
    n = len(v)
    for i in range(n):
        row, total = L[i], v[i]
        for j in range(i):
            total -= row[j] * w[j]
        w[i] = total / row[i]
    for k in range(n):
        i = n - 1 - k
        row = L[i]
        w[i] = factor = w[i] / row[i]
        for j in range(i):
            w[j] -= conjugate(row[j]) * factor


@_jit
def _largest(M, inverse, start, v, w, zero):
    """The largest eigenvalue of a Hermitian M, or of (M M^H)^-1, from below, by power iterations on rows of `start`."""
    most = 0.0
    for c in range(len(start)):
        size = 1.0
        for i in range(len(v)):
            v[i] = start[c, i]
        for _ in range(_STEPS):
            for i in range(len(v)):
                v[i] /= size
            if inverse:
                _divide(M, v, w)
            else:
                _times(M, v, w, zero)
            size = 0.0
            for i in range(len(v)):
                size += square(w[i])
            size = max(np.sqrt(size), 2.3e-308)
            v, w = w, v
        most = max(most, size)
    return most


@_jit
def dense_factor(counter, chunk, zero, pointers, indices, values, d2, start, L, extremes):
    """L of L L^H = A^H A + diag(d2) for every matrix (P, n, n), and the extreme eigenvalues of that, (P, 2).

    The smallest is NaN where there is no L.

    Args:
        values: (P, nnz) row by row.
        d2: (P, n), or None for zeros.
        start: (4, n) vectors with a part in every direction.
    """
    copies, n = L.shape[:2]
    v, w = np.empty(n, L.dtype), np.empty(n, L.dtype)
    while True:
        first = claim(counter) * chunk
        if first >= copies:
            return
        for p in range(first, min(first + chunk, copies)):
            M = L[p]
            _lower_gram(pointers, indices, values[p], zero, M)
            if d2 is not None:
                for i in range(n):
                    M[i, i] += d2[p, i]
            extremes[p, 0] = _largest(M, False, start, v, w, zero)
            extremes[p, 1] = 1 / _largest(M, True, start, v, w, zero) if _factor(M, zero) else np.nan
