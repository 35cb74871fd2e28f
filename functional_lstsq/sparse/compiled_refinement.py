"""Loops that Numba compiles: refinement of a solution of one small system, with what rounding does to it.

    A^H W A + d^2 = L L^H                                   columns of norms about 1, by powers of two D
    e_y = (L L^H)^-1 (A^H W r - d^2 y - c),  e_r = -A e_y   from r = b and y = 0
    r += e_r,  y += e_y                                     until corrections are small, or shrink no more

As `solvers.refinement`, in double precision throughout.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .compiled import conjugate, part, square
from .compiled_dense import LARGEST, SIZE, SMALLEST, UNIT, divide

EPS = 2.0**-52
TINY = 2.3e-308
_CORRECTIONS = 30
_KEPT = 1e-8  # of a residual, which a correction may change before there is another


class System(NamedTuple):
    """One matrix, its columns scaled, row by row, with what `small_factor` has made of it."""

    pointers: Any
    indices: Any
    values: Any
    weights: Any  # empty for ones
    D: Any
    d2: Any
    L: Any
    told: Any
    zero: Any  # of its kind


class Work(NamedTuple):
    """Vectors: right-hand sides, what b holds of e, solution, correction, gradient, residual, and nothing."""

    b: Any
    shift: Any
    c: Any
    r: Any
    s: Any
    y: Any
    e_r: Any
    e_y: Any
    g: Any
    f: Any
    by_columns: Any
    none: Any


@part
def norm(x):
    total = 0.0
    for i in range(len(x)):
        total += square(x[i])
    return math.sqrt(total)


@part
def row_norm(A, r):
    """|W^(1/2) r|"""
    total = 0.0
    for i in range(len(r)):
        total += square(r[i]) * (A.weights[i] if len(A.weights) else 1.0)
    return math.sqrt(total)


@part
def _sizes(A, r, y):
    """|W^(1/2) r|, |y|, and |D^-1 y| in units of min D^-1."""
    of_y, of_x = 0.0, 0.0
    for j in range(len(y)):
        size = square(y[j])
        of_y += size
        of_x += size * (A.told[UNIT] / A.D[j]) ** 2
    return row_norm(A, r), math.sqrt(of_y), math.sqrt(of_x)


@part
def apply(A, y, out):
    """out = A y"""
    for i in range(len(out)):
        total = A.zero
        for e in range(A.pointers[i], A.pointers[i + 1]):
            total += A.values[e] * y[A.indices[e]]
        out[i] = total


@part
def _add_adjoint(A, r, out):
    """out += A^H W r"""
    for i in range(len(r)):
        f = A.weights[i] * r[i] if len(A.weights) else r[i]
        for e in range(A.pointers[i], A.pointers[i + 1]):
            out[A.indices[e]] += conjugate(A.values[e]) * f


@part
def gradient(A, t):
    """g = A^H W r - d^2 y - c"""
    for j in range(len(t.g)):
        t.g[j] = -A.d2[j] * t.y[j] - t.c[j]
    _add_adjoint(A, t.r, t.g)


@part
def _correct(A, t, f):
    """e_y = (L L^H)^-1 g and e_r = f - A e_y, for an f that may be empty for zero."""
    divide(A.L, t.g, t.e_y)
    apply(A, t.e_y, t.e_r)
    for i in range(len(t.e_r)):
        t.e_r[i] = f[i] - t.e_r[i] if len(f) else -t.e_r[i]


@part
def relative_error(errors, whole, least):
    """The larger of the relative errors of r and x: see `refinement.Measure`."""
    of_zero = math.inf if whole[1] > least[1] else errors[1] / max(least[1], TINY)
    return max(errors[0] / max(whole[0], least[0]), min(errors[2] / max(whole[2], TINY), of_zero))


@part
def refine(A, t, least):
    """(errors but for rounding, sizes, iterations) of the solution (r, y), which is made here."""
    for i in range(len(t.r)):
        t.r[i] = t.b[i]
    for j in range(len(t.y)):
        t.y[j] = A.zero
    slowest = 10 * EPS * (A.told[LARGEST] / A.told[SMALLEST]) ** 2
    errors = previous = whole = (0.0, 0.0, 0.0)
    iterations = 0
    while True:
        gradient(A, t)
        _correct(A, t, t.none)
        iterations += 1
        before, moves = whole, _sizes(A, t.e_r, t.e_y)
        for i in range(len(t.r)):
            t.e_r[i] += t.r[i]
        for j in range(len(t.y)):
            t.e_y[j] += t.y[j]
        whole = _sizes(A, t.e_r, t.e_y)
        relative = relative_error(moves, whole, least)
        # The first solution is no correction, and the first correction is held against it.
        rate = (
            relative_error(moves, before, least)
            if iterations < 3
            else relative / relative_error(previous, whole, least)
        )
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
        shrinks = left * relative > 4 * EPS and (rate < 0.25 or iterations == 2)
        # A residual that is nothing beside b may be far from nothing beside its rounding: two more for its own sake.
        shrinks = shrinks or (iterations < 4 and moves[0] > _KEPT * whole[0])
        if not better or iterations == _CORRECTIONS or (iterations > 1 and not shrinks):
            return errors, whole, iterations


@part
def bound_of_rounding(A, t, whole, of_b, of_c):
    """What rounding errors of the residuals can do: see `refinement`."""
    largest, sigma, of_d = A.told[LARGEST], A.told[SMALLEST] / 2, 0.0
    for j in range(len(t.y)):
        of_d += square(A.d2[j] * t.y[j])
    first = 2 * EPS * (of_b + whole[0] + largest * whole[1])
    second = 2 * EPS * (of_c + largest * whole[0] + math.sqrt(of_d))
    shift = first / sigma * min(A.told[SIZE] / sigma, 1.0) + second / sigma**2
    return first + second / sigma, shift, shift


@part
def sample_of_rounding(A, t, noise):
    """What rounding errors of the residuals do, the larger of two samples: see `System.rounding`."""
    (m, n), found = (len(t.r), len(t.y)), (0.0, 0.0, 0.0)
    for sample in range(2):
        signs = noise[sample]
        for j in range(n):
            t.by_columns[j] = 0.0
        for i in range(m):
            total, size = 0.0, abs(t.r[i]) * (A.weights[i] if len(A.weights) else 1.0)
            for e in range(A.pointers[i], A.pointers[i + 1]):
                j = A.indices[e]
                total += abs(A.values[e]) * abs(t.y[j])
                t.by_columns[j] += abs(A.values[e]) * size
            t.f[i] = EPS * (abs(t.b[i]) + abs(t.r[i]) + total) * signs[i]
        for j in range(n):  # the other residual, of which either sign is as good
            t.g[j] = EPS * (abs(t.c[j]) + t.by_columns[j] + A.d2[j] * abs(t.y[j])) * signs[m + j]
        _add_adjoint(A, t.f, t.g)
        _correct(A, t, t.f)
        sizes = _sizes(A, t.e_r, t.e_y)
        found = max(found[0], sizes[0]), max(found[1], sizes[1]), max(found[2], sizes[2])
    return found
