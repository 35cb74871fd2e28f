"""Matrices without full rank: recognised, refused, or solved for the least norm."""

import itertools

import mpmath
import pytest
import torch
from helpers import close, full_pattern, normal, with_singular_values
from rationals import least_squares
from references import exact

import functional_lstsq as fl
from functional_lstsq.solvers import Solver


@pytest.mark.parametrize("nullity", [1, 3, 8])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("solver", [None, fl.Direct()])
def test_rank_deficient(nullity, wide, dtype, solver):
    m, n = 30, 12
    generator = torch.Generator().manual_seed(nullity)
    left, right = (torch.randn(rows, n - nullity, dtype=dtype, generator=generator) for rows in (m, n))
    A = (right @ left.mH) if wide else left @ right.mH
    matrix = fl.SparseMatrix(A.reshape(-1), full_pattern(*A.shape))
    b = torch.randn(A.shape[0], 2, dtype=dtype, generator=generator)
    with pytest.raises(fl.RankDeficientError, match=f"rank {n - nullity}, not full rank {n}.*take part"):
        fl.lstsq(matrix, b, solver=solver)
    with pytest.raises(fl.RankDeficientError, match="rank below 12"):
        fl.lstsq(matrix, b, solver=fl.CGLS())
    solution = fl.solve(matrix, b, rank_deficient="minimum_norm", solver=solver)
    want = torch.linalg.pinv(A, rtol=1e-4 if dtype == torch.float32 else 1e-10) @ b
    close(solution.x, want, 1e-3 if dtype == torch.float32 else 1e-10)
    assert solution.info.rank.tolist() == [n - nullity] * 2
    close(fl.lstsq(matrix, b, damp=0.1, solver=solver), _ridge(A, b, 0.1), 1e-4 if dtype == torch.float32 else 1e-10)


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
            want = torch.linalg.pinv(A, rtol=1e-13) @ b
            if int(solution.info.rank) == 7:
                want = torch.tensor(exact(A, b, b[:7])[0][:, 0])
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


@pytest.mark.parametrize("pair", list(itertools.combinations(range(5), 2)))
def test_no_pair_of_equal_columns_escapes_the_iteration(pair):
    A = torch.randn(9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    A[:, pair[0]] = A[:, pair[1]]
    matrix, b = fl.SparseMatrix(A.reshape(-1), full_pattern(9, 5)), torch.ones(9, dtype=torch.float64)
    with pytest.raises(fl.RankDeficientError):
        fl.lstsq(matrix, b, solver=fl.CGLS())
    A[:, pair[0]] += 1e-9 * normal(9)
    with pytest.raises(torch.linalg.LinAlgError):
        fl.lstsq(fl.SparseMatrix(A.reshape(-1), full_pattern(9, 5)), b, solver=fl.CGLS())


def test_minimum_norm_without_a_factor_says_so():
    matrix = fl.SparseMatrix(torch.ones(12, dtype=torch.float64), full_pattern(6, 2))
    with pytest.raises(fl.RankDeficientError, match=r"Try: solver=Direct\(\)"):
        fl.lstsq(matrix, torch.ones(6).double(), rank_deficient="minimum_norm", solver=fl.CGLS())


def test_what_an_error_advises_is_not_refused():
    A = torch.ones(6, 2, dtype=torch.float64)
    b, operator = torch.arange(6.0).double(), fl.LinearOperator(lambda A, x: A @ x, A, 2)
    with pytest.raises(fl.RankDeficientError) as refused:
        fl.lstsq(operator, b)
    assert "rank_deficient='minimum_norm'" in str(refused.value)
    assert "damp > 0" in str(refused.value)
    close(fl.lstsq(operator, b, rank_deficient="minimum_norm"), torch.linalg.pinv(A) @ b, 1e-10)
    close(fl.lstsq(operator, b, damp=0.1), _ridge(A, b, 0.1), 1e-10)


FIRST_COLUMN = fl.SparsePattern(torch.tensor([[0, 1, 2], [0, 0, 0]]), (6, 2))


@pytest.mark.parametrize("solver", [None, fl.Direct(), fl.Dense()], ids=str)
@pytest.mark.parametrize("pattern", [full_pattern(6, 2), FIRST_COLUMN], ids=["of ones", "one column"])
def test_what_cgls_advises_is_taken(pattern, solver):
    matrix, b = fl.SparseMatrix(torch.ones(pattern.nnz, dtype=torch.float64), pattern), torch.arange(6.0).double()
    with pytest.raises(fl.RankDeficientError, match=r"minimum_norm' with solver=None, Direct\(\) or Dense\(\)"):
        fl.lstsq(matrix, b, solver=fl.CGLS())
    x = fl.lstsq(matrix, b, solver=solver, rank_deficient="minimum_norm")
    close(x, torch.linalg.pinv(matrix.to_dense()) @ b, 1e-12)


@pytest.mark.parametrize("solver", [fl.Dense(), fl.Direct()])
def test_what_is_dependent_is_named_in_order_and_called_what_it_is(solver):
    A = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A[:, 1] = 1e-3 * A[:, 3] - 3 * A[:, 0]
    zero = A.clone()
    zero[:, 1] = 0

    def refused(A):
        with pytest.raises(fl.RankDeficientError) as error:
            fl.lstsq(fl.SparseMatrix(A.reshape(-1), full_pattern(*A.shape)), A.sum(1), solver=solver)
        return str(error.value)

    assert "; columns 0, 1 take part in a dependence. Try: " in refused(A)
    assert refused(A).endswith("; remove the dependent columns")
    assert "; rows 0, 1 take part in a dependence. Try: " in refused(A.T)
    assert refused(A.T).endswith("; remove the dependent rows")
    assert "; column 1 takes part in a dependence. Try: " in refused(zero)


@pytest.mark.parametrize("solver", [None, fl.Direct(), fl.CGLS()])
@pytest.mark.parametrize("wide", [False, True])
def test_the_condition_number_is_infinite_without_full_rank(solver, wide):
    A, _ = with_singular_values([1.0, 0.5, 0.2, 0.0], 9, seed=3)
    A = A.T if wide else A
    matrix = fl.SparseMatrix(A.reshape(-1), full_pattern(*A.shape))
    assert fl.solve(matrix, A.sum(1), solver=solver, throw=False).info.condition == torch.inf
    assert fl.condition(matrix, solver=solver) == torch.inf
    if not isinstance(solver, fl.CGLS):
        info = fl.solve(matrix, A.sum(1), solver=solver, rank_deficient="minimum_norm").info
        s = torch.linalg.svdvals(A / A.norm(dim=1 if wide else 0, keepdim=True))
        assert 0.1 < info.condition / (s[0] / s[2]) < 10


@pytest.mark.parametrize("solver", [None, fl.Direct()], ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_a_pattern_that_allows_no_full_rank_is_told_before_any_work(wide, solver):
    rows, columns = torch.tensor([0, 1, 2, 3, 3, 4, 4]), torch.tensor([0, 1, 1, 0, 3, 0, 1])  # column 2 is empty
    indices, shape = torch.stack([rows, columns]), (5, 4)
    pattern = fl.SparsePattern(indices, shape)
    pattern, what = (pattern.T, "row") if wide else (pattern, "column")
    A = fl.SparseMatrix(torch.ones(7, dtype=torch.float64), pattern)
    b = torch.ones(pattern.shape[0], dtype=torch.float64)
    with pytest.raises(fl.RankDeficientError, match=f"structural rank 3, not full rank 4.*{what} 2 for one"):
        fl.lstsq(A, b, solver=_Untouched())
    x = fl.lstsq(A, b, rank_deficient="minimum_norm", solver=solver)
    close(x, torch.linalg.pinv(A.to_dense()) @ b, 1e-12)


class _Untouched(Solver):
    def prepare(self, system, *, minimum_norm):
        raise AssertionError("there was no need to")


def network(islands, each, seed=0):
    """Differences of heights on `islands` separate networks: (A, b), one null vector for each."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(islands * each)
    first = place.repeat(3)
    hop = torch.randint(1, each, (3 * len(place),), generator=generator)
    second = first // each * each + (first % each + hop) % each
    row = torch.arange(len(first))
    weights = 10 ** (6 * torch.rand(len(first), generator=generator, dtype=torch.float64) - 3)
    indices = torch.stack([torch.cat([row, row]), torch.cat([first, second])])
    A = fl.SparseMatrix(torch.cat([-weights, weights]), fl.SparsePattern(indices, (len(first), len(place))))
    return A, torch.randn(len(first), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("islands", [1, 7, 40])
def test_networks_without_a_datum(islands):
    """Row weights from 1e-3 to 1e3; the answer of least norm is the one of mean zero on every island."""
    each = 30
    A, b = network(islands, each)
    n = islands * each
    auto = fl.Auto(dense_columns=1)
    with pytest.raises(fl.RankDeficientError, match=f"rank {n - islands}, not full rank {n}.*columns .* take part"):
        fl.lstsq(A, b, solver=auto)
    w = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(values, b, solver):
        solution = fl.solve(fl.SparseMatrix(values, A.pattern), b, rank_deficient="minimum_norm", solver=solver)
        return solution.x @ w, solution

    (by_A, by_b), solution = torch.func.grad(loss, (0, 1), has_aux=True)(A.values, b, auto)
    assert solution.info.method.startswith("direct")
    # By a pinned height on each island, then the mean taken off: a problem of full rank.
    pinned = torch.arange(0, n, each)
    D = torch.cat([A.to_dense(), torch.zeros(islands, n, dtype=torch.float64)])
    D[A.shape[0] :, pinned] = torch.eye(islands, dtype=torch.float64)
    pinned_x = fl.lstsq(
        fl.SparseMatrix.from_torch(D.to_sparse_coo()), torch.cat([b, torch.zeros(islands).double()]), refine="extended"
    ).view(islands, each)
    want = (pinned_x - pinned_x.mean(1, keepdim=True)).reshape(-1)
    error = float((solution.x - want).norm() / want.norm())
    assert error < 1e-11
    assert error <= 10 * float(solution.info.forward_error) + 1e-15
    x_dot = torch.func.jvp(lambda v, b: loss(v, b, auto)[0], (A.values, b), (A.values.flip(0), b.flip(0)))[1]
    assert abs(float(x_dot) - float(by_A @ A.values.flip(0) + by_b @ b.flip(0))) < 1e-9 * abs(float(x_dot))


@pytest.mark.parametrize("solver", [fl.Dense(), fl.Direct()])
def test_columns_of_many_scales_do_not_blur_the_null_space(solver):
    """The three terms of the gradient, with a column a million times larger and none of its business."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    A[:, 5] = A[:, 4]  # the dependence
    scale = torch.tensor([2.0**20, 1, 2.0**-20, 1, 1, 1], dtype=torch.float64)
    A = A * scale
    b, w = (torch.randn(k, generator=generator, dtype=torch.float64) for k in (30, 6))
    got = torch.func.grad(
        lambda v: fl.lstsq(fl.SparseMatrix(v, full_pattern(30, 6)), b, rank_deficient="minimum_norm", solver=solver) @ w
    )(A.reshape(-1)).view(30, 6)
    want = golub_pereyra(A, b, w)
    close(got, want, 1e-9)
    for column, right in zip(got.T, want.T, strict=True):  # each at its own scale, for a condition number of 1e12
        close(column / right.norm(), right / right.norm(), 1e-5)


def golub_pereyra(A, b, w):
    """The gradient of w . A^+ b by A for changes that keep the rank (eq. 4.12), if its last two columns are equal."""
    with mpmath.workdps(60):
        M = mpmath.matrix(A.tolist())
        n = M.cols
        E = mpmath.zeros(n, n - 1)  # A = (A E) E^+ with A E of full rank: the last two columns together
        for j in range(n - 1):
            E[j, j] = 1
        E[n - 1, n - 2] = 1
        B = M * E
        for i in range(B.rows):
            B[i, n - 2] /= 2
        left = mpmath.inverse(B.T * B) * B.T
        right = E * mpmath.inverse(E.T * E)
        pinv = right * left
        x = pinv * mpmath.matrix(b.tolist())
        W = mpmath.matrix(w.tolist())
        r = mpmath.matrix(b.tolist()) - M * x
        back = pinv.T * W
        outside = W - M.T * back
        gradient = -back * x.T + r * (pinv * back).T + (pinv.T * x) * outside.T
        return torch.tensor([[float(gradient[i, j]) for j in range(n)] for i in range(M.rows)], dtype=torch.float64)


@pytest.mark.parametrize("solver", [fl.Dense(), fl.Direct(), None])
def test_least_norm_where_columns_differ_in_scale(solver):
    """D^-1 magnifies what rounding leaves in the null space of the scaled matrix: an exact matrix of rank 2."""
    first, second = torch.tensor([-2.0, -1, 2, 2]).double(), torch.tensor([3.0, 3, 1, 3]).double()
    A = torch.stack([first * 2.0**-30, second * 2.0**16, first * 2.0**-30, second * 2.0**20], 1)
    b = torch.tensor([0.8041449051537863, -0.46047314083797203, -1.621949070432042, 1.076462354535482]).double()
    solution = fl.solve(A.to_sparse(), b, solver=solver, rank_deficient="minimum_norm")
    u, v = torch.linalg.lstsq(torch.stack([first, second], 1), b[:, None]).solution[:, 0]
    truth = torch.stack(
        [u * 2.0**29, v * 2.0**16 / (2.0**32 + 2.0**40), u * 2.0**29, v * 2.0**20 / (2.0**32 + 2.0**40)]
    )
    error = float((solution.x - truth).norm() / truth.norm())
    assert error < 1e-13
    assert error <= 10 * float(solution.info.forward_error)


def test_a_row_of_a_wide_matrix_with_neither_weight_nor_damping():
    A, b = torch.tensor([[1.0, 2, 3], [4, 5, 7]], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    weights = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with pytest.raises(fl.RankDeficientError, match="rank 1, not full rank 2"):
        fl.lstsq(A.to_sparse(), b, weights=weights, damp=0.0)
    solution = fl.solve(A.to_sparse(), b, weights=weights, damp=0.0, throw=False)
    assert solution.info.status == "rank deficient"
    assert solution.x.isnan().all()
    x = fl.lstsq(A.to_sparse(), b, weights=weights, damp=0.0, rank_deficient="minimum_norm")
    torch.testing.assert_close(x, A[1] / 90, rtol=1e-14, atol=0)


def test_a_light_column_takes_part_in_a_dependence_of_heavy_ones():
    """Columns 0, 1 and 1 - 0 + 2 where column 2 is 2^-46 times as large, little more than rounding leaves."""
    g = torch.Generator().manual_seed(0)
    A = torch.randint(-9, 10, (7, 3), generator=g).double() * 2.0 ** torch.tensor([0, 0, -46])
    A = torch.cat([A, A[:, 1:2] - A[:, :1] + A[:, 2:3]], 1)
    assert bool((A[:, 3] != A[:, 1] - A[:, 0]).any())
    b = torch.randint(-9, 10, (7,), generator=g).double()
    x = fl.lstsq(fl.SparseMatrix.from_dense(A), b, rank_deficient="minimum_norm")
    want, rank, _ = least_squares(A, b)
    assert rank == 3
    torch.testing.assert_close(x, torch.tensor([float(v[0]) for v in want], dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("tall", [True, False])
def test_a_rank_that_depends_on_the_units_of_equations_or_unknowns_is_not_guessed(tall):
    """[1 1e20 0; 2 1e20 0] has rank 2, and rank 1 in numbers: the solution of either may be off by 1e20."""
    A = torch.tensor([[1, 1e20, 0], [2, 1e20, 0]], dtype=torch.float64)
    A = A.T.contiguous() if tall else A
    matrix, b = fl.SparseMatrix(A.reshape(-1), full_pattern(*A.shape)), torch.ones(len(A), dtype=torch.float64)
    with pytest.raises(fl.ConvergenceError, match="rescale"):
        fl.lstsq(matrix, b, rank_deficient="minimum_norm")
    found = fl.solve(matrix, b, rank_deficient="minimum_norm", rank_tolerance=1e-12)
    assert found.info.rank == 1
    want = torch.linalg.pinv(A, rtol=1e-12) @ b
    torch.testing.assert_close(found.x, want, rtol=1e-9, atol=1e-9 * float(want.norm()))
