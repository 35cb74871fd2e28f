"""Every derivative is right: orders, mixes, shapes, solvers, arguments."""

import itertools
import math

import mpmath
import pytest
import torch
from helpers import (
    SOLVERS,
    close,
    dense,
    full_pattern,
    mixes,
    problem,
    through_normal_equations,
    through_pinv,
    with_singular_values,
)
from torch.func import grad, jacfwd, jacrev, jvp

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


def test_double_backward_through_plain_autograd():
    pattern, values, b = problem(6, 3)
    values.requires_grad_()
    A = fl.SparseMatrix(values, pattern)
    (first,) = torch.autograd.grad(fl.lstsq(A, b).sin().sum(), values, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), values)

    def loss(values):
        return grad(lambda v: through_pinv(v, pattern, b).sin().sum())(values).square().sum()

    close(second, grad(loss)(values.detach()))


def test_zero_damp_has_zero_derivative_and_weights_of_zero_leave_rows_out():
    pattern, values, b = problem(6, 3)
    A = fl.SparseMatrix(values, pattern)
    zero = torch.zeros((), dtype=torch.float64)
    assert float(grad(lambda d: fl.lstsq(A, b, damp=d).sum())(zero)) == 0
    weights = torch.ones(6, dtype=torch.float64)
    weights[2] = 0
    keep = pattern.indices[0] != 2
    indices = pattern.indices[:, keep]
    rest = fl.SparseMatrix(values[keep], fl.SparsePattern(indices - (indices > 2) * torch.tensor([[1], [0]]), (5, 3)))
    close(fl.lstsq(A, b, weights=weights), fl.lstsq(rest, b[torch.arange(6) != 2]))
    want = jacrev(lambda w: through_normal_equations(values, pattern, b, weights=w))(weights)
    for transform in (jacrev, jacfwd):  # a weight of zero has a derivative like any other
        close(transform(lambda w: fl.lstsq(A, b, weights=w))(weights), want)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("damp", [0.3, 3.0])
def test_weights_of_zero_beside_one_damping_of_a_wide_matrix(solver, damp):
    pattern, values, b = problem(4, 9)
    weights, d = torch.tensor([0.0, 2.0, 0.0, 0.5]).double(), torch.tensor(damp).double()

    def ours(w, d):
        return fl.lstsq(fl.SparseMatrix(values, pattern), b, weights=w, damp=d, solver=SOLVERS[solver])

    def want(w, d):
        A = dense(values, pattern)
        return torch.linalg.inv(A.T @ (w[:, None] * A) + d.square() * torch.eye(9).double()) @ (A.T @ (w * b))

    close(ours(weights, d), want(weights, d))
    for k, ((one, other), _) in itertools.product((0, 1), mixes(2)):
        close(one(ours, k)(weights, d), one(want, k)(weights, d))
        close(other(one(ours, 0), k)(weights, d), other(one(want, 0), k)(weights, d), 1e-8)


def test_a_derivative_that_is_not_to_be_had_by_a_weight_of_zero_is_no_number_in_either_mode():
    """A damping far below the entries of a wide A; derivatives by the other weights are as ever."""
    pattern, values, b = problem(4, 9)
    weights = torch.tensor([0.0, 2.0, 1.0, 0.5]).double()

    def ours(w):
        return fl.lstsq(fl.SparseMatrix(values, pattern), b, weights=w, damp=1e-7)

    assert jacrev(ours)(weights).isnan().any(0).tolist() == [True, False, False, False]
    with pytest.raises(ValueError, match="for a derivative holds NaN or infinity"):
        jvp(ours, (weights,), (torch.tensor([1.0, 0.0, 0.0, 0.0]).double(),))
    others = torch.tensor([0.0, 1.0, -1.0, 0.3]).double()
    close(jvp(ours, (weights,), (others,))[1], jacrev(ours)(weights)[:, 1:] @ others[1:], 1e-8)


def test_a_damping_of_a_wide_matrix_of_low_rank_with_weights_keeps_its_digits():
    """x = v u^T W b / (|W^(1/2) u|^2 |v|^2 + d^2); d / sqrt(weight), rounded, would leave 5 digits, and then 4."""
    u, v = torch.tensor([1.0, 1, -1, 2]).double(), torch.tensor([3.0, 2, 3, -1, 1, 1]).double()
    w, b = torch.tensor([0.3, 2.0, 0.1, 2.0]).double(), torch.tensor([9.0, 1, 9, 2]).double()
    A = fl.SparseMatrix.from_dense(torch.outer(u, v))
    d = torch.tensor(0.01, dtype=torch.float64)
    ours = lambda d: fl.lstsq(A, b, weights=w, damp=d)  # noqa: E731
    want = lambda d: v * (u * w * b).sum() / ((w * u.square()).sum() * v.square().sum() + d.square())  # noqa: E731
    for tolerance in (1e-12, 1e-8):  # of the first derivative, and of the second
        ours, want = jacfwd(ours), jacfwd(want)
        torch.testing.assert_close(ours(d), want(d), rtol=tolerance, atol=0)


@pytest.mark.parametrize("damp", [1e-3, 1e-2])
@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_mixed_derivatives_of_a_damped_matrix_of_low_rank(damp, transform):
    """x = v u^T b / (|u|^2 |v|^2 + d^2) along changes that keep the rank, by t and d; rounding is magnified by d^-3."""
    u, v, b = ([3, 3, 3], [3, 2, -1], [0.125, 0.75, 1.0])
    l, c = ([0, 1, 2], [-1, 2, -2])  # noqa: E741

    def exact(t, d):
        moved, along = ([x * (1 + y * t) for x, y in zip(p, q, strict=True)] for p, q in ((u, l), (v, c)))
        scale = sum(x * y for x, y in zip(moved, b, strict=True))
        return [y * scale / (sum(x * x for x in moved) * sum(x * x for x in along) + d * d) for y in along]

    with mpmath.workdps(60):
        want = [float(mpmath.diff(lambda t, d: exact(t, d)[j], (0, mpmath.mpf(damp)), (1, 1))) for j in range(3)]  # noqa: B023
    A = torch.outer(torch.tensor(u), torch.tensor(v)).double()
    dA = A * (torch.tensor(l)[:, None] + torch.tensor(c)).double()
    right, d = torch.tensor(b, dtype=torch.float64), torch.tensor(damp, dtype=torch.float64)

    def tangent(d):
        def along(values):
            return fl.lstsq(fl.SparseMatrix(values, full_pattern(3, 3)), right, damp=d)

        return jvp(along, (A.reshape(-1),), (dA.reshape(-1),))[1]

    want = torch.tensor(want, dtype=torch.float64)
    assert float((transform(tangent)(d) - want).norm() / want.norm()) < 1e-6


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("condition", [1e2, 1e3, 1e4, 1e5])
def test_gradient_of_the_sum_of_squared_residuals(solver, condition):
    """2 r and -2 r x^T, well-posed at any condition number; the adjoint has a part that is zero but for rounding."""
    A, pattern = with_singular_values(torch.logspace(0, -math.log10(condition), 10, dtype=torch.float64), 50)
    b = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(values, b):
        solution = fl.solve(fl.SparseMatrix(values, pattern), b, solver=SOLVERS[solver])
        return solution.residual.square().sum(), solution

    (by_A, by_b), solution = grad(loss, (0, 1), has_aux=True)(A.reshape(-1), b)
    close(by_b, 2 * solution.residual)
    close(by_A.view(50, 10), -2 * torch.outer(solution.residual, solution.x), 1e-6)


def test_complex_gradients_are_plain_tensors():
    generator = torch.Generator().manual_seed(0)
    values, b = (torch.randn(k, dtype=torch.complex128, generator=generator) for k in (6, 3))

    def loss(values, weights=None):
        return fl.lstsq(fl.SparseMatrix(values, full_pattern(3, 2)), b, weights=weights).abs().sum()

    gradient = grad(loss)(values)
    assert not gradient._is_view() or gradient._base.layout == torch.strided
    close(gradient.conj().conj() * 1, grad(lambda v: loss(v, torch.ones(3)))(values))


def test_minimum_norm_of_full_rank_is_as_without():
    """In single precision, with rows of very different size: the terms for lost rank are nothing, not noise."""
    D = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [1e4], [1e8]])
    b = torch.ones(3)

    def loss(values, mode):
        return fl.lstsq(fl.SparseMatrix(values, full_pattern(3, 6)), b, rank_deficient=mode).sum()

    close(*(grad(lambda v, mode=mode: loss(v, mode))(D.reshape(-1)) for mode in ("minimum_norm", "raise")), 1e-6)


def test_nan_from_the_loss_is_said_to_come_from_there():
    pattern, values, b = problem(6, 3)
    nan = torch.tensor(torch.nan, dtype=torch.float64)

    def by_matrix(values, b):
        return fl.lstsq(fl.SparseMatrix(values, pattern), b)

    def by_products(values, b):
        return fl.lstsq(fl.LinearOperator(lambda D, x: D @ x, dense(values, pattern), 3), b)

    for f in (by_matrix, by_products):
        for transform in (torch.func.grad, lambda f: torch.func.grad(torch.func.grad(f))):
            with pytest.raises(ValueError, match="came in for a derivative holds NaN or infinity: the cotangent"):
                transform(lambda s, f=f: (f(values, s * b).sum() * 0).sqrt().sin())(torch.ones((), dtype=torch.float64))
        with pytest.raises(ValueError, match="or a tangent of A, b, damp or weights"):
            torch.func.jvp(lambda b, f=f: f(values, b), (b,), (nan * b,))
        with pytest.raises(ValueError, match="or a tangent of A, b, damp or weights"):
            torch.func.jvp(lambda v, f=f: f(v, b), (values,), (nan * values,))
