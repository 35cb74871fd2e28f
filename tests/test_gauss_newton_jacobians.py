"""Sparse Jacobians of gauss_newton, and the colors that give them."""

import hypothesis.strategies as st
import pytest
import torch
from helpers import close
from hypothesis import HealthCheck, given, settings
from small_fits import D, by_newton, chain, chain_pattern
from torch.func import grad, jacfwd, jacrev

import functional_lstsq as fl
from functional_lstsq.sparse import coloring


@pytest.mark.parametrize(("how", "solver"), [
    ("all", None), ("all", fl.CGLS()), ("pattern", None), ("pattern", fl.Direct()), ("pattern", fl.CGLS()),
    ("function", None), ("function", fl.Dense()),
], ids=repr)  # fmt: skip
def test_a_sparse_jacobian(how, solver):
    n = 7
    y = torch.linspace(0.5, 1.5, n, dtype=D)
    pattern = chain_pattern(n)
    jacobian = {
        "all": None,
        "pattern": pattern,
        "function": lambda x, y: fl.SparseMatrix(jacrev(chain)(x, y)[tuple(pattern.indices)], pattern),
    }[how]
    f = lambda y: fl.gauss_newton(chain, y.detach(), (y,), jacobian=jacobian, solver=solver).x  # noqa: E731
    x = f(y)
    close(x, by_newton(chain, x, y), 1e-12)
    close(jacrev(f)(y), jacrev(lambda y: by_newton(chain, x, y))(y), 1e-9)
    close(jacfwd(jacrev(f))(y), jacfwd(jacrev(lambda y: by_newton(chain, x, y)))(y), 1e-8)


def test_a_large_one_is_never_formed():
    n = 20_000
    y = 1 + 0.3 * torch.sin(torch.arange(n, dtype=D))
    pattern = chain_pattern(n)
    solution = fl.gauss_newton(chain, torch.ones(n, dtype=D), (y,), jacobian=pattern)
    slope = grad(lambda x: chain(x, y).square().sum())(solution.x)
    assert solution.info.status == "converged"
    assert slope.abs().max() < 1e-12
    with pytest.raises(ValueError, match="jacobian=None forms all entries"):
        fl.gauss_newton(chain, torch.ones(n, dtype=D), (y,))


@pytest.mark.parametrize("compiled", [True, False])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 12), st.integers(1, 9), st.floats(0.05, 0.9), st.integers(0, 10**6))
def test_colors_give_the_jacobian(compiled, monkeypatch, m, n, density, seed):
    if not compiled:
        monkeypatch.setattr(coloring.kernels, "available", lambda device: False)
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(m, n, generator=g, dtype=D) * (torch.rand(m, n, generator=g) < density)
    pattern = fl.SparsePattern(A.nonzero().T, (m, n))
    values = coloring.jacobian_values(lambda x: A @ x.sin(), torch.zeros(n, dtype=D), pattern)
    close(fl.SparseMatrix(values, pattern).to_dense(), A, 1e-14)
    color = coloring.colors(pattern)
    for row in A != 0:
        assert len(color[row].unique()) == int(row.sum())


@pytest.mark.parametrize("compiled", [True, False])
def test_cameras_and_points_take_as_many_colors_as_a_row_has_entries(compiled, monkeypatch):
    """Random orders take 22: columns that share rows with most others come first."""
    if not compiled:
        monkeypatch.setattr(coloring.kernels, "available", lambda device: False)
    g = torch.Generator().manual_seed(0)
    camera = torch.rand(300, 20, generator=g).argsort(1)[:, :5].flatten()  # of 20, by which each of 300 points is seen
    point = torch.arange(300).repeat_interleave(5)
    columns = torch.cat([6 * camera[:, None] + torch.arange(6), 120 + 3 * point[:, None] + torch.arange(3)], 1)
    rows = torch.arange(1500).repeat_interleave(9)
    pattern = fl.SparsePattern(torch.stack([rows, columns.flatten()]), (1500, 1020))
    assert int(coloring.colors(pattern).max()) + 1 == 9
