"""The primitive `solve_augmented`: one linear system that holds all of linear least squares, and its derivatives.

    r + A x = b          A^H s - d^2 x = c          s = W r + e          W = diag(weights)

(Björck, Numerical Methods for Least Squares Problems, SIAM 1996, section 2.1, with a slot e for right-hand sides that
are already weighted, and a damping d^2 for all unknowns or one for each.) The system is symmetric: (r, s, x) is to
(e, b, c) as cotangents are, so the adjoint of a solve is a solve of the same, and both derivatives cost one more solve:

    JVP   (b, e, c) = (db - dA x, dw r + de, dc - dA^H s + 2 d dd x)
    VJP   (b, e, c) = (s_bar, r_bar, x_bar) gives q, l_s and l_x:
          b_bar = l_s,  e_bar = q,  c_bar = l_x,  A_bar = -(l_s x^H + s l_x^H) at the stored entries,
          w_bar = Re q r in each row,  d_bar = 2 d Re l_x x for each unknown, or the sum of these

No root of a weight is in it, so that a weight of zero has an ordinary derivative, and nothing cancels. A weight of
infinity makes a constraint: r = 0, and s is its multiplier, which the solve gives (as of all rows) since W r is none.
A damping of infinity pins an unknown at zero: x = l_x = 0. Without weights e and s are left out: s is r, and r_bar
goes into the place of b.

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

from functools import lru_cache

import torch
from torch import Tensor

from ..result import Report
from ..sparse.double_double import two_product
from ..sparse.pattern import SparsePattern
from ..sparse.products import multiply
from ..torch_func.cores import quiet
from ..torch_func.operations import differentiate
from ..torch_func.primitive import beside
from ..torch_func.tracing import concrete, in_graph, is_traced, unseen_by_transforms
from .factor_cache import of_solve
from .gradient import LowParts, OfSystem, Static, Unseen, gradient, low_parts, may_matter, multiplier, without_idle
from .kernel import solve_kernel
from .low_parts import LOW
from .settings import Settings, settings_of
from .verdict import describe_primal


class Solve(OfSystem):
    """(r, s, x, report, token); the last input is zero, and its cotangent what that of b has lost: see `Unseen`."""

    @classmethod
    def vjp_rule(cls, static, inputs, outputs, cotangents, needed):
        with quiet(_extent(inputs, outputs)):
            return cls._vjp(static, inputs, outputs, cotangents, needed)

    @classmethod
    def _vjp(cls, static, inputs, outputs, cotangents, needed):
        values, weights, damp, b, e, c, _, token, indices, _ = inputs
        r, s, x, report, new_token = outputs
        r_bar, s_bar, x_bar, _, _ = cotangents
        # Without weights s is r, and r_bar goes into the place of b.
        bars = (s_bar, r_bar, x_bar) if weights is not None else (r_bar, None, x_bar)
        if all(bar is None for bar in bars):
            return (None,) * 10
        token = of_solve(token, new_token)
        static = static.derivative()
        settings = static.settings
        whole_s, minimum_norm = multiplier(weights, (r, s)), settings.minimum_norm
        if r_bar is not None and not settings.wide and settings.precision > torch.finfo(x.dtype).eps:
            owed = _rounded_away(static, values, r_bar, whole_s, indices)
            bars = (*bars[:2], owed if x_bar is None else x_bar + owed)
        primal = None
        judged = report.shape[1] and static.height and x.shape[1]  # which a given solver does not fill in
        if (needed[0] or needed[2]) and judged:
            # l_x may serve the gradient by the values alone.
            relaxed = needed[0] and c is None and not needed[1] and not needed[2]
            by_A = needed[0] and (static.height > static.m or bool(indices.shape[1]))
            primal = describe_primal(whole_s, x, report, by_A=by_A, by_damp=needed[2], relaxed=relaxed)
        q, l_s, l_x, _, _ = cls.apply(static, values, weights, damp, *bars, primal, token, indices, None)
        adjoint = q, l_s, l_x
        r, s, x = without_idle(static, (r, s, x), adjoint)
        whole_l = multiplier(weights, adjoint)
        values_bar = weights_bar = damp_bar = None
        if needed[0]:
            pair = (b, e, c), bars, (r, s, x), adjoint
            values_bar = gradient(static, values, weights, damp, *pair, report, token, indices)
            if minimum_norm:
                u = cls.apply(static, values, weights, damp, None, None, x, None, token, indices, None)
                beyond = _outside(static, values, weights, damp, bars, adjoint, report, token, indices)
                values_bar = values_bar + static.sample(multiplier(weights, u), beyond, indices)
                if c is not None:
                    v = cls.apply(static, values, weights, damp, None, None, l_x, None, token, indices, None)
                    beyond = _outside(static, values, weights, damp, (b, e, c), (r, s, x), report, token, indices)
                    values_bar = values_bar + static.sample(multiplier(weights, v), beyond, indices)
        if needed[1]:
            weights_bar = (q.conj() * r).sum(2).real
        if needed[2]:
            damp_bar = _inner(l_x, x, damp)
            if judged and may_matter(report):
                _, low_x = low_parts(static, values, weights, damp, (b, e, c), (r, s, x), report, token, indices)
                _, low_l = low_parts(static, values, weights, damp, bars, adjoint, report, token, indices)
                damp_bar = damp_bar + _inner(low_l, x, damp) + _inner(l_x, low_x, damp)
            damp_bar = 2 * _finite(damp) * damp_bar
        lost = None
        if needed[9]:
            lost = low_parts(static, values, weights, damp, bars, adjoint, report, token, indices)[0]
        given = (values_bar, weights_bar, damp_bar, whole_l, q, l_x)
        given_bars = [bar if wanted else None for bar, wanted in zip(given, needed, strict=False)]
        return *given_bars, None, None, None, lost

    @classmethod
    def jvp_rule(cls, static, inputs, outputs, tangents):
        with quiet(_extent(inputs, outputs)):
            return cls._jvp_of(static, inputs, outputs, tangents)

    @classmethod
    def _jvp_of(cls, static, inputs, outputs, tangents):
        values, weights, damp, b, e, c, _, token, indices, _ = inputs
        r, s, x, report, new_token = outputs
        values_dot, weights_dot, damp_dot, b_dot, e_dot, c_dot, _, _, _, _ = tangents
        token = of_solve(token, new_token)
        static = static.derivative()
        beyond, whole_s, low_x, unseen, owed = None, multiplier(weights, (r, s)), None, None, None
        if (values_dot is not None or damp_dot is not None) and report.shape[1] and static.height and x.shape[1]:
            low_s, low_x = low_parts(static, values, weights, damp, (b, e, c), (r, s, x), report, token, indices)
        if values_dot is not None:
            b_dot = _minus(b_dot, static.multiply(values_dot, x, indices, exact_bar=True))
            if low_x is not None and may_matter(report):
                unseen = Unseen.apply(static, -values_dot, x, indices)
            # Its rounding errors would be as large as |dA| |r| makes them, whatever is left of the sums, and the
            # solve makes them larger by the square of the condition number.
            product = static.multiply(values_dot, whole_s, indices, adjoint=True, exact=True)
            c_dot = _minus(c_dot, product)
            if low_x is not None:
                low = static.multiply(values_dot, low_s, indices, adjoint=True)
                if damp is None or not may_matter(report):
                    c_dot = _minus(c_dot, low)
                else:
                    # Rounded, the sum would have a part of size eps where A vanishes, which is magnified by d^-2, and
                    # by d^-3 in a derivative by damp.
                    owed = -(low + static.left_out(values_dot, whole_s, product, indices))
            if static.settings.minimum_norm:
                if c is not None:
                    lost = _outside(static, values, weights, damp, (b, e, c), (r, s, x), report, token, indices)
                    lost = static.multiply(values_dot, lost, indices)
                    w_x = cls.apply(static, values, weights, damp, lost, None, None, None, token, indices, None)[2]
                    c_dot = c_dot + w_x
                u = cls.apply(static, values, weights, damp, None, None, x, None, token, indices, None)
                beyond = static.multiply(values_dot, multiplier(weights, u), indices, adjoint=True, exact=True)
        if weights_dot is not None:
            moved = weights_dot[:, :, None] * r
            e_dot = moved if e_dot is None else e_dot + moved
        dots = torch.zeros_like(r), torch.zeros_like(s), torch.zeros_like(x)
        if b_dot is not None or e_dot is not None or c_dot is not None:
            dots = cls.apply(static, values, weights, damp, b_dot, e_dot, c_dot, None, token, indices, unseen)[:3]
        if owed is not None:
            more = cls.apply(static, values, weights, damp, None, None, owed, None, token, indices, None)[:3]
            dots = tuple(dot + part for dot, part in zip(dots, more, strict=True))
        if damp_dot is not None:
            whole, factor = _along_damp(damp, damp_dot, x, low_x)
            by_x = cls.apply(static, values, weights, damp, None, None, whole, None, token, indices, None)[:3]
            shape = whole.shape[2] // max(x.shape[2], 1), x.shape[2]
            parts = (part.unflatten(2, shape).sum(2) for part in by_x)
            of_rows = factor if isinstance(factor, float) else static.shared(factor)
            factors = of_rows, of_rows, factor
            dots = tuple(dot + scale * part for dot, scale, part in zip(dots, factors, parts, strict=True))
        r_dot, s_dot, x_dot = dots
        if beyond is not None:
            q = cls.apply(static, values, weights, damp, None, None, beyond, None, token, indices, None)[:3]
            slots = (None, None, beyond)
            further = _outside(static, values, weights, damp, slots, q, report, token, indices)
            x_dot = x_dot + further
            if weights is not None:  # of A further nothing is left but in rows without weight
                seen = static.multiply(values, further, indices)
                r_dot = r_dot - torch.where((weights == 0)[:, :, None], seen, 0.0)
        return r_dot, s_dot, x_dot, None, None


def _extent(inputs: tuple, outputs: tuple) -> int:
    """How many numbers a rule works on, about; none where they are not there as yet."""
    values, (r, _, x, *_) = inputs[0], outputs
    return 0 if is_traced(values) else concrete(values).numel() + 4 * (concrete(r).numel() + concrete(x).numel())


def _with_rules(values, weights, damp, b, e, c, known, token, indices, m, n, settings, on_failure):
    static = Static(m, n, settings_of(settings), on_failure)
    tensors = values, weights, damp, b, e, c, known, token, indices
    return LowParts.apply(static, *tensors) if on_failure == LOW else Solve.apply(static, *tensors, None)


differentiate(solve_kernel, _with_rules)


def _minus(x: Tensor | None, y: Tensor) -> Tensor:
    return -y if x is None else x - y


def _rounded_away(static: Static, values: Tensor, r_bar: Tensor, s: Tensor, indices: Tensor) -> Tensor:
    """A^H r_bar (P, n, k) in columns where r_bar is a multiple of s but for its rounding to single precision, else 0.

    The cotangent of sum_i w_i |r_i|^2 is 2 s, with A^H s = 0; rounding errors of it would be magnified by A^+, and are
    taken off: a cotangent without them is as near to the loss's as the one that came.
    """
    values, r_bar, s, precision = values.detach(), r_bar.detach(), s.detach(), static.settings.precision
    product = static.multiply(values, r_bar, indices, adjoint=True, exact=True)
    size = static.multiply(values.abs(), r_bar.abs(), indices, adjoint=True)
    nothing = (product.abs() <= 2 * precision * size).all(1, keepdim=True)
    length = static.total(torch.linalg.vector_norm(s, dim=1, keepdim=True))
    unit = s / length.clamp_min(torch.finfo(torch.float64).tiny)
    multiple, square = (static.total((unit.conj() * t).sum(1, keepdim=True)) for t in (r_bar, unit))
    apart = (r_bar - multiple / square * unit).abs() > 4 * precision * r_bar.abs()
    multiples = static.total(apart.sum(1, keepdim=True).to(size.dtype)) == 0
    return torch.where(nothing & multiples, product, 0.0)


def _finite(damp: Tensor) -> Tensor:
    """The dampings of unknowns that are not pinned at zero; those that are have no derivative but zero."""
    return torch.where(damp.isinf(), 0.0, damp)


def _inner(l: Tensor, x: Tensor, damp: Tensor) -> Tensor:  # noqa: E741
    """Re <l, x> of all columns: (P, n) for dampings of each unknown, (P, 1) for one of all.

    That is exactly summed: of vectors that are nearly orthogonal little is left.
    """
    copies, n, k = x.shape
    if damp.shape[1] != 1:
        return (l.conj() * x).sum(2).real
    row, columns = l.transpose(1, 2).reshape(copies * k, n).conj(), x.transpose(1, 2).reshape(copies * k, n, 1)
    of_row = _of_row(n, x.device) if is_traced(x) else _kept_row(n, x.device).indices
    found = multiply(row.resolve_conj(), columns, of_row, 1, n, exact=True)
    return found.reshape(copies, k).sum(1, keepdim=True).real


def _of_row(n: int, device: torch.device) -> Tensor:
    places = torch.arange(n, device=device)
    return torch.stack([torch.zeros_like(places), places])


@lru_cache(maxsize=16)
def _kept_row(n: int, device: torch.device) -> SparsePattern:
    """The pattern of a full row, which takes longer to make than a product with it."""
    with unseen_by_transforms(), torch.inference_mode(False):
        return SparsePattern(_of_row(n, device), (1, n))


def _along_damp(damp: Tensor, damp_dot: Tensor, x: Tensor, low_x: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """(columns, factor): factor times their sum is 2 d dd x, each with what rounding has left out of it.

    In a weak direction nothing but rounding may be left of the sum.
    """
    two_d = 2 * _finite(damp)
    if damp.shape[1] == 1:
        return x if low_x is None else beside([x, low_x], 2), (two_d * damp_dot)[:, :, None]
    along, lost = two_product(two_d[:, :, None], damp_dot[:, :, None])
    whole, rest = two_product(along, x)
    rest = rest + lost * x + (0.0 if low_x is None else along * low_x)
    return beside([whole, rest.detach()], 2), 1.0


def _outside(static: Static, values, weights, damp, slots, solution, report, token, indices: Tensor) -> Tensor:
    """(N t)_x = c - A^H s + d^2 x for the solution (r, s, x) of t = `slots`, (b, e, c): what A does not reach of c.

    0 for full rank. It may be as small beside c as columns are beside each other, so its value is taken from a residual
    in extended precision; the derivative is that of the sum.
    """
    (_, _, c), x = slots, solution[2]
    deficient = Report.unpacked(report).rank[:, None, :1] < static.n
    if not is_traced(values) and not bool(concrete(deficient).any()):
        return torch.zeros_like(x)
    left = -static.multiply(values, multiplier(weights, solution), indices, adjoint=True, exact=True)
    left = left if c is None else left + c
    left = left if damp is None else left + _finite(damp).square()[:, :, None] * x
    _, exactly = low_parts(static, values, weights, damp, slots, solution, report, token, indices)
    left = left + torch.where(deficient, exactly - left, 0.0).detach()
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
    settings: Settings | str,
    on_failure: str,
    start: Tensor | None = None,
    weights: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(r, x, report) of the system above: (P, m, k), (P, n, k) and (P, fields of `Report`, k).

    Args:
        values: (P, nnz), m x n matrices on the pattern of `indices`, with m >= n where nothing is damped.
        weights: (P, m), not negative, infinite for constraints, or None for ones.
        damp: (P, 1), or (P, n) for each unknown, infinite for one that is pinned at zero, or None.
        b: (P, m, k) or None for zero; c: (P, n, k) or None for zero.
        settings: in a compiled graph their text.
        start: (P, n, k), about x, for methods that can make use of it; no derivative flows through it.
        kept: the token of factors that a user keeps, or None.
        on_failure: "raise"; "return" (what was reached, NaN without a solution); "nan"; "accept" (anything).
    """
    static = Static(m, n, settings_of(settings), on_failure)
    r, _, x, report, _ = Solve.apply(static, values, weights, damp, b, None, c, start, kept, indices, None)
    return r, x, report
