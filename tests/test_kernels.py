"""Compiled kernels and torch's operations, held to the same references, in processes of every kind."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import functional_lstsq as fl
from functional_lstsq.solvers import dense as room
from functional_lstsq.sparse import dense_kernels, entry_kernels, kernels
from functional_lstsq.sparse.gram_pattern import GramPattern
from functional_lstsq.sparse.plain_products import Operator
from functional_lstsq.sparse.products import _sample_kernel

pytest.importorskip("numba")
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
SHAPES = [(30, 12), (12, 30), (1, 7), (7, 1)]
KINDS = [(dtype, copies, k) for dtype in DTYPES for copies in (1, 3) for k in (0, 1, 2, 3, 4, 7)]


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(kernels, "available", lambda device: False)
    return request.param


def pattern_of(m, n, *, shuffled=True, seed=0):
    """Some entries, with a row and a column that are empty where there are several."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(m, n, generator=g) < 0.4
    mask[m // 2, n // 2] = True
    if m > 1:
        mask[0] = False
    if n > 1:
        mask[:, n - 1] = False
    indices = mask.nonzero().T
    if shuffled:
        indices = indices[:, torch.randperm(indices.shape[1], generator=g)]
    return fl.SparsePattern(indices, (m, n))


def integers(*shape, dtype):
    real = torch.randint(-8, 9, shape).to(dtype)
    return real + 1j * torch.randint(-8, 9, shape) if dtype.is_complex else real


def double(t):
    return t.to(torch.complex128 if t.dtype.is_complex else torch.float64)


def products(pattern, values, X, Y):
    """(A X, A^H Y, the entries of Y X^H) by the operator."""
    A = Operator(pattern, values)
    return A.matmul(X), A.adjoint(Y), _sample_kernel(Y, X, pattern.indices, *pattern.shape)


def references(pattern, values, X, Y):
    A, (i, j) = double(Operator(pattern, values).dense()), pattern.indices
    X, Y = double(X), double(Y)
    return A @ X, A.mH @ Y, (Y @ X.mH)[:, i, j]


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype, copies, k", KINDS, ids=str)
def test_products_of_integers_are_exact(way, shape, dtype, copies, k, shuffled):
    torch.manual_seed(0)
    pattern, (m, n) = pattern_of(*shape, shuffled=shuffled), shape
    given = integers(copies, pattern.nnz, dtype=dtype), integers(copies, n, k, dtype=dtype)
    Y = integers(copies, m, k, dtype=dtype)
    for got, want in zip(products(pattern, *given, Y), references(pattern, *given, Y), strict=True):
        assert got.dtype == dtype
        assert torch.equal(double(got), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_products_are_as_accurate_as_their_dtype(way, dtype, k):
    torch.manual_seed(0)
    pattern, (m, n) = pattern_of(200, 40), (200, 40)
    values, X, Y = (torch.randn(2, *shape, dtype=dtype) for shape in ((pattern.nnz,), (n, k), (m, k)))
    sizes = references(pattern, values.abs(), X.abs(), Y.abs())
    for got, want, size in zip(products(pattern, values, X, Y), references(pattern, values, X, Y), sizes, strict=True):
        assert ((double(got) - want).abs() <= 8 * torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_long_sums_in_single_precision_are_taken_in_double(dtype):
    m = 200_000
    pattern = fl.SparsePattern(torch.stack([torch.arange(m), torch.zeros(m, dtype=torch.int64)]), (m, 1))
    values = torch.full((1, m), 0.1, dtype=dtype)
    for k in (1, 2, 5):
        got = Operator(pattern, values).adjoint(torch.ones((1, m, k), dtype=dtype))
        want = m * float(torch.tensor(0.1))
        assert ((double(got) - want).abs() <= 1e-7 * want).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_gram_values_of_integers_are_exact(way, dtype, shuffled, shape):
    torch.manual_seed(0)
    pattern = pattern_of(*shape, shuffled=shuffled)
    gram, values = GramPattern(pattern), integers(pattern.nnz, dtype=dtype)
    A = Operator(pattern, values[None]).dense()[0]
    for _ in range(2):
        assert torch.equal(gram.values(values), (A.mH @ A)[gram.rows, gram.columns])


def test_gram_values_of_long_columns(way):
    m = 300_000
    pattern = fl.SparsePattern(torch.cartesian_prod(torch.arange(m), torch.arange(2)).T, (m, 2))
    values = torch.rand(2 * m, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = GramPattern(pattern).values(values)
    for t, (i, j) in enumerate([(0, 0), (1, 0), (1, 1)]):
        want = math.fsum((values[i::2] * values[j::2]).tolist())
        assert abs(float(got[t]) - want) <= 5e-15 * want


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("size", [1.0, 2.0**-600, 2.0**600])
def test_passes_over_entries_of_integers_are_exact(way, dtype, shuffled, size, monkeypatch):
    monkeypatch.setattr(entry_kernels, "_MANY", 0)
    torch.manual_seed(0)
    pattern = pattern_of(30, 12, shuffled=shuffled)
    values = integers(1, pattern.nnz, dtype=dtype)
    A = Operator(pattern, values * size)
    assert torch.equal(A.rows.values, values[:, torch.argsort(pattern.indices[0] * 12 + pattern.indices[1])] * size)
    scale = 2.0 ** torch.randint(-3, 4, (1, 12, 1)).double()
    assert torch.equal(A.scaled(scale).values, values * size / scale[0, pattern.indices[1], 0])
    assert torch.equal(A.scaled(scale * 2.0**1020).scaled(1 / scale).values, values * size / 2.0**1020)
    for damp in (None, torch.full((1, 1), 3.0 * size, dtype=torch.float64)):
        largest, squares = A.column_sizes(damp)
        want = torch.linalg.vector_norm(A.dense() / size, dim=1)
        want = want if damp is None else torch.hypot(want, torch.tensor(3.0, dtype=torch.float64))
        torch.testing.assert_close(largest / size * squares.sqrt(), want, rtol=1e-15, atol=0)


def test_more_threads_give_the_same_numbers():
    torch.manual_seed(0)
    m, n = 40_000, 3000
    indices = torch.stack([torch.arange(m).repeat_interleave(8), torch.randint(0, n, (8 * m,))]).unique(dim=1)
    pattern, threads = fl.SparsePattern(indices, (m, n)), torch.get_num_threads()
    values = torch.randn((1, pattern.nnz), dtype=torch.float64)
    X, Y = torch.randn((1, n, 2), dtype=torch.float64), torch.randn((1, m, 2), dtype=torch.float64)
    try:
        found = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            with ThreadPoolExecutor(4) as pool:
                some = list(pool.map(lambda _: products(pattern, values, X, Y), range(4)))
            squares = Operator(pattern, values).column_sizes(None)[1]
            found += [(*one, GramPattern(pattern).values(values[0]), squares) for one in some]
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_nan_and_infinity_come_through(way, bad, dtype, k):
    pattern = fl.SparsePattern(torch.tensor([[0, 0, 1, 2], [0, 1, 1, 0]]), (3, 2))
    values, X = torch.ones((1, 4), dtype=dtype), torch.ones((1, 2, k), dtype=dtype)
    values[0, 1], Y = bad, torch.ones((1, 3, k), dtype=dtype)
    product, adjoint, _ = products(pattern, values, X, Y)
    assert (~product[0, 0].isfinite()).all()
    assert product[0, 1:].isfinite().all()
    assert (~adjoint[0, 1].isfinite()).all()
    assert adjoint[0, 0].isfinite().all()
    X[0, 1] = bad
    _, _, entries = products(pattern, torch.ones_like(values), X, Y)
    assert entries[0].isfinite().tolist() == [True, False, False, True]


def test_a_product_goes_where_it_is_told():
    pattern = pattern_of(30, 12)
    A = Operator(pattern, torch.ones((2, pattern.nnz), dtype=torch.float64))
    X, out = torch.randn((2, 12, 2), dtype=torch.float64), torch.empty((2, 30, 2), dtype=torch.float64)
    assert A.matmul(X, out=out) is out
    assert torch.equal(out, A.matmul(X.mT.contiguous().mT))


def test_conjugated_and_negated_views_are_taken_for_what_they_are(way):
    torch.manual_seed(0)
    pattern = pattern_of(30, 12)
    values = torch.randn((1, pattern.nnz), dtype=torch.complex128).conj()
    X, Y = torch.randn((1, 2, 12), dtype=torch.complex128).mH, torch.randn((1, 30, 2), dtype=torch.complex128).conj()
    for got, want in zip(products(pattern, values, X, Y), references(pattern, values, X, Y), strict=True):
        assert torch.allclose(got, want)
    negated = Y.imag
    assert negated.is_neg()
    real = Operator(pattern, torch.ones((1, pattern.nnz), dtype=torch.float64))
    assert torch.allclose(real.adjoint(negated), real.dense().mT @ negated)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_dense_gram_matrices_of_integers_are_exact(way, dtype, shape, copies, shuffled):
    torch.manual_seed(0)
    A = Operator(pattern_of(*shape, shuffled=shuffled), integers(copies, pattern_of(*shape).nnz, dtype=dtype))
    assert torch.equal(A.gram(), A.dense().mH @ A.dense())


@pytest.mark.parametrize("damped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_dense_factors_and_their_extreme_eigenvalues(dtype, damped):
    g = torch.Generator().manual_seed(0)
    m, n, copies = 90, 33, 4
    pattern = fl.SparsePattern((torch.rand(m, n, generator=g) < 0.3).nonzero().T, (m, n))
    A = Operator(pattern, torch.randn(copies, pattern.nnz, dtype=dtype, generator=g))
    d2 = torch.rand(copies, n, dtype=torch.float64, generator=g) if damped else None
    G = A.dense().mH @ A.dense() + (0 if d2 is None else torch.diag_embed(d2))
    L, extremes = dense_kernels.dense_factor(A.rows.arrays, pattern, d2)
    torch.testing.assert_close(L, torch.linalg.cholesky(G), rtol=1e-12, atol=1e-13)
    exact = torch.linalg.eigvalsh(G)
    assert (extremes[:, 0] <= exact[:, -1]).all()
    assert (extremes[:, 0] >= 0.7 * exact[:, -1]).all()
    assert (extremes[:, 1] >= exact[:, 0]).all()
    assert (extremes[:, 1] <= exact[:, 0] / 0.7).all()


def test_a_matrix_without_a_dense_factor_is_told():
    A = Operator(fl.SparsePattern(torch.tensor([[0, 1, 2], [0, 0, 2]]), (3, 3)), torch.ones(1, 3, dtype=torch.float64))
    assert dense_kernels.dense_factor(A.rows.arrays, A.pattern, None)[1][:, 1].isnan().all()


@pytest.mark.parametrize("n", [40, 200])
def test_a_batch_is_factored_as_its_matrices_are(n, monkeypatch):
    """Some of the batch without full rank, in parts that are smaller than it."""
    g = torch.Generator().manual_seed(0)
    pattern = fl.SparsePattern((torch.rand(2 * n, n, generator=g) < 0.2).nonzero().T, (2 * n, n))
    values = torch.randn(5, pattern.nnz, dtype=torch.float64, generator=g)
    values[3, pattern.indices[1] == 7] = 0.0
    b = torch.randn(5, 2 * n, dtype=torch.float64, generator=g)

    def x(v, b):
        return fl.lstsq(fl.SparseMatrix(v, pattern), b, solver=fl.Dense(), rank_deficient="minimum_norm")

    one_by_one = torch.stack([x(*one) for one in zip(values, b, strict=True)])
    monkeypatch.setattr(room, "_PART", 2 * n * n)
    torch.testing.assert_close(torch.vmap(x)(values, b), one_by_one, rtol=1e-12, atol=1e-14)
