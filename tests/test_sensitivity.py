"""The condition number as it is documented, and the Jacobian of a solution as an operator."""

import pytest
import torch
from helpers import close, dense, full_pattern, problem
from torch.func import grad, jacrev, vmap

import functional_lstsq as fl

PATTERN, VALUES, B = problem(14, 5)
WEIGHTS = torch.linspace(0.5, 2, 14, dtype=torch.float64)


@pytest.mark.parametrize("solver", [None, fl.Dense(), fl.Direct(), fl.CGLS()], ids=repr)
def test_condition(solver):
    A = dense(VALUES, PATTERN)
    true, found = torch.linalg.cond(A / A.norm(dim=0)), fl.condition(fl.SparseMatrix(VALUES, PATTERN), solver=solver)
    close(found, true, 0.2)
    assert fl.condition(torch.ones(4, 2, dtype=torch.float64).to_sparse(), solver=solver) == torch.inf


def test_condition_of_an_operator():
    A = fl.LinearOperator(lambda p, x: p * x, torch.tensor([1.0, 10.0]).double(), 2)
    close(fl.condition(A), torch.tensor(10.0, dtype=torch.float64), 0.1)


@pytest.mark.parametrize(("solver", "n"), [(fl.Dense(), 20), (fl.Dense(), 140), (fl.Direct(), 20), (fl.CGLS(), 20)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_condition_is_of_columns_of_norm_1(dtype, solver, n):
    """Scaled by powers of two they have norms of 1/2 to 2, and may have four times that condition number."""
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(2 * n, n, generator=g, dtype=dtype)).Q
    V = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=dtype)).Q
    scales, w = 2 * torch.rand(n, generator=g, dtype=torch.float64) + 0.1, torch.arange(2 * n).double() % 3
    weak = torch.cat([torch.full((n - 1,), 1.0), torch.tensor([1e-3])]).double()
    for D, damp, weights in (
        (Q, None, None),
        (Q * scales, None, None),
        ((Q * weak) @ V * scales, None, None),
        ((Q * torch.logspace(0, -4, n, dtype=torch.float64)) @ V * scales, None, None),
        ((Q * torch.logspace(0, -4, n, dtype=torch.float64)) @ V * scales, 0.02, None),
        ((Q * weak) @ V * scales, None, w),
        (((Q * weak) @ V * scales).mH, None, None),
    ):
        whole = D if D.shape[0] > n else D.mH
        whole = whole if weights is None else weights.sqrt()[:, None] * whole
        whole = whole if damp is None else torch.cat([whole, damp * torch.eye(n, dtype=dtype)])
        true = float(torch.linalg.cond(whole / whole.norm(dim=0)))
        A = fl.SparseMatrix.from_torch(D.resolve_conj().to_sparse())
        info = fl.solve(A, D.sum(1), damp=damp, weights=weights, solver=solver).info
        assert true / 1.3 < info.condition < 1.001 * true


@pytest.mark.parametrize("solver", [fl.Dense(), fl.Direct()], ids=repr)
def test_condition_without_full_rank_is_of_singular_values_that_are_not_zero(solver):
    """In a batch, beside a matrix of full rank."""
    g = torch.Generator().manual_seed(0)
    D = torch.randn(2, 40, 12, generator=g, dtype=torch.float64)
    D[0, :, 10:] = D[0, :, :2] * 3 - D[0, :, 2:4]
    D = D * (2 * torch.rand(12, generator=g, dtype=torch.float64) + 0.1)
    pattern = full_pattern(40, 12)
    V = D[:, pattern.indices[0], pattern.indices[1]]
    b = torch.randn(40, generator=g, dtype=torch.float64)

    def condition(v):
        return fl.solve(fl.SparseMatrix(v, pattern), b, solver=solver, rank_deficient="minimum_norm").info.condition

    s = torch.linalg.svdvals(D / D.norm(dim=1, keepdim=True))
    true = torch.stack([s[0, 0] / s[0, 9], s[1, 0] / s[1, 11]])
    close(vmap(condition)(V) / true, torch.ones(2, dtype=torch.float64), 0.2)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_jacobian_operator(weights):
    def f(v):
        return fl.lstsq(fl.SparseMatrix(v, PATTERN), B, weights=weights)

    J, full = fl.jacobian_operator(fl.SparseMatrix(VALUES, PATTERN), B, weights=weights), jacrev(f)(VALUES)
    assert J.shape == full.shape
    V, Y = torch.stack([VALUES.sin(), VALUES.cos()], 1), torch.eye(5, dtype=torch.float64)
    close(J @ V, full @ V)
    close(J @ V[:, 0], full @ V[:, 0])
    close(J.adjoint(Y), full.T)
    close(J.adjoint(Y[0]), full[0])
    close(grad(lambda J: (J @ V[:, 0]).sum())(J).params, grad(lambda v: (jacrev(f)(v) @ V[:, 0]).sum())(VALUES), 1e-7)
