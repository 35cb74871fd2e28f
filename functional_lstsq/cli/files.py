"""Matrix Market files in and out; what cannot be used is one line that says what it is and what was wanted."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import scipy.sparse
import torch
from torch import Tensor

from .. import SparseMatrix

# What the library advises, in the words of the command line.
_WORDS = {
    "rank_deficient='minimum_norm'": "--minimum-norm",
    "refine='extended'": "--refine extended",
    "solver=Direct()": "--solver direct",
    "solver=Dense()": "--solver dense",
    "solver=CGLS(), or raise memory": "--solver cgls",
    "raise max_iterations": "--solver direct",
    ", or throw=False in solve to see how far it came": "",
    "damp > 0": "--damp D with D > 0",
}


class BadInput(Exception):
    """Something the user gave cannot be used; the message is one line."""


def line_of(error: Exception) -> str:
    """One line, in the words of the command line."""
    line = " ".join(str(error).split()) or ("out of memory" if isinstance(error, MemoryError) else repr(error))
    for ours, theirs in _WORDS.items():
        line = line.replace(ours, theirs)
    return line


def check_outputs(inputs: list[str | None], outputs: list[str | None]) -> None:
    """Refuse before any work what could not be written after it, or would overwrite what is needed."""
    needed = {Path(name).resolve() for name in inputs if name}
    wanted = [name for name in outputs if name is not None]
    for name in wanted:
        path = Path(name)
        if not name or path.is_dir():
            raise BadInput(f"cannot write {name!r}: not the name of a file")
        if not path.parent.is_dir():
            raise BadInput(f"cannot write {path}: {path.parent} is not a folder")
        if path.resolve() in needed:
            raise BadInput(f"cannot write {path}: it is an input too")
    if len({Path(name).resolve() for name in wanted}) < len(wanted):
        raise BadInput(f"cannot write both results to {wanted[0]}")


def read(name: str) -> Any:
    """The array or the sparse matrix in a Matrix Market file, plain or compressed."""
    path = Path(name)
    if not path.is_file():
        raise BadInput(f"cannot read {name}: {'not a file' if path.exists() else 'no such file'}")
    if not path.stat().st_size:
        raise BadInput(f"cannot read {name}: the file is empty")
    try:
        return scipy.io.mmread(name)
    except Exception as error:  # the reader's errors are of many types
        raise BadInput(f"cannot read {name} as a Matrix Market file: {line_of(error)}") from None


def read_matrix(name: str) -> SparseMatrix:
    """The matrix, in double precision."""
    matrix = read(name)
    A = SparseMatrix.from_scipy(matrix if scipy.sparse.issparse(matrix) else scipy.sparse.coo_array(matrix))
    if not A.values.isfinite().all():
        raise BadInput(f"{name} holds NaN or infinity")
    return A.to(torch.promote_types(A.dtype, torch.float64))


def _read_columns(name: str, A: SparseMatrix, matrix: str, *, one: bool = False) -> np.ndarray:
    """The columns, or the one column, of a number for each row of A, which was read from the file `matrix`."""
    found = read(name)
    if found.shape[0] != A.shape[0]:
        raise BadInput(f"{name} has {found.shape[0]} rows, {matrix} has {A.shape[0]}")
    if not found.shape[1]:
        raise BadInput(f"{name} has no columns")
    if one and found.shape[1] != 1:
        raise BadInput(f"{name} must hold one column of weights, got {found.shape[1]}")
    found = found.toarray() if scipy.sparse.issparse(found) else np.asarray(found)
    if not np.isfinite(found).all():
        raise BadInput(f"{name} holds NaN or infinity")
    return found if np.iscomplexobj(found) else found.astype(float)


def read_right(name: str | None, A: SparseMatrix, matrix: str) -> Tensor:
    """The right-hand sides, (m,) or (m, k); A times ones where there is no file."""
    if name is None:
        return A @ torch.ones(A.shape[1], dtype=A.dtype)
    b = torch.tensor(_read_columns(name, A, matrix))
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
    return torch.tensor(found[:, 0])


def write(name: str, what: Any) -> None:
    """Write a dense array or a sparse matrix; compressed, where the name ends in .gz."""
    try:
        with gzip.open(name, "wb") if name.endswith(".gz") else open(name, "wb") as file:
            scipy.io.mmwrite(file, what, precision=17, symmetry="general")
    except OSError as error:
        raise BadInput(f"cannot write {name}: {error.strerror}") from None
