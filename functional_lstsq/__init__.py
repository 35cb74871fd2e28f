"""Differentiable sparse least squares, as pure functions for torch.func."""

from .cli import command as _command  # noqa: F401 (first: a signal may come while torch is imported)

# isort: split
from . import distributed, plot
from .diagnostics import covariance, covariance_diagonal, leave_one_out, leverage
from .errors import ConvergenceError, RankDeficientError, TooLarge
from .fit import Fit
from .fits.losses import Arctan, Cauchy, Hampel, Huber, SoftL1, Tukey
from .fits.report import FitInfo, RobustInfo
from .gauss_newton import gauss_newton
from .kept_factors import factorize
from .linear.bounds import BoundedInfo
from .linear.factorization import Factorization
from .lstsq import lstsq, solve
from .result import Solution, SolveInfo
from .sensitivity import condition, jacobian_operator
from .solvers import CGLS, Auto, BlockJacobi, Dense, Direct, GramFactor
from .solvers.watching import progress
from .sparse.building import block_diag, diags, eye, hstack, vstack
from .sparse.jacobian_operator import JacobianOperator
from .sparse.matrix import SparseMatrix
from .sparse.operator import LinearOperator
from .sparse.pattern import SparsePattern
from .torchsparsegradutils import sparse_generic_lstsq
from .variable_projection import SeparableFit, variable_projection
from .weak_directions import Weakest, weakest

__version__ = "0.1.0"
__all__ = [
    "CGLS",
    "Arctan",
    "Auto",
    "BlockJacobi",
    "BoundedInfo",
    "Cauchy",
    "ConvergenceError",
    "Dense",
    "Direct",
    "Factorization",
    "Fit",
    "FitInfo",
    "GramFactor",
    "Hampel",
    "Huber",
    "JacobianOperator",
    "LinearOperator",
    "RankDeficientError",
    "RobustInfo",
    "SeparableFit",
    "SoftL1",
    "Solution",
    "SolveInfo",
    "SparseMatrix",
    "SparsePattern",
    "TooLarge",
    "Tukey",
    "Weakest",
    "block_diag",
    "condition",
    "covariance",
    "covariance_diagonal",
    "diags",
    "distributed",
    "eye",
    "factorize",
    "gauss_newton",
    "hstack",
    "jacobian_operator",
    "leave_one_out",
    "leverage",
    "lstsq",
    "plot",
    "progress",
    "solve",
    "sparse_generic_lstsq",
    "variable_projection",
    "vstack",
    "weakest",
]


def __dir__() -> list[str]:
    """The public names alone; the modules that are attributes too are the way of the package, not of its users."""
    return __all__
