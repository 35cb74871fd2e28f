"""What `gauss_newton` and robust fits minimise, and its derivatives, by torch.func.

f(x) = sum_i rho(w_i^(1/2) r_i(x); t) + d^2 |x|^2 / 2        g = J^T psi(r) + d^2 x,    psi(r) = d rho / d r
H s  = the derivative of g along s = J^T psi'(r) J s + sum_i psi(r_i) (grad^2 r_i) s + d^2 s

Equations for derivatives of the minimum are H s + J^T u + c = 0, with u (m,) apart from c (n,): u and psi' J s are
added up before they are multiplied by J^T. The rounding errors of that product, |J|^T |u + psi' J s| eps, are magnified
by the square of the condition number, those of u and of psi' J s by the condition number alone.

Weights w stay out of J and r, to whose rounding errors they would add. No root of them is differentiated but those of
outliers (see losses.py), so that derivatives by a weight of zero are numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from ..linear.settings import Settings
from ..sparse.numerics import noise
from ..sparse.pattern import SparsePattern
from ..sparse.plain_products import Operator
from ..torch_func.forward_mode import jvp
from .losses import Square
from .rows import Rows

_SMALL, _ENTRIES = 64, 2**20  # unknowns, and entries of J, of problems that are small
_FEW = 2**15  # numbers that hold all residuals' derivatives by all residuals
Leaves = tuple[Tensor, ...]  # t, d, w (m,), and what the residual depends on besides x


# Not a tuple, which torch.func would take apart at every call.
@dataclass(eq=False)
class Objective:
    """One problem; `residual(x, *given)` -> (m,) and `jacobian(x, *given)` -> its Jacobian's values on `pattern`.

    The Jacobian decides how steps are made. What is accepted rests on derivatives of `residual` by torch.func, and on
    `pull(x, *given)` -> (residual, y -> J^T y).
    """

    residual: Callable[..., Tensor]
    pull: Callable[..., tuple[Tensor, Callable[[Tensor], Tensor]]]
    jacobian: Callable[..., Tensor]
    pattern: SparsePattern
    loss: Square
    settings: Settings
    precision: float  # machine epsilon of the user's dtype, to which x is rounded in the end
    arithmetic: float  # machine epsilon of what computes the residual, by which all is judged
    max_iterations: int
    on_failure: str
    linear: bool  # J is made of leaf number 3 without rounding, and `pull` multiplies with it exactly
    name: str
    start: str  # what must be finite, and where
    point: str  # what the user calls x0
    # further(x, *given) -> (j,): results at the minimum that may move much more than x, and are to be right too
    further: Callable[..., Tensor] | None = None
    # The first of `given` is the threshold, once more: the residual is that of a robust fit itself.
    nested: bool = False
    callback: Callable[[int, float], object] | None = None  # of each damped step: their number, and the largest cost
    again: bool = False  # whether an attempt that found no minimum is followed by another one
    found_inside: int = 0  # unknowns that the residual finds itself, as those of `further`
    whole: bool = False  # J has all entries, and one derivative of the residual takes about as long as another
    # Products with H by forward mode over reverse mode, once reverse over reverse gave NaN (of t^x at t = 0, say); and
    # whether both did.
    forward: bool = False
    undefined: bool = False
    rows: Rows = field(default_factory=Rows)  # with a residual that takes x, and threshold, by `rows.shared`

    @property
    def accept(self) -> float:
        """Largest relative error that is accepted.

        It is the arithmetic's, not the input's: Newton's steps say what is left of an error only where they shrink
        quadratically or are rounding errors. A step of 5e-3 in double precision is neither, whatever x0 is stored in.
        """
        return self.arithmetic ** (1 / 3)

    def cost(self, x: Tensor, t: Tensor, d: Tensor, w: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        """(f, r)"""
        r = self.residual(x, *given)
        cost = self.rows.total(self.loss.cost(r, w, self.rows.shared(t)).sum())
        return cost + (d * x).square().sum() / 2, r

    def gradient(self, x: Tensor, t: Tensor, d: Tensor, w: Tensor, *given: Tensor) -> Tensor:
        r, pull = self.pull(x, *given)
        return pull(self.loss.influence(r, w, self.rows.shared(t))) + d.square() * x

    def influence(self, x: Tensor, t: Tensor, d: Tensor, w: Tensor, *given: Tensor) -> Tensor:
        """psi(r)"""
        return self.loss.influence(self.residual(x, *given), w, self.rows.shared(t))

    def pulled(self, y: Tensor, x: Tensor, t: Tensor, d: Tensor, w: Tensor, *given: Tensor) -> Tensor:
        """J^T y + d^2 x, the gradient for y = psi(r)."""
        return self.pull(x, *given)[1](y) + d.square() * x

    def curvature(self, x: Tensor, leaves: Leaves) -> Callable[[Tensor], Tensor]:
        """V -> H V for V (P, n, k) of P problems, x (P, n); what it takes at x is computed once."""
        if self.linear:
            t, d, w, values, *_ = leaves
            r = each(self.residual, x, *leaves[3:])
            influence = lambda r: self.loss.influence(r, w, t[:, None])  # noqa: E731
            slopes, A = jvp(influence, (r,), (torch.ones_like(r),))[1][:, :, None], Operator(self.pattern, values)
            return lambda V: A.adjoint(slopes * A.matmul(V)) + d.square()[:, None, None] * V
        gradient = lambda x: each(self.gradient, x, *leaves)  # noqa: E731
        if self.nested:
            # A graph that holds fits of its own was once found to be spoilt when it was walked a second time.
            return lambda V: each(self._symmetric(gradient, x), V, dim=2)
        product = self._symmetric(gradient, x)
        if not self.rows.are_here and self.is_small(len(x)):  # in one sum over all rows, not one for each product
            H = each(product, torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1), dim=2)
            return lambda V: H @ V
        return lambda V: each(product, V, dim=2)

    def is_small(self, copies: int) -> bool:
        """Whether dense matrices of so many problems take less time than what they save."""
        m, n = self.pattern.shape
        return n <= _SMALL and copies * self.rows.height(m) * n <= _ENTRIES

    def _symmetric(self, gradient: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
        """v -> the derivative of `gradient` along v: its own transpose, and torch's reverse mode is the faster one."""
        if self.forward:
            return lambda v: torch.func.jvp(gradient, (x,), (v,))[1]  # type: ignore[no-any-return]
        pull: Any = torch.func.vjp(gradient, x)[1]
        return lambda v: pull(v)[0]  # type: ignore[no-any-return]

    def influence_along(self, S: Tensor, U: Tensor, x: Tensor, *leaves: Tensor) -> Tensor:
        """U + psi' J S for S (n, k), U (m, k)."""

        def along(s: Tensor) -> Any:
            return jvp(lambda x: self.influence(x, *leaves), (x,), (s,))[1]

        return U + each(along, S, dim=1)

    def pulled_along(
        self, Y: Tensor, S: Tensor, C: Tensor, x: Tensor, t: Tensor, d: Tensor, w: Tensor, *given: Tensor
    ) -> Tensor:
        """J^T Y + sum_i psi(r_i) (grad^2 r_i) S + d^2 S + C for Y (m, k), S (n, k), C (n, k)."""
        r, pull = self.pull(x, *given)
        if self.linear:
            return C + each(pull, Y, dim=1) + d.square() * S
        psi = self.loss.influence(r, w, self.rows.shared(t))
        second = self._symmetric(lambda x: self.pulled(psi, x, t, d, w, *given), x)
        return C + each(lambda y, s: pull(y) + second(s), Y, S, dim=1)

    def equation(self, S: Tensor, U: Tensor, C: Tensor, x: Tensor, *leaves: Tensor) -> Tensor:
        """H S + J^T U + C"""
        return self.pulled_along(self.influence_along(S, U, x, *leaves), S, C, x, *leaves)

    def further_along(self, S: Tensor, x: Tensor, t: Tensor, d: Tensor, w: Tensor, *given: Tensor) -> Tensor:
        """The derivative of `further` along S (n, k)."""
        assert self.further is not None

        def along(s: Tensor) -> Any:
            return jvp(lambda x: self.further(x, *given), (x,), (s,))[1]  # type: ignore[misc]

        return each(along, S, dim=1)

    def nearby(self, leaves: Leaves) -> Leaves:
        """Leaves (P, ...) as far from these as rounding errors are: what is computed from both differs by its own."""
        exact = 4 if self.linear else 3  # t, d, w, and the entries of J

        def moved(leaf: Tensor) -> Tensor:
            return leaf * (1 + self.arithmetic * noise(leaf[:1])) if leaf.is_floating_point() else leaf

        return (*leaves[:exact], *(moved(leaf) for leaf in leaves[exact:]))

    def slopes(self, x: Tensor, t: Tensor, d: Tensor, w: Tensor, *given: Tensor) -> Tensor:
        """The values of J."""
        return self.jacobian(x, *given)

    def slopes_by_rows(self, x: Tensor, t: Tensor, d: Tensor, w: Tensor, *given: Tensor) -> Tensor:
        """The same where J is `whole`, from a gradient for each residual."""
        return torch.func.jacrev(lambda x: self.residual(x, *given))(x).flatten()

    def weights(self, r: Tensor, leaves: Leaves) -> Tensor:
        """(P, m), of the parabolas that touch the loss in r."""
        return self.loss.weight(r, leaves[2], leaves[0][:, None])


def each(function: Callable, *tensors: Tensor, dim: int = 0) -> Any:
    """`function` for each of P problems, which is the first dimension of all tensors, or for each column."""
    if tensors[0].shape[dim] == 1:  # with no more demands on the function than a single problem makes
        single = function(*(tensor.select(dim, 0) for tensor in tensors))
        return torch_pytree.tree_map(lambda result: result.unsqueeze(dim), single)
    return torch.vmap(function, dim, dim)(*tensors)


def slopes_at(objective: Objective, x: Tensor, leaves: Leaves) -> Tensor:
    """The values (P, nnz) of J at x (P, n).

    For few residuals by reverse mode, where torch takes half the time of forward mode or less; unless that gives NaN,
    as of what `torch.where` leaves out.
    """
    if objective.whole and len(x) * objective.pattern.shape[0] ** 2 <= _FEW:
        J = each(objective.slopes_by_rows, x, *leaves)
        if bool(J.isfinite().all()):
            return J
    return each(objective.slopes, x, *leaves)


def curvature_at(objective: Objective, x: Tensor, leaves: Leaves) -> Callable[[Tensor], Tensor]:
    """V -> H V for V (P, n, k), by the other mode of torch.func where one of them gives NaN."""
    product = objective.curvature(x, leaves)

    def along(V: Tensor) -> Tensor:
        nonlocal product
        HV = product(V)
        if objective.undefined or bool(HV.isfinite().all()) or not bool(V.isfinite().all()):
            return HV
        objective.forward = not objective.forward
        other = objective.curvature(x, leaves)
        if bool((of_other := other(V)).isfinite().all()):
            product = other
            return of_other
        objective.forward, objective.undefined = not objective.forward, True
        return HV

    return along


def linear_unknowns(objective: Objective, x: Tensor, leaves: Leaves) -> list[int]:
    """Unknowns in which together the residual of one problem, x (n,), is linear; those that come first go first.

    It is linear in x_j and x_k if neither's column of J changes along either; seen by finite differences.
    """
    n, columns = len(x), objective.pattern.indices[1]
    if n > 64:  # it would take n Jacobians
        return []
    J = objective.slopes(x, *leaves)

    def sums(entries: Tensor) -> Tensor:
        here = J.new_zeros(n).scatter_reduce_(0, columns, entries.abs(), "amax", include_self=True)
        return objective.rows.largest_of_each(here)

    moves = torch.diag(torch.where(x != 0, 0.01 * x.abs(), 0.01))
    size = sums(J)
    fixed = torch.stack([sums(objective.slopes(x + e, *leaves) - J) <= 1e-10 * size for e in moves])
    chosen: list[int] = []
    for j in range(n):
        if all(bool(fixed[j, k] & fixed[k, j]) for k in (*chosen, j)):
            chosen.append(j)
    return chosen
