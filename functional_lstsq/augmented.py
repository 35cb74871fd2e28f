"""The primitive `solve_augmented`: one linear system that holds all of linear least squares, and its derivatives.

    r + A x = b          A^H s - d^2 x = c          s = W r + e          W = diag(weights)

(Björck, Numerical Methods for Least Squares Problems, SIAM 1996, section 2.1, with a slot e for right-hand sides that
are already weighted.) The system is symmetric in (r, x) and (e, b, c), so the adjoint of a solve is a solve of the
same, and both derivatives cost one more solve:

    JVP   (b, e, c) = (db - dA x, dw r + de, dc - dA^H s + 2 d dd x)
    VJP   (b, e, c) = (0, r_bar, x_bar) gives q, l_x and l_s = W q + r_bar:
          b_bar = l_s,  e_bar = q,  c_bar = l_x,  A_bar = -(l_s x^H + s l_x^H) at the stored entries,
          w_bar = Re q r in each row,  d_bar = 2 d Re <l_x, x>

No root of a weight is in it, so that a weight of zero has an ordinary derivative, and nothing cancels. Without weights
e is left out: r_bar then goes into the place of b, and s and l_s are what the solves give.

The product dA^H s is a sum whose rounding errors the solve magnifies by the square of the condition number, while the
sum itself may be nothing: it is taken exactly, with what rounding has left out of s.

Without full rank, and by request only, K^+ stands for the inverse of the system K, and gives the solution of least
norm. For changes of A that keep its rank (Golub and Pereyra, SIAM J. Numer. Anal. 10(2), 1973, eq. 4.12), with
N = I - K K^+ and t = (b, c):

    JVP   ds = K^+ (dt - dK s + (0, w_x)) + N dK (u_s, 0)     u = K^+ (0, x),  w = K^+ dK N t
    VJP   l = K^+ s_bar,  v = K^+ (0, l_x):   t_bar = l,
          A_bar = -(l_s x^H + s l_x^H) + u_s (N s_bar)_x^H + v_s (N t)_x^H
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .holder import by_name
from .kernel import LOW, solve_kernel
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
    def forward(cls, static: Static, values, weights, damp, b, e, c, known, token, indices):
        tensors = [None if t is None else t.contiguous() for t in (values, weights, damp, b, e, c, known)]
        return solve_kernel(*tensors, token, indices, static.m, static.n, static.settings, static.on_failure)

    @classmethod
    def vjp_rule(cls, static, inputs, outputs, cotangents, needed):
        values, weights, damp, b, e, c, _, token, indices = inputs
        r, x, report, made = outputs
        r_bar, x_bar, _, _ = cotangents
        if (r_bar is None and x_bar is None) or static.on_failure == LOW:
            return (None,) * 9
        token = made if token is None else token
        static, m, n = static.derivative(), static.m, static.n
        primal, minimum_norm = None, by_name(static.settings).minimum_norm
        s = _weighted(weights, r, e)
        judged = report.shape[1] and r.shape[1] and x.shape[1]  # which a given solver does not fill in
        if (needed[0] or needed[2]) and judged:
            # l_x may serve the gradient by the values alone.
            relaxed = needed[0] and c is None and not needed[1] and not needed[2]
            primal = describe_primal(
                r, s, x, report, weights, by_A=needed[0] and bool(indices.shape[1]), by_damp=needed[2], relaxed=relaxed
            )
        # Without weights a right-hand side that is weighted is one that is not: what is solved for is l_s itself.
        plain, weighted = (r_bar, None) if weights is None else (None, r_bar)
        solved, l_x, _, _ = cls.apply(static, values, weights, damp, plain, weighted, x_bar, primal, token, indices)
        l_s, adjoint = _weighted(weights, solved, weighted), (plain, weighted, x_bar)
        values_bar = weights_bar = damp_bar = None
        if needed[0]:
            left, right = [-l_s, -s], [x, l_x]
            if minimum_norm:
                u_r, _, _, _ = cls.apply(static, values, weights, damp, None, None, x, None, token, indices)
                left.append(_weighted(weights, u_r))
                right.append(_outside(static, values, weights, damp, adjoint, solved, l_x, report, token, indices))
                if c is not None:
                    v_r, _, _, _ = cls.apply(static, values, weights, damp, None, None, l_x, None, token, indices)
                    left.append(_weighted(weights, v_r))
                    right.append(_outside(static, values, weights, damp, (b, e, c), r, x, report, token, indices))
            values_bar = sample(torch.cat(left, -1), torch.cat(right, -1), indices, m, n)
        if needed[1]:
            weights_bar = (solved.conj() * r).sum(2).real
        if needed[2]:
            damp_bar = 2 * damp * _inner(l_x, x)
            if judged:
                _, low_x = _low_parts(static, values, weights, damp, b, e, c, r, x, report, token, indices)
                _, low_l = _low_parts(static, values, weights, damp, *adjoint, solved, l_x, report, token, indices)
                damp_bar = damp_bar + 2 * damp * (_inner(low_l, x) + _inner(l_x, low_x))
        bars = (values_bar, weights_bar, damp_bar, l_s, solved, l_x)
        return (*(bar if wanted else None for bar, wanted in zip(bars, needed, strict=False)), None, None, None)

    @classmethod
    def jvp_rule(cls, static, inputs, outputs, tangents):
        values, weights, damp, b, e, c, _, token, indices = inputs
        r, x, report, made = outputs
        values_dot, weights_dot, damp_dot, b_dot, e_dot, c_dot, _, _, _ = tangents
        if static.on_failure == LOW:
            return torch.zeros_like(r), torch.zeros_like(x), None, None
        token = made if token is None else token
        static, m, n = static.derivative(), static.m, static.n
        beyond, s, low_x, k = None, _weighted(weights, r, e), None, x.shape[2]
        if (values_dot is not None or damp_dot is not None) and report.shape[1] and r.shape[1] and x.shape[1]:
            low_s, low_x = _low_parts(static, values, weights, damp, b, e, c, r, x, report, token, indices)
        if values_dot is not None:
            b_dot = _minus(b_dot, multiply(values_dot, x, indices, m, n, False))
            # Its rounding errors would be as large as |dA| |r| makes them, whatever is left of the sums, and the
            # solve makes them larger by the square of the condition number.
            c_dot = _minus(c_dot, multiply(values_dot, s, indices, m, n, True, True))
            if low_x is not None:
                c_dot = _minus(c_dot, multiply(values_dot, low_s, indices, m, n, True))
            if by_name(static.settings).minimum_norm:
                if c is not None:
                    lost = _outside(static, values, weights, damp, (b, e, c), r, x, report, token, indices)
                    lost = multiply(values_dot, lost, indices, m, n, False)
                    _, w_x, _, _ = cls.apply(static, values, weights, damp, lost, None, None, None, token, indices)
                    c_dot = c_dot + w_x
                u_r, _, _, _ = cls.apply(static, values, weights, damp, None, None, x, None, token, indices)
                beyond = multiply(values_dot, _weighted(weights, u_r), indices, m, n, True, True)
        if weights_dot is not None:
            moved = weights_dot[:, :, None] * r
            e_dot = moved if e_dot is None else e_dot + moved
        if damp_dot is not None:
            # As it is, and with its low part by itself: in a weak direction nothing but rounding may be left of it.
            whole = x if low_x is None else torch.cat([x, low_x], 2)
            by_x = cls.apply(static, values, weights, damp, None, None, whole, None, token, indices)[:2]
            factor = 2 * (damp * damp_dot)[:, None, None]
            by_x = [part if low_x is None else part[:, :, :k] + part[:, :, k:] for part in by_x]
            moved_r, moved_x = (factor * part for part in by_x)
        r_dot, x_dot = torch.zeros_like(r), torch.zeros_like(x)
        if b_dot is not None or e_dot is not None or c_dot is not None:
            r_dot, x_dot, _, _ = cls.apply(static, values, weights, damp, b_dot, e_dot, c_dot, None, token, indices)
        if damp_dot is not None:
            r_dot, x_dot = r_dot + moved_r, x_dot + moved_x
        if beyond is not None:
            q_r, q_x, _, _ = cls.apply(static, values, weights, damp, None, None, beyond, None, token, indices)
            slots = (None, None, beyond)
            x_dot = x_dot + _outside(static, values, weights, damp, slots, q_r, q_x, report, token, indices)
        return r_dot, x_dot, None, None

    @classmethod
    def vmap(cls, info, in_dims, static, values, weights, damp, b, e, c, known, token, indices):
        _, of_values, of_weights, of_damp, *dims, _, _ = in_dims
        size, columns = info.batch_size, (b, e, c, known)
        if of_values is None and of_weights is None and of_damp is None:
            joined = [join_columns(t, dim, size) for t, dim in zip(columns, dims, strict=True)]
            *outputs, token = cls.apply(static, values, weights, damp, *joined, token, indices)
            return (*(split_columns(output, size) for output in outputs), token), (2, 2, 2, None)
        pairs = zip((values, weights, damp, *columns), (of_values, of_weights, of_damp, *dims), strict=True)
        *outputs, token = cls.apply(static, *(join_matrices(t, dim, size) for t, dim in pairs), token, indices)
        return (*(split_matrices(output, size) for output in outputs), token), (0, 0, 0, None)


differentiate(
    solve_kernel,
    lambda values, weights, damp, b, e, c, known, token, indices, m, n, settings, on_failure: Solve.apply(
        Static(m, n, settings, on_failure), values, weights, damp, b, e, c, known, token, indices
    ),
)


def _minus(x: Tensor | None, y: Tensor) -> Tensor:
    return -y if x is None else x - y


def _weighted(weights: Tensor | None, r: Tensor, e: Tensor | None = None) -> Tensor:
    """W r + e"""
    s = r if weights is None else weights[:, :, None] * r
    return s if e is None else s + e


def _low_parts(
    static: Static, values, weights, damp, b, e, c, r, x, report, token, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """What rounding has left out of s = W r + e and x; constants, for nothing that is seen of them depends on anything.

    Zeros where the condition number of the primal solve, in `report`, says that they do not matter.
    """
    condition = report[:, Report._fields.index("condition"), None].amax(2, keepdim=True).expand(-1, -1, r.shape[2])
    known = torch.cat([r, x, condition.to(x.dtype)], 1)
    low = replace(static, on_failure=LOW)
    return Solve.apply(low, values, weights, damp, b, e, c, known, token, indices)[:2]


def _inner(l: Tensor, x: Tensor) -> Tensor:  # noqa: E741
    """Re <l, x> of all columns (P,), exactly summed: of vectors that are nearly orthogonal little is left."""
    copies, n, k = x.shape
    row, places = l.transpose(1, 2).reshape(copies * k, n).conj(), torch.arange(n, device=x.device)
    columns = x.transpose(1, 2).reshape(copies * k, n, 1)
    found = multiply(row.resolve_conj(), columns, torch.stack([torch.zeros_like(places), places]), 1, n, False, True)
    return found.reshape(copies, k).sum(1).real


def _outside(static: Static, values, weights, damp, slots, r, x, report: Tensor, token, indices: Tensor) -> Tensor:
    """(N t)_x = c - A^H s + d^2 x for the solution of t = `slots`, (b, e, c): the part of c that A does not reach.

    0 for full rank. It may be as small beside c as columns are beside each other, so its value is taken from a residual
    in extended precision; the derivative is that of the sum.
    """
    b, e, c = slots
    deficient = report[:, Report._fields.index("rank"), None, :1] < static.n
    if not is_traced(values) and not bool(concrete(deficient).any()):
        return torch.zeros_like(x)
    left = -multiply(values, _weighted(weights, r, e), indices, static.m, static.n, True, True)
    left = left if c is None else left + c
    if damp is None:  # with damping there is full rank
        _, exactly = _low_parts(static, values, weights, damp, b, e, c, r, x, report, token, indices)
        left = left + (exactly - left).detach()
    return torch.where(deficient, left, 0.0)


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
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(r, x, report) of the system above: (P, m, k), (P, n, k) and (P, 8, k), the fields of `Report`.

    Args:
        values: (P, nnz), m x n matrices with m >= n on the pattern of `indices`.
        weights: (P, m), not negative, or None for ones.
        damp: (P,) or None; b: (P, m, k) or None for zero; c: (P, n, k) or None for zero.
        settings: the name of a `Settings`.
        start: (P, n, k), about x, for methods that can make use of it; no derivative flows through it.
        on_failure: "raise"; "return" (what was reached, NaN without a solution); "nan"; "accept" (anything).
    """
    static = Static(m, n, settings, on_failure)
    return Solve.apply(static, values, weights, damp, b, None, c, start, None, indices)[:3]
