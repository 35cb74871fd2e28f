"""Derivatives of fits along data that change most where the Jacobian does not reach, against mpmath with 60 digits."""

from functools import cache

import mpmath as mp
import pytest
import torch
from helpers import full_pattern
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import functional_lstsq as fl

D = torch.float64
DIGITS, STEP = 60, mp.mpf(10) ** -16
M = 16
LOSSES = [fl.Huber, fl.Cauchy]


@pytest.fixture(autouse=True)
def _digits():
    with mp.workdps(DIGITS):
        yield


def exactly(t):
    return mp.matrix(t.tolist())


def rounded(v):
    return torch.tensor([float(entry) for entry in v], dtype=D)


def scaled(rows, A):
    return mp.matrix([[rows[i] * A[i, j] for j in range(A.cols)] for i in range(A.rows)])


def outside(E):
    """A vector orthogonal to the columns of E."""
    q = mp.matrix([(-1) ** i * (1 + mp.mpf(i) / 10) for i in range(E.rows)])
    return q - E * mp.lu_solve(E.T * E, E.T * q)


def losses(kind, t, r):
    """(psi, psi')"""
    t = mp.mpf(t)
    if kind is fl.Huber:
        return mp.matrix([max(-t, min(t, z)) for z in r]), [mp.mpf(abs(z) <= t) for z in r]
    if kind is fl.Cauchy:
        squares = [(z / t) ** 2 for z in r]
        return mp.matrix([z / (1 + q) for z, q in zip(r, squares, strict=True)]), [
            (1 - q) / (1 + q) ** 2 for q in squares
        ]
    return r, [mp.mpf(1)] * r.rows


class Reference:
    """The minimum near x of sum rho(r(x, b)) with r = f(x) - b, by Newton's steps, and its derivatives by b."""

    def __init__(self, kind, t, x):
        self.kind, self.t, self.x = kind, t, exactly(x)

    def at(self, b):
        x = self.x
        for _ in range(100):
            f, J, bend = self.model(x)
            psi, slopes = losses(self.kind, self.t, f - b)
            H = J.T * scaled(slopes, J) + bend(psi)
            step = mp.lu_solve(H, J.T * psi)
            x = x - step
            if mp.norm(step) < mp.mpf(10) ** -50 * mp.norm(x):
                return x, H, J, slopes, psi
        raise AssertionError("no minimum")

    def direction(self, b, k, size=1):
        """J cos(j) + k (a vector that J^T psi' takes to zero)"""
        _, _, J, slopes, _ = self.at(exactly(b))
        return size * rounded(J * mp.matrix([mp.cos(j) for j in range(J.cols)]) + k * outside(scaled(slopes, J)))

    def tangent(self, b, db):
        _, H, J, slopes, _ = self.at(exactly(b))
        return rounded(mp.lu_solve(H, scaled(slopes, J).T * exactly(db)))

    def cotangent(self, b, x_bar):
        _, H, J, slopes, _ = self.at(exactly(b))
        return rounded(scaled(slopes, J) * mp.lu_solve(H, exactly(x_bar)))

    def second(self, b, db, x_bar):
        """The second derivative of x_bar . x along db."""
        b, db = exactly(b), exactly(db)
        low, middle, high = (sum(map(mp.fmul, exactly(x_bar), self.at(b + i * STEP * db)[0])) for i in (-1, 0, 1))
        return torch.tensor(float((low - 2 * middle + high) / STEP**2), dtype=D)


class Linear(Reference):
    def __init__(self, A, weights, *args):
        super().__init__(*args)
        self.A = scaled([mp.sqrt(w) for w in exactly(weights)], exactly(A))

    def model(self, x):
        return self.A * x, self.A, lambda psi: mp.zeros(self.A.cols)


class Decays(Reference):
    """x_0 exp(-x_2 t) + x_1 exp(-x_3 t)"""

    def model(self, x):
        J, second = mp.zeros(M, 4), [mp.zeros(4) for _ in range(M)]
        for i, t in enumerate(exactly(T)):
            for j in range(2):
                e = mp.exp(-x[2 + j] * t)
                J[i, j], J[i, 2 + j] = e, -x[j] * t * e
                second[i][j, 2 + j] = second[i][2 + j, j] = -t * e
                second[i][2 + j, 2 + j] = x[j] * t**2 * e
        f = mp.matrix([x[0] * J[i, 0] + x[1] * J[i, 1] for i in range(M)])
        return f, J, lambda psi: sum((p * B for p, B in zip(psi, second, strict=True)), mp.zeros(4))


def off(got, want):
    return float((got - want).norm() / want.norm())


def off_unless_refused(call, want):
    try:
        return off(call(), want)
    except torch.linalg.LinAlgError:
        return 0.0


def polynomial(n):
    """(A, b) of condition number about 10^(0.8 (n - 1)) with an outlier, small residuals otherwise."""
    A = (torch.arange(1, M + 1, dtype=D) / M)[:, None] ** torch.arange(n)
    b = A @ torch.ones(n, dtype=D) + 5e-3 * torch.sin(7.0 * torch.arange(M, dtype=D))
    b[4] += 3
    return A, b


WEIGHTS = 1 + torch.arange(M, dtype=D) % 3


@cache
def linear(kind, n, *, weighted=False):
    """(the fit, b, the reference)"""
    A, b = polynomial(n)
    weights = WEIGHTS if weighted else None
    # Of Huber's all others are within, of Cauchy's some beyond the threshold.
    t, matrix = 1.0 if kind is fl.Huber else 0.02, fl.SparseMatrix(A.reshape(-1), full_pattern(M, n))
    f = lambda b: fl.lstsq(matrix, b, robust=kind(t), weights=weights)  # noqa: E731
    return f, b, Linear(A, torch.ones(M, dtype=D) if weights is None else weights, kind, t, f(b))


T = torch.linspace(0, 3, M, dtype=D)


@cache
def decays(gap, kind=None, noise=1e-6):
    """(gauss_newton of b, variable_projection of b, b, the reference); the condition number is about 100 / gap^3."""
    x0, t = torch.tensor([2.0, 1.0, 1.0, 1.0 + gap], dtype=D), 5 * noise
    f = lambda x: torch.exp(-T[:, None] * x[2:]) @ x[:2]  # noqa: E731
    b = (
        f(x0)
        + noise * torch.cos(9 * torch.arange(M, dtype=D))
        + (kind is not None) * 20 * noise * (torch.arange(M) == 5)
    )
    robust, pattern = None if kind is None else kind(t), full_pattern(M, 2)
    design = lambda p: fl.SparseMatrix(torch.exp(-T[:, None] * p).reshape(-1), pattern)  # noqa: E731

    def separable(b, **options):
        fit = fl.variable_projection(design, x0[2:], b, **options)
        return torch.cat([fit.x, fit.p])

    def nonlinear(b, **options):
        return fl.gauss_newton(lambda x, b: f(x) - b, x0, (b,), robust=robust, **options).x

    start = nonlinear(b) if gap > 0.05 else x0
    return nonlinear, separable, b, Decays(kind, t, start)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(
    ("n", "k", "allowed"), [(5, 1e4, 1e-7), (7, 1e2, 1e-8), (7, 1e4, 1e-6), (8, 1e2, 1e-6), (8, 1e3, 1e-5)]
)
def test_robust_fits(kind, weighted, n, k, allowed):
    root = WEIGHTS.sqrt() if weighted else torch.ones(M, dtype=D)
    f, b, reference = linear(kind, n, weighted=weighted)
    # r is root (A x - b), so that its direction is the root of the weights times that of b.
    db = reference.direction(root * b, k) / root
    want = reference.tangent(root * b, root * db)
    assert off(jvp(f, (b,), (db,))[1], want) <= allowed
    assert off(vmap(lambda d: jvp(f, (b,), (d,))[1])(torch.stack([b, db]))[1], want) <= allowed


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("n", [5, 7, 8])
def test_changes_of_the_design_of_robust_fits(kind, n):
    A, b = polynomial(n)
    t = 1.0 if kind is fl.Huber else 0.02
    f = lambda A: fl.lstsq(fl.SparseMatrix(A.reshape(-1), full_pattern(M, n)), b, robust=kind(t))  # noqa: E731
    dA = A @ torch.cos(torch.arange(n * n, dtype=D)).view(n, n)
    x, H, J, slopes, psi = Linear(A, torch.ones(M, dtype=D), kind, t, f(A)).at(exactly(b))
    want = rounded(-mp.lu_solve(H, exactly(dA).T * psi + scaled(slopes, J).T * (exactly(dA) * x)))
    assert off(jvp(f, (A,), (dA,))[1], want) <= 1e-7


# Which fit, of `decays`, and with which loss: variable projection has none.
FITS = [(0, None), (1, None), (0, fl.Huber), (0, fl.Cauchy)]
of_every_fit = pytest.mark.parametrize(
    ("which", "kind"), FITS, ids=["gauss_newton", "variable_projection", "Huber", "Cauchy"]
)


@of_every_fit
@pytest.mark.parametrize("gap", [0.5, *(pytest.param(gap, marks=pytest.mark.slow) for gap in (2.0, 0.1))])
@pytest.mark.parametrize("k", [1, 1e2, 1e4, 1e6])
def test_nonlinear_fits_are_right_or_refused(gap, k, which, kind):
    *fits, b, reference = decays(gap, kind)
    f, db = fits[which], reference.direction(b, k)
    want, tangent = reference.tangent(b, db), lambda: jvp(f, (b,), (db,))[1]
    assert off_unless_refused(tangent, want) <= 1e-5
    if k <= 1 and gap >= 0.5:  # rounding x to double precision moves the tangent by up to 4e-8
        assert off(tangent(), want) <= 1e-7
    many = lambda: vmap(lambda d: jvp(f, (b,), (d,))[1])(torch.stack([db, b]))[0]  # noqa: E731
    assert off_unless_refused(many, want) <= 1e-5


@pytest.mark.parametrize("k", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in (0.1, 1)), 10])
def test_linear_unknowns_are_right_or_refused_where_they_move_more_than_the_others(k):
    _, separable, b, reference = decays(0.03)
    db = reference.direction(b, k)
    assert off_unless_refused(lambda: jvp(separable, (b,), (db,))[1], reference.tangent(b, db)) <= 1e-5
    # x, which stays, is no reason to refuse p.
    p, x, one = torch.tensor([1.0, 2.0], dtype=D), torch.tensor([2.0, 1.0], dtype=D), torch.ones((), dtype=D)
    stretched = jvp(lambda s: separable(torch.exp(-T[:, None] * s * p) @ x), (one,), (one,))[1]
    assert (stretched - torch.cat([0 * x, p])).norm() <= 1e-9


@of_every_fit
@pytest.mark.parametrize("gap", [2.0, 0.5, 0.1])
def test_reverse_mode(gap, which, kind):
    x_bar = torch.cos(1 + torch.arange(4, dtype=D))
    *fits, b, reference = decays(gap, kind)
    allowed = 1e-9 if gap >= 0.5 else 1e-4 if kind is fl.Cauchy else 1e-6
    assert off(vjp(fits[which], b)[1](x_bar)[0], reference.cotangent(b, x_bar)) <= allowed


def forward(g):
    return lambda s: jvp(g, (s,), (torch.ones_like(s),))[1]


def second_derivative(f, b, db, x_bar, inner, outer):
    """x_bar . x along db twice."""
    return outer(inner(lambda s: (x_bar * f(b + s * db)).sum()))(torch.zeros((), dtype=D))


in_every_mix = pytest.mark.parametrize(
    ("inner", "outer"),
    [(inner, outer) for inner in (forward, grad) for outer in (forward, grad)],
    ids=lambda mode: "reverse" if mode is grad else "forward",
)


@cache
def second_of_linear(n, k):
    """(f, b, db, x_bar), and the second derivative."""
    f, b, reference = linear(fl.Cauchy, n)
    x_bar, db = torch.cos(1 + torch.arange(n, dtype=D)), reference.direction(b, k, 1e-6)
    return (f, b, db, x_bar), reference.second(b, db, x_bar)


@in_every_mix
@pytest.mark.parametrize(("n", "k"), [(7, 1e2), (8, 1e4)])
def test_mixes_of_modes_of_robust_fits(n, k, inner, outer):
    given, want = second_of_linear(n, k)
    mixed = lambda: second_derivative(*given, inner, outer)  # noqa: E731
    # One sample of rounding decides whether the second is refused: 8.7e-6 by compiled kernels, 3.3e-6 by torch's.
    assert (off(mixed(), want) if k <= 1e2 else off_unless_refused(mixed, want)) <= 1e-8


@cache
def second_of_decays(gap, k, kind):
    """(f, b, db, x_bar), and the second derivative."""
    f, _, b, reference = decays(gap, kind)
    x_bar, db = torch.cos(1 + torch.arange(4, dtype=D)), reference.direction(b, k, 1e-8)
    return (f, b, db, x_bar), reference.second(b, db, x_bar)


@in_every_mix
@pytest.mark.parametrize(
    ("gap", "k", "kind"),
    [(0.5, 1e2, None), (0.5, 1e2, fl.Cauchy), (0.1, 1, None), (0.1, 1, fl.Huber), (0.1, 1e2, None)],
)
def test_mixes_of_modes_of_nonlinear_fits(gap, k, kind, inner, outer):
    given, want = second_of_decays(gap, k, kind)
    mixed = lambda: second_derivative(*given, inner, outer)  # noqa: E731
    if k <= 1:
        assert off(mixed(), want) <= 1e-6
    else:
        assert off_unless_refused(mixed, want) <= 1e-5


@pytest.mark.parametrize(
    "make", [lambda: (decays(2.0)[0], *decays(2.0)[2:]), lambda: linear(fl.Huber, 5)], ids=["nonlinear", "robust"]
)
def test_a_tangent_that_is_zero_but_for_rounding_is_accepted(make):
    f, b, reference = make()
    db = reference.direction(b, 1) - reference.direction(b, 0)
    assert jvp(f, (b,), (db,))[1].norm() <= 1e-10 * db.norm()


@pytest.mark.parametrize("which", [0, 1], ids=["gauss_newton", "variable_projection"])
def test_refused_tangents_are_nan_without_throw(which):
    *fits, b, reference = decays(0.1)
    f, db = fits[which], reference.direction(b, 1e6)
    with pytest.raises(fl.ConvergenceError, match="its derivative has an estimated relative error of"):
        jvp(f, (b,), (db,))
    quiet = lambda b: f(b, throw=False)  # noqa: E731
    both = vmap(lambda d: jvp(quiet, (b,), (d,))[1])(torch.stack([db, reference.direction(b, 0)]))
    assert both[0].isnan().all()
    assert not both[1].isnan().any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: linear(fl.Huber, 6)[:2],
        lambda: linear(fl.Cauchy, 6)[:2],
        lambda: (decays(0.5)[0], decays(0.5)[2]),
        lambda: (decays(0.5)[1], decays(0.5)[2]),
    ],
    ids=["Huber", "Cauchy", "gauss_newton", "variable_projection"],
)
def test_jacobians_agree(make):
    f, b = make()
    assert off(jacfwd(f)(b), jacrev(f)(b)) <= 1e-8
