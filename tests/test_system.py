"""Column scaling and the augmented system, entry by entry: exact where it is a power of two, right at any size."""

import math
from fractions import Fraction

import pytest
import torch
from helpers import full_pattern, problem
from hypothesis import example, given
from hypothesis import strategies as st
from rationals import rational, times, transpose

import functional_lstsq as fl
from functional_lstsq.solvers.system import EPS, System, Weighting
from functional_lstsq.sparse.base import dot, norm
from functional_lstsq.sparse.double_double import Pair
from functional_lstsq.sparse.numerics import ldexp, noise, power_of_two
from functional_lstsq.sparse.plain_products import Operator, column_sizes

DOUBLE = torch.float64
TINIEST, LARGEST = 2.0**-1074, torch.finfo(DOUBLE).max


def system_of(D, damp=None, *, precision=EPS, weighting=None, pattern=None):
    """The system of dense matrices (P, m, n), or of values on a pattern."""
    pattern, values = (full_pattern(*D.shape[1:]), D.flatten(1)) if pattern is None else (pattern, D)
    return System(Operator(pattern, values), damp, precision, weighting=weighting)


def matrix(m, n, dtype=DOUBLE, copies=2, seed=0):
    return torch.randn(copies, m, n, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def squares_of(D, damp):
    """Squares of the norms of the columns of [D; damp], exactly."""
    D, damp = (t.tolist() for t in (D, damp))
    return [sum(Fraction(row[j]) ** 2 for row in D) + Fraction(d) ** 2 for j, d in enumerate(damp)]


def held(D, damp=None):
    """`column_sizes` of a dense (m, n) of sizes: each as right as a sum of squares is."""
    m, n = D.shape
    columns = torch.arange(n).repeat(m)[None]
    given_damp = None if damp is None else damp[None]
    largest, squares = column_sizes(D.reshape(1, -1), columns, given_damp, n)
    found = [Fraction(a) ** 2 * Fraction(s) for a, s in zip(largest[0].tolist(), squares[0].tolist(), strict=True)]
    want = squares_of(D, torch.zeros(n) if damp is None else damp.expand(n))
    for j, (got, right) in enumerate(zip(found, want, strict=True)):
        assert abs(got - right) <= 8 * m * Fraction(EPS) * right, f"column {j}"


@pytest.mark.parametrize("of_all", [1e-300, 1e-160, 1.0, 1e160, 1e300])
@pytest.mark.parametrize("damp", [None, 0.0, 1e-3, 1e3])
def test_norms_of_columns_of_one_size(of_all, damp):
    d = None if damp is None else torch.tensor([of_all * damp], dtype=DOUBLE)
    held(of_all * matrix(5, 3)[0].abs(), d)


@pytest.mark.parametrize("damp", [None, "one", "each"])
def test_norms_of_columns_of_every_size_at_once(damp):
    """No square of one under- or overflows beside those of others, 600 decades away."""
    of_column = torch.tensor([1e-300, 1e-155, 1e-20, 1.0, 1e154, 1e300, TINIEST, LARGEST / 8], dtype=DOUBLE)
    D = matrix(6, 8)[0].abs().clamp(0.5, 2) * of_column
    dampings = {None: None, "one": torch.tensor([1e-155], dtype=DOUBLE), "each": of_column.flip(0).clamp_min(1e-300)}
    held(D, dampings[damp])


@given(st.lists(st.floats(0, LARGEST / 4), min_size=6, max_size=6), st.none() | st.floats(0, LARGEST / 4))
def test_norms_of_any_columns(entries, damp):
    D = torch.tensor(entries, dtype=DOUBLE).view(3, 2)
    held(D, None if damp is None else torch.tensor([damp], dtype=DOUBLE))


def test_norms_of_a_batch_with_columns_that_are_empty():
    """A batch in which one matrix needs units for each column, and the others do not."""
    columns = torch.tensor([0, 0, 2, 2]).expand(3, 4)
    sizes = torch.tensor([[3, 4, 0, 0], [3e-200, 4e-200, 5, 12], [0, 0, 0, 0]], dtype=DOUBLE)
    largest, squares = column_sizes(sizes, columns, None, 3)
    found = largest * squares.sqrt()
    want = torch.tensor([[5, 0, 0], [5e-200, 0, 13], [0, 0, 0]], dtype=DOUBLE)
    torch.testing.assert_close(found, want, rtol=1e-15, atol=0)
    assert torch.equal(squares == 0, want == 0)
    nothing = column_sizes(sizes[:, :0], columns[:, :0], None, 3)
    assert (nothing[1] == 0).all()


SIZES = [1e-300, 1e-200, 1e-100, 1.0, 1e100, 1e200, 1e300]


@pytest.mark.parametrize("dtype", [DOUBLE, torch.complex128], ids=str)
@pytest.mark.parametrize("damp", [None, "one", "each"])
@pytest.mark.parametrize("size", SIZES)
def test_scaling_is_by_powers_of_two_and_exact(size, damp, dtype):
    """Columns of [A; d] come out with norms from 1/2 to 2, and multiplied back they are what they were."""
    decades = torch.tensor([-5, 0, 3, -1], dtype=DOUBLE)
    D = matrix(6, 4, dtype) * 10**decades * size
    dampings = {None: None, "one": torch.ones(2, 1, dtype=DOUBLE), "each": 10 ** decades.flip(0).expand(2, 4)}
    d = None if damp is None else dampings[damp] * size
    system = system_of(D, d)
    assert (torch.frexp(system.scale).mantissa == 0.5).all()
    scaled = system.A.dense()
    assert torch.equal(scaled * system.scale.mT, D)
    whole = torch.linalg.vector_norm(scaled, dim=1).square()
    if d is not None:
        assert torch.equal(system.damp * system.scale, d[:, :, None].expand(2, 4, 1))
        assert torch.equal(system.d2, system.damp.square())
        whole = whole + system.d2[:, :, 0]
    norms = whole.sqrt()
    assert ((norms >= 0.5) & (norms <= 2)).all()
    torch.testing.assert_close(system.norms[:, :, 0], norms, rtol=1e-14, atol=0)
    assert not system.lost.any()
    assert (system.weight == system.scale.amin(1, keepdim=True) / system.scale).all()
    together = sum(sum(squares_of(parts, torch.zeros(4))) for part in D for parts in _real_parts(part)) / 2
    if d is not None:
        together += sum(Fraction(v) ** 2 for v in d.expand(2, 4).flatten().tolist()) / 2
    root_mean = math.sqrt(sum(Fraction(v) ** 2 for v in (system.frobenius / size).flatten().tolist()) / 2)
    assert root_mean == pytest.approx(math.sqrt(together / Fraction(size) ** 2), rel=1e-13)


def _real_parts(t):
    return (t.real, t.imag) if t.is_complex() else (t,)


@pytest.mark.parametrize("exponent", [-900, -300, 300, 900])
def test_the_scaled_system_does_not_see_the_unit(exponent):
    D, d = matrix(6, 4), torch.full((2, 1), 0.3, dtype=DOUBLE)
    one, other = system_of(D, d), system_of(D * 2.0**exponent, d * 2.0**exponent)
    assert torch.equal(one.A.values, other.A.values)
    assert torch.equal(one.damp, other.damp)
    assert torch.equal(one.norms, other.norms)
    assert torch.equal(one.scale * 2.0**exponent, other.scale)
    assert torch.equal(one.scaling.exponents + exponent, other.scaling.exponents)


@pytest.mark.parametrize("power", [1, -1])
@pytest.mark.parametrize("sign", [1, -1])
def test_rescaling_takes_sizes_beyond_the_range_together(sign, power):
    """600 + 900 - 1500: neither 2^1500 nor 2^-1500 is a number."""
    system = system_of(torch.full((1, 1, 1), 0.75 * 2.0 ** (900 * sign * power), dtype=DOUBLE))
    number = torch.full((1, 1, 1), 3 * 2.0 ** (600 * sign), dtype=DOUBLE)
    assert system.scaling.rescaled(number, torch.full((1, 1, 1), -1500 * sign), power).item() == 3


def test_empty_columns_have_a_scale_that_divides():
    system = system_of(torch.tensor([[[1.0, 0], [2.0, 0]]], dtype=DOUBLE))
    assert system.empty.tolist() == [[False, True]]
    assert system.scale.isfinite().all()
    assert (system.scale > 0).all()
    assert system.A.values.isfinite().all()


def test_what_becomes_zero_beside_a_damping_is_told():
    D = torch.tensor([[[1e-300, 1.0]], [[1.0, 1.0]]], dtype=DOUBLE)
    system = system_of(D, torch.tensor([[1e100], [1e100]], dtype=DOUBLE))
    assert system.lost.tolist() == [[True], [False]]
    assert not system_of(D).lost.any()


@pytest.mark.parametrize("power", [1, -1])
@pytest.mark.parametrize("exponents", [[0, 3], [-1000, 1000], [-390, 390], [-500, 900]], ids=str)
@pytest.mark.parametrize("size", [-1000, -10, 0, 700])
def test_rescaling_does_not_leave_the_range_half_way(power, exponents, size):
    """Numbers whose result is a number come out exactly, where D alone takes them out of the range."""
    scale = torch.tensor(exponents, dtype=DOUBLE)
    system = system_of(0.75 * 2.0**scale * torch.eye(2, dtype=DOUBLE)[None])
    assert system.scaling.exponents.flatten().tolist() == exponents
    # 3 2^k, where k is what brings the result near 1 or, where that is no number, as near as there is one.
    start = (-size - power * scale).clamp(-1000, 1000)
    found = system.scaling.rescaled((3 * 2.0**start).view(1, 2, 1), torch.full((1, 1, 1), size), power)
    assert found.flatten().tolist() == [math.ldexp(3.0, int(k)) for k in start + size + power * scale]


def _weighting(copies, m, slack):
    g = torch.Generator().manual_seed(5)
    W = 4 * torch.rand(copies, m, dtype=DOUBLE, generator=g)
    T = torch.rand(copies, m, dtype=DOUBLE, generator=g)
    T[:, 0] = 0
    return Weighting(W, torch.full((copies, 1), 3), T if slack else None)


def added(*matrices):
    return [[sum(numbers) for numbers in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]


def rows_times(factors, M):
    return [[w * v for v in row] for w, row in zip(factors, M, strict=True)]


def _exact_residuals(A, d, W, T, b, c, r, y):
    """(b - T r - A y, c - A^H W r + d^2 y) and the same with every term's absolute value; of rationals."""
    k, n = len(b[0]), len(A[0])
    At = transpose(A, n)
    sizes = lambda M: [[abs(v) for v in row] for row in M]  # noqa: E731
    less = lambda M: [[-v for v in row] for row in M]  # noqa: E731
    squares = [v * v for v in d]
    first = [b, less(rows_times(T, r)), less(times(A, y, k))]
    second = [c, less(times(At, rows_times(W, r), k)), rows_times(squares, y)]
    first_sizes = [sizes(b), rows_times(T, sizes(r)), times(sizes(A), sizes(y), k)]
    second_sizes = [sizes(c), times(sizes(At), rows_times(W, sizes(r)), k), rows_times(squares, sizes(y))]
    return [(added(*first), added(*first_sizes)), (added(*second), added(*second_sizes))]


@pytest.mark.parametrize("dtype", [DOUBLE, torch.complex128], ids=str)
@pytest.mark.parametrize("weights", ["none", "weights", "slack"])
@pytest.mark.parametrize("damp", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_residuals_are_those_of_the_augmented_system(exact, damp, weights, dtype):
    """Plain ones to a few eps of their terms, exact ones to 2^-100 of them before they are rounded."""
    copies, (m, n), k = 2, (5, 3), 2
    d = torch.tensor([[0.3, 1, 2], [0.1, 0, 5]], dtype=DOUBLE) if damp else None
    weighting = None if weights == "none" else _weighting(copies, m, weights == "slack")
    system = system_of(matrix(m, n, dtype), d, weighting=weighting)
    g = torch.Generator().manual_seed(1)
    r, y = (torch.randn(copies, size, k, dtype=dtype, generator=g) for size in (m, n))
    b, c = system.residuals(torch.zeros_like(r), torch.zeros_like(y), r, y)
    b, c = -b, -c  # so that but rounding is left of the residuals for them
    whole_r, whole_y = (Pair(t, 2.0**-58 * t.flip(1)) for t in (r, y))
    found = system.exact_residuals(b, c, whole_r, whole_y) if exact else system.residuals(b, c, r, y)
    twice = 2 if dtype.is_complex else 1
    for p in range(copies):
        scaled, ones = system.plain.dense()[p], [Fraction(1)] * m * twice
        of_damp = (
            [Fraction(0)] * n * twice if d is None else [Fraction(v) for v in system.damp[p, :, 0].tolist()] * twice
        )
        W, T = ones, ones
        if weighting is not None:
            W = [Fraction(v) for v in weighting.weights[p].tolist()] * twice
            T = [Fraction(v) for v in weighting.slack[p].tolist()] * twice if weights == "slack" else ones
        whole = [rational(t[p]) for t in ((whole_r.high, whole_y.high) if exact else (r, y))]
        if exact:
            whole = [added(t, rational(low[p])) for t, low in zip(whole, (whole_r.low, whole_y.low), strict=True)]
        want = _exact_residuals(rational(scaled), of_damp, W, T, *(rational(t[p]) for t in (b, c)), *whole)
        for name, got, (right, sizes) in zip(("first", "second"), found, want, strict=True):
            for row in zip(rational(got[p]), right, sizes, strict=True):
                for value, number, size in zip(*row, strict=True):
                    allowed = size / 2**100 + abs(number) * Fraction(EPS) if exact else 20 * size * Fraction(EPS)
                    assert abs(value - number) <= allowed, name


def test_weights_and_slack_go_where_they_belong():
    weighting = _weighting(2, 5, True)
    system, r = system_of(matrix(5, 3), weighting=weighting), matrix(5, 2, seed=2)
    W, T = weighting.weights[:, :, None], weighting.slack[:, :, None]
    torch.testing.assert_close(system.weigh(system.weigh(r)), W * r, rtol=1e-15, atol=0)
    assert torch.equal(system.slackened(r), T * r)
    assert torch.equal(system.multiplied(r, None), 64 * W * r)
    assert torch.equal(system.multiplied(r, r), 64 * (W * r + r))
    torch.testing.assert_close(system.A.dense(), W.sqrt() * system.plain.dense(), rtol=1e-15, atol=0)
    plain = system_of(matrix(5, 3))
    assert plain.weigh(r) is r
    assert plain.slackened(r) is r
    assert plain.plain is plain.A


@pytest.mark.parametrize("dtype", [DOUBLE, torch.complex128], ids=str)
def test_samples_of_rounding_are_as_large_as_its_bound(dtype):
    pattern, values, b = problem(7, 4, dtype=dtype)
    system = system_of(values[None], torch.tensor([[0.5]], dtype=DOUBLE), pattern=pattern)
    r, y, c = b[None, :, None], b[None, :4, None], b[None, 3:, None]
    A = system.A.dense().abs()
    sizes = 2 * r.abs() + A @ y.abs(), c.abs() + A.mT @ r.abs() + system.d2 * y.abs()
    for samples, size in zip(system.rounding(r, c, r, y), sizes, strict=True):
        assert samples.shape == (*size.shape[:2], 2)
        relative = samples.abs() / (EPS * size)
        assert ((relative >= 0.499) & (relative <= 1.501)).all()
        assert not torch.equal(samples[:, :, 0], samples[:, :, 1])


@pytest.mark.parametrize("dtype", [DOUBLE, torch.complex128], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(6, 3), (6, 9), (40_000, 9)])  # the last in parts
def test_products_and_norms_of_columns(rows, columns, dtype):
    x, y = matrix(rows, columns, dtype), matrix(rows, columns, dtype, seed=1)
    torch.testing.assert_close(dot(x, y), (x.conj() * y).sum(1).real, rtol=1e-11, atol=1e-9)
    torch.testing.assert_close(norm(x), torch.linalg.vector_norm(x, dim=1), rtol=1e-13, atol=0)


# Powers of two.


@pytest.mark.parametrize("exponent", [-1021, -1, 0, 52, 1023])
def test_a_power_of_two(exponent):
    assert float(power_of_two(torch.tensor(exponent))) == math.ldexp(1.0, exponent)


@pytest.mark.parametrize("exponent", [-5000, -1074, 1024, 5000])
def test_a_power_of_two_stays_finite_and_normal(exponent):
    assert 2.0**-1022 < float(power_of_two(torch.tensor(exponent))) <= 2.0**1023


@example(2.0**1023, -2043)
@example(2.0**1023, -2090)
@given(st.floats(-LARGEST, LARGEST), st.integers(-2110, 2110))
def test_numbers_times_powers_of_two(number, exponent):
    try:
        want = math.ldexp(number, exponent)
    except OverflowError:
        want = math.copysign(math.inf, number)
    found = float(ldexp(torch.tensor([number], dtype=DOUBLE), torch.tensor([exponent])))
    # Two steps round twice below the normal numbers.
    assert found == want or abs(found - want) <= TINIEST


@given(st.integers(1, 50), st.integers(0, 5))
def test_noise_is_the_same_every_time_and_of_either_sign(count, seed):
    like = torch.zeros(count, 8, dtype=DOUBLE)
    found = noise(like, seed)
    assert torch.equal(found, noise(like + 1, seed))
    assert ((found.abs() >= 0.5) & (found.abs() < 1.5)).all()
    assert len(found.unique()) == found.numel()
    assert not torch.equal(found, noise(like, seed + 1))
    if count > 4:
        assert (found > 0).any()
        assert (found < 0).any()


def test_a_pattern_of_holes_is_scaled_as_a_full_one():
    pattern, values, _ = problem(9, 5, density=0.3)
    by_pattern = system_of(values[None], pattern=pattern)
    D = fl.SparseMatrix(values, pattern).to_dense()
    by_all = system_of(D[None])
    assert torch.equal(by_pattern.scale, by_all.scale)
    assert torch.equal(by_pattern.A.dense(), by_all.A.dense())
    torch.testing.assert_close(by_pattern.frobenius, by_all.frobenius, rtol=1e-15, atol=0)
