"""SciPy's LSMR, and SPQR of SuiteSparse: solutions only, for neither has derivatives."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy
import scipy.sparse
import scipy.sparse.linalg
from fits import by_scipy

Run = Callable[[], dict[str, Any]]


def _matrix(problem: dict[str, np.ndarray]) -> scipy.sparse.coo_matrix:
    return scipy.sparse.coo_matrix((problem["values"], (problem["rows"], problem["columns"])), tuple(problem["shape"]))


def lsmr(problem: dict[str, np.ndarray]) -> Run:
    """x, to a tolerance of 1e-9."""
    A, b = _matrix(problem), problem["b"]

    def run() -> dict[str, Any]:
        return {"x": scipy.sparse.linalg.lsmr(A.tocsr(), b, atol=1e-9, btol=1e-9, maxiter=1_000_000)[0]}

    return run


def spqr(problem: dict[str, np.ndarray]) -> Run:
    """x, through sparseqr, which takes the matrix as COO."""
    import sparseqr

    A, b = _matrix(problem), problem["b"]
    return lambda: {"x": np.ravel(sparseqr.solve(A, b))}


def about(contestant: str) -> dict[str, Any]:
    """Versions, and the BLAS of NumPy and SciPy."""
    if contestant == "spqr":
        importlib.import_module("sparseqr")
        return {"versions": {"sparseqr": importlib.metadata.version("sparseqr")}}
    return {"versions": {"numpy": np.__version__, "scipy": scipy.__version__}, "blas": _blas()}


def _blas() -> list[str]:
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        found = []
        for module in (np, scipy):
            blas = module.show_config(mode="dicts")["Build Dependencies"]["blas"]
            found.append(f"{module.__name__}: {blas['name']} {blas['version']}")
        return found
    pools = threadpool_info()
    return [f"{pool['internal_api']} {pool['version']}, {pool['num_threads']} threads" for pool in pools]


WORKS = {"scipy": {"solve": lsmr, "fit": by_scipy}, "spqr": {"solve": spqr}}
