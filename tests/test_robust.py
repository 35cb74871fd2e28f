"""robust= of lstsq and solve: against dense reweighting and Newton's steps, with derivatives; and what it refuses."""

from functools import cache

import hypothesis.strategies as st
import pytest
import torch
from helpers import SOLVERS, close, dense, mixes, problem, with_singular_values
from hypothesis import example, given, settings
from torch.autograd import gradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import functional_lstsq as fl

D = torch.float64
PATTERN, VALUES, B = problem(12, 3)
B = B + 8 * (torch.arange(12) % 5 == 1)  # outliers
WEIGHTS = torch.linspace(0.5, 2, 12, dtype=D)
T = torch.tensor(0.8, dtype=D)


def tensor(*numbers):
    return torch.tensor(numbers, dtype=D)


LOSSES = [fl.Huber, fl.Cauchy]


def rho(kind, z, t):
    """Of statsmodels.robust.norms: HuberT, and Cauchy's as scipy.optimize.least_squares has it, t^2 / 2 scaled."""
    if kind is fl.Huber:
        return torch.where(z.abs() <= t, z**2 / 2, t * z.abs() - t**2 / 2)
    return t**2 / 2 * torch.log(1 + (z / t) ** 2)


def fit(kind, v, b, damp=None, weights=None, t=T, **options):
    A = fl.SparseMatrix(v, PATTERN)
    return fl.lstsq(A, b, damp=damp, weights=weights, robust=kind(t), **options)


def reference(kind, v, b, damp=0.0, weights=None, t=T, newton=3):
    """The minimum that reweighting leads to, then Newton's steps, each making one more derivative right."""
    A = dense(v, PATTERN)
    root = torch.ones_like(b) if weights is None else weights.sqrt()

    def cost(x):
        return rho(kind, root * (b - A @ x), t).sum() + (damp * x).square().sum() / 2

    with torch.no_grad():
        x = torch.linalg.pinv(root[:, None] * A) @ (root * b)
        for _ in range(300):
            z = root * (b - A @ x)
            w = root**2 * (t / z.abs().clamp_min(t) if kind is fl.Huber else 1 / (1 + (z / t) ** 2))
            x = torch.linalg.inv(A.T @ (w[:, None] * A) + damp**2 * torch.eye(3)) @ (A.T @ (w * b))
    x = x.detach()
    for _ in range(newton):
        x = x - torch.linalg.inv(jacfwd(grad(cost))(x)) @ grad(cost)(x)
    return x


of_every_kind = pytest.mark.parametrize("kind", LOSSES)
by_every_solver = pytest.mark.parametrize("solver", [None, *SOLVERS.values()], ids=["auto", *SOLVERS])


@of_every_kind
@by_every_solver
@pytest.mark.parametrize(
    "options",
    [{}, {"damp": 0.3}, {"weights": WEIGHTS}, {"damp": 0.3, "weights": WEIGHTS}],
    ids=["plain", "damped", "weighted", "both"],
)
def test_solutions(kind, solver, options):
    A = fl.SparseMatrix(VALUES, PATTERN)
    solution = fl.solve(A, B, robust=kind(T), solver=solver, **options)
    want = reference(kind, VALUES, B, **options)
    close(solution.x, want, 1e-12)
    close(solution.residual, B - A @ want, 1e-11)
    assert solution.info.status == "converged"
    assert solution.info.method == "IRLS"
    assert solution.info.forward_error < 1e-12


@of_every_kind
@by_every_solver
def test_solutions_of_columns(kind, solver):
    A = fl.SparseMatrix(VALUES, PATTERN)
    columns = torch.stack([B, B.flip(0), B.sin()], 1)
    got = fl.solve(A, columns, robust=kind(T), solver=solver)
    close(got.x, torch.stack([reference(kind, VALUES, b) for b in columns.T], 1), 1e-12)
    assert got.info.forward_error.shape == (3,)


INPUTS = {"values": VALUES, "b": B, "damp": torch.tensor(0.3, dtype=D), "weights": WEIGHTS, "threshold": T}


@cache
def jacobians(kind, mode):
    """By each of `INPUTS`; of the reference where there is no mode."""
    of = reference if mode is None else fit
    found = (mode or jacrev)(lambda *a: of(kind, *a), tuple(range(len(INPUTS))))(*INPUTS.values())
    return dict(zip(INPUTS, found, strict=True))


@of_every_kind
@pytest.mark.parametrize("mode", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
@pytest.mark.parametrize("name", INPUTS)
def test_derivatives_by_everything(kind, mode, name):
    close(jacobians(kind, mode)[name], jacobians(kind, None)[name], 1e-9)


@of_every_kind
def test_derivatives_by_differences(kind):
    inputs = tuple(a.clone().requires_grad_() for a in INPUTS.values())
    assert gradcheck(lambda *a: fit(kind, *a), inputs, fast_mode=True)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(
    ("mix", "name"),
    [
        *list(mixes(2))[:3],
        *(pytest.param(*mix, marks=pytest.mark.slow) for mix in [list(mixes(2))[3], *list(mixes(3))[2:4]]),
    ],
)
def test_derivatives_of_every_mix(kind, mix, name):
    def along(f):
        return lambda s: f(kind, VALUES * (1 + s[0]), B + s[1:].repeat(6), 0.3 + s[0], WEIGHTS).sin()

    got, want, s = along(fit), along(reference), torch.zeros(3, dtype=D)
    for transform in mix:
        got, want = transform(got), transform(want)
    close(got(s), want(s), 1e-8)


@pytest.mark.parametrize("kind", LOSSES)
def test_batches(kind):
    bs, vs = torch.stack([B, B.flip(0)]), torch.stack([VALUES, 1.2 * VALUES])
    one = [fit(kind, v, b) for v, b in zip(vs, bs, strict=True)]
    close(vmap(lambda v, b: fit(kind, v, b))(vs, bs), torch.stack(one), 1e-12)
    close(vmap(lambda b: fit(kind, VALUES, b))(bs)[1], fit(kind, VALUES, bs[1]), 1e-12)
    f = lambda b: fit(kind, VALUES, b).sin().sum()  # noqa: E731
    close(vmap(hessian(f))(bs)[1], hessian(f)(bs[1]), 1e-10)
    by_products = lambda b: fit(kind, VALUES, b, solver=fl.CGLS(tolerance=1e-13)).sin().sum()  # noqa: E731
    close(vmap(hessian(by_products))(bs)[1], hessian(f)(bs[1]), 1e-8)
    close(grad(lambda b: vmap(lambda s: fit(kind, VALUES, s * b).sum())(bs[0, :2]).sum())(B)[:2],
          sum(grad(lambda b, s=s: fit(kind, VALUES, s * b).sum())(B) for s in bs[0, :2])[:2], 1e-9)  # fmt: skip


@settings(max_examples=15)
@example(3, 4, fl.Huber, 0.25, 12031)  # two residuals within the threshold on the way, for three unknowns
@given(st.integers(1, 5), st.integers(0, 8), st.sampled_from(LOSSES), st.floats(0.1, 10), st.integers(0, 10**6))
def test_it_is_a_stationary_point_of_no_more_cost(n, more, kind, t, seed):
    pattern, values, b = problem(n + 3 + more, n, seed=seed)
    A = fl.SparseMatrix(values, pattern)
    t = torch.tensor(t, dtype=D)
    plainly = fl.lstsq(A, b)
    solution = fl.solve(A, b, robust=kind(t), throw=False)
    if solution.info.status != "converged":  # a loss that is flat along some direction, honestly told
        assert kind is not fl.Huber
        assert solution.info.status == "not a strict minimum"
        return
    cost = lambda x: rho(kind, b - dense(values, pattern) @ x, t).sum()  # noqa: E731
    assert grad(cost)(solution.x).abs().max() < 1e-10 * b.norm()
    assert cost(solution.x) <= cost(plainly) * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_a_threshold_far_below_the_noise(seed):
    g = torch.Generator().manual_seed(seed)
    Ad = torch.randn(60, 3, generator=g, dtype=D)
    b = Ad @ tensor(1.0, -2, 3) + 0.3 * torch.randn(60, generator=g, dtype=D)
    x = fl.lstsq(fl.SparseMatrix.from_torch(Ad.to_sparse()), b, robust=fl.Cauchy(0.1))
    slope = grad(lambda x: rho(fl.Cauchy, b - Ad @ x, tensor(0.1)[0]).sum())(x)
    assert slope.norm() < 1e-12


def test_thresholds_beyond_all_residuals_change_nothing():
    A = fl.SparseMatrix(VALUES, PATTERN)
    close(fl.lstsq(A, B, robust=fl.Huber(1e6)), fl.lstsq(A, B), 1e-12)
    close(fl.lstsq(A, B, robust=fl.Cauchy(1e9)), fl.lstsq(A, B), 1e-9)


@pytest.mark.parametrize("start", [0.0, 10.0])
def test_a_start_decides_between_minima(start):
    A = fl.SparseMatrix.from_torch(torch.ones(6, 1, dtype=D).to_sparse())
    b = torch.tensor([0.0, 0.1, -0.1, 10.0, 10.1, 9.9], dtype=D)
    x = fl.lstsq(A, b, robust=fl.Cauchy(0.5), x0=torch.tensor([start], dtype=D))
    assert abs(float(x) - start) < 0.1


def test_single_precision():
    x = fl.lstsq(fl.SparseMatrix(VALUES.float(), PATTERN), B.float(), robust=fl.Huber(0.8))
    assert x.dtype == torch.float32
    close(x.double(), reference(fl.Huber, VALUES, B), 1e-5)


def drawn():
    """(the generator, A, x)"""
    g = torch.Generator().manual_seed(1)
    return g, torch.randn(40, 4, generator=g, dtype=D), torch.randn(4, generator=g, dtype=D)


@of_every_kind
def test_exact_fits(kind):
    _, Ad, exact = drawn()
    close(fl.lstsq(Ad.to_sparse(), Ad @ exact, robust=kind(0.3)), exact, 1e-13)


@of_every_kind
@pytest.mark.parametrize("size", [1e4, 1e8, 1e12])
def test_huge_outliers_which_squares_would_see_and_nothing_else(kind, size):
    g, Ad, exact = drawn()
    A, b = Ad.to_sparse(), Ad @ exact + 0.1 * torch.randn(40, generator=g, dtype=D)
    b[::5] += size * torch.randn(8, generator=g, dtype=D)
    solution = fl.solve(A, b, robust=kind(0.3))
    again = fl.lstsq(A, b, robust=kind(0.3), x0=solution.x)
    assert (again - solution.x).norm() <= 10 * solution.info.forward_error * again.norm()
    assert (solution.x - exact).norm() < 0.2 * exact.norm()


@of_every_kind
@pytest.mark.parametrize("decades", [3, 6, 9, 12])
def test_ill_conditioned_ones_are_right_or_refused(kind, decades):
    Ad, pattern = with_singular_values(torch.logspace(0, -decades, 4, dtype=D), 15)
    b = Ad @ torch.ones(4, dtype=D) + 0.1 * torch.cos(torch.arange(15, dtype=D)) + 5 * (torch.arange(15) == 3)
    solution = fl.solve(fl.SparseMatrix(Ad.reshape(-1), pattern), b, robust=kind(0.1), throw=False)
    if decades <= 6:
        assert solution.info.status == "converged"
    if solution.info.status == "converged":
        x, cost = solution.x, lambda x: rho(kind, b - Ad @ x, torch.tensor(0.1, dtype=D)).sum()
        for _ in range(3):  # in long double there is none: Newton's steps measure what is left
            x = x - torch.linalg.solve(hessian(cost)(x), grad(cost)(x))
        assert (x - solution.x).norm() <= 10 * solution.info.forward_error * x.norm()


def test_what_fails_is_told():
    flat = fl.SparseMatrix.from_torch(torch.tensor([[1.0, 1], [2, 2], [3, 3]], dtype=D).to_sparse())
    b = torch.tensor([1.0, 2, 4], dtype=D)
    with pytest.raises(fl.RankDeficientError, match="rank 1"):
        fl.lstsq(flat, b, robust=fl.Huber())
    assert fl.solve(flat, b, robust=fl.Huber(), throw=False).info.status == "rank deficient"
    # Half of the residuals beyond the threshold on each side: every x in between costs the same.
    ones = fl.SparseMatrix.from_torch(torch.ones(2, 1, dtype=D).to_sparse())
    with pytest.raises(fl.ConvergenceError, match="not a strict minimum"):
        fl.lstsq(ones, torch.tensor([-5.0, 5.0], dtype=D), robust=fl.Huber(1.0))
    solve = lambda b: fl.solve(ones, b, robust=fl.Huber(1.0), throw=False)  # noqa: E731
    assert solve(torch.tensor([-5.0, 5.0], dtype=D)).info.status == "not a strict minimum"
    assert jacrev(lambda b: solve(b).x)(torch.tensor([-5.0, 5.0], dtype=D)).isnan().all()


A = fl.SparseMatrix(VALUES, PATTERN)
BAD = [
    ({"robust": "huber"}, TypeError, "robust must be None or one of Huber"),
    ({"robust": fl.Huber}, TypeError, "robust must be None or one of Huber"),
    ({"robust": fl.Huber(0.0)}, ValueError, "threshold of robust must be positive and finite, got 0"),
    ({"robust": fl.Huber(float("nan"))}, ValueError, "threshold of robust must be positive and finite, got nan"),
    ({"robust": fl.Cauchy("1")}, TypeError, "threshold of robust must be a positive number"),
    ({"robust": fl.Cauchy(torch.ones(2))}, TypeError, r"threshold of robust must be .* got shape \(2,\)"),
    ({"b": B.to(torch.complex128)}, TypeError, "robust needs real A and b"),
    ({"A": A.T, "b": B[:3]}, ValueError, r"robust needs A with at least as many rows as columns, got shape \(3, 12\)"),
    ({"refine": "extended"}, ValueError, "robust allows no refine='extended'"),
    (
        {"A": fl.LinearOperator(lambda v, x: v @ x, torch.ones(12, 3).double(), 3)},
        TypeError,
        "robust needs the entries",
    ),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD, ids=str)
def test_bad_input_is_refused(change, error, words):
    arguments = {"A": A, "b": B, "robust": fl.Huber(), **change}
    with pytest.raises(error, match=words):
        fl.lstsq(arguments.pop("A"), arguments.pop("b"), **arguments)


def test_no_right_hand_sides():
    assert fl.lstsq(A, B[:, None][:, :0], robust=fl.Huber()).shape == (3, 0)
