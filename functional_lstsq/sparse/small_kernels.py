"""Factors and whole solves of small systems, by the compiled loops of `compiled_small` and `compiled_bounds`."""

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
    weights: np.ndarray
    D: np.ndarray
    d2: np.ndarray
    L: np.ndarray
    told: np.ndarray
    m: int


def factor(pattern: SparsePattern, values: Tensor, weights: Tensor | None, damp: Tensor | None) -> Factors:
    """For values (P, nnz), weights (P, m) or None and damp (P, 1), (P, n) or None."""
    given, (copies, n) = RowByRow(pattern, values).arrays, (len(values), pattern.shape[1])
    scaled, L = np.empty_like(given.values), np.empty((copies, n, n), given.values.dtype)
    D, N, d2 = np.empty((3, copies, n))
    w, d = [np.empty((copies, 0)) if t is None else array(t) for t in (weights, damp)]
    told, start = np.empty((copies, _TOLD)), in_every_direction(n)
    work = copies * (n**3 // 6 + 100 * n**2 + multiplications(pattern))
    key = "small_factor", L.dtype, given.pointers.itemsize
    A = given.zero, *given[:3]
    run("small_factor", key, copies, work, *A, w, d, start, scaled, D, N, d2, L, told)
    return Factors(given._replace(values=scaled), w, D, d2, L, told, pattern.shape[0])


def solve(
    factors: Factors,
    slots: tuple[Tensor | None, Tensor | None, Tensor | None],
    known: Tensor | None,
    limits: tuple[float, float],
    codes: tuple[float, float, float, float],
    fields: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(r, s, x, report (P, fields, k), the matrices of which a column has no solution) for `slots` (b, e, c)."""
    A, weights, D, d2, L, told, m = factors
    (copies, n), k = D.shape, next(t for t in slots if t is not None).shape[2]
    rows = weights.shape[1]
    b, e, c = [
        np.zeros((copies, size, k), L.dtype) if t is None else array(t)
        for t, size in zip(slots, (m, 0, n), strict=True)
    ]
    r, s, x = [np.empty((copies, size, k), L.dtype) for size in (m, rows, n)]
    about, report = np.empty((copies, 0, k)) if known is None else array(known), np.empty((copies, fields, k))
    work = copies * k * 8 * (n**2 + 2 * A.values.shape[1])
    key = "small_solve", L.dtype, A.pointers.itemsize
    given = A.zero, *A[:3], weights, D, d2, L, told, b, e, c, about, _signs(m + n), limits, codes
    run("small_solve", key, copies * k, work, *given, r, s, x, report)
    found = torch.from_numpy(report)
    failed = found[:, 0].isnan().any(1).nonzero()[:, 0]
    return torch.from_numpy(r), torch.from_numpy(s), torch.from_numpy(x), found, failed


@functools.lru_cache(maxsize=16)
def _signs(rows: int) -> np.ndarray:
    return array(noise(torch.empty((2, rows), dtype=torch.float64, device="cpu")))


def guess_active(G: Tensor, h: Tensor, lower: Tensor, upper: Tensor, active: Tensor) -> Tensor:
    """Which bounds hold in min x^T G x / 2 - h^T x, lower <= x <= upper, about; all (P, n), but G (P, n, n).

    `active` is what to begin with, and what comes out where nothing is found; see `linear.active_set` for its values.
    """
    found, (copies, n) = active.clone(), h.shape
    run("guess_active", ("guess_active",), copies, copies * n**3, *map(array, (G, h, lower, upper)), found.numpy())
    return found
