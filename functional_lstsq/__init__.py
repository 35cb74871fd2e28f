"""Differentiable sparse least squares, as pure functions for torch.func."""

from .diagnostics import condition, covariance, covariance_diagonal, jacobian_operator, leave_one_out, leverage
from .generic import sparse_generic_lstsq
from .lstsq import lstsq, solve
from .matrix import SparseMatrix
from .operator import JacobianOperator, LinearOperator
from .pattern import SparsePattern
from .result import ConvergenceError, RankDeficientError, Solution, SolveInfo
from .solvers import CGLS, Auto, BlockJacobi, Dense, Direct, GramFactor

__version__ = "0.1.0"
__all__ = [
    "CGLS",
    "Auto",
    "BlockJacobi",
    "ConvergenceError",
    "Dense",
    "Direct",
    "GramFactor",
    "JacobianOperator",
    "LinearOperator",
    "RankDeficientError",
    "Solution",
    "SolveInfo",
    "SparseMatrix",
    "SparsePattern",
    "condition",
    "covariance",
    "covariance_diagonal",
    "jacobian_operator",
    "leave_one_out",
    "leverage",
    "lstsq",
    "solve",
    "sparse_generic_lstsq",
]
