"""What a file of any format holds, and what all formats ask of its numbers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..solvers.memory import available_bytes
from .errors import BadInput

_ENTRY = 100  # bytes that an entry takes while it is read


class Content(NamedTuple):
    """A matrix, or columns of numbers.

    Attributes:
        shape: (m, n).
        rows, columns: (entries,) of int64, from 0, what symmetry implies among them; of an array column by column.
        values: (entries,) of float64 or complex128.
        format: "coordinate", or "array" for a dense one.
        field, symmetry: in the words of Matrix Market.
        stored: the number of entries in the file itself.
        labels: (m,) what an SVMlight file has before its rows, which are its right-hand side.
    """

    shape: tuple[int, int]
    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    format: str
    field: str
    symmetry: str
    stored: int
    labels: np.ndarray | None = None

    def as_columns(self) -> Content:
        """What is meant where right-hand sides are wanted."""
        return self if self.labels is None else of_array(self.labels, "labels")


def require_room(name: str, entries: int) -> None:
    """Refuse what would not fit into memory before it is read."""
    room = available_bytes()
    if _ENTRY * entries > room:
        raise BadInput(
            f"cannot read {name}: {entries} entries take about {_ENTRY * entries:.1e} bytes of memory, of {room:.1e} "
            "that are available"
        )


def numbers_of(values: np.ndarray, name: str) -> np.ndarray:
    """In double precision; refused are what is no number, and what is not finite."""
    if values.dtype.kind not in "biufc":
        raise BadInput(f"cannot read {name}: it must hold numbers, got {values.dtype}")
    found = values.astype(np.complex128 if values.dtype.kind == "c" else np.float64)
    if not np.isfinite(found).all():
        what = "NaN" if np.isnan(values).any() else "infinity or a number beyond double precision"
        raise BadInput(f"cannot read {name}: numbers must be finite, got {what}")
    return found


def of_array(values: np.ndarray, name: str) -> Content:
    """A dense array (m,) or (m, n)."""
    if values.ndim not in (1, 2):
        raise BadInput(f"cannot read {name}: an array must have one or two dimensions, got shape {values.shape}")
    require_room(name, values.size)
    found = numbers_of(values if values.ndim == 2 else values[:, None], name)
    m, n = found.shape
    columns, rows = (place.ravel() for place in np.divmod(np.arange(m * n), max(m, 1)))
    field = "complex" if np.iscomplexobj(found) else "real"
    return Content((m, n), rows, columns, found.T.reshape(-1), "array", field, "general", m * n)


def of_entries(shape: tuple[int, int], rows: np.ndarray, columns: np.ndarray, values: np.ndarray, name: str) -> Content:
    """Entries from 0, at positions that must lie inside."""
    found = numbers_of(values, name)
    for what, index, size in (("row", rows, shape[0]), ("column", columns, shape[1])):
        if index.size and not 0 <= int(index.min()) <= int(index.max()) < size:
            wrong = int(index.min()) if int(index.min()) < 0 else int(index.max())
            raise BadInput(f"cannot read {name}: {what} {wrong + 1} lies outside of 1 to {size}")
    field = "complex" if np.iscomplexobj(found) else "real"
    rows, columns = rows.astype(np.int64), columns.astype(np.int64)
    return Content(shape, rows, columns, found, "coordinate", field, "general", len(found))
