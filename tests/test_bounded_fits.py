"""`gauss_newton` within bounds: the sets of linear problems, minima, every derivative, what has none."""

import math

import pytest
import torch
from helpers import close, full_pattern, normal, problem
from scipy.optimize import least_squares
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import functional_lstsq as fl

D = torch.float64
T = torch.linspace(0, 4, 30, dtype=D)
DECAYS = 2 * torch.exp(-0.5 * T) - 0.3 * torch.exp(-2 * T) + 0.02 * normal(30, seed=0)
START = torch.tensor([1, 0.3, 0.5, 1.5], dtype=D)
LOWER = torch.tensor([0, 0, -0.1, 0], dtype=D)


def misfit(x, y):
    return x[0] * torch.exp(-x[1] * T) + x[2] * torch.exp(-x[3] * T) - y


def bounded(y, lower, **options):
    return fl.gauss_newton(misfit, START, (y,), bounds=(lower, 5.0), **options)


def linear(seed, m=12, n=5):
    pattern, values, b = problem(m, n, seed=seed)
    A, weights = fl.SparseMatrix(values, pattern), normal(m, seed=seed).abs() + 0.1
    return A, b, weights, torch.full((n,), -0.1, dtype=D), torch.linspace(0.05, 0.4, n, dtype=D)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_a_linear_fit_is_the_bounded_solution(seed):
    A, b, weights, lower, upper = linear(seed)
    x0 = torch.zeros(5, dtype=D)

    def fit(b, weights, lower, upper):
        return fl.gauss_newton(lambda x, b: A.matmul(x) - b, x0, (b,), weights=weights, bounds=(lower, upper))

    def solve(b, weights, lower, upper):
        return fl.solve(A, b, weights=weights, bounds=(lower, upper))

    given = b, weights, lower, upper
    got, want = fit(*given), solve(*given)
    assert want.info.active.any()
    close(got.x, want.x, 1e-13)
    assert torch.equal(got.info.active, want.info.active)
    assert torch.equal(got.info.weak, want.info.weak)
    close(got.info.multipliers, want.info.multipliers, 1e-10)
    for mode in (jacrev, jacfwd):
        for part in range(4):
            close(mode(lambda *t: fit(*t).x, part)(*given), mode(lambda *t: solve(*t).x, part)(*given), 1e-10)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
@pytest.mark.parametrize("seed", range(6))
def test_it_ends_no_higher_than_scipy(seed, scale):
    """Conditions of the minimum hold to the rounding of g; the box cuts off where a free fit would end."""
    y = DECAYS + 0.05 * normal(30, seed=seed)
    lower, upper = (torch.tensor(v, dtype=D) for v in ([0.5, 0.1, -0.2, 0.5], [1.7, 0.6, 0.2, 3.0]))
    x0 = torch.tensor([1.0, 0.3, 0.1, 1.5], dtype=D)
    of_scaled = lambda x, y: scale * misfit(x, y)  # noqa: E731
    fit = fl.gauss_newton(of_scaled, x0, (y,), bounds=(lower, upper))
    theirs = least_squares(
        lambda x: misfit(torch.from_numpy(x), y).numpy(), x0.numpy(), bounds=(lower.numpy(), upper.numpy()),
        xtol=1e-14, ftol=1e-14, gtol=1e-14,
    )  # fmt: skip
    assert float(fit.info.cost) <= scale**2 * theirs.cost * (1 + 1e-9)
    active, g = fit.info.active, grad(lambda x: of_scaled(x, y).square().sum() / 2)(fit.x)
    assert (active != 0).any()
    assert ((lower <= fit.x) & (fit.x <= upper)).all()
    assert torch.equal(fit.x[active == 1], upper[active == 1])
    assert torch.equal(fit.x[active == -1], lower[active == -1])
    assert (g * active <= 0).all()
    assert (g[active == 0].abs() <= 1e-11 * scale**2).all()
    close(fit.info.multipliers, torch.where(active != 0, -g, 0.0), 1e-9)


def test_derivatives_by_the_data_and_the_bounds():
    of_x = lambda y, lower: bounded(y, lower).x  # noqa: E731
    assert bounded(DECAYS, LOWER).info.active.tolist() == [0, 0, -1, -1]

    def free(y, lower):
        return fl.gauss_newton(lambda z, y, lower: misfit(torch.cat([z, lower[2:]]), y), START[:2], (y, lower)).x

    for part in (0, 1):
        for mode in (jacrev, jacfwd):
            got = mode(of_x, part)(DECAYS, LOWER)
            close(got[:2], mode(free, part)(DECAYS, LOWER), 1e-10)
            want = torch.zeros_like(got[2:]) if part == 0 else torch.eye(4, dtype=D)[2:]
            close(got[2:], want)
    second = hessian(lambda low: of_x(DECAYS, low).sin().sum())(LOWER)
    close(second, hessian(lambda low: torch.cat([free(DECAYS, low), low[2:]]).sin().sum())(LOWER), 1e-9)


def test_a_batch_has_a_set_for_each_member():
    ys = torch.stack([DECAYS, 1.1 * DECAYS, 2 * torch.exp(-0.5 * T) + 0.3 * torch.exp(-2 * T)])
    of_x = lambda y: bounded(y, LOWER).x  # noqa: E731
    assert len({tuple(bounded(y, LOWER).info.active.tolist()) for y in ys}) > 1
    close(vmap(of_x)(ys), torch.stack([of_x(y) for y in ys]), 1e-12)
    close(vmap(jacrev(of_x))(ys), torch.stack([jacrev(of_x)(y) for y in ys]), 1e-9)
    lowers = torch.stack([LOWER, LOWER - 1])
    close(
        vmap(lambda low: bounded(DECAYS, low).x)(lowers), torch.stack([bounded(DECAYS, low).x for low in lowers]), 1e-12
    )


def test_equal_bounds_keep_an_unknown_and_leave_it_out_of_the_statistics():
    inf = torch.full((4,), math.inf, dtype=D)
    known = torch.tensor([False, False, True, True])
    at = torch.tensor([0, 0, 0.1, 1.0], dtype=D)
    fit = fl.gauss_newton(misfit, START, (DECAYS,), bounds=(torch.where(known, at, -inf), torch.where(known, at, inf)))
    want = fl.gauss_newton(lambda z, y: misfit(torch.cat([z, at[2:]]), y), START[:2], (DECAYS,))
    close(fit.x, torch.cat([want.x, at[2:]]), 1e-12)
    assert not fit.info.weak.any()
    assert int(fit.dof) == int(want.dof) == 28
    close(fit.standard_errors(), torch.nn.functional.pad(want.standard_errors(), (0, 2)), 1e-9)
    close(fit.covariance(), torch.nn.functional.pad(want.covariance(), (0, 2, 0, 2)), 1e-9)
    close(fit.jacobian.to_dense(), jacrev(misfit)(fit.x, DECAYS), 1e-12)


def test_without_strict_complementarity_there_is_no_derivative():
    target = torch.tensor([1.0, -2.0, 0.0], dtype=D)  # the last is at its bound, and does not press against it
    fit = lambda b, **how: fl.gauss_newton(  # noqa: E731
        lambda x, b: x + 0.1 * x**3 - b, torch.ones(3, dtype=D), (b,), bounds=(0, 10), **how
    )
    found = fit(target)
    assert found.info.weak.tolist() == [False, False, True]
    assert found.x[1:].tolist() == [0, 0]
    for derivative in (grad(lambda b: fit(b).x.sum()), lambda b: jvp(lambda b: fit(b).x, (b,), (b,))):
        with pytest.raises(fl.ConvergenceError, match=r"x has no derivative.*\(2\)"):
            derivative(target)
    quiet = lambda b: fit(b, throw=False).x.sum()  # noqa: E731
    both = vmap(grad(quiet))(torch.stack([target, torch.tensor([1.0, -2.0, 1.0], dtype=D)]))
    assert both[0].isnan().any()
    assert not both[1].isnan().any()


@pytest.mark.parametrize(
    "jacobian",
    [full_pattern(30, 4), lambda x, y: fl.SparseMatrix(jacrev(misfit)(x, y).flatten(), full_pattern(30, 4))],
    ids=["pattern", "function"],
)
def test_every_kind_of_jacobian(jacobian):
    given = lambda y: bounded(y, LOWER, jacobian=jacobian).x  # noqa: E731
    whole = lambda y: bounded(y, LOWER).x  # noqa: E731
    close(given(DECAYS), whole(DECAYS), 1e-12)
    close(jacrev(given)(DECAYS), jacrev(whole)(DECAYS), 1e-9)


def test_robust_and_weighted():
    y = DECAYS + 3.0 * (torch.arange(30) == 7)
    options = {"robust": fl.Huber(0.05), "weights": torch.linspace(0.5, 2, 30, dtype=D)}

    def inner(y):
        return fl.gauss_newton(lambda z, y: misfit(torch.cat([z, LOWER[2:]]), y), START[:2], (y,), **options)

    fit, want = bounded(y, LOWER, **options), inner(y)
    assert fit.info.active.tolist() == [0, 0, -1, -1]
    close(fit.x[:2], want.x, 1e-11)
    close(jacrev(lambda y: bounded(y, LOWER, **options).x[:2])(y), jacrev(lambda y: inner(y).x)(y), 1e-8)
    close(fit.standard_errors()[:2], want.standard_errors(), 1e-8)


def test_trees_wide_problems_and_single_precision():
    x0, a = {"a": torch.ones(2), "b": torch.ones(())}, torch.tensor([1.0, 2.0])
    fit = fl.gauss_newton(
        lambda x, y: x["a"].sum() * x["b"] - y, x0, (torch.tensor([6.0]),),
        bounds=({"a": a, "b": torch.tensor(0.0)}, {"a": a, "b": torch.tensor(9.0)}),
    )  # fmt: skip
    assert fit.x["a"].tolist() == [1, 2]
    assert fit.x["b"].dtype == torch.float32
    assert float(fit.x["b"]) == 2.0


def test_an_unknown_that_cannot_move_from_the_wrong_side():
    """From a start at the wrong bound, and from outside of the bounds."""
    for start in (-3.0, 0.0, 5.0, 40.0):
        fit = fl.gauss_newton(
            lambda x: x.exp() - 2, torch.full((1,), start, dtype=D), bounds=(torch.zeros(1, dtype=D), 5.0)
        )
        close(fit.x, torch.full((1,), math.log(2), dtype=D), 1e-14)
        assert fit.info.active.tolist() == [0]


@pytest.mark.parametrize(
    ("bounds", "options", "error", "words"),
    [
        (1.0, {}, TypeError, r"bounds must be a pair \(lower, upper\), got float"),
        ((0,), {}, TypeError, "got 1 of them"),
        ((0, "1"), {}, TypeError, "the upper bound must be a number"),
        ((torch.zeros(3, dtype=D), 1), {}, ValueError, r"the lower bound must .* \(4,\), got \(3,\)"),
        ((2.0, 1.0), {}, ValueError, "bounds must be lower <= upper, with a number between, got 2 and 1 at 0"),
        ((math.nan, 1.0), {}, ValueError, "bounds must be lower <= upper"),
        ((torch.zeros(4, dtype=torch.complex128), 1), {}, TypeError, "the lower bound must be a number"),
        ((0.0, 1.0), {"rank_deficient": "minimum_norm"}, ValueError, "bounds allow no rank_deficient"),
        ((0.0, 1.0), {"robust": fl.Huber(scale="mad")}, ValueError, "bounds allow no estimated scale"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(bounds, options, error, words):
    with pytest.raises(error, match=words):
        fl.gauss_newton(misfit, START, (DECAYS,), bounds=bounds, **options)


def test_a_fit_that_does_not_come_to_an_end_is_refused():
    rosenbrock = lambda x: torch.stack([1 - x[0], 100 * (x[1] - x[0] ** 2)])  # noqa: E731
    x0 = torch.tensor([-1.9, 2.0], dtype=D)
    with pytest.raises(fl.ConvergenceError, match="raise max_iterations"):
        fl.gauss_newton(rosenbrock, x0, bounds=(-2.0, 0.9), max_iterations=3)
    reached = fl.gauss_newton(rosenbrock, x0, bounds=(-2.0, 0.9), max_iterations=3, throw=False)
    assert reached.info.status != "converged"
    assert jacrev(lambda s: fl.gauss_newton(
        lambda x, s: s * rosenbrock(x), x0, (s,), bounds=(-2.0, 0.9), max_iterations=3, throw=False
    ).x)(torch.ones((), dtype=D)).isnan().all()  # fmt: skip
    fit = fl.gauss_newton(rosenbrock, x0, bounds=(-2.0, 0.9))
    close(fit.x, torch.tensor([0.9, 0.81], dtype=D), 1e-14)
