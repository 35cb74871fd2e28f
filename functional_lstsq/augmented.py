"""The primitive `solve_augmented`: one linear system that holds all of linear least squares, and its derivatives.

    K s = t      K = [ I    A    ]     s = [ r ]     t = [ b ]
                     [ A^H  -d^2 ]         [ x ]         [ c ]

(Björck, Numerical Methods for Least Squares Problems, SIAM 1996, section 2.1.) K is Hermitian, so the adjoint of a
solve is a solve with the same K, and both derivatives cost one more solve:

    JVP   K ds = dt - dK s            dK s = (dA x, dA^H r - 2 d dd x)
    VJP   K l = s_bar                 t_bar = l,  A_bar = -(l_r x^H + r l_x^H) at the stored entries,
                                      d_bar = 2 d Re <l_x, x>

Without full rank, and by request only, K^+ stands for the inverse: s is then the solution of least norm. For changes
of A that keep its rank (Golub and Pereyra, SIAM J. Numer. Anal. 10(2), 1973, eq. 4.12), with N = I - K K^+:

    JVP   ds = K^+ (dt - dK s + (0, w_x)) + N dK (u_r, 0)     u = K^+ (0, x),  w = K^+ dK N t
    VJP   l = K^+ s_bar,  v = K^+ (0, l_x):   t_bar = l,
          A_bar = -(l_r x^H + r l_x^H) + u_r (N s_bar)_x^H + v_r (N t)_x^H
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .holder import by_name
from .kernel import solve_kernel
from .products import multiply, sample
from .result import Report
from .transforms import (
    Primitive,
    concrete,
    differentiate,
    in_graph,
    is_traced,
    join_columns,
    join_matrices,
    split_columns,
    split_matrices,
)
from .verdict import describe_primal


# Not a tuple, which torch.func would take apart at every call.
@dataclass(frozen=True)
class Static:
    m: int
    n: int
    settings: str
    on_failure: str

    def derivative(self) -> Static:
        """For the solves of a rule: what failed under throw=False has NaN for a derivative."""
        return self if self.on_failure == "raise" else replace(self, on_failure="nan")


class Solve(Primitive):
    constants = (2, 3)

    @classmethod
    def forward(cls, static: Static, values, damp, b, c, known, token, indices):
        tensors = [None if t is None else t.contiguous() for t in (values, damp, b, c, known)]
        return solve_kernel(*tensors, token, indices, static.m, static.n, static.settings, static.on_failure)

    @classmethod
    def vjp_rule(cls, static, inputs, outputs, cotangents, needed):
        values, damp, _, c, _, token, indices = inputs
        r, x, report, made = outputs
        r_bar, x_bar, _, _ = cotangents
        if r_bar is None and x_bar is None:
            return (None,) * 7
        token = made if token is None else token
        static, m, n = static.derivative(), static.m, static.n
        primal, minimum_norm = None, by_name(static.settings).minimum_norm
        if (needed[0] or needed[1]) and report.shape[1]:  # which a given solver does not fill in
            # l_x may serve the gradient by the values alone.
            relaxed = needed[0] and c is None and not needed[1]
            primal = describe_primal(r, x, report, by_A=needed[0], by_damp=needed[1], relaxed=relaxed)
        l_r, l_x, _, _ = cls.apply(static, values, damp, r_bar, x_bar, primal, token, indices)
        values_bar = damp_bar = None
        if needed[0]:
            left, right = [-l_r, -r], [x, l_x]
            if minimum_norm:
                u_r, _, _, _ = cls.apply(static, values, damp, None, x, None, token, indices)
                left.append(u_r)
                right.append(_outside(static, values, damp, l_r, l_x, x_bar, report, token, indices))
                if c is not None:
                    v_r, _, _, _ = cls.apply(static, values, damp, None, l_x, None, token, indices)
                    left.append(v_r)
                    right.append(_outside(static, values, damp, r, x, c, report, token, indices))
            values_bar = sample(torch.cat(left, -1), torch.cat(right, -1), indices, m, n)
        if needed[1]:
            damp_bar = 2 * damp * (l_x.conj() * x).sum((1, 2)).real
        return values_bar, damp_bar, l_r if needed[2] else None, l_x if needed[3] else None, None, None, None

    @classmethod
    def jvp_rule(cls, static, inputs, outputs, tangents):
        values, damp, _, c, _, token, indices = inputs
        r, x, report, made = outputs
        values_dot, damp_dot, b_dot, c_dot, _, _, _ = tangents
        token = made if token is None else token
        static, m, n = static.derivative(), static.m, static.n
        beyond = None
        if values_dot is not None:
            b_dot = _minus(b_dot, multiply(values_dot, x, indices, m, n, False))
            c_dot = _minus(c_dot, multiply(values_dot, r, indices, m, n, True))
            if by_name(static.settings).minimum_norm:
                if c is not None:
                    lost = _outside(static, values, damp, r, x, c, report, token, indices)
                    lost = multiply(values_dot, lost, indices, m, n, False)
                    _, w_x, _, _ = cls.apply(static, values, damp, lost, None, None, token, indices)
                    c_dot = c_dot + w_x
                u_r, _, _, _ = cls.apply(static, values, damp, None, x, None, token, indices)
                beyond = multiply(values_dot, u_r, indices, m, n, True)
        if damp_dot is not None:
            c_dot = _minus(c_dot, -2 * (damp * damp_dot)[:, None, None] * x)
        if b_dot is None and c_dot is None:
            return torch.zeros_like(r), torch.zeros_like(x), None, None
        r_dot, x_dot, _, _ = cls.apply(static, values, damp, b_dot, c_dot, None, token, indices)
        if beyond is not None:
            q_r, q_x, _, _ = cls.apply(static, values, damp, None, beyond, None, token, indices)
            x_dot = x_dot + _outside(static, values, damp, q_r, q_x, beyond, report, token, indices)
        return r_dot, x_dot, None, None

    @classmethod
    def vmap(cls, info, in_dims, static, values, damp, b, c, known, token, indices):
        _, of_values, of_damp, of_b, of_c, of_known, _, _ = in_dims
        size = info.batch_size
        if of_values is None and of_damp is None:
            b, c = join_columns(b, of_b, size), join_columns(c, of_c, size)
            *outputs, token = cls.apply(static, values, damp, b, c, join_columns(known, of_known, size), token, indices)
            return (*(split_columns(output, size) for output in outputs), token), (2, 2, 2, None)
        dims = (of_values, of_damp, of_b, of_c, of_known)
        joined = [join_matrices(t, dim, size) for t, dim in zip((values, damp, b, c, known), dims, strict=True)]
        *outputs, token = cls.apply(static, *joined, token, indices)
        return (*(split_matrices(output, size) for output in outputs), token), (0, 0, 0, None)


differentiate(
    solve_kernel,
    lambda values, damp, b, c, known, token, indices, m, n, settings, on_failure: Solve.apply(
        Static(m, n, settings, on_failure), values, damp, b, c, known, token, indices
    ),
)


def _minus(x: Tensor | None, y: Tensor) -> Tensor:
    return -y if x is None else x - y


def _outside(static: Static, values, damp, r, x, c: Tensor | None, report: Tensor, token, indices: Tensor) -> Tensor:
    """(N t)_x = c - A^H r + d^2 x where (r, x) = K^+ t: the part of c that A does not reach; 0 for full rank.

    Rounding in A^H r is as large as A's largest columns make it, in all of them, so what is left is taken apart again.
    """

    def leftover(r: Tensor, x: Tensor, c: Tensor | None) -> Tensor:
        reached = multiply(values, r, indices, static.m, static.n, True)
        if damp is not None:
            reached = reached - damp.square()[:, None, None] * x
        return -reached if c is None else c - reached

    once = leftover(r, x, c)
    deficient = report[:, Report._fields.index("rank"), None, :1] < static.n
    if not is_traced(values) and not bool(concrete(deficient).any()):
        return torch.zeros_like(once)
    # The solution of this solve is rounding, which no relative error can be asked of.
    anything = replace(static, on_failure="accept")
    again_r, again_x, _, _ = Solve.apply(anything, values, damp, None, once, None, token, indices)
    return torch.where(deficient, leftover(again_r, again_x, once), 0.0)


@in_graph
def solve_augmented(
    values: Tensor,
    damp: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    indices: Tensor,
    m: int,
    n: int,
    settings: str,
    on_failure: str,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(r, x, report) of K (r, x) = (b, c): (P, m, k), (P, n, k) and (P, 8, k), the fields of `Report`.

    Args:
        values: (P, nnz), m x n matrices with m >= n on the pattern of `indices`.
        damp: (P,) or None; b: (P, m, k) or None for zero; c: (P, n, k) or None for zero.
        settings: the name of a `Settings`.
        start: (P, n, k), about x, for methods that can make use of it; no derivative flows through it.
        on_failure: "raise"; "return" (what was reached, NaN without a solution); "nan"; "accept" (anything).
    """
    return Solve.apply(Static(m, n, settings, on_failure), values, damp, b, c, start, None, indices)[:3]
