"""The loop that colours the columns of a sparse matrix, which Numba compiles; `coloring` says what colours are."""

from __future__ import annotations

import numpy as np

from .compiled import _jit


@_jit
def color_columns(row_pointers, columns, column_pointers, rows, order, color):
    """The first colour that no column with a common row has, for one column after the other, into `color` of -1."""
    used = np.full(len(order) + 1, -1, np.int64)  # by which column a colour was last seen beside it
    for j in order:
        for e in range(column_pointers[j], column_pointers[j + 1]):
            i = np.int64(rows[e])
            for f in range(row_pointers[i], row_pointers[i + 1]):
                used[color[columns[f]]] = j  # of -1 the last place, which is nobody's
        number = 0
        while used[number] == j:
            number += 1
        color[j] = number
