"""gauss_newton: against dense Newton and finite differences, in every mode; and what it refuses."""

import hypothesis.strategies as st
import pytest
import torch
from helpers import close, mixes, normal
from hypothesis import HealthCheck, given, settings
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap

import functional_lstsq as fl
from functional_lstsq.sparse import coloring

D = torch.float64
T = torch.linspace(0, 2, 6, dtype=D)
Y = torch.tensor([2.0, 1.3, 0.8, 0.5, 0.4, 0.2], dtype=D)
X0 = torch.tensor([1.0, 1.0], dtype=D)


def tensor(*numbers):
    return torch.tensor(numbers, dtype=D)


def decay(x, y):
    return x[0] * torch.exp(-x[1] * T.to(y.dtype)) - y


def fit(y, **options):
    return fl.gauss_newton(decay, X0, (y,), **options).x


def by_newton(residual, x, *args, steps=3):
    """The minimum near x, differentiable to order `steps`: each step of Newton makes one more derivative right."""
    cost = lambda x: residual(x, *args).square().sum() / 2  # noqa: E731
    for _ in range(steps):
        x = x - torch.linalg.inv(jacfwd(grad(cost))(x)) @ grad(cost)(x)
    return x


def chain(x, y):
    """Each residual knows two neighbours of n unknowns."""
    return torch.cat([torch.sin(x[:-1]) + 2 * x[1:].square() - y[:-1], (x - y.mean()) / 3])


def chain_pattern(n):
    i = torch.arange(n - 1)
    rows = torch.cat([i, i, n - 1 + torch.arange(n)])
    return fl.SparsePattern(torch.stack([rows, torch.cat([i, i + 1, torch.arange(n)])]), (2 * n - 1, n))


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
