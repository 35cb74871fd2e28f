"""within, for the effects of two factors: solutions only, for it has no derivatives."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import numpy as np

Run = Callable[[], dict[str, Any]]


def effects(problem: dict[str, np.ndarray]) -> Run:
    """x, to a tolerance of 1e-9, where the last level of the second factor is zero; the factors are made beforehand."""
    import within

    rows, columns, (m, n) = problem["rows"], problem["columns"], problem["shape"]
    first, second = np.full(m, n), np.full(m, n)
    np.minimum.at(first, rows, columns)  # of the two entries of a row, or the only one
    count = int(first.max()) + 1
    later = columns >= count
    second[rows[later]] = columns[later]
    factors = np.asfortranarray(np.stack([first, second - count], 1).astype(np.uint32))

    def run() -> dict[str, Any]:
        found = within.solve(factors, problem["b"], options=within.LsmrOptions(tol=1e-9, maxiter=100_000)).x
        of_first, of_second = found[:count], found[count:]
        return {"x": np.concatenate([of_first + of_second[-1], of_second[:-1] - of_second[-1]])}

    return run


def about(contestant: str) -> dict[str, Any]:
    """Its version."""
    __import__(contestant)
    return {"versions": {"within-py": importlib.metadata.version("within-py")}}


WORKS = {"within": {"solve": effects}}
