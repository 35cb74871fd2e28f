"""Differentiable sparse least squares, as pure functions for torch.func."""

from . import command as _command  # noqa: F401 (first: a signal may come while torch is imported)
from .diagnostics import condition, covariance, covariance_diagonal, jacobian_operator, leave_one_out, leverage
from .errors import ConvergenceError, RankDeficientError, TooLarge
from .fits import FitInfo
from .gauss_newton import gauss_newton
from .generic import sparse_generic_lstsq
from .losses import Cauchy, Huber
from .lstsq import lstsq, solve
from .matrix import SparseMatrix
from .operator import JacobianOperator, LinearOperator
from .pattern import SparsePattern
from .result import Solution, SolveInfo
from .solvers import CGLS, Auto, BlockJacobi, Dense, Direct, GramFactor
from .variable_projection import SeparableFit, variable_projection

__version__ = "0.1.0"
__all__ = [
    "CGLS",
    "Auto",
    "BlockJacobi",
    "Cauchy",
    "ConvergenceError",
    "Dense",
    "Direct",
    "FitInfo",
    "GramFactor",
    "Huber",
    "JacobianOperator",
    "LinearOperator",
    "RankDeficientError",
    "SeparableFit",
    "Solution",
    "SolveInfo",
    "SparseMatrix",
    "SparsePattern",
    "TooLarge",
    "condition",
    "covariance",
    "covariance_diagonal",
    "gauss_newton",
    "jacobian_operator",
    "leave_one_out",
    "leverage",
    "lstsq",
    "solve",
    "sparse_generic_lstsq",
    "variable_projection",
]
