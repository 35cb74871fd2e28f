"""Weights from zero to infinity and dampings of each unknown, against the augmented system in rational arithmetic."""

from fractions import Fraction

import pytest
import torch
from rationals import solved
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import functional_lstsq as fl

F64 = torch.float64
INF = float("inf")


def dense_pattern(m, n):
    return fl.SparsePattern(torch.cartesian_prod(torch.arange(m), torch.arange(n)).T, (m, n))


def exact(A, b, c, weights, damp):
    """x and the gradients of c.x by A, b, weights and damp, each as a list of fractions.

    W^-1 s + A x = b, A^T s - D x = 0 over the rows whose weight is not zero and the unknowns that are not pinned, with
    W^-1 = 0 for a constraint.
    """
    (m, n), zero = A.shape, Fraction(0)
    a, b, c = ([[Fraction(v) for v in row] for row in t.reshape(len(t), -1).tolist()] for t in (A, b, c))
    rows, free = [i for i in range(m) if weights[i] > 0], [j for j in range(n) if damp[j] < INF]
    M = len(rows)
    K = [[zero] * (M + len(free)) for _ in range(M + len(free))]
    for k, i in enumerate(rows):
        K[k][k] = zero if weights[i] == INF else 1 / Fraction(float(weights[i]))
        for q, j in enumerate(free):
            K[k][M + q] = K[M + q][k] = a[i][j]
    for q, j in enumerate(free):
        K[M + q][M + q] = -(Fraction(float(damp[j])) ** 2)
    right = [[b[i][0], zero] for i in rows] + [[zero, c[j][0]] for j in free]
    found = solved(K, right)
    s, l = ([zero] * m, [zero] * m), ([zero] * n, [zero] * n)  # noqa: E741
    for t in (0, 1):
        for k, i in enumerate(rows):
            s[t][i] = found[k][t]
        for q, j in enumerate(free):
            l[t][j] = found[M + q][t]
    x, y = l
    r = [b[i][0] - sum(a[i][j] * x[j] for j in range(n)) for i in range(m)]
    q = [-sum(a[i][j] * y[j] for j in range(n)) for i in range(m)]
    by_A = [-(s[1][i] * x[j] + s[0][i] * y[j]) for i in range(m) for j in range(n)]
    by_d = [2 * Fraction(float(damp[j])) * x[j] * y[j] if damp[j] < INF else zero for j in range(n)]
    return {"x": x, "A": by_A, "b": s[1], "weights": [u * v for u, v in zip(q, r, strict=True)], "damp": by_d}


def close(got, want, tolerance=1e-9):
    """Whether the error is small beside the whole, from fractions that need not be double precision numbers."""
    error = sum((Fraction(g) - w) ** 2 for g, w in zip(got.reshape(-1).tolist(), want, strict=True))
    return error <= Fraction(tolerance) ** 2 * sum(w * w for w in want)


def drawn(seed, m=13, n=4):
    """Weights of infinity, 1e20 and 0 side by side; unknowns of any scale, one pinned now and then."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(m, n, generator=g, dtype=F64) * 10.0 ** (6 * torch.rand(n, generator=g, dtype=F64) - 3)
    b, c = torch.randn(m, generator=g, dtype=F64), torch.randn(n, generator=g, dtype=F64)
    weights = 0.5 + torch.rand(m, generator=g, dtype=F64)
    weights[: 1 + seed % 2] = INF
    weights[3], weights[4] = 1e20 if seed % 3 else 1.0, 0.0
    damp = torch.where(torch.rand(n, generator=g) < 0.4, torch.rand(n, generator=g, dtype=F64), 0.0)
    if seed % 4 == 0:
        damp[seed % n] = INF
    return A, b, c, weights, damp


def of(A, c, solver=None):
    pattern = dense_pattern(*A.shape)

    def f(values, b, weights, damp):
        return fl.lstsq(fl.SparseMatrix(values, pattern), b, weights=weights, damp=damp, solver=solver) @ c

    return f


@pytest.mark.parametrize("seed", [*range(25), *(pytest.param(k, marks=pytest.mark.slow) for k in range(25, 100))])
def test_every_gradient_is_that_of_the_augmented_system(seed):
    A, b, c, weights, damp = drawn(seed)
    want, args = exact(A, b, c, weights, damp), (A.reshape(-1), b, weights, damp)
    x = fl.lstsq(fl.SparseMatrix(args[0], dense_pattern(*A.shape)), b, weights=weights, damp=damp)
    assert close(x, want["x"])
    assert (x[damp == INF] == 0).all()
    f = of(A, c)
    for number, name in enumerate(("A", "b", "weights", "damp")):
        assert close(grad(f, number)(*args), want[name]), name
        u = torch.randn(args[number].shape, generator=torch.Generator().manual_seed(1), dtype=F64)
        along = jvp(lambda t, at=number: f(*args[:at], t, *args[at + 1 :]), (args[number],), (u,))[1]
        parts = [Fraction(v) * w for v, w in zip(u.tolist(), want[name], strict=True)]
        size = sum(p * p for p in parts) ** 0.5 if any(parts) else 0
        assert abs(Fraction(float(along)) - sum(parts)) <= 1e-9 * float(size), name


@pytest.mark.parametrize("solver", [fl.Dense(), fl.Direct(), fl.CGLS()], ids=["dense", "direct", "cgls"])
@pytest.mark.parametrize("seed", [0, 1, 5])
def test_every_solver_meets_constraints(solver, seed):
    A, b, c, weights, damp = drawn(seed)
    A = A / A.norm(dim=0)
    want, args = exact(A, b, c, weights, damp), (A.reshape(-1), b, weights, damp)
    got = grad(of(A, c, solver), (0, 1, 2, 3))(*args)
    tolerance = 1e-7 if isinstance(solver, fl.CGLS) else 1e-9
    for bar, name in zip(got, ("A", "b", "weights", "damp"), strict=True):
        assert close(bar, want[name], tolerance), name


@pytest.mark.parametrize(
    "dims", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)], ids=["b", "weights", "damp", "all"]
)
def test_vmap_over_right_hand_sides_weights_and_dampings(dims):
    drawings = [drawn(seed) for seed in (0, 1, 2, 3)]
    A, c = drawings[0][0], drawings[0][2]
    f, values = of(A, c), drawings[0][0].reshape(-1)
    b, weights, damp = (torch.stack([d[i] for d in drawings]) for i in (1, 3, 4))
    given = [t if dim == 0 else t[0] for t, dim in zip((b, weights, damp), dims, strict=True)]
    got = vmap(grad(f, (0, 1, 2, 3)), in_dims=(None, *dims))(values, *given)
    for p in range(4):
        of_one = [t[p] if dim == 0 else t for t, dim in zip(given, dims, strict=True)]
        want = exact(A, of_one[0], c, *of_one[1:])
        for bar, name in zip(got, ("A", "b", "weights", "damp"), strict=True):
            assert close(bar[p], want[name]), (p, name)


@pytest.mark.parametrize("argnums", [0, 1], ids=["A", "b"])
def test_what_an_eliminated_constraint_gives(argnums):
    # x_0 + x_1 = b_0 exactly: x_1 = b_0 - x_0 leaves an ordinary problem in x_0, whose derivatives of any order agree.
    A = torch.tensor([[1.0, 1.0], [1.0, 2.0], [3.0, -1.0], [0.5, 1.0]], dtype=F64)
    b, weights = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=F64), torch.tensor([INF, 1.0, 2.0, 0.5], dtype=F64)

    def ours(A, b):
        x = fl.lstsq(fl.SparseMatrix(A.reshape(-1), dense_pattern(4, 2)), b, weights=weights)
        return torch.sin(x).sum()

    def eliminated(A, b):
        of_first, w = A[0, 0] / A[0, 1], weights[1:]
        column, right = A[1:, 0] - A[1:, 1] * of_first, b[1:] - A[1:, 1] * b[0] / A[0, 1]
        x = (w * column * right).sum() / (w * column * column).sum()
        return torch.sin(torch.stack([x, b[0] / A[0, 1] - of_first * x])).sum()

    torch.testing.assert_close(ours(A, b), eliminated(A, b))
    torch.testing.assert_close(hessian(ours, argnums)(A, b), hessian(eliminated, argnums)(A, b))
    mixed = jacrev(jacfwd(ours, argnums), 1 - argnums)(A, b)
    torch.testing.assert_close(mixed, jacrev(jacfwd(eliminated, argnums), 1 - argnums)(A, b))
    solution = fl.solve(fl.SparseMatrix(A.reshape(-1), dense_pattern(4, 2)), b, weights=weights)
    assert solution.residual[0] == 0


def test_full_rank_only_together_with_a_constraint():
    # An intercept and all dummies; their sum is zero.
    A = torch.tensor([[0.0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]], dtype=F64)
    b, weights = torch.tensor([0.0, 1, 2, 3, 5], dtype=F64), torch.tensor([INF, 1, 1, 1, 1], dtype=F64)
    matrix = fl.SparseMatrix.from_torch(A.to_sparse())
    want = torch.tensor([9.5, -5, -0.5, 5.5], dtype=F64) / 3
    torch.testing.assert_close(fl.lstsq(matrix, b, weights=weights), want)
    with pytest.raises(fl.RankDeficientError):
        fl.lstsq(matrix, b, weights=weights.clamp(max=1.0) * (torch.arange(5) > 0))


TWICE = torch.tensor([[1.0, 1], [2, 2], [1, 0], [0, 1], [3, 1]], dtype=F64).to_sparse()  # a row, and twice that row


@pytest.mark.parametrize(
    ("b", "weights", "words"),
    [
        ([1.0, 2, 0, 0, 0], [INF, INF, 1, 1, 1], r"got 2, of rank 1 \(rows 0, 1 take part"),
        ([1.0, 3, 0, 0, 0], [INF, INF, 1, 1, 1], r"got 2, of rank 1 \(rows 0, 1 take part"),
        ([0.0, 0, 0, 0, 0], [INF, INF, INF, 1, 1], "got 3, more than the 2 unknowns"),
    ],
    ids=["consistent", "contradictory", "too many"],
)
def test_constraints_that_are_dependent(b, weights, words):
    with pytest.raises(fl.RankDeficientError, match=f"rows of infinite weight .* {words}"):
        fl.lstsq(TWICE, torch.tensor(b, dtype=F64), weights=torch.tensor(weights, dtype=F64))


def test_dependent_rows_in_a_batch_and_with_finite_weights():
    matrix = fl.SparseMatrix.from_torch(TWICE)
    fine, two = torch.tensor([[INF, 1, 1, 1, 1], [INF, INF, 1, 1, 1]], dtype=F64)
    with pytest.raises(fl.RankDeficientError, match="got 2, of rank 1"):
        vmap(lambda w: fl.lstsq(matrix, torch.zeros(5, dtype=F64), weights=w))(torch.stack([fine, two]))
    # Finite weights of that size are an ordinary problem: the heavy rows by themselves.
    b = torch.tensor([1.0, 3, 0, 0, 0], dtype=F64)
    x = fl.lstsq(matrix, b, weights=torch.tensor([1e20, 1e20, 1, 1, 1], dtype=F64))
    assert float(x.sum()) == pytest.approx(7 / 5)


def test_constraints_of_any_scale_that_are_nearly_dependent():
    g = torch.Generator().manual_seed(3)
    A = torch.randn(12, 5, generator=g, dtype=F64)
    A[1] = A[0] * 1e-6 + 1e-11 * A[1]
    A[2] *= 1e7
    b, c, weights = torch.randn(12, generator=g, dtype=F64), torch.randn(5, generator=g, dtype=F64), torch.ones(12)
    weights = weights.to(F64)
    weights[:3] = INF
    want, got = exact(A, b, c, weights, torch.zeros(5)), of(A, c)
    try:
        bars = grad(got, (0, 1, 2))(A.reshape(-1), b, weights, None)
    except torch.linalg.LinAlgError:
        return
    for bar, name in zip(bars, ("A", "b", "weights"), strict=True):
        assert close(bar, want[name], 1e-7), name


@pytest.mark.parametrize("argnums", [0, 1, 2], ids=["A", "b", "damp"])
@pytest.mark.parametrize("derivative", [grad, jacfwd, hessian], ids=["grad", "jacfwd", "hessian"])
def test_a_prior_of_each_unknown(argnums, derivative):
    # sum_j damp_j^2 x_j^2 is rows of their own, with weights damp^2.
    A, b, c, _, _ = drawn(7)
    damp = torch.tensor([0.0, 1e-3, 2.0, 0.5], dtype=F64)

    def rows(values, b, damp):
        below = fl.SparsePattern(
            torch.cat([dense_pattern(13, 4).indices, torch.stack([13 + torch.arange(4), torch.arange(4)])], 1), (17, 4)
        )
        stacked = fl.SparseMatrix(torch.cat([values, damp]), below)
        return fl.lstsq(stacked, torch.cat([b, torch.zeros(4, dtype=F64)])) @ c

    def prior(values, b, damp):
        return fl.lstsq(fl.SparseMatrix(values, dense_pattern(13, 4)), b, damp=damp) @ c

    want, got = (derivative(f, argnums)(A.reshape(-1), b, damp) for f in (rows, prior))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


def test_a_prior_of_each_unknown_of_a_wide_matrix():
    A, b, _, _, _ = drawn(7)
    wide = fl.SparseMatrix(A.T.reshape(-1), dense_pattern(4, 13))
    damp = torch.linspace(0.1, 2.0, 13, dtype=F64)
    dense = torch.linalg.solve(A @ A.T + torch.diag(damp.square()), A @ b[:4])
    torch.testing.assert_close(fl.lstsq(wide, b[:4], damp=damp), dense)


def test_complex_constraints():
    g = torch.Generator().manual_seed(5)
    A, b = torch.randn(8, 3, generator=g, dtype=torch.complex128), torch.randn(8, generator=g, dtype=torch.complex128)
    weights, pattern = torch.ones(8, dtype=F64), dense_pattern(8, 3)
    weights[2] = INF
    solution = fl.solve(fl.SparseMatrix(A.reshape(-1), pattern), b, weights=weights)
    K = torch.zeros(4, 4, dtype=torch.complex128)
    rest = torch.arange(8) != 2
    K[:3, :3], K[:3, 3], K[3, :3] = A[rest].mH @ A[rest], A[2].conj(), A[2]
    want = torch.linalg.solve(K, torch.cat([A[rest].mH @ b[rest], b[2:3]]))[:3]
    torch.testing.assert_close(solution.x, want)
    assert solution.residual[2] == 0


def test_a_large_sparse_problem_with_fifty_constraints():
    m, n, g = 20_000, 2_000, torch.Generator().manual_seed(0)
    columns = torch.randint(0, n, (m, 8), generator=g).sort(1).values
    keep = torch.cat([torch.ones(m, 1, dtype=torch.bool), columns.diff(dim=1) != 0], 1)
    rows = torch.arange(m)[:, None].expand(-1, 8)
    pattern = fl.SparsePattern(torch.stack([rows[keep], columns[keep]]), (m, n))
    values, b = (torch.randn(size, generator=g, dtype=F64) for size in (int(keep.sum()), m))
    weights, c = torch.ones(m, dtype=F64), torch.randn(n, generator=g, dtype=F64)
    weights[:50], weights[50:100] = INF, 0.0

    def f(values, b, weights):
        return fl.lstsq(fl.SparseMatrix(values, pattern), b, weights=weights) @ c

    got = grad(f, (0, 1, 2))(values, b, weights)
    A = torch.zeros(m, n, dtype=F64).index_put((rows[keep], columns[keep]), values)
    H, G = A[:50], A[100:].T @ A[100:]
    K = torch.zeros(n + 50, n + 50, dtype=F64)
    K[:n, :n], K[:n, n:], K[n:, :n] = G, H.T, H
    right = torch.stack([torch.cat([A[100:].T @ b[100:], b[:50]]), torch.cat([-c, torch.zeros(50, dtype=F64)])], 1)
    found = torch.linalg.solve(K, right)
    found = found + torch.linalg.solve(K, right - K @ found)
    (x, y), (s, l) = found[:n].T, -found[n:].T  # noqa: E741
    s, l = (torch.cat([t, torch.zeros(m - 50, dtype=F64)]) for t in (s, l))  # noqa: E741
    r, q = b - A @ x, -(A @ y)
    s[100:], l[100:], r[:50], q[:50] = r[100:], q[100:], 0.0, 0.0
    torch.testing.assert_close(got[1], l, rtol=1e-9, atol=1e-9 * float(l.abs().max()))
    torch.testing.assert_close(got[2], q * r, rtol=1e-9, atol=1e-9 * float((q * r).abs().max()))
    by_A = -(l[:, None] * x + s[:, None] * y)[rows[keep], columns[keep]]
    torch.testing.assert_close(got[0], by_A, rtol=1e-9, atol=1e-9 * float(by_A.abs().max()))


ONES, ENDLESS = torch.ones(3, dtype=F64), torch.full((3,), INF, dtype=F64)
MATRIX = fl.SparseMatrix(ONES, fl.SparsePattern(torch.tensor([[0, 1, 2], [0, 0, 1]]), (3, 2)))
OPERATOR = fl.LinearOperator(lambda p, x: torch.cat([x, x[:1]]) * p, ONES, 2)


@pytest.mark.parametrize(
    ("A", "options", "words"),
    [
        (MATRIX, {"weights": ENDLESS, "robust": fl.Huber()}, "weights must be finite"),
        (OPERATOR, {"weights": ENDLESS}, "weights must be finite"),
        (OPERATOR, {"damp": ENDLESS[:2]}, "damp must be finite"),
        (MATRIX, {"damp": ENDLESS[:2] * torch.nan}, "damp must be finite or infinity, got NaN"),
        (MATRIX, {"damp": INF}, "damp must be finite"),
        (MATRIX, {"damp": ONES[:2], "robust": fl.Huber()}, "damp must be a number with robust"),
        (MATRIX, {"damp": -ONES[:2]}, "damp must not be negative"),
        (MATRIX, {"damp": ONES}, r"damp must be a number or of shape \(2,\)"),
    ],
    ids=str,
)
def test_what_cannot_be_infinite_is_refused(A, options, words):
    with pytest.raises(ValueError, match=words):
        fl.lstsq(A, ONES, **options)


def test_an_operator_takes_a_prior_of_each_unknown():
    damp, want = torch.tensor([0.0, 1.0], dtype=F64), torch.tensor([1.0, 0.5], dtype=F64)
    torch.testing.assert_close(fl.lstsq(OPERATOR, ONES, damp=damp), want)


def test_one_heavy_row_beside_few_others_of_very_different_weights():
    """What it is capped at must be more than the largest of the others, not than the usual one."""
    A = fl.SparseMatrix.from_dense(torch.tensor([[1.0], [1.0], [1e-8]], dtype=torch.float64))
    b, weights = torch.ones(3, dtype=torch.float64), torch.tensor([1e8, 1e-5, 1e-8], dtype=torch.float64)
    assert abs(float(fl.lstsq(A, b, weights=weights)[0]) - 1) < 1e-15  # it was 1 + 1e-11
