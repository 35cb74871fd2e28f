"""gauss_newton: against dense Newton and finite differences, in every mode."""

import pytest
import torch
from helpers import close, mixes, normal
from small_fits import X0, D, T, Y, by_newton, decay, fit, tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap

import functional_lstsq as fl


def test_it_finds_a_minimum_with_an_honest_error():
    solution = fl.gauss_newton(decay, X0, (Y,))
    exact = by_newton(decay, solution.x, Y)
    assert solution.info.status == "converged"
    assert (solution.x - exact).norm() <= solution.info.forward_error * exact.norm()
    assert solution.info.forward_error < 1e-13
    close(solution.residual, decay(exact, Y), 1e-12)
    close(solution.info.cost, decay(exact, Y).square().sum() / 2, 1e-12)


def test_derivatives_pass_gradcheck():
    y = Y.clone().requires_grad_()
    assert gradcheck(fit, (y,))
    assert gradgradcheck(fit, (y,))


@pytest.mark.parametrize(("mix", "name"), [m for order in (1, 2, 3) for m in mixes(order)])
def test_derivatives_of_every_mix(mix, name):
    x, got, want = fit(Y), fit, lambda y: by_newton(decay, x.detach(), y)
    for transform in mix:
        got, want = transform(got), transform(want)
    close(got(Y), want(Y), 1e-9)


def test_batches_are_solved_side_by_side():
    ys = torch.stack([Y, 1.1 * Y, Y.flip(0), Y.sqrt()])
    one_by_one = torch.stack([fit(y) for y in ys])
    close(vmap(fit)(ys), one_by_one, 1e-12)
    close(vmap(jacrev(fit))(ys), torch.stack([jacrev(fit)(y) for y in ys]), 1e-10)
    close(vmap(hessian(lambda y: fit(y).sum()), chunk_size=3)(ys)[2], hessian(lambda y: fit(y).sum())(ys[2]), 1e-9)
    loss = lambda ys: vmap(fit)(ys).sin().sum()  # noqa: E731
    close(grad(loss)(ys)[1], grad(lambda y: fit(y).sin().sum())(ys[1]), 1e-10)
    starts = torch.stack([X0, X0 + 0.3])
    close(vmap(lambda x0: fl.gauss_newton(decay, x0, (Y,)).x)(starts), fit(Y).expand(2, -1), 1e-12)
    nested = vmap(vmap(lambda y, x0: fl.gauss_newton(decay, x0, (y,)).x, (None, 0)), (0, None))(ys, starts)
    close(nested, one_by_one[:, None].expand(-1, 2, -1), 1e-12)


def test_what_where_leaves_out_does_not_spoil_a_step():
    """Far from the minimum the root of a negative number is left out, whose derivative in reverse mode is NaN."""

    def residual(x, y):
        return torch.where(x < 10, x - 12, torch.sqrt(x - 10) - 2**0.5) - y

    y = tensor(0.0, 0.1)
    assert jacrev(residual)(tensor(1.0, 2.0), y).isnan().any()
    x = fl.gauss_newton(residual, tensor(1.0, 2.0), (y,)).x
    close(x, 10 + (2**0.5 + y).square(), 1e-14)


def test_a_module_in_the_residual_and_trees_in_args():
    module, features = torch.nn.Linear(3, 2, dtype=D), normal(6, 3)

    def residual(x, parameters, extra):
        weights = functional_call(module, parameters, (features,))
        return weights[:, 0] * x[0] + weights[:, 1] * x[1].sin() - extra["y"][extra["which"]] + extra["shift"]

    def x(parameters):
        extra = {"y": Y, "which": torch.arange(6), "shift": 0.5, "name": "any", "none": None}
        return fl.gauss_newton(residual, torch.zeros(2, dtype=D), (parameters, extra)).x.sum()

    parameters = {name: normal(*p.shape) for name, p in module.named_parameters()}
    gradient = grad(x)(parameters)
    step = {name: 1e-6 * torch.ones_like(p) for name, p in parameters.items()}
    numeric = x({n: p + step[n] for n, p in parameters.items()}) - x({n: p - step[n] for n, p in parameters.items()})
    close(sum(g.sum() for g in gradient.values()), numeric / 2e-6, 1e-7)


def test_closures():
    y = Y.clone().requires_grad_()
    with pytest.raises(ValueError, match="not in args and are being differentiated"):
        fl.gauss_newton(lambda x: decay(x, y), X0)
    for transform in (grad, jacfwd, hessian):
        with pytest.raises(ValueError, match="not in args"):
            transform(lambda y: fl.gauss_newton(lambda x: decay(x, y), X0).x.sum())(Y)
    with pytest.raises(ValueError, match="not in args"):
        vmap(lambda y: fl.gauss_newton(lambda x: decay(x, y), X0).x)(torch.stack([Y, Y]))

    def f(y):
        t = T * 1.0  # wrapped by every transformation around
        return fl.gauss_newton(lambda x, y: x[0] * torch.exp(-x[1] * t) - y, X0, (y,)).x

    close(hessian(lambda y: f(y).sum())(Y), hessian(lambda y: fit(y).sum())(Y), 1e-10)


@pytest.mark.parametrize("loss", [fl.Huber(0.05), fl.Cauchy(0.1)], ids=repr)
def test_robust_losses(loss):
    y = Y + torch.tensor([0, 0, 0.7, 0, 0, -0.4], dtype=D)
    t = torch.tensor(loss.threshold, dtype=D)
    f = lambda y, t: fl.gauss_newton(decay, X0, (y,), robust=type(loss)(t)).x  # noqa: E731
    x = f(y, t)
    slope = grad(lambda x: loss.cost(decay(x, y), torch.ones_like(y), t).sum())(x)
    assert slope.abs().max() < 1e-14
    assert gradcheck(f, (y.clone().requires_grad_(), t.clone().requires_grad_()))
    assert gradgradcheck(f, (y.clone().requires_grad_(), t.clone().requires_grad_()))


def test_single_precision_and_odd_scales():
    solution = fl.gauss_newton(decay, X0.float(), (Y.float(),))
    assert solution.x.dtype == torch.float32
    close(solution.x, fit(Y.float().double()).float(), 1e-6)
    scaled = lambda x, y: decay(x * torch.tensor([1e-9, 1e7], dtype=D), y)  # noqa: E731
    x = fl.gauss_newton(scaled, torch.tensor([1e9, 1e-7], dtype=D), (Y,)).x
    close(x * torch.tensor([1e-9, 1e7], dtype=D), fit(Y), 1e-12)


def test_solutions_that_are_zero():
    f = lambda y: fl.gauss_newton(lambda x, y: torch.cat([x - y, x.sin()]), X0, (y,)).x  # noqa: E731
    zero = torch.zeros(2, dtype=D)
    close(f(zero), zero, 1e-12)
    close(jacrev(f)(zero), torch.eye(2, dtype=D) / 2, 1e-12)
    orthogonal = fl.gauss_newton(lambda x: torch.cat([x.sinh() - 1, x.sinh() + 1, x]), X0)
    close(orthogonal.x, zero, 1e-12)


@pytest.mark.parametrize("size", [1e8, 1e13, 1e20])
def test_a_start_far_away_does_not_coarsen_what_is_accepted(size):
    residual = lambda x: torch.stack([size * x[0], torch.exp(x[1]) - 2, (x[1] - 1) / 2])  # noqa: E731
    close(fl.gauss_newton(residual, tensor(1, 5)).x, tensor(0, 0.710753666003), 1e-11)


@pytest.mark.parametrize("size", [1e5, 1.7e9])
def test_a_large_unknown_hides_no_other(size):
    residual = lambda x, y: torch.cat([x[2:] - size, decay(x, y)])  # noqa: E731
    f = lambda y: fl.gauss_newton(residual, tensor(1, 0.3, size + 1), (y,)).x[:2]  # noqa: E731
    close(f(Y), fit(Y), 1e-12)
    close(jacrev(f)(Y), jacrev(fit)(Y), 1e-10)
