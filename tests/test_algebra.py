"""Sums, products, parts and stacks of sparse matrices: what dense ones give, in every transformation."""

import gc
import weakref

import numpy as np
import pytest
import scipy.sparse
import torch
from helpers import close, dense, normal
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import functional_lstsq as fl
from functional_lstsq.sparse import kernels, triple

F64, C128 = torch.float64, torch.complex128
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]


def sparse(m, n, dtype=F64, seed=0, density=0.4):
    """A random matrix, whose entries are in no order."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randperm(m * n, generator=generator)[: round(density * m * n)]
    values = torch.randn(len(cells), generator=generator, dtype=dtype)
    return fl.SparseMatrix(values, fl.SparsePattern(torch.stack([cells // n, cells % n]), (m, n)))


A, B, C = sparse(6, 5), sparse(6, 5, seed=1), sparse(5, 7, seed=2)
FACTORS = torch.linspace(-1, 2, 6, dtype=F64)
MASK = [True, False, True, True, False, True]
# Of three matrices of shapes (6, 5), (6, 5) and (5, 7).
SPARSE = {
    "-A": lambda A, B, C: -A,
    "s * A": lambda A, B, C: 0.5 * A,
    "A / s": lambda A, B, C: A / 3,
    "A + B": lambda A, B, C: A + B,
    "A - B": lambda A, B, C: A - B,
    "A + A": lambda A, B, C: A + A,
    "A + part of A": lambda A, B, C: A + A.scale(rows=FACTORS)[:, :3].matmul(fl.eye(3, 5)),
    "A @ C": lambda A, B, C: A.matmul(C),
    "A.H @ B": lambda A, B, C: A.H.matmul(B),
    "A.scale(s)": lambda A, B, C: A.scale(FACTORS[3]),
    "scale": lambda A, B, C: A.scale(rows=FACTORS, columns=FACTORS[:5]),
    "A[slice]": lambda A, B, C: A[::2, 1:4],
    "A[list]": lambda A, B, C: A[[2, 0, 2, -1]],
    "A[mask]": lambda A, B, C: A[MASK],
    "A[:, list]": lambda A, B, C: A[:, [4, 4, 1]],
    "vstack": lambda A, B, C: fl.vstack([A, 0.1 * B, C.T[:, [0, 1, 2, 3, 4]]]),
    "hstack": lambda A, B, C: fl.hstack([A, B, A]),
    "block_diag": lambda A, B, C: fl.block_diag([A, C, B]),
    "from_dense": lambda A, B, C: fl.SparseMatrix.from_dense(A.to_dense() * 2, A.pattern),
}
DENSE = {
    "-A": lambda A, B, C: -A,
    "s * A": lambda A, B, C: 0.5 * A,
    "A / s": lambda A, B, C: A / 3,
    "A + B": lambda A, B, C: A + B,
    "A - B": lambda A, B, C: A - B,
    "A + A": lambda A, B, C: A + A,
    "A + part of A": lambda A, B, C: A + torch.nn.functional.pad((FACTORS[:, None] * A)[:, :3], (0, 2)),
    "A @ C": lambda A, B, C: A @ C,
    "A.H @ B": lambda A, B, C: A.mH @ B,
    "A.scale(s)": lambda A, B, C: FACTORS[3] * A,
    "scale": lambda A, B, C: FACTORS[:, None] * A * FACTORS[:5],
    "A[slice]": lambda A, B, C: A[::2, 1:4],
    "A[list]": lambda A, B, C: A[[2, 0, 2, -1]],
    "A[mask]": lambda A, B, C: A[torch.tensor(MASK)],
    "A[:, list]": lambda A, B, C: A[:, [4, 4, 1]],
    "vstack": lambda A, B, C: torch.cat([A, 0.1 * B, C.mT]),
    "hstack": lambda A, B, C: torch.cat([A, B, A], 1),
    "block_diag": torch.block_diag,
    "from_dense": lambda A, B, C: 2 * A,
}
DENSE["block_diag"] = lambda A, B, C: torch.block_diag(A, C, B)
each = pytest.mark.parametrize("name", SPARSE)
TRANSFORMS = {
    "call": lambda f, v: f(v),
    "grad": lambda f, v: grad(lambda v: f(v).abs().square().sum())(v),
    "jvp": lambda f, v: jvp(f, (v,), (v.flip(0),))[1],
    "jacrev": lambda f, v: jacrev(f)(v),
    "jacfwd": lambda f, v: jacfwd(f)(v),
    "hessian": lambda f, v: hessian(lambda v: f(v).pow(3).sum())(v),
    "vmap": lambda f, v: vmap(f)(torch.stack([v, 2 * v, v.flip(0)])),
    "vmap, last": lambda f, v: vmap(f, -1, 1)(torch.stack([v, 2 * v], -1)),
    "vmap(jacfwd(grad))": lambda f, v: vmap(jacfwd(grad(lambda v: f(v).pow(3).sum())))(torch.stack([v, 2 * v])),
    "jacfwd(jacfwd)": lambda f, v: jacfwd(jacfwd(lambda v: f(v).pow(2).sum(0)))(v),
}


def both(name, A=A, B=B, C=C):
    """(by sparse matrices, by dense ones): functions of all values in one vector."""
    cuts = [A.nnz, B.nnz, C.nnz]

    def by_sparse(v):
        parts = v.split(cuts)
        return SPARSE[name](*(fl.SparseMatrix(p, M.pattern) for p, M in zip(parts, (A, B, C), strict=True))).to_dense()

    def by_dense(v):
        return DENSE[name](*(dense(p, M.pattern) for p, M in zip(v.split(cuts), (A, B, C), strict=True)))

    return by_sparse, by_dense, torch.cat([A.values, B.values, C.values])


@pytest.mark.parametrize("transform", TRANSFORMS)
@each
def test_what_dense_matrices_give(name, transform):
    by_sparse, by_dense, v = both(name)
    close(TRANSFORMS[transform](by_sparse, v), TRANSFORMS[transform](by_dense, v), 1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each
def test_dtypes(name, dtype):
    matrices = [M.to(dtype) * (1 + 1j) if dtype.is_complex else M.to(dtype) for M in (A, B, C)]
    got, want = SPARSE[name](*matrices), DENSE[name](*(M.to_dense() for M in matrices))
    assert got.dtype == want.dtype
    close(got.to_dense(), want.to(got.dtype), 1e-5 if dtype in (torch.float32, torch.complex64) else 1e-13)
    if dtype.is_complex:
        by_sparse, by_dense, v = both(name, *matrices)
        gradients = (grad(lambda v, f=f: f(v).abs().square().sum())(v) for f in (by_sparse, by_dense))
        close(*gradients, 1e-4 if dtype == torch.complex64 else 1e-12)


@each
def test_batches_of_values(name):
    batch = [fl.SparseMatrix(torch.stack([M.values, 2 * M.values, M.values.flip(0)]), M.pattern) for M in (A, B, C)]
    if name == "from_dense":
        got = fl.SparseMatrix.from_dense(torch.stack([A.to_dense(), A.to_dense()])[:, None], A.pattern)
        assert torch.equal(got.values, A.values.expand(2, 1, -1))
        return
    got, own = SPARSE[name](*batch), [[fl.SparseMatrix(M.values[i], M.pattern) for M in batch] for i in range(3)]
    for i, matrices in enumerate(own):
        close(fl.SparseMatrix(got.values[i], got.pattern).to_dense(), SPARSE[name](*matrices).to_dense(), 1e-14)
    mixed = SPARSE[name](batch[0], B, C)  # of one and of several
    close(mixed.values[0], SPARSE[name](A, B, C).values, 1e-14)


@each
def test_patterns_are_made_once(name):
    first, second = (SPARSE[name](A, B, C).pattern for _ in range(2))
    assert first is second


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["call", "grad", "vmap(jacrev)"])
@each
def test_compiled(name, wrap):
    by_sparse, by_dense, v = both(name)
    transforms = {
        "call": lambda f: f,
        "grad": lambda f: grad(lambda v: f(v).sin().sum()),
        "vmap(jacrev)": lambda f: lambda v: vmap(jacrev(f))(torch.stack([v, 2 * v])),
    }
    torch._dynamo.reset()  # which would give up after eight graphs of one function
    got = torch.compile(transforms[wrap](by_sparse), fullgraph=True, backend="aot_eager")(v)
    close(got, transforms[wrap](by_dense)(v), 1e-13)


def test_a_compiled_function_is_compiled_again_for_another_pattern():
    other = fl.SparseMatrix(A.values, fl.SparsePattern(A.pattern.indices * 1, A.shape).T).T  # of the same sizes
    moved = fl.SparseMatrix(
        A.values, fl.SparsePattern(torch.stack([5 - A.pattern.indices[0], A.pattern.indices[1]]), A.shape)
    )
    add = torch.compile(lambda A, B: (A + B).values.sin(), fullgraph=True, backend="aot_eager")
    for M in (A, other, moved):
        close(add(M, B), (M + B).values.sin(), 0)


class _Stacked(torch.nn.Module):
    def forward(self, A, b):
        return fl.lstsq(fl.vstack([A, A.scale(rows=FACTORS) + A]), b)


def test_exported():
    b = normal(12)
    program = torch.export.export(_Stacked(), (A, b))
    close(program.module()(A, b), _Stacked()(A, b), 1e-12)


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "loops", lambda: None)
    monkeypatch.setattr(triple, "_PAIRS", 5)


@pytest.mark.parametrize("transform", ["call", "jacrev", "jacfwd", "vmap", "hessian"])
@pytest.mark.parametrize("name", ["A @ C", "A.H @ B"])
def test_products_without_compiled_kernels(name, transform, without_kernels):
    by_sparse, by_dense, v = both(name)
    close(TRANSFORMS[transform](by_sparse, v), TRANSFORMS[transform](by_dense, v), 1e-13)


def test_a_product_of_a_hundred_million_pairs_takes_little_memory():
    """One dense column times one dense row: 10^4 entries, whose pairs would take 2.4 GB."""
    import resource

    n = 10_000
    along = torch.arange(n)
    column = fl.SparseMatrix(
        torch.ones(n, dtype=torch.float32), fl.SparsePattern(torch.stack([along, 0 * along]), (n, 1))
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    inner = grad(lambda v: (fl.SparseMatrix(v, column.pattern).T @ fl.SparseMatrix(v, column.pattern)).values.sum())
    assert torch.equal(inner(column.values), 2 * column.values)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@given(st.integers(0, 40), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.floats(0, 1))
def test_products_and_sums_of_any_shape(seed, m, k, n, density):
    left, right = sparse(m, k, seed=seed, density=density), sparse(k, n, seed=seed + 1, density=density)
    close((left @ right).to_dense(), left.to_dense() @ right.to_dense(), 1e-14)
    other = sparse(m, k, seed=seed + 2, density=density)
    assert torch.equal((left + other).to_dense(), left.to_dense() + other.to_dense())
    assert (left + other).nnz == int(((left.to_dense() != 0) | (other.to_dense() != 0)).sum())


def test_sums_of_long_rows_keep_the_digits_of_float32():
    """A gradient by one factor that scales half a million entries is a sum of as many terms."""
    n = 500_000
    row = fl.SparseMatrix(
        torch.full((n,), 0.1), fl.SparsePattern(torch.stack([torch.zeros(n).long(), torch.arange(n)]), (1, n))
    )
    got = grad(lambda r: row.scale(rows=r).values.sum())(torch.ones(1))
    assert abs(float(got) / (n * float(row.values[0].double())) - 1) < 1e-6


def test_a_pattern_that_is_not_needed_any_more_is_let_go():
    one, other = sparse(6, 5, seed=3), sparse(6, 5, seed=4)
    gone = weakref.ref(other.pattern)
    total = one + other
    del other
    gc.collect()
    assert gone() is None
    assert total.nnz >= one.nnz


def test_a_pattern_keeps_the_last_sixteen_results_only():
    one = sparse(6, 5, seed=3)
    results = [weakref.ref((one + sparse(6, 5, seed=seed)).pattern) for seed in range(10, 40)]
    gc.collect()
    assert sum(result() is not None for result in results) == 16


def test_sums_by_sum_and_numbers_of_numpy():
    close(sum([A, B]).to_dense(), A.to_dense() + B.to_dense(), 0)
    assert isinstance(np.float64(2) * A, fl.SparseMatrix)
    close((np.float32(2) * A).values, 2 * A.values, 0)


def test_eye_and_diags_are_those_of_scipy():
    for m, n, k in [(3, 3, 0), (3, 5, 1), (4, 2, -1)]:
        close(fl.eye(m, n, k=k).to_dense(), torch.from_numpy(scipy.sparse.eye_array(m, n, k=k).toarray()), 0)
    diagonals, offsets = [[1.0, 2.0, 3.0], [4.0, 5.0], [6.0, 7.0]], [0, 1, -1]
    want = scipy.sparse.diags_array(diagonals, offsets=offsets).toarray()
    close(fl.diags(diagonals, offsets).to_dense(), torch.from_numpy(want), 0)
    want = scipy.sparse.diags_array([[-1.0], [1.0]], offsets=[0, 1], shape=(4, 5)).toarray()
    close(fl.diags([[-1.0], [1.0]], [0, 1], (4, 5)).to_dense(), torch.from_numpy(want), 0)
    close(jacrev(lambda d: fl.diags(d).to_dense())(normal(3)), jacrev(torch.diag)(normal(3)), 0)


def test_scipy_and_dense_there_and_back():
    for form in ("csr", "csc", "coo"):
        there = A.to_scipy(form)
        assert there.format == form
        assert torch.equal(fl.SparseMatrix.from_scipy(there).to_dense(), A.to_dense())
    D = A.to_dense()
    assert torch.equal(fl.SparseMatrix.from_dense(D).to_dense(), D)
    close(grad(lambda D: fl.SparseMatrix.from_dense(D).values.square().sum())(D), 2 * D, 0)


def test_a_tikhonov_problem():
    L = fl.diags([[-1.0], [1.0]], [0, 1], (4, 5))
    b = normal(6)

    def by_stack(v, lam):
        return fl.lstsq(fl.vstack([fl.SparseMatrix(v, A.pattern), lam * L]), torch.cat([b, b.new_zeros(4)]))

    def by_inverse(v, lam):
        D, E = dense(v, A.pattern), L.to_dense()
        return torch.linalg.solve(D.mT @ D + lam**2 * E.mT @ E, D.mT @ b)

    given = A.values, torch.tensor(0.3, dtype=F64)
    close(by_stack(*given), by_inverse(*given), 1e-11)
    for got, want in zip(jacrev(by_stack, (0, 1))(*given), jacrev(by_inverse, (0, 1))(*given), strict=True):
        close(got, want, 1e-10)


TAKES = torch.tensor([0, 9])
REFUSED = [
    (lambda: A + C, ValueError, r"one shape, got \(6, 5\) and \(5, 7\)"),
    (lambda: A @ B, ValueError, r"as many rows .* got shapes \(6, 5\) and \(6, 5\)"),
    (lambda: A + 1.0, TypeError, "unsupported operand"),
    (lambda: A * B, TypeError, "unsupported operand"),
    (lambda: A @ [1.0], TypeError, "takes a dense tensor X, got list"),
    (lambda: A * torch.ones(6), ValueError, r"tensor s of shape \(\), got \(6,\); see A.scale"),
    (lambda: A[3], TypeError, r"the single one 3; write A\[\[3\]\]"),
    (lambda: A[[0], [1]], TypeError, r"write A\[rows\]\[:, columns\]"),
    (lambda: A[[0, 6]], IndexError, r"A\[rows\]: index 6 lies outside of 6 rows"),
    (lambda: A[:, TAKES], IndexError, r"A\[columns\]: index 9 lies outside of 5 columns"),
    (lambda: A[[True]], IndexError, r"mask must have shape \(6,\), got \(1,\)"),
    (lambda: A[torch.ones(6)], TypeError, "integers or bools"),
    (lambda: A[[0.5]], TypeError, "list of integers or of bools"),
    (lambda: vmap(lambda i: A[i].values)(TAKES[:, None]), ValueError, "a pattern cannot be vmapped"),
    (A.scale, ValueError, "got neither"),
    (lambda: A.scale(rows=torch.ones(5)), ValueError, r"rows must have shape \(6,\), got \(5,\)"),
    (lambda: fl.vstack([]), TypeError, "at least one, got none"),
    (lambda: fl.vstack([A, C]), ValueError, r"one number of columns, got \[5, 7\]"),
    (lambda: fl.hstack([A, A.to_dense()]), TypeError, "got for number 1 a dense tensor; see SparseMatrix.from_dense"),
    (lambda: fl.eye(2.5), TypeError, "m must be an integer, got 2.5"),
    (lambda: fl.eye(2, dtype=torch.int64), TypeError, "dtype must be float32"),
    (lambda: fl.diags([[1.0], [2.0]], [0]), ValueError, "one diagonal for each offset, got 2 and 1"),
    (lambda: fl.diags([[1.0], [2.0]], [0, 0]), ValueError, r"offsets must differ, got \[0, 0\]"),
    (lambda: fl.diags([[1.0, 2.0]], [0], (3, 3)), ValueError, "offset 0 must have 3 entries, got 2"),
    (lambda: fl.diags([[1.0]], [3], (3, 3)), ValueError, r"offset 3 lies outside of shape \(3, 3\)"),
    (lambda: vmap(lambda D: fl.SparseMatrix.from_dense(D).values)(torch.ones(2, 3, 3)), ValueError, "needs a pattern"),
    (lambda: fl.SparseMatrix.from_dense(torch.ones(3)), ValueError, r"D must have shape \(m, n\).* got \(3,\)"),
    (lambda: fl.eye(2, k=2), ValueError, r"k = 2 lies outside of shape \(2, 2\)"),
    (lambda: list(A), TypeError, "not iterable"),
]


@pytest.mark.parametrize(("call", "error", "match"), REFUSED)
def test_what_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
