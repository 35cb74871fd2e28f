"""What gauss_newton refuses: points that are no minimum, and bad input."""

import pytest
import torch
from helpers import close
from small_fits import X0, D, Y, chain_pattern, decay, fit, tensor
from torch.func import hessian, jacfwd, jacrev, vmap

import functional_lstsq as fl


def decays_of_nothing(x, y):
    """Two decays beside data of zeros: each unknown may go to infinity, and no minimum is anywhere."""
    t = torch.arange(5, dtype=D)
    return x[0] / 1e7 * torch.exp(-4e10 * x[1] * t) + x[2] * torch.exp(-4e8 * x[3] * t) - y


def valley(x, y):
    """Of zeros wherever x[0] is zero, whatever x[1] is."""
    return x[0] * tensor(0.1, 1.0, 2.0) + x[0] * x[1] * tensor(1.0, -1.0, 0.5) - y


@pytest.mark.parametrize(
    ("residual", "start", "weights"),
    [
        (decays_of_nothing, (1e7, 1e-11, 1.0, 1e-9), (0.5, 0.5, 0.5, 0.21867819508643593, 2.0)),
        (valley, (1.5, -0.3), (1.0, 1.0, 1.0)),
        (valley, (-0.7, 0.9), (1.0, 1.0, 1.0)),
        (lambda x, y: x[0] * torch.exp(-x[1] * torch.arange(3, dtype=D)) - y, (1.0, 0.3), (1.0, 1.0, 1.0)),
        (lambda x, y: torch.stack([x[0] * x[1] ** 2, x[0] * (1 + x[1]), 2 * x[0]]) - y, (0.5, 0.3), (1.0, 1.0, 1.0)),
    ],
)
def test_an_unknown_that_nothing_depends_on_any_more_is_told(residual, start, weights):
    y = torch.zeros(len(weights), dtype=D)
    with pytest.raises(torch.linalg.LinAlgError) as told:
        fl.gauss_newton(residual, tensor(*start), (y,), weights=tensor(*weights))
    assert f"rank {len(start)}, not full rank" not in str(told.value)


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-7])
def test_a_saddle_beside_ill_conditioned_unknowns_is_seen(gap):
    def residual(x):
        return torch.stack([x[0] + x[1] - 2, x[0] + (1 + gap) * x[1] - 2 - gap, x[2], 1 - x[2] ** 2])

    with pytest.raises(fl.ConvergenceError, match="not a strict minimum"):
        fl.gauss_newton(residual, tensor(0.3, 0.2, 0))


def test_sizes_whose_squares_are_no_numbers_are_refused():
    for size in (1e-165, 1e160):
        with pytest.raises(ValueError, match="have squares that are no numbers"):
            fl.gauss_newton(lambda x, c=size: c * torch.cat([x - 1, x.exp() - 3]), X0)


def test_what_the_residual_uses_must_not_change_before_a_derivative():
    data = Y.clone()
    s = torch.ones((), dtype=D, requires_grad=True)
    x = fl.gauss_newton(lambda x, s: decay(x, s * data), X0, (s,)).x
    data.mul_(2)
    with pytest.raises(ValueError, match="residual uses a tensor that has been changed in place"):
        x.sum().backward()


@pytest.mark.parametrize(
    ("residual", "x0", "error", "words"),
    [
        (lambda x: torch.stack([x[0] + x[1], x[0] + x[1] - 1]), X0, fl.RankDeficientError, "rank 1, not full rank 2"),
        (lambda x: torch.stack([x[0] ** 2 - 1, x[1]]), 0 * X0, torch.linalg.LinAlgError, "minimum"),  # a maximum
        (lambda x: torch.cat([x[:1] ** 2 - 1, x]), torch.tensor([0.0, 1.0]), fl.ConvergenceError, "not a strict"),
        (
            lambda x: torch.stack([x[1] - 3, x[0] ** 2 * x[1] - 1, x[0] / 10]),
            X0 * tensor(0, 1),
            fl.ConvergenceError,
            "not",
        ),
        (lambda x: torch.stack([x[0].cos() + 2, x[0] / 100, x[1]]), 0 * X0, fl.ConvergenceError, "not a strict"),
        (lambda x: torch.stack([x[0].sqrt() - 1, x[0], x[1]]), 0 * X0, fl.ConvergenceError, "NaN or infinity"),
        (lambda x: torch.stack([x[0].tanh() - 2, x[1]]), 0 * X0, torch.linalg.LinAlgError, "ended after|rank"),
        (lambda x: torch.exp(-x).sum()[None].expand(2) + 0 * x, X0, torch.linalg.LinAlgError, "ended after|rank"),
    ],
    ids=["flat", "maximum", "saddle", "hidden saddle", "hidden maximum", "infinite slope", "far away", "no minimum"],
)
def test_what_is_no_minimum_is_refused(residual, x0, error, words):
    with pytest.raises(error, match=words):
        fl.gauss_newton(residual, x0.double())
    solution = fl.gauss_newton(residual, x0.double(), throw=False)
    assert solution.info.status != "converged"


def test_without_throw_derivatives_of_what_failed_are_nan():
    f = lambda y: fl.gauss_newton(decay, X0, (y,), max_iterations=2, throw=False)  # noqa: E731
    assert f(Y).info.status == "iteration limit reached"
    assert jacrev(lambda y: f(y).x)(Y).isnan().all()
    assert jacfwd(lambda y: f(y).x)(Y).isnan().all()
    with pytest.raises(fl.ConvergenceError, match="after 2 iterations, the limit"):
        fit(Y, max_iterations=2)
    far = torch.stack([Y, 1e3 * Y.flip(0)])
    twice = hessian(lambda y: vmap(lambda y: f(y).x)(torch.stack([y, y])).sum())
    assert twice(Y).isnan().all()
    batch = vmap(lambda y: fl.gauss_newton(decay, X0, (y,), max_iterations=20, throw=False))(far)
    with pytest.raises(fl.ConvergenceError, match=r"1 of 2 problems failed; the first: number 1"):
        vmap(lambda y: fit(y, max_iterations=20))(far)
    assert batch.info.status_code.tolist() == [0, 3]
    close(batch.x[0], fit(Y), 1e-12)


BAD = {
    "residual": (lambda: fl.gauss_newton(3, X0), TypeError, "residual must be callable"),
    "x0 type": (lambda: fl.gauss_newton(decay, [1.0], (Y,)), TypeError, "x0 must be a dense tensor"),
    "x0 shape": (lambda: fl.gauss_newton(decay, X0[None], (Y,)), ValueError, r"x0 must have shape \(n,\)"),
    "x0 dtype": (lambda: fl.gauss_newton(decay, X0.to(torch.complex128), (Y,)), TypeError, "x0 must be float32"),
    "x0 NaN": (lambda: fl.gauss_newton(decay, X0 * torch.nan, (Y,)), ValueError, "x0 must be finite, got NaN"),
    "args": (lambda: fl.gauss_newton(decay, X0, Y), TypeError, "args must be a tuple, .* got Tensor"),
    "args NaN": (lambda: fl.gauss_newton(decay, X0, (Y / 0,)), ValueError, "args must be finite, got infinity"),
    "few": (lambda: fl.gauss_newton(lambda x: x[:1], X0), ValueError, "at least as many numbers as x0 has, 2, got 1"),
    "shape": (lambda: fl.gauss_newton(lambda x: x[None], X0), ValueError, r"real tensor of shape \(m,\), got"),
    "start": (lambda: fl.gauss_newton(lambda x: x.log() - 1, 0 * X0), ValueError, "must be finite at x0"),
    "jacobian": (lambda: fit(Y, jacobian=3), TypeError, "jacobian must be None, a SparsePattern or callable"),
    "jacobian shape": (lambda: fit(Y, jacobian=chain_pattern(2)), ValueError, r"jacobian must have shape \(6, 2\)"),
    "jacobian type": (lambda: fit(Y, jacobian=lambda x, y: x), TypeError, "must give a SparseMatrix, got Tensor"),
    "wrong": (
        lambda: fit(Y, jacobian=lambda x, y: fl.SparseMatrix.from_torch(torch.ones(6, 2, dtype=D).to_sparse())),
        ValueError,
        "jacobian must be that of residual, got a relative difference of",
    ),
    "missing": (
        lambda: fit(Y, jacobian=fl.SparsePattern(torch.stack([torch.arange(6), 0 * torch.arange(6)]), (6, 2))),
        ValueError,
        "jacobian must be that of residual",
    ),
    "single": (lambda: fl.gauss_newton(lambda x: torch.eye(2) @ x, X0.float()), TypeError, "in double precision"),
    "sparse": (lambda: fl.gauss_newton(decay, X0, (Y.to_sparse(),)), TypeError, "args must hold dense tensors"),
    "thresholds": (
        lambda: vmap(lambda t: fit(Y, robust=fl.Cauchy(t)))(torch.tensor([1.0, -1.0])),
        ValueError,
        "threshold of robust must be positive and finite, got -1",
    ),
    "robust": (lambda: fit(Y, robust="huber"), TypeError, r"robust must be None or one of Huber\(\), .*, got 'huber'"),
    "threshold": (
        lambda: fit(Y, robust=fl.Huber(-1.0)),
        ValueError,
        "threshold of robust must be positive and finite, got -1",
    ),
    "solver": (lambda: fit(Y, solver=fl.Dense), TypeError, "solver must be None or a Solver"),
    "iterations": (lambda: fit(Y, max_iterations=0), ValueError, "max_iterations must be at least 1, got 0"),
    "compile": (torch.compile(lambda: fit(Y), backend="eager", fullgraph=True), Exception, "cannot take gauss_newton"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()
