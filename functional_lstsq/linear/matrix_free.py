"""The augmented system of an operator that is known by its products: a primitive like `Solve`, with its four rules.

    VJP   K l = s_bar;  the parameters' part is the VJP of (A x, A l_x) for the cotangents -(l_r, r)
    JVP   K ds = dt - dK s,  dK s by the JVP of (A x, A^H r)

Both cost one further solve, as `augmented` tells; whatever is differentiated in products is left to torch.func.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from ..result import Report
from ..solvers.system import System
from ..sparse.operator import LinearOperator
from ..torch_func.forward_mode import jvp
from ..torch_func.primitive import (
    Primitive,
    beside,
    define,
    differentiate,
    extent,
    join_columns,
    join_matrices,
    of_some,
    split_columns,
    split_matrices,
)
from ..torch_func.tracing import is_traced
from .factor_cache import no_token
from .gradient import without_idle
from .kernel import solve_plainly
from .operator_products import OperatorProducts
from .operator_static import OperatorStatic, operator_of, transformed
from .settings import Settings, settings_of


def solve_operator(static: OperatorStatic, damp, b, c, start, token, leaves) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(r, x, report, token), of plain tensors."""
    given = b if b is not None else c
    like = torch.empty((given.shape[0], 0), dtype=static.dtype, device=given.device)
    if not given.shape[0]:  # of an empty batch
        return _solve_fake(given, leaves, damp, b, c, start, token, static, static.on_failure)
    r, _, x, report, token = solve_plainly(
        like,
        {"params": tuple(leaves)},
        None,
        damp,
        b,
        None,
        c,
        start,
        token,
        static.m,
        static.n,
        static.settings,
        static.on_failure,
        lambda: System(
            OperatorProducts(static, leaves, like), damp, static.settings.precision, tolerance=static.settings.tolerance
        ),
    )
    return r, x, report, token


def _solve_fake(like, leaves, damp, b, c, start, token, products, on_failure):
    static = operator_of(products) if isinstance(products, str) else products
    copies, _, k = like.shape
    r, x = (like.new_empty((copies, size, k), dtype=static.dtype) for size in (static.m, static.n))
    report = like.new_empty(Report.shape(copies, k), dtype=torch.float64)
    return r, x, report, no_token()


def _solve_kernel(like, leaves, damp, b, c, start, token, products, on_failure):
    return solve_operator(
        replace(operator_of(products), on_failure=on_failure), damp, b, c, start, token, tuple(leaves)
    )


_solve_by_products = define(
    "solve_by_products(Tensor like, Tensor[] leaves, Tensor? damp, Tensor? b, Tensor? c, Tensor? known, Tensor? token, "
    "str products, str on_failure) -> (Tensor, Tensor, Tensor, Tensor)",
    _solve_kernel,
    _solve_fake,
)


class SolveMatrixFree(Primitive):
    constants = (2, 3)

    @classmethod
    def forward(cls, static: OperatorStatic, damp, b, c, start, token, *leaves):
        like = b if b is not None else c
        if any(is_traced(t) for t in (like, *leaves)):
            return _solve_by_products(like, list(leaves), damp, b, c, start, token, static.text, static.on_failure)
        return solve_operator(static, damp, b, c, start, token, leaves)

    @classmethod
    def vjp_rule(cls, static, inputs, outputs, cotangents, needed):
        damp, _, c, _, token, *leaves = inputs
        r, x, _, new_token = outputs
        r_bar, x_bar, _, _ = cotangents
        if r_bar is None and x_bar is None:
            return (None,) * len(inputs)
        token, static = new_token if token is None else token, static.derivative()
        l_r, l_x, _, _ = cls.apply(static, damp, r_bar, x_bar, None, token, *leaves)
        r, x = without_idle(static, (r, x), (l_r, l_x))
        by_matvec = replace(static, rmatvec=None)  # which may be right without being differentiable
        bars: list[Tensor | None] = [None] * len(leaves)
        which = [i for i in range(len(leaves)) if needed[5 + i]]
        if which:
            both, bar = beside([x, l_x], 2), -beside([l_r, r], 2)
            if static.settings.minimum_norm:
                # As `augmented` has it: u_s (N s_bar)_x^H + v_s (N t)_x^H
                pairs = [(x, (x_bar, (l_r, l_x))), *([] if c is None else [(l_x, (c, (r, x)))])]
                for given, (asked, solved) in pairs:
                    u_r = cls.apply(static, damp, None, given, None, token, *leaves)[0]
                    both = beside([both, _outside(by_matvec, leaves, damp, asked, *solved)], 2)
                    bar = beside([bar, u_r], 2)
            product, chosen = of_some(which, leaves, lambda *every: by_matvec.product(every, both, adjoint=False))
            with transformed():
                pull: Any = torch.func.vjp(product, *chosen)[1]
                found = pull(bar)
            for i, bar in zip(which, found, strict=True):
                bars[i] = bar
        damp_bar = None
        if needed[0]:
            of_each = (l_x.conj() * x).sum(2).real
            damp_bar = 2 * damp * (of_each if damp.shape[1] > 1 else of_each.sum(1, keepdim=True))
        return damp_bar, l_r if needed[1] else None, l_x if needed[2] else None, None, None, *bars

    @classmethod
    def jvp_rule(cls, static, inputs, outputs, tangents):
        damp, _, c, _, token, *leaves = inputs
        r, x, _, new_token = outputs
        damp_dot, b_dot, c_dot, _, _, *leaves_dot = tangents
        token, static = new_token if token is None else token, static.derivative()
        by_matvec = replace(static, rmatvec=None)
        which, beyond, k = [i for i, tangent in enumerate(leaves_dot) if tangent is not None], None, x.shape[2]
        if which:
            of_A, of_adjoint = [x], [r]
            if static.settings.minimum_norm:
                of_adjoint.append(cls.apply(static, damp, None, x, None, token, *leaves)[0])  # u_s
                if c is not None:
                    of_A.append(_outside(by_matvec, leaves, damp, c, r, x))  # (N t)_x

            def products(*every: Tensor) -> tuple[Tensor, Tensor]:
                forward = by_matvec.product(every, beside(of_A, 2), adjoint=False)
                return forward, by_matvec.product(every, beside(of_adjoint, 2), adjoint=True)

            moved, chosen = of_some(which, leaves, products)
            with transformed():
                changes: Any = jvp(moved, chosen, tuple(leaves_dot[i] for i in which))[1]
            (of_x, *lost), (of_r, *beyond) = (part.split(k, 2) for part in changes)
            if lost:
                of_r = of_r - cls.apply(static, damp, lost[0], None, None, token, *leaves)[1]  # w_x
            b_dot = -of_x if b_dot is None else b_dot - of_x
            c_dot = -of_r if c_dot is None else c_dot - of_r
        if damp_dot is not None:
            shift = 2 * (damp * damp_dot)[:, :, None] * x
            c_dot = shift if c_dot is None else c_dot + shift
        if b_dot is None and c_dot is None:
            return torch.zeros_like(r), torch.zeros_like(x), None, None
        r_dot, x_dot, _, _ = cls.apply(static, damp, b_dot, c_dot, None, token, *leaves)
        if beyond:
            solved = cls.apply(static, damp, None, beyond[0], None, token, *leaves)[:2]
            x_dot = x_dot + _outside(by_matvec, leaves, damp, beyond[0], *solved)
        return r_dot, x_dot, None, None

    @classmethod
    def vmap(cls, info, in_dims, static, damp, b, c, start, token, *leaves):
        _, of_damp, of_b, of_c, of_start, _, *of_leaves = in_dims
        size = info.batch_size
        if of_damp is None and all(dim is None for dim in of_leaves):
            columns = (join_columns(t, dim, size) for t, dim in ((b, of_b), (c, of_c), (start, of_start)))
            *outputs, token = cls.apply(static, damp, *columns, token, *leaves)
            k = extent((b, c), (of_b, of_c), 2)
            return (*(split_columns(output, size, k) for output in outputs), token), (0, 0, 0, None)
        pairs = zip((damp, b, c, start), (of_damp, of_b, of_c, of_start), strict=True)
        joined = [join_matrices(t, dim, size) for t, dim in pairs]
        every = [join_matrices(t, dim, size) for t, dim in zip(leaves, of_leaves, strict=True)]
        *outputs, token = cls.apply(static, *joined, token, *every)
        copies = extent((b, c), (of_b, of_c), 0)
        return (*(split_matrices(output, size, copies) for output in outputs), token), (0, 0, 0, None)


differentiate(
    _solve_by_products,
    lambda like, leaves, damp, b, c, known, token, products, on_failure: SolveMatrixFree.apply(
        replace(operator_of(products), on_failure=on_failure), damp, b, c, known, token, *leaves
    ),
)


def _outside(
    static: OperatorStatic, leaves: Any, damp: Tensor | None, c: Tensor | None, r: Tensor, x: Tensor
) -> Tensor:
    """(N t)_x = c - A^H r + d^2 x, the part of c that A does not reach."""
    left = -static.product(leaves, r, adjoint=True)
    left = left if c is None else left + c
    return left if damp is None else left + damp.square()[:, :, None] * x


def solve_matrix_free(
    A: LinearOperator,
    m: int,
    n: int,
    wide: bool,
    damp: Tensor | None,
    b: Tensor,
    start: Tensor | None,
    settings: Settings | str,
    how: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(r, x, report) of K (r, x) = (b, 0), or of K (r, x) = (0, b) with A^H for A where it is wide; b is (1, m, k)."""
    leaves, spec = torch_pytree.tree_flatten(A.params)
    rows, columns = (n, m) if wide else (m, n)
    static = OperatorStatic(
        A.matvec, A.rmatvec, spec, rows, columns, A.dtype, wide, A.working, settings_of(settings), how
    )
    right = (None, b) if wide else (b, None)
    return SolveMatrixFree.apply(static, damp, *right, start, None, *(leaf[None] for leaf in leaves))[:3]
