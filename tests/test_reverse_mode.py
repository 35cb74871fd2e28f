"""Reverse mode of torch.func on one level, beside derivatives of dense solutions by torch alone."""

import pytest
import torch
from helpers import full_pattern
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vjp, vmap

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


def pinv(values):
    """As `dense`, of which second forward derivatives are wrong."""
    return (torch.linalg.pinv(values.reshape(M, N)) @ B * C).sum().sin()


def grad_of_square(loss):
    return lambda values: grad(loss)(values).square().sum()


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


def through_dual(loss):
    """The square of a tangent that forward_ad takes, on whichever level this is called."""

    def of(values):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(loss(forward_ad.make_dual(values, values.cos()))).tangent.square()

    return of


@pytest.mark.parametrize(
    ("ours", "theirs"), [(sparse, pinv), (penalty(sparse), grad_of_square(pinv))], ids=["value", "penalty"]
)
def test_forward_mode_on_the_level_of_a_gradient(ours, theirs):
    want = grad(lambda values: jvp(theirs, (values,), (values.cos(),))[1].square())(VALUES)
    torch.testing.assert_close(grad(through_dual(ours))(VALUES), want, rtol=1e-8, atol=1e-10)


def test_gradients_that_lose_their_graph_are_refused():
    """By the vmap before torch.func's, which gives numbers that nothing can differentiate."""
    values, eye = VALUES.clone().requires_grad_(), torch.eye(N, dtype=torch.float64)
    x = fl.lstsq(fl.SparseMatrix(values, PATTERN), B)
    (J,) = torch.autograd.grad(x, values, eye, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(J, jacrev(lambda v: fl.lstsq(fl.SparseMatrix(v, PATTERN), B))(VALUES))
    with pytest.raises(NotImplementedError, match=r"create_graph=True.*jacrev"):
        torch.autograd.grad(x, values, eye, is_grads_batched=True, create_graph=True)
    rows = vmap(lambda c: torch.autograd.grad(x, values, c, create_graph=True)[0])(eye)
    found = torch.autograd.grad(rows.square().sum(), values)[0]
    want = grad(lambda v: jacrev(lambda v: torch.linalg.pinv(v.reshape(M, N)) @ B)(v).square().sum())(VALUES)
    torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-10)


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
