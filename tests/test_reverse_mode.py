"""Reverse mode of torch.func on one level, beside derivatives of dense solutions by torch alone."""

import pytest
import torch
from helpers import full_pattern
from torch.func import grad, jvp, vjp, vmap

import functional_lstsq as fl

M, N = 5, 3
generator = torch.Generator().manual_seed(0)
VALUES = torch.randn(M * N, generator=generator, dtype=torch.float64)
B = torch.randn(M, generator=generator, dtype=torch.float64)
C = torch.randn(N, generator=generator, dtype=torch.float64)
PATTERN = full_pattern(M, N)


def sparse(values):
    return (fl.lstsq(fl.SparseMatrix(values, PATTERN), B) * C).sum().sin()


def dense(values):
    A = values.reshape(M, N)
    return (torch.linalg.solve(A.T @ A, A.T @ B) * C).sum().sin()


def penalty(loss):
    """The square of a gradient that torch.autograd takes, on whichever level this is called."""

    def of(values):
        (found,) = torch.autograd.grad(loss(values), values, create_graph=True)
        return found.square().sum()

    return of


def plainly(function, values):
    values = values.clone().requires_grad_()
    return torch.autograd.grad(function(values), values)[0]


@pytest.mark.parametrize("times", [1, 2])
def test_a_gradient_within_a_gradient_on_one_level(times):
    function, want = sparse, dense
    for _ in range(times):
        function, want = penalty(function), penalty(want)
    want = plainly(want, VALUES)
    torch.testing.assert_close(grad(function)(VALUES), want, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(plainly(function, VALUES), want, rtol=1e-8, atol=1e-10)
    many = torch.stack([VALUES, VALUES.flip(0)])
    torch.testing.assert_close(vmap(grad(function))(many)[0], want, rtol=1e-8, atol=1e-10)


def test_a_gradient_within_a_gradient_along_a_tangent():
    along = torch.ones_like(VALUES)
    _, want = jvp(grad(grad_of_square(dense)), (VALUES,), (along,))
    _, got = jvp(grad(penalty(sparse)), (VALUES,), (along,))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def grad_of_square(loss):
    return lambda values: grad(loss)(values).square().sum()


def test_pulls_that_outlive_their_levels():
    """vjp gives a function back when its level has ended, and that of it another: derivatives of linear functions."""
    _, pull = vjp(lambda values: fl.lstsq(fl.SparseMatrix(values, PATTERN), B), VALUES)
    _, push = vjp(pull, C)
    _, again = vjp(push, (VALUES,))
    _, want = jvp(lambda values: fl.lstsq(fl.SparseMatrix(values, PATTERN), B), (VALUES,), (VALUES.flip(0),))
    (found,) = push((VALUES.flip(0),))
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(again((C,))[0][0], pull(C)[0], rtol=1e-10, atol=1e-12)
    many = torch.eye(N, dtype=torch.float64)
    torch.testing.assert_close(vmap(pull)(many)[0].T @ C, pull(C)[0], rtol=1e-10, atol=1e-12)


def test_a_pull_that_is_differentiated_where_it_is_called():
    _, pull = vjp(lambda values: fl.lstsq(fl.SparseMatrix(values, PATTERN), B), VALUES)
    _, pull_dense = vjp(lambda values: torch.linalg.solve((A := values.reshape(M, N)).T @ A, A.T @ B), VALUES)
    got, want = (grad(lambda c, p=p: p(c.sin())[0].square().sum())(C) for p in (pull, pull_dense))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_a_profiler_sees_each_solve():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        grad(sparse)(VALUES)
    assert sum(event.name == "functional_lstsq::solve" for event in seen.events()) >= 2
