"""LinearOperator(matvec, params, in_size, dtype): a matrix known by its products, differentiable by its parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, cast

import optree
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from ..torch_func.closures import close, columns
from .matrix import DTYPES
from .operator_algebra import OperatorAlgebra, Product, Pulled
from .precision import double
from .trees import TreeShape
from .wrapped_products import InPrecision, OfTrees, Weighted, WeightedAdjoint


class LinearOperator(OperatorAlgebra):
    """A linear map x -> matvec(params, x) for `lstsq` and `solve`, which need its products only.

    A pytree for torch.func and optree with the leaves of `params` for leaves: `torch.func.grad(loss)(operator)` is a
    LinearOperator whose params are the gradient. Sums, products, multiples, adjoints (`A.H`, `A.T`) and stacks
    (`vstack`) of operators and sparse matrices are operators.

    Args:
        matvec: `matvec(params, x)`, linear in x of shape (n,), gives (m,). x is its own to overwrite. Columns and
            batches are made of it by `torch.vmap`, or one after the other where torch.func cannot transform it: with
            NumPy, C or a sparse tensor in it (which take the place of no SparseMatrix, whose `A.matmul(x)` it can).
        params: any pytree of dense tensors, which derivatives are taken by where they are floating or complex; that
            takes a matvec that torch.func can transform.
        in_size: n; or a pytree of tensors such as an x, whose dtypes do not matter: an image, several unknowns by their
            names. Then matvec takes and gives pytrees, and so do `lstsq` and `solve`: b, weights, the residual and what
            rmatvec takes are as what matvec gives, x, x0 and a damp for each unknown as the x that it takes. `.H`, sums
            and products are those of vectors, all leaves one after the other. Cost: one product.
        dtype: of the matrix: float32, float64, complex64 or complex128. Products are given x and params in this
            precision (real and imaginary parts apart, where it is real and b complex), are tested to what its rounding
            allows, and decide what is accepted of a solution. None: that of params and b together, which for both in
            float32 is float32. All else of a solve is in double precision.
        rmatvec: `rmatvec(params, y)`, the adjoint, A^H y of shape (n,); None to have torch make it of matvec.

    Raises:
        TypeError, ValueError: an argument of the wrong type or size. A solve raises ValueError where products of random
            vectors are not linear, not each other's adjoints, or depend on other tensors that are being differentiated.

    Estimated errors are those of x and of the adjoint solution; that a gradient by params keeps its digits where its
    terms cancel is not judged.

    `torch.compile(fullgraph=True)` takes a matvec that is torch code on params and x alone, without a closure; an error
    tells where it gives other numbers than when the graph was made. Without `fullgraph`, solves run beside the graph.

    >>> import torch, functional_lstsq as fl
    >>> def blur(kernel, x):
    ...     return torch.nn.functional.conv1d(x[None, None], kernel[None, None], padding=2)[0, 0]
    >>> operator = fl.LinearOperator(blur, torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64), 6)
    >>> operator
    LinearOperator(shape=(8, 6), dtype=torch.float64)
    >>> b = operator @ torch.arange(1.0, 7.0, dtype=torch.float64)
    >>> fl.lstsq(operator, b)
    tensor([1.0000, 2.0000, 3.0000, 4.0000, 5.0000, 6.0000], dtype=torch.float64)
    >>> torch.func.grad(lambda operator: fl.lstsq(operator, b).sum())(operator).params
    tensor([-19.7143, -22.0000, -20.2857], dtype=torch.float64)
    """

    __slots__ = ("given", "in_size", "matvec", "params", "rmatvec", "trees", "working")
    matvec: Product
    params: Any
    in_size: int
    given: torch.dtype | None  # None to go by params and b
    working: torch.dtype  # what products are made in, of one that is posed
    rmatvec: Product | None
    trees: tuple[TreeShape, TreeShape] | None  # those of x and b, where they are pytrees and the products wrapped

    def __init__(
        self,
        matvec: Product,
        params: Any,
        in_size: Any,
        dtype: torch.dtype | None = None,
        *,
        rmatvec: Product | None = None,
    ):
        for name, function in (("matvec", matvec), ("rmatvec", rmatvec)):
            if not callable(function) and not (name == "rmatvec" and function is None):
                raise TypeError(f"{name} must be callable, got {function!r}")
        examples = None if isinstance(in_size, int) else torch_pytree.tree_leaves(in_size)
        if isinstance(in_size, bool) or (examples is not None and not (examples and all(map(_is_dense, examples)))):
            raise TypeError(f"in_size must be an integer or a pytree of dense tensors, got {in_size!r}")
        if examples is None and in_size < 0:
            raise ValueError(f"in_size must not be negative, got {in_size}")
        if dtype is not None and dtype not in DTYPES:
            raise TypeError(f"dtype must be None, float32, float64, complex64 or complex128, got {dtype}")
        leaves = torch_pytree.tree_leaves(params)
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(f"params must be a pytree of tensors, got a leaf of type {type(leaf).__name__}")
            if leaf.layout != torch.strided:
                raise TypeError(
                    f"params must be a pytree of dense tensors, got layout {leaf.layout}; SparseMatrix.from_torch(A) "
                    "is a pytree of them, and has A.matmul(x)"
                )
        if len({leaf.device for leaf in leaves}) > 1:
            raise ValueError(f"params must be on one device, got {sorted({str(leaf.device) for leaf in leaves})}")
        self.params, self.given, self.trees = params, dtype, None
        if examples is not None:
            matvec, in_size, rmatvec = self._in_vectors(matvec, TreeShape.of(in_size), rmatvec)
        self.matvec, self.in_size, self.rmatvec = matvec, in_size, rmatvec

    def _in_vectors(
        self, matvec: Product, of_x: TreeShape, rmatvec: Product | None
    ) -> tuple[Product, int, Product | None]:
        """(matvec, n, rmatvec) of vectors, for products of pytrees."""
        x = of_x.tree(torch.zeros(of_x.size, dtype=self.dtype, device=self.device))
        y = matvec(self.params, x)
        if not torch_pytree.tree_leaves(y) or not all(map(_is_dense, torch_pytree.tree_leaves(y))):
            raise TypeError(f"matvec must give a pytree of dense tensors, got {y!r}")
        of_b = TreeShape.of(y)
        self.trees = of_x, of_b
        back = None if rmatvec is None else OfTrees(rmatvec, "rmatvec", of_b, of_x)
        return OfTrees(matvec, "matvec", of_x, of_b), of_x.size, back

    @property
    def of_vectors(self) -> LinearOperator:
        """The same map of vectors, where x and b are pytrees."""
        return LinearOperator(self.matvec, self.params, self.in_size, self.given, rmatvec=self.rmatvec)

    @property
    def dtype(self) -> torch.dtype:
        """What was given, or that of the parameters together; float64 where these hold no real or complex numbers."""
        if self.given is not None:
            return self.given
        found = [leaf.dtype for leaf in torch_pytree.tree_leaves(self.params)]
        found = [dtype for dtype in found if dtype.is_floating_point or dtype.is_complex]
        return reduce(torch.promote_types, found) if found else torch.float64

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        leaves = torch_pytree.tree_leaves(self.params)
        return leaves[0].device if leaves else torch.device("cpu")

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n). Cost: one product."""
        origin = torch.zeros(self.in_size, dtype=self.dtype, device=self.device)
        return InPrecision(self.matvec, "matvec", self.dtype)(self.params, origin).shape[0], self.in_size

    def posed(self, dtype: torch.dtype, on_failure: str) -> tuple[LinearOperator, tuple[int, int]]:
        """(the same for double precision, with products that hold no wrapped tensors, its shape). Cost: one of each.

        What products take from elsewhere than `params` is out of sight of the rules that differentiate a solve. They
        are given, and give, what `dtype` is in double precision, and work in the precision of this operator.

        Args:
            dtype: that of the operator and of b together.
            on_failure: as of `convert`.
        """
        params = torch_pytree.tree_map(lambda leaf: double(leaf, "the derivative by params", on_failure), self.params)
        working = dtype if self.given is None else self.given
        working = working.to_complex() if dtype.is_complex else working
        doubled = torch.promote_types(dtype, torch.float64)
        # A real map takes complex numbers by their parts, unless its function takes them whole, which it may of real
        # params too; tracers, which compute nothing, do not see whether it can.
        ways = [False] if not dtype.is_complex or self.dtype.is_complex else [False, True]
        ways = ways if self.given is None and not torch.compiler.is_compiling() else ways[-1:]

        def closed(function: Product, name: str, size: int) -> tuple[Product, Tensor]:
            example, refusals = torch.zeros(size, dtype=doubled, device=self.device), []
            for apart in ways:
                try:
                    return close(InPrecision(function, name, working, apart), name, "params", params, example)
                except Exception as error:
                    refusals.append(error)
            raise refusals[0]

        matvec, y = closed(self.matvec, "matvec", self.in_size)
        rmatvec = None if self.rmatvec is None else closed(self.rmatvec, "rmatvec", y.shape[0])[0]
        posed = LinearOperator(matvec, params, self.in_size, doubled, rmatvec=rmatvec)
        posed.working = working
        return posed, (y.shape[0], self.in_size)

    def matmul(self, X: Tensor) -> Tensor:
        """A X for X of shape (n,) or (n, k), or a pytree where x is one."""
        if self.trees is not None and self.trees[0].fits(X):
            return self.trees[1].tree(self.of_vectors.matmul(self.trees[0].vector(X, "x")))
        if not isinstance(X, Tensor) or X.ndim not in (1, 2) or X.shape[0] != self.in_size:
            got = f"shape {tuple(X.shape)}" if isinstance(X, Tensor) else type(X).__name__
            raise ValueError(f"A @ X needs X of shape ({self.in_size},) or ({self.in_size}, k), got {got}")
        return self._each(lambda x: self.matvec(self.params, x), X)

    def _each(self, function: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
        """`function`, which may overwrite its argument, of X or of each column."""
        if X.is_complex() and not self.dtype.is_complex:
            return self._each(function, X.real) + 1j * self._each(function, X.imag)
        X = X.to(self.dtype)
        return function(X.clone()) if X.ndim == 1 else columns(lambda x: function(x.clone()), X)

    @classmethod
    def _made(
        cls, matvec: Product, params: Any, in_size: int, dtype: torch.dtype | None, rmatvec: Product | None
    ) -> Any:
        if torch.compiler.is_dynamo_compiling():
            raise TypeError(
                "torch.compile cannot make sums, products, adjoints and stacks of operators: make them outside of it, "
                "and hand them over"
            )
        return LinearOperator(matvec, params, in_size, dtype, rmatvec=rmatvec)

    def adjoint(self, Y: Tensor) -> Tensor:
        """A^H Y for Y of shape (m,) or (m, k), or a pytree where b is one."""
        if self.trees is not None and self.trees[1].fits(Y):
            return self.trees[0].tree(self.of_vectors.adjoint(self.trees[1].vector(Y, "b")))
        rmatvec = self.rmatvec or Pulled(self.matvec, self.in_size)
        return self._each(lambda y: rmatvec(self.params, y), Y)

    def weighted(self, root: Tensor) -> LinearOperator:
        """diag(root) A of a posed A, of which `root` (m,) is a parameter too."""
        adjoint = None if self.rmatvec is None else WeightedAdjoint(self.rmatvec)
        posed = LinearOperator(Weighted(self.matvec), (self.params, root), self.in_size, self.dtype, rmatvec=adjoint)
        posed.working = self.working
        return posed

    def __repr__(self) -> str:
        try:
            return f"LinearOperator(shape={self.shape}, dtype={self.dtype})"
        except Exception:  # a pytree's leaf may be anything
            return f"LinearOperator(params={self.params!r}, in_size={self.in_size}, dtype={self.given})"


def _is_dense(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided


def _flatten(A: LinearOperator) -> tuple[list, tuple]:
    return [A.params], (A.matvec, A.in_size, A.given, A.rmatvec, A.trees)


def _unflatten(leaves: Any, context: tuple) -> LinearOperator:
    A = object.__new__(LinearOperator)  # no checks: a pytree holds axes, None or any other object in place of a leaf
    (A.params,) = leaves
    A.matvec, A.in_size, A.given, A.rmatvec, A.trees = context
    return A


def register(kind: type) -> None:
    """Make a kind of operator a pytree for torch.func and optree."""
    torch_pytree.register_pytree_node(kind, _flatten, _unflatten)
    cast(Any, optree.register_pytree_node)(
        kind,
        lambda A: ((A.params,), _flatten(A)[1], ("params",)),
        lambda context, leaves: _unflatten(leaves, context),
        namespace=optree.registry.__GLOBAL_NAMESPACE,
    )


register(LinearOperator)
