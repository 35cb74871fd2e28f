"""Loops that Numba compiles, as those of `compiled`: dense Gram matrices of sparse ones, and their Cholesky factors.

Those of small matrices are scaled here too, for solves by `compiled_small`.
"""

from __future__ import annotations

import math

import numpy as np

from .compiled import _ONE, _jit, claim, conjugate, part, square

_STEPS, _INVERSE_STEPS = 5, 3  # of power iterations; the largest eigenvalues of inverses lie further apart
_PLAIN = 1e4  # condition number up to which a factor alone is right to four digits
_EVEN = 1e-6  # ratio of weights that are not zero, down to which a Cholesky factor does
LEAST, MOST = 2.0**-100, 2.0**100  # norms of columns and right-hand sides, whose squares and products are numbers
WELL, LARGEST, SMALLEST, SIZE, CONDITION, NORM, UNIT = range(7)  # what `small_factor` tells of a matrix


@part
def lower_gram(pointers, indices, values, zero, G):
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
            lower_gram(pointers, indices, values[p], zero, G)
            for i in range(n):
                for j in range(i):
                    G[j, i] = conjugate(G[i, j])


@part
def factor(L, zero):
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


@part
def _times(G, v, w, zero):
    """w = G v for the lower triangle of a Hermitian G."""
    for i in range(len(v)):
        row, factor, total = G[i], v[i], G[i, i] * v[i]
        for j in range(i):
            total += row[j] * v[j]
            w[j] += conjugate(row[j]) * factor
        w[i] = total


@part
def divide(L, v, w):
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


@part
def largest_eigenvalue(M, inverse, steps, start, v, w, zero):
    """That of a Hermitian M, or of (M M^H)^-1, from below, by power iterations on rows of `start`."""
    most = 0.0
    for c in range(len(start)):
        size = 1.0
        for i in range(len(v)):
            v[i] = start[c, i]
        for _ in range(steps):
            for i in range(len(v)):
                v[i] /= size
            if inverse:
                divide(M, v, w)
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
            lower_gram(pointers, indices, values[p], zero, M)
            if d2 is not None:
                for i in range(n):
                    M[i, i] += d2[p, i]
            extremes[p, 0] = largest_eigenvalue(M, False, _STEPS, start, v, w, zero)
            found = factor(M, zero)
            extremes[p, 1] = 1 / largest_eigenvalue(M, True, _STEPS, start, v, w, zero) if found else np.nan


@part
def _scale(pointers, indices, values, weights, damp, S, V, D, N, d2):
    """S = A D^-1, V = W^(1/2) S with columns of norms N from 1 to 2, d2 = (d D^-1)^2; whether all is of usual size."""
    (n, m), most = (len(D), len(pointers) - 1), 1.0
    for j in range(n):
        d = damp[j] if len(damp) == n else damp[0] if len(damp) else 0.0
        if not d >= 0:
            return False
        d2[j], N[j] = d, d**2  # infinite for an unknown that is pinned at zero
    for i in range(len(weights)):
        most = weights[i] if i == 0 else max(most, weights[i])
    if not LEAST <= most <= MOST:
        return False
    for i in range(m):
        weight = weights[i] if len(weights) else 1.0
        if not (weight == 0 or _EVEN * most <= weight):
            return False
        for e in range(pointers[i], pointers[i + 1]):
            N[indices[e]] += weight * square(values[e])
    for j in range(n):
        if math.isinf(d2[j]):
            # It keeps to itself: an empty column, with a damping of one.
            D[j], N[j], d2[j] = math.inf, 1.0, 1.0
            continue
        norm = math.sqrt(N[j])
        if not LEAST <= norm <= MOST:
            return False
        D[j] = math.ldexp(1.0, math.frexp(norm)[1] - 1)
        N[j] = norm / D[j]
        d2[j] = (d2[j] / D[j]) ** 2
    for i in range(m):
        root = math.sqrt(weights[i]) if len(weights) else 1.0
        for e in range(pointers[i], pointers[i + 1]):
            S[e] = values[e] / D[indices[e]]
            V[e] = root * S[e]
            if S[e] == 0 and values[e] != 0 and D[indices[e]] < math.inf:
                return False
    return True


@part
def _decompose(G, M, D, N, d2, told, start, v, w, zero):
    """L in the place of G = A^H W A, given the lower triangle of that, and what is told of it; M is room for work."""
    n = len(D)
    told[SIZE] = told[NORM] = 0.0
    told[UNIT] = D[0]
    for j in range(n):
        told[SIZE] += G[j, j].real
        told[NORM] += (N[j] * D[j]) ** 2 if D[j] < math.inf else 0.0
        told[UNIT] = min(told[UNIT], D[j])
        G[j, j] += d2[j]
    told[SIZE], told[NORM] = math.sqrt(told[SIZE]), math.sqrt(told[NORM])
    # Roots of eigenvalues of A^H A + d^2, of that with columns of norm 1, and of the inverses of both, by N^-1 L.
    roots = np.empty(4)
    for task in range(4):
        if task == 2 and not factor(G, zero):
            return
        for i in range(n):
            for j in range(i + 1):
                M[i, j] = G[i, j]
                if task == 1:
                    M[i, j] /= N[i] * N[j]
                elif task == 3:
                    M[i, j] /= N[i]
        steps = _INVERSE_STEPS if task == 3 else _STEPS
        roots[task] = math.sqrt(largest_eigenvalue(M, task > 1, steps, start, v, w, zero))
    told[LARGEST], told[SMALLEST], told[CONDITION] = roots[0], 1 / roots[2], max(roots[1] * roots[3], 1.0)
    if told[LARGEST] < _PLAIN * told[SMALLEST]:
        told[WELL] = 1.0


@_jit
def small_factor(counter, chunk, zero, pointers, indices, values, weights, damp, start, S, D, N, d2, L, told):
    """The factors of every matrix: see `_scale`, L (P, n, n), and what else is to be known (P, 7).

    Args:
        values: (P, nnz) row by row.
        weights: (P, 0) for ones, or (P, m).
        damp: (P, 0) for none, (P, 1) or (P, n).
        start: (4, n) vectors with a part in every direction.
    """
    copies, n = D.shape
    v, w, M, V = np.empty(n, L.dtype), np.empty(n, L.dtype), np.empty((n, n), L.dtype), np.empty(S.shape[1], L.dtype)
    while True:
        first = claim(counter) * chunk
        if first >= copies:
            return
        for p in range(first, min(first + chunk, copies)):
            told[p, WELL] = 0.0
            if _scale(pointers, indices, values[p], weights[p], damp[p], S[p], V, D[p], N[p], d2[p]):
                lower_gram(pointers, indices, V, zero, L[p])
                _decompose(L[p], M, D[p], N[p], d2[p], told[p], start, v, w, zero)
