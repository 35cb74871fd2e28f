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


def x_dot(A, dA, b):
    """(the tangent of x along dA, log2 of the larger of its two parts)."""
    n = A.shape[1]
    S, D, B = rational(A), rational(dA), rational(b)
    St, gram = transpose(S, n), times(transpose(S, n), S, n)
    x = solved(gram, times(St, B, 1))
    r = [[p[0] - q[0]] for p, q in zip(B, times(S, x, 1), strict=True)]
    parts = [solved(gram, times(transpose(D, n), r, 1)), solved(gram, times(St, times(D, x, 1), 1))]
    return [[p[0] - q[0]] for p, q in zip(*parts, strict=True)], max(map(size, parts))


@pytest.mark.parametrize("change", ["A M", "M A", "u v^T", "A u v^T", "any"])
@pytest.mark.parametrize("condition", [1e3, 1e5, 1e7, 1e9, 1e10])
def test_tangents_along_structured_changes(change, condition):
    """Another basis, other units, another origin: what the sums of dA^T r leave is nothing but rounding."""
    m, n = 9, 4
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: B023, E731
        U, V = torch.linalg.qr(draw(m, n)).Q, torch.linalg.qr(draw(n, n)).Q
        A = U * torch.logspace(0, -math.log10(condition), n, dtype=torch.float64) @ V.T
        A = A * 10 ** (4 * torch.rand(n, generator=g, dtype=torch.float64) - 2)
        b, aside = A @ draw(n), draw(m)
        b = b / b.norm() + 10.0 ** (seed % 4 - 2) * (aside - U @ (U.T @ aside))
        dA = {
            "A M": lambda: A @ draw(n, n),  # noqa: B023
            "M A": lambda: draw(m, m) @ A,  # noqa: B023
            "u v^T": lambda: torch.outer(draw(m), draw(n)),  # noqa: B023
            "A u v^T": lambda: torch.outer(A @ draw(n), draw(n)),  # noqa: B023
            "any": lambda: draw(m, n),  # noqa: B023
        }[change]()
        pattern = full_pattern(m, n)
        solve = lambda v: fl.lstsq(fl.SparseMatrix(v, pattern), b)  # noqa: B023, E731
        want, parts = x_dot(A, dA, b)
        _, got = jvp(solve, (A.reshape(-1),), (dA.reshape(-1),))
        assert distance(got, want) <= RIGHT + max(size(want), parts - math.log2(10))


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


counted = {"right": 0, "refused": 0}


@fuzz(400)
@given(problems())
def test_every_derivative_is_right_or_refused(problem):
    A, b, c, damp, weights = problem
    m, n = A.shape
    pattern, given_damp = full_pattern(m, n), torch.tensor(damp or 0.0, dtype=torch.float64)
    W = torch.ones(m, dtype=torch.float64) if weights is None else weights
    inputs = {"A": A.reshape(-1), "b": b, "damp": given_damp, "weights": W}

    def loss(values, b, d, w):
        options = {} if damp is None else {"damp": d}
        options |= {} if weights is None else {"weights": w}
        return fl.lstsq(fl.SparseMatrix(values, pattern), b, **options) @ c

    try:
        want = gradients(A, b, c, damp, weights)
    except AssertionError:  # without full rank
        with pytest.raises(fl.RankDeficientError):
            loss(*inputs.values())
        return
    for place, name in enumerate(inputs):
        if (name == "damp" and damp is None) or (name == "weights" and weights is None):
            continue
        exact = [[v] for row in want[name] for v in row]
        zero = torch.ones_like(inputs[name]) / max(1, inputs[name].numel()) ** 0.5
        for mode in ("reverse", "forward"):
            try:
                if mode == "reverse":
                    got, right = grad(loss, argnums=place)(*inputs.values()), exact
                else:
                    moved = functools.partial(_with, loss, list(inputs.values()), place)
                    _, got = jvp(moved, (inputs[name],), (zero,))
                    right = times(transpose(exact, 1), rational(zero.reshape(-1)), 1)
            except torch.linalg.LinAlgError:
                counted["refused"] += 1
                continue
            counted["right"] += 1
            # A residual that is zero has rounding errors of b.
            rounding = want["image"] + size(rational(b)) - 50 if name == "weights" else -math.inf
            # Of a sum along a direction, what its terms are; of a gradient by A, what its two products are.
            beside = size(exact) if mode == "forward" else -math.inf
            if name == "A" or mode == "forward":
                beside = max(beside, want["terms"])
            allowed = RIGHT + max(size(right), beside - math.log2(10) * (1 if mode == "forward" else 4))
            assert distance(got.reshape(-1), right) <= max(allowed, rounding), f"{mode} by {name}"


def test_few_of_them_are_refused():
    """Of those of the test before."""
    if sum(counted.values()) > 1000:
        assert counted["refused"] <= 0.02 * sum(counted.values())


@pytest.mark.parametrize("spread", [0, 15, 20, 25])
def test_gradients_without_full_rank_in_mixed_units(spread):
    """Of c x: -y x^T + r (A^+ y)^T + ((A^+)^T x) (c - A^T y)^T with y = (A^+)^T c; at most half refused."""
    refused = 0
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        whole = lambda *shape: torch.randint(-3, 4, shape, generator=g).double()  # noqa: B023, E731
        A = whole(6, 3) @ whole(3, 4) * 2.0 ** torch.tensor([-spread, 0, 0, spread])
        b, c = whole(6), whole(4)
        pinv = least_squares(A, torch.eye(6, dtype=torch.float64))[0]
        S, B, C, back = rational(A), rational(b), rational(c), transpose(pinv, 6)
        x, y = times(pinv, B, 1), times(back, C, 1)
        r = [[p[0] - q[0]] for p, q in zip(B, times(S, x, 1), strict=True)]
        beyond = [[p[0] - q[0]] for p, q in zip(C, times(transpose(S, 4), y, 1), strict=True)]
        u, v = times(back, x, 1), times(pinv, y, 1)
        want = [[r[i][0] * v[j][0] + u[i][0] * beyond[j][0] - y[i][0] * x[j][0] for j in range(4)] for i in range(6)]
        matrix = fl.SparseMatrix(A.reshape(-1), full_pattern(6, 4))
        try:
            got = grad(lambda A: fl.lstsq(A, b, rank_deficient="minimum_norm") @ c)(matrix).to_dense()  # noqa: B023
        except torch.linalg.LinAlgError:
            refused += 1
            continue
        assert distance(got, want) <= RIGHT + size(want)
    assert refused <= 4
