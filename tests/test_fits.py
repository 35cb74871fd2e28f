"""Fits that are hard to judge: right or refused in single precision, and accepted wherever they are right."""

import pytest
import torch
from helpers import close
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import functional_lstsq as fl

D = torch.float64


def tensor(*numbers):
    return torch.tensor(numbers, dtype=D)


def minimum_near(residual, x, steps=20):
    """Newton's steps on the sum of squares, in double precision, to where they are rounding errors."""
    cost = lambda x: residual(x).square().sum() / 2  # noqa: E731
    for _ in range(steps):
        x = x - torch.linalg.solve(hessian(cost)(x), grad(cost)(x))
    assert torch.linalg.eigvalsh(hessian(cost)(x))[0] > 0
    return x


TIMES = torch.linspace(0, 1.2, 24, dtype=D)


def decays(x, y):
    return (x[::2, None] * torch.exp(-x[1::2, None] * TIMES)).sum(0) - y


@pytest.mark.parametrize("seed", [0, 1, 4, 16])
def test_single_precision_is_right_or_refused(seed):
    """Three decays, so nearly dependent that Newton's steps grow beside the minimum: such steps are no rounding errors.

    Errors were up to 0.12 where they passed for these.
    """
    g = torch.Generator().manual_seed(seed)
    random = lambda n: torch.randn(n, generator=g, dtype=D)  # noqa: E731
    true = tensor(0.1, 1.0, 0.9, 3.0, 1.5, 5.0) * (1 + 0.2 * random(6))
    y = (decays(true, 0.0) + 1e-4 * random(24)).float()
    x0 = (true * (1 + 0.1 * random(6))).float()
    fit = fl.gauss_newton(decays, x0, (y,), max_iterations=300, throw=False)
    if fit.info.status == "converged":
        close(fit.x.double(), minimum_near(lambda x: decays(x, y.double()), fit.x.double()), 1e-6)


@pytest.mark.parametrize("told", [True, False], ids=["told by its dtype", "hidden"])
def test_a_residual_that_computes_in_single_precision_is_judged_by_its_errors(told):
    y = 2 * torch.exp(-1.5 * TIMES) + 0.01 * torch.sin(100 * TIMES)

    def rough(x, y):
        r = x[0].float() * torch.exp(-x[1].float() * TIMES.float()) - y.float()
        return r if told else r.double()

    fit = fl.gauss_newton(rough, tensor(1, 1), (y,), throw=False)
    if told:
        assert fit.info.status == "converged"
    if fit.info.status == "converged":
        exact = minimum_near(lambda x: decays(x, y.float().double()), fit.x)
        assert (fit.x - exact).norm() <= 3 * fit.info.forward_error * exact.norm()


@pytest.mark.parametrize("noise", [1e-6, 1e-9, 1e-12])
def test_residuals_small_beside_the_data(noise):
    """Rounding errors of f are eps sum |r| |y| then, above those of second order by the factor |y| / |r| eps^-1."""
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        true = tensor(3.0, 0.7) * (1 + 0.3 * torch.rand(2, generator=g, dtype=D))
        y = decays(true, 0.0) + noise * torch.randn(24, generator=g, dtype=D)
        close(fl.gauss_newton(decays, 0.9 * true, (y,)).x, true, 10 * noise)


def test_a_position_from_ranges_to_satellites():
    """Ranges of 2e7 m with errors of 0.1 mm."""
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        down, spread, noise = (torch.randn(*shape, generator=g, dtype=D) for shape in ((3,), (9, 3), (9,)))
        receiver = 6.371e6 * torch.nn.functional.normalize(down, dim=0)
        satellites = receiver + 2e7 * torch.nn.functional.normalize(spread + receiver / 6e6)
        ranges = (satellites - receiver).norm(dim=1) + 3e4 + 1e-4 * noise
        misfit = lambda x, S, y: (S - x[:3]).norm(dim=1) + x[3] - y  # noqa: E731
        fit = fl.gauss_newton(misfit, torch.zeros(4, dtype=D), (satellites, ranges))
        assert (fit.x[:3] - receiver).norm() < 2e-2


@pytest.mark.parametrize("loss", [fl.Huber(), fl.Cauchy()], ids=repr)
def test_a_robust_fit_starts_from_its_own_solution(loss):
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        dense = torch.randn(40, 3, dtype=D, generator=g)
        b = dense @ torch.full((3,), 1e6, dtype=D) + torch.randn(40, dtype=D, generator=g)
        b[:5] += 20
        A = fl.SparseMatrix.from_torch(dense.to_sparse())
        x = fl.lstsq(A, b, robust=loss)
        close(fl.lstsq(A, b, robust=loss, x0=x), x, 1e-12)


def roth(x, y):
    cubic = lambda a, b, c: ((a + b * x[1]) * x[1] + c) * x[1]  # noqa: E731
    return torch.stack([x[0] + cubic(5, -1, -2) - 13, x[0] + cubic(1, 1, -14) - 29]) - y


def arm(x, y):
    """Two links of length 1, whose end shall be at y, out of reach: stretched, where J has rank 1."""
    return torch.stack([x[0].cos() + x.sum().cos(), x[0].sin() + x.sum().sin()]) - y


@pytest.mark.parametrize(
    ("residual", "x0", "y", "want"),
    [(roth, (0.5, -2), (0, 0), (11.4127789869, -0.8968052532)), (arm, (0.5, 0.4), (2, 1.5), (0.6435011088, 0))],
    ids=["Freudenstein and Roth", "arm"],
)
def test_a_strict_minimum_whose_jacobian_is_singular(residual, x0, y, want):
    """H is positive definite; derivatives are those of the implicit function, H^-1 J^T for data that are subtracted."""
    f = lambda y: fl.gauss_newton(residual, tensor(*x0), (y,)).x  # noqa: E731
    y = tensor(*y)
    x = f(y)
    close(x, tensor(*want), 1e-9)
    H = hessian(lambda x: residual(x, y).square().sum() / 2)(x)
    exact = torch.linalg.solve(H, jacrev(residual)(x, y).T)
    close(jacrev(f)(y), exact, 1e-7)
    close(jacfwd(f)(y), exact, 1e-7)
    close(vmap(f)(torch.stack([y, y + 0.1]))[0], x, 1e-9)


@pytest.mark.parametrize(
    "residual",
    [
        lambda x: x[0] * x[1] * torch.exp(-TIMES) - torch.exp(-2 * TIMES),
        lambda x: torch.stack([x[0] * x[1] - 1, x[0] * x[1] + 1, x[0] * x[1] - 3]),
        lambda x: torch.stack([x[0] - 1, x[1] ** 2 + 1]) + 0 * x,  # x[1]^2: flat in J, and a minimum
        lambda x: torch.stack([x[0] - 1, x[1] ** 2 - 1]),  # a maximum along x[1]
        lambda x: torch.stack([x[0] - 1, x[1] ** 4 + 1]),  # a minimum, not a strict one to second order
    ],
    ids=["product", "product of which three are told", "minimum", "maximum", "fourth order"],
)
def test_where_the_jacobian_is_singular_the_hessian_decides(residual):
    fit = fl.gauss_newton(residual, tensor(0.7, 0), throw=False)
    if fit.info.status == "converged":
        e = torch.linalg.eigvalsh(hessian(lambda x: residual(x).square().sum() / 2)(fit.x))
        assert e[0] > 1e-6 * e[1]


def test_a_power_of_zero():
    """Of t^x at t = 0 torch's reverse mode over reverse mode is NaN, forward over reverse is not."""
    t = torch.linspace(0, 2, 20, dtype=D)
    power = lambda x, y: x[0] * t ** x[1] - y  # noqa: E731
    y = power(tensor(3, 1.5), 0.0) + 0.01 * torch.cos(50 * t)
    f = lambda residual, k: lambda y: fl.gauss_newton(residual, tensor(2.5, 1.2), (y[k:],)).x  # noqa: E731
    without = f(lambda x, y: x[0] * t[1:] ** x[1] - y, 1)
    close(f(power, 0)(y), without(y), 1e-12)
    close(jacrev(f(power, 0))(y), jacrev(without)(y), 1e-10)
    close(jacfwd(f(power, 0))(y), jacrev(without)(y), 1e-10)


def test_second_derivatives_that_are_nan_are_named():
    def residual(x):
        return torch.stack([x[0] - 1, x[1] - 2 + torch.where(x[0] > -9, 0 * x[0], x[0]), (x[0] - x[0]).abs() ** 1.5])

    with pytest.raises(fl.ConvergenceError, match="products with the Hessian matrix hold NaN"):
        fl.gauss_newton(residual, tensor(0.5, 0.5))


BROWN = torch.arange(1, 21, dtype=D) / 5
VALLEYS = {  # residual, start, least cost; More, Garbow and Hillstrom, ACM TOMS 7(1), 1981
    "Rosenbrock": (lambda x: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]]), (-120, 100), 0.0),
    "Brown and Dennis": (
        lambda x: (x[0] + BROWN * x[1] - BROWN.exp()) ** 2 + (x[2] + x[3] * BROWN.sin() - BROWN.cos()) ** 2,
        (25, 5, -5, -1),
        42911.1008,
    ),
    "Helical": (
        lambda x: torch.stack([10 * (x[2] - 5 / torch.pi * torch.atan2(x[1], x[0])), 10 * (x[:2].norm() - 1), x[2]]),
        (-100, 0, 0),
        0.0,
    ),
    "Kowalik and Osborne": (  # NIST's MGH09, from its first start
        lambda x: (
            x[0] * (U**2 + U * x[1]) / (U**2 + U * x[2] + x[3])
            - tensor(0.1957, 0.1947, 0.1735, 0.16, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246)
        ),
        (25, 39, 41.5, 39),
        0.5 * 3.0750560385e-4,
    ),
}
U = tensor(4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625)


@pytest.mark.parametrize("name", VALLEYS)
def test_curved_valleys_are_followed_to_their_end(name):
    residual, x0, cost = VALLEYS[name]
    fit = fl.gauss_newton(residual, tensor(*x0))
    assert abs(float(fit.info.cost) - cost) <= 1e-8 * cost + 1e-20


def test_the_limit_of_iterations_is_kept_exactly_and_says_what_to_do():
    for limit in (1, 3, 4):
        far = tensor(0.1, 9, 0.5, 20, 3, 0.1)
        y = decays(tensor(1, 1, 1, 3, 1, 5), 0.0)
        fit = fl.gauss_newton(decays, far, (y,), max_iterations=limit, throw=False)
        assert (fit.info.status, int(fit.info.iterations)) == ("iteration limit reached", limit)
    words = r"variable_projection, since the residual is linear in x0\[\[0, 2, 4\]\]"
    with pytest.raises(fl.ConvergenceError, match=words):
        fl.gauss_newton(decays, far, (y,), max_iterations=4)
    with pytest.raises(fl.ConvergenceError) as told:
        fl.gauss_newton(VALLEYS["Brown and Dennis"][0], tensor(25, 5, -5, -1), max_iterations=4)
    assert "variable_projection" not in str(told.value)
