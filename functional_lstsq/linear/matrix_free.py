"""The augmented system of an operator that is known by its products: a primitive like `Solve`, with its four rules.

    VJP   K l = s_bar;  the parameters' part is the VJP of (A x, A l_x) for the cotangents -(l_s, s)
    JVP   K ds = dt - dK s,  dK s by the JVP of (A x, A^H s)

Weights are in the system, as there, so that one of zero has an ordinary derivative. Both cost one further solve, as
`augmented` tells; whatever is differentiated in products is left to torch.func.
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
from ..sparse.wrapped_products import Weighted, WeightedAdjoint
from ..torch_func.cores import shared_cores
from ..torch_func.forward_mode import jvp
from ..torch_func.operations import define, differentiate
from ..torch_func.primitive import (
    Primitive,
    beside,
    extent,
    join_columns,
    join_matrices,
    of_some,
    split_columns,
    split_matrices,
)
from ..torch_func.tracing import is_traced
from .factor_cache import no_token
from .gradient import multiplier, without_idle
from .kernel import solve_plainly
from .operator_products import OperatorProducts
from .operator_static import OperatorStatic, operator_of, transformed
from .settings import Settings, settings_of


def solve_operator(
    static: OperatorStatic, damp, weights, b, e, c, start, token, leaves, products: Any = OperatorProducts
) -> tuple[Tensor, ...]:
    """(r, s, x, report, token), of plain tensors; s is left empty where there are no weights.

    With weights x is that of W^(1/2) A, for W^(1/2) b and c - A^H e.
    """
    given = next(t for t in (b, e, c) if t is not None)
    if not given.shape[0]:  # of an empty batch
        return _solve_fake(given, leaves, damp, weights, b, e, c, start, token, static, static.on_failure)
    if weights is None:
        return _solve(static, damp, b, c, start, token, tuple(leaves), products)
    root = weights.sqrt()
    if e is not None:
        turned = static.total(static.plainly(leaves, e, adjoint=True))
        c = -turned if c is None else c - turned
    right, every = None if b is None else root[:, :, None] * b, (*leaves, root)
    r, _, x, report, token = _solve(weighted(static), damp, right, c, start, token, every, products)
    s, image = root[:, :, None] * r, static.plainly(leaves, x, adjoint=False)
    return -image if b is None else b - image, s if e is None else s + e, x, report, token


def _solve(static: OperatorStatic, damp, b, c, start, token, leaves: tuple, products: Any) -> tuple[Tensor, ...]:
    """As `solve_operator`, without weights."""
    given = b if b is not None else c
    like = torch.empty((given.shape[0], 0), dtype=static.dtype, device=given.device)
    unit, tolerance = static.settings.precision, static.settings.tolerance
    of_operator = static.m, static.n, static.settings, static.on_failure
    with shared_cores:
        return solve_plainly(
            like, {"params": leaves}, None, damp, b, None, c, start, token, *of_operator,
            lambda: System(products(static, leaves, like), damp, unit, tolerance=tolerance),
            height=static.height,
        )  # fmt: skip


def weighted(static: OperatorStatic) -> OperatorStatic:
    """diag(root) A, whose leaves are those of A and root."""
    rmatvec = None if static.rmatvec is None else WeightedAdjoint(static.rmatvec)
    return replace(static, matvec=Weighted(static.matvec), rmatvec=rmatvec, spec=and_one_more(static.spec))


def and_one_more(spec: Any) -> Any:
    """The structure of (params, a tensor), for that of params."""
    return torch_pytree.tree_structure((torch_pytree.tree_unflatten([0] * spec.num_leaves, spec), 0))


def _solve_fake(like, leaves, damp, weights, b, e, c, start, token, products, on_failure):
    static = operator_of(products) if isinstance(products, str) else products
    copies, _, k = like.shape
    sizes = static.m, 0 if weights is None else static.m, static.n
    report = like.new_empty(Report.shape(copies, k), dtype=torch.float64)
    return *(like.new_empty((copies, size, k), dtype=static.dtype) for size in sizes), report, no_token()


def _solve_kernel(like, leaves, damp, weights, b, e, c, start, token, products, on_failure):
    static = replace(operator_of(products), on_failure=on_failure)
    return solve_operator(static, damp, weights, b, e, c, start, token, tuple(leaves))


_solve_by_products = define(
    "solve_by_products(Tensor like, Tensor[] leaves, Tensor? damp, Tensor? weights, Tensor? b, Tensor? e, Tensor? c, "
    "Tensor? known, Tensor? token, str products, str on_failure) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _solve_kernel,
    _solve_fake,
)


class SolveMatrixFree(Primitive):
    """(r, s, x, report, token) of (damp (P, n), weights (P, m), b, e, c and start, token, leaves (P, ...))."""

    constants = (3, 4)

    @classmethod
    def forward(cls, static: OperatorStatic, damp, weights, b, e, c, start, token, *leaves):
        like = next(t for t in (b, e, c) if t is not None)
        if any(is_traced(t) for t in (like, *leaves)):
            given = like, list(leaves), damp, weights, b, e, c, start, token
            return _solve_by_products(*given, static.text, static.on_failure)
        return solve_operator(static, damp, weights, b, e, c, start, token, leaves)

    @classmethod
    def vjp_rule(cls, static, inputs, outputs, cotangents, needed):
        damp, weights, _, _, c, _, token, *leaves = inputs
        *solution, _, new_token = outputs
        r_bar, s_bar, x_bar, _, _ = cotangents
        slots = (s_bar, r_bar, x_bar) if weights is not None else (r_bar, None, x_bar)
        if all(slot is None for slot in slots):
            return (None,) * len(inputs)
        token, static = new_token if token is None else token, static.derivative()
        q, l_s, l_x, _, _ = cls.apply(static, damp, weights, *slots, None, token, *leaves)
        r, s, x = without_idle(static, tuple(solution), (q, l_s, l_x))
        s, l_s = multiplier(weights, (r, s)), multiplier(weights, (q, l_s))
        by_matvec = replace(static, rmatvec=None)  # which may be right without being differentiable
        bars: list[Tensor | None] = [None] * len(leaves)
        which = [i for i in range(len(leaves)) if needed[7 + i]]
        if which:
            both, bar = beside([x, l_x], 2), -beside([l_s, s], 2)
            if static.settings.minimum_norm:
                # As `augmented` has it: u_s (N s_bar)_x^H + v_s (N t)_x^H
                pairs = [(x, (x_bar, (l_s, l_x))), *([] if c is None else [(l_x, (c, (s, x)))])]
                for given, (asked, solved) in pairs:
                    u = cls.apply(static, damp, weights, None, None, given, None, token, *leaves)
                    both = beside([both, _outside(by_matvec, leaves, damp, asked, *solved)], 2)
                    bar = beside([bar, multiplier(weights, u)], 2)
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
        weights_bar = (q.conj() * r).sum(2).real if needed[1] else None
        given_bars = [bar if wanted else None for bar, wanted in zip((l_s, q, l_x), needed[2:5], strict=True)]
        return damp_bar, weights_bar, *given_bars, None, None, *bars

    @classmethod
    def jvp_rule(cls, static, inputs, outputs, tangents):
        damp, weights, _, _, c, _, token, *leaves = inputs
        r, s, x, _, new_token = outputs
        damp_dot, weights_dot, b_dot, e_dot, c_dot, _, _, *leaves_dot = tangents
        token, static = new_token if token is None else token, static.derivative()
        by_matvec, whole_s = replace(static, rmatvec=None), multiplier(weights, (r, s))
        which, beyond, k = [i for i, tangent in enumerate(leaves_dot) if tangent is not None], None, x.shape[2]
        same = static, damp, weights
        if which:
            of_A, of_adjoint = [x], [whole_s]
            if static.settings.minimum_norm:
                of_adjoint.append(multiplier(weights, cls.apply(*same, None, None, x, None, token, *leaves)))  # u_s
                if c is not None:
                    of_A.append(_outside(by_matvec, leaves, damp, c, whole_s, x))  # (N t)_x

            def products(*every: Tensor) -> tuple[Tensor, Tensor]:
                forward = by_matvec.product(every, beside(of_A, 2), adjoint=False)
                return forward, by_matvec.product(every, beside(of_adjoint, 2), adjoint=True)

            moved, chosen = of_some(which, leaves, products)
            with transformed():
                changes: Any = jvp(moved, chosen, tuple(leaves_dot[i] for i in which))[1]
            (of_x, *lost), (of_s, *beyond) = (part.split(k, 2) for part in changes)
            if lost:
                of_s = of_s - cls.apply(*same, lost[0], None, None, None, token, *leaves)[2]  # w_x
            b_dot = -of_x if b_dot is None else b_dot - of_x
            c_dot = -of_s if c_dot is None else c_dot - of_s
        if weights_dot is not None:
            turned = weights_dot[:, :, None] * r
            e_dot = turned if e_dot is None else e_dot + turned
        if damp_dot is not None:
            shift = 2 * (damp * damp_dot)[:, :, None] * x
            c_dot = shift if c_dot is None else c_dot + shift
        if b_dot is None and e_dot is None and c_dot is None:
            return torch.zeros_like(r), torch.zeros_like(s), torch.zeros_like(x), None, None
        r_dot, s_dot, x_dot, _, _ = cls.apply(*same, b_dot, e_dot, c_dot, None, token, *leaves)
        if beyond:
            solved = cls.apply(*same, None, None, beyond[0], None, token, *leaves)
            further = _outside(by_matvec, leaves, damp, beyond[0], multiplier(weights, solved), solved[2])
            x_dot = x_dot + further
            if weights is not None:  # of A further nothing is left but in rows without weight
                seen = static.product(leaves, further, adjoint=False)
                r_dot = r_dot - torch.where((weights == 0)[:, :, None], seen, 0.0)
        return r_dot, s_dot, x_dot, None, None

    @classmethod
    def vmap(cls, info, in_dims, static, damp, weights, b, e, c, start, token, *leaves):
        _, of_damp, of_weights, of_b, of_e, of_c, of_start, _, *of_leaves = in_dims
        size, columns = info.batch_size, ((b, of_b), (e, of_e), (c, of_c), (start, of_start))
        if of_damp is None and of_weights is None and all(dim is None for dim in of_leaves):
            joined = [join_columns(t, dim, size) for t, dim in columns]
            *outputs, token = cls.apply(static, damp, weights, *joined, token, *leaves)
            k = extent((b, e, c), (of_b, of_e, of_c), 2)
            return (*(split_columns(output, size, k) for output in outputs), token), (0, 0, 0, 0, None)
        pairs = ((damp, of_damp), (weights, of_weights), *columns)
        joined = [join_matrices(t, dim, size) for t, dim in pairs]
        every = [join_matrices(t, dim, size) for t, dim in zip(leaves, of_leaves, strict=True)]
        *outputs, token = cls.apply(static, *joined, token, *every)
        copies = extent((b, e, c), (of_b, of_e, of_c), 0)
        return (*(split_matrices(output, size, copies) for output in outputs), token), (0, 0, 0, 0, None)


differentiate(
    _solve_by_products,
    lambda like, leaves, damp, weights, b, e, c, known, token, products, on_failure: SolveMatrixFree.apply(
        replace(operator_of(products), on_failure=on_failure), damp, weights, b, e, c, known, token, *leaves
    ),
)


def _outside(
    static: OperatorStatic, leaves: Any, damp: Tensor | None, c: Tensor | None, s: Tensor, x: Tensor
) -> Tensor:
    """(N t)_x = c - A^H s + d^2 x, the part of c that A does not reach."""
    left = -static.product(leaves, s, adjoint=True)
    left = left if c is None else left + c
    return left if damp is None else left + damp.square()[:, :, None] * x


def static_of(
    A: LinearOperator, m: int, n: int, settings: Settings | str, how: str, *, wide: bool = False
) -> tuple[OperatorStatic, list[Tensor]]:
    """(what a solve is given of a posed A, or of A^H where it is wide; its leaves)"""
    leaves, spec = torch_pytree.tree_flatten(A.params)
    rows, columns = (n, m) if wide else (m, n)
    of_A = A.matvec, A.rmatvec, spec, int(rows), int(columns), A.dtype, wide, A.working  # of a graph for this size
    return OperatorStatic(*of_A, settings_of(settings), how), leaves


def solve_matrix_free(
    A: LinearOperator,
    m: int,
    n: int,
    wide: bool,
    damp: Tensor | None,
    weights: Tensor | None,
    b: Tensor,
    start: Tensor | None,
    settings: Settings | str,
    how: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(r, x, report) of K (r, x) = (b, 0), or of K (r, x) = (0, b) with A^H for A where it is wide; b is (1, m, k).

    Weights (1, m) are those of a tall A.
    """
    static, leaves = static_of(A, m, n, settings, how, wide=wide)
    right = (None, None, b) if wide else (b, None, None)
    found = SolveMatrixFree.apply(static, damp, weights, *right, start, None, *(leaf[None] for leaf in leaves))
    return found[0], found[2], found[3]
