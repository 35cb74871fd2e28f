"""The products of an operator as solvers ask for them, tried on random vectors before all else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..sparse.base import COARSE, Products, Scaled, dot, norm
from ..sparse.numerics import ldexp, noise
from ..sparse.wrapped_products import in_precision
from .operator_static import OperatorStatic

# Relative deviation of products from linear ones, and of a pair from adjoint ones, that is taken for rounding: half the
# digits in double precision, and in single the three that sums of a million terms may lose.
_LINEAR, _LINEAR_SINGLE = 1e-8, 1e-4
_SAMPLES = 4  # random vectors whose products tell the largest singular value
_TINY = torch.finfo(torch.float64).tiny


class OperatorProducts(Products):
    """An operator of the user's, whose products are checked once columns have sizes of about 1."""

    name = "matvec"

    def __init__(self, static: OperatorStatic, leaves: Sequence[Tensor], like: Tensor):
        self.static, self.unit = static, static.unit
        self.leaves = [in_precision(leaf, static.working) for leaf in leaves]  # once, not for every product
        self.copies, self.m, self.n = like.shape[0], static.m, static.n
        self.dtype, self.device = like.dtype, like.device

    def matmul(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        product = self.product(X, adjoint=False)
        return product if out is None else out.copy_(product)

    def adjoint(self, Y: Tensor, out: Tensor | None = None) -> Tensor:
        product = self.product(Y, adjoint=True)
        return product if out is None else out.copy_(product)

    def product(self, X: Tensor, *, adjoint: bool) -> Tensor:
        if self.unit < COARSE or not X.shape[1]:
            return self.static.plainly(self.leaves, X, adjoint=adjoint)
        # Numbers that single precision may not hold, as late residuals are, are brought to sizes of about 1.
        exponents = torch.frexp(X.abs().amax(1, keepdim=True)).exponent
        found = self.static.plainly(self.leaves, ldexp(X, -exponents), adjoint=adjoint)
        return ldexp(found, exponents)

    def column_sizes(self, damp: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self.static.settings.stops:
            size, squares = super().column_sizes(damp)
            # The least norm is that of x, whose unknowns all have one scale.
            one = size.amax(1, keepdim=True).expand(-1, self.n) if self.static.settings.minimum_norm else size
            return one, squares
        # Where nothing is certified, no product is spent on sizes.
        ones = torch.ones((self.copies, self.n), dtype=torch.float64, device=self.device)
        return ones, ones

    def scaled(self, scale: Tensor) -> Products:
        return Scaled(self, columns=scale) if self.static.settings.stops else _Tried(self, scale)  # nor on trying it


class _Tried(Scaled):
    """Products whose columns have sizes of about 1, found to be linear and each other's adjoints."""

    def __init__(self, whole: OperatorProducts, scale: Tensor):
        super().__init__(whole, columns=scale)
        self.unit = max(whole.unit, _deviation(self, wide=whole.static.wide, single=whole.unit >= COARSE))
        # About the largest singular value: |A^H A v| / |A v|, the first step of a power iteration.
        like = torch.ones((), dtype=torch.float64, device=self.device).expand(self.copies, self.n, _SAMPLES)
        image = self.matmul(noise(like).to(self.dtype))
        back = norm(self.adjoint(image))
        self.steepest: Tensor = (back / self.norm(image).clamp_min(_TINY)).amax(1, keepdim=True)

    def absolute_matmul(self, X: Tensor) -> Tensor:
        return self.steepest[:, None] * (norm(X) / self.height**0.5)[:, None].expand(-1, self.m, -1)

    def absolute_adjoint(self, Y: Tensor) -> Tensor:
        return self.steepest[:, None] * (self.norm(Y) / self.n**0.5)[:, None].expand(-1, self.n, -1)


def _deviation(products: Products, *, wide: bool, single: bool) -> float:
    """By how much, relatively, products fail to be linear and to be each other's adjoints, for random vectors.

    So much rounding errors, or a slightly wrong adjoint, may change every product. A function that is far from linear,
    or from the adjoint, has no least-squares solution that could be found.
    """

    allowed = _LINEAR_SINGLE if single else _LINEAR

    def tried(multiply: Any, rows: int, norm: Any, name: str) -> tuple[Tensor, Tensor, float]:
        like = torch.empty((products.copies, rows, 2), dtype=torch.float64, device=products.device)
        u = noise(like, 1)
        if products.dtype.is_complex:
            u = torch.complex(u, noise(like, 2))
        u, w = u.split(1, 2)
        factor = 1j if products.dtype.is_complex else -1.0
        Au, Aw, both, many, turned = multiply(torch.cat([u, w, u + 3 * w, 1000 * u, factor * u], 2)).split(1, 2)
        size = torch.maximum(norm(Au), norm(Aw)).clamp_min(_TINY)
        off = torch.stack([norm(both - Au - 3 * Aw), norm(many - 1000 * Au) / 1000, norm(turned - factor * Au)])
        worst = float((off / size).max())
        if not worst <= allowed:
            hint = "; of products in single precision say so, by dtype=torch.float32" if worst < _LINEAR_SINGLE else ""
            raise ValueError(
                f"{name} must be linear{' over complex numbers' if products.dtype.is_complex else ''}, got a relative "
                f"difference of {worst:.1e} between products of sums or multiples and sums or multiples of products; "
                f"of an affine function take its value at 0 off, and off b too{hint}"
            )
        return u, Au, worst

    u, Au, first = tried(products.matmul, products.n, products.norm, "rmatvec" if wide else "matvec")
    v, Av, second = tried(products.adjoint, products.m, norm, "matvec" if wide else "rmatvec")
    apart = (products.dot(v, Au) - dot(Av, u)).abs()
    size = (products.norm(v) * products.norm(Au) + norm(Av) * norm(u)).clamp_min(_TINY)
    # Of a difference between the two, random vectors see a part in the root of their length.
    third = float((apart / size).max()) * max(products.height, products.n) ** 0.5
    if not third <= allowed:
        raise ValueError(
            f"rmatvec must be the adjoint of matvec, got a relative difference of about {third:.1e}; without rmatvec "
            "torch makes it; for an adjoint that is only nearly one, solver=CGLS(steps=...) stops early and certifies "
            "nothing"
        )
    return max(first, second, third)
