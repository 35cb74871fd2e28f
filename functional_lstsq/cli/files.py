"""Matrices, right-hand sides, weights and bounds out of files; what cannot be used is one line that says why."""

from __future__ import annotations

import argparse
import math
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from .. import SparseMatrix, SparsePattern
from ..solvers.memory import available_bytes
from .content import Content
from .errors import BadInput
from .formats import read

__all__ = ["BadInput", "Compact", "compact", "matrix_of", "read_bounds", "read_matrix", "read_right", "read_weights"]


def read_matrix(name: str) -> SparseMatrix:
    """The matrix, in double precision."""
    return matrix_of(read(name))


def matrix_of(found: Content) -> SparseMatrix:
    """The matrix of a file, in double precision; of an array what is not zero."""
    rows, columns, values = found.rows, found.columns, found.values
    if found.format == "array":
        rows, columns, values = (part[values != 0] for part in (rows, columns, values))
    return SparseMatrix.from_scipy(scipy.sparse.coo_array((values, (rows, columns)), found.shape))


def _read_columns(name: str, A: SparseMatrix, matrix: str, *, one: bool = False) -> np.ndarray:
    """The columns, or the one column, of a number for each row of A, which was read from the file `matrix`."""
    found = read(name).as_columns()
    m, k = found.shape
    if m != A.shape[0]:
        raise BadInput(f"{name} has {m} rows, {matrix} has {A.shape[0]}")
    if not k:
        raise BadInput(f"{name} has no columns")
    if one and k != 1:
        raise BadInput(f"{name} must hold one column of weights, got {k}")
    if 8 * m * k > available_bytes():
        raise BadInput(f"{name}: {m} x {k} numbers do not fit into memory")
    columns = np.zeros((m, k), dtype=found.values.dtype)
    np.add.at(columns, (found.rows, found.columns), found.values)
    return columns


def read_right(name: str | None, A: SparseMatrix, matrix: str) -> Tensor | None:
    """The right-hand sides, (m,) or (m, k); None where there is no file."""
    if name is None:
        return None
    b = torch.from_numpy(_read_columns(name, A, matrix))
    return b[:, 0] if b.shape[1] == 1 else b


def read_weights(name: str | None, A: SparseMatrix, matrix: str) -> Tensor | None:
    """The weights (m,)."""
    if name is None:
        return None
    found = _read_columns(name, A, matrix, one=True)
    if np.iscomplexobj(found):
        raise BadInput(f"{name} must hold real weights, got complex ones")
    if (found < 0).any():
        raise BadInput(f"{name} must hold no negative weight, got {found.min():g}")
    return torch.from_numpy(found[:, 0])


def _bound(given: str | None, option: str, A: SparseMatrix, matrix: str) -> float | Tensor | None:
    """A number, or the numbers (n,) of a file, one for each column of A; None where nothing is given.

    Files hold no infinity, so that 1e300 and more stands for it, as in files of linear programs.
    """
    if given is None:
        return None
    try:
        number = float(given)
    except ValueError:
        number = None
    if number is not None and np.isnan(number):
        raise BadInput(f"argument {option}: must be a number, inf, -inf or a file, got {given}")
    if number is not None:
        return number
    found, n = read(given), A.shape[1]
    if found.shape != (n, 1):
        rows, columns = found.shape
        raise BadInput(
            f"{given} must hold one column of {n} bounds, for the columns of {matrix}, got {rows} x {columns}"
        )
    if np.iscomplexobj(found.values) or np.isnan(found.values).any():
        raise BadInput(
            f"{given} must hold real bounds, got {'complex ones' if np.iscomplexobj(found.values) else 'NaN'}"
        )
    bound = np.zeros(n)
    np.add.at(bound, found.rows, found.values)
    return torch.from_numpy(np.where(np.abs(bound) >= 1e300, np.copysign(np.inf, bound), bound))


def read_bounds(options: argparse.Namespace, A: SparseMatrix, b: Tensor | None) -> tuple[Any, Any] | None:
    """The bounds that are asked for; what they do not go with is refused in the words of the command line."""
    if options.nonnegative and options.lower is not None:
        raise BadInput("argument --nonnegative: not allowed with --lower")
    given = "0" if options.nonnegative else options.lower
    lower, upper = (
        _bound(given, "--lower", A, options.matrix),
        _bound(options.upper, "--upper", A, options.matrix),
    )
    if lower is None and upper is None:
        return None
    named = "--nonnegative" if options.nonnegative else "--lower" if lower is not None else "--upper"
    if options.minimum_norm or options.robust:
        raise BadInput(f"argument {named}: not allowed with {'--minimum-norm' if options.minimum_norm else '--robust'}")
    if A.dtype.is_complex or (b is not None and b.is_complex()):
        raise BadInput(f"argument {named}: the numbers must be real, got complex ones")
    lower, upper = (-math.inf if lower is None else lower), (math.inf if upper is None else upper)
    least, most = (torch.as_tensor(bound, dtype=torch.float64) for bound in (lower, upper))
    if bool((least > most).any()):
        raise BadInput(f"argument {named}: the lower bound must not be above the upper one")
    return lower, upper


class Compact(NamedTuple):
    """A matrix without most of its empty rows or columns, and what belongs to it.

    They take no part in anything, and a file of three entries may promise a billion of them.

    Attributes:
        rows, columns: the numbers of those that are left; None for all.
        width: the number of columns with all of them.
    """

    A: SparseMatrix
    rows: Tensor | None
    columns: Tensor | None
    width: int

    def of_rows(self, numbers: Tensor) -> Tensor:
        """Those numbers of (m, ...) that belong to the rows that are left."""
        return numbers if self.rows is None else numbers[self.rows]

    def of_columns(self, x: Tensor) -> Tensor:
        """All of x (n, ...): zeros for columns that are left out."""
        if self.columns is None:
            return x
        return x.new_zeros((self.width, *x.shape[1:])).index_copy(0, self.columns, x)


def compact(A: SparseMatrix, *, any_rank: bool = False) -> Compact:
    """Without empty rows and columns, where at least half of them are.

    Args:
        any_rank: A needs no full rank. Otherwise a tall A loses rows only, a wide one columns, and as many stay as full
            rank takes.
    """
    (m, n), width = A.shape, A.shape[1]
    rows = columns = None
    if any_rank or m >= n:
        A, rows = _without_empty(A, 0, 0 if any_rank else n)
    if any_rank or m < n:
        A, columns = _without_empty(A, 1, 0 if any_rank else m)
    return Compact(A, rows, columns, width)


def _without_empty(A: SparseMatrix, dim: int, least: int) -> tuple[SparseMatrix, Tensor | None]:
    """(A without empty rows, or columns, but at least so many of them, the numbers of those that are left)."""
    used, places = A.pattern.indices[dim].unique(return_inverse=True)
    count = max(len(used), least)
    if count > A.shape[dim] // 2:
        return A, None
    free = torch.ones(min(A.shape[dim], 2 * count + 1), dtype=torch.bool)
    free[used[used < len(free)]] = False
    kept = torch.cat([used, free.nonzero()[: count - len(used), 0]]).sort().values
    indices = A.pattern.indices.clone()
    indices[dim] = torch.searchsorted(kept, used)[places]
    shape = (count, A.shape[1]) if dim == 0 else (A.shape[0], count)
    return SparseMatrix(A.values, SparsePattern(indices, shape)), kept
