"""Problems and dense references for the tests."""

import itertools
from pathlib import Path

import torch

import functional_lstsq as fl

SHARED = Path(__file__).resolve().parents[2] / "shared"
SOLVERS = {"dense": fl.Dense(), "direct": fl.Direct(), "cgls": fl.CGLS(tolerance=1e-14)}


def problem(m, n, *, dtype=torch.float64, seed=0, density=0.6, device="cpu"):
    """(pattern, values, b) of full rank, entries in random order."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(m, n, generator=g) < density
    for i in range(max(m, n)):
        mask[i % m, i % n] = True
    indices = mask.nonzero().T
    indices = indices[:, torch.randperm(indices.shape[1], generator=g)]
    values = torch.randn(indices.shape[1], dtype=dtype, generator=g)
    values = values + 2 * (indices[0] % min(m, n) == indices[1] % min(m, n))
    b = torch.randn(m, dtype=dtype, generator=g)
    return fl.SparsePattern(indices.to(device), (m, n)), values.to(device), b.to(device)


def dense(values, pattern):
    """The dense matrix, by plain differentiable torch."""
    return torch.zeros(pattern.shape, dtype=values.dtype, device=values.device).index_put(
        tuple(pattern.indices), values
    )


def through_pinv(values, pattern, b):
    """A^+ b, differentiable to any order. (`torch.linalg.solve` is not: its second forward derivatives are wrong.)"""
    return torch.linalg.pinv(dense(values, pattern)) @ b


def through_normal_equations(values, pattern, b, damp=0.0, weights=None):
    """(A^H W A + d^2)^-1 A^H W b"""
    A = dense(values, pattern)
    W = torch.ones(A.shape[0], dtype=A.dtype, device=A.device) if weights is None else weights
    gram = A.mH @ (W[:, None] * A) + damp**2 * torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    return torch.linalg.inv(gram) @ (A.mH @ (W * b if b.ndim == 1 else W[:, None] * b))


def with_singular_values(s, m, seed=0, dtype=torch.float64):
    """Dense (m, n) matrix with the given singular values, and its full pattern."""
    g = torch.Generator().manual_seed(seed)
    n = len(s)
    U = torch.linalg.qr(torch.randn(m, n, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    A = ((U * torch.as_tensor(s, dtype=torch.float64)) @ V.T).to(dtype)
    return A, full_pattern(m, n)


def normal(*size, dtype=torch.float64, seed=0):
    """Normally distributed numbers, the same ones every time for one seed."""
    return torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def full_pattern(m, n):
    return fl.SparsePattern(torch.cartesian_prod(torch.arange(m), torch.arange(n)).T, (m, n))


def mixes(order):
    """Every mix of jacrev and jacfwd of that order, innermost first, with a name."""
    for mix in itertools.product((torch.func.jacrev, torch.func.jacfwd), repeat=order):
        yield mix, "-".join(f.__name__ for f in mix)


def close(got, want, tolerance=1e-8):
    """Largest difference, relative to the largest entry."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    error = float((got - want).abs().max()) if want.numel() else 0.0
    size = max(float(want.abs().max()), 1e-3) if want.numel() else 1.0
    assert error <= tolerance * size, f"off by {error / size:.1e}"
