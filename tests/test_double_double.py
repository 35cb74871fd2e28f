"""Numbers of twice the working precision, and products that are exact, against rational arithmetic."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from helpers import full_pattern, problem
from hypothesis import assume, given
from hypothesis import strategies as st
from rationals import rational, times, transpose

import functional_lstsq as fl
from functional_lstsq.sparse.double_double import Pair, Single, minus, scaled, two_product, two_sum
from functional_lstsq.sparse.exact_products import ExactProducts, multiplied_exactly
from functional_lstsq.sparse.plain_products import Operator

UNIT = Fraction(1, 2**53)  # the rounding error of a double, relative
LARGEST = torch.finfo(torch.float64).max
ANY = st.floats(-LARGEST / 4, LARGEST / 4)  # subnormal ones and zeros of both signs among them
MODERATE = st.floats(-(2.0**400), 2.0**400).filter(lambda a: a == 0 or abs(a) > 2.0**-400)
NEAR = st.integers(-(2**53), 2**53).map(lambda a: a / 2**26)  # sums and products of these cancel


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def exactly(x):
    """The number that a pair of one element stands for."""
    return sum(Fraction(float(part)) for part in x)


def ulp(x):
    return Fraction(math.ulp(float(x)))


@st.composite
def pairs(draw, numbers=MODERATE):
    """A pair whose low part is anything up to half a unit in the last place of the high one."""
    high = draw(numbers)
    low = math.ulp(high) / 2 * draw(st.floats(-1, 1)) if high else 0.0
    high, low = two_sum(tensor(high), tensor(low))
    return Pair(high, low)


@given(ANY | NEAR, ANY | NEAR)
def test_a_sum_and_its_error_are_exact(a, b):
    high, low = two_sum(tensor(a), tensor(b))
    assert Fraction(float(high)) + Fraction(float(low)) == Fraction(a) + Fraction(b)
    assert float(high) == a + b
    assert abs(Fraction(float(low))) <= ulp(high) / 2


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1.0, 2.0**-60),
        (2.0**-60, 1.0),
        (1e16, -1e16 + 2),
        (2.0**1022, 2.0**-1074),
        (2.0**-1074, -(2.0**-1073)),
        (2.0**-1022, -(2.0**-1074)),
        (LARGEST / 2, LARGEST / 2),
        (-LARGEST / 2, 2.0**-1074),
    ],
)
def test_sums_at_the_ends_of_the_range(a, b):
    high, low = two_sum(tensor(a), tensor(b))
    assert exactly((high, low)) == Fraction(a) + Fraction(b)
    assert float(high) == a + b


@given(MODERATE | NEAR, MODERATE | NEAR)
def test_a_product_and_its_error_are_exact(a, b):
    found = two_product(tensor(a), tensor(b))
    assert exactly(found) == Fraction(a) * Fraction(b)
    assert float(found.high) == a * b
    assert abs(Fraction(float(found.low))) <= ulp(found.high) / 2


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1 + 2.0**-52, 2.0**990 * (1 - 2.0**-53)),  # whose halves are not infinite yet
        (2.0**990 * (1 - 2.0**-53), 1 - 2.0**-53),
        (2.0**500 * (1 + 2.0**-52), 2.0**500 * (1 - 2.0**-53)),
        (2.0**-484 * (1 + 2.0**-52), 2.0**-484 * (1 - 2.0**-53)),  # whose error is the least normal number, about
        (2.0**-1022, 2.0**60 * (1 - 2.0**-53)),
        (2.0**-1074, 2.0**70 * (1 - 2.0**-53)),
    ],
)
def test_products_at_the_ends_of_the_range(a, b):
    assert exactly(two_product(tensor(a), tensor(b))) == Fraction(a) * Fraction(b)
    assert exactly(two_product(tensor(-a), tensor(b))) == -Fraction(a) * Fraction(b)


@given(MODERATE | NEAR, MODERATE | NEAR, MODERATE | NEAR)
def test_a_product_with_a_complex_number(a, real, imaginary):
    found = two_product(tensor(a), torch.complex(tensor(real), tensor(imaginary)))
    for part, number in (("real", real), ("imag", imaginary)):
        assert exactly(getattr(t, part) for t in found) == Fraction(a) * Fraction(number), part


@given(pairs(), MODERATE)
def test_a_number_is_added_to_a_pair(x, a):
    """Within 2 u^2 of the sum itself, whatever cancels (Joldes, Muller, Popescu, ACM TOMS 44(2), 2017, theorem 2.2)."""
    found, want = x.plus(tensor(a)), exactly(x) + Fraction(a)
    assert abs(exactly(found) - want) <= 2 * UNIT**2 * abs(want)
    assert abs(Fraction(float(found.low))) <= ulp(found.high) / 2


@given(pairs(), MODERATE)
def test_what_cancels_leaves_the_low_part(x, a):
    assert exactly(x.plus(-x.high)) == Fraction(float(x.low))
    back = x.plus(tensor(a)).plus(tensor(-a))
    assert abs(exactly(back) - exactly(x)) <= 5 * UNIT**2 * (abs(exactly(x)) + abs(Fraction(a)))


@given(pairs(), pairs())
def test_pairs_are_added(x, y):
    found, (p, q) = x.add(y), map(exactly, (x, y))
    assert abs(exactly(found) - (p + q)) <= 5 * UNIT**2 * (abs(p) + abs(q))
    assert exactly(x.add(minus(x))) == 0
    assert exactly(minus(x)) == -p


@given(st.floats(2.0**-150, 2.0**150), pairs(st.floats(2.0**-150, 2.0**150) | NEAR))
def test_a_pair_is_scaled(a, x):
    want = Fraction(a) * exactly(x)
    assert abs(exactly(scaled(tensor(a), x)) - want) <= 4 * UNIT**2 * abs(want)
    assert abs(exactly(scaled(tensor(-a), x)) + want) <= 4 * UNIT**2 * abs(want)


def test_a_long_sum_that_cancels():
    """1e5 numbers from 1e-20 to 1e20 and their negatives in another order: what is left is the one number besides."""
    g = torch.Generator().manual_seed(0)
    numbers = torch.randn(10**5, generator=g, dtype=torch.float64)
    numbers *= 10 ** (40 * torch.rand(10**5, generator=g, dtype=torch.float64) - 20)
    order = torch.randperm(10**5, generator=g)
    columns = torch.stack([numbers, -numbers[order]]).view(2, 100, 1000)
    total = Pair.of(torch.full((1000,), math.pi / 1000, dtype=torch.float64))
    for row in columns.flatten(0, 1):
        total = total.plus(row)
    left = sum(map(Fraction, total.high.tolist())) + sum(map(Fraction, total.low.tolist()))
    sizes = sum(abs(Fraction(v)) for v in numbers.tolist())
    assert abs(left - 1000 * Fraction(math.pi / 1000)) <= 200 * 2 * UNIT**2 * 2 * sizes
    assert abs(float(columns.sum((0, 1)).sum()) - math.pi) > 1  # which double precision does not see


def test_a_pair_of_a_tensor_and_its_value():
    t = tensor(1.0, -2.0)
    assert [part.tolist() for part in Pair.of(t)] == [[1, -2], [0, 0]]
    assert Pair(t, tensor(2.0**-53, 2.0**-51)).value.tolist() == [1, -2 + 2.0**-51]


@pytest.mark.parametrize("kind", [Pair, Single])
def test_columns_are_taken_from_one_or_the_other(kind):
    new, old = torch.ones(1, 2, 3, dtype=torch.float64), torch.zeros(1, 2, 3, dtype=torch.float64)
    mask = torch.tensor([True, False, True])[None, None]
    for part in kind(*([new] * len(kind._fields))).where(mask, kind(*([old] * len(kind._fields)))):
        assert part.tolist() == [[[1, 0, 1]] * 2]
    assert Single(new).plus(new).high.tolist() == (2 * new).tolist()


# Products with sparse matrices.


def product(A, x, adjoint):
    """(A X, |A| |X|) for dense matrices, or with the adjoint of A, as rationals; complex ones as pairs of rows."""
    S = rational(A)
    S = transpose(S, len(S[0])) if adjoint else S
    high, low = map(rational, x)
    X = [[p + q for p, q in zip(*rows, strict=True)] for rows in zip(high, low, strict=True)]
    columns = len(X[0])
    sizes = [[[abs(v) for v in row] for row in M] for M in (S, X)]
    return times(S, X, columns), times(*sizes, columns)


def held(found, want, sizes, bits=100):
    """Every number within 2^-bits of the terms that it is a sum of."""
    high, low = map(rational, found)
    for i, row in enumerate(want):
        for j, number in enumerate(row):
            error = abs(high[i][j] + low[i][j] - number)
            assert error <= sizes[i][j] / 2**bits, f"row {i}, column {j}: {float(error / sizes[i][j]):.1e}"


def pair_like(size, dtype, seed, decades=0):
    g = torch.Generator().manual_seed(seed)
    high = torch.randn(size, dtype=dtype, generator=g)
    high = high * 10 ** (decades * (torch.rand(size, dtype=torch.float64, generator=g) - 0.5))
    low = high * 2.0**-54 * torch.rand(size, dtype=torch.float64, generator=g)
    return Pair(high, low)


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (1, 30), (1, 1), (3, 200)], ids=str)
def test_products_of_a_batch_are_right_to_the_last_slice(shape, dtype, adjoint):
    (m, n), copies, k = shape, 2, 3
    pattern, values, _ = problem(m, n, dtype=dtype, seed=1, density=0.7)
    A = Operator(pattern, torch.stack([values, values.flip(0)]))
    x = pair_like((copies, m if adjoint else n, k), dtype, 2)
    found, D = ExactProducts(A, adjoint=adjoint)(x), A.dense()
    for p in range(copies):
        held([part[p] for part in found], *product(D[p], [part[p] for part in x], adjoint))


@pytest.mark.parametrize("adjoint", [False, True])
def test_products_that_cancel(adjoint):
    """To nothing, to the low part of x, and to a number 2^40 times smaller than the terms."""
    big = 2.0**40
    A = torch.tensor([[1, -1, 0], [1, 1, -2], [big, -big, 1], [3, 0, -1]], dtype=torch.float64)
    third = tensor(1 / 3)[0]
    x = Pair(torch.stack([third, third, third]), tensor(2.0**-60, 2.0**-60, -(2.0**-58)))
    if adjoint:
        A = A.T.contiguous()
    operator = Operator(full_pattern(*A.shape), A.reshape(1, -1))
    found = ExactProducts(operator, adjoint=adjoint)(Pair(*(part[None, :, None] for part in x)))
    high, low = (part[0, :, 0].tolist() for part in found)
    want = [0, Fraction(2.0**-59 + 2.0**-57), Fraction(float(third)) - Fraction(2.0**-58), 2 * Fraction(float(third))]
    want[3] += 3 * Fraction(2.0**-60) + Fraction(2.0**-58)
    assert [Fraction(p) + Fraction(q) for p, q in zip(high, low, strict=True)] == want


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_rows_have_units_of_their_own(dtype, adjoint):
    """Of A by rows, so that a row of small numbers is as right as one of large ones; of X by columns."""
    D = pair_like((6, 4), dtype, 3).high
    D = D * 2.0 ** tensor(-300, -100, 0, 1, 100, 300)[:, None]
    A = Operator(full_pattern(*((4, 6) if adjoint else (6, 4))), (D.mH if adjoint else D).resolve_conj().reshape(1, -1))
    x = pair_like((1, 4, 3), dtype, 4)
    x = Pair(*(part * 2.0 ** tensor(-200, 0, 200) for part in x))
    found = ExactProducts(A, adjoint=adjoint)(x)
    held([part[0] for part in found], *product(D, [part[0] for part in x], False))


def test_a_long_row_has_thinner_slices():
    """So that sums of products are exact in double precision: (m, n) = (1, 5000) is a sum of 5000 terms."""
    n = 5000
    A, x = pair_like((1, n), torch.float64, 5).high, pair_like((1, n, 1), torch.float64, 6)
    products = ExactProducts(Operator(full_pattern(1, n), A), adjoint=False)
    assert 2 * products.bits + math.ceil(math.log2(n)) <= 53
    assert products.bits * products.count >= 106
    held([part[0] for part in products(x)], *product(A, [part[0] for part in x], False))


@pytest.mark.parametrize("adjoint", [False, True])
def test_products_with_nothing(adjoint):
    """Rows and columns without entries, a matrix without any, x of zeros."""
    holes = fl.SparsePattern(torch.tensor([[1, 1], [0, 2]]), (3, 4))
    empty = fl.SparsePattern(torch.zeros((2, 0), dtype=torch.int64), (3, 4))
    rows = 3 if adjoint else 4
    ones = Pair.of(torch.ones(1, rows, 2, dtype=torch.float64))
    for pattern, values, x, want in (
        (holes, tensor(2.0, 3.0), ones, [2, 0, 3, 0] if adjoint else [0, 5, 0]),
        (holes, tensor(2.0, 3.0), Pair.of(torch.zeros(1, rows, 2, dtype=torch.float64)), [0] * (7 - rows)),
        (holes, tensor(0.0, 0.0), ones, [0] * (7 - rows)),
        (empty, tensor(), ones, [0] * (7 - rows)),
    ):
        found = ExactProducts(Operator(pattern, values[None]), adjoint=adjoint)(x).value
        assert found.tolist() == [[[v, v] for v in want]]


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize(
    ("of_A", "of_X"),
    [*itertools.product((-1000, 0, 1000), (-900, 0, 900))][1:-1],  # both ends but where the products leave the range
)
def test_products_have_any_unit(of_A, of_X, adjoint):
    """Scaled by powers of two, they are the same to the last bit."""
    D, X = pair_like((5, 4), torch.float64, 7).high, pair_like((1, 5 if adjoint else 4, 2), torch.float64, 8).high
    pattern = full_pattern(5, 4)
    want = multiplied_exactly(Operator(pattern, D.reshape(1, -1)), X, adjoint=adjoint)
    found = multiplied_exactly(Operator(pattern, D.reshape(1, -1) * 2.0**of_A), X * 2.0**of_X, adjoint=adjoint)
    half = 2.0 ** ((of_A + of_X) // 2)
    assert torch.equal(found / half / half, want)


@pytest.mark.parametrize("adjoint", [False, True])
def test_products_of_subnormal_numbers(adjoint):
    A = torch.tensor([[3, -5, 0], [2**20 + 1, 7, -1]], dtype=torch.float64)
    X = torch.tensor([[1 + 2.0**-20], [-3], [0.625]], dtype=torch.float64)
    if adjoint:
        A = A.T.contiguous()
    small = Operator(full_pattern(*A.shape), (A * 2.0**-1074).reshape(1, -1))
    large = Operator(full_pattern(*A.shape), A.reshape(1, -1))
    assert torch.equal(
        multiplied_exactly(small, X[None] * 2.0**1000, adjoint=adjoint),
        multiplied_exactly(large, X[None], adjoint=adjoint) * 2.0**-74,
    )
    back = multiplied_exactly(large, X[None] * 2.0**-1050, adjoint=adjoint)
    assert torch.equal(back, multiplied_exactly(large, X[None], adjoint=adjoint) * 2.0**-1050)


@given(st.lists(st.tuples(MODERATE, MODERATE), min_size=1, max_size=6))
def test_a_product_is_rounded_once(terms):
    """Where nothing but the last digits cancels, the nearest double or, of a tie but for 2^-100, its neighbour."""
    a, x = (tensor(*column) for column in zip(*terms, strict=True))
    want = sum((Fraction(p) * Fraction(q) for p, q in terms), Fraction(0))
    largest = max(abs(Fraction(p)) for p, _ in terms) * max(abs(Fraction(q)) for _, q in terms)
    assume(Fraction(2) ** -950 < abs(want) < Fraction(2) ** 950)
    assume(largest <= abs(want) * 2**40)
    found = multiplied_exactly(Operator(full_pattern(1, len(a)), a[None]), x[None, :, None], adjoint=False)
    assert abs(Fraction(float(found)) - want) <= ulp(found) * (Fraction(1, 2) + Fraction(1, 2**5))
