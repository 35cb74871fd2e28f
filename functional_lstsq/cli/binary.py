"""Arrays of NumPy (.npy), sparse matrices of SciPy (.npz) and of MATLAB (.mat), none of which may run code here."""

from __future__ import annotations

import io
import zipfile
from typing import IO, Any

import numpy as np

from ..solvers.memory import available_bytes
from .content import Content, of_array, of_entries
from .errors import BadInput, reason_of
from .mat_file import MatFile

_RATIO, _MOST = 200, 2**30  # as of other compressed files


def _fail(name: str, what: str) -> BadInput:
    return BadInput(f"cannot read {name}: {what}")


def read_npy(name: str, file: IO[bytes]) -> Content:
    """An array of one or two dimensions; one of objects, which would be code, is refused."""
    values = _array(name, file)
    if file.read(1):
        raise _fail(name, "there are bytes after the array that its header promises")
    return of_array(values, name)


def _array(name: str, file: IO[bytes]) -> np.ndarray:
    try:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if header is None:
            raise _fail(name, f"version {version[0]}.{version[1]} of .npy, wanted 1.0 or 2.0")
        shape, fortran, dtype = header(file)
        if dtype.hasobject:
            raise _fail(name, "it must hold numbers, got Python objects")
        size = dtype.itemsize
        for length in shape:
            size *= length
        if size > available_bytes():
            raise _fail(name, f"an array of shape {shape} does not fit into memory")
        data = file.read(size)
        if len(data) < size:
            raise _fail(name, f"it ends before the array of shape {shape} does")
        return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    except BadInput:
        raise
    except Exception as error:  # a header is parsed as Python, which fails in many ways
        raise _fail(name, f"not an array of NumPy: {reason_of(error)}") from None


def read_npz(name: str, file: IO[bytes]) -> Content:
    """What `scipy.sparse.save_npz` writes of a CSR, CSC or COO matrix."""
    data = file.read()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            sizes = [member.file_size for member in archive.infolist()]
            if sum(sizes) > min(available_bytes(), max(_MOST, _RATIO * len(data))):
                raise _fail(name, f"it unpacks to {sum(sizes):.1e} bytes; unpack it first, if it is meant to")
            members = {member.filename: archive.read(member) for member in archive.infolist()}
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        raise _fail(name, f"it is a zip archive: unpack it first ({reason_of(error)})") from None
    if not {"format.npy", "shape.npy", "data.npy"} <= members.keys():
        raise _fail(name, "it is a zip archive: unpack it first, or write it by scipy.sparse.save_npz")
    arrays = {key.removesuffix(".npy"): _array(name, io.BytesIO(part)) for key, part in members.items()}
    kind = arrays["format"].item() if arrays["format"].size == 1 else None
    kind = kind.decode("ascii", "replace") if isinstance(kind, bytes) else kind
    shape = tuple(arrays["shape"].tolist()) if arrays["shape"].dtype.kind in "iu" else ()
    if len(shape) != 2 or min(shape) < 0:
        raise _fail(name, f"a matrix must have two sizes, got shape {shape}")
    wanted = {"csr": ("indices", "indptr"), "csc": ("indices", "indptr"), "coo": ("row", "col")}.get(str(kind))
    if wanted is None or not set(wanted) <= arrays.keys():
        raise _fail(name, f"a matrix must be CSR, CSC or COO with all of its arrays, got {kind!r}")
    first, second = (_integers(name, key, arrays[key]) for key in wanted)
    if kind != "coo":
        first, second = _expanded(name, first, second, shape[0 if kind == "csr" else 1])
    rows, columns = (second, first) if kind == "csr" else (first, second)
    values = arrays["data"]
    if not rows.shape == columns.shape == values.shape:
        raise _fail(name, f"{len(rows)} positions for values of shape {values.shape}")
    return of_entries(shape, rows, columns, values, name)


def _integers(name: str, key: str, found: np.ndarray) -> np.ndarray:
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise _fail(name, f"{key} must be integers in one dimension, got {found.dtype}, shape {found.shape}")
    return found.astype(np.int64)


def _expanded(name: str, inner: np.ndarray, pointers: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(inner indices, outer ones) of compressed rows or columns."""
    if len(pointers) != size + 1 or pointers[0] != 0 or (np.diff(pointers) < 0).any() or pointers[-1] != len(inner):
        raise _fail(name, f"its pointers must rise from 0 to {len(inner)} in {size + 1} steps")
    return inner, np.repeat(np.arange(size), np.diff(pointers))


def read_mat(name: str, file: IO[bytes]) -> Content:
    """Problem.A, as the SuiteSparse collection has it, or else the only sparse matrix, or the only array, of a file."""
    held = MatFile(name, file.read()).variables
    problem = held.get("Problem")
    if isinstance(problem, dict) and problem.get("A") is not None:
        return _of_matlab(name, problem["A"])
    for kind in (tuple, np.ndarray):
        fitting = [key for key, value in held.items() if isinstance(value, kind)]
        if len(fitting) == 1:
            return _of_matlab(name, held[fitting[0]])
        if fitting:
            break
    told = ", ".join(sorted(held)[:5]) or "nothing of the kind"
    raise _fail(name, f"of a MAT file Problem.A or one matrix is wanted, and it holds {told}")


def _of_matlab(name: str, value: Any) -> Content:
    if isinstance(value, dict):
        raise _fail(name, "Problem.A must be a matrix, got a structure")
    if isinstance(value, np.ndarray):
        return of_array(value, name)
    rows, pointers, values, shape = value
    inner, outer = _expanded(name, rows, pointers, shape[1])
    return of_entries(shape, inner, outer, values, name)
