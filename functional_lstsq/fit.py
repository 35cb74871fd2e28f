"""`Fit`: what `gauss_newton` gives back, and what it says of its unknowns: covariance, standard errors, Jacobian.

Where residuals have independent errors of variance scale / weights, the unknowns have the covariance

    scale (J^T W J)^-1           J = dr / dx at the minimum, scale = sum_i w_i r_i^2 / (m - n) where it is not known

(Seber and Wild, Nonlinear Regression, Wiley 1989, section 2.1; NIST's certified standard deviations are of this kind.)
For a robust loss it is the sandwich of M-estimates, H^-1 J^T diag(psi^2) J H^-1 m / (m - n), with the second
derivatives H of the sum of losses, psi those of the losses by the residuals (Huber, Robust Statistics, Wiley 1981,
section 6.3): consistent whatever the distribution of the residuals, symmetric ones as a rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .diagnostics import checked_columns, covariance, covariance_diagonal
from .fits.losses import Square
from .fits.minimum import SolveCurvature
from .fits.objective import Leaves, Objective
from .hat_matrix import BLOCK
from .result import Solution
from .sparse.matrix import SparseMatrix
from .sparse.precision import convert
from .torch_func.tracing import concrete


# Not a tuple, which torch.func would take apart at every call.
@dataclass(eq=False, frozen=True)
class Study:
    """A minimum with all that it is a function of."""

    objective: Objective
    x: Tensor
    leaves: Leaves
    blur: Tensor
    token: Tensor
    dtype: torch.dtype
    bounded: Objective | None = None  # of all unknowns, where the one above is of those that are not at their bounds

    def jacobian(self) -> SparseMatrix:
        """In double precision; of a bounded fit with a row for each unknown, see `fits.bounded`."""
        return SparseMatrix(self.objective.slopes(self.x, *self.leaves), self.objective.pattern)

    def jacobian_of_residual(self) -> SparseMatrix:
        """By all unknowns."""
        if self.bounded is None:
            return self.jacobian()
        given = self.leaves[5:]  # behind the threshold, the damping, the weights, the set and its bounds
        return SparseMatrix(self.bounded.jacobian(self.x, *given), self.bounded.pattern)

    def free(self) -> Tensor:
        """(n,), 0 for unknowns at their bounds, which have no variance, else 1."""
        return torch.ones_like(self.x) if self.bounded is None else (self.leaves[3] == 0).to(self.x.dtype)

    def degrees(self) -> Tensor:
        """Residuals that count, less unknowns that are not at a bound."""
        return (self.leaves[2] > 0).sum() - self.x.shape[0]

    def robust(self) -> bool:
        return type(self.objective.loss) is not Square

    def scale(self, scale: Any) -> Tensor | float:
        """The variance of a residual of weight 1, as given or estimated."""
        if scale is None:
            r, w = self.objective.residual(self.x, *self.leaves[3:]), self.leaves[2]
            return (w * r.square()).sum() / self.positive_degrees()
        number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if not number and not (isinstance(scale, Tensor) and scale.ndim == 0 and scale.is_floating_point()):
            got = f"shape {tuple(scale.shape)}, {scale.dtype}" if isinstance(scale, Tensor) else repr(scale)
            raise TypeError(f"scale must be None, a number or a 0-d real tensor, got {got}")
        every = concrete(torch.as_tensor(scale))
        if not bool(((every >= 0) & every.isfinite()).all()):
            raise ValueError(f"scale must be a variance, finite and not negative, got {float(every.min()):g}")
        if self.robust():
            raise ValueError(f"scale must be None for a robust fit, whose sandwich needs none, got {float(every):g}")
        return scale

    def positive_degrees(self) -> Tensor:
        degrees = self.degrees()
        if bool((concrete(degrees) <= 0).any()):
            (m, n), counted = self.objective.pattern.shape, int(concrete(degrees).min()) + self.x.shape[0]
            raise ValueError(
                f"scale must be given: {m} residuals, {counted} of them of positive weight, leave no degree of freedom "
                f"to {n} unknowns"
            )
        return degrees.to(self.x.dtype)

    def of_small_samples(self) -> Tensor:
        """(m / (m - n))^(1/2), of residuals that count and unknowns that are free."""
        degrees = self.positive_degrees()
        return ((degrees + self.free().sum()) / degrees).sqrt()

    def solved(self, c: Tensor) -> Tensor:
        """H^-1 c for c (n, k)."""
        u = c.new_zeros((self.objective.pattern.shape[0], c.shape[1]))
        every = (u[None], -c[None], None, self.x[None], self.blur, self.token)
        return SolveCurvature.apply(self.objective, *every, *(leaf[None] for leaf in self.leaves))[0]

    def spread(self, columns: Tensor) -> Tensor:
        """diag(psi) J H^-1 (m, k), for columns of H^-1, times what small samples ask for."""
        n = self.x.shape[0]
        unit = torch.nn.functional.one_hot(columns, n).T.to(self.x.dtype)
        psi = self.objective.influence(self.x, *self.leaves)
        return self.of_small_samples() * psi[:, None] * self.jacobian().matmul(self.solved(unit))


class Fit(Solution):
    """x, the residual and `info` of a nonlinear fit, a NamedTuple; and what the fit says of its unknowns, when asked.

    What is asked is asked where the fit is made: under `torch.vmap`, inside of the function that is mapped. A copy, a
    fit that was saved, and one that has left vmap hold x, the residual and info, no more.

    >>> import torch, functional_lstsq as fl
    >>> t = torch.arange(5.0, dtype=torch.float64)
    >>> y = torch.tensor([2.0, 1.3, 0.7, 0.5, 0.3], dtype=torch.float64)
    >>> fit = fl.gauss_newton(lambda x, y: x[0] * torch.exp(-x[1] * t) - y, torch.ones(2, dtype=torch.float64), (y,))
    >>> fit.x, fit.standard_errors(), int(fit.dof)
    (tensor([2.0133, 0.4804], dtype=torch.float64), tensor([0.0506, 0.0237], dtype=torch.float64), 3)
    >>> fit.jacobian.shape
    (5, 2)
    """

    _study: Study | None = None

    def _repr_html_(self) -> str:
        return super()._repr_html_() if all(isinstance(part, Tensor) for part in self[:2]) else self.info._repr_html_()

    def with_study(self, study: Study) -> Fit:
        """Itself, able to tell of its unknowns."""
        self._study = study
        return self

    def __reduce__(self) -> tuple:
        return Fit, tuple(self)

    def _asked(self) -> Study:
        if self._study is None:
            raise ValueError(
                "this fit holds x, residual and info alone, since it was copied, loaded, or returned from a function "
                "that vmap maps: ask for the rest where gauss_newton was called"
            )
        return self._study

    @property
    def dof(self) -> Tensor:
        """Degrees of freedom: how many residuals have a positive weight, less the number of unknowns that are not at a
        bound; 0-d integer.
        """
        return self._asked().degrees()

    @property
    def jacobian(self) -> SparseMatrix:
        """The Jacobian (m, n) of the residual, without weights, at x: a SparseMatrix, differentiable as x is.

        Cost: one Jacobian.
        """
        J = self._asked().jacobian_of_residual()
        return SparseMatrix(self._rounded(J.values, "the Jacobian"), J.pattern)

    def covariance(self, scale: float | Tensor | None = None, columns: Tensor | list[int] | None = None) -> Tensor:
        """The covariance of x, differentiable as x is: scale (J^T W J)^-1, or the sandwich of a robust fit.

        Unknowns at their bounds have none: zeros, and the others that of a fit in which these are known.

        Args:
            scale: the variance of a residual of weight 1; None estimates it by sum(weights residual^2) / dof. 1 where
                weights are 1 / variance or `sigma` was given (`absolute_sigma=True` of `scipy.optimize.curve_fit`).
                None for a robust fit.
            columns: which, (k,) integers; None for all.

        Returns:
            (n, n), or (n, k).

        Raises:
            TypeError, ValueError: a scale that is no variance, or that cannot be estimated, for want of degrees of
                freedom or of what a copy lacks; a column that is not there.
            RankDeficientError, ConvergenceError: the Jacobian has no full rank, as `fl.covariance` has it.

        Cost: one Jacobian, one factorisation and k solves; of a robust fit 2 k solves with the Hessian matrix.

        >>> import torch, functional_lstsq as fl
        >>> line = lambda x, y: x[0] + x[1] * torch.arange(3.0, dtype=torch.float64) - y
        >>> y = torch.tensor([0.0, 1.0, 2.3], dtype=torch.float64)
        >>> fl.gauss_newton(line, torch.zeros(2, dtype=torch.float64), (y,)).covariance(scale=0.01)
        tensor([[ 0.0083, -0.0050],
                [-0.0050,  0.0050]], dtype=torch.float64)
        """
        study = self._asked()
        n = study.x.shape[0]
        which = checked_columns(range(n) if columns is None else columns, n, study.x.device)
        variance = None if study.robust() and scale is None else study.scale(scale)
        if variance is None:
            J, psi = study.jacobian(), study.objective.influence(study.x, *study.leaves)
            found = study.solved(J.T.matmul(psi[:, None] * study.spread(which)))
            found = found * study.of_small_samples()
        else:
            found = variance * covariance(study.jacobian(), which, study.leaves[2], solver=self._solver())
        free = study.free()
        return self._rounded(free[:, None] * free[which] * found, "the covariance")

    def standard_errors(self, scale: float | Tensor | None = None) -> Tensor:
        """The square roots of the diagonal of `covariance`, (n,), which is not formed: in blocks of 256 columns.

        Args and errors: as `covariance`.

        Cost: one Jacobian, one factorisation and n solves; of a robust fit n solves with the Hessian matrix.

        >>> import torch, functional_lstsq as fl
        >>> line = lambda x, y: x[0] + x[1] * torch.arange(3.0, dtype=torch.float64) - y
        >>> y = torch.tensor([0.0, 1.0, 2.3], dtype=torch.float64)
        >>> fl.gauss_newton(line, torch.zeros(2, dtype=torch.float64), (y,)).standard_errors()
        tensor([0.1118, 0.0866], dtype=torch.float64)
        """
        study = self._asked()
        if study.robust():
            if scale is not None:
                study.scale(scale)
            blocks = torch.arange(study.x.shape[0], device=study.x.device).split(BLOCK)
            errors = torch.cat([torch.linalg.vector_norm(study.spread(block), dim=0) for block in blocks])
        else:
            variance = study.scale(scale)
            errors = (variance * covariance_diagonal(study.jacobian(), study.leaves[2], solver=self._solver())).sqrt()
        return self._rounded(study.free() * errors, "the standard errors")

    def _solver(self) -> Any:
        return self._asked().objective.settings.solver

    def _rounded(self, result: Tensor, name: str) -> Tensor:
        study = self._asked()
        return convert(result, study.dtype, f"the derivative of {name}", study.objective.on_failure)


torch.serialization.add_safe_globals([Fit])  # torch.load takes it
