"""`weakest`: which combinations of unknowns the rows of A determine least."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .linear.arguments import check_numbers
from .linear.weakest import weakest_of
from .sparse.matrix import SparseMatrix, single
from .sparse.precision import convert
from .torch_func.tracing import beside_graph


class Weakest(NamedTuple):
    """The smallest singular values, ascending, and the right singular vectors that belong to them.

    Attributes:
        values: (k,), real.
        vectors: (n, k), orthonormal; column j is a combination x of unknowns with |A x| = values[j].
    """

    values: Tensor
    vectors: Tensor


def weakest(A: SparseMatrix | Tensor, k: int) -> Weakest:
    """The k smallest singular values of A and their right singular vectors: what the rows of A determine least.

    Vectors of values that are zero but for rounding (about eps |A| sqrt(m)) are a basis of the null space, if k is its
    dimension or more. For weights or other units of the unknowns, take `A.scale(rows=weights.sqrt(), columns=units)`.

    Args:
        A: (m, n) SparseMatrix or torch sparse tensor, m >= n. For a wide A take that of A.H, or the null space by
            `A.H.matmul(A)`.
        k: how many, from 1 to n.

    Returns:
        `Weakest(values, vectors)`, (k,) and (n, k), in the precision of A. Each vector's largest entry is positive.
        Differentiable by the values of A to third order, under every transformation of torch.func. Vectors of values
        that are equal (to 1e-7), zeros too, turn into each other at will: derivatives are those of their space, so of
        functions of it such as `V @ V.T`. A value of zero has a kink there; its derivative is given as zero. Where the
        last value is equal to the next one, vectors of this group have NaN for derivatives; take another k.

    Raises:
        TypeError, ValueError: an argument of another kind; a wide A; k out of range; NaN or infinity in A.
        ConvergenceError: the values lie too close to those behind them to be told apart.
        TooLarge: the sparse factor of A^H A would not fit into memory.
        NotImplementedError: derivatives beyond the third.

    Cost: one sparse factorisation and 5 to 30 solves with k + 8 columns; a derivative costs three times a few such
    solves, with the same factor. Not within torch.compile.

    Source: block inverse iteration (Parlett, The Symmetric Eigenvalue Problem, SIAM 1998); derivatives by the chord
    method at the solution, in `linear/weakest.py`.

    >>> import torch, functional_lstsq as fl
    >>> A = fl.SparseMatrix.from_dense(torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.5], [0.0, 0.0, 0.5]]).double())
    >>> values, vectors = fl.weakest(A, 2)
    >>> bool(values[0] < 1e-15), values[1]
    (True, tensor(0.6021, dtype=torch.float64))
    >>> (vectors[:2, 0] / vectors[0, 0]).round(decimals=4)  # the sum of two unknowns is known, their difference is not
    tensor([ 1., -1.], dtype=torch.float64)
    """
    return _weakest(A, k)


def _run(A: SparseMatrix | Tensor, k: int) -> Weakest:
    if isinstance(A, Tensor):
        A = SparseMatrix.from_torch(A)
    if not isinstance(A, SparseMatrix):
        raise TypeError(f"A must be a SparseMatrix or a torch sparse tensor, got {type(A).__name__}")
    single(A, "A")
    m, n = A.shape
    if m < n:
        raise ValueError(f"A must have at least as many rows as columns, got shape {A.shape}")
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an integer, got {k!r}")
    if not 1 <= k <= n:
        raise ValueError(f"k must lie between 1 and the number of columns, {n}, got {k}")
    check_numbers("A", A.values)
    values = convert(A.values, torch.promote_types(A.dtype, torch.float64), "the derivative by A")
    sigma, V = weakest_of(values[None], A.pattern.indices, m, n, k)
    real = A.values.real.dtype if A.dtype.is_complex else A.dtype
    what = "the derivative of singular values and vectors"
    return Weakest(convert(sigma[0], real, what), convert(V[0], A.dtype, what))


_weakest: Any = beside_graph(_run, "torch.compile cannot take weakest; compile what makes its argument")
