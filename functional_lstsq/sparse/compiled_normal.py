"""The loops of conjugate gradients that pass over A once an iteration, where `compiled_iteration` does so twice.

    w = (A^H A + d^2) p,    alpha = gamma / p^H w,    y += alpha p,    g -= alpha w

One pass over the rows a_i gives a_i p, and their sum of a_i^H (a_i p). Where A^H A has hardly more entries than A, it
is `whole`, and stands in A's place. Rounding moves g, which is updated, away from the gradient by eps cond^2 of what
that was at the beginning, so whoever calls takes it anew (van der Vorst and Ye, SIAM J. Sci. Comput. 22(3), 2000).

An iteration has three phases, each of chunks, the same ones for any number of threads, so that sums are always the
same. A queue of chunks belongs to each thread, which keeps its part of the vectors in its own cache; who is done takes
from the others' queues, so that nobody waits for a thread that has no core.

Arrays are handed on one by one: references to those of a tuple would be counted in each chunk, which takes as long as a
small product.
"""

from __future__ import annotations

import math

import numpy as np

from .compiled import _ONE, _jit, claim, conjugate, look, part, put, square
from .compiled_iteration import _ENERGY, _ERROR, _GOES_ON, _GRADIENT, _ends

_FIRST = np.uint64(0)
_SHIFT = 20  # bits of a ticket that number the chunk; the others number the phase
_LAST = 2**_SHIFT - 1
NONE = 2**19  # a ticket for no chunk at all
OVER = 2**60 + NONE  # one that says that there will be no more
_IDLE = 10**6  # looks, about a millisecond, after which a thread that finds nothing to do leaves
_DIRECTION, _PRODUCT, _STEP = 0, 1, 2  # the phases
_CURVATURE, _DAMPED, _GAMMA, _SIZE = 0, 1, 2, 3  # sums
_ALPHA, _BETA = 0, 1  # numbers
_CONDITION = 3000  # up to which the energies of a search are right to a percent, and updated gradients to some digits
_LEFT = 3  # beside those of `compiled_iteration`: a search that is to go on by two passes


@part
def _multiply(whole, zero, pointers, indices, values, p, out, first, last):
    """Real p^H w of some of the rows, with their part of w in `out`."""
    total = 0.0
    if not whole:
        for j in range(len(p)):
            out[j] = zero
        for i in range(first, last):
            image = zero
            for e in range(pointers[i], pointers[i + _ONE]):
                image += values[e] * p[indices[e]]
            total += square(image)
            for e in range(pointers[i], pointers[i + _ONE]):
                out[indices[e]] += conjugate(values[e]) * image
    else:
        for i in range(first, last):
            image = zero
            for e in range(pointers[i], pointers[i + _ONE]):
                image += values[e] * p[indices[e]]
            out[i] = image
            total += (conjugate(p[i]) * image).real
    return total


@part
def _turn(p, inverse, g, d2, beta, first, last):
    """Gives some of p = inverse g + beta p, and |d p|^2 of these."""
    for j in range(first, last):
        p[j] = inverse[j] * g[j] + beta * p[j]
    total = 0.0
    if len(d2):
        for j in range(first, last):
            total += d2[j] * square(p[j])
    return total


@part
def _gather(w, d2, p, first, last):
    """Brings a product together in w[0]."""
    out = w[0]
    for chunk in range(1, len(w)):
        other = w[chunk]
        for j in range(first, last):
            out[j] += other[j]
    if len(d2):
        for j in range(first, last):
            out[j] += d2[j] * p[j]


@part
def _step(y, g, p, w, inverse, alpha, first, last):
    """The gamma of some of the unknowns, after a step."""
    gamma = 0.0
    for j in range(first, last):
        y[j] += alpha * p[j]
        new = g[j] - alpha * w[j]
        g[j] = new
        gamma += inverse[j] * square(new)
    return gamma


@part
def _size(weight, start, y, first, last):
    """|weight (start + y)|^2"""
    total = 0.0
    if len(start):
        for j in range(first, last):
            total += square(weight[j] * (start[j] + y[j]))
    else:
        for j in range(first, last):
            total += square(weight[j] * y[j])
    return total


@part
def _take_part(
    rank,
    team, bounds, parts, sums, numbers, whole, zero, pointers, indices, values, p, w, inverse, d2, weight, start, y, g,
):  # fmt: skip
    """Chunks of the phase that is under way, until there are no more."""
    queues = len(team) - 2
    length = (len(bounds) - 1) // queues
    for k in range(queues):
        queue = (rank + k) % queues
        while look(team[queue]) & _LAST < length:
            ticket = claim(team[queue])
            if ticket & _LAST >= length:
                break
            phase, chunk = (ticket >> _SHIFT) % 3, queue * length + (ticket & _LAST)
            first, last = parts[chunk], parts[chunk + 1]
            if phase == _DIRECTION:
                sums[_DAMPED, chunk] = _turn(p, inverse, g, d2, numbers[_BETA], first, last)
            elif phase == _PRODUCT:
                out = w[0 if whole else chunk]
                sums[_CURVATURE, chunk] = _multiply(
                    whole, zero, pointers, indices, values, p, out, bounds[chunk], bounds[chunk + 1]
                )
            else:
                _gather(w, d2, p, first, last)
                sums[_GAMMA, chunk] = _step(y, g, p, w[0], inverse, numbers[_ALPHA], first, last)
                sums[_SIZE, chunk] = _size(weight, start, y, first, last)
            claim(team[queues])


@_jit
def help_iterate(
    team, bounds, parts, sums, numbers, whole, zero, pointers, indices, values, p, w, inverse, d2, weight, start, y, g,
):  # fmt: skip
    """Take part in `iterate_normal`, whose arguments these are, until that ends."""
    queues, idle = len(team) - 2, 0
    if look(team[0]) >= OVER:
        return
    rank = (1 + claim(team[queues + 1])) % queues
    while idle < _IDLE and look(team[rank]) < OVER:
        if look(team[queues]) < len(bounds) - 1:
            _take_part(
                rank,
                team, bounds, parts, sums, numbers, whole, zero, pointers, indices, values,
                p, w, inverse, d2, weight, start, y, g,
            )  # fmt: skip
            idle = 0
        idle += 1


@part
def _together(
    phase,
    team, bounds, parts, sums, numbers, whole, zero, pointers, indices, values, p, w, inverse, d2, weight, start, y, g,
):  # fmt: skip
    """One phase, from its beginning to its end."""
    queues = len(team) - 2
    put(team[queues], 0)
    for queue in range(queues):
        put(team[queue], phase << _SHIFT)
    _take_part(
        0,
        team, bounds, parts, sums, numbers, whole, zero, pointers, indices, values, p, w, inverse, d2, weight, start, y,
        g,
    )  # fmt: skip
    while look(team[queues]) < len(bounds) - 1:
        pass


@_jit
def iterate_normal(
    team, bounds, parts, sums, numbers, whole, zero, pointers, indices, values, p, w, inverse, d2, weight, start, y, g,
    gamma, beta, limit, floor, least, ceiling, count,
):  # fmt: skip
    """At most `count` iterations for one column, `inverse` being a diagonal preconditioner.

    They end once gamma = g^H (inverse g) is at most the square of max(limit |weight (start + y)|, floor), at most
    `least`, or at least `ceiling`.

    Args:
        team: (queues + 2, 8), a ticket for each queue, how many chunks have been done and how many threads help, on
            cache lines of their own.
        bounds, parts: (chunks + 1,), rows and unknowns between which chunks are.
        sums, numbers: (4, chunks) and (2,), for use within.
        whole: whether the rows are those of A^H A, and not of A.
        zero: of the kind of values.
        w: (chunks, n), or (1, n) of A^H A.
        d2, start: (n,), or empty for zeros; p, inverse, weight, y and g are (n,).

    Returns:
        (iterations, gamma of the last but one, gamma, whether there may be more: p^H w is positive, gamma in between).
    """
    last, goes_on, step = gamma, True, 0
    while step < count and goes_on:
        numbers[_BETA] = beta
        for phase in range(2):
            _together(phase, team, bounds, parts, sums, numbers, whole, zero, pointers, indices, values,
                      p, w, inverse, d2, weight, start, y, g)  # fmt: skip
        curvature = sums[_CURVATURE].sum() + sums[_DAMPED].sum()
        goes_on = curvature > 0
        if goes_on:
            step += 1
            numbers[_ALPHA] = gamma / curvature
            _together(_STEP, team, bounds, parts, sums, numbers, whole, zero, pointers, indices, values,
                      p, w, inverse, d2, weight, start, y, g)  # fmt: skip
            last, gamma, size = gamma, sums[_GAMMA].sum(), sums[_SIZE].sum()
            beta = gamma / last
            goal = max(limit * math.sqrt(size), floor)
            goes_on = max(goal * goal, least) < gamma < ceiling
    for queue in range(len(team) - 2):
        put(team[queue], OVER)
    return step, last, gamma, goes_on


@_jit
def search_normal(
    counter, chunk, whole, zero, pointers, indices, values, p, w,
    inverse, d2, y, g, wanted, norms, numbers, done, history, extremes, rules, patience, solves, most,
):  # fmt: skip
    """As `compiled_iteration.search`, of which the arguments are, a column by one thread; p and w are (k, n)."""
    while True:
        k = claim(counter)
        if k >= len(wanted):
            return
        inner, out = p[k], w[k]
        while done[k, 1] == _GOES_ON and done[k, 0] < most:
            step, gamma, beta = done[k, 0], numbers[k, 0], numbers[k, 1]
            for j in range(len(norms)):
                inner[j] = inverse[j] * g[k, j] + beta * inner[j]
            curvature = _multiply(
                whole, zero, pointers, indices, values, inner, out, _FIRST, np.uint64(len(pointers) - 1)
            )
            if len(d2):
                for j in range(len(norms)):
                    out[j] += d2[j] * inner[j]
                    curvature += d2[j] * square(inner[j])
            if not curvature > 0:
                done[k, 1] = _LEFT
                break
            alpha, last, gamma, error, energy = gamma / curvature, gamma, 0.0, 0.0, 0.0
            for j in range(len(norms)):
                y[k, j] += alpha * inner[j]
                g[k, j] -= alpha * out[j]
                gamma += inverse[j] * square(g[k, j])
                missing = wanted[k, j] - y[k, j]
                error += square(norms[j] * missing)
                energy += (conjugate(missing) * g[k, j]).real  # |[A; d] missing|^2
            numbers[k, 0], numbers[k, 1], numbers[k, 2] = gamma, gamma / last, min(gamma, numbers[k, 2])
            # Below that an energy is but rounding, and nothing is noted of it.
            if not (energy * _CONDITION**2 > extremes[k, 1] ** 2 * error and gamma > 0):
                done[k, 1] = _LEFT
                break
            done[k, 0] = step + 1
            history[k, step, _ERROR] = math.sqrt(error)
            history[k, step, _ENERGY] = math.sqrt(energy)
            history[k, step, _GRADIENT] = math.sqrt(gamma)
            done[k, 1] = _ends(history[k], step, extremes[k], rules[k], patience, solves)
