"""Leverage, covariance, left-out rows, condition, Jacobian products, with derivatives: against dense linear algebra."""

import pytest
import torch
from helpers import close, dense, problem
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import functional_lstsq as fl

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


def test_many_rows_in_blocks():
    pattern, values, _ = problem(600, 12, density=0.2)
    D = dense(values, pattern)
    close(fl.leverage(fl.SparseMatrix(values, pattern)), (D @ torch.linalg.pinv(D)).diagonal())


def test_condition():
    A = dense(VALUES, PATTERN)
    true = float(torch.linalg.cond(A / A.norm(dim=0)))
    for solver in (None, fl.Dense(), fl.Direct(), fl.CGLS()):
        found = fl.condition(fl.SparseMatrix(VALUES, PATTERN), solver=solver)
        assert true / 10 < found < 10 * true
    assert fl.condition(torch.ones(4, 2, dtype=torch.float64).to_sparse()) == torch.inf
    assert fl.condition(fl.LinearOperator(lambda p, x: p * x, torch.tensor([1.0, 10.0]).double(), 2)) > 5


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_jacobian_operator(weights):
    def f(v):
        return fl.lstsq(fl.SparseMatrix(v, PATTERN), B, weights=weights)

    J, full = fl.jacobian_operator(fl.SparseMatrix(VALUES, PATTERN), B, weights=weights), jacrev(f)(VALUES)
    assert J.shape == full.shape
    V, Y = torch.stack([VALUES.sin(), VALUES.cos()], 1), torch.eye(5, dtype=torch.float64)
    close(J @ V, full @ V)
    close(J @ V[:, 0], full @ V[:, 0])
    close(J.adjoint(Y), full.T)
    close(J.adjoint(Y[0]), full[0])
    close(grad(lambda J: (J @ V[:, 0]).sum())(J).params, grad(lambda v: (jacrev(f)(v) @ V[:, 0]).sum())(VALUES), 1e-7)


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
