"""The loops over sparse matrices that Numba compiles, each for a dtype when it is first called with it.

Only `kernels` imports this file, when it first needs it: importing Numba takes a few tenths of a second.

Functions with a counter work through rows in chunks that they claim from it, so that any number of threads may call one
with the same arguments: whoever has a core takes the next chunk, and nobody waits for a thread that has none.

Indices are unsigned, since signed ones would be tested for being negative. Sums are taken in double precision; they
begin with `zero`, which says whether they are real or complex.
"""

from __future__ import annotations

import sys
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import event
from numba.extending import intrinsic, overload

from .compiled_columns import add_row

# Sums may be reordered and products fused. NaN and infinity keep their meaning.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc"}}
_ALONE: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_TERMS = 1024  # of sums in A^H A that are taken in one go
_ONE, _TWO, _THREE, _FOUR, _EIGHT = (np.uint64(number) for number in (1, 2, 3, 4, 8))


def _jit(function):
    """`function` compiled on demand, and kept on disk where there is a place that can be written to."""
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # neither beside this file nor in the user's home
        return uncached(function)


def part(function):
    """`function` compiled as a part of those that call it, and of no use to others."""
    return numba.njit(**_OPTIONS, **_ALONE)(function)


def uncached(function):
    """`function` compiled on demand, in every process anew."""
    return numba.njit(**_OPTIONS)(function)


class _Announcement(event.Listener):
    """One line on a terminal when the first function is compiled: a process that finds them on disk prints none."""

    def on_start(self, event):
        if event.data["dispatcher"].py_func.__module__.startswith("functional_lstsq.") and self in _announcements:
            _announcements.remove(self)
            print("functional_lstsq: compiling for this machine; later runs will find it done", file=sys.stderr)

    def on_end(self, event):
        pass


_announcements: list[_Announcement] = []
if sys.stderr is not None and sys.stderr.isatty():
    _announcements.append(_Announcement())
    event.register("numba:compile", _announcements[0])


def _claim(typing_context, counter):
    """The next number, from 0, of a shared counter: an int64 array of one element."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        one = context.get_constant(types.int64, 1)
        return builder.atomic_rmw("add", array.data, one, "acq_rel")

    return types.int64(counter), generate


claim: Any = intrinsic(_claim)


def _look(typing_context, counter):
    """A number that another thread may change: an int64 array of one element or more, of which it is the first."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.load_atomic(array.data, "acquire", 8)

    return types.int64(counter), generate


def _put(typing_context, counter, number):
    """Gives it to the others, and what was written before."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        builder.store_atomic(arguments[1], array.data, "release", 8)
        return context.get_dummy_value()

    return types.none(counter, types.int64), generate


look: Any = intrinsic(_look)
put: Any = intrinsic(_put)


def wide(number):
    """A number in double precision."""
    raise NotImplementedError("for compiled code")


@overload(wide)
def _wide(number):
    if isinstance(number, types.Complex):
        return lambda number: np.complex128(number)  # noqa: PLW0108, since Numba takes functions only
    return lambda number: np.float64(number)  # noqa: PLW0108


def square(number):
    """|number|^2, in double precision."""
    raise NotImplementedError("for compiled code")


@overload(square)
def _absolute_square(number):
    if isinstance(number, types.Complex):
        return lambda number: np.float64(number.real) ** 2 + np.float64(number.imag) ** 2
    return lambda number: np.float64(number) ** 2


def conjugate(number):
    """The conjugate of a number."""
    raise NotImplementedError("for compiled code")


@overload(conjugate)
def _conjugate(number):
    if isinstance(number, types.Complex):
        return lambda number: number.conjugate()
    return lambda number: number


def add_columns(indices, values, start, stop, X, out, i, first, width):
    """first + width; out[i, c] = sum of values[e] X[indices[e], c] over start <= e < stop, for columns from `first`."""
    raise NotImplementedError("for compiled code")


@overload(add_columns, prefer_literal=True)
def _add_columns(indices, values, start, stop, X, out, i, first, width):
    if not isinstance(out.dtype, types.Complex):
        columns = width.literal_value
        return lambda indices, values, start, stop, X, out, i, first, width: add_row(
            indices, values, start, stop, X, out, i, first, columns
        )

    def add(indices, values, start, stop, X, out, i, first, width):
        last = first + np.uint64(width)
        while first < last:
            c, first = min(first, last - _TWO), first + _TWO
            one = two = 0j
            for e in range(start, stop):
                factor, j = wide(values[e]), indices[e]
                one += factor * wide(X[j, c])
                two += factor * wide(X[j, c + _ONE])
            out[i, c], out[i, c + _ONE] = one, two
        return last

    return add


@_jit
def multiply_one(counter, chunk, zero, pointers, indices, values, x, out):
    """out[p, i] = sum of values[p, e] x[p, j] over the entries e = (i, j) of row i."""
    copies, rows = out.shape
    while True:
        first = claim(counter) * chunk
        if first >= copies * rows:
            return
        last = min(first + chunk, copies * rows)
        while first < last:
            p = first // rows
            start, stop = first - p * rows, min(last - p * rows, rows)
            first = p * rows + stop
            v, u, y = values[p], x[p], out[p]
            for i in range(start, stop):
                total = zero
                for e in range(pointers[i], pointers[i + 1]):
                    total += wide(v[e]) * wide(u[indices[e]])
                y[i] = total


@_jit
def multiply_block(counter, chunk, zero, pointers, indices, values, X, out):
    """As `multiply_one`, for X[p, j, :] and out[p, i, :] of two columns or more: up to eight sums stay in registers."""
    copies, rows, k = out.shape
    width = np.uint64(k)
    while True:
        first = claim(counter) * chunk
        if first >= copies * rows:
            return
        last = min(first + chunk, copies * rows)
        while first < last:
            p = first // rows
            start, stop = first - p * rows, min(last - p * rows, rows)
            first = p * rows + stop
            v, U, Y = values[p], X[p], out[p]
            for i in range(start, stop):
                c = np.uint64(0)
                while c + _EIGHT <= width:
                    c = add_columns(indices, v, pointers[i], pointers[i + 1], U, Y, i, c, 8)
                while c + _FOUR <= width:
                    c = add_columns(indices, v, pointers[i], pointers[i + 1], U, Y, i, c, 4)
                if c + _THREE == width:
                    c = add_columns(indices, v, pointers[i], pointers[i + 1], U, Y, i, c, 3)
                elif c < width:  # the last but one for a second time, if only one is left
                    c = add_columns(indices, v, pointers[i], pointers[i + 1], U, Y, i, width - _TWO, 2)


@_jit
def add_up(counter, chunk, pointers, indices, X, out):
    """out[i, :] = sum of X[j, :] over the entries (i, j) of row i."""
    rows, k = out.shape
    while True:
        first = claim(counter) * chunk
        if first >= rows:
            return
        for i in range(first, min(first + chunk, rows)):
            for c in range(k):
                total = 0.0
                for e in range(pointers[i], pointers[i + 1]):
                    total += X[indices[e], c]
                out[i, c] = total


@_jit
def sample(counter, chunk, zero, pointers, indices, order, U, W, out):
    """out[p, order[e]] = sum of U[p, i, c] conj(W[p, j, c]) over columns c, for the entries e = (i, j)."""
    copies, rows, k = U.shape
    while True:
        first = claim(counter) * chunk
        if first >= copies * rows:
            return
        last = min(first + chunk, copies * rows)
        while first < last:
            p = first // rows
            start, stop = first - p * rows, min(last - p * rows, rows)
            first = p * rows + stop
            left, right, found = U[p], W[p], out[p]
            for i in range(start, stop):
                for e in range(pointers[i], pointers[i + 1]):
                    j, total = indices[e], zero
                    for c in range(k):
                        total += wide(left[i, c]) * conjugate(wide(right[j, c]))
                    found[e if order is None else order[e]] = total


@_jit
def gram(counter, chunk, zero, pointers, indices, places, t_pointers, t_indices, starts, rows, values, out):
    """The lower triangle of A^H A, column by column: positions (rows[t], j) for starts[j] <= t < starts[j + 1].

    Args:
        pointers, indices, values: A row by row, indices ascending.
        places: of the entries column by column, their numbers row by row.
        t_pointers, t_indices: A column by column.

    Long sums are made of shorter ones, whose rounding errors grow less.
    """
    n = len(starts) - 1
    sums = np.empty(n, out.dtype)
    sums[:] = zero
    while True:
        first = claim(counter) * chunk
        if first >= n:
            return
        for j in range(first, min(first + chunk, n)):
            # Moving the sums takes less time than making them.
            most = max(np.int64(_TERMS), np.int64(starts[j + 1]) - np.int64(starts[j]))
            terms, moved, last = np.int64(0), False, t_pointers[j + 1]
            for s in range(t_pointers[j], t_pointers[j + 1]):
                place, row = places[s], t_indices[s]
                factor, end = values[place], pointers[row + _ONE]
                for e in range(place, end):
                    sums[indices[e]] += conjugate(values[e]) * factor
                terms += np.int64(end) - np.int64(place)
                if terms > most or s + _ONE == last:
                    for t in range(starts[j], starts[j + 1]):
                        i = rows[t]
                        out[t] = out[t] + sums[i] if moved else sums[i]
                        sums[i] = zero
                    terms, moved = np.int64(0), True
