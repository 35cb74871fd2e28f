"""Derivatives of fits along data that change most where the Jacobian does not reach, against mpmath with 60 digits."""

from functools import cache

import mpmath as mp
import pytest
import torch
from exact_fits import (
    DIGITS,
    WEIGHTS,
    D,
    Linear,
    M,
    T,
    decays,
    exactly,
    linear,
    off,
    off_unless_refused,
    polynomial,
    rounded,
    scaled,
)
from helpers import full_pattern
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import functional_lstsq as fl

LOSSES = [fl.Huber, fl.Cauchy]


@pytest.fixture(autouse=True)
def _digits():
    with mp.workdps(DIGITS):
        yield


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
