"""Dense Gram matrices of sparse ones and their Cholesky factors, by the compiled loops of `compiled_dense`."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from .kernels import Matrix, array, multiplications, run
from .numerics import noise
from .pattern import SparsePattern


def dense_gram(A: Matrix, pattern: SparsePattern) -> Tensor:
    """A^H A (P, n, n)"""
    copies, n = len(A.values), pattern.shape[1]
    out = np.empty((copies, n, n), A.values.dtype)
    work = copies * (n**2 + multiplications(pattern))
    key = "dense_gram", out.dtype, A.pointers.itemsize
    run("dense_gram", key, copies, work, A.zero, A.pointers, A.indices, A.values, out)
    return torch.from_numpy(out)


def dense_factor(A: Matrix, pattern: SparsePattern, d2: Tensor | None) -> tuple[Tensor, Tensor]:
    """(L (P, n, n), extremes (P, 2)) of A^H A + diag(d2) = L L^H, and its largest and smallest eigenvalue.

    The smallest is NaN where there is no L. d2 is (P, n), or None.
    """
    copies, n = len(A.values), pattern.shape[1]
    L, extremes = np.empty((copies, n, n), A.values.dtype), np.empty((copies, 2))
    work = copies * (n**3 // 6 + 80 * n**2 + multiplications(pattern))
    key = "dense_factor", L.dtype, A.pointers.itemsize, d2 is None
    added = None if d2 is None else array(d2)
    run(
        "dense_factor",
        key,
        copies,
        work,
        A.zero,
        A.pointers,
        A.indices,
        A.values,
        added,
        in_every_direction(n),
        L,
        extremes,
    )
    return torch.from_numpy(L), torch.from_numpy(extremes)


@functools.lru_cache(maxsize=16)
def in_every_direction(n: int) -> np.ndarray:
    """Vectors with a part in every direction."""
    return array(noise(torch.empty((4, n), dtype=torch.float64, device="cpu")).T)
