"""Made problems, the same ones every time: a sparse A, a right-hand side b, a cotangent of x."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Problem(NamedTuple):
    """min |A x - b| and the gradients of cotangent . x; A as row indices, column indices, values."""

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]
    b: np.ndarray
    cotangent: np.ndarray


def _with_sides(rows, columns, values, shape, rng) -> Problem:
    order = np.lexsort((columns, rows))
    b, cotangent = rng.standard_normal(shape[0]), rng.standard_normal(shape[1])
    return Problem(rows[order].astype(np.int64), columns[order].astype(np.int64), values[order], shape, b, cotangent)


def random(m: int, n: int, per_row: int = 8) -> Problem:
    """Normal entries in `per_row` places of each row."""
    rng = np.random.default_rng(m + n)
    columns = rng.integers(0, n, (m, per_row))
    for _ in range(100):  # draw doublets again
        columns.sort(1)
        twice = np.zeros_like(columns, dtype=bool)
        twice[:, 1:] = columns[:, 1:] == columns[:, :-1]
        if not twice.any():
            break
        columns[twice] = rng.integers(0, n, int(twice.sum()))
    rows = np.repeat(np.arange(m), per_row)
    return _with_sides(rows, columns.ravel(), rng.standard_normal(m * per_row), (m, n), rng)


def grid(side: int, dimensions: int) -> Problem:
    """First differences between the neighbours of a grid, and each unknown itself with weight 0.1."""
    rng = np.random.default_rng(side)
    nodes = np.arange(side**dimensions).reshape((side,) * dimensions)
    pairs = [
        np.stack([nodes.take(range(side - 1), axis).ravel(), nodes.take(range(1, side), axis).ravel()], 1)
        for axis in range(dimensions)
    ]
    edges, n = np.concatenate(pairs), nodes.size
    weights = rng.uniform(0.5, 2.0, len(edges))[:, None] * np.array([-1.0, 1.0])
    rows = np.concatenate([np.repeat(np.arange(len(edges)), 2), len(edges) + np.arange(n)])
    columns = np.concatenate([edges.ravel(), np.arange(n)])
    values = np.concatenate([weights.ravel(), np.full(n, 0.1)])
    return _with_sides(rows, columns, values, (len(edges) + n, n), rng)


def fixed_effects(observations: int = 1_000_000, levels: tuple[int, int] = (50_000, 2_000)) -> Problem:
    """A regression on two factors, indicators of their levels; one level is dropped, for full rank."""
    rng = np.random.default_rng(observations)
    first, second = (rng.integers(0, count, observations) for count in levels)
    rows = np.concatenate([np.arange(observations)] * 2)
    columns = np.concatenate([first, levels[0] + second])
    kept = columns < sum(levels) - 1
    shape = (observations, sum(levels) - 1)
    return _with_sides(rows[kept], columns[kept], np.ones(int(kept.sum())), shape, rng)


def tomography(side: int = 128, angles: int = 180) -> Problem:
    """Parallel-beam projections of a square image: a pixel is shared by the two detectors next to its shadow."""
    rng = np.random.default_rng(side)
    detectors = int(np.ceil(side * 2**0.5)) + 3
    place = np.arange(side) - (side - 1) / 2
    theta = np.pi * np.arange(angles)[:, None, None] / angles
    shadow = np.cos(theta) * place[:, None] + np.sin(theta) * place + detectors / 2
    low = np.floor(shadow).astype(np.int64)
    share = (shadow - low).ravel()
    rows = (np.arange(angles)[:, None, None] * detectors + low).ravel()
    pixels = np.tile(np.arange(side**2), angles)
    rows, columns = np.concatenate([rows, rows + 1]), np.concatenate([pixels, pixels])
    values = np.concatenate([1 - share, share])
    kept = values != 0
    rows, columns, values = rows[kept], columns[kept], values[kept]
    used, rows = np.unique(rows, return_inverse=True)
    return _with_sides(rows, columns, values, (len(used), side**2), rng)
