"""Robust losses by their formulas, and scales estimated with the unknowns: statsmodels' numbers, derivatives."""

from itertools import cycle

import pytest
import torch
from helpers import close, dense, mixes, normal, problem
from test_sandwich import LOSS, A
from torch.func import grad, jacfwd, jacrev, vmap

import functional_lstsq as fl

D = torch.float64
# The losses of z for a threshold of 1: rho / 2 of scipy.optimize.least_squares, rho of statsmodels.robust.norms.
RHO = {
    fl.Huber: lambda z: torch.where(z.abs() <= 1, z**2 / 2, z.abs() - 0.5),
    fl.Cauchy: lambda z: torch.log(1 + z**2) / 2,
    fl.SoftL1: lambda z: (1 + z**2).sqrt() - 1,
    fl.Arctan: lambda z: torch.arctan(z**2) / 2,
    fl.Tukey: lambda z: torch.where(z.abs() <= 1, 1 - (1 - z**2) ** 3, 1.0) / 6,
    fl.Hampel: lambda z: torch.where(
        z.abs() <= 1,
        z**2 / 2,
        torch.where(z.abs() <= 2, z.abs() - 0.5, torch.where(z.abs() <= 4, 2.5 - (4 - z.abs()) ** 2 / 4, 2.5 + 0 * z)),
    ),
}
of_every_kind = pytest.mark.parametrize("kind", RHO, ids=lambda kind: kind.__name__)
by_every_estimator = pytest.mark.parametrize("estimator", ["mad", "huber"])


@of_every_kind
def test_formulas(kind):
    r, w, t = torch.linspace(-7, 7, 30, dtype=D), torch.linspace(0.5, 1.5, 30, dtype=D), torch.tensor(1.3, dtype=D)
    want = lambda r: t**2 * RHO[kind](w.sqrt() * r / t)  # noqa: E731
    close(kind().cost(r, w, t), want(r), 1e-14)
    close(kind().influence(r, w, t), grad(lambda r: want(r).sum())(r), 1e-14)
    close(kind().weight(r, w, t), grad(lambda r: want(r).sum())(r) / r, 1e-14)


PATTERN, VALUES, B = problem(14, 3, seed=5)
B = dense(VALUES, PATTERN) @ torch.ones(3, dtype=D) + 0.3 * normal(14, seed=6) + 4 * (torch.arange(14) % 6 == 1)
W = torch.linspace(0.5, 2, 14, dtype=D)


def fit(kind, estimator, values, b, w):
    return fl.lstsq(fl.SparseMatrix(values, PATTERN), b, weights=w, robust=kind(scale=estimator))


def scale_of(estimator, z, s, counted):
    """The next one; half of the sizes lie below the median."""
    if estimator == "mad":
        return z.abs().sort().values[(len(z) - 1) // 2 : len(z) // 2 + 1].mean() / 0.6744897501960817
    normal = torch.distributions.Normal(torch.zeros((), dtype=D), 1.0)
    d = torch.tensor(2.5, dtype=D)
    gamma = 2 * (d**2 + (1 - d**2) * normal.cdf(d) - 0.5 - d * normal.log_prob(d).exp())
    return (torch.minimum(z**2, (d * s) ** 2).sum() / (gamma * (counted - 3))).sqrt()


def joint(kind, estimator, values, b, w, steps):
    """x by steps of Newton's for both equations from the estimate itself, each of which makes one derivative right."""
    k = kind().threshold
    A = dense(values, PATTERN)

    def equations(xs):
        x, s = xs[:3], xs[3]
        z = w.sqrt() * (b - A @ x)
        psi = grad(lambda u: RHO[kind](u).sum())(z / (k * s))
        return torch.cat([A.T @ (w.sqrt() * psi), (scale_of(estimator, z, s, len(b)) - s)[None]])

    x = fit(kind, estimator, VALUES, B, W)
    s = torch.ones((), dtype=D)
    for _ in range(2000):  # the scale for that x
        s = scale_of(estimator, W.sqrt() * (B - dense(VALUES, PATTERN) @ x), s, 14)
    xs = torch.cat([x, s[None]]).detach()
    for _ in range(steps):
        xs = xs - torch.linalg.inv(jacfwd(equations)(xs)) @ equations(xs)
    return xs[:3]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "estimator"), list(zip(RHO, cycle(("mad", "huber")), strict=False)))
def test_the_joint_estimate_and_its_derivatives(kind, estimator):
    close(fit(kind, estimator, VALUES, B, W), joint(kind, estimator, VALUES, B, W, 1), 1e-12)
    for by, mode in enumerate((jacrev, jacfwd, jacrev)):
        got = mode(lambda *every: fit(kind, estimator, *every), by)(VALUES, B, W)
        close(got, mode(lambda *every: joint(kind, estimator, *every, 1), by)(VALUES, B, W), 1e-9)


@pytest.mark.parametrize("estimator", ["mad", pytest.param("huber", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("mix", "name"), list(mixes(2)))
def test_second_derivatives(estimator, mix, name):
    got = lambda b: fit(fl.Tukey, estimator, VALUES, b, W)[0]  # noqa: E731
    want = lambda b: joint(fl.Tukey, estimator, VALUES, b, W, 2)[0]  # noqa: E731
    for transform in mix:
        got, want = transform(got), transform(want)
    close(got(B), want(B), 1e-8)


# statsmodels 0.15.0: RLM(LOSS, A, M=norm).fit(scale_est=..., conv="coefs", tol=1e-15).params, with "mad" and with
# HuberScale(), of HuberT, TukeyBiweight, Hampel, and StudentT(c=2.385, df=1), which is Cauchy's.
PUBLISHED = {
    (fl.Huber, "mad"): (-41.02649835240027, 0.8293843346001095, 0.9260659661966473, -0.12784672494578514),
    (fl.Huber, "huber"): (-41.08919582191635, 0.7989797092648103, 1.0475058009012335, -0.1350673337682194),
    (fl.Tukey, "mad"): (-42.28535077932965, 0.9275573227555238, 0.6507176872142995, -0.11233315379090238),
    (fl.Tukey, "huber"): (-40.8949360512161, 0.7932120659124064, 1.0476899810198341, -0.13353431578716965),
    (fl.Hampel, "mad"): (-40.4747592805434, 0.7410842749760745, 1.2250759347978701, -0.14552473815066094),
    (fl.Hampel, "huber"): (-40.271222576938555, 0.7317545248470226, 1.2508203777970335, -0.14794399093738544),
    (fl.Cauchy, "mad"): (-40.65866223793111, 0.8345966623149972, 0.8764819156250204, -0.12383893042077794),
    (fl.Cauchy, "huber"): (-40.66176438732465, 0.7958457314038939, 1.0216341086759673, -0.132144473250517),
}


@pytest.mark.parametrize(("kind", "estimator"), PUBLISHED, ids=lambda part: getattr(part, "__name__", part))
def test_published_numbers(kind, estimator):
    want = torch.tensor(PUBLISHED[kind, estimator], dtype=D)
    close(fl.lstsq(A, LOSS, robust=kind(scale=estimator)) / want, torch.ones_like(want), 1e-10)


@by_every_estimator
def test_units_do_not_matter(estimator):
    robust = fl.Tukey(scale=estimator)
    close(fl.lstsq(A, 1e-3 * LOSS, robust=robust), 1e-3 * fl.lstsq(A, LOSS, robust=robust), 1e-12)


@by_every_estimator
def test_a_nonlinear_fit_is_the_linear_one_where_it_is_linear(estimator):
    robust = fl.SoftL1(scale=estimator)
    residual = lambda x, b: A.matmul(x) - b  # noqa: E731
    ours = lambda b: fl.gauss_newton(residual, torch.zeros(4, dtype=D), (b,), robust=robust).x  # noqa: E731
    close(ours(LOSS), fl.lstsq(A, LOSS, robust=robust), 1e-11)
    close(jacrev(ours)(LOSS), jacrev(lambda b: fl.lstsq(A, b, robust=robust))(LOSS), 1e-9)


@pytest.mark.slow
@by_every_estimator
def test_columns_and_batches(estimator):
    robust, bs = fl.Huber(scale=estimator), torch.stack([LOSS, LOSS.flip(0), LOSS.sqrt()])
    one_by_one = torch.stack([fl.lstsq(A, b, robust=robust) for b in bs])
    close(fl.lstsq(A, bs.T, robust=robust).T, one_by_one, 1e-12)
    close(vmap(lambda b: fl.lstsq(A, b, robust=robust))(bs), one_by_one, 1e-12)
    slopes = jacrev(lambda b: fl.lstsq(A, b, robust=robust))
    close(vmap(slopes)(bs), torch.stack([slopes(b) for b in bs]), 1e-9)


@by_every_estimator
def test_a_row_of_weight_zero_is_left_out_of_the_scale(estimator):
    rest = torch.arange(21) % 7 != 3
    robust, without = fl.Huber(scale=estimator), fl.SparseMatrix.from_torch(A.to_dense()[rest].to_sparse())
    close(fl.lstsq(A, LOSS, weights=rest.to(D), robust=robust), fl.lstsq(without, LOSS[rest], robust=robust), 1e-12)


def test_a_scale_that_is_given_multiplies_the_threshold():
    scale = torch.tensor(2.0, dtype=D)
    by = lambda scale: fl.lstsq(A, LOSS, robust=fl.Cauchy(1.5, scale=scale))  # noqa: E731
    close(by(scale), fl.lstsq(A, LOSS, robust=fl.Cauchy(3.0)), 1e-13)
    close(jacrev(by)(scale), 1.5 * jacrev(lambda t: fl.lstsq(A, LOSS, robust=fl.Cauchy(t)))(1.5 * scale), 1e-10)


ONES = fl.SparseMatrix.from_torch(torch.ones(6, 1, dtype=D).to_sparse())
TIED = torch.tensor([1.0, 1, 3, 3, 7, 0], dtype=D)


def location(b, **options):
    return fl.solve(ONES, b, robust=fl.Huber(scale="mad"), **options).x


@pytest.mark.parametrize("mode", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
def test_residuals_that_tie_for_the_median_have_no_derivative(mode):
    close(location(TIED), torch.tensor([2.0], dtype=D), 1e-14)
    with pytest.raises(fl.ConvergenceError, match="residuals of the same size tie for the median"):
        mode(location)(TIED)
    assert mode(lambda b: location(b, throw=False))(TIED)[0, 0].isnan()


def matrix_and_solution():
    pattern, values, _ = problem(40, 4, seed=5)
    return fl.SparseMatrix(values, pattern), 40, torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=D)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("kind", [fl.Huber, fl.SoftL1, fl.Tukey], ids=lambda kind: kind.__name__)
def test_data_without_noise_are_met_in_any_units(kind, unit):
    """The scale is that of rounding errors then; a constant, so that derivatives are those of plain least squares."""
    A, _, x = matrix_and_solution()
    exact = unit * A.matmul(x)
    for robust in (kind(), kind(scale="huber")):
        close(fl.lstsq(A, exact, robust=robust), unit * x, 1e-12)
    close(fl.lstsq(A, 0 * exact, robust=kind()), 0 * x)
    if kind is fl.Huber:
        close(jacrev(lambda b: fl.lstsq(A, b, robust=kind()))(exact), torch.linalg.pinv(A.to_dense()), 1e-9)
        close(jacfwd(lambda b: fl.lstsq(A, b, robust=kind()))(exact), torch.linalg.pinv(A.to_dense()), 1e-9)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_outliers_among_data_without_noise_are_left_aside(unit):
    A, rows, x = matrix_and_solution()
    b = unit * A.matmul(x) + unit * 30.0 * (torch.arange(rows) % 5 == 0)
    close(fl.lstsq(A, b, robust=fl.Huber()), unit * x, 1e-9)


@pytest.mark.parametrize("loss", [fl.Huber(), fl.Huber(scale="huber"), fl.Cauchy()], ids=str)
@pytest.mark.parametrize("height", [1e6, 1e10])
@pytest.mark.parametrize("seed", range(5))
def test_a_scale_is_as_accurate_as_residuals_beside_far_larger_data(height, loss, seed):
    """Noise of 1 beside heights whose rounding alone is far above 1e-10 of it; a warm start does as the cold one."""
    generator = torch.Generator().manual_seed(seed)
    A, noise = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((40, 3), (40,)))
    noise[:5] += 20
    level = A @ torch.full((3,), height, dtype=torch.float64)
    b = level + noise
    A, noise = A.to_sparse(), b - level
    x, rest = fl.lstsq(A, b, robust=loss), fl.lstsq(A, noise, robust=loss)
    allowed = 1e4 * torch.finfo(torch.float64).eps * height
    assert (x - height - rest).abs().max() < allowed
    assert (fl.lstsq(A, b, robust=loss, x0=x) - x).abs().max() < allowed


@pytest.mark.parametrize("columns", [1, 3])
def test_info_tells_the_scale(columns):
    """That of mad is the median size of the residuals over 0.6745; one that is given is told as it is."""
    generator = torch.Generator().manual_seed(0)
    A, noise = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((40, 3), (40, columns)))
    b = A.sum(1, keepdim=True) + noise
    b = b[:, 0] if columns == 1 else b
    A = A.to_sparse()
    for loss, want in ((fl.Huber(), None), (fl.Cauchy(scale="mad"), None), (fl.Huber(1.5, scale=0.7), 0.7)):
        x, r, info = fl.solve(A, b, robust=loss)
        wanted = r.abs().quantile(0.5, 0) / 0.6744897501960817
        wanted = wanted if want is None else torch.full_like(wanted, want)
        close(info.scale, wanted, 1e-9)
        assert info.status == "converged"
        assert "scale=" in repr(info)
        if columns == 1:
            fit = fl.gauss_newton(lambda x, b: A.to_dense() @ x - b, x, (b,), robust=loss)
            close(fit.info.scale, wanted, 1e-9)
    assert fl.gauss_newton(lambda x: x - 1, torch.zeros(2).double()).info.scale.isnan()


def test_nothing_said_is_a_scale_that_is_estimated():
    """In km as in m; a threshold that is given is in the units of the data."""
    assert fl.Huber() == fl.Huber(1.345, "mad")
    assert fl.Huber(scale="huber").scale == "huber"
    assert fl.Tukey(2.0).scale is None
    want = fl.lstsq(A, LOSS, robust=fl.Huber(scale="mad"))
    for unit in (1e-3, 1.0, 1e3):
        close(fl.lstsq(A, unit * LOSS, robust=fl.Huber()) / unit, want, 1e-11)


BAD = [
    (fl.Huber(scale="MAD"), ValueError, "scale of robust must be a positive number, 'mad' or 'huber', got 'MAD'"),
    (fl.Tukey(scale=-1.0), ValueError, "scale of robust must be positive and finite, got -1"),
    (fl.SoftL1(scale=torch.ones(2)), TypeError, r"scale of robust must be .* got shape \(2,\)"),
    (fl.Arctan(0.0), ValueError, "threshold of robust must be positive and finite, got 0"),
    (fl.Hampel(falls=3.0, ends=3.0), ValueError, "falls and ends of robust must be 1 <= falls < ends, got 3.0 and 3.0"),
]


@pytest.mark.parametrize(("robust", "error", "words"), BAD, ids=str)
def test_bad_input_is_refused(robust, error, words):
    with pytest.raises(error, match=words):
        fl.lstsq(A, LOSS, robust=robust)
