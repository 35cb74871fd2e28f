"""Every derivative is right: orders, mixes, shapes, solvers, arguments."""

import itertools

import pytest
import torch
from helpers import (
    SOLVERS,
    close,
    full_pattern,
    mixes,
    problem,
    through_normal_equations,
    through_pinv,
)
from torch.func import grad, jacfwd, jacrev

import functional_lstsq as fl
from functional_lstsq.sparse.products import multiply, sample

SHAPES = {"tall": (5, 3), "wide": (3, 5), "square": (4, 4)}
CHECKS = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
AGAIN = {"check_fwd_over_rev": True, "check_batched_grad": True}


def derivative(f, mix, arguments):
    for transform, argument in zip(mix, arguments, strict=True):
        f = transform(f, argnums=argument)
    return f


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("mix", "name"), [pytest.param(*m, id=m[1]) for order in (1, 2) for m in mixes(order)])
def test_first_and_second_order(solver, shape, mix, name):
    pattern, values, b = problem(*SHAPES[shape])

    def ours(values, b):
        return fl.lstsq(fl.SparseMatrix(values, pattern), b, solver=SOLVERS[solver])

    for arguments in itertools.product((0, 1), repeat=len(mix)):
        got = derivative(ours, mix, arguments)(values, b)
        want = derivative(lambda v, b: through_pinv(v, pattern, b), mix, arguments)(values, b)
        close(got, want)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("mix", "name"),
    [pytest.param(*m, id=m[1], marks=() if k % 2 else pytest.mark.slow) for k, m in enumerate(mixes(3))],
)
def test_third_order(shape, mix, name):
    pattern, values, b = problem(*SHAPES[shape])

    def ours(values, b):
        return fl.lstsq(fl.SparseMatrix(values, pattern), b).sin().sum()

    def want(values, b):
        return through_pinv(values, pattern, b).sin().sum()

    for arguments in ((0, 0, 0), (0, 1, 0), (1, 0, 0)):
        close(derivative(ours, mix, arguments)(values, b), derivative(want, mix, arguments)(values, b))
    batch = torch.stack([values, values.flip(0) + 3])
    close(
        torch.vmap(derivative(ours, mix, (0, 0, 0)), (0, None))(batch, b),
        torch.vmap(derivative(want, mix, (0, 0, 0)), (0, None))(batch, b),
    )


REAL = [pytest.param(name, torch.float64, marks=pytest.mark.slow if name == "square" else ()) for name in SHAPES]
COMPLEX = [pytest.param(name, torch.complex128, marks=() if name == "tall" else pytest.mark.slow) for name in SHAPES]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("shape", "dtype"), [*REAL, *COMPLEX])
def test_gradcheck(solver, shape, dtype):
    pattern, values, b = problem(*SHAPES[shape], dtype=dtype)
    columns = torch.stack([b, b.flip(0) + 1], 1)

    def solution(values, b):
        return fl.lstsq(fl.SparseMatrix(values, pattern), b, solver=SOLVERS[solver])

    inputs = values.requires_grad_(), columns.requires_grad_()
    assert torch.autograd.gradcheck(solution, inputs, **CHECKS)
    # Along random directions: every single second derivative is held against an exact one above.
    assert torch.autograd.gradgradcheck(solution, inputs, **AGAIN, fast_mode=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck_of_residual(shape):
    pattern, values, b = problem(*SHAPES[shape])

    def residual(values, b):
        return fl.solve(fl.SparseMatrix(values, pattern), b, damp=0.3).residual

    inputs = values.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(residual, inputs, **CHECKS)
    assert torch.autograd.gradgradcheck(residual, inputs, **AGAIN)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradcheck_of_products(dtype):
    pattern, values, _ = problem(5, 3, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    X, Y = (torch.randn(1, rows, 2, dtype=dtype, generator=generator).requires_grad_() for rows in (3, 5))
    values = values[None].requires_grad_()
    where = pattern.indices, 5, 3
    for f, inputs in (
        (lambda v, X: multiply(v, X, *where), (values, X)),
        (lambda v, Y: multiply(v, Y, *where, adjoint=True), (values, Y)),
        (lambda U, W: sample(U, W, *where), (Y, X)),
    ):
        assert torch.autograd.gradcheck(f, inputs, **CHECKS)
        assert torch.autograd.gradgradcheck(f, inputs, **AGAIN)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "shape", ["tall", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wide", "square"))]
)
def test_damp_and_weights(solver, shape):
    pattern, values, b = problem(*SHAPES[shape])
    weights = torch.linspace(0.5, 2, len(b), dtype=torch.float64)
    inputs = values, b, torch.tensor(0.7, dtype=torch.float64), weights

    def ours(values, b, damp, weights):
        A = fl.SparseMatrix(values, pattern)
        return fl.lstsq(A, b, damp=damp, weights=weights, solver=SOLVERS[solver])

    def want(values, b, damp, weights):
        return through_normal_equations(values, pattern, b, damp, weights)

    close(ours(*inputs), want(*inputs))
    for first, second in itertools.product(range(4), repeat=2):
        for mix, _ in mixes(2):
            got = derivative(ours, mix, (first, second))(*inputs)
            close(got, derivative(want, mix, (first, second))(*inputs))


@pytest.mark.parametrize("shape", [(6, 4), *(pytest.param(s, marks=pytest.mark.slow) for s in ((4, 6), (5, 5)))])
@pytest.mark.parametrize(("mix", "name"), [pytest.param(*m, id=m[1]) for order in (1, 2) for m in mixes(order)])
def test_minimum_norm_along_matrices_of_constant_rank(shape, mix, name):
    """A = U W^T has rank 2 whatever U and W are: derivatives by them keep the rank."""
    m, n = shape
    generator = torch.Generator().manual_seed(0)
    U, W = (torch.randn(rows, 2, generator=generator, dtype=torch.float64) for rows in shape)
    b, pattern = torch.randn(m, generator=generator, dtype=torch.float64), full_pattern(m, n)

    def ours(U, W, b):
        return fl.lstsq(fl.SparseMatrix((U @ W.T).reshape(-1), pattern), b, rank_deficient="minimum_norm")

    def want(U, W, b):
        return W @ torch.linalg.inv(W.T @ W) @ torch.linalg.inv(U.T @ U) @ U.T @ b

    close(ours(U, W, b), want(U, W, b))
    for arguments in itertools.product(range(3), repeat=len(mix)):
        close(derivative(ours, mix, arguments)(U, W, b), derivative(want, mix, arguments)(U, W, b))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_minimum_norm_gradient_is_golub_and_pereyras(shape):
    """All three terms of eq. 4.12, entry by entry."""
    m, n = shape
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(m, 2, generator=generator, dtype=torch.float64) @ torch.randn(2, n, generator=generator).double()
    b, w = (torch.randn(rows, generator=generator, dtype=torch.float64) for rows in (m, n))
    P = torch.linalg.pinv(A)
    x, back = P @ b, P.T @ w
    want = -torch.outer(back, x) + torch.outer(b - A @ x, P @ back) + torch.outer(P.T @ x, w - P @ (A @ w))
    pattern = full_pattern(m, n)

    def loss(values):
        return fl.lstsq(fl.SparseMatrix(values, pattern), b, rank_deficient="minimum_norm") @ w

    values = A.reshape(-1)
    close(grad(loss)(values).view(m, n), want)
    close(jacfwd(loss)(values).view(m, n), want)
    close(jacrev(loss)(values).view(m, n), want)
