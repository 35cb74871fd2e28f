"""The loops of conjugate gradients that Numba compiles: all iterations of one column in one call.

    A^H A y + d^2 y = A^H b - c,    r = b - A y,    g = A^H r - d^2 y - c

`search` has columns whose solutions are known, each iterated by one thread, which waits for nobody.
"""

from __future__ import annotations

import math

from .compiled import _jit, claim, part, square, wide

_ERROR, _ENERGY, _GRADIENT = 0, 1, 2  # what is noted of an iteration
_GOES_ON, _FOUND, _ALL = 0, 1, 2  # whether a column goes on, ends, or ends the search for all
_AGO = 8  # iterations, from whose errors it is extrapolated
_FEWEST = 24
_BLOWN_UP = 1e20  # times the least gamma, as of `solvers.conjugate_gradients`


@_jit
def iterate(
    pointers,
    indices,
    values,
    t_pointers,
    t_indices,
    t_values,
    inverse,
    shift,
    d2,
    r,
    y,
    p,
    q,
    g,
    gamma,
    beta,
    target,
    ceiling,
    count,
):
    """Conjugate gradients for one column, `inverse` being a diagonal preconditioner.

    At most `count` iterations, until gamma = g^H (inverse g) is at most `target` or at least `ceiling`. The iterates
    r, y, p and g are changed where they are; d2 is d^2 or None, shift c or None.

    Returns:
        (iterations, gamma of the last but one, gamma, whether all is well: |A p|^2 + |d p|^2 is positive).
    """
    last = gamma
    for step in range(count):
        well, last, gamma = _step(
            pointers, indices, values, t_pointers, t_indices, t_values, inverse, shift, d2, r, y, p, q, g, gamma, beta
        )
        if not well:
            return step, last, gamma, False
        beta = gamma / last
        if not target < gamma < ceiling:
            return step + 1, last, gamma, True
    return count, last, gamma, True


@part
def _step(pointers, indices, values, t_pointers, t_indices, t_values, inverse, shift, d2, r, y, p, q, g, gamma, beta):
    """(whether |A p|^2 + |d p|^2 is positive, gamma before, gamma)"""
    m, n, curvature = len(pointers) - 1, len(t_pointers) - 1, 0.0
    for j in range(n):
        p[j] = inverse[j] * g[j] + beta * p[j]
        if d2 is not None:
            curvature += d2[j] * square(p[j])
    for i in range(m):
        total = wide(values.dtype.type(0))
        for e in range(pointers[i], pointers[i + 1]):
            total += wide(values[e]) * wide(p[indices[e]])
        q[i] = total
        curvature += square(total)
    if not curvature > 0:
        return False, gamma, gamma
    alpha = gamma / curvature
    for i in range(m):
        r[i] -= alpha * q[i]
    last, gamma = gamma, 0.0
    for j in range(n):
        total = wide(values.dtype.type(0))
        for e in range(t_pointers[j], t_pointers[j + 1]):
            total += wide(t_values[e]) * wide(r[t_indices[e]])
        y[j] += alpha * p[j]
        if d2 is not None:
            total -= d2[j] * wide(y[j])
        if shift is not None:
            total -= wide(shift[j])
        g[j] = total
        gamma += inverse[j] * square(total)
    return True, last, gamma


@part
def _ends(history, step, extremes, rules, patience, solves):
    """Whether a search ends: `_FOUND`, or `_ALL` for one that proves what holds for every column.

    That is a matrix without full rank, or one too ill-conditioned, or more iterations ahead than there is `patience`.

    Args:
        history: (iterations, 3); the last is number `step`.
        extremes: (2,) the smallest and the largest singular value so far, of which notes are taken.
        rules: (6,) of `search`.
    """
    threshold, floor, seen, least, tolerance, most = rules
    error, energy = history[step, _ERROR], history[step, _ENERGY]
    if energy > seen and error > least:
        extremes[0] = min(extremes[0], energy / error)
        if energy > 0:
            extremes[1] = max(extremes[1], history[step, _GRADIENT] / energy)
    if extremes[0] <= tolerance * extremes[1] or extremes[1] > most * extremes[0]:
        return _ALL
    if error <= threshold or energy <= floor:
        return _FOUND
    before = history[step - _AGO, _ERROR] if step >= _FEWEST - 1 else 0.0
    if before <= threshold or not patience < math.inf:
        return _GOES_ON
    if not 0 < error < before:
        return _ALL
    expected = step + 1 + _AGO * math.log(error / threshold) / math.log(before / error)
    return _ALL if solves * expected > patience else _GOES_ON


@_jit
def search(
    counter,
    chunk,
    pointers,
    indices,
    values,
    t_pointers,
    t_indices,
    t_values,
    inverse,
    shift,
    d2,
    r,
    y,
    p,
    q,
    g,
    wanted,
    norms,
    numbers,
    done,
    history,
    extremes,
    rules,
    patience,
    solves,
    most,
):
    """Iterate as `iterate` does towards known solutions `wanted` (k, n), until there have been `most` in a column.

    Args:
        norms: (n,), in which errors are measured.
        numbers: (k, 3), gamma, beta and the least gamma so far.
        done: (k, 2), iterations so far, and whether that is all.
        history: (k, most, 3): |norms (wanted - y)|, |[A; d] (wanted - y)| and sqrt(gamma) after each.
        extremes: (k, 2), the smallest and the largest singular value so far.
        rules: (k, 6): the error to reach; energies to stop at, and below which nothing is seen, nor below such an
            error; the tolerance of rank; the largest condition number to go on with.
    """
    while True:
        k = claim(counter)
        if k >= len(wanted):
            return
        while done[k, 1] == _GOES_ON and done[k, 0] < most:
            step = done[k, 0]
            well, last, gamma = _step(
                pointers, indices, values, t_pointers, t_indices, t_values, inverse, shift[k], d2,
                r[k], y[k], p[k], q[k], g[k], numbers[k, 0], numbers[k, 1],
            )  # fmt: skip
            if not well:
                done[k, 1] = _FOUND
                break
            numbers[k, 0], numbers[k, 1], numbers[k, 2] = gamma, gamma / last, min(gamma, numbers[k, 2])
            error = energy = 0.0
            for i in range(r.shape[1]):
                energy += square(r[k, i])
            for j in range(len(norms)):
                missing = wide(wanted[k, j]) - wide(y[k, j])
                error += square(norms[j] * missing)
                if d2 is not None:
                    energy += d2[j] * square(missing)
            history[k, step, _ERROR] = math.sqrt(error)
            history[k, step, _ENERGY] = math.sqrt(energy)
            history[k, step, _GRADIENT] = math.sqrt(gamma)
            done[k, 0] = step + 1
            done[k, 1] = _ends(history[k], step, extremes[k], rules[k], patience, solves)
            # Of a matrix without full rank gamma may blow up after rounding has taken over, and find nothing more.
            if not 0 < gamma < _BLOWN_UP * numbers[k, 2]:
                done[k, 1] = max(done[k, 1], _FOUND)
