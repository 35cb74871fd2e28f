"""Models of a fit over ranks, as `fits.model` has them: by few sums over ranks, each of which waits for all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..fits.model import Model, SmallModel
from ..fits.objective import Leaves, Objective
from ..solvers import Auto
from ..sparse.lazy import lazy
from ..sparse.numerics import noise

_NARROW, _MOST = 500, 2**27  # unknowns, and entries of a dense Jacobian of all ranks, up to which its triangle is taken
_ROUGH = 1e-7  # smallest eigenvalue of J^T J, scaled, down to which rounding leaves its triangle enough


class StackedModel(SmallModel):
    """The same for rows in many places: the triangle R of W^(1/2) J = Q R, which all have, stands for it.

    Q^T is not applied to residuals, but J^T: what that loses to rounding only makes a step a little worse.
    """

    def damped(self, scale: Tensor, mu: Tensor) -> Callable[[Tensor], Tensor]:
        _, s, Vh = torch.linalg.svd(self.dense / scale[:, None], full_matrices=False)

        def step(r: Tensor) -> Tensor:
            c = self.A.adjoint((self.root * r)[:, :, None]) / scale[:, :, None]
            return -(Vh.mT @ ((Vh @ c) / (s.square() + mu[:, None])[:, :, None]))[:, :, 0] / scale

        return step

    @lazy
    def norms(self) -> Tensor:
        return torch.linalg.vector_norm(self.dense, dim=1)

    @lazy
    def dense(self) -> Tensor:
        """R: of J^T W J, which takes one sum, where that will do."""
        gram = self.A.gram()
        sizes = gram.diagonal(dim1=1, dim2=2).sqrt()
        sizes = torch.where(sizes > 0, sizes, 1.0)
        scaled = gram / sizes[:, :, None] / sizes[:, None]
        if bool(scaled.isfinite().all()):
            L, failed = torch.linalg.cholesky_ex(scaled)
            if not bool((failed > 0).any()) and bool((torch.linalg.eigvalsh(scaled)[:, 0] > _ROUGH).all()):
                return L.mT * sizes[:, None]
        here = self.of_rows()
        padded = torch.cat([here, here.new_zeros((len(here), here.shape[2], here.shape[2]))], 1)
        return self.A.stacked(torch.linalg.qr(padded, mode="r").R)


class IteratedModel(Model):
    """Of rows in many places, where a solve that iterates waits for others as often as so many products with H do.

    So these products are preconditioned by the norms of columns alone.
    """

    @lazy
    def sizes(self) -> Tensor:
        return torch.where(self.norms > 0, self.norms, 1.0)

    @lazy
    def iterates(self) -> bool:
        """Whether solves iterate, or have no answer, for a right-hand side that shows a J without full rank."""
        self.inverse((self.sizes * noise(self.sizes, 1))[:, :, None])
        return self.told.iterated or bool(self.told.deficient.any())

    def preconditioner(self, x: Tensor, leaves: Leaves) -> Callable[[Tensor], Tensor]:
        squares = self.sizes.square()[:, :, None]
        return (lambda c: c / squares) if self.iterates else self.inverse

    def probe(self, x: Tensor, leaves: Leaves) -> Tensor:
        return self.sizes * noise(x, 1) if self.iterates else super().probe(x, leaves)


def model_of_ranks(objective: Objective, copies: int) -> type[Model]:
    """The one for so many problems."""
    m, n = objective.pattern.shape
    narrow = n <= _NARROW and copies * objective.rows.height(m) * n <= _MOST
    return StackedModel if narrow and isinstance(objective.settings.solver, Auto) else IteratedModel
