"""Derivatives of what loses digits, in both modes, against exact rational arithmetic: right, or refused.

An error is held against the derivative itself, or against a tenth of the parts that it is a difference of.
"""

import functools
import math

import hypothesis.strategies as st
import pytest
import torch
from fuzzing import fuzz
from helpers import full_pattern
from hypothesis import given
from rationals import distance, gradients, least_squares, rational, size, solved, times, transpose
from torch.func import grad, jvp

import functional_lstsq as fl

RIGHT = math.log2(1e-5)
ENTRIES = st.sampled_from([1.0, -1.0, 0.5, 2.0, 3.0, -0.75, 1.125, 0.0])


def along(A, dA, b):
    """(x, r, their tangents along dA, the largest term of the one of x), exactly."""
    (S, D, B), n = map(rational, (A, dA, b)), A.shape[1]
    St = transpose(S, n)
    gram = times(St, S, n)
    x = solved(gram, times(St, B, 1))
    r = _minus(B, times(S, x, 1))
    parts = solved(gram, times(transpose(D, n), r, 1)), solved(gram, times(St, times(D, x, 1), 1))
    dx = _minus(*parts)
    moves = times(D, x, 1), times(S, dx, 1)
    dr = [[-p[0] - q[0]] for p, q in zip(*moves, strict=True)]
    return x, r, dx, dr, max(map(size, parts)), max(map(size, moves))


def _minus(left, right):
    return [[p[0] - q[0]] for p, q in zip(left, right, strict=True)]


def structured(change, condition, seed):
    """(A, b, dA): another basis, other units, another origin, where the sums of dA^T r leave nothing but rounding."""
    m, n, g = 9, 4, torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    U, V = torch.linalg.qr(draw(m, n)).Q, torch.linalg.qr(draw(n, n)).Q
    A = U * torch.logspace(0, -math.log10(condition), n, dtype=torch.float64) @ V.T
    A = A * 10 ** (4 * torch.rand(n, generator=g, dtype=torch.float64) - 2)
    b, aside = A @ draw(n), draw(m)
    b = b / b.norm() + 10.0 ** (seed % 4 - 2) * (aside - U @ (U.T @ aside))
    changes = {
        "A M": lambda: A @ draw(n, n),
        "M A": lambda: draw(m, m) @ A,
        "u v^T": lambda: torch.outer(draw(m), draw(n)),
        "A u v^T": lambda: torch.outer(A @ draw(n), draw(n)),
        "any": lambda: draw(m, n),
    }
    return A, b, changes[change]()


@pytest.mark.parametrize("change", ["A M", "M A", "u v^T", "A u v^T", "any"])
@pytest.mark.parametrize("condition", [1e3, 1e5, 1e7, 1e9, 1e10])
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
def test_tangents_along_structured_changes(change, condition, seed):
    A, b, dA = structured(change, condition, seed)
    pattern = full_pattern(*A.shape)
    _, _, want, _, parts, _ = along(A, dA, b)
    _, got = jvp(lambda v: fl.lstsq(fl.SparseMatrix(v, pattern), b), (A.reshape(-1),), (dA.reshape(-1),))
    assert distance(got, want) <= RIGHT + max(size(want), parts - math.log2(10))


SECOND = {
    "forward over reverse": lambda f, v, dv: jvp(grad(f), (v,), (dv,))[1],
    "reverse over reverse": lambda f, v, dv: grad(lambda v: grad(f)(v) @ dv)(v),
    "reverse over forward": lambda f, v, dv: grad(lambda v: jvp(f, (v,), (dv,))[1])(v),
}


@pytest.mark.parametrize("mode", SECOND)
@pytest.mark.parametrize("change", ["A M", "M A", "u v^T", "any"])
@pytest.mark.parametrize(
    "condition", [1e3, pytest.param(1e5, marks=pytest.mark.slow), pytest.param(1e7, marks=pytest.mark.slow), 1e9]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_second_orders_of_the_square_of_a_residual(mode, change, condition, weighted):
    """The gradient is -2 r x^T, whose change along dA is -2 (dr x^T + r dx^T)."""
    A, b, dA = structured(change, condition, 1 if weighted else 3)
    pattern, weights = full_pattern(*A.shape), torch.ones(len(b), dtype=torch.float64) if weighted else None
    x, r, dx, dr, of_x, of_r = along(A, dA, b)
    want = [[-2 * (e[0] * q[0] + p[0] * d[0])] for e, p in zip(dr, r, strict=True) for q, d in zip(x, dx, strict=True)]
    largest = 1 + max(size(r) + of_x, size(x) + of_r)

    def square(v):
        return fl.solve(fl.SparseMatrix(v, pattern), b, weights=weights).residual.square().sum()

    got = SECOND[mode](square, A.reshape(-1), dA.reshape(-1))
    assert distance(got, want) <= RIGHT + max(size(want), largest - math.log2(10))


@st.composite
def problems(draw):
    """(A, b, c, damp, weights): small numbers, columns of other units, weights over decades, zeros and masks."""
    n = draw(st.integers(1, 3))
    m = n + draw(st.integers(1, 4))
    entries = draw(st.lists(ENTRIES, min_size=m * n, max_size=m * n))
    units = torch.tensor(draw(st.lists(st.integers(-12, 12), min_size=n, max_size=n)))
    A = torch.tensor(entries, dtype=torch.float64).reshape(m, n) * 2.0**units
    b, c = (torch.tensor(draw(st.lists(ENTRIES, min_size=k, max_size=k)), dtype=torch.float64) for k in (m, n))
    if draw(st.booleans()):  # a small residual beside large data
        b = 1024 * A.sum(1) + b / 2**20
    weights = st.sampled_from([1.0, 1.0, 2.0, 0.0, 1e-6, 1e6, 0.3])
    weights = torch.tensor(draw(st.lists(weights, min_size=m, max_size=m)), dtype=torch.float64)
    return A, b, c, draw(st.sampled_from([None, 1.0, 1e-3, 1e-7, 30.0])), weights if draw(st.booleans()) else None


def _with(function, inputs, place, moved):
    return function(*inputs[:place], moved, *inputs[place + 1 :])


def exact_gradients(A, b, c, damp, weights):
    """As `gradients`, of Re c^H x: complex numbers are matrices [[x, -y], [y, x]] of real ones."""
    if not A.is_complex():
        return gradients(A, b, c, damp, weights)
    (m, n), twice = A.shape, lambda t: torch.cat([t.real, t.imag])
    whole = torch.cat([torch.cat([A.real, -A.imag], 1), torch.cat([A.imag, A.real], 1)])
    found = gradients(whole, twice(b), twice(c), damp, None if weights is None else torch.cat([weights, weights]))
    G = found["A"]
    real = [[G[i][j] + G[m + i][n + j] for j in range(n)] for i in range(m)]
    imaginary = [[G[m + i][j] - G[i][n + j] for j in range(n)] for i in range(m)]
    by_A = [[v] for part in (real, imaginary) for row in part for v in row]
    by_weights = [[found["weights"][i][0] + found["weights"][m + i][0]] for i in range(m)]
    return found | {"A": by_A, "weights": by_weights}


def stacked(t):
    """Numbers in one column, real parts first."""
    t = t.reshape(-1)
    return torch.cat([t.real, t.imag]) if t.is_complex() else t


PRECISIONS = {"double": torch.float64, "single": torch.float32, "complex": torch.complex128}
counted = {name: {"right": 0, "refused": 0} for name in PRECISIONS}


def hold(problem, name):
    A, b, c, damp, weights = problem
    precision = PRECISIONS[name]
    if precision.is_complex:
        turned = torch.tensor([1, 1j, 1 + 0.5j, -0.5j, 1 - 2j], dtype=precision)
        A = A * turned[torch.arange(A.numel()).view(A.shape) % 5]
        b, c = (t * turned[torch.arange(len(t)) % 3] for t in (b, c))
    A, b, c = (t.to(precision) for t in (A, b, c))
    weights = None if weights is None else weights.to(A.real.dtype)
    m, n = A.shape
    pattern, given_damp = full_pattern(m, n), torch.tensor(damp or 0.0, dtype=A.real.dtype)
    W = torch.ones(m, dtype=A.real.dtype) if weights is None else weights
    inputs = {"A": A.reshape(-1), "b": b, "damp": given_damp, "weights": W}
    coarse = 9 if name == "single" else 0  # 5e-3 there

    def loss(values, b, d, w):
        options = {} if damp is None else {"damp": d}
        options |= {} if weights is None else {"weights": w}
        return (fl.lstsq(fl.SparseMatrix(values, pattern), b, **options) * c.conj()).sum().real

    try:
        want = exact_gradients(A, b, c, None if damp is None else float(given_damp), weights)
    except AssertionError:  # without full rank
        with pytest.raises(fl.RankDeficientError):
            loss(*inputs.values())
        return
    for place, by in enumerate(inputs):
        if (by == "damp" and damp is None) or (by == "weights" and weights is None):
            continue
        exact = [[v] for row in want[by] for v in row]
        zero = torch.ones_like(inputs[by])
        for mode in ("reverse", "forward"):
            try:
                if mode == "reverse":
                    got, right = grad(loss, argnums=place)(*inputs.values()), exact
                else:
                    moved = functools.partial(_with, loss, list(inputs.values()), place)
                    _, got = jvp(moved, (inputs[by],), (zero,))
                    right = times(transpose(exact, 1), rational(stacked(zero)), 1)
            except torch.linalg.LinAlgError:
                counted[name]["refused"] += 1
                continue
            counted[name]["right"] += 1
            # A residual that is zero has rounding errors of b; so has an x that is zero, and 2 d <x, y> with it: of
            # <y, (A^H W A + d^2)^-1 A^H W b> these are at most |A y| |b| / d^2 times the unit.
            rounding = want["image"] + size(rational(b)) - 50 if by in ("weights", "damp") else -math.inf
            rounding += 1 - size(rational(given_damp[None])) if by == "damp" and damp else 0
            if by == "b" and size(exact) == -math.inf and damp is not None:
                rounding = want["sums"] - 50  # W A y for a y = c / d^2 that A makes zero
            # Of a sum along a direction, what its terms are; of a gradient by A, what its two products are.
            beside = size(exact) if mode == "forward" else -math.inf
            if by == "A" or mode == "forward":
                beside = max(beside, want["terms"])
            if by == "damp":
                beside = max(beside, want["products"])
            allowed = RIGHT + coarse + max(size(right), beside - math.log2(10) * (1 if mode == "forward" else 4))
            assert distance(stacked(got), right) <= max(allowed, rounding), f"{mode} by {by}"


@fuzz(20)
@given(problems())
def test_every_derivative_is_right_or_refused(problem):
    hold(problem, "double")


@fuzz(20)
@given(problems())
def test_every_derivative_in_single_precision(problem):
    hold(problem, "single")


@fuzz(20)
@given(problems())
def test_every_derivative_of_complex_problems(problem):
    hold(problem, "complex")


@pytest.mark.parametrize("name", PRECISIONS)
def test_few_of_them_are_refused(name):
    """Of those of the tests before, where there are many: one hard problem has ten derivatives."""
    if sum(counted[name].values()) > 1000:
        assert counted[name]["refused"] <= (0.1 if name == "single" else 0.02) * sum(counted[name].values())


@pytest.mark.parametrize("condition", [1e2, 1e5])
def test_the_square_of_a_residual_in_single_precision(condition):
    """-2 r x^T, though the cotangent 2 r is rounded to single precision and then solved with; and tangents of it."""
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(k, 4, generator=g, dtype=torch.float64)).Q for k in (12, 4))
    A = (U * torch.logspace(0, -math.log10(condition), 4, dtype=torch.float64) @ V.T).float()
    b, pattern = 100 * torch.randn(12, generator=g), full_pattern(12, 4)

    def loss(values, b, weights=None):
        return fl.solve(fl.SparseMatrix(values, pattern), b, weights=weights).residual.square().sum()

    x = least_squares(A, b)[0]
    r = [[p[0] - q[0]] for p, q in zip(rational(b), times(rational(A), x, 1), strict=True)]
    for weights in (None, torch.ones(12)):
        by_A, by_b = grad(loss, (0, 1))(A.reshape(-1), b, weights)
        want = [[-2 * p[0] * q[0]] for p in r for q in x]
        assert distance(by_A, want) <= size(want) - 18
        assert distance(by_b, [[2 * p[0]] for p in r]) <= size(r) - 18
    # What has a part in the range keeps it.
    bar = A[:, 0] / A[:, 0].norm()
    by_b = grad(lambda b: fl.solve(fl.SparseMatrix(A.reshape(-1), pattern), b).residual @ bar)(b)
    assert by_b.abs().max() < 1e-5


@pytest.mark.parametrize("change", ["A M", "M A", "u v^T", "any"])
@pytest.mark.parametrize("condition", [1e3, 1e5, 1e7, 1e10])
def test_tangents_of_least_norm(change, condition):
    """Golub and Pereyra's formula for A = L R, where R = [I, T] holds small whole numbers: the rank is exact."""
    m, rank, n, g = 9, 3, 5, torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    U, V = torch.linalg.qr(draw(m, rank)).Q, torch.linalg.qr(draw(rank, rank)).Q
    left = (U * torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64) @ V.T * 2**46).round() / 2**46
    right = torch.cat([torch.eye(rank), torch.randint(-2, 3, (rank, n - rank), generator=g)], 1).double()
    A, b = left @ right, draw(m)
    changes = {"A M": (A, draw(n, n)), "M A": (draw(m, m), A), "u v^T": (draw(m, 1), draw(1, n)), "any": (draw(m, n),)}
    dA = functools.reduce(torch.matmul, changes[change])
    S, D, B, L, R = map(rational, (A, dA, b, left, right))
    Dt, Lt, Rt = transpose(D, n), transpose(L, rank), transpose(R, n)
    LL, RR = times(Lt, L, rank), times(R, Rt, rank)

    def inverse(y):
        return times(Rt, solved(RR, solved(LL, times(Lt, y, 1))), 1)

    def adjoint(z):
        return times(L, solved(LL, solved(RR, times(R, z, 1))), 1)

    x = inverse(B)
    r, outside = _minus(B, times(S, x, 1)), times(Dt, adjoint(x), 1)
    plus = _minus(inverse(adjoint(times(Dt, r, 1))), inverse(times(D, x, 1)))
    beyond = _minus(outside, inverse(times(S, outside, 1)))
    want = [[p[0] + q[0]] for p, q in zip(plus, beyond, strict=True)]
    parts = max(size(inverse(adjoint(times(Dt, r, 1)))), size(inverse(times(D, x, 1))), size(beyond))
    pattern = full_pattern(m, n)
    solve = lambda v: fl.lstsq(fl.SparseMatrix(v, pattern), b, rank_deficient="minimum_norm")  # noqa: E731
    _, got = jvp(solve, (A.reshape(-1),), (dA.reshape(-1),))
    assert distance(got, want) <= RIGHT + max(size(want), parts - math.log2(10))


def test_a_cotangent_of_which_little_is_left_in_single_precision():
    A, c = torch.tensor([[1e-8, -3.0, 2.0]]), torch.tensor([1.0, 2.0, 3.0])
    by_b = grad(lambda b: fl.lstsq(A.to_sparse(), b) @ c)(torch.ones(1))
    torch.testing.assert_close(by_b, torch.tensor([1e-8 / 13]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("spread", [0, 15, 20, 25, 30])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_gradients_without_full_rank_in_mixed_units(spread, rank):
    """Of c x: -y x^T + r (A^+ y)^T + ((A^+)^T x) (c - A^T y)^T with y = (A^+)^T c; none is refused."""
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        whole = lambda *shape: torch.randint(-3, 4, shape, generator=g).double()  # noqa: B023, E731
        A = whole(6, rank) @ whole(rank, 4) * 2.0 ** torch.tensor([-spread, 0, spread // 2, spread])
        b, c = whole(6), whole(4)
        pinv = least_squares(A, torch.eye(6, dtype=torch.float64))[0]
        S, B, C, back = rational(A), rational(b), rational(c), transpose(pinv, 6)
        x, y = times(pinv, B, 1), times(back, C, 1)
        r = [[p[0] - q[0]] for p, q in zip(B, times(S, x, 1), strict=True)]
        beyond = [[p[0] - q[0]] for p, q in zip(C, times(transpose(S, 4), y, 1), strict=True)]
        u, v = times(back, x, 1), times(pinv, y, 1)
        want = [[r[i][0] * v[j][0] + u[i][0] * beyond[j][0] - y[i][0] * x[j][0] for j in range(4)] for i in range(6)]
        matrix = fl.SparseMatrix(A.reshape(-1), full_pattern(6, 4))
        got = grad(lambda A: fl.lstsq(A, b, rank_deficient="minimum_norm") @ c)(matrix).to_dense()  # noqa: B023
        assert distance(got, want) <= RIGHT + size(want)
