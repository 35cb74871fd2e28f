"""What a fit says of its unknowns: NIST's certified standard errors, weights and sigma, sandwiches, and derivatives."""

import copy
import itertools

import pytest
import torch
from helpers import close, normal
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import functional_lstsq as fl

D = torch.float64


def tensor(*numbers):
    return torch.tensor(numbers, dtype=D)


def model(function):
    return lambda b, x, y: function(b, x) - y


# Statistical Reference Datasets, nonlinear regression, National Institute of Standards and Technology, 1997 to 1999:
# model, x, y, a start, certified parameters and certified standard deviations.
NIST = {
    "Misra1a": (
        lambda b, x: b[0] * (1 - torch.exp(-b[1] * x)),
        (77.6, 114.9, 141.1, 190.8, 239.9, 289.0, 332.8, 378.4, 434.8, 477.3, 536.8, 593.1, 689.1, 760.0),
        (10.07, 14.73, 17.94, 23.93, 29.61, 35.18, 40.02, 44.82, 50.76, 55.05, 61.01, 66.40, 75.47, 81.78),
        (500, 1e-4),
        (2.3894212918e02, 5.5015643181e-04),
        (2.7070075241e00, 7.2668688436e-06),
    ),
    "DanWood": (
        lambda b, x: b[0] * x ** b[1],
        (1.309, 1.471, 1.490, 1.565, 1.611, 1.680),
        (2.138, 3.421, 3.597, 4.340, 4.882, 5.660),
        (1, 5),
        (7.6886226176e-01, 3.8604055871e00),
        (1.8281973860e-02, 5.1726610913e-02),
    ),
    "BoxBOD": (
        lambda b, x: b[0] * (1 - torch.exp(-b[1] * x)),
        (1, 2, 3, 5, 7, 10),
        (109, 149, 149, 191, 213, 224),
        (100, 0.75),
        (2.1380940889e02, 5.4723748542e-01),
        (1.2354515176e01, 1.0455993237e-01),
    ),
    "Rat42": (
        lambda b, x: b[0] / (1 + torch.exp(b[1] - b[2] * x)),
        (9, 14, 21, 28, 42, 57, 63, 70, 79),
        (8.93, 10.80, 18.59, 22.33, 39.35, 56.11, 61.73, 64.62, 67.08),
        (100, 1, 0.1),
        (7.2462237576e01, 2.6180768402e00, 6.7359200066e-02),
        (1.7340283401e00, 8.8295217536e-02, 3.4465663377e-03),
    ),
    "MGH09": (
        lambda b, x: b[0] * (x.square() + x * b[1]) / (x.square() + x * b[2] + b[3]),
        (4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625),
        (0.1957, 0.1947, 0.1735, 0.16, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246),
        (25, 39, 41.5, 39),
        (1.9280693458e-01, 1.9128232873e-01, 1.2305650693e-01, 1.3606233068e-01),
        (1.1435312227e-02, 1.9633220911e-01, 8.0842031232e-02, 9.0025542308e-02),
    ),
}


@pytest.mark.parametrize("name", NIST)
def test_certified_standard_errors(name):
    function, x, y, start, certified, errors = NIST[name]
    fit = fl.gauss_newton(model(function), tensor(*start), (tensor(*x), tensor(*y)))
    close(fit.x / tensor(*certified), torch.ones_like(fit.x), 1e-9)
    close(fit.standard_errors() / tensor(*errors), torch.ones_like(fit.x), 1e-8)
    assert fit.dof.item() == len(x) - len(start)


T = torch.linspace(0, 3, 9, dtype=D)
Y = 2 * torch.exp(-0.7 * T) + 0.05 * normal(9, seed=3)
W = torch.linspace(0.3, 2, 9, dtype=D)
X0 = tensor(1.0, 1.0)


def decay(x, y):
    return x[0] * torch.exp(-x[1] * T) - y


def fit(y=Y, w=None, **options):
    return fl.gauss_newton(decay, X0, (y,), weights=w, **options)


def near(x, y, w, steps=3):
    """The minimum by steps of Newton's from near it, each of which makes one more derivative right."""
    cost = lambda x: (w * decay(x, y).square()).sum() / 2  # noqa: E731
    for _ in range(steps):
        x = x - torch.linalg.inv(jacfwd(grad(cost))(x)) @ grad(cost)(x)
    return x


def errors(y, w):
    """Standard errors by dense algebra, differentiable."""
    x = near(fit(Y, W).x.detach(), y, w)
    J = jacfwd(decay)(x, y)
    scale = (w * decay(x, y).square()).sum() / (len(y) - 2)
    return (scale * torch.linalg.inv(J.T @ (w[:, None] * J)).diagonal()).sqrt()


def test_weights_are_those_of_squared_residuals():
    found = fit(w=W)
    close(found.x, near(found.x, Y, W), 1e-13)
    close(found.residual, decay(found.x, Y), 1e-13)
    close(found.info.cost, (W * found.residual.square()).sum() / 2, 1e-13)
    close(fl.gauss_newton(decay, X0, (Y,), sigma=W.rsqrt()).x, found.x, 1e-13)
    close(found.standard_errors(), errors(Y, W), 1e-12)


def test_an_absolute_sigma_and_a_covariance():
    found = fl.gauss_newton(decay, X0, (Y,), sigma=W.rsqrt())
    J = jacfwd(decay)(found.x, Y)
    want = torch.linalg.inv(J.T @ (W[:, None] * J))
    close(found.jacobian.to_dense(), J, 1e-13)
    close(found.covariance(scale=1.0), want, 1e-11)
    close(found.covariance(scale=tensor(0.25)[0], columns=[1]), want[:, 1:] / 4, 1e-11)
    close(found.standard_errors(scale=1.0), want.diagonal().sqrt(), 1e-11)


@pytest.mark.parametrize("mode", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
@pytest.mark.parametrize("by", [0, 1], ids=["data", "weights"])
def test_derivatives_of_the_fit_and_of_its_standard_errors(mode, by):
    close(mode(lambda y, w: fit(y, w).x, by)(Y, W), mode(lambda y, w: near(fit(Y, W).x, y, w), by)(Y, W), 1e-10)
    close(mode(lambda y, w: fit(y, w).standard_errors(), by)(Y, W), mode(errors, by)(Y, W), 1e-9)


def test_second_derivatives_by_weights():
    want = hessian(lambda w: near(fit(Y, W).x, Y, w).sum())(W)
    close(hessian(lambda w: fit(Y, w).x.sum())(W), want, 1e-9)


@pytest.mark.parametrize("robust", [None, fl.Huber(0.05), fl.Cauchy(0.1)], ids=repr)
def test_a_weight_of_zero_leaves_a_residual_out_and_has_a_derivative(robust):
    w = W * (torch.arange(9) != 4)
    rest = torch.arange(9) != 4
    without = fl.gauss_newton(
        lambda x, y: decay(x, y)[rest], fit(w=w, robust=robust).x, (Y,), weights=W[rest], robust=robust
    )
    found = fit(w=w, robust=robust)
    close(found.x, without.x, 1e-12)
    close(found.standard_errors(), without.standard_errors(), 1e-10)
    assert found.dof.item() == 6
    step = 1e-7 * (torch.arange(9) == 4)
    close(
        jacrev(lambda w: fit(w=w, robust=robust).x)(w)[:, 4],
        (fit(w=w + step, robust=robust).x - found.x) / 1e-7,
        1e-5,
    )


def test_vmap_maps_over_all_of_it():
    ys, ws = torch.stack([Y, Y.flip(0)]), torch.stack([W, W * (torch.arange(9) > 0)])
    told = lambda y, w: (fit(y, w).standard_errors(), fit(y, w).dof, fit(y, w).covariance(1.0))  # noqa: E731
    for got, *want in zip(vmap(told)(ys, ws), *(told(y, w) for y, w in zip(ys, ws, strict=True)), strict=True):
        close(got.to(D), torch.stack(want).to(D), 1e-11)


def sandwich(psi, slope, J, second, m, n):
    """H^-1 J^T psi^2 J H^-1 m / (m - n), with the second derivatives of the residuals in H."""
    H = J.T @ (slope[:, None] * J) + second
    inverse = torch.linalg.inv(H)
    return inverse @ (J.T @ (psi.square()[:, None] * J)) @ inverse * m / (m - n)


def test_a_robust_fit_has_the_covariance_of_its_sandwich():
    y, t = Y + 2 * (torch.arange(9) == 5), 0.1
    found = fit(y, W, robust=fl.Huber(t))
    x, z = found.x, W.sqrt() * decay(found.x, y)
    inside = z.abs() <= t
    psi = torch.where(inside, W * decay(x, y), t * W.sqrt() * z.sign())
    J, bends = jacfwd(decay)(x, y), jacfwd(jacfwd(decay))(x, y)
    want = sandwich(psi, W * inside, J, torch.einsum("i,ijk->jk", psi, bends), 9, 2)
    close(found.covariance(), want, 1e-9)
    close(found.covariance(columns=[1]), want[:, 1:], 1e-9)
    close(found.standard_errors(), want.diagonal().sqrt(), 1e-9)


def test_single_precision_and_copies():
    found = fl.gauss_newton(decay, X0.float(), (Y.float(),))
    assert found.standard_errors().dtype == found.covariance().dtype == found.jacobian.dtype == torch.float32
    with pytest.raises(ValueError, match="ask for the rest where gauss_newton was called"):
        copy.deepcopy(found).standard_errors()
    x, residual, info = found
    assert x is found.x
    assert residual is found.residual
    assert info is found.info


def test_unknowns_and_residuals_may_be_pytrees():
    def misfit(x, y):
        r = decay(torch.cat([x["amplitude"][None], x["rates"][0]]), y)
        return {"early": r[:3], "late": r[3:].reshape(2, 3)}

    x0 = {"amplitude": tensor(1.0)[0], "rates": tensor(1.0)[None]}
    ours = lambda y, w: fl.gauss_newton(misfit, x0, (y,), weights=w)  # noqa: E731
    found, want = ours(Y, W), fit(Y, W)
    close(torch.cat([found.x["amplitude"][None], found.x["rates"][0]]), want.x, 1e-14)
    close(torch.cat([found.residual["early"], found.residual["late"].flatten()]), want.residual, 1e-14)
    close(found.standard_errors(), want.standard_errors(), 1e-12)
    close(jacrev(lambda y: ours(y, W).x["rates"][0, 0])(Y), jacrev(lambda y: fit(y, W).x[1])(Y), 1e-12)
    assert vmap(lambda y: ours(y, W).x)(torch.stack([Y, Y]))["rates"].shape == (2, 1, 1)
    assert "FitInfo" in found._repr_html_()


def test_complex_residuals_are_two_real_ones():
    t = torch.arange(8, dtype=D)
    data = 2 * torch.exp((-0.1 + 0.7j) * t) + 0.05 * torch.complex(normal(8, seed=1), normal(8, seed=2))
    wave = lambda x, y: x[0] * torch.exp(torch.complex(-x[1] * t, x[2] * t)) - y  # noqa: E731
    parts = lambda x, y: torch.view_as_real(wave(x, y)).T.reshape(-1)  # noqa: E731
    start = tensor(1.5, 0.2, 0.6)
    ours = lambda y: fl.gauss_newton(wave, start, (y,))  # noqa: E731
    want = lambda y: fl.gauss_newton(parts, start, (y,))  # noqa: E731
    close(ours(data).x, want(data).x, 1e-13)
    close(ours(data).residual, wave(ours(data).x, data), 1e-13)
    close(ours(data).standard_errors(), want(data).standard_errors(), 1e-12)
    close(grad(lambda y: ours(torch.complex(y, data.imag)).x.sum())(data.real),
          grad(lambda y: want(torch.complex(y, data.imag)).x.sum())(data.real), 1e-11)  # fmt: skip


def test_a_callback_is_told_of_every_step():
    seen = []
    found = fit(callback=lambda iteration, cost: seen.append((iteration, cost)))
    assert [iteration for iteration, _ in seen] == list(range(1, found.info.iterations.item() + 1))
    assert all(later <= earlier for (_, earlier), (_, later) in itertools.pairwise(seen))
    assert abs(seen[-1][1] / found.info.cost.item() - 1) < 1e-6


BAD = {
    "tree": (
        lambda: fl.gauss_newton(decay, [X0[:1], X0[1:].to(torch.int64)], (Y,)),
        TypeError,
        "x0 must hold dense tensors of float32 or float64, got torch.int64",
    ),
    "callback": (lambda: fit(callback=3), TypeError, "callback must be callable, got 3"),
    "both": (lambda: fit(w=W, sigma=W), TypeError, "sigma must be None beside weights, .* got both"),
    "type": (lambda: fit(w=[1.0] * 9), TypeError, r"weights must be a real tensor of shape \(9,\), got list"),
    "shape": (lambda: fit(w=W[1:]), ValueError, r"weights must have shape \(9,\), one for each residual, got \(8,\)"),
    "negative": (lambda: fit(w=-W), ValueError, "weights must not be negative, got -2"),
    "infinite": (lambda: fit(w=W / 0), ValueError, "weights must be finite, got infinity"),
    "sigma": (lambda: fit(sigma=W * (W > 1)), ValueError, "sigma must be positive, got 0"),
    "sigma shape": (lambda: fit(sigma=W[:, None]), ValueError, r"sigma must have shape \(9,\), .* got \(9, 1\)"),
    "scale": (lambda: fit().covariance("1"), TypeError, "scale must be None, a number or a 0-d real tensor, got '1'"),
    "scale sign": (lambda: fit().covariance(-1.0), ValueError, "scale must be a variance, finite and not negative"),
    "scale robust": (
        lambda: fit(robust=fl.Huber()).standard_errors(1.0),
        ValueError,
        "scale must be None for a robust fit",
    ),
    "columns": (lambda: fit().covariance(columns=[2]), ValueError, "columns must lie between 0 and 1, got 2 to 2"),
    "freedom": (
        lambda: fit(w=W * (torch.arange(9) < 2)).standard_errors(),
        ValueError,
        "scale must be given: 9 residuals, 2 of them of positive weight, leave no degree of freedom to 2 unknowns",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()
