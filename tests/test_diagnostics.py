"""Leverage, covariance, left-out rows, condition, Jacobian products, with derivatives: against dense linear algebra."""

import pytest
import torch
from helpers import close, dense, problem
from rationals import gradients, least_squares, rational, times
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import functional_lstsq as fl
from functional_lstsq.solvers.small import Small

PATTERN, VALUES, B = problem(14, 5)
WEIGHTS = torch.linspace(0.5, 2, 14, dtype=torch.float64)


def parts(v, weights):
    A = dense(v, PATTERN)
    W = torch.diag(torch.ones(14, dtype=v.dtype) if weights is None else weights)
    covariance = torch.linalg.inv(A.mH @ W.to(v.dtype) @ A)
    return A, W.to(v.dtype), covariance


def hat(v, weights):
    A, W, covariance = parts(v, weights)
    return (A @ covariance @ A.mH @ W).diagonal().real


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("solver", [None, fl.Dense(), fl.Direct(), fl.CGLS(tolerance=1e-13)], ids=repr)
def test_values(solver, weights):
    A, (D, _, C) = fl.SparseMatrix(VALUES, PATTERN), parts(VALUES, weights)
    options = {"weights": weights, "solver": solver}
    h = hat(VALUES, weights)
    close(fl.leverage(A, **options), h)
    close(fl.leverage(A, **options).sum(), torch.tensor(5.0, dtype=torch.float64))
    close(fl.covariance(A, [4, 0], **options), C[:, [4, 0]])
    close(fl.covariance_diagonal(A, **options), C.diagonal())
    left_out = []
    for i in range(14):
        keep = torch.arange(14) != i
        rows = fl.SparseMatrix.from_torch(D[keep].to_sparse())
        left_out.append(B[i] - D[i] @ fl.lstsq(rows, B[keep], weights=None if weights is None else weights[keep]))
    close(fl.leave_one_out(A, B, **options), torch.stack(left_out))
    estimate = fl.leverage(A, **options, samples=4000, seed=1)
    assert (estimate - h).abs().max() < 5 * 0.5 / 4000**0.5
    assert torch.equal(estimate, fl.leverage(A, **options, samples=4000, seed=1))
    assert not torch.equal(estimate, fl.leverage(A, **options, samples=4000, seed=2))


def test_complex_and_single():
    pattern, values, _ = problem(14, 5, dtype=torch.complex128)
    A = dense(values, pattern)
    matrix = fl.SparseMatrix(values, pattern)
    close(fl.covariance(matrix, torch.arange(5)), torch.linalg.inv(A.mH @ A))
    close(fl.leverage(matrix), (A @ torch.linalg.pinv(A)).diagonal().real)
    single = fl.SparseMatrix(VALUES.float(), PATTERN)
    assert fl.leverage(single).dtype == fl.covariance(single, [0]).dtype == torch.float32
    close(fl.leverage(single).double(), hat(VALUES, None), 1e-5)


@pytest.mark.parametrize("solver", [fl.Dense(), fl.Direct(), fl.CGLS()], ids=repr)
def test_blocks_of_columns_share_one_factorisation(solver, monkeypatch):
    pattern, values, b = problem(600, 5)
    kind, made = type(solver), []
    prepare = kind.prepare
    monkeypatch.setattr(kind, "prepare", lambda *args, **options: made.append(1) or prepare(*args, **options))
    of = Small.of
    monkeypatch.setattr(Small, "of", lambda *given: made.append(1) or of(*given))
    A = fl.SparseMatrix(values, pattern)
    for weights in (None, torch.linspace(0.5, 2, 600, dtype=torch.float64)):
        for study in (lambda w: fl.leverage(A, w, solver=solver), lambda w: fl.leave_one_out(A, b, w, solver=solver)):
            made.clear()
            study(weights)
            assert len(made) == 1


def test_left_out_rows_of_any_dtype_of_b():
    A = fl.SparseMatrix(VALUES, PATTERN)
    close(fl.leave_one_out(A, torch.arange(14)), fl.leave_one_out(A, torch.arange(14.0).double()), 1e-14)
    close(fl.leave_one_out(A, B.float()), fl.leave_one_out(A, B.float().double()), 1e-14)
    close(fl.leave_one_out(A, (1 + 1j) * B), (1 + 1j) * fl.leave_one_out(A, B), 1e-12)
    with pytest.raises(TypeError, match="A and b must be float32"):
        fl.leave_one_out(A, B.half())


@pytest.mark.parametrize("transform", [jacrev, jacfwd, lambda f: hessian(lambda v: f(v).sin().sum())])
def test_derivatives(transform):
    def matrix(v):
        return fl.SparseMatrix(v, PATTERN)

    close(transform(lambda v: fl.leverage(matrix(v)))(VALUES), transform(lambda v: hat(v, None))(VALUES), 1e-7)
    ours = transform(lambda v: fl.covariance_diagonal(matrix(v)))(VALUES)
    close(ours, transform(lambda v: parts(v, None)[2].diagonal())(VALUES), 1e-7)

    def left_out(v):
        A, _, C = parts(v, None)
        return (B - A @ C @ A.T @ B) / (1 - (A @ C @ A.T).diagonal())

    close(transform(lambda v: fl.leave_one_out(matrix(v), B))(VALUES), transform(left_out)(VALUES), 1e-7)
    by_weights = transform(lambda w: fl.leverage(matrix(VALUES), w))(WEIGHTS)
    close(by_weights, transform(lambda w: hat(VALUES, w))(WEIGHTS), 1e-7)


def test_batches():
    V = torch.stack([VALUES, 1.1 * VALUES + 0.05])
    for f, want in (
        (fl.leverage, lambda v: hat(v, None)),
        (fl.covariance_diagonal, lambda v: parts(v, None)[2].diagonal()),
    ):
        close(vmap(lambda v, f=f: f(fl.SparseMatrix(v, PATTERN)))(V), torch.stack([want(v) for v in V]))


def test_a_row_that_no_other_controls_cannot_be_left_out():
    A = fl.SparseMatrix.from_torch(torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]], dtype=torch.float64).to_sparse())
    left_out = fl.leave_one_out(A, torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64))
    assert left_out.isnan().tolist() == [False, False, True]
    close(left_out[:2], torch.tensor([-2.0, 2.0], dtype=torch.float64))
    by_b = jacrev(lambda b: fl.leave_one_out(A, b))(torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64))
    close(by_b, torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 0, 0]], dtype=torch.float64))
    assert fl.leave_one_out(torch.eye(3, dtype=torch.float64).to_sparse(), B[:3]).isnan().all()


def heavy(rows, weight):
    w = torch.linspace(0.5, 2, 9, dtype=torch.float64)
    w[list(rows)], w[7] = weight, 0
    return w


# name: (factor of the first column in the other rows, whether the second is like it there, weights)
NEARLY_ALONE = {
    "small column": (1e-6, False, None),
    "tiny column": (1e-11, False, None),
    "dependent but for rounding": (1 / 3, True, None),
    "heavy row": (1.0, False, heavy([0], 1e8)),
    "heavy rows": (1.0, False, heavy([0, 4, 5], 1e12)),
    "heavy row, small column": (1e-5, False, heavy([0], 1e6)),
}


@pytest.mark.parametrize("solver", [None, fl.Direct(), fl.CGLS()], ids=repr)
@pytest.mark.parametrize("name", NEARLY_ALONE)
def test_rows_that_decide_their_own_fit_nearly_alone(name, solver):
    """Their 1 - h is below 1e-6; what is left of them is held against rational arithmetic, with its gradients."""
    factor, alike, weights = NEARLY_ALONE[name]
    D, b = torch.randn(9, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64), B[:9]
    D[1:, 0] = factor * D[1:, alike * 1]
    A, others = fl.SparseMatrix.from_torch(D.to_sparse()), torch.arange(9) > 0
    w = torch.ones(9, dtype=torch.float64) if weights is None else weights
    x = least_squares(D[others], b[others], weights=w[others])[0]
    want = gradients(D[others], b[others], -D[0], weights=w[others])
    left_out = rational(b[:1])[0][0] - times(rational(D[:1]), x, 1)[0][0]

    def f(values, b, w):
        given = None if weights is None else w
        return fl.leave_one_out(fl.SparseMatrix(values, A.pattern), b, given, solver=solver)

    assert 1 - fl.leverage(A, weights, solver=solver)[0] < 1e-6
    found = f(A.values, b, w)
    assert found.isfinite().all()
    close(found[0], torch.tensor(float(left_out), dtype=torch.float64), 1e-12)
    by_A, by_b, by_w = grad(lambda *args: f(*args)[0], (0, 1, 2))(A.values, b, w)
    exact_A = [[-float(v) for (v,) in x], *([float(v) for v in row] for row in want["A"])]
    close(by_A, torch.tensor(exact_A, dtype=torch.float64)[tuple(A.pattern.indices)], 1e-10)
    close(by_b, torch.tensor([1, *(float(v) for (v,) in want["b"])], dtype=torch.float64), 1e-10)
    if weights is not None:
        close(by_w, torch.tensor([0, *(float(v) for (v,) in want["weights"])], dtype=torch.float64), 1e-7)
    along = by_A @ A.values.cos() + by_b @ b.sin()
    close(jvp(lambda *args: f(*args, w)[0], (A.values, b), (A.values.cos(), b.sin()))[1], along, 1e-10)


def test_rows_that_decide_their_own_fit_nearly_alone_in_batches():
    """Each matrix of a batch has its own such rows."""
    V = torch.stack([VALUES, VALUES, VALUES])
    at = [int((PATTERN.indices[1] == j).nonzero()[0]) for j in (0, 3)]
    V[0, at[0]], V[1, at[1]] = 1e9, -1e10

    def f(v):
        return fl.leave_one_out(fl.SparseMatrix(v, PATTERN), B)

    def squares(v):
        return (f(v) / 1e9).square().sum()

    assert (vmap(lambda v: fl.leverage(fl.SparseMatrix(v, PATTERN)))(V) > 1 - 1e-15).sum(1).tolist() == [1, 1, 0]
    close(vmap(f)(V) / torch.stack([f(v) for v in V]), torch.ones_like(V[:, :14]), 1e-12)
    close(vmap(grad(squares))(V), torch.stack([grad(squares)(v) for v in V]), 1e-10)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for v in V:
        close(compiled(v), f(v), 1e-14)


def test_many_rows_in_blocks():
    pattern, values, _ = problem(600, 12, density=0.2)
    D = dense(values, pattern)
    close(fl.leverage(fl.SparseMatrix(values, pattern)), (D @ torch.linalg.pinv(D)).diagonal())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda A: fl.leverage(A.T), ValueError, "at least as many rows as columns"),
        (lambda A: fl.leverage(A.to_dense()), TypeError, "torch sparse"),
        (lambda A: fl.leverage(3), TypeError, "A must be a SparseMatrix"),
        (lambda A: fl.leverage(A, samples=0), ValueError, "samples must be a positive integer"),
        (lambda A: fl.leverage(A, samples=2.5), ValueError, "samples must be a positive integer"),
        (lambda A: fl.leverage(A, WEIGHTS[:3]), ValueError, "weights must have shape"),
        (lambda A: fl.covariance(A, [5]), ValueError, "columns must lie between 0 and 4, got 5"),
        (lambda A: fl.covariance(A, [-1]), ValueError, "columns must lie between 0 and 4, got -1"),
        (lambda A: fl.covariance(A, [0.5]), ValueError, "columns must be integers"),
        (lambda A: fl.leave_one_out(A, B[:3]), ValueError, r"b must be a tensor of shape \(14,\)"),
        (lambda A: fl.jacobian_operator(A.to_dense(), B), TypeError, "A must be a SparseMatrix"),
        (lambda A: fl.jacobian_operator(A, B[:3]), ValueError, r"b must be a tensor of shape \(14,\)"),
        (lambda A: fl.leverage(fl.SparseMatrix(0 * A.values, A.pattern)), fl.RankDeficientError, "rank"),
    ],
)
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call(fl.SparseMatrix(VALUES, PATTERN))


def test_left_out_residuals_of_an_ill_conditioned_matrix():
    g = torch.Generator().manual_seed(0)
    D = torch.randn(8, 3, generator=g, dtype=torch.float64)
    D[:, 1] = D[:, 0] + D[:, 1] / 1e10
    b = torch.randn(8, generator=g, dtype=torch.float64)
    Q = torch.linalg.qr(D)[0]  # the range is known much better than the solution
    rest = torch.eye(8, dtype=torch.float64) - Q @ Q.T
    close(fl.leave_one_out(fl.SparseMatrix.from_torch(D.to_sparse()), b), rest @ b / rest.diagonal(), 1e-5)
    exact = fl.solve(fl.SparseMatrix.from_torch(D.to_sparse()), b).residual
    close(fl.leave_one_out(fl.SparseMatrix.from_torch(D.to_sparse()), b) * rest.diagonal(), exact, 1e-5)


@pytest.mark.parametrize("kept", [False, True], ids=["A", "factorize(A)"])
@pytest.mark.parametrize("exponent", [0, 3, 5, 7])
def test_leverage_by_columns_and_by_rows(exponent, kept):
    """By columns of A up to a condition number of 1e4, by rows above it."""
    U = torch.linalg.qr(torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    V = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    A = fl.SparseMatrix.from_torch((U * torch.logspace(0, -exponent, 6, dtype=torch.float64) @ V).to_sparse())
    h = fl.leverage(fl.factorize(A) if kept else A)
    assert (h - U.square().sum(1)).abs().max() < 1e-15 * max(10, 10**exponent)


def test_the_leverage_of_a_constraint_and_of_a_row_without_weight():
    weights = torch.linspace(0.5, 2, 14, dtype=torch.float64)
    weights[2], weights[5] = torch.inf, 0.0
    h = fl.leverage(fl.SparseMatrix(VALUES, PATTERN), weights)
    assert h[2] == 1
    assert h[5] == 0
    heavy = torch.where(weights.isinf(), 1e10, weights)
    torch.testing.assert_close(h, hat(VALUES, heavy), rtol=1e-5, atol=1e-9)


def test_the_leverage_of_a_damped_fit():
    D = dense(VALUES, PATTERN)
    want = (D @ torch.linalg.solve(D.mH @ D + 0.25 * torch.eye(5, dtype=torch.float64), D.mH)).diagonal()
    close(fl.leverage(fl.factorize(fl.SparseMatrix(VALUES, PATTERN), damp=0.5)), want)


@pytest.mark.parametrize("study", [fl.leverage, fl.covariance_diagonal, lambda A, w: fl.leave_one_out(A, B, w)])
def test_weights_beside_kept_factors_are_refused(study):
    with pytest.raises(TypeError, match="weights must be None beside a Factorization"):
        study(fl.factorize(fl.SparseMatrix(VALUES, PATTERN)), WEIGHTS)


@pytest.mark.parametrize(
    "study",
    [fl.leverage, fl.covariance_diagonal, lambda A: fl.covariance(A, [0, 3]), lambda A: fl.leave_one_out(A, B)],
    ids=["leverage", "covariance_diagonal", "covariance", "leave_one_out"],
)
def test_studies_are_compiled_in_one_graph(study):
    def f(v):
        return study(fl.SparseMatrix(v, PATTERN))

    close(torch.compile(f, fullgraph=True, backend="aot_eager")(VALUES), f(VALUES))
    close(torch.compile(jacrev(f), fullgraph=True, backend="aot_eager")(VALUES), jacrev(f)(VALUES))
