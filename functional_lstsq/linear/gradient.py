"""The gradient by A of a solve, and what rounding has left out of solutions, which derivatives of it need.

    A_bar[k] = -(l_s[i_k] x[j_k]^H + s[i_k] l_x[j_k]^H)

In its derivatives along dA the sums dA^H s and dA^H l_s are right-hand sides of the second equation, whose rounding
errors a solve magnifies by the square of the condition number, while the sums themselves may be nothing (along
dA = A M, where A^H s = 0). So they are taken exactly, with what rounding to double precision has left out of s and l_s.
That costs a solve for each, so it is computed when a derivative asks for it, and where the condition number matters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..result import Report
from ..sparse.products import OfProduct, left_out, multiply, sample
from ..torch_func.primitive import Primitive, beside, extent, join_columns, join_matrices, split_columns, split_matrices
from ..torch_func.tracing import concrete, is_traced
from .kernel import solve_kernel
from .low_parts import LOW
from .settings import Settings

_MATTERS = 100.0  # condition number below which rounding errors of s are nothing in a derivative


# Not a tuple, which torch.func would take apart at every call.
@dataclass(frozen=True)
class Static:
    """What a solve is asked for, and its products, by which alone rules sum over rows, wherever these are."""

    m: int
    n: int
    settings: Settings
    on_failure: str

    @property
    def height(self) -> int:
        """How many rows there are in all places; m are here."""
        return self.m

    def solve(self, tensors: list[Tensor | None], token: Tensor | None, indices: Tensor) -> tuple[Tensor, ...]:
        """(r, s, x, report, token), of plain tensors in the order of `OfSystem`."""
        return solve_kernel(*tensors, token, indices, self.m, self.n, self.settings.text, self.on_failure)

    def multiply(self, values: Tensor, X: Tensor, indices: Tensor, **how: bool) -> Tensor:
        """A X, or A^H X summed over all rows, as `products.multiply`."""
        return multiply(values, X, indices, self.m, self.n, **how)

    def left_out(self, values: Tensor, X: Tensor, product: Tensor, indices: Tensor) -> Tensor:
        """What rounding has left out of `product`, A^H X summed over all rows, where that is known; else zeros."""
        return left_out(values, X, product, indices, self.m, self.n)

    def sample(self, U: Tensor, W: Tensor, indices: Tensor) -> Tensor:
        """The entries of U W^H at the stored positions, as `products.sample`."""
        return sample(U, W, indices, self.m, self.n)

    def total(self, t: Tensor) -> Tensor:
        """t, a sum over the rows that are here, summed over all places."""
        return t

    def norm(self, t: Tensor) -> Tensor:
        """The norm (P, k) of each column over the rows (P, m, k) of all places."""
        return torch.linalg.vector_norm(t, dim=1)

    def largest(self, t: Tensor) -> Tensor:
        """The largest (P, 1) of the numbers (P, m) of the rows of all places, which are not negative; 0 of none."""
        return t.amax(1, keepdim=True) if t.shape[1] else t.new_zeros((len(t), 1))

    def anywhere(self, flag: Tensor) -> bool:
        """Whether a flag holds in any place."""
        return bool(flag)

    def shared(self, t: Tensor) -> Tensor:
        """t, the same in all places, where it meets the rows that are here: its cotangent is summed over all places."""
        return t

    def derivative(self) -> Static:
        """For the solves of a rule: what failed under throw=False has NaN for a derivative."""
        return self if self.on_failure == "raise" else replace(self, on_failure="nan")


def multiplier(weights: Tensor | None, solution: tuple) -> Tensor:
    """s of a solution (r, s, ...), in which it is left out where there are no weights."""
    return solution[0] if weights is None else solution[1]


def without_idle(static: Any, primal: tuple, adjoint: tuple) -> tuple:
    """`primal` with zeros for numbers that are none, in columns whose adjoint is zero.

    So what failed in a batch under throw=False, and nothing depends on, has zero for a gradient, not 0 times NaN.
    """
    if static.on_failure == "raise":
        return primal
    idle = torch.stack([(t == 0).all(1) for t in adjoint]).all(0)[:, None]
    return tuple(torch.where(idle & ~t.isfinite(), 0.0, t) for t in primal)


def may_matter(report: Tensor) -> bool:
    """Whether the condition number in the report of a solve, if it is known by now, calls for low parts."""
    condition = Report.unpacked(report).condition
    return is_traced(report) or bool((concrete(condition) > _MATTERS).any())


class OfSystem(Primitive):
    """A primitive that the kernel of solves makes: (r, s, x, report, token) of P systems with k right-hand sides each.

    Its tensors are values, weights and damp (of matrices), b, e, c and known (of columns), then what is of neither.
    """

    constants: tuple[int, ...] = (3, 4)

    @classmethod
    def forward(cls, static: Static, values, weights, damp, b, e, c, known, token, indices, *_):
        tensors = [None if t is None else t.contiguous() for t in (values, weights, damp, b, e, c, known)]
        return static.solve(tensors, token, indices)

    @classmethod
    def vmap(cls, info, in_dims, static, values, weights, damp, b, e, c, known, token, indices, *unseen):
        _, of_values, of_weights, of_damp, *dims = in_dims
        dims, of_unseen = dims[:4], dims[6:]
        size, columns = info.batch_size, (b, e, c, known)
        if of_values is None and of_weights is None and of_damp is None:
            joined = [join_columns(t, dim, size) for t, dim in zip(columns, dims, strict=True)]
            more = [join_columns(t, dim, size) for t, dim in zip(unseen, of_unseen, strict=True)]
            k = extent(columns[:3], dims[:3], 2)
            *outputs, token = cls.apply(static, values, weights, damp, *joined, token, indices, *more)
            return (*(split_columns(output, size, k) for output in outputs), token), (0, 0, 0, 0, None)
        pairs = zip((values, weights, damp, *columns), (of_values, of_weights, of_damp, *dims), strict=True)
        more = [join_matrices(t, dim, size) for t, dim in zip(unseen, of_unseen, strict=True)]
        *outputs, token = cls.apply(static, *(join_matrices(t, dim, size) for t, dim in pairs), token, indices, *more)
        copies = extent([values], [of_values], 0)
        return (*(split_matrices(output, size, copies) for output in outputs), token), (0, 0, 0, 0, None)


class LowParts(OfSystem):
    """Constants: nothing that is seen of them depends on anything."""

    constants = (0, 1, 2, 3, 4)

    @classmethod
    def vjp_rule(cls, static, inputs, outputs, cotangents, needed):
        return (None,) * 9

    @classmethod
    def jvp_rule(cls, static, inputs, outputs, tangents):
        return (None,) * 5


def low_parts(
    static: Static, values, weights, damp, slots, solution, report, token, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """What rounding has left out of s and x of a solution (r, s, x) for the right-hand sides `slots`, (b, e, c).

    Zeros where the condition number of the primal solve, in `report`, says that they do not matter.
    """
    r, s, x = solution
    condition = Report.unpacked(report).condition[:, None].amax(2, keepdim=True).expand(-1, -1, r.shape[2])
    known = beside([r, s, x, condition.to(x.dtype)], 1)
    low = replace(static, on_failure=LOW)
    low_s, _, low_x, _, _ = LowParts.apply(low, values, weights, damp, *slots, known, token, indices)
    return low_s, low_x


@dataclass(frozen=True)
class _Sampled:
    solve: Static
    groups: int = 1  # of columns, each with a gradient of its own: what a vmap over right-hand sides makes


class Gradient(Primitive):
    """-(l_s x^H + s l_x^H) at the stored entries, (P, nnz, groups)."""

    @classmethod
    def forward(cls, static: _Sampled, *tensors):
        *_, indices = tensors
        (r, s, x, q, l_s, l_x), weights = tensors[9:15], tensors[1]
        left = beside([_apart(-multiplier(weights, t), static.groups) for t in ((q, l_s), (r, s))], -1)
        right = beside([_apart(t, static.groups) for t in (x, l_x)], -1)
        return _together(sample(left, right, indices, static.solve.m, static.solve.n), static.groups)

    @classmethod
    def vjp_rule(cls, static, inputs, outputs, cotangents, needed):
        values, weights, damp, *rest, report, token, indices = inputs
        slots, bars, primal, adjoint = (tuple(rest[i : i + 3]) for i in (0, 3, 6, 9))
        (bar,), groups, solve = cotangents, static.groups, static.solve
        copies = len(bar)
        bar = -bar.transpose(1, 2).reshape(copies * groups, bar.shape[1])

        def along(t: Tensor, *, adjoint: bool = False, exact: bool = False) -> Tensor:
            t = solve.multiply(bar, _apart(t, groups), indices, adjoint=adjoint, exact=exact)
            rows, k = t.shape[1:]
            return t.reshape(copies, groups, rows, k).transpose(1, 2).reshape(copies, rows, groups * k)

        of_x = along(multiplier(weights, adjoint), adjoint=True, exact=True)
        of_l = along(multiplier(weights, primal), adjoint=True, exact=True)
        if report.shape[1] and may_matter(report):  # which a given solver does not fill in
            same = values, weights, damp
            of_x = of_x + along(low_parts(solve, *same, bars, adjoint, report, token, indices)[0], adjoint=True)
            of_l = of_l + along(low_parts(solve, *same, slots, primal, report, token, indices)[0], adjoint=True)
        of_s, of_l_s = along(adjoint[2]), along(primal[2])
        by_primal, by_adjoint = ((t, None) if weights is None else (None, t) for t in (of_s, of_l_s))
        return (*(None,) * 9, *by_primal, of_x, *by_adjoint, of_l, None, None, None)

    @classmethod
    def jvp_rule(cls, static, inputs, outputs, tangents):
        weights, indices, solve = inputs[1], inputs[-1], static.solve
        primal, adjoint = inputs[9:12], inputs[12:15]
        pairs = (multiplier(weights, adjoint), primal[2]), (multiplier(weights, primal), adjoint[2])
        dots = (
            (multiplier(weights, tangents[12:15]), tangents[11]),
            (multiplier(weights, tangents[9:12]), tangents[14]),
        )
        terms = []
        for (left, right), (left_dot, right_dot) in zip(pairs, dots, strict=True):
            for u, w in ((left_dot, right), (left, right_dot)):
                if u is not None and w is not None:
                    columns = _apart(-u, static.groups), _apart(w, static.groups)
                    terms.append(solve.sample(*columns, indices))
        return _together(sum(terms[1:], terms[0]), static.groups) if terms else torch.zeros_like(outputs[0])

    @classmethod
    def vmap(cls, info, in_dims, static, *tensors):
        dims, size = in_dims[1:], info.batch_size
        systems, columns, (token, indices) = tensors[:3], tensors[3:-2], tensors[-2:]
        if all(dim is None for dim in dims[:3]):
            joined = [join_columns(t, dim, size) for t, dim in zip(columns, dims[3:-2], strict=True)]
            found = cls.apply(replace(static, groups=static.groups * size), *systems, *joined, token, indices)
            return split_columns(found, size, static.groups), 0
        joined = [join_matrices(t, dim, size) for t, dim in zip(tensors[:-2], dims[:-2], strict=True)]
        copies = extent(tensors[:1], dims[:1], 0)
        return split_matrices(cls.apply(static, *joined, token, indices), size, copies), 0


def _apart(t: Tensor, groups: int) -> Tensor:
    """(P, rows, groups k) -> (P groups, rows, k)"""
    if groups == 1:
        return t
    copies, rows, k = t.shape
    return t.reshape(copies, rows, groups, k // groups).movedim(2, 1).reshape(copies * groups, rows, k // groups)


def _together(sampled: Tensor, groups: int) -> Tensor:
    """(P groups, nnz) -> (P, nnz, groups)"""
    return sampled.reshape(sampled.shape[0] // groups, groups, sampled.shape[1]).transpose(1, 2)


def gradient(static: Static, values, weights, damp, slots, bars, primal, adjoint, report, token, indices) -> Tensor:
    """-(l_s x^H + s l_x^H) at the stored entries, (P, nnz), for K primal = slots and K adjoint = bars."""
    tensors: tuple[Any, ...] = (values, weights, damp, *slots, *bars, *primal, *adjoint, report, token, indices)
    return Gradient.apply(_Sampled(static), *tensors)[:, :, 0]


class Unseen(OfProduct):
    """Zeros like dA X, whose cotangent is what rounding has left out of that of dA X: X is given dA^H of it."""

    @classmethod
    def forward(cls, static: Static, values, X, indices):
        return X.new_zeros((X.shape[0], static.m, X.shape[2]))

    @classmethod
    def vjp_rule(cls, static, inputs, outputs, cotangents, needed):
        values, _, indices = inputs
        return None, static.multiply(values, cotangents[0], indices, adjoint=True), None

    @classmethod
    def jvp_rule(cls, static, inputs, outputs, tangents):
        return torch.zeros_like(outputs[0])
