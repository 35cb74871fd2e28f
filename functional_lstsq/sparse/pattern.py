"""The static index set of a sparse matrix: sorted once, in both orientations, and found again from its indices."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Hashable
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..torch_func.process import entrance
from ..torch_func.tracing import concrete, constant, is_mapped, unseen_by_tracers, unseen_by_transforms
from .lazy import lazy

Kept = TypeVar("Kept")
_RELATED = 16  # results with other patterns that a pattern keeps
_count = itertools.count(1)


def new_name() -> str:
    """A text that nothing else has for its name."""
    return f"made_{next(_count)}"


# A pattern is made of plain tensors wherever it is made: inside torch.func even a slice would come out wrapped, and
# what is made in inference mode could not be saved for a derivative later.
@contextmanager
def plainly():
    """Where what is kept on a pattern is made."""
    with entrance, unseen_by_transforms(), torch.inference_mode(False):
        yield


class Orientation(NamedTuple):
    """Compressed rows of an index set: `order[k]` is the caller's position of the k-th stored entry."""

    pointers: Tensor
    indices: Tensor
    order: Tensor | None  # None: the caller's order is this order already


class SparsePattern:
    """The positions of the stored entries of a sparse matrix, without their values.

    Everything that depends on the positions alone (sorting, transposition) is done once, when it is first needed,
    and kept for as long as the pattern lives. So make one pattern and use it for many values.

    Args:
        indices: integer tensor of shape (2, nnz), row indices above column indices, in any order, without duplicates.
            It is copied, so that a later change of it does no harm.
        shape: (m, n), the number of rows and of columns.

    Raises:
        TypeError: `indices` is not an integer tensor.
        ValueError: a wrong shape, an index outside of `shape`, or a position that is given twice.

    Attributes:
        indices, shape: as given, int64 and a copy.
        nnz: number of stored entries.

    Cost: one sort of nnz integers.

    >>> import torch, functional_lstsq as fl
    >>> pattern = fl.SparsePattern(torch.tensor([[0, 2, 1], [0, 1, 0]]), (3, 2))
    >>> pattern
    SparsePattern(shape=(3, 2), nnz=3)
    >>> pattern.T.shape
    (2, 3)
    """

    indices: Tensor
    shape: tuple[int, int]
    nnz: int
    _other: SparsePattern | weakref.ReferenceType[SparsePattern]
    _repeated: tuple[int, Orientation] | None = None

    def __init__(self, indices: Tensor, shape: tuple[int, int]):
        if not isinstance(indices, Tensor):
            raise TypeError(f"indices must be an integer tensor of shape (2, nnz), got {type(indices).__name__}")
        if indices.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise TypeError(f"indices must be an integer tensor, got dtype {indices.dtype}")
        if indices.ndim != 2 or indices.shape[0] != 2:
            raise ValueError(f"indices must have shape (2, nnz), got {tuple(indices.shape)}")
        try:
            m, n = (operator.index(size) for size in shape)
        except (TypeError, ValueError):
            raise ValueError(f"shape must be a pair (rows, columns) of integers, got {shape!r}") from None
        if m < 0 or n < 0:
            raise ValueError(f"shape must not be negative, got {(m, n)}")
        if is_mapped(indices):
            raise ValueError("indices must be the same for the whole batch; a pattern cannot be vmapped")
        with plainly():
            rows, columns = concrete(indices).detach().to(torch.int64)
            self._fill(torch.stack([rows, columns, rows]), (m, n), flipped=False)
            self._check()
        transpose = object.__new__(SparsePattern)
        transpose._fill(self._buffer, (n, m), flipped=True)
        self._other = transpose
        transpose._other = weakref.ref(self)  # no cycle keeps a dead pattern alive

    def _fill(self, buffer: Tensor, shape: tuple[int, int], flipped: bool) -> None:
        # Rows, columns and rows again: the pattern and its transpose are both slices of this.
        self._buffer, self._flipped, self.shape = buffer, flipped, shape
        self._kept: dict[Hashable, Any] = {}
        self._related: dict[Hashable, Any] = {}
        self.name = new_name()  # a text, which a compiler takes for what is constant
        with plainly():
            self.indices = buffer[1:] if flipped else buffer[:2]
        self.nnz = self.indices.shape[1]
        _known[_key(self.indices, *shape)] = _named[self.name] = self

    def _check(self) -> None:
        if not self.nnz:
            return
        low, high = (bound.tolist() for bound in torch.aminmax(self.indices, dim=1))
        for name, lowest, highest, size in zip(("row", "column"), low, high, self.shape, strict=True):
            if lowest < 0 or highest >= size:
                wrong = lowest if lowest < 0 else highest
                raise ValueError(f"indices: {name} index {wrong} lies outside of shape {self.shape}")
        rows, columns, _ = self._sorted
        twice = (rows[1:] == rows[:-1]) & (columns[1:] == columns[:-1])
        if bool(twice.any()):
            k = int(twice.nonzero()[0])
            where = (int(rows[k]), int(columns[k]))
            raise ValueError(f"indices: position {where} is given more than once; add its values up beforehand")

    @property
    def device(self) -> torch.device:
        """Device of the indices, which is where values and right-hand sides must be too."""
        return self.indices.device

    @lazy
    def _sorted(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows and columns of the entries row by row, and their places in the caller's order: of memory for entries."""
        with plainly():
            return sort(self.indices[0], self.indices[1], self.shape)

    @lazy
    def rows(self) -> Orientation:
        """Compressed rows (CSR) of the pattern."""
        with plainly():
            rows, columns, order = self._sorted
            self.__dict__.pop("_sorted", None)  # is not needed any more
            boundaries = torch.arange(self.shape[0] + 1, device=rows.device, dtype=rows.dtype)
            pointers = torch.searchsorted(rows.contiguous(), boundaries)
            return Orientation(pointers.to(rows.dtype), columns.contiguous(), order)

    @lazy
    def columns(self) -> Orientation:
        """Compressed columns (CSC): the compressed rows of the transpose."""
        return self.T.rows

    @property
    def T(self) -> SparsePattern:
        """The pattern of the transpose; entries keep the caller's order. Free."""
        other = self._other() if isinstance(self._other, weakref.ref) else self._other
        if other is None:  # only the transpose was kept
            other = object.__new__(SparsePattern)
            other._fill(self._buffer, self.shape[::-1], flipped=not self._flipped)
            other._other = self
            self._other = weakref.ref(other)
        return other

    def repeated(self, copies: int) -> Orientation:
        """Compressed rows of the block-diagonal matrix with `copies` blocks on this pattern; the last one is kept."""
        one = self.rows
        if copies == 1:
            return one
        if self._repeated is None or self._repeated[0] != copies:
            largest = max(self.nnz, *self.shape) * copies
            dtype = torch.int32 if largest < 2**31 else torch.int64
            block = torch.arange(copies, device=self.device, dtype=dtype)[:, None]
            inner = one.pointers[1:].to(dtype) + block * self.nnz
            pointers = torch.cat([one.pointers[:1].to(dtype), inner.reshape(-1)])
            indices = (one.indices.to(dtype) + block * self.shape[1]).reshape(-1)
            self._repeated = copies, Orientation(pointers, indices, one.order)
        return self._repeated[1]

    def keep(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """What `make` gives, kept under `key` as long as the pattern lives: analyses that need no values."""
        if key not in self._kept:
            with plainly():
                self._kept[key] = make()
        return self._kept[key]

    def relate(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """As `keep`, for what depends on something else too, which `key` tells: the last 16 of these are kept."""
        found = self._related.get(key)
        if found is None:
            with plainly(), unseen_by_tracers():
                found = make()
            for old in list(self._related)[: 1 - _RELATED]:
                self._related.pop(old, None)
            self._related[key] = found
        return found

    def to(self, device: torch.device | str) -> SparsePattern:
        """This pattern on another device; itself when it is there already."""
        return self if torch.device(device) == self.device else SparsePattern(self.indices.to(device), self.shape)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, SparsePattern) or self.shape != other.shape or self.device != other.device:
            return False
        return self.nnz == other.nnz and torch.equal(self.indices, other.indices)

    def __hash__(self) -> int:
        return hash((SparsePattern, self.shape, self.nnz))

    def __repr__(self) -> str:
        device = "" if self.device.type == "cpu" else f", device='{self.device}'"
        return f"SparsePattern(shape={self.shape}, nnz={self.nnz}{device})"

    def __reduce__(self):
        return SparsePattern, (self.indices, self.shape)


# A compiled graph passes tensors and numbers only, so a kernel finds the pattern again from the memory of its indices.
# The entry is safe for as long as it exists: a living pattern owns that memory, so no other tensor can take its place.
_known: weakref.WeakValueDictionary[tuple, SparsePattern] = weakref.WeakValueDictionary()
_named: weakref.WeakValueDictionary[str, SparsePattern] = weakref.WeakValueDictionary()


def pattern_named(name: str) -> SparsePattern:
    """The living pattern of that name."""
    return _named[name]


class _Recalled:
    """Has as attributes, by their names, what compiled graphs have been made for, as long as the process lives."""


_recalled = _Recalled()


@constant
def _remember(make: Callable, *arguments: Hashable) -> str:
    made = make(*arguments)
    setattr(_recalled, made.name, made)
    return made.name


def recall(make: Callable, *arguments: Hashable) -> Any:
    """What `make` gives for texts and numbers, an object with a name, also where a compiler traces.

    That takes a text for a constant, and nothing that it could ask more of, so the object is found by its name.
    """
    return getattr(_recalled, _remember(make, *arguments)) if torch.compiler.is_compiling() else make(*arguments)


def _key(indices: Tensor, m: int, n: int) -> tuple:
    return indices.data_ptr(), indices.device, indices.shape[1], m, n


def find_pattern(indices: Tensor, m: int, n: int) -> SparsePattern:
    """The living pattern that owns `indices`, or a new one."""
    return _known.get(_key(indices, m, n)) or SparsePattern(indices, (m, n))


def sort(rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor | None]:
    m, n = shape
    # MKL works on int32 and converts int64 anew on every product.
    dtype = torch.int32 if max(m, n, rows.numel()) < 2**31 else torch.int64
    rows, columns = rows.to(dtype), columns.to(dtype)  # narrow keys sort faster too
    step, inner = rows.diff(), columns.diff()
    order = None
    if not bool(((step > 0) | ((step == 0) & (inner >= 0))).all()):
        # By columns, then by rows, each without disturbing what is equal; the transpose of sorted rows needs one sort.
        order = torch.sort(columns, stable=True).indices if not bool((inner >= 0).all()) else None
        rows, by_rows = torch.sort(rows if order is None else rows[order], stable=True)
        order = by_rows if order is None else order[by_rows]
        columns = columns[order]
    return rows, columns, order
