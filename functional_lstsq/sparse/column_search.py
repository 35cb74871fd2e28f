"""Conjugate gradients towards known solutions in compiled code, a thread for each column, as certificates ask for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import kernels
from .pattern import SparsePattern

_PORTION = 16  # iterations after which one column hears of another that has ended the search, and then twice as many
_LONGEST = 2**29  # multiplications of a column, some 0.5 s, after which an interrupt is heard
_GOES_ON, _ALL = 0, 2  # as the kernel has them


class Wanted(NamedTuple):
    """What a search is for; P = 1.

    Attributes:
        solutions: (1, n, k)
        b, c, gradient: right-hand sides (1, m, k) and (1, n, k) of these, and A^H b - c.
        inverse, norms: (1, n, 1), the preconditioner, and in what errors are measured.
        d2: d^2 (1, n, 1) or None.
        extremes: (k, 2), singular values to begin with.
        rules: (k, 6), as of the kernel.
        patience, solves: iterations that are too many, and how often a search is made for a solve.
    """

    solutions: Tensor
    b: Tensor
    c: Tensor
    gradient: Tensor
    inverse: Tensor
    norms: Tensor
    d2: Tensor | None
    extremes: Tensor
    rules: Tensor
    patience: float
    solves: float


class Found(NamedTuple):
    """Iterates (1, n, k), iterations (1, k); errors, energies and gradients (iterations, 1, k), NaN beyond the last."""

    y: Tensor
    iterations: Tensor
    errors: Tensor
    energies: Tensor
    gradients: Tensor


def search(pattern: SparsePattern, rows: Tensor, columns: Tensor, wanted: Wanted, limit: int) -> Found:
    """For values (1, nnz) of A row by row, and of A^H; at most `limit` iterations."""
    first, second = kernels.compressed(pattern), kernels.compressed(pattern.T)
    k = wanted.solutions.shape[2]

    def by_columns(t: Tensor) -> np.ndarray:
        return np.array(t[0].T.numpy(force=True), order="C")  # a copy, since it is changed

    r, known, shift, g = map(by_columns, (wanted.b, wanted.solutions, wanted.c, wanted.gradient))
    y, p, q = np.zeros_like(g), np.zeros_like(g), np.empty_like(r)
    vectors = rows, columns, wanted.inverse, wanted.d2, wanted.norms
    v, t, inverse, d2, norms = (None if part is None else kernels.array(part).reshape(-1) for part in vectors)
    gamma = (np.abs(g).astype(np.float64) ** 2 * inverse).sum(1)
    numbers, extremes = (
        np.stack([gamma, np.zeros(k), gamma], 1),
        np.array(wanted.extremes.numpy(force=True), np.float64),
    )
    done, history = np.zeros((k, 2), np.int64), np.empty((k, 0, 3))
    done[:, 1] = gamma <= 0
    rules = np.array(wanted.rules.numpy(force=True), np.float64)
    portion, longest = _PORTION, max(_PORTION, _LONGEST // (2 * max(1, pattern.nnz)))
    key = "search", y.dtype, first.pointers.itemsize, d2 is None
    while history.shape[1] < limit and (done[:, 1] == _GOES_ON).any() and not (done[:, 1] == _ALL).any():
        more = min(portion, limit - history.shape[1])
        history = np.concatenate([history, np.full((k, more, 3), np.nan)], 1)
        kernels.run(
            "search", key, k, pattern.nnz * k * more,
            first.pointers, first.indices, v, second.pointers, second.indices, t, inverse, shift, d2,
            r, y, p, q, g, known, norms, numbers, done, history, extremes, rules,
            float(wanted.patience), float(wanted.solves), history.shape[1],
        )  # fmt: skip
        portion = min(2 * portion, longest)
    steps = done[:, 0]
    errors, energies, gradients = torch.from_numpy(history[:, : steps.max(initial=0)]).permute(2, 1, 0)[:, :, None]
    return Found(
        torch.from_numpy(np.ascontiguousarray(y.T))[None],
        torch.from_numpy(steps.astype(np.float64))[None],
        errors,
        energies,
        gradients,
    )
