"""The augmented system of an operator that is known by its products: a primitive like `Solve`, with its four rules.

    VJP   K l = s_bar;  the parameters' part is the VJP of (A x, A l_x) for the cotangents -(l_r, r)
    JVP   K ds = dt - dK s,  dK s by the JVP of (A x, A^H r)

Both cost one further solve, as `augmented` tells; whatever is differentiated in products is left to torch.func.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from .holder import by_name
from .kernel import solve_plainly
from .operator import LinearOperator, Product
from .solvers.numerics import noise, power_of_two
from .solvers.system import EPS, System, norm, tolerance_of
from .transforms import Primitive, join_columns, join_matrices, of_some, split_columns, split_matrices

_LINEAR = 1e-8  # relative deviation of products from linear ones that is taken for rounding
_SLACK = 4  # rounding errors of a product, in units of |A| |x| eps


@dataclass(frozen=True)
class _Static:
    matvec: Product
    rmatvec: Product | None
    spec: Any
    m: int
    n: int
    dtype: torch.dtype
    wide: bool  # the user's operator is the adjoint of A
    settings: str
    on_failure: str

    def derivative(self) -> _Static:
        return self if self.on_failure == "raise" else replace(self, on_failure="nan")

    def product(self, leaves: list[Tensor] | tuple, X: Tensor, *, adjoint: bool) -> Tensor:
        """A X or A^H X of shape (P, rows, k), for leaves (P, ...)."""

        def one(leaves: list[Tensor], x: Tensor) -> Tensor:
            params = torch_pytree.tree_unflatten(leaves, self.spec)
            if adjoint == self.wide:
                return self.matvec(params, x)
            if self.rmatvec is not None:
                return self.rmatvec(params, x)
            given = x.new_zeros(self.m if self.wide else self.n)
            return torch.func.vjp(lambda y: self.matvec(params, y), given)[1](x)[0]

        def several(leaves: list[Tensor], X: Tensor) -> Tensor:
            if X.shape[1] == 1:
                return one(leaves, X[:, 0])[:, None]
            return torch.vmap(lambda x: one(leaves, x), 1, 1)(X)

        if X.shape[0] == 1:
            result = several([leaf[0] for leaf in leaves], X[0])[None]
        else:
            result = torch.vmap(several)(list(leaves), X)
        rows = self.n if adjoint else self.m
        if result.shape[1] != rows or result.dtype != self.dtype:
            name = "rmatvec" if adjoint != self.wide else "matvec"
            raise ValueError(
                f"{name} must give a tensor of {self.dtype}, shape ({rows},), for one of {self.dtype}, got "
                f"{result.dtype}, shape ({result.shape[1]},)"
            )
        return result


class SolveMatrixFree(Primitive):
    constants = (2, 3)

    @classmethod
    def forward(cls, static: _Static, damp, b, c, start, token, *leaves):
        given = b if b is not None else c
        like = torch.empty((given.shape[0], 0), dtype=static.dtype, device=given.device)
        wanted = by_name(static.settings)
        return solve_plainly(
            like,
            {"params": leaves},
            damp,
            b,
            c,
            start,
            token,
            static.m,
            static.n,
            wanted,
            static.on_failure,
            lambda: _MatrixFreeSystem(static, leaves, damp, wanted.precision, like),
        )

    @classmethod
    def vjp_rule(cls, static, inputs, outputs, cotangents, needed):
        damp, _, _, _, token, *leaves = inputs
        r, x, _, made = outputs
        r_bar, x_bar, _, _ = cotangents
        if r_bar is None and x_bar is None:
            return (None,) * len(inputs)
        token, static = made if token is None else token, static.derivative()
        l_r, l_x, _, _ = cls.apply(static, damp, r_bar, x_bar, None, token, *leaves)
        by_matvec = replace(static, rmatvec=None)  # which may be right without being differentiable
        bars: list[Tensor | None] = [None] * len(leaves)
        which = [i for i in range(len(leaves)) if needed[5 + i]]
        if which:
            both = torch.cat([x, l_x], 2)
            product, chosen = of_some(which, leaves, lambda *every: by_matvec.product(every, both, adjoint=False))
            pull: Any = torch.func.vjp(product, *chosen)[1]
            for i, bar in zip(which, pull(-torch.cat([l_r, r], 2)), strict=True):
                bars[i] = bar
        damp_bar = 2 * damp * (l_x.conj() * x).sum((1, 2)).real if needed[0] else None
        return damp_bar, l_r if needed[1] else None, l_x if needed[2] else None, None, None, *bars

    @classmethod
    def jvp_rule(cls, static, inputs, outputs, tangents):
        damp, _, _, _, token, *leaves = inputs
        r, x, _, made = outputs
        damp_dot, b_dot, c_dot, _, _, *leaves_dot = tangents
        token, static = made if token is None else token, static.derivative()
        by_matvec = replace(static, rmatvec=None)
        which = [i for i, tangent in enumerate(leaves_dot) if tangent is not None]
        if which:

            def products(*every: Tensor) -> tuple[Tensor, Tensor]:
                return by_matvec.product(every, x, adjoint=False), by_matvec.product(every, r, adjoint=True)

            moved, chosen = of_some(which, leaves, products)
            changes: Any = torch.func.jvp(moved, chosen, tuple(leaves_dot[i] for i in which))[1]
            of_x, of_r = changes
            b_dot = -of_x if b_dot is None else b_dot - of_x
            c_dot = -of_r if c_dot is None else c_dot - of_r
        if damp_dot is not None:
            shift = 2 * (damp * damp_dot)[:, None, None] * x
            c_dot = shift if c_dot is None else c_dot + shift
        if b_dot is None and c_dot is None:
            return torch.zeros_like(r), torch.zeros_like(x), None, None
        r_dot, x_dot, _, _ = cls.apply(static, damp, b_dot, c_dot, None, token, *leaves)
        return r_dot, x_dot, None, None

    @classmethod
    def vmap(cls, info, in_dims, static, damp, b, c, start, token, *leaves):
        _, of_damp, of_b, of_c, of_start, _, *of_leaves = in_dims
        size = info.batch_size
        if of_damp is None and all(dim is None for dim in of_leaves):
            columns = (join_columns(t, dim, size) for t, dim in ((b, of_b), (c, of_c), (start, of_start)))
            *outputs, token = cls.apply(static, damp, *columns, token, *leaves)
            return (*(split_columns(output, size) for output in outputs), token), (2, 2, 2, None)
        pairs = zip((damp, b, c, start), (of_damp, of_b, of_c, of_start), strict=True)
        joined = [join_matrices(t, dim, size) for t, dim in pairs]
        every = [join_matrices(t, dim, size) for t, dim in zip(leaves, of_leaves, strict=True)]
        *outputs, token = cls.apply(static, *joined, token, *every)
        return (*(split_matrices(output, size) for output in outputs), token), (0, 0, 0, None)


class _Products:
    """What solvers need of an `Operator`, by products alone, divided by `scale` (P, 1, 1)."""

    def __init__(self, static: _Static, leaves: tuple, scale: Tensor, like: Tensor):
        self.static, self.leaves, self.scale = static, leaves, scale
        self.copies, self.m, self.n = like.shape[0], static.m, static.n
        self.dtype, self.device = like.dtype, like.device

    def matmul(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        return self._given(self.static.product(self.leaves, X, adjoint=False), out)

    def adjoint(self, Y: Tensor, out: Tensor | None = None) -> Tensor:
        return self._given(self.static.product(self.leaves, Y, adjoint=True), out)

    def _given(self, product: Tensor, out: Tensor | None) -> Tensor:
        return torch.div(product, self.scale, out=out)


class _MatrixFreeSystem(System):
    """All columns scaled by one power of two, such that their norms are about 1 in the mean."""

    def __init__(self, static: _Static, leaves: tuple, damp: Tensor | None, precision: float, like: Tensor):
        self.precision, self.extended, self.exact = precision, False, False
        self.tolerance, self.accept = tolerance_of(precision, static.m, static.n), precision ** (1 / 3)
        self.m, self.n, self.copies, self.entries = static.m, static.n, like.shape[0], 0
        one = torch.ones((self.copies, 1, 1), dtype=torch.float64, device=like.device)
        v = noise(one.expand(-1, self.n, 4)).to(like.dtype)
        image = _Products(static, leaves, one, like).matmul(v)
        if not bool(image.isfinite().all()):
            raise ValueError("matvec must give finite numbers for finite x, got NaN or infinity")
        largest = image.abs().amax(1, keepdim=True).amax(2, keepdim=True)
        largest = torch.where(largest > 0, largest, 1.0)
        of_A = (norm(image / largest) / norm(v)).mean(1)[:, None, None] * largest  # about |A|_F / sqrt(n), for random v
        size = of_A if damp is None else torch.hypot(of_A, damp[:, None, None])
        size = torch.where(size > 0, size, 1.0)
        unit = power_of_two(torch.frexp(size).exponent)
        self.frobenius = self.n**0.5 * size[:, 0]
        self.size = self.n**0.5 * of_A[:, 0] / unit[:, 0]
        self.scale = unit.expand(-1, self.n, -1)
        self.lost = torch.zeros_like(size[:, :, 0], dtype=torch.bool)
        self.norms = (size / unit).expand(-1, self.n, -1)
        self.weight = torch.ones_like(self.scale)
        products = _Products(static, leaves, unit, like)
        self.A, self.unit = products, max(EPS, _deviation(products))  # type: ignore[assignment]
        self.damp = None if damp is None else (damp[:, None, None] / unit).expand(-1, self.n, -1)
        self.d2 = None if self.damp is None else self.damp.square()

    def rounding(self, b: Tensor, c: Tensor, r: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """As of `System`, where the entries are not known: their rounding errors are spread evenly."""
        even = self.size[:, None] * _SLACK
        first = self.unit * (b.abs() + r.abs() + even * (norm(y) / self.m**0.5)[:, None])
        second = self.unit * (c.abs() + self.damped(y.abs()) + even * (norm(r) / self.n**0.5)[:, None])
        first, second = (torch.cat([s, s], 2) for s in (first, second))
        return (first * noise(first)).to(b.dtype), (second * noise(second)).to(b.dtype)


def _deviation(products: _Products) -> float:
    """By how much, relatively, products fail to be linear and to be each other's adjoints, for random vectors.

    So much rounding errors, or a slightly wrong adjoint, may change every product. A function that is far from linear,
    or from the adjoint, has no least-squares solution that could be found.
    """

    def tried(multiply: Any, rows: int, name: str) -> tuple[Tensor, Tensor, float]:
        like = torch.empty((products.copies, rows, 2), dtype=torch.float64, device=products.device)
        u = noise(like, 1)
        if products.dtype.is_complex:
            u = torch.complex(u, noise(like, 2))
        u, w = u.split(1, 2)
        factor = 1j if products.dtype.is_complex else -1.0
        Au, Aw, both, many, turned = multiply(torch.cat([u, w, u + 3 * w, 1000 * u, factor * u], 2)).split(1, 2)
        size = torch.maximum(norm(Au), norm(Aw)).clamp_min(torch.finfo(torch.float64).tiny)
        off = torch.stack([norm(both - Au - 3 * Aw), norm(many - 1000 * Au) / 1000, norm(turned - factor * Au)])
        worst = float((off / size).max())
        if not worst <= _LINEAR:
            raise ValueError(
                f"{name} must be linear{' over complex numbers' if products.dtype.is_complex else ''}, got a relative "
                f"difference of {worst:.1e} between products of sums or multiples and sums or multiples of products"
            )
        return u, Au, worst

    wide = products.static.wide
    u, Au, first = tried(products.matmul, products.n, "rmatvec" if wide else "matvec")
    v, Av, second = tried(products.adjoint, products.m, "matvec" if wide else "rmatvec")
    apart = ((v.conj() * Au).sum((1, 2)) - (Av.conj() * u).sum((1, 2))).abs()
    size = (norm(v) * norm(Au) + norm(Av) * norm(u))[:, 0].clamp_min(torch.finfo(torch.float64).tiny)
    # Of a difference between the two, random vectors see a part in the root of their length.
    third = float((apart / size).max()) * max(products.m, products.n) ** 0.5
    if not third <= _LINEAR:
        raise ValueError(f"rmatvec must be the adjoint of matvec, got a relative difference of about {third:.1e}")
    return max(first, second, third)


def solve_matrix_free(
    A: LinearOperator, m: int, n: int, damp: Tensor | None, b: Tensor, start: Tensor | None, settings: str, how: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(r, x, report) of K (r, x) = (b, 0), or of K (r, x) = (0, b) with A^H for A where m < n; b is (1, m, k)."""
    leaves, spec = torch_pytree.tree_flatten(A.params)
    wide = m < n
    static = _Static(A.matvec, A.rmatvec, spec, max(m, n), min(m, n), A.dtype, wide, settings, how)
    right = (None, b) if wide else (b, None)
    return SolveMatrixFree.apply(static, damp, *right, start, None, *(leaf[None] for leaf in leaves))[:3]
