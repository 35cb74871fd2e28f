"""Derivatives as they are asked for: by dampings and weights of zero, of squares, complex ones, backward twice."""

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
