"""Matrices made of matrices, vectors or nothing: vstack, hstack, block_diag, eye, diags, by SciPy's names."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..torch_func.primitive import beside
from .algebra import prepare
from .matrix import DTYPES, SparseMatrix
from .merging import stacked
from .operator import LinearOperator
from .pattern import SparsePattern, recall


def vstack(blocks: Sequence[SparseMatrix | LinearOperator | Tensor]) -> Any:
    """Matrices below each other.

    The pattern is made once for the patterns of the blocks, and kept by the first (the last 16 results); entries are
    those of the first block, then those of the second, and so on. Differentiable by each to any order.

    Args:
        blocks: a list of SparseMatrix or torch sparse tensors with one number of columns, on one device; their dtypes
            are promoted. Batches of values are broadcast against each other. With a LinearOperator among them the
            result is one, of the dtype that all of these have.

    Raises:
        TypeError, ValueError: a block of another type or size, or no block.

    Source: `scipy.sparse.vstack`. A Tikhonov problem, min |A x - b|^2 + |lam L x|^2, is a stack:

    >>> import torch, functional_lstsq as fl
    >>> A = fl.SparseMatrix.from_dense(torch.tensor([[1.0, 2], [2, 4]]))  # without full rank
    >>> L, lam = fl.diags([[-1.0], [1.0]], offsets=[0, 1], shape=(1, 2)), 0.1
    >>> fl.lstsq(fl.vstack([A, lam * L]), torch.tensor([3.0, 6, 0.1]))
    tensor([0.3333, 1.3333], dtype=torch.float64)
    """
    return _stack("vstack", blocks, down=True, right=False)


def hstack(blocks: Sequence[SparseMatrix | LinearOperator | Tensor]) -> Any:
    """Matrices beside each other; otherwise as `vstack`.

    >>> import torch, functional_lstsq as fl
    >>> A = fl.eye(2)
    >>> fl.hstack([A, 3 * A]).to_dense()
    tensor([[1., 0., 3., 0.],
            [0., 1., 0., 3.]], dtype=torch.float64)
    """
    return _stack("hstack", blocks, down=False, right=True)


def block_diag(blocks: Sequence[SparseMatrix | LinearOperator | Tensor]) -> Any:
    """Matrices along the diagonal, of any shapes; otherwise as `vstack`.

    >>> import torch, functional_lstsq as fl
    >>> fl.block_diag([fl.eye(1), 2 * fl.eye(1, 2)]).to_dense()
    tensor([[1., 0., 0.],
            [0., 2., 0.]], dtype=torch.float64)
    """
    return _stack("block_diag", blocks, down=True, right=True)


def _stack(name: str, blocks: Any, *, down: bool, right: bool) -> Any:
    prepare()
    if not isinstance(blocks, (list, tuple)) or not blocks:
        got = "none" if isinstance(blocks, (list, tuple)) else type(blocks).__name__
        raise TypeError(f"{name} takes a list of matrices, at least one, got {got}")
    operators = [block for block in blocks if isinstance(block, LinearOperator)]
    if operators:
        others = [block if isinstance(block, LinearOperator) else _block(block, i) for i, block in enumerate(blocks)]
        return operators[0].stacked(others, down=down, right=right)
    matrices = [_block(block, i) for i, block in enumerate(blocks)]
    devices = sorted({str(A.device) for A in matrices})
    if len(devices) > 1:
        raise ValueError(f"blocks must be on one device, got {devices}")
    if not (down and right):
        axis, what = (1, "columns") if down else (0, "rows")
        sizes = [A.shape[axis] for A in matrices]
        if len(set(sizes)) > 1:
            raise ValueError(f"blocks of {name} must have one number of {what}, got {sizes}")
    dtype = matrices[0].dtype
    for A in matrices[1:]:
        dtype = torch.promote_types(dtype, A.dtype)
    batch = torch.broadcast_shapes(*(A.values.shape[:-1] for A in matrices))
    values = [A.values.to(dtype).expand(*batch, A.nnz) for A in matrices]
    pattern = recall(stacked, tuple([A.pattern.name for A in matrices]), down, right)
    return SparseMatrix(beside(values, -1), pattern)


def _block(block: Any, number: int) -> SparseMatrix:
    if isinstance(block, SparseMatrix):
        return block
    if isinstance(block, Tensor) and block.layout != torch.strided:
        return SparseMatrix.from_torch(block)
    got = "a dense tensor; see SparseMatrix.from_dense" if isinstance(block, Tensor) else type(block).__name__
    raise TypeError(f"blocks must be SparseMatrix or torch sparse tensors, got for number {number} {got}")


def _size(size: Any, name: str) -> int:
    try:
        size = operator.index(size)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {size!r}") from None
    if size < 0:
        raise ValueError(f"{name} must not be negative, got {size}")
    return size


def eye(
    m: int,
    n: int | None = None,
    *,
    k: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> SparseMatrix:
    """Ones on a diagonal, zeros elsewhere.

    Args:
        m, n: numbers of rows and columns; n is m if left out.
        k: which diagonal, above the main one for k > 0.
        dtype: float32, float64, complex64 or complex128.

    Raises:
        TypeError, ValueError: a size or dtype of another kind, a diagonal that is not there.

    Source: `scipy.sparse.eye_array`.

    >>> import torch, functional_lstsq as fl
    >>> fl.eye(2, 3, k=1).to_dense()
    tensor([[0., 1., 0.],
            [0., 0., 1.]], dtype=torch.float64)
    """
    m, n = _size(m, "m"), _size(m if n is None else n, "n")
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float32, float64, complex64 or complex128, got {dtype}")
    offset = operator.index(k)
    if _length(offset, (m, n)) <= 0 < min(m, n):
        raise ValueError(f"k = {offset} lies outside of shape {(m, n)}")
    pattern = recall(_diagonals, (offset,), (m, n), str(device))
    return SparseMatrix(torch.ones(pattern.nnz, dtype=dtype, device=device), pattern)


def _length(offset: int, shape: tuple[int, int]) -> int:
    """Of a diagonal; not positive where there is none."""
    m, n = shape
    return min(m + min(offset, 0), n - max(offset, 0))


def _diagonals(offsets: tuple[int, ...], shape: tuple[int, int], device: str) -> SparsePattern:
    """The living pattern of these diagonals, or a new one."""
    found = _living.get((offsets, shape, device))
    if found is None:
        found = _living[offsets, shape, device] = _new_diagonals(offsets, shape, device)
    return found


_living: weakref.WeakValueDictionary[tuple, SparsePattern] = weakref.WeakValueDictionary()


def _new_diagonals(offsets: tuple[int, ...], shape: tuple[int, int], device: str) -> SparsePattern:
    parts = []
    for offset in offsets:
        along = torch.arange(max(_length(offset, shape), 0), device=device)
        parts.append(torch.stack([along + max(-offset, 0), along + max(offset, 0)]))
    return SparsePattern(torch.cat(parts, 1), shape)


def diags(
    diagonals: Tensor | Sequence[Any], offsets: int | Sequence[int] = 0, shape: tuple[int, int] | None = None
) -> SparseMatrix:
    """A matrix of its diagonals, differentiable by them.

    Args:
        diagonals: one tensor of shape (k,), or a sequence of tensors or numbers in lists, one for each offset; those of
            length 1 are repeated where `shape` is given. Lists become float64, and dtypes are promoted.
        offsets: which diagonals, above the main one where positive.
        shape: (m, n); square and just large enough if left out.

    Raises:
        TypeError, ValueError: no diagonals, another number of them than of offsets, an offset that is given twice or
            lies outside of `shape`, a diagonal of another length.

    Source: `scipy.sparse.diags_array`.

    >>> import torch, functional_lstsq as fl
    >>> fl.diags([torch.tensor([1.0, 2.0]), torch.tensor([5.0])], offsets=[0, 1]).to_dense()
    tensor([[1., 5.],
            [0., 2.]])
    """
    if not isinstance(offsets, (list, tuple, range)):
        several = isinstance(diagonals, (list, tuple)) and any(
            not isinstance(d, (int, float, complex)) for d in diagonals
        )
        diagonals, offsets = diagonals if several else [diagonals], [offsets]  # type: ignore[list-item]
    numbers = [operator.index(offset) for offset in offsets]
    given = [d if isinstance(d, Tensor) else torch.from_numpy(np.atleast_1d(np.asarray(d))) for d in diagonals]
    given = [d if d.is_floating_point() or d.is_complex() else d.to(torch.float64) for d in given]
    if not given or len(given) != len(numbers):
        raise ValueError(f"diags needs one diagonal for each offset, got {len(given)} and {len(numbers)}")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"offsets must differ, got {numbers}")
    for d in given:
        if d.ndim != 1:
            raise ValueError(f"diagonals must have shape (k,), got {tuple(d.shape)}")
    if shape is None:
        size = len(given[0]) + abs(numbers[0])
        shape = (size, size)
    dtype = given[0].dtype
    for d in given[1:]:
        dtype = torch.promote_types(dtype, d.dtype)
    values = []
    for d, offset in zip(given, numbers, strict=True):
        length = _length(offset, shape)
        if length <= 0:
            raise ValueError(f"offset {offset} lies outside of shape {shape}")
        if len(d) not in (1, length):
            raise ValueError(f"the diagonal at offset {offset} must have {length} entries, got {len(d)}")
        values.append(d.to(dtype).expand(length))
    return SparseMatrix(beside(values, -1), recall(_diagonals, tuple(numbers), tuple(shape), str(given[0].device)))
