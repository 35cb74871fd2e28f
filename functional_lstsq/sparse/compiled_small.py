"""Loops that Numba compiles: whole solves of small systems, which take far less time than two hundred operations.

These are the steps that `solvers.factored` takes for `Dense`, with the estimates of errors that `refinement`,
`acceptance` and `verdict` make. Where one of them asks for more (a condition number above 1e4, residuals in extended
precision, a solution that is zero or not accepted, numbers of unusual size), nothing is given.
"""

from __future__ import annotations

import math

import numpy as np

from .compiled import _jit, claim, part, square
from .compiled_dense import CONDITION, LARGEST, LEAST, MOST, NORM, SIZE, UNIT, WELL
from .compiled_refinement import (
    EPS,
    TINY,
    System,
    Work,
    apply,
    bound_of_rounding,
    gradient,
    norm,
    refine,
    relative_error,
    row_norm,
    sample_of_rounding,
)

_BOUND = 1e-11  # relative rounding errors that need no residuals in extended precision
_RESIDUAL = 1.0  # of `codes`
_DOUBLE = 1e-10  # a precision below which results are not rounded to single precision, which has a range of its own
_LEAST_SINGLE, _MOST_SINGLE = 1e-30, 1e38


@part
def _meet(A, t, u, U, s, x):
    """(sum |s_i|^2 |U_j|^2, most of |U_j|^2 in a row where s is not zero, most of |u_i|^2 in a column where x is not).

    Over the stored entries (i, j).
    """
    total, of_rows, of_columns = 0.0, 0.0, 0.0
    for j in range(len(x)):
        t.by_columns[j] = 0.0
    for i in range(len(s)):
        row, size = 0.0, square(u[i])
        for e in range(A.pointers[i], A.pointers[i + 1]):
            row += square(U[A.indices[e]])
            t.by_columns[A.indices[e]] += size
        total += square(s[i]) * row
        if s[i] != 0:
            of_rows = max(of_rows, row)
    for j in range(len(x)):
        if x[j] != 0:
            of_columns = max(of_columns, t.by_columns[j])
    return total, math.sqrt(of_rows), math.sqrt(of_columns)


@part
def _is_of_use(A, t, s, x, errors, known, accept):
    """Whether relative errors of an adjoint solution (s, x) spoil no gradient by A: see `verdict`."""
    m = len(s)
    if not known[0] > 0:
        return True
    of_s, of_x = known[5 : 5 + m], known[5 + m :]
    sizes = norm(s), norm(x), norm(of_s), norm(of_x)
    for size in sizes:
        if not size <= MOST**3:
            return False
    first, beside_s, beside_x = _meet(A, t, of_s, of_x, s, x)
    second, beside_of_s, beside_of_x = _meet(A, t, s, x, of_s, of_x)
    error = errors[0] * sizes[0] * beside_s + errors[1] * sizes[1] * beside_x
    error += known[3] * sizes[2] * beside_of_s + known[4] * sizes[3] * beside_of_x
    zero = sizes[0] * sizes[2] / A.told[NORM]
    return error <= accept * max(math.sqrt(first) + math.sqrt(second), accept * zero)


@part
def _shift(A, t, e, p, column):
    """Brings e into b, as W^-1 e, so that W r is s, right to its own size; whether that goes."""
    for i in range(e.shape[1]):
        if A.weights[i] > 0:
            t.shift[i] = e[p, i, column] / A.weights[i]
        elif e[p, i, column] == 0:
            t.shift[i] = A.zero
        else:
            return False
        t.b[i] += t.shift[i]
    return True


@part
def _report(A, codes, precision, iterations, optimality, of_r, of_s, of_x, out):
    out[1], out[2], out[3] = codes[1], iterations, optimality
    out[4], out[5], out[6], out[7] = of_r, of_s, of_x, A.told[CONDITION]
    out[8], out[9], out[10], out[11] = len(A.D), A.told[NORM], codes[2], precision / 2


@part
def _is_nothing(A, t, of_b, of_c):
    """Whether x is nothing but zeros, and r is b: all unknowns are pinned, or all that is asked for is zero."""
    if A.told[UNIT] == math.inf:
        return of_b <= MOST and of_c <= MOST
    for i in range(len(t.b)):
        if t.b[i] != 0:
            return False
    for j in range(len(t.c)):
        if t.c[j] != 0:
            return False
    return of_c == 0


@part
def _give_nothing(A, t, codes, precision, out):
    """As `_solve`, where `_is_nothing` holds."""
    for i in range(len(t.r)):
        t.r[i] = t.b[i]
    for j in range(len(t.y)):
        t.e_y[j] = A.zero
    half = precision / 2
    _report(A, codes, precision, 1, 0.0, half, half, half, out)


@part
def _is_in_range(solution):
    """Whether a solution may be rounded to single precision without a thought."""
    largest = 0.0
    for number in solution:
        largest = max(largest, abs(number))
    return largest == 0 or _LEAST_SINGLE <= largest <= _MOST_SINGLE


@part
def _solve(A, t, known, noise, precision, accept, codes, out):
    """Whether (r, y) solves the system as well as it should, with a report into `out`; e_y is x then."""
    of_b, of_c, largest, n = row_norm(A, t.b), norm(t.c), A.told[LARGEST], len(t.y)
    if _is_nothing(A, t, of_b, of_c):
        _give_nothing(A, t, codes, precision, out)
        return True
    if not LEAST <= max(of_b, of_c) <= MOST:
        return False
    least_y = accept * (of_b * min(A.told[SIZE] / largest, 1.0) + of_c / largest) / largest
    least = max(accept * (of_b + of_c / largest), TINY), least_y
    left, whole, iterations = refine(A, t, least)
    if not (whole[0] > LEAST**2 and whole[2] > LEAST**2):
        return False
    rounding = bound_of_rounding(A, t, whole, of_b, of_c)
    if not relative_error(rounding, whole, least) <= _BOUND:
        rounding = sample_of_rounding(A, t, noise)
        if not relative_error(rounding, whole, least) <= _BOUND:
            return False
    errors = left[0] + rounding[0], left[1] + rounding[1], left[2] + rounding[2]
    # Residuals prove errors of at least half their size, but for ten times their noise: see `acceptance`.
    gradient(A, t)
    apply(A, t.y, t.e_r)
    for i in range(len(t.r)):
        t.e_r[i] = t.b[i] - (t.e_r[i] + t.r[i])
    first, second = row_norm(A, t.e_r), norm(t.g)
    noises = 10 * EPS * (of_b + of_c + whole[0] + largest * whole[1])
    least_r = (max(first, second / largest) - noises) / 2
    if errors[0] < least_r and largest * errors[1] < least_r:
        errors = least_r, errors[1], errors[2]
    if not relative_error(errors, whole, least) + precision / 2 <= accept:
        return False
    told = errors[0] / whole[0] + precision / 2, errors[2] / whole[2] + precision / 2
    if codes[3] > 0 and not told[0 if codes[3] == _RESIDUAL else 1] <= accept:
        return False
    for j in range(n):
        t.e_y[j] = t.y[j] / A.D[j]
    if codes[3] > 0 and precision > _DOUBLE and not _is_in_range(t.r if codes[3] == _RESIDUAL else t.e_y):
        return False
    root = 0.0
    for i in range(len(t.r)):
        t.s[i] = A.weights[i] * t.r[i] if len(A.weights) else t.r[i]
        root = max(root, math.sqrt(A.weights[i]) if len(A.weights) else 1.0)
    of_s = told[0] * root * whole[0] / max(norm(t.s), TINY) if len(A.weights) else told[0]
    if len(known) and not _is_of_use(A, t, t.s, t.e_y, (of_s, told[1]), known, accept):
        return False
    size = max(whole[0], EPS * (of_b + largest * whole[1]))
    _report(A, codes, precision, iterations, second / (largest * size + of_c), told[0], of_s, told[1], out)
    return True


@_jit
def small_solve(
    counter, chunk, zero, pointers, indices, S, weights, D, d2, L, told, b, e, c, known, noise, limits, codes, r, s, x,
    report,
):  # fmt: skip
    """Solves K (r, x) = (b, c) for every column of every matrix; a report that begins with NaN stands for none.

    Args:
        weights: (P, 0) for ones, or (P, m).
        S, D, d2, L, told: as `small_factor` gives them.
        b, c, r, x: (P, m, k) and (P, n, k), c and x unscaled.
        e, s: (P, m, k) too; without weights s, and for zeros e, is (P, 0, k).
        known: what `verdict.describe_primal` gives (P, 5 + m + n, k), or (P, 0, k).
        noise: (2, m + n) random numbers of sizes about 1.
        limits: (precision, accept), as of a `System` and of `Factors`.
        codes: (status, method, tried, whose error must be accepted by itself or 0), all in double precision.
        report: (P, fields, k), as `Report.packed`.
    """
    (copies, m, k), n, kind = b.shape, D.shape[1], L.dtype
    of_rows, of_columns = np.empty((5, m), kind), np.empty((4, n), kind)
    t = Work(
        of_rows[0],
        np.empty(e.shape[1], kind), of_columns[0], of_rows[1], of_rows[2], of_columns[1], of_rows[3],
        of_columns[2], of_columns[3], of_rows[4], np.empty(n), np.empty(0, kind),
    )  # fmt: skip
    while True:
        first = claim(counter) * chunk
        if first >= copies * k:
            return
        for task in range(first, min(first + chunk, copies * k)):
            p, column = task // k, task % k
            report[p, 0, column] = math.nan
            if not told[p, WELL] > 0:
                continue
            A = System(pointers, indices, S[p], weights[p], D[p], d2[p], L[p], told[p], zero)
            for i in range(m):
                t.b[i] = b[p, i, column]
            for j in range(n):
                t.c[j] = c[p, j, column] / D[p, j]
            if not _shift(A, t, e, p, column):
                continue
            about = known[p, :, column].copy()
            if _solve(A, t, about, noise, limits[0], limits[1], codes, report[p, :, column]):
                for i in range(m):
                    r[p, i, column] = t.r[i] - t.shift[i] if len(t.shift) else t.r[i]
                for i in range(s.shape[1]):
                    s[p, i, column] = weights[p, i] * t.r[i]
                for j in range(n):
                    x[p, j, column] = t.e_y[j]
                report[p, 0, column] = codes[0]
