"""variable_projection: NIST's certified values, SciPy's counts, derivatives by the data; and what it refuses."""

import numpy as np
import pytest
import torch
from helpers import close, full_pattern
from scipy.optimize import least_squares
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, vmap

import functional_lstsq as fl

D = torch.float64


def tensor(*numbers):
    return torch.tensor(numbers, dtype=D)


# Statistical Reference Datasets of NIST, nonlinear regression: (t, y, columns of the design, starts (p, x), certified).
MISRA = (
    tensor(77.6, 114.9, 141.1, 190.8, 239.9, 289, 332.8, 378.4, 434.8, 477.3, 536.8, 593.1, 689.1, 760),
    tensor(10.07, 14.73, 17.94, 23.93, 29.61, 35.18, 40.02, 44.82, 50.76, 55.05, 61.01, 66.4, 75.47, 81.78),
)
SATURATION = lambda p, t: (1 - torch.exp(-p * t))[:, None]  # noqa: E731
FITS = {
    "Misra1a": (*MISRA, SATURATION, [(1e-4, 500), (5e-4, 250)], (5.5015643181e-4, 238.94212918)),
    "BoxBOD": (
        tensor(1, 2, 3, 5, 7, 10), tensor(109, 149, 149, 191, 213, 224),
        SATURATION, [(1, 1), (0.75, 100)], (0.54723748542, 213.80940889),
    ),
    "DanWood": (
        tensor(1.309, 1.471, 1.49, 1.565, 1.611, 1.68), tensor(2.138, 3.421, 3.597, 4.34, 4.882, 5.66),
        lambda p, t: (t**p)[:, None], [(5, 1), (4, 0.7)], (3.8604055871, 0.76886226176),
    ),
    # The function that Lanczos' data are rounded from.
    "Lanczos": (
        torch.arange(24, dtype=D) / 20,
        (tensor(0.0951, 0.8607, 1.5576) * torch.exp(-torch.arange(24, dtype=D)[:, None] / 20 * tensor(1, 3, 5))).sum(1),
        lambda p, t: torch.exp(-t[:, None] * p),
        [(0.3, 5.5, 7.6, 1.2, 5.6, 6.5), (0.7, 4.2, 6.3, 0.5, 3.4, 4.7)], (1, 3, 5, 0.0951, 0.8607, 1.5576),
    ),
}  # fmt: skip


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("name", FITS)
def test_it_reaches_what_scipy_reaches_in_fewer_evaluations(name, start):
    t, y, columns, starts, certified = FITS[name]
    both, want = tensor(*starts[start]), tensor(*certified)
    n = len(both) // 2
    pattern = full_pattern(len(t), n)
    ours = 0

    def design(p):
        nonlocal ours
        ours += 1
        return fl.SparseMatrix(columns(p, t).reshape(-1), pattern)

    fit = fl.variable_projection(design, both[:n], y)
    close(torch.cat([fit.p, fit.x]) / want, torch.ones(2 * n, dtype=D), 1e-10)
    assert fit.info.status == "converged"

    calls = 0

    def residual(z):
        nonlocal calls
        calls += 1
        z = torch.from_numpy(z)
        return (columns(z[:n], t) @ z[n:] - y).numpy()

    tight = dict.fromkeys(("xtol", "ftol", "gtol"), 1e-15)
    theirs = least_squares(residual, both.numpy(), x_scale="jac", max_nfev=5000, **tight)
    cost = float(fit.residual.square().sum()) / 2
    assert cost <= theirs.cost * (1 + 1e-8) + 1e-25
    # All calls, for derivatives too, and SciPy's, which makes its Jacobian of differences.
    assert ours < calls
    assert int(fit.info.evaluations) < calls
    assert np.isfinite(theirs.cost)


T = torch.linspace(0, 2, 8, dtype=D)
RATES = tensor(0.4, 2.0)
Y = torch.exp(-T[:, None] * RATES) @ tensor(2.0, 1.0) + 0.05 * torch.cos(9 * T)
WEIGHTS = torch.linspace(0.5, 2, 8, dtype=D)
PATTERN = full_pattern(8, 2)


def decays(p, s=1.0):
    return fl.SparseMatrix(torch.exp(-s * T[:, None] * p).reshape(-1), PATTERN)


def fit(y, **options):
    return fl.variable_projection(decays, tensor(0.3, 1.5), y, **options)


def by_all(y, weights=None):
    """The same by gauss_newton, over p and x alike."""
    root = 1 if weights is None else weights.sqrt()
    residual = lambda z, y, root: root * (torch.exp(-T[:, None] * z[:2]) @ z[2:] - y)  # noqa: E731
    return fl.gauss_newton(residual, tensor(0.3, 1.5, 1.5, 1), (y, root)).x


def test_it_is_the_minimum_over_all_unknowns():
    for weights in (None, WEIGHTS):
        got = fit(Y, weights=weights)
        want = by_all(Y, weights)
        close(torch.cat([got.p, got.x]), want, 1e-10)
        close(got.residual, Y - torch.exp(-T[:, None] * want[:2]) @ want[2:], 1e-9)


@pytest.mark.slow
def test_derivatives_by_the_data_pass_gradcheck():
    t, y, columns, starts, _ = FITS["DanWood"]

    def dan_wood(y):
        design = lambda p: fl.SparseMatrix(columns(p, t).reshape(-1), full_pattern(6, 1))  # noqa: E731
        got = fl.variable_projection(design, tensor(starts[1][0]), y)
        return got.p, got.x, got.residual

    assert gradcheck(dan_wood, (y.clone().requires_grad_(),))
    assert gradgradcheck(dan_wood, (y.clone().requires_grad_(),), fast_mode=True)

    def by_everything(y, weights, s):
        got = fl.variable_projection(decays, tensor(0.3, 1.5), y, (s,), weights=weights)
        return got.p, got.x, got.residual

    assert gradcheck(by_everything, [t.clone().requires_grad_() for t in (Y, WEIGHTS, tensor(1.1)[0])], fast_mode=True)


@pytest.mark.parametrize("mix", [(jacrev,), (jacfwd,), (jacrev, jacfwd)], ids=["jacrev", "jacfwd", "jacfwd-jacrev"])
def test_derivatives_of_mixes(mix):
    got, want = (lambda y: (lambda s: torch.cat([s.p, s.x]))(fit(y))), by_all
    for transform in mix:
        got, want = transform(got), transform(want)
    close(got(Y), want(Y), 1e-6)


def test_batches_and_columns():
    ys = torch.stack([Y, 1.3 * Y])
    batch = vmap(fit)(ys)
    for i in range(2):
        close(batch.p[i], fit(ys[i]).p, 1e-10)
    close(vmap(jacrev(lambda y: fit(y).p))(ys)[1], jacrev(lambda y: fit(y).p)(ys[1]), 1e-8)
    together = fit(torch.stack([Y, Y.flip(0).sin()], 1))
    assert together.x.shape == (2, 2)
    assert together.residual.shape == (8, 2)

    def loss(p):
        A, b = torch.exp(-T[:, None] * p), torch.stack([Y, Y.flip(0).sin()], 1)
        return (b - A @ torch.linalg.pinv(A) @ b).square().sum()

    assert grad(loss)(together.p).abs().max() < 1e-10


def test_steps_to_where_the_design_overflows_are_taken_back():
    starts = torch.stack([tensor(0.3, 1.5), tensor(0.0, 400.0), tensor(1.0, 1.0)])
    run = lambda p0, y: fl.variable_projection(decays, p0, y, throw=False)  # noqa: E731
    batch = vmap(lambda p0: run(p0, Y))(starts)
    close(batch.p[0], fit(Y).p, 1e-12)
    assert batch.info.status_code[0] == 0
    assert batch.info.status_code[2] != 0  # A(p0) has no full rank
    rows = vmap(lambda p0: jacrev(lambda y: run(p0, y).p)(Y))(starts)
    close(rows[0], jacrev(lambda y: fit(y).p)(Y), 1e-10)
    assert rows[2].isnan().all()
    assert run(starts[2], Y).info.status == "inaccurate"


def test_a_linear_operator_for_design():
    def design(p):
        return fl.LinearOperator(lambda p, x: torch.exp(-T[:, None] * p) @ x, p, 2)

    f = lambda y: fl.variable_projection(design, tensor(0.3, 1.5), y).p  # noqa: E731
    close(f(Y), fit(Y).p, 1e-9)
    close(jacfwd(f)(Y), jacfwd(lambda y: fit(y).p)(Y), 1e-6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fl.variable_projection(1, RATES, Y), TypeError, "design must be callable"),
        (lambda: fl.variable_projection(decays, 1.0, Y), TypeError, "p0 must be a dense tensor"),
        (lambda: fl.variable_projection(decays, RATES / 0, Y), ValueError, "p0 must be finite"),
        (lambda: fit(Y.to(torch.complex128)), TypeError, "b must be a real tensor"),
        (lambda: fit(Y[:3]), ValueError, r"b must have shape \(8,\)"),
        (lambda: fit(Y, weights=Y[:3]), ValueError, r"weights must have shape \(8,\)"),
        (lambda: fl.variable_projection(decays, RATES, Y, T), TypeError, "args must be a tuple"),
        (lambda: fl.variable_projection(lambda p: 3, RATES, Y), TypeError, "A must be a SparseMatrix"),
        (
            lambda: fl.variable_projection(decays, RATES[:1].expand(2), Y),
            fl.RankDeficientError,
            "rank 1, not full rank 2",
        ),
        (lambda: fit(Y / 0), ValueError, "b must be finite"),
    ],
)
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


LEVEL = torch.linspace(0, 4, 15, dtype=D)
DECAY = 1 + 3 * torch.exp(-LEVEL / 2) + 0.02 * torch.sin(40 * LEVEL) + 1.0 * (torch.arange(15) == 4)


def level_and_decay(p):
    columns = torch.stack([torch.ones_like(LEVEL), torch.exp(-LEVEL * p[0])], 1)
    return fl.SparseMatrix(columns.flatten(), full_pattern(15, 2))


def robustly(robust):
    """(p and x by variable projection, by gauss_newton over both), of data."""
    start = tensor(0.3, 1.0, 3.0)

    def separable(b):
        fit = fl.variable_projection(level_and_decay, start[:1], b, robust=robust)
        return torch.cat([fit.p, fit.x])

    def together(b):
        return fl.gauss_newton(lambda z, b: level_and_decay(z[:1]).matmul(z[1:]) - b, start, (b,), robust=robust).x

    return separable, together


def test_a_robust_loss_is_one_of_all_unknowns():
    separable, together = robustly(fl.Huber(0.03))
    close(separable(DECAY), together(DECAY), 1e-12)
    close(jacrev(separable)(DECAY), jacrev(together)(DECAY), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("robust", [fl.Huber(scale="mad"), fl.Tukey(scale="huber")], ids=repr)
def test_a_scale_is_estimated_with_all_unknowns(robust):
    separable, together = robustly(robust)
    close(separable(DECAY), together(DECAY), 1e-11)
    if isinstance(robust, fl.Huber):  # each derivative takes half a minute
        close(jacrev(separable)(DECAY), jacrev(together)(DECAY), 1e-9)


def test_a_weight_of_zero_has_a_derivative():
    weights, start = torch.linspace(0, 2, 15, dtype=D), tensor(0.3, 1.0, 3.0)
    of_p = lambda w: fl.variable_projection(level_and_decay, start[:1], DECAY, weights=w).p  # noqa: E731
    both = lambda z: level_and_decay(z[:1]).matmul(z[1:]) - DECAY  # noqa: E731
    of_all = lambda w: fl.gauss_newton(both, start, weights=w).x[:1]  # noqa: E731
    close(jacrev(of_p)(weights), jacrev(of_all)(weights), 1e-10)
