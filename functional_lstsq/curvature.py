"""Linear systems with the curvature H of an objective: conjugate gradients, preconditioned by a Gauss-Newton model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import ConvergenceError
from .holder import by_name
from .kernel import solve_kernel
from .lazy import lazy
from .objective import Leaves, Objective, each
from .products import Operator
from .result import RANK_DEFICIENT, Report
from .solvers import Auto
from .solvers.system import EPS, column_sizes, dot, tolerance_of

_CORRECTIONS = 8
_SMALL, _ENTRIES = 64, 2**20
_FLAT = 1e-12  # curvature, relative to that of the model, that is taken for none
_TINY = torch.finfo(torch.float64).tiny


class Told(NamedTuple):
    """What is known of a model's matrix, (P,) each."""

    deficient: Tensor
    condition: Tensor
    rank: Tensor
    norm: Tensor


@dataclass
class Model:
    """The quadratic model |W^(1/2) (r + J p)|^2 / 2 + d^2 |x + p|^2 / 2 of P problems; M = J^T W J + d^2."""

    objective: Objective
    values: Tensor  # of W^(1/2) J
    root: Tensor  # W^(1/2)
    d: Tensor
    token: Tensor | None = None  # by which the factors of M are found again
    told: Told = field(init=False)  # once something is solved for

    def take(self, which: Tensor) -> Model:
        """Some of the problems."""
        if bool(which.all()):
            return self
        return replace(self, values=self.values[which], root=self.root[which], d=self.d[which], token=None)

    @lazy
    def A(self) -> Operator:
        """W^(1/2) J"""
        return Operator(self.objective.pattern, self.values)

    @lazy
    def norms(self) -> Tensor:
        """Of the columns of W^(1/2) J, (P, n)."""
        columns = self.objective.pattern.indices[1].expand_as(self.values)
        largest, squares = column_sizes(self.values.abs(), columns, None, self.objective.pattern.shape[1])
        return largest * squares.sqrt()

    @lazy
    def _sizes(self) -> Operator:
        return self.A.absolute()

    def adjoint(self, y: Tensor) -> Tensor:
        """J^T y for y (P, m)."""
        return self.A.adjoint((y / self.root)[:, :, None])[:, :, 0]

    def gradient(self, r: Tensor, x: Tensor) -> Tensor:
        """J^T W r + d^2 x"""
        return self.A.adjoint((self.root * r)[:, :, None])[:, :, 0] + self.d.square()[:, None] * x

    def magnitude(self, x: Tensor) -> Tensor:
        """|J| |x|"""
        return self._sizes.matmul(x.abs()[:, :, None])[:, :, 0] / self.root

    def adjoint_magnitude(self, y: Tensor) -> Tensor:
        """|J|^T |y|"""
        return self._sizes.adjoint((y.abs() / self.root)[:, :, None])[:, :, 0]

    def damped(self, r: Tensor, scale: Tensor, mu: Tensor) -> Tensor:
        """The step to the minimum of the model with mu |scale p|^2 / 2 added, for d = 0."""
        columns = self.objective.pattern.indices[1]
        once = replace(self, token=None)
        q = once._solve(self.values / scale[:, columns], mu.sqrt(), -(self.root * r)[:, :, None], None)
        return q[:, :, 0] / scale

    def inverse(self, c: Tensor) -> Tensor:
        """M^-1 c for c (P, n, k); NaN where there is none."""
        return -self._solve(self.values, self.d if bool((self.d != 0).any()) else None, None, c)

    def _solve(self, values: Tensor, damp: Tensor | None, b: Tensor | None, c: Tensor | None) -> Tensor:
        pattern, settings = self.objective.pattern, self.objective.settings
        m, n = pattern.shape
        plainly = (None if t is None else t.contiguous() for t in (values, None, damp, b, None, c))
        _, x, report, token = solve_kernel(*plainly, None, self.token, pattern.indices, m, n, settings, "return")
        self.token = token if self.token is None else self.token
        report = Report(*report[:, :, 0].unbind(1))
        self.told = Told(report.status == RANK_DEFICIENT, report.condition, report.rank, report.norm)
        return x


class SmallModel(Model):
    """The same by dense singular values, for problems in which a solve's own tests would take most of the time."""

    def damped(self, r: Tensor, scale: Tensor, mu: Tensor) -> Tensor:
        U, s, Vh = torch.linalg.svd(self._dense / scale[:, None], full_matrices=False)
        filtered = s / (s.square() + mu[:, None])
        q = Vh.mT @ (filtered[:, :, None] * (U.mT @ (self.root * r)[:, :, None]))
        return -q[:, :, 0] / scale

    def inverse(self, c: Tensor) -> Tensor:
        s, Vh, scale, self.told = self._factors
        good = torch.where(self.told.deficient[:, None], torch.nan, s)
        return Vh.mT @ ((Vh @ (c / scale)) / good[:, :, None].square()) / scale

    @lazy
    def _dense(self) -> Tensor:
        m, n = self.objective.pattern.shape
        rows, columns = self.objective.pattern.indices
        flat = self.values.new_zeros((len(self.values), m * n))
        return flat.scatter_add_(1, (rows * n + columns).expand_as(self.values), self.values).view(-1, m, n)

    @lazy
    def _factors(self) -> tuple[Tensor, Tensor, Tensor, Told]:
        """Singular values and right vectors of [W^(1/2) J; d] scale^-1."""
        A = self._dense
        m, n = A.shape[1:]
        if bool((self.d != 0).any()):
            A = torch.cat([A, self.d[:, None, None] * torch.eye(n, dtype=A.dtype, device=A.device)], 1)
        scale = torch.linalg.vector_norm(A, dim=1)
        scale = torch.where(scale > 0, scale, 1.0)
        _, s, Vh = torch.linalg.svd(A / scale[:, None], full_matrices=False)
        rank = (s > tolerance_of(self.objective.precision, m, n) * s[:, :1]).sum(1).to(s.dtype)
        told = Told(rank < n, s[:, 0] / s[:, -1], rank, torch.linalg.matrix_norm(A))
        return s, Vh, scale[:, :, None], told


def model_at(objective: Objective, J: Tensor, weights: Tensor, leaves: Leaves, token: Tensor | None = None) -> Model:
    """The model for the Jacobian's values J (P, nnz) and the weights (P, m)."""
    root = weights.sqrt()
    m, n = objective.pattern.shape
    small = n <= _SMALL and len(J) * m * n <= _ENTRIES and isinstance(by_name(objective.settings).solver, Auto)
    kind = SmallModel if small else Model
    return kind(objective, root[:, objective.pattern.indices[0]] * J, root, leaves[1], token)


def relative(e: Tensor, x: Tensor, scale: Tensor, least: Tensor | float = 0.0) -> Tensor:
    """The size of e beside x, as they are or scaled by the norms of columns, whichever is larger.

    An x whose scaled norm is below `least` is zero but for rounding, and has no relative errors of its own.
    """
    of_e, of_x = (torch.linalg.vector_norm(scale * t, dim=1) for t in (e, x))
    scaled = of_e / torch.clamp(of_x, min=least).clamp_min(_TINY)
    plain = torch.linalg.vector_norm(e, dim=1) / torch.linalg.vector_norm(x, dim=1).clamp_min(_TINY)
    return torch.where(of_x > least, torch.maximum(plain, scaled), scaled)


def conjugate(
    objective: Objective, x: Tensor, leaves: Leaves, model: Model, c: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, int]:
    """(H^-1 c (P, n, k), whether it was found, H being positive definite on the way (P, k), products per problem).

    Args:
        tolerance: by how much the error is to shrink, in the norm of M.
    """
    finite = c.isfinite().all(1)
    s, residual = torch.zeros_like(c), torch.where(finite[:, None], c, 0.0)
    z = model.inverse(residual)
    rho = dot(z, residual)
    first, p, length = rho, z, rho
    definite = finite & rho.isfinite() & (rho >= 0)
    live = definite & (rho > 0)
    products = 0
    for _ in range(2 * c.shape[1] + 20):
        if not bool(live.any()):
            break
        Hp = each(objective.curvature, p, x, *leaves)
        products += c.shape[2]
        curved = dot(p, Hp)
        definite = definite & (~live | (curved > _FLAT * length))
        live = live & definite
        step = torch.where(live, rho / torch.where(live, curved, 1.0), 0.0)[:, None]
        s, residual = s + step * p, residual - step * Hp
        z = model.inverse(residual)
        new = dot(z, residual)
        live = live & (new > tolerance**2 * first)
        ratio = torch.where(live, new / torch.where(live, rho, 1.0), 0.0)
        p = torch.where(live[:, None], z + ratio[:, None] * p, p)
        rho, length = torch.where(live, new, rho), torch.where(live, new + ratio.square() * length, length)
    return s, definite & ~live, products


def solve_curvature(objective: Objective, c: Tensor, x: Tensor, token: Tensor | None, leaves: Leaves) -> Tensor:
    """H^-1 c for c (P, n, k), refined until nothing changes but rounding.

    Raises:
        ConvergenceError: a last correction above what is accepted, or an H that is not positive definite (NaN for
            these, unless on_failure is "raise").
    """
    finite = c.isfinite().all(1, keepdim=True)
    if objective.on_failure == "raise" and not bool(finite.all()):
        raise ValueError(f"a derivative that is taken through {objective.name} must be finite, got NaN or infinity")
    c = torch.where(finite, c, 0.0)
    size = c.abs().amax(1, keepdim=True)
    c = c / torch.where(size > 0, size, 1.0)
    _, r = each(objective.cost, x, *leaves)
    weights, J = objective.weights(r, leaves), each(objective.slopes, x, *leaves)
    usable = (J.isfinite().all(1) & weights.isfinite().all(1))[:, None]  # not so where there was no minimum
    model = model_at(objective, J.where(usable, 0.0), weights.where(usable, 1.0), leaves, token)
    scale, s, residual = model.norms[:, :, None], torch.zeros_like(c), c
    error = torch.full_like(c[:, 0], torch.inf)
    definite = torch.ones_like(error, dtype=torch.bool)
    for step in range(_CORRECTIONS):
        d, seen, _ = conjugate(objective, x, leaves, model, residual, 1e-8)
        definite = definite & seen
        moved = relative(d, s + d, scale)
        better = moved < (error / 2 if step else torch.inf)
        s = torch.where(better[:, None], s + d, s)
        error = torch.where(better | (moved > error), moved, error)
        if not bool((better & (moved > 4 * EPS)).any()):
            break
        residual = c - each(objective.curvature, s, x, *leaves)
    failed = ~(definite & (error <= objective.accept))
    if objective.on_failure == "raise" and bool(failed.any()):
        worst = float(torch.where(definite, error, torch.inf).max())
        raise ConvergenceError(
            f"{objective.name} found a minimum, but its derivative has an estimated relative error of {worst:.1e}, "
            f"above what is accepted, {objective.accept:.1e}; condition number of the Jacobian about "
            f"{float(model.told.condition.max()):.1e}",
            "rescale or remove parameters that do nearly the same",
        )
    return torch.where(failed[:, None] | ~finite, torch.nan, s * size)
