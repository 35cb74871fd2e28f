"""The loop that guesses which unknowns of bounded problems are at their bounds, which Numba compiles.

Block principal pivoting as in `linear.active_set`, by factors of parts of A^T A, whose rounding errors do no harm: what
comes out is held against the conditions of a minimum afterwards, and is a start for the search if it is wrong.
"""

from __future__ import annotations

import math

import numpy as np

from .compiled import _jit, claim, part

_PATIENCE = 3  # block exchanges in a row that may not lower the number of violations
_NOTHING = 1e-9  # of the size of what it is a sum of, below which a violation may be rounding


@part
def _solve_free(G, h, index, count, L, x):
    """x[index] of G x = h on the first `count` of `index`, given x elsewhere; whether G has full rank there."""
    for a in range(count):
        i = index[a]
        for c in range(a + 1):
            total = G[i, index[c]]
            for k in range(c):
                total -= L[a, k] * L[c, k]
            if c < a:
                L[a, c] = total / L[c, c]
            elif not total > 1e-14 * G[i, i]:
                return False
            else:
                L[a, a] = math.sqrt(total)
    for a in range(count):
        x[index[a]] = 0.0
    for a in range(count):
        i, total = index[a], h[index[a]]
        for j in range(len(x)):
            total -= G[i, j] * x[j] * (x[j] != 0)
        L[a, -1] = total
    for a in range(count):
        total = L[a, -1]
        for k in range(a):
            total -= L[a, k] * L[k, -1]
        L[a, -1] = total / L[a, a]
    for a in range(count - 1, -1, -1):
        total = L[a, -1] / L[a, a]
        x[index[a]] = total
        for k in range(a):
            L[k, -1] -= L[a, k] * total
    return True


@_jit
def guess_active(counter, chunk, G, h, lower, upper, active):
    """Better guesses of `active` (P, n) for min x^T G x / 2 - h^T x, lower <= x <= upper; see `active_set` for its
    values. Where G has no full rank on the free unknowns, or the exchanges come to no end, it stays as it is.
    """
    copies, n = h.shape
    L, x = np.empty((n, n + 1)), np.empty(n)
    index, now, wrong = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    while True:
        first = claim(counter) * chunk
        if first >= copies:
            return
        for p in range(first, min(first + chunk, copies)):
            now[:] = active[p]
            least, patience = n + 1, _PATIENCE
            for _ in range(20 + n):
                count = 0
                for j in range(n):
                    if now[j] == 0:
                        index[count] = j
                        count += 1
                        x[j] = 0.0
                    else:
                        x[j] = lower[p, j] if now[j] == -1 else upper[p, j] if now[j] == 1 else 0.0
                if not _solve_free(G[p], h[p], index, count, L, x):
                    break
                largest = 0.0
                for j in range(n):
                    largest = max(largest, abs(x[j]) * math.sqrt(G[p, j, j]))
                violations, last = 0, -1
                for j in range(n):
                    wrong[j] = 0
                    if now[j] == 0:
                        room = _NOTHING * largest / math.sqrt(G[p, j, j]) if G[p, j, j] > 0 else 0.0
                        wrong[j] = -1 if x[j] < lower[p, j] - room else 1 if x[j] > upper[p, j] + room else 0
                    elif abs(now[j]) == 1 and lower[p, j] < upper[p, j]:
                        total, terms = h[p, j], abs(h[p, j])
                        for k in range(n):
                            total -= G[p, j, k] * x[k]
                            terms += abs(G[p, j, k] * x[k])
                        wrong[j] = 2 if -total * now[j] > _NOTHING * terms else 0
                    if wrong[j] != 0:
                        violations += 1
                        last = j
                if violations == 0:
                    active[p] = now
                    break
                if violations < least:
                    least, patience = violations, _PATIENCE
                    alone = False
                else:
                    alone = patience <= 0
                    patience -= 1
                for j in range(n):
                    if wrong[j] != 0 and (j == last or not alone):
                        now[j] = 0 if wrong[j] == 2 else wrong[j]
