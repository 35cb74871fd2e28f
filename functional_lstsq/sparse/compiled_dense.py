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
def _times(G, V, W, zero):
    """W = G V for the lower triangle of a Hermitian G and four columns, which go side by side into vectors."""
    for i in range(len(V)):
        row, a, b, c, d = G[i], V[i, 0], V[i, 1], V[i, 2], V[i, 3]
        one, two, three, four = row[i] * a, row[i] * b, row[i] * c, row[i] * d
        for j in range(i):
            left, right = row[j], conjugate(row[j])
            one += left * V[j, 0]
            two += left * V[j, 1]
            three += left * V[j, 2]
            four += left * V[j, 3]
            W[j, 0] += right * a
            W[j, 1] += right * b
            W[j, 2] += right * c
            W[j, 3] += right * d
        W[i, 0], W[i, 1], W[i, 2], W[i, 3] = one, two, three, four


@part
def _divide_four(L, V, W):
    """W = (L L^H)^-1 V for four columns."""
    n = len(V)
    for i in range(n):
        row, one, two, three, four = L[i], V[i, 0], V[i, 1], V[i, 2], V[i, 3]
        for j in range(i):
            left = row[j]
            one -= left * W[j, 0]
            two -= left * W[j, 1]
            three -= left * W[j, 2]
            four -= left * W[j, 3]
        inverse = 1 / row[i].real
        W[i, 0], W[i, 1], W[i, 2], W[i, 3] = one * inverse, two * inverse, three * inverse, four * inverse
    for k in range(n):
        i = n - 1 - k
        row = L[i]
        inverse = 1 / row[i].real
        one, two, three, four = W[i, 0] * inverse, W[i, 1] * inverse, W[i, 2] * inverse, W[i, 3] * inverse
        W[i, 0], W[i, 1], W[i, 2], W[i, 3] = one, two, three, four
        for j in range(i):
            right = conjugate(row[j])
            W[j, 0] -= right * one
            W[j, 1] -= right * two
            W[j, 2] -= right * three
            W[j, 3] -= right * four


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
def _largest_eigenvalue(M, inverse, steps, start, V, W, zero):
    """That of a Hermitian M, or of (M M^H)^-1, from below, by power iterations on the columns of `start`, side by side.

    Args:
        start: (n, 4) vectors with a part in every direction.
        V, W: (n, 4), room for work.
    """
    n, sizes = len(V), np.ones(4)
    for i in range(n):
        for c in range(4):
            V[i, c] = start[i, c]
    for _ in range(steps):
        one, two, three, four = 1 / sizes[0], 1 / sizes[1], 1 / sizes[2], 1 / sizes[3]
        for i in range(n):
            V[i, 0] *= one
            V[i, 1] *= two
            V[i, 2] *= three
            V[i, 3] *= four
        if inverse:
            _divide_four(M, V, W)
        else:
            _times(M, V, W, zero)
        one = two = three = four = 0.0
        for i in range(n):
            one += square(W[i, 0])
            two += square(W[i, 1])
            three += square(W[i, 2])
            four += square(W[i, 3])
        for c, total in enumerate((one, two, three, four)):
            sizes[c] = max(math.sqrt(total), 2.3e-308)
        V, W = W, V
    return sizes.max()


@_jit
def dense_factor(counter, chunk, zero, pointers, indices, values, d2, start, L, extremes):
    """L of L L^H = A^H A + diag(d2) for every matrix (P, n, n), and the extreme eigenvalues of that, (P, 2).

    The smallest is NaN where there is no L.

    Args:
        values: (P, nnz) row by row.
        d2: (P, n), or None for zeros.
        start: (n, 4) vectors with a part in every direction.
    """
    copies, n = L.shape[:2]
    V, W = np.empty((n, 4), L.dtype), np.empty((n, 4), L.dtype)
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
            extremes[p, 0] = _largest_eigenvalue(M, False, _STEPS, start, V, W, zero)
            found = factor(M, zero)
            extremes[p, 1] = 1 / _largest_eigenvalue(M, True, _STEPS, start, V, W, zero) if found else np.nan


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
def _decompose(G, M, D, N, d2, told, start, V, W, zero):
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
        roots[task] = math.sqrt(_largest_eigenvalue(M, task > 1, steps, start, V, W, zero))
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
        start: (n, 4) vectors with a part in every direction.
    """
    copies, n = D.shape
    V, W, M = np.empty((n, 4), L.dtype), np.empty((n, 4), L.dtype), np.empty((n, n), L.dtype)
    weighted = np.empty(S.shape[1], L.dtype)
    while True:
        first = claim(counter) * chunk
        if first >= copies:
            return
        for p in range(first, min(first + chunk, copies)):
            told[p, WELL] = 0.0
            if _scale(pointers, indices, values[p], weights[p], damp[p], S[p], weighted, D[p], N[p], d2[p]):
                lower_gram(pointers, indices, weighted, zero, L[p])
                _decompose(L[p], M, D[p], N[p], d2[p], told[p], start, V, W, zero)
