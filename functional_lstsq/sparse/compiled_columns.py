"""Sums over one row of a sparse matrix for some neighbouring columns at once, which the processor adds up as vectors.

LLVM makes vectors of loops, and of sums side by side only in its SLP pass, which Numba leaves out. So this one loop is
written in LLVM's own terms, for real numbers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_FUSED = ("contract",)  # a multiplication and an addition may be one operation


def _add_row(typing_context, indices, values, start, stop, X, out, row, first, width):
    """first + width; out[row, c] = sum of values[e] X[indices[e], c] over start <= e < stop, so many c from `first` on.

    Arrays are contiguous, X and out of two dimensions; `width` is a literal.
    """
    lanes = width.literal_value

    def generate(context, builder, signature, arguments):
        kinds, long, sums = signature.args, ir.IntType(64), ir.VectorType(ir.DoubleType(), lanes)
        indices, values, X, out = (
            context.make_array(kinds[at])(context, builder, arguments[at]) for at in (0, 1, 4, 5)
        )
        start, stop, row, first = (context.cast(builder, arguments[at], kinds[at], types.uint64) for at in (2, 3, 6, 7))

        def place(array, kind, i):
            """The columns in question of row i."""
            number = builder.add(builder.mul(i, cgutils.unpack_tuple(builder, array.shape)[1]), first)
            vector = ir.VectorType(context.get_value_type(kind.dtype), lanes)
            return builder.bitcast(builder.gep(array.data, [number]), vector.as_pointer())

        def widened(number, kind, to):
            return number if kind.dtype == types.float64 else builder.fpext(number, to)

        total = cgutils.alloca_once(builder, sums)
        builder.store(ir.Constant(sums, [0.0] * lanes), total)
        with cgutils.for_range_slice(builder, start, stop, ir.Constant(long, 1), inc=True) as (e, _):
            number = widened(builder.load(builder.gep(values.data, [e])), kinds[1], ir.DoubleType())
            one = builder.insert_element(ir.Constant(sums, ir.Undefined), number, ir.IntType(32)(0))
            everywhere = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
            factor = builder.shuffle_vector(one, one, everywhere)
            j = context.cast(builder, builder.load(builder.gep(indices.data, [e])), kinds[0].dtype, types.uint64)
            x = builder.load(place(X, kinds[4], j), align=kinds[4].dtype.bitwidth // 8)
            product = builder.fmul(factor, widened(x, kinds[4], sums), flags=_FUSED)
            builder.store(builder.fadd(builder.load(total), product, flags=_FUSED), total)
        found, there = builder.load(total), place(out, kinds[5], row)
        narrow = found if kinds[5].dtype == types.float64 else builder.fptrunc(found, there.type.pointee)
        builder.store(narrow, there, align=kinds[5].dtype.bitwidth // 8)
        return builder.add(first, long(lanes))

    return types.uint64(indices, values, start, stop, X, out, row, first, width), generate


add_row: Any = intrinsic(prefer_literal=True)(_add_row)
