"""The quadratic model of an objective at a point, by its Jacobian, and what it says of the curvature H there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..result import RANK_DEFICIENT, Report, method_code
from ..solvers import Auto
from ..solvers.system import EPS, tolerance_of
from ..sparse.base import Products
from ..sparse.lazy import lazy
from ..sparse.numerics import noise
from .objective import Leaves, Objective, curvature_at

_POOR = 1e-6  # singular values of J, relative, below which H may differ much from J^T J
_SEEN, _HELD = 1e-14, 1e4  # curvatures of H that are no rounding errors; and what H is held against where J vanishes
_TINY = torch.finfo(torch.float64).tiny


class Told(NamedTuple):
    """What is known of a model's matrix, (P,) each."""

    deficient: Tensor
    condition: Tensor
    rank: Tensor
    norm: Tensor
    iterated: bool = False


@dataclass
class Model:
    """The quadratic model |W^(1/2) (r + J p)|^2 / 2 + d^2 |x + p|^2 / 2 of P problems; M = J^T W J + d^2."""

    objective: Objective
    slopes: Tensor  # the values of J
    values: Tensor  # of W^(1/2) J
    root: Tensor  # W^(1/2)
    d: Tensor
    token: Tensor | None = None  # by which the factors of M are found again
    told: Told = field(init=False)  # once something is solved for

    def take(self, which: Tensor) -> Model:
        """Some of the problems."""
        if bool(which.all()):
            return self
        parts = {name: getattr(self, name)[which] for name in ("slopes", "values", "root", "d")}
        return replace(self, token=None, **parts)

    @lazy
    def A(self) -> Products:
        """W^(1/2) J"""
        return self.objective.rows.operator(self.objective.pattern, self.values)

    @lazy
    def J(self) -> Products:
        """Without the weights, some of which may be zero."""
        return self.objective.rows.operator(self.objective.pattern, self.slopes)

    @lazy
    def norms(self) -> Tensor:
        """Of the columns of W^(1/2) J, (P, n)."""
        largest, squares = self.A.column_sizes(None)
        return largest * squares.sqrt()

    def adjoint(self, y: Tensor) -> Tensor:
        """J^T y for y (P, m)."""
        return self.J.adjoint(y[:, :, None])[:, :, 0]

    def gradient(self, r: Tensor, x: Tensor) -> Tensor:
        """J^T W r + d^2 x"""
        return self.A.adjoint((self.root * r)[:, :, None])[:, :, 0] + self.d.square()[:, None] * x

    def magnitude(self, x: Tensor) -> Tensor:
        """|J| |x|"""
        return self.J.absolute_matmul(x.abs()[:, :, None])[:, :, 0]

    def adjoint_magnitude(self, y: Tensor) -> Tensor:
        """|J|^T |y|"""
        return self.J.absolute_adjoint(y.abs()[:, :, None])[:, :, 0]

    def rounding(self, y: Tensor, size: Tensor, seed: int = 0) -> Tensor:
        """A sample (P, n, k) of the rounding errors in J^T y, for y (P, m, k) that has some of the sizes eps size."""
        eps = self.objective.arithmetic
        c = self.J.adjoint(eps * size * noise(size, seed))
        if self.objective.linear:  # J has no errors, and the product none but those of y
            return c
        return c + eps * self.J.absolute_adjoint(y.abs()) * noise(c, seed)

    def along(self, p: Tensor) -> Tensor:
        """J p for p (P, n)."""
        return self.J.matmul(p[:, :, None])[:, :, 0]

    def damped(self, scale: Tensor, mu: Tensor) -> Callable[[Tensor], Tensor]:
        """r -> the p that makes |W^(1/2) (r + J p)|^2 + mu |scale p|^2 least, from one factor, for d = 0."""
        columns = self.objective.pattern.indices[1]
        values, once = self.values / scale[:, columns], replace(self, token=None)

        def step(r: Tensor) -> Tensor:
            # The cost says what a step is worth, so none needs an estimate of its error.
            return once._solve(values, mu.sqrt(), -(self.root * r)[:, :, None], None, "accept")[:, :, 0] / scale

        return step

    def inverse(self, c: Tensor) -> Tensor:
        """M^-1 c for c (P, n, k), or M^+ c where that is asked for; NaN where there is none."""
        return -self._solve(self.values, self.d if bool((self.d != 0).any()) else None, None, c)

    def preconditioner(self, x: Tensor, leaves: Leaves) -> Callable[[Tensor], Tensor]:
        """c -> about H^-1 c, H being that at x."""
        return self.inverse

    def determined(self, p: Tensor) -> Tensor:
        """p (P, n, k) without its part in the null space of W^(1/2) J, along which the cost is taken not to change."""
        return self.inverse(self.A.adjoint(self.A.matmul(p))) if self.objective.settings.minimum_norm else p

    def is_gauge(self, x: Tensor, leaves: Leaves) -> Tensor:
        """Whether H vanishes along the null space of J, as where the cost does not change at all (P,)."""
        N = torch.where(self.norms > 0, self.norms, 1.0)[:, :, None]
        v = noise(x, 3)[:, :, None] / N
        null = v - self.determined(v)
        product, size = curvature_at(self.objective, x, leaves)(null), torch.linalg.vector_norm(N * null, dim=1)
        seen = size > _POOR * torch.linalg.vector_norm(N * v, dim=1)  # what is smaller is rounding of a full rank
        return (~seen | (torch.linalg.vector_norm(product / N, dim=1) <= _POOR * size))[:, 0]

    def probe(self, x: Tensor, leaves: Leaves) -> Tensor:
        """A c (P, n) with as large a part in every direction, in the norm of what preconditions."""
        return self.adjoint(self.root * noise(self.root, 1)) + self.d[:, None] * noise(x, 2)

    def _solve(
        self, values: Tensor, damp: Tensor | None, b: Tensor | None, c: Tensor | None, on_failure: str = "return"
    ) -> Tensor:
        pattern, settings = self.objective.pattern, self.objective.settings
        static = self.objective.rows.static(*pattern.shape, settings, on_failure)
        damp = None if damp is None else damp[:, None]
        plainly = (None if t is None else t.contiguous() for t in (values, None, damp, b, None, c))
        _, _, x, numbers, token = static.solve([*plainly, None], self.token, pattern.indices)
        self.token = token if self.token is None else self.token
        report = Report(*(field[:, 0] for field in Report.unpacked(numbers[:, :, :1])))
        iterated = bool((report.method == method_code("cgls")).all())
        self.told = Told(report.status == RANK_DEFICIENT, report.condition, report.rank, report.norm, iterated)
        return x


class SmallModel(Model):
    """The same by dense singular values, for problems in which a solve's own tests would take most of the time."""

    def damped(self, scale: Tensor, mu: Tensor) -> Callable[[Tensor], Tensor]:
        U, s, Vh = torch.linalg.svd(self.dense / scale[:, None], full_matrices=False)
        filtered = s / (s.square() + mu[:, None])

        def step(r: Tensor) -> Tensor:
            q = Vh.mT @ (filtered[:, :, None] * (U.mT @ (self.root * r)[:, :, None]))
            return -q[:, :, 0] / scale

        return step

    def inverse(self, c: Tensor) -> Tensor:
        s, Vh, scale, self.told = self._factors
        if self.objective.settings.minimum_norm:
            return self.determined(self._pseudoinverse(self.determined(c)))
        good = torch.where(self.told.deficient[:, None], torch.nan, s)
        return Vh.mT @ ((Vh @ (c / scale)) / good[:, :, None].square()) / scale

    def _pseudoinverse(self, c: Tensor) -> Tensor:
        """G c with M G M = M; between projections off the null space that is M^+ c."""
        s, Vh, scale, _ = self._factors
        kept = torch.where(self._lost, torch.inf, s)
        return Vh.mT @ ((Vh @ (c / scale)) / kept[:, :, None].square()) / scale

    def determined(self, p: Tensor) -> Tensor:
        """p (P, n, k) without its part in the null space."""
        if not self.objective.settings.minimum_norm or not bool(self._lost.any()):
            return p
        return p - self._null @ (self._null.mT @ p)

    @lazy
    def _lost(self) -> Tensor:
        """Which singular values (P, n) are zero."""
        s = self._factors[0]
        return s <= self._tolerance * s[:, :1]

    @lazy
    def _null(self) -> Tensor:
        """An orthonormal basis of the null space, (P, n, n), of zeros where there are fewer vectors."""
        _, Vh, scale, _ = self._factors
        vectors = torch.where(self._lost[:, :, None], Vh, 0.0).mT / scale
        vectors = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp_min(_TINY)
        U, s, _ = torch.linalg.svd(vectors, full_matrices=False)
        return torch.where((s > _POOR * s[:, :1])[:, None], U, 0.0)

    @property
    def _tolerance(self) -> float:
        known = self.objective.settings.tolerance
        m, n = self.objective.pattern.shape
        return known or tolerance_of(self.objective.arithmetic, self.objective.rows.height(m), n)

    def preconditioner(self, x: Tensor, leaves: Leaves) -> Callable[[Tensor], Tensor]:
        sizes = None if self.objective.settings.minimum_norm else self._curvatures(x, leaves)
        if sizes is None:
            return self.inverse
        _, Vh, scale, _ = self._factors
        return lambda c: Vh.mT @ ((Vh @ (c / scale)) / sizes[:, :, None]) / scale

    def probe(self, x: Tensor, leaves: Leaves) -> Tensor:
        sizes = None if self.objective.settings.minimum_norm else self._curvatures(x, leaves)
        if sizes is None:
            return super().probe(x, leaves)
        _, Vh, scale, _ = self._factors
        return (scale * (Vh.mT @ (sizes.sqrt() * noise(x, 1))[:, :, None]))[:, :, 0]

    def _curvatures(self, x: Tensor, leaves: Leaves) -> Tensor | None:
        """Eigenvalues (P, n), along the singular vectors of J, of what stands for H; None where J^T J does.

        H = J^T psi' J + S may be positive definite though J has no full rank, as at every minimum of as many residuals
        as unknowns which are not all zero. So along weak singular vectors the curvature of H itself is taken; and where
        rounding errors are all that is left of J, it must be clearly positive, since no other evidence is left either.
        """
        s, Vh, scale, self.told = self._factors
        poor = ~(s[:, -1:] > _POOR * s[:, :1])
        # The products of linear fits have no second derivatives, those of single precision no such curvatures.
        if self.objective.linear or self.objective.arithmetic > EPS or not bool(poor.any()):
            return None
        V = Vh.mT / scale
        along = (V * curvature_at(self.objective, x, leaves)(V)).sum(1).abs()
        square, largest = s.square(), s[:, :1].square()
        sizes = torch.where(along > _SEEN * largest, torch.maximum(square, along), square)
        sizes = torch.where(self._lost, _HELD * torch.maximum(along, largest), sizes)
        return torch.where(poor, sizes, square).clamp_min(_TINY)

    @lazy
    def dense(self) -> Tensor:
        return self.of_rows()

    def of_rows(self) -> Tensor:
        """W^(1/2) J of the rows that are here."""
        m, n = self.objective.pattern.shape
        rows, columns = self.objective.pattern.indices
        flat = self.values.new_zeros((len(self.values), m * n))
        return flat.scatter_add_(1, (rows * n + columns).expand_as(self.values), self.values).view(
            len(self.values), m, n
        )

    @lazy
    def _factors(self) -> tuple[Tensor, Tensor, Tensor, Told]:
        """Singular values and right vectors of [W^(1/2) J; d] scale^-1."""
        A = self.dense
        n = A.shape[2]
        if bool((self.d != 0).any()):
            A = torch.cat([A, self.d[:, None, None] * torch.eye(n, dtype=A.dtype, device=A.device)], 1)
        scale = torch.linalg.vector_norm(A, dim=1)
        scale = torch.where(scale > 0, scale, 1.0)
        _, s, Vh = torch.linalg.svd(A / scale[:, None], full_matrices=False)
        seen = s > self._tolerance * s[:, :1]
        rank, least_norm = seen.sum(1).to(s.dtype), self.objective.settings.minimum_norm
        smallest = torch.where(seen, s, torch.inf).amin(1) if least_norm else s[:, -1]
        told = Told((rank < n) & (not least_norm), s[:, 0] / smallest, rank, torch.linalg.matrix_norm(A))
        return s, Vh, scale[:, :, None], told


def model_at(objective: Objective, J: Tensor, weights: Tensor, leaves: Leaves, token: Tensor | None = None) -> Model:
    """The model for the Jacobian's values J (P, nnz) and the weights (P, m)."""
    root = weights.sqrt()
    small = isinstance(objective.settings.solver, Auto) and objective.is_small(len(J))
    kind = objective.rows.model(objective, len(J)) or (SmallModel if small else Model)
    return kind(objective, J, root[:, objective.pattern.indices[0]] * J, root, leaves[1], token)
