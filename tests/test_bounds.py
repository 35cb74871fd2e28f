"""Bounded least squares and its derivatives, against the conditions of the minimum in rational arithmetic."""

import itertools
from contextlib import nullcontext
from fractions import Fraction

import pytest
import torch
from helpers import full_pattern
from rationals import solved
from torch.func import grad, jvp

import functional_lstsq as fl
from functional_lstsq.linear import active_set, pivoting

F64 = torch.float64
INF = float("inf")
TINY = 1e-20  # what may stand for a zero, for data of about 1: corrections of constraints leave 2^-27 of an error each
KINDS = ("tall", "wide", "damped", "weighted", "degenerate", "conditioned", "integers", "boxes")


def drawn(seed):
    """(kind, A, b, damp, weights, lower, upper) with n at most 5."""
    g, kind = torch.Generator().manual_seed(seed), KINDS[seed % len(KINDS)]
    n = 2 + seed // len(KINDS) % 4
    m = n - 1 if kind == "wide" else n + 3

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=F64)

    A, b, damp, weights = random(m, n), random(m), torch.zeros(n, dtype=F64), torch.ones(m, dtype=F64)
    lower, upper = torch.zeros(n, dtype=F64), torch.full((n,), INF, dtype=F64)
    if kind == "wide":  # all entries positive, so that bounds of zero determine much
        A = A.abs() + 0.1
    if kind == "damped":
        damp = torch.rand(n, generator=g, dtype=F64)
    if kind == "weighted":
        weights = torch.rand(m, generator=g, dtype=F64)
        weights[0], weights[1] = 0.0, INF if seed // len(KINDS) % 2 else 1e6
        A[1], b[1] = A[1].abs(), 1.0
    if (
        kind == "degenerate"
    ):  # a residual orthogonal to all of A, or one that presses on one unknown alone, or presses it off
        x = torch.where(torch.rand(n, generator=g) < 0.5, torch.rand(n, generator=g, dtype=F64), 0.0)
        b = A @ x
        if seed % 3:
            rest = A[:, 0] - A[:, 1:] @ torch.linalg.lstsq(A[:, 1:], A[:, 0]).solution
            b = b + rest * (seed // len(KINDS) % 2 - 0.5)
    if kind == "conditioned":
        Q = torch.linalg.qr(A).Q
        sizes = torch.logspace(0, -8, n, dtype=F64)
        A = (Q * sizes) @ torch.linalg.qr(random(n, n)).Q
        b = A @ random(n) + 1e-9 * b
    if kind == "integers":
        A, b = (torch.randint(-2, 3, shape, generator=g).to(F64) for shape in ((m, n), (m,)))
        A[:n] += 3 * torch.eye(n, dtype=F64)
        upper[:] = 1.0
    if kind == "boxes":
        lower = random(n) / 4
        upper = lower + torch.tensor([0.0, 0.5, 0.3, INF, 0.2], dtype=F64)[:n]
        lower[-1] = -INF
    return kind, A, b, damp, weights, lower, upper


def fractions(t):
    return [v if abs(v) == INF else Fraction(v) for v in t.reshape(-1).tolist()]


class Exact:
    """Everything of c.x with the unknowns pinned that are not 0 in `active`, in rational arithmetic."""

    def __init__(self, A, b, damp, weights, lower, upper, c, active):
        (m, n), zero = A.shape, Fraction(0)
        a = [fractions(row) for row in A]
        b, d, w, low, high, c = (fractions(t) for t in (b, damp, weights, lower, upper, c))
        self.x = [low[j] if active[j] < 0 else high[j] if active[j] > 0 else zero for j in range(n)]
        free, rows = [j for j in range(n) if not active[j]], [i for i in range(m) if w[i]]
        M = len(rows)
        K = [[zero] * (M + len(free)) for _ in range(M + len(free))]
        right = []
        for k, i in enumerate(rows):
            K[k][k] = zero if w[i] == INF else 1 / w[i]
            for q, j in enumerate(free):
                K[k][M + q] = K[M + q][k] = a[i][j]
            right.append([b[i] - sum(a[i][j] * self.x[j] for j in range(n)), zero])
        for q, j in enumerate(free):
            K[M + q][M + q] = -d[j] * d[j]
            right.append([zero, c[j]])
        found = solved(K, right)
        s, l_s, y = [zero] * m, [zero] * m, [zero] * n
        for k, i in enumerate(rows):
            s[i], l_s[i] = found[k]
        for q, j in enumerate(free):
            self.x[j], y[j] = found[M + q]
        r = [b[i] - sum(a[i][j] * self.x[j] for j in range(n)) for i in range(m)]
        self.multipliers = [sum(a[i][j] * s[i] for i in range(m)) - d[j] * d[j] * self.x[j] for j in range(n)]
        by_bound = [c[j] - sum(a[i][j] * l_s[i] for i in range(m)) if active[j] else zero for j in range(n)]
        self.gradients = {
            "A": [-(l_s[i] * self.x[j] + s[i] * y[j]) for i in range(m) for j in range(n)],
            "b": l_s,
            "damp": [2 * d[j] * self.x[j] * y[j] for j in range(n)],
            "weights": [-r[i] * sum(a[i][j] * y[j] for j in range(n)) for i in range(m)],
            "lower": [g if active[j] < 0 else zero for j, g in enumerate(by_bound)],
            "upper": [g if active[j] > 0 else zero for j, g in enumerate(by_bound)],
        }
        inside = [(self.x[j] - low[j], high[j] - self.x[j]) for j in range(n)]
        signs = [active[j] * self.multipliers[j] for j in range(n)]
        held = [low[j] == high[j] for j in range(n)]
        self.minimum = all(held[j] or (signs[j] >= 0 if active[j] else min(inside[j]) >= 0) for j in range(n))
        self.strict = all(held[j] or (signs[j] > 0 if active[j] else min(inside[j]) > 0) for j in range(n))


def exactly(problem, c, guess):
    """The exact minimum, with the active set that is guessed if it is one, or the first one that is."""
    lower, upper = problem[-2:]
    sides = [[s for s, t in ((0, 0.0), (-1, lower[j]), (1, upper[j])) if abs(t) < INF] for j in range(len(lower))]
    for active in itertools.chain([guess], itertools.product(*sides)):
        try:
            exact = Exact(*problem, c, active)
        except AssertionError:  # no full rank
            continue
        if exact.minimum:
            return exact
    return None


def norm(numbers):
    return float(sum(Fraction(v) ** 2 for v in numbers)) ** 0.5


def apart(got, want):
    """|got - want| of a tensor and of fractions."""
    return norm([Fraction(g) - w for g, w in zip(got.reshape(-1).tolist(), want, strict=True)])


def posed(problem, c):
    A = problem[0]

    def f(values, b, damp, weights, lower, upper):
        matrix = fl.SparseMatrix(values, full_pattern(*A.shape))
        return fl.lstsq(matrix, b, damp=damp, weights=weights, bounds=(lower, upper)) @ c

    return f, (A.reshape(-1), *problem[1:])


def told(problem):
    """(active where that is not arbitrary, weak, x), or the error."""
    A, b, damp, weights, lower, upper = problem
    matrix = fl.SparseMatrix(A.reshape(-1), full_pattern(*A.shape))
    try:
        x, _, info = fl.solve(matrix, b, damp=damp, weights=weights, bounds=(lower, upper))
    except torch.linalg.LinAlgError as error:
        return type(error), None, None
    return torch.where(info.weak, 0, info.active).tolist(), info.weak.tolist(), x


@pytest.mark.parametrize("seed", range(64))
def test_a_guess_changes_nothing_but_where_the_search_begins(seed, monkeypatch):
    kind, *problem = drawn(seed)
    active, weak, x = told(problem)
    monkeypatch.setattr(active_set, "guess", None)
    assert told(problem)[:2] == (active, weak)

    def wrong(problems, active):
        return torch.where((active == 0) & problems.lower.isfinite(), -1, active)

    monkeypatch.setattr(active_set, "guess", wrong)
    found = told(problem)
    if kind != "degenerate":  # where it is rounding that multipliers are made of
        assert found[:2] == (active, weak)
    if x is not None:
        torch.testing.assert_close(found[2], x, rtol=1e-9, atol=1e-15)


def test_one_solve_tells_that_a_guess_is_right(monkeypatch):
    g, tried, attempt = torch.Generator().manual_seed(0), [], pivoting.attempt

    def counted(problems, active):
        tried.append(len(active))
        return attempt(problems, active)

    monkeypatch.setattr(pivoting, "attempt", counted)
    A, b = torch.randn(5, 60, 20, generator=g, dtype=F64), torch.randn(5, 60, generator=g, dtype=F64)
    pattern = full_pattern(60, 20)
    torch.vmap(lambda v, b: fl.lstsq(fl.SparseMatrix(v, pattern), b, bounds=(0.0, INF)))(A.flatten(1), b)
    assert tried == [5]


@pytest.mark.parametrize("seed", [*range(24), *(pytest.param(k, marks=pytest.mark.slow) for k in range(24, 160))])
def test_solutions_sets_and_gradients_are_those_of_rational_arithmetic(seed):
    kind, *problem = drawn(seed)
    A, b, damp, weights, lower, upper = problem
    c = torch.randn(A.shape[1], generator=torch.Generator().manual_seed(1), dtype=F64)
    matrix = fl.SparseMatrix(A.reshape(-1), full_pattern(*A.shape))
    try:
        x, _, info = fl.solve(matrix, b, damp=damp, weights=weights, bounds=(lower, upper))
    except fl.RankDeficientError:
        assert kind in ("wide", "degenerate"), "refused"
        exact = exactly(problem, c, [0] * len(c))
        assert exact is None or not exact.strict
        return
    except fl.ConvergenceError:
        # The constraint may have no solution beside the bounds.
        assert kind == "weighted"
        assert exactly(problem, c, [0] * len(c)) is None
        return
    assert (lower <= x).all()
    assert (x <= upper).all()
    exact = exactly(problem, c, info.active.tolist())
    assert exact is not None
    error, size = apart(x, exact.x), norm(exact.x)
    assert error <= 1e-10 * size + 1e-15 * float(b.norm())
    assert error <= 10 * float(info.forward_error) * size + 1e-300
    f, args = posed(problem, c)
    if bool(info.weak.any()):
        with pytest.raises(fl.ConvergenceError, match="has no derivative"):
            grad(f)(*args)
        assert not exact.strict or kind in ("degenerate", "conditioned")
        return
    assert exact.strict
    want = [m if side else Fraction(0) for m, side in zip(exact.multipliers, info.active.tolist(), strict=True)]
    # Multipliers are sums of residuals: of residuals of 1e-18 beside b of size 1, 6e-26 is the rounding that is left.
    assert apart(info.multipliers, want) <= 1e-8 * norm(want) + 1e-25 * float(b.norm())
    g = torch.Generator().manual_seed(2)
    for number, name in enumerate(("A", "b", "damp", "weights", "lower", "upper")):
        wanted = exact.gradients[name]
        got = grad(f, number)(*args)
        assert apart(got, wanted) <= 1e-7 * norm(wanted) + TINY, name
        u = torch.randn(args[number].shape, generator=g, dtype=F64)
        along = jvp(lambda t, at=number: f(*args[:at], t, *args[at + 1 :]), (args[number],), (u,))[1]
        parts = [Fraction(v) * w for v, w in zip(u.tolist(), wanted, strict=True)]
        assert abs(Fraction(float(along)) - sum(parts)) <= 1e-7 * norm(parts) + TINY, name


def test_what_follows_an_unknown_that_is_put_at_its_bound_is_in_the_error():
    """Beside a column of 1e-8 the last digit of other unknowns is one of 1e-7, and that is what is claimed."""
    g = torch.Generator().manual_seed(0)
    for _ in range(40):
        A = torch.randn(5, 3, generator=g, dtype=F64) * torch.tensor([200.0, 1e-8, 1.0], dtype=F64)
        lower = torch.full((3,), -2.0, dtype=F64)
        b, upper = A @ lower, torch.full((3,), 2.0, dtype=F64)
        matrix = fl.SparseMatrix(A.reshape(-1), full_pattern(5, 3))
        x, _, info = fl.solve(matrix, b, bounds=(lower, upper), throw=False)
        exact = exactly((A, b, torch.zeros(3, dtype=F64), torch.ones(5, dtype=F64), lower, upper), lower, [0, 0, 0])
        assert apart(x, exact.x) <= 10 * float(info.forward_error) * norm(exact.x)
        refused = float(info.forward_error) > torch.finfo(F64).eps ** (1 / 3)
        assert info.status == ("inaccurate" if refused else "converged")
        with pytest.raises(fl.ConvergenceError, match=r"x is not known: .* \(0, 1, 2\)") if refused else nullcontext():
            fl.lstsq(matrix, b, bounds=(lower, upper))
    A = A * torch.tensor([1.0, 1e-4, 1.0], dtype=F64)
    matrix = fl.SparseMatrix(A.reshape(-1), full_pattern(5, 3))
    mapped = torch.vmap(lambda b: fl.lstsq(matrix, b, bounds=(lower, upper)))
    with pytest.raises(fl.ConvergenceError, match="1 of 2 problems; the first: 1"):
        mapped(torch.stack([torch.zeros_like(b), A @ lower]))
