"""Weights of a LinearOperator, zero among them, with ordinary derivatives of every order and mix: as of the matrix."""

import pytest
import torch
from helpers import close, full_pattern, mixes, normal
from torch.func import grad, jacfwd, jacrev, vmap

import functional_lstsq as fl

D = torch.float64
M, N = 10, 3
MATRIX, B = normal(M, N), normal(M)
WEIGHTS = torch.linspace(0, 2, M, dtype=D)
DAMPINGS = {"none": None, "one": torch.tensor(0.3, dtype=D), "each": torch.linspace(0, 1, N, dtype=D)}


def product(A, x):
    return A @ x


def operator(A, **options):
    return fl.LinearOperator(product, A, A.shape[1], **options)


def adjoint(A):
    return operator(A, rmatvec=lambda A, y: A.mH @ y)


def matrix(A):
    return fl.SparseMatrix(A.reshape(-1), full_pattern(*A.shape))


def both(make, A, b, weights, damp):
    solution = fl.solve(make(A), b, weights=weights, damp=damp)
    return torch.cat([solution.x, solution.residual])


@pytest.mark.parametrize("damp", DAMPINGS.values(), ids=DAMPINGS)
@pytest.mark.parametrize("make", [operator, adjoint])
@pytest.mark.parametrize("along", [jacrev, jacfwd])
def test_first_derivatives(along, make, damp):
    every = (0, 1, 2) if damp is None else (0, 1, 2, 3)
    found, want = (
        along(lambda *given: both(kind, *given), every)(MATRIX, B, WEIGHTS, damp)  # noqa: B023
        for kind in (make, matrix)
    )
    for a, b in zip(found, want, strict=True):
        close(a, b, 1e-10)


@pytest.mark.parametrize(("mix", "name"), list(mixes(2)), ids=[name for _, name in mixes(2)])
def test_second_derivatives(mix, name):
    inner, outer = mix

    def hessian(kind):
        cubes = lambda A, w: both(kind, A, B, w, 0.2).pow(3)  # noqa: E731
        return outer(inner(cubes, (0, 1)), (0, 1))(MATRIX, WEIGHTS)

    for found, want in zip(hessian(operator), hessian(matrix), strict=True):
        for a, b in zip(found, want, strict=True):
            close(a, b, 1e-9)


def test_batches_of_weights():
    many = torch.rand(4, M, dtype=D, generator=torch.Generator().manual_seed(0))
    many[1, 2] = many[3, 0] = 0
    slope = lambda kind: vmap(grad(lambda w: fl.lstsq(kind(MATRIX), B, weights=w).sum()))(many)  # noqa: E731
    close(slope(operator), slope(matrix), 1e-10)


@pytest.mark.parametrize("along", [jacrev, jacfwd])
def test_the_least_norm(along):
    A = torch.cat([MATRIX, MATRIX[:, :1]], 1)

    def of(kind):
        return along(
            lambda b, w: fl.lstsq(kind(A), b, weights=w, rank_deficient="minimum_norm"),
            (0, 1),
        )(B, WEIGHTS)

    for found, want in zip(of(operator), of(matrix), strict=True):
        close(found, want, 1e-9)


def test_masks_times_learned_weights():
    """The gradient of a mask of zeros times anything is zero, not NaN."""
    mask = (torch.arange(M) > 2).to(D)
    slope = grad(lambda w: fl.lstsq(operator(MATRIX), B, weights=mask * w).sum())(1 + WEIGHTS)
    want = grad(lambda w: fl.lstsq(matrix(MATRIX), B, weights=mask * w).sum())(1 + WEIGHTS)
    assert not bool(slope[:3].any())
    close(slope, want, 1e-10)


@pytest.mark.parametrize("damp", [torch.tensor(0.5).double(), torch.linspace(0, 1, 9).double()], ids=["one", "each"])
@pytest.mark.parametrize("weights", [None, torch.tensor([0, 1, 2, 0.5, 3]).double(), torch.ones(5).double()], ids=str)
@pytest.mark.parametrize("along", [jacrev, jacfwd])
def test_a_wide_operator_with_dampings(along, weights, damp):
    A, b = normal(5, 9), normal(5)
    every = (0, 1, 3) if weights is None else (0, 1, 2, 3)

    def of(kind):
        return along(lambda A, b, w, d: fl.lstsq(kind(A), b, weights=w, damp=d), every)(A, b, weights, damp)

    for found, want in zip(of(operator), of(matrix), strict=True):
        close(found, want, 1e-9)
