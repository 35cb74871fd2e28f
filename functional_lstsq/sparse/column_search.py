"""Conjugate gradients towards known solutions in compiled code, a thread for each column, as certificates ask for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import kernels
from .normal_iteration import NormalProducts, vector
from .pattern import SparsePattern

_PORTION = 16  # iterations after which one column hears of another that has ended the search, and then twice as many
_LONGEST = 2**29  # multiplications of a column, some 0.5 s, after which an interrupt is heard
_GOES_ON, _FOUND, _ALL, _LEFT = 0, 1, 2, 3  # as the loops have them


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


def search(
    pattern: SparsePattern, rows: Tensor, columns: Tensor, normal: NormalProducts | None, wanted: Wanted, limit: int
) -> Found:
    """For values (1, nnz) of A row by row, and of A^H; at most `limit` iterations, by `normal` as long as they do."""
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
    matrix = first.pointers, first.indices, v, second.pointers, second.indices, t
    while history.shape[1] < limit and (done[:, 1] == _GOES_ON).any() and not (done[:, 1] == _ALL).any():
        begun = done[:, 0].max()
        more = min(portion, limit - begun)
        history = np.concatenate([history[:, :begun], np.full((k, more, 3), np.nan)], 1)
        told = known, norms, numbers, done, history, extremes, rules
        limits = float(wanted.patience), float(wanted.solves), begun + more
        if normal is None:
            key = "search", y.dtype, first.pointers.itemsize, d2 is None
            work = pattern.nnz * k * more
            kernels.run("search", key, k, work, *matrix, inverse, shift, d2, r, y, p, q, g, *told, *limits)
        else:
            key, work = ("search_normal", *normal.key), normal.work * k * more
            own = *normal.arrays, p, np.empty_like(p), inverse, vector(wanted.d2, np.float64), y, g
            kernels.run("search_normal", key, k, work, *own, *told, *limits)
            left = done[:, 1] == _LEFT
            if left.any():
                normal, missing = None, known - y
                r, g = _anew(pattern, rows, columns, missing, d2)
                gamma = (np.abs(g) ** 2 * inverse).sum(1)
                numbers[:, 1] *= gamma / np.where(numbers[:, 0] > 0, numbers[:, 0], 1.0)
                numbers[:, 0] = gamma
                # The step after which a column was left is noted by what is known of it now.
                energy = np.linalg.norm(r, axis=1) ** 2 + (0.0 if d2 is None else (d2 * np.abs(missing) ** 2).sum(1))
                of_step = np.linalg.norm(norms * missing, axis=1), np.sqrt(energy), np.sqrt(gamma)
                history[left, done[left, 0]] = np.stack(of_step, 1)[left]
                done[left, 0] += 1
                found = (of_step[0] <= rules[:, 0]) | (gamma <= 0)
                done[left, 1] = np.where(found[left], _FOUND, _GOES_ON)
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


def _anew(
    pattern: SparsePattern, rows: Tensor, columns: Tensor, missing: np.ndarray, d2: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(r, g) of what is missing (k, n): A z and A^H A z + d^2 z, by columns."""
    z = torch.from_numpy(np.ascontiguousarray(missing.T))[None]
    r = kernels.multiply(kernels.Matrix.of(pattern, rows), z, z.new_empty((1, pattern.shape[0], len(missing))))
    g = kernels.multiply(kernels.Matrix.of(pattern.T, columns), r, torch.empty_like(z))
    found = [np.array(t[0].T.numpy(), order="C") for t in (r, g)]
    return found[0], found[1] if d2 is None else found[1] + d2 * missing
