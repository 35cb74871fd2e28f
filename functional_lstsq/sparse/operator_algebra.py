"""What LinearOperator has of arithmetic: sums, products, multiples, adjoints and stacks, with matrices among them.

Each result is an operator whose params are those of its parts, so it is differentiated by all of them. Its adjoint is
made of theirs where each part gives one, and by torch.func.vjp elsewhere.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .matrix import SparseMatrix

Product = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Sum:
    """x -> sum of each part's product; params are a tuple, one for each part, as everywhere here.

    Each part may overwrite its x, and the buffer that it gave before.
    """

    parts: tuple[Product, ...]

    def __call__(self, params: Any, x: Tensor) -> Tensor:
        terms = [part(own, x.clone()).clone() for part, own in zip(self.parts, params, strict=True)]
        return sum(terms[1:], terms[0])


@dataclass(frozen=True)
class Chain:
    """x -> the product of the first part with that of the second, or in `backward` order."""

    parts: tuple[Product, ...]
    backward: bool = False

    def __call__(self, params: Any, x: Tensor) -> Tensor:
        steps = list(zip(self.parts, params, strict=True))
        for part, own in steps if self.backward else steps[::-1]:
            x = part(own, x)
        return x


@dataclass(frozen=True)
class Stack:
    """Parts along the diagonal; all get the whole of x where `cuts` is None, and results are added up for not `apart`.

    Attributes:
        cuts: sizes of the parts of x.
    """

    parts: tuple[Product, ...]
    cuts: tuple[int, ...] | None
    apart: bool

    def __call__(self, params: Any, x: Tensor) -> Tensor:
        pieces = [x] * len(self.parts) if self.cuts is None else x.split(list(self.cuts))
        found = [part(own, piece.clone()).clone() for part, own, piece in zip(self.parts, params, pieces, strict=True)]
        return torch.cat(found) if self.apart else sum(found[1:], found[0])


@dataclass(frozen=True)
class Scaled:
    """x -> s A x, or conj(s) A x, for params (those of A, s)."""

    part: Product
    conjugate: bool = False

    def __call__(self, params: Any, x: Tensor) -> Tensor:
        own, factor = params
        return (factor.conj() if self.conjugate else factor).to(x.dtype) * self.part(own, x)


@dataclass(frozen=True)
class Conjugated:
    """x -> conj(A conj(x))."""

    part: Product

    def __call__(self, params: Any, x: Tensor) -> Tensor:
        return self.part(params, x.conj()).conj()


@dataclass(frozen=True)
class Pulled:
    """y -> A^H y, by torch.func.vjp."""

    part: Product
    size: int

    def __call__(self, params: Any, y: Tensor) -> Tensor:
        origin = torch.zeros(self.size, dtype=y.dtype, device=y.device)
        return torch.func.vjp(lambda x: self.part(params, x.clone()), origin)[1](y)[0]


def _of_matrix(A: SparseMatrix, x: Tensor) -> Tensor:
    return A.matmul(x)


def _of_adjoint(A: SparseMatrix, y: Tensor) -> Tensor:
    return A.H.matmul(y)


class OperatorAlgebra:
    """Of an operator with matvec, params, in_size, dtype and rmatvec."""

    __slots__ = ()
    __array_ufunc__ = None  # a number of NumPy leaves products to us
    matvec: Product
    params: Any
    in_size: int
    given: torch.dtype | None
    rmatvec: Product | None

    @classmethod
    def _made(
        cls, matvec: Product, params: Any, in_size: int, dtype: torch.dtype | None, rmatvec: Product | None
    ) -> Any:
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        raise NotImplementedError

    def matmul(self, X: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def H(self) -> Any:
        """The conjugate transpose. Cost: one product."""
        m, n = self.shape
        adjoint = self.rmatvec or Pulled(self.matvec, n)
        return self._made(adjoint, self.params, m, self.given, self.matvec)

    @property
    def T(self) -> Any:
        """The transpose. Cost: one product."""
        A = self.H
        return (
            A
            if not self.dtype.is_complex
            else A._made(Conjugated(A.matvec), A.params, A.in_size, A.given, Conjugated(A.rmatvec))
        )

    def __neg__(self) -> Any:
        return self * -1.0

    def __mul__(self, factor: Any) -> Any:
        """s A for a number or a tensor of shape (), by which it is differentiated too."""
        if isinstance(factor, Tensor) and factor.ndim:
            raise ValueError(f"s * A needs a number or a tensor s of shape (), got {tuple(factor.shape)}")
        if not isinstance(factor, (numbers.Number, Tensor)):
            return NotImplemented
        if not isinstance(factor, Tensor):
            kind = torch.complex128 if isinstance(factor, complex) else torch.float64
            factor = torch.tensor(factor, dtype=kind, device=self.device)
        if factor.is_complex() and not self.dtype.is_complex:
            raise ValueError(f"s * A needs a real s for an operator of {self.dtype}, got {factor.dtype}")
        adjoint = None if self.rmatvec is None else Scaled(self.rmatvec, conjugate=True)
        return self._in(self.dtype, self.given, Scaled(self.matvec), (self.params, factor), self.in_size, adjoint)

    def _in(self, dtype: torch.dtype, given: torch.dtype | None, *made: Any) -> Any:
        """An operator of `dtype`, which goes by its params, if none was `given` and they say so: a number does not."""
        matvec, params, in_size, rmatvec = made
        A = self._made(matvec, params, in_size, given, rmatvec)
        return A if A.dtype == dtype else self._made(matvec, params, in_size, dtype, rmatvec)

    __rmul__ = __mul__

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    def __truediv__(self, divisor: Any) -> Any:
        return self * (1 / cast(Any, divisor)) if isinstance(divisor, (numbers.Number, Tensor)) else NotImplemented

    def __add__(self, other: Any) -> Any:
        """A + B, of operators and matrices. Cost: one product of each, which tells the shapes."""
        if isinstance(other, numbers.Number) and other == 0:  # what sum() begins with
            return self
        return self._joined([self, other]) if _is_linear(other) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        if isinstance(other, numbers.Number) and other == 0:
            return self
        return self._joined([other, self]) if _is_linear(other) else NotImplemented

    def __sub__(self, other: Any) -> Any:
        return self + -_sparse(other) if _is_linear(other) else NotImplemented

    def __rsub__(self, other: Any) -> Any:
        return -self + other if _is_linear(other) else NotImplemented

    def __matmul__(self, other: Any) -> Any:
        """A X for a dense X of shape (n,) or (n, k); the operator A B for an operator or a sparse matrix B."""
        return self._chained([self, other]) if _is_linear(other) else self.matmul(other)

    def __rmatmul__(self, other: Any) -> Any:
        return self._chained([other, self]) if _is_linear(other) else NotImplemented

    def _joined(self, given: Sequence[Any]) -> Any:
        parts = self._parts(given)
        shapes = [part.shape for part in parts]
        if len(set(shapes)) > 1:
            raise ValueError(f"A + B needs operators of one shape, got {' and '.join(map(str, shapes))}")
        return self._of(parts, Sum, shapes[0][1])

    def _chained(self, given: Sequence[Any]) -> Any:
        parts = self._parts(given)
        (_, n), (rows, size) = (part.shape for part in parts)
        if n != rows:
            raise ValueError(f"A @ B needs as many rows of B as A has columns, got {rows} and {n}")
        return self._of(parts, Chain, size, lambda parts: Chain(parts, backward=True))

    def _parts(self, given: Sequence[Any]) -> list[Any]:
        """Operators and matrices as operators, of one dtype and device."""
        parts = [self._part(one) for one in given]
        dtypes = {part.dtype for part in parts if part.matvec is not _of_matrix}
        most = parts[0].dtype
        for part in parts[1:]:
            most = torch.promote_types(most, part.dtype)
        if dtypes != {most}:
            told = ", ".join(sorted({str(part.dtype) for part in parts}))
            raise ValueError(f"operators that are joined must have one dtype, that of the result, got {told}")
        devices = sorted({str(part.device) for part in parts})
        if len(devices) > 1:
            raise ValueError(f"operators that are joined must be on one device, got {devices}")
        return parts

    def _part(self, given: Any) -> Any:
        A = _sparse(given)
        if isinstance(A, OperatorAlgebra):
            return A
        return self._made(_of_matrix, A, A.shape[1], None, _of_adjoint)

    def _of(self, parts: list[Any], kind: Callable, in_size: int, adjoint: Callable | None = None) -> Any:
        """An operator made of parts: `kind` of their products, `adjoint` of their adjoints where all have one."""
        backward = [part.rmatvec for part in parts]
        rmatvec = None if None in backward else (adjoint or kind)(tuple(backward))
        dtype = next(part.dtype for part in parts if part.matvec is not _of_matrix)
        given = next((part.given for part in parts if part.given is not None), None)
        params = tuple(part.params for part in parts)
        return self._in(dtype, given, kind(tuple(part.matvec for part in parts)), params, in_size, rmatvec)

    def stacked(self, blocks: Sequence[Any], *, down: bool, right: bool) -> Any:
        """Operators and matrices below each other (`down`), beside each other (`right`), or along the diagonal."""
        parts = self._parts(blocks)
        shapes = [part.shape for part in parts]
        if not (down and right) and len({shape[1 if down else 0] for shape in shapes}) > 1:
            what = "columns" if down else "rows"
            raise ValueError(
                f"blocks must have one number of {what}, got {[shape[1 if down else 0] for shape in shapes]}"
            )
        rows, columns = (tuple(shape[axis] for shape in shapes) for axis in (0, 1))
        return self._of(
            parts,
            lambda parts: Stack(parts, columns if right else None, apart=down),
            sum(columns) if right else columns[0],
            lambda parts: Stack(parts, rows if down else None, apart=right),
        )


def _is_linear(thing: Any) -> bool:
    return isinstance(thing, (SparseMatrix, OperatorAlgebra)) or (
        isinstance(thing, Tensor) and thing.layout != torch.strided
    )


def _sparse(thing: Any) -> Any:
    """A torch sparse tensor as a SparseMatrix; anything else as it is."""
    return SparseMatrix.from_torch(thing) if isinstance(thing, Tensor) else thing
