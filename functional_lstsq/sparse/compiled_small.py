"""Loops that Numba compiles: whole solves of small systems, which take far less time than two hundred operations.

    A^H A + d^2 = L L^H                                    columns of norms about 1, by powers of two D
    e_y = (L L^H)^-1 (A^H r - d^2 y - c),  e_r = -A e_y    from r = b and y = 0
    r += e_r,  y += e_y                                    until corrections are small, or shrink no more

These are the steps that `solvers.factored` takes for `Dense`, with the estimates of errors that `refinement`,
`acceptance` and `verdict` make. Where one of them asks for more (a condition number above 1e4, residuals in extended
precision, a solution that is zero or not accepted, numbers of unusual size), nothing is given.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .compiled import _jit, claim, conjugate, part, square
from .compiled_dense import CONDITION, LARGEST, LEAST, MOST, NORM, SIZE, SMALLEST, UNIT, WELL, divide

_EPS = 2.0**-52
_TINY = 2.3e-308
_BOUND = 1e-11  # relative rounding errors that need no residuals in extended precision
_CORRECTIONS = 30
_RESIDUAL = 1.0  # of `codes`


class _System(NamedTuple):
    """One matrix, its columns scaled, row by row, with what `small_factor` has made of it."""

    pointers: Any
    indices: Any
    values: Any
    D: Any
    d2: Any
    L: Any
    told: Any
    zero: Any  # of its kind


class _Work(NamedTuple):
    """Vectors: right-hand sides, solution, correction, gradient, residual, and nothing."""

    b: Any
    c: Any
    r: Any
    y: Any
    e_r: Any
    e_y: Any
    g: Any
    f: Any
    by_columns: Any
    none: Any


@part
def _norm(x):
    total = 0.0
    for i in range(len(x)):
        total += square(x[i])
    return math.sqrt(total)


@part
def _sizes(A, r, y):
    """|r|, |y|, and |D^-1 y| in units of min D^-1."""
    of_y, of_x = 0.0, 0.0
    for j in range(len(y)):
        size = square(y[j])
        of_y += size
        of_x += size * (A.told[UNIT] / A.D[j]) ** 2
    return _norm(r), math.sqrt(of_y), math.sqrt(of_x)


@part
def _apply(A, y, out):
    """out = A y"""
    for i in range(len(out)):
        total = A.zero
        for e in range(A.pointers[i], A.pointers[i + 1]):
            total += A.values[e] * y[A.indices[e]]
        out[i] = total


@part
def _add_adjoint(A, r, out):
    """out += A^H r"""
    for i in range(len(r)):
        f = r[i]
        for e in range(A.pointers[i], A.pointers[i + 1]):
            out[A.indices[e]] += conjugate(A.values[e]) * f


@part
def _gradient(A, t):
    """g = A^H r - d^2 y - c"""
    for j in range(len(t.g)):
        t.g[j] = -A.d2[j] * t.y[j] - t.c[j]
    _add_adjoint(A, t.r, t.g)


@part
def _correct(A, t, f):
    """e_y = (L L^H)^-1 g and e_r = f - A e_y, for an f that may be empty for zero."""
    divide(A.L, t.g, t.e_y)
    _apply(A, t.e_y, t.e_r)
    for i in range(len(t.e_r)):
        t.e_r[i] = f[i] - t.e_r[i] if len(f) else -t.e_r[i]


@part
def _relative(errors, whole, least):
    """The larger of the relative errors of r and x: see `refinement.Measure`."""
    of_zero = math.inf if whole[1] > least[1] else errors[1] / max(least[1], _TINY)
    return max(errors[0] / max(whole[0], least[0]), min(errors[2] / max(whole[2], _TINY), of_zero))


@part
def _refine(A, t, least):
    """(errors but for rounding, sizes, iterations) of the solution (r, y), which is made here."""
    for i in range(len(t.r)):
        t.r[i] = t.b[i]
    for j in range(len(t.y)):
        t.y[j] = A.zero
    slowest = 10 * _EPS * (A.told[LARGEST] / A.told[SMALLEST]) ** 2
    errors = previous = whole = (0.0, 0.0, 0.0)
    iterations = 0
    while True:
        _gradient(A, t)
        _correct(A, t, t.none)
        iterations += 1
        before, moves = whole, _sizes(A, t.e_r, t.e_y)
        for i in range(len(t.r)):
            t.e_r[i] += t.r[i]
        for j in range(len(t.y)):
            t.e_y[j] += t.y[j]
        whole = _sizes(A, t.e_r, t.e_y)
        relative = _relative(moves, whole, least)
        # The first solution is no correction, and the first correction is held against it.
        rate = _relative(moves, before, least) if iterations < 3 else relative / _relative(previous, whole, least)
        better = rate < 1 or relative == 0 if iterations > 2 else math.isfinite(relative)
        if better:
            for i in range(len(t.r)):
                t.r[i] = t.e_r[i]
            for j in range(len(t.y)):
                t.y[j] = t.e_y[j]
        else:
            whole = before
        left = min(max(10 * rate, slowest), 1.0) if better else 1.0
        errors, previous = (left * moves[0], left * moves[1], left * moves[2]), moves
        shrinks = left * relative > 4 * _EPS and (rate < 0.25 or iterations == 2)
        if not better or iterations == _CORRECTIONS or (iterations > 1 and not shrinks):
            return errors, whole, iterations


@part
def _bound(A, t, whole, of_b, of_c):
    """What rounding errors of the residuals can do: see `refinement`."""
    largest, sigma, of_d = A.told[LARGEST], A.told[SMALLEST] / 2, 0.0
    for j in range(len(t.y)):
        of_d += square(A.d2[j] * t.y[j])
    first = 2 * _EPS * (of_b + whole[0] + largest * whole[1])
    second = 2 * _EPS * (of_c + largest * whole[0] + math.sqrt(of_d))
    shift = first / sigma * min(A.told[SIZE] / sigma, 1.0) + second / sigma**2
    return first + second / sigma, shift, shift


@part
def _sample(A, t, noise):
    """What rounding errors of the residuals do, the larger of two samples: see `System.rounding`."""
    (m, n), found = (len(t.r), len(t.y)), (0.0, 0.0, 0.0)
    for sample in range(2):
        signs = noise[sample]
        for j in range(n):
            t.by_columns[j] = 0.0
        for i in range(m):
            total, size = 0.0, abs(t.r[i])
            for e in range(A.pointers[i], A.pointers[i + 1]):
                j = A.indices[e]
                total += abs(A.values[e]) * abs(t.y[j])
                t.by_columns[j] += abs(A.values[e]) * size
            t.f[i] = _EPS * (abs(t.b[i]) + size + total) * signs[i]
        for j in range(n):  # the other residual, of which either sign is as good
            t.g[j] = _EPS * (abs(t.c[j]) + t.by_columns[j] + A.d2[j] * abs(t.y[j])) * signs[m + j]
        _add_adjoint(A, t.f, t.g)
        _correct(A, t, t.f)
        sizes = _sizes(A, t.e_r, t.e_y)
        found = max(found[0], sizes[0]), max(found[1], sizes[1]), max(found[2], sizes[2])
    return found


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
    sizes = _norm(s), _norm(x), _norm(of_s), _norm(of_x)
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
def _solve(A, t, known, noise, precision, accept, codes, out):
    """Whether (r, y) solves the system as well as it should, with a report into `out`; e_y is x then."""
    of_b, of_c, largest, n = _norm(t.b), _norm(t.c), A.told[LARGEST], len(t.y)
    if not LEAST <= max(of_b, of_c) <= MOST:
        return False
    least_y = accept * (of_b * min(A.told[SIZE] / largest, 1.0) + of_c / largest) / largest
    least = max(accept * (of_b + of_c / largest), _TINY), least_y
    left, whole, iterations = _refine(A, t, least)
    if not (whole[0] > LEAST**2 and whole[2] > LEAST**2):
        return False
    rounding = _bound(A, t, whole, of_b, of_c)
    if not _relative(rounding, whole, least) <= _BOUND:
        rounding = _sample(A, t, noise)
        if not _relative(rounding, whole, least) <= _BOUND:
            return False
    errors = left[0] + rounding[0], left[1] + rounding[1], left[2] + rounding[2]
    # Residuals prove errors of at least half their size, but for ten times their noise: see `acceptance`.
    _gradient(A, t)
    _apply(A, t.y, t.e_r)
    for i in range(len(t.r)):
        t.e_r[i] = t.b[i] - (t.e_r[i] + t.r[i])
    first, second = _norm(t.e_r), _norm(t.g)
    least_r = (max(first, second / largest) - 10 * _EPS * (of_b + of_c + whole[0] + largest * whole[1])) / 2
    if errors[0] < least_r and largest * errors[1] < least_r:
        errors = least_r, errors[1], errors[2]
    if not _relative(errors, whole, least) + precision / 2 <= accept:
        return False
    told = errors[0] / whole[0] + precision / 2, errors[2] / whole[2] + precision / 2
    if codes[3] > 0 and not told[0 if codes[3] == _RESIDUAL else 1] <= accept:
        return False
    for j in range(n):
        t.e_y[j] = t.y[j] / A.D[j]
    if len(known) and not _is_of_use(A, t, t.r, t.e_y, told, known, accept):
        return False
    size = max(whole[0], _EPS * (of_b + largest * whole[1]))
    out[1], out[2], out[3] = codes[1], iterations, second / (largest * size + of_c)
    out[4], out[5], out[6], out[7] = told[0], told[0], told[1], A.told[CONDITION]
    out[8], out[9], out[10], out[11] = n, A.told[NORM], codes[2], precision / 2
    return True


@_jit
def small_solve(
    counter, chunk, zero, pointers, indices, S, D, d2, L, told, b, c, known, noise, limits, codes, r, x, report
):
    """Solves K (r, x) = (b, c) for every column of every matrix; a report that begins with NaN stands for none.

    Args:
        S, D, d2, L, told: as `small_factor` gives them.
        b, c, r, x: (P, m, k) and (P, n, k), c and x unscaled.
        known: what `verdict.describe_primal` gives (P, 5 + m + n, k), or (P, 0, k).
        noise: (2, m + n) random numbers of sizes about 1.
        limits: (precision, accept), as of a `System` and of `Factors`.
        codes: (status, method, tried, whose error must be accepted by itself or 0), all in double precision.
        report: (P, fields, k), as `Report.packed`.
    """
    (copies, m, k), n, kind = b.shape, D.shape[1], L.dtype
    of_rows, of_columns = np.empty((4, m), kind), np.empty((4, n), kind)
    t = _Work(
        of_rows[0], of_columns[0], of_rows[1], of_columns[1], of_rows[2], of_columns[2], of_columns[3], of_rows[3],
        np.empty(n), np.empty(0, kind),
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
            A = _System(pointers, indices, S[p], D[p], d2[p], L[p], told[p], zero)
            for i in range(m):
                t.b[i] = b[p, i, column]
            for j in range(n):
                t.c[j] = c[p, j, column] / D[p, j]
            about = known[p, :, column].copy()
            if _solve(A, t, about, noise, limits[0], limits[1], codes, report[p, :, column]):
                for i in range(m):
                    r[p, i, column] = t.r[i]
                for j in range(n):
                    x[p, j, column] = t.e_y[j]
                report[p, 0, column] = codes[0]
