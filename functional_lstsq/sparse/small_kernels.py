"""Factors and whole solves of small systems, by the compiled loops of `compiled_small`."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .dense_kernels import in_every_direction
from .kernels import Matrix, array, multiplications, run
from .numerics import noise
from .pattern import SparsePattern
from .plain_products import RowByRow

RESIDUAL, SOLUTION = 1.0, 2.0  # as in the loops
_TOLD = 7


class Factors(NamedTuple):
    """What `compiled_small.small_factor` gives, and what solves take beside it."""

    A: Matrix  # its columns scaled
    D: np.ndarray
    d2: np.ndarray
    L: np.ndarray
    told: np.ndarray
    m: int


def factor(pattern: SparsePattern, values: Tensor, damp: Tensor | None) -> Factors:
    """For values (P, nnz) and damp (P, 1), (P, n) or None."""
    given, (copies, n) = RowByRow(pattern, values).arrays, (len(values), pattern.shape[1])
    scaled, L = np.empty_like(given.values), np.empty((copies, n, n), given.values.dtype)
    D, N, d2 = np.empty((3, copies, n))
    told, d = np.empty((copies, _TOLD)), np.empty((copies, 0)) if damp is None else array(damp)
    work = copies * (n**3 // 6 + 100 * n**2 + multiplications(pattern))
    key = "small_factor", L.dtype, given.pointers.itemsize
    shape = given.zero, given.pointers, given.indices
    run("small_factor", key, copies, work, *shape, given.values, d, in_every_direction(n), scaled, D, N, d2, L, told)
    return Factors(given._replace(values=scaled), D, d2, L, told, pattern.shape[0])


def solve(
    factors: Factors,
    b: Tensor | None,
    c: Tensor | None,
    known: Tensor | None,
    precision: float,
    accept: float,
    codes: tuple[float, float, float, float],
    fields: int,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(r, x, report (P, fields, k)), or None where there is none of a column."""
    A, D, d2, L, told, m = factors
    (copies, n), k = D.shape, next(t for t in (b, c) if t is not None).shape[2]
    right = (np.zeros((copies, rows, k), L.dtype) if t is None else array(t) for t, rows in ((b, m), (c, n)))
    r, x, report = np.empty((copies, m, k), L.dtype), np.empty((copies, n, k), L.dtype), np.empty((copies, fields, k))
    about = np.empty((copies, 0, k)) if known is None else array(known)
    work = copies * k * 8 * (n**2 + 2 * A.values.shape[1])
    key = "small_solve", L.dtype, A.pointers.itemsize
    shape = A.zero, A.pointers, A.indices, A.values
    numbers = about, _signs(m + n), (precision, accept), codes
    run("small_solve", key, copies * k, work, *shape, D, d2, L, told, *right, *numbers, r, x, report)
    if np.isnan(report[:, 0]).any():
        return None
    return torch.from_numpy(r), torch.from_numpy(x), torch.from_numpy(report)


@functools.lru_cache(maxsize=16)
def _signs(rows: int) -> np.ndarray:
    return array(noise(torch.empty((2, rows), dtype=torch.float64, device="cpu")))
