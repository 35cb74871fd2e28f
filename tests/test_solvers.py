"""What the solvers promise: right or refused, honest estimates, rank."""

import itertools

import mpmath
import numpy as np
import pytest
import torch
from helpers import SOLVERS, close, full_pattern, problem, with_singular_values

import functional_lstsq as fl

CONDITIONS = [1.0, 1e2, 1e4, 1e6, 1e8, 1e10, 1e12, 1e14]
EPS = {torch.float64: 2.2e-16, torch.float32: 1.2e-7}
FLOOR = {torch.float64: 1e-9, torch.float32: 1e-6}  # relative errors that are always good enough


def exact(A, b, w):
    """x, and the gradients of w . x by A and by b, to fifty digits; rounded to double."""
    with mpmath.workdps(50):
        A, b, w = (mpmath.matrix(t.double().tolist()) for t in (A, b, w))
        gram = A.T * A
        x, back = mpmath.lu_solve(gram, A.T * b), mpmath.lu_solve(gram, w)
        by_b, r = A * back, b - A * x
        by_A = -by_b * x.T + r * back.T
        return [np.array(t.tolist(), dtype=float) for t in (x, by_A, by_b)]


def householder(A, b, w):
    """The same by a dense QR in A's own precision."""
    Q, R = np.linalg.qr(A)
    x = np.linalg.solve(R, Q.T @ b)
    half = np.linalg.solve(R.T, w)
    by_b, back = Q @ half, np.linalg.solve(R, half)
    return x[:, None], -np.outer(by_b, x) + np.outer(b - A @ x, back), by_b[:, None]


def distance(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("solver", [*SOLVERS, "default"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_made_problems_are_right_or_refused(solver, dtype, condition):
    """Within 100 times the errors of a Householder QR, or refused; and the claims are honest.

    Residuals from none to as large as b, columns scaled by 1e-6 to 1e6, rows by 1e-4 to 1e4.
    """
    m, n = 24, 8
    generator = torch.Generator().manual_seed(int(np.log10(condition)))
    for residual, columns, rows in itertools.product((0.0, 1e-6, 1.0), (0, 6), (0, 4)):
        A, pattern = with_singular_values(np.logspace(0, -np.log10(condition), n), m, seed=1)
        A = A * 10 ** (columns * (2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1))
        A = A * 10 ** (rows * (2 * torch.rand(m, 1, generator=generator, dtype=torch.float64) - 1))
        b = A @ torch.randn(n, generator=generator, dtype=torch.float64)
        aside = torch.randn(m, generator=generator, dtype=torch.float64)
        aside = aside - A @ torch.linalg.lstsq(A, aside[:, None]).solution[:, 0]
        b = (b + residual * b.norm() * aside / aside.norm()).to(dtype)
        A, w = A.to(dtype), torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
        want = exact(A, b, w)
        errors = [distance(*pair) for pair in zip(householder(A.numpy(), b.numpy(), w.numpy()), want, strict=True)]

        def loss(values, b, w=w, pattern=pattern):
            solution = fl.solve(fl.SparseMatrix(values, pattern), b, solver=SOLVERS.get(solver))
            return solution.x @ w, solution

        try:
            (by_A, by_b), solution = torch.func.grad(loss, (0, 1), has_aux=True)(A.reshape(-1), b)
        except torch.linalg.LinAlgError:
            # Refused only where the problem is that sensitive: eps cond^2 (Wedin), whatever luck a QR has.
            sensitivity = EPS[dtype] * float(torch.linalg.cond(A.double())) ** 2
            assert solver == "cgls" or sensitivity > EPS[dtype] ** (1 / 3) / 10
            continue
        got = solution.x[:, None].numpy(), by_A.view(m, n).numpy(), by_b[:, None].numpy()
        for mine, theirs, right in zip(got, errors, want, strict=True):
            allowed = 100 * (theirs if mine is got[0] else max(errors[1:]))
            assert distance(mine, right) <= max(FLOOR[dtype], allowed)
        claim = float(solution.info.forward_error)
        true = distance(got[0], want[0])
        assert 10 * claim >= true - EPS[dtype]
        # The claim of the iteration alone is a bound: sharp for even columns only.
        assert solver == "cgls" or claim <= max(FLOOR[dtype], 1000 * errors[0])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("condition", [1.0, 1e1, 1e3, 1e5])
@pytest.mark.parametrize("wide", [False, True])
def test_condition_estimates(solver, condition, wide):
    A, pattern = with_singular_values(np.logspace(0, -np.log10(condition), 20), 60, seed=2)
    if wide:
        A, pattern = A.T, full_pattern(20, 60)
    scaled = A / torch.linalg.vector_norm(A, dim=1 if wide else 0, keepdim=True)
    s = torch.linalg.svdvals(scaled)
    b = torch.ones(A.shape[0], dtype=torch.float64)
    info = fl.solve(fl.SparseMatrix(A.reshape(-1), pattern), b, solver=SOLVERS[solver]).info
    assert 0.1 < float(info.condition) / float(s[0] / s[-1]) < 10
    assert int(info.rank) == 20


@pytest.mark.parametrize("nullity", [1, 3, 8])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_rank_deficient(nullity, wide, dtype):
    m, n = 30, 12
    generator = torch.Generator().manual_seed(nullity)
    left, right = (torch.randn(rows, n - nullity, dtype=dtype, generator=generator) for rows in (m, n))
    A = (right @ left.mH) if wide else left @ right.mH
    matrix = fl.SparseMatrix(A.reshape(-1), full_pattern(*A.shape))
    b = torch.randn(A.shape[0], 2, dtype=dtype, generator=generator)
    with pytest.raises(fl.RankDeficientError, match=f"rank {n - nullity}, not full rank {n}"):
        fl.lstsq(matrix, b)
    with pytest.raises(fl.RankDeficientError, match="rank below 12"):
        fl.lstsq(matrix, b, solver=fl.CGLS())
    solution = fl.solve(matrix, b, rank_deficient="minimum_norm")
    want = torch.linalg.pinv(A, rtol=1e-4 if dtype == torch.float32 else 1e-10) @ b
    close(solution.x, want, 1e-3 if dtype == torch.float32 else 1e-10)
    assert solution.info.rank.tolist() == [n - nullity] * 2
    close(fl.lstsq(matrix, b, damp=0.1), _ridge(A, b, 0.1), 1e-4 if dtype == torch.float32 else 1e-10)


def _ridge(A, b, damp):
    double = torch.promote_types(A.dtype, torch.float64)
    gram = A.to(double).mH @ A.to(double) + damp**2 * torch.eye(A.shape[1], dtype=double)
    return (torch.linalg.inv(gram) @ A.to(double).mH @ b.to(double)).to(A.dtype)


def test_minimum_norm_of_badly_scaled_columns():
    """An estimate that holds where scaling magnifies the null space's errors."""
    generator = torch.Generator().manual_seed(0)
    for spread in (0, 3, 6):
        A = torch.randn(20, 4, generator=generator, dtype=torch.float64)
        A = A @ torch.randn(4, 7, generator=generator, dtype=torch.float64)
        A = A * 10 ** torch.linspace(-spread, spread, 7, dtype=torch.float64)
        A = torch.round(A * 2**30) / 2**30 if spread == 0 else A
        b = torch.randn(20, generator=generator, dtype=torch.float64)
        solution = fl.solve(
            fl.SparseMatrix(A.reshape(-1), full_pattern(20, 7)), b, rank_deficient="minimum_norm", throw=False
        )
        if solution.info.status == "converged":
            rtol = 1e-13
            want = torch.linalg.pinv(A, rtol=rtol) @ b
            error = float((solution.x - want).norm() / want.norm())
            assert error <= 10 * float(solution.info.forward_error) + 1e-9


def test_a_batch_with_matrices_of_different_kinds():
    """Well-conditioned, ill-conditioned and deficient matrices of one batch, each by what it needs."""
    good, pattern = with_singular_values([1.0, 0.5, 0.2, 0.1], 9, seed=3)
    poor, _ = with_singular_values([1.0, 1e-2, 1e-5, 1e-8], 9, seed=4)
    lost, _ = with_singular_values([1.0, 0.5, 0.0, 0.0], 9, seed=5)
    last, _ = with_singular_values([1.0, 0.5, 0.3, 0.0], 9, seed=6)
    batch = torch.stack([good, poor, lost, last])
    b = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def solution(A):
        return fl.solve(fl.SparseMatrix(A.reshape(-1), pattern), b, rank_deficient="minimum_norm")

    together = torch.vmap(solution)(batch)
    assert together.info.rank.tolist() == [4, 4, 2, 3]
    assert together.info.method == "dense-cholesky, dense-qr"
    for x, A in zip(together.x, batch, strict=True):
        close(x, torch.linalg.pinv(A, rtol=1e-12) @ b, 1e-6)
    with pytest.raises(fl.RankDeficientError, match="2 of 4 right-hand sides failed; the first: matrix 2"):
        torch.vmap(lambda A: fl.lstsq(fl.SparseMatrix(A.reshape(-1), pattern), b))(batch)


def test_cgls_says_when_it_runs_out():
    A, pattern = with_singular_values(np.logspace(0, -3, 30), 60)
    matrix, b = fl.SparseMatrix(A.reshape(-1), pattern), torch.ones(60, dtype=torch.float64)
    with pytest.raises(fl.ConvergenceError, match=r"cgls ended after 5 iterations .*iteration limit reached"):
        fl.lstsq(matrix, b, solver=fl.CGLS(max_iterations=5))
    assert fl.solve(matrix, b, solver=fl.CGLS(max_iterations=5), throw=False).info.status == "iteration limit reached"


def test_cgls_tolerance_and_callback():
    seen = []
    pattern, values, b = problem(300, 100, density=0.05)
    A = fl.SparseMatrix(values, pattern)
    want = fl.lstsq(A, b, solver=fl.Dense())
    counts = []
    for tolerance in (1e-4, 1e-8, 1e-12):
        solution = fl.solve(A, b, solver=fl.CGLS(tolerance=tolerance, callback=lambda *step: seen.append(step)))
        assert float((solution.x - want).norm() / want.norm()) <= 10 * tolerance
        counts.append(int(solution.info.iterations))
    assert counts == sorted(counts)
    assert seen[0][0] == 1


def test_large_sparse_goes_to_the_iteration_and_is_right():
    """A grid of first differences with a few fixed points, too large for a dense factor."""
    k = 64
    index = torch.arange(k * k).view(k, k)
    neighbours = (index[:-1], index[1:]), (index[:, :-1], index[:, 1:])
    ends = torch.cat([torch.stack([a.reshape(-1), b.reshape(-1)]) for a, b in neighbours], 1)
    edges, fixed = ends.shape[1], torch.arange(0, k * k, 97)
    row = torch.arange(edges)
    rows = torch.cat([row, row, edges + torch.arange(len(fixed))])
    indices = torch.stack([rows, torch.cat([ends[0], ends[1], fixed])])
    values = torch.cat([-torch.ones(edges), torch.ones(edges + len(fixed))]).double()
    A = fl.SparseMatrix(values, fl.SparsePattern(indices, (edges + len(fixed), k * k)))
    x = torch.randn(k * k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = fl.solve(A, A @ x)
    assert solution.info.method == "cgls"
    assert float((solution.x - x).norm() / x.norm()) < 1e-10
    free = fl.SparseMatrix(values[: 2 * edges], fl.SparsePattern(indices[:, : 2 * edges], (edges, k * k)))
    with pytest.raises(fl.RankDeficientError, match=f"rank below {k * k}"):
        fl.lstsq(free, torch.ones(edges, dtype=torch.float64))


@pytest.mark.parametrize("pair", itertools.combinations(range(5), 2))
def test_no_pair_of_equal_columns_escapes_the_iteration(pair):
    A = torch.randn(9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    A[:, pair[0]] = A[:, pair[1]]
    matrix, b = fl.SparseMatrix(A.reshape(-1), full_pattern(9, 5)), torch.ones(9, dtype=torch.float64)
    with pytest.raises(fl.RankDeficientError):
        fl.lstsq(matrix, b, solver=fl.CGLS())
    A[:, pair[0]] += 1e-9 * torch.randn(9, dtype=torch.float64)
    with pytest.raises(torch.linalg.LinAlgError):
        fl.lstsq(fl.SparseMatrix(A.reshape(-1), full_pattern(9, 5)), b, solver=fl.CGLS())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("signs", itertools.product((1.0, -1.0), repeat=2))
def test_claims_beside_a_dominating_column(solver, signs):
    """Rounding errors along one large column must not hide what they do to a small one."""
    A = torch.tensor([[1.1, 0.7e10 * signs[0]], [0.3, 0.9e10 * signs[1]]], dtype=torch.float64)
    b = A @ torch.ones(2, dtype=torch.float64)
    want = exact(A, b, torch.ones(2))[0][:, 0]
    try:
        solution = fl.solve(fl.SparseMatrix(A.reshape(-1), full_pattern(2, 2)), b, solver=SOLVERS[solver])
    except torch.linalg.LinAlgError:
        return
    assert 10 * float(solution.info.forward_error) >= distance(solution.x.numpy(), want)


def test_single_precision_with_weights_is_honest():
    A, pattern = with_singular_values(np.logspace(0, -4, 4), 20, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    b, w = torch.randn(20, generator=generator), torch.rand(20, generator=generator) + 0.1
    solution = fl.solve(fl.SparseMatrix(A.reshape(-1), pattern), b, weights=w)
    root = w.double().sqrt()[:, None]
    want = torch.linalg.pinv(root * A.double()) @ (root[:, 0] * b.double())
    assert float((solution.x - want).norm() / want.norm()) <= 10 * float(solution.info.forward_error) < 1e-6


def test_minimum_norm_beyond_the_dense_solver_says_so():
    matrix = fl.SparseMatrix(torch.ones(12, dtype=torch.float64), full_pattern(6, 2))
    with pytest.raises(fl.RankDeficientError, match=r"pass solver=Dense\(\)"):
        fl.lstsq(matrix, torch.ones(6).double(), rank_deficient="minimum_norm", solver=fl.Auto(dense_columns=1))


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: fl.Dense(accept="x"), TypeError, "accept"),
        (lambda: fl.Dense(accept=-1), ValueError, "accept"),
        (lambda: fl.CGLS(tolerance="a"), TypeError, "tolerance"),
        (lambda: fl.CGLS(tolerance=float("nan")), ValueError, "tolerance"),
        (lambda: fl.CGLS(max_iterations=1e3), TypeError, "max_iterations"),
        (lambda: fl.CGLS(callback=3), TypeError, "callback"),
        (lambda: fl.Auto(cgls=3), TypeError, "cgls"),
        (lambda: fl.Auto(dense_columns=0), ValueError, "dense_columns"),
    ],
)
def test_bad_settings_are_refused_when_they_are_made(make, error, name):
    with pytest.raises(error, match=f"{name} must be"):
        make()


@pytest.mark.parametrize("solver", SOLVERS)
def test_matrices_whose_probe_is_solved_exactly(solver):
    """Diagonal and one-column matrices: nothing is divided by the zero that is left, and a zero column is seen."""
    for diagonal in ([1.0, 1.0], [1.0, 2.0, 4.0], [3.0]):
        D = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        solution = fl.solve(D.to_sparse_csr(), torch.ones(len(D), dtype=torch.float64), solver=SOLVERS[solver])
        assert 1 <= float(solution.info.condition) < 10
        close(solution.x, 1 / D.diagonal())
        singular = torch.diag(torch.tensor([*diagonal, 0.0], dtype=torch.float64)).to_sparse_csr()
        with pytest.raises(fl.RankDeficientError):
            fl.lstsq(singular, torch.ones(len(D) + 1, dtype=torch.float64), solver=SOLVERS[solver])


@pytest.mark.parametrize("large", [1.0, 1e4, 1e8])
def test_a_large_entry_elsewhere_does_not_excuse_a_wrong_gradient(large):
    """Two blocks without a common row: what the second makes of b says nothing of the gradient by the first."""
    condition, generator = 1e7, torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64)).Q for k in (4, 2))
    A = torch.zeros(5, 3, dtype=torch.float64)
    A[:4, :2] = (U[:, :2] * torch.tensor([1, 1 / condition], dtype=torch.float64)) @ V.T
    A[4, 2] = 1
    rows, columns = A.nonzero().T
    pattern, b = fl.SparsePattern(torch.stack([rows, columns]), (5, 3)), torch.zeros(5, dtype=torch.float64)
    b[:4], b[4] = U[:, 2], large
    w = torch.cat([V[:, 0], torch.zeros(1, dtype=torch.float64)])
    with pytest.raises(fl.ConvergenceError):
        torch.func.grad(lambda v: fl.lstsq(fl.SparseMatrix(v, pattern), b) @ w)(A[rows, columns])
    solution = fl.solve(fl.SparseMatrix(A[rows, columns], pattern), b, throw=False)
    assert solution.residual.isfinite().all()


@pytest.mark.parametrize("condition", [1e4, 1e7, 1e9])
def test_gradient_by_damp_is_right_or_refused(condition):
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(*s, generator=generator, dtype=torch.float64)).Q for s in ((6, 3), (3, 3)))
    A = (U * torch.tensor([1, 1, 1 / condition], dtype=torch.float64)) @ V.T
    b, w = A @ torch.randn(3, generator=generator, dtype=torch.float64), V[:, 0].clone()
    damp = torch.tensor(1e-3 / condition, dtype=torch.float64)
    with mpmath.workdps(60):
        M, d = mpmath.matrix(A.tolist()), mpmath.mpf(float(damp))
        gram = M.T * M + d**2 * mpmath.eye(3)
        x = mpmath.lu_solve(gram, M.T * mpmath.matrix(b.tolist()))
        want = float((-2 * d * mpmath.matrix(w.tolist()).T * mpmath.lu_solve(gram, x))[0])
    try:
        got = torch.func.grad(lambda d: fl.lstsq(fl.SparseMatrix(A.reshape(-1), full_pattern(6, 3)), b, damp=d) @ w)(
            damp
        )
    except fl.ConvergenceError:
        assert condition > 1e5
        return
    assert abs(float(got) - want) <= 1e-4 * abs(want)
