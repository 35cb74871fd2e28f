"""Preconditioners change how many iterations an answer takes, and no answer."""

import pytest
import torch
from helpers import close, problem
from torch.func import grad, jacfwd, jacrev, vmap

import functional_lstsq as fl


def coupled(blocks=12, size=4, dtype=torch.float64):
    """(A, groups, b): columns in groups, each of condition number 1e4, and rows that tie the groups together weakly."""
    g = torch.Generator().manual_seed(0)
    weak = torch.diag(torch.logspace(0, -4, size, dtype=torch.float64)).to(dtype)
    parts = torch.randn(blocks, 3 * size, size, generator=g, dtype=dtype) @ weak
    parts = parts @ torch.randn(blocks, size, size, generator=g, dtype=dtype)
    n = blocks * size
    ties = 1e-5 * (torch.eye(n, dtype=dtype) - torch.eye(n, dtype=dtype).roll(size, 0))
    A = fl.SparseMatrix.from_torch(torch.cat([torch.block_diag(*parts), ties]).to_sparse())
    return A, torch.arange(n) // size, torch.randn(A.shape[0], generator=g, dtype=dtype)


of_any_kind = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
damped_or_not = pytest.mark.parametrize("damp", [None, 1e-3])


@of_any_kind
@damped_or_not
@pytest.mark.parametrize(
    "make",
    [
        lambda A, groups, damp: fl.BlockJacobi(groups),
        lambda A, groups, damp: fl.BlockJacobi(groups + 7),
        lambda A, groups, damp: fl.GramFactor(A, damp=damp),
    ],
    ids=["blocks", "blocks from 7", "factor"],
)
def test_answers_and_claims_are_those_without_one(dtype, damp, make):
    A, groups, b = coupled(dtype=dtype)
    want = fl.solve(A, b, damp=damp)
    got = fl.solve(A, b, damp=damp, solver=fl.CGLS(preconditioner=make(A, groups, damp)))
    close(got.x, want.x, 1e-9)
    assert int(got.info.iterations) <= 10
    assert want.info.condition / 10 < got.info.condition < 10 * want.info.condition
    assert (got.x - want.x).norm() / want.x.norm() <= 10 * got.info.forward_error + 1e-14


@of_any_kind
@damped_or_not
def test_groups_in_any_order(dtype, damp):
    A, groups, b = coupled(dtype=dtype)
    want = fl.solve(A, b, damp=damp)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(1))
    shuffled = fl.SparseMatrix.from_torch(A.to_dense()[:, order].to_sparse())
    got = fl.solve(shuffled, b, damp=damp, solver=fl.CGLS(preconditioner=fl.BlockJacobi(groups[order])))
    close(got.x, want.x[order], 1e-9)


def test_without_one_it_takes_far_more_iterations():
    A, groups, b = coupled()
    plain = fl.solve(A, b, solver=fl.CGLS()).info.iterations
    assert plain > 20 * fl.solve(A, b, solver=fl.CGLS(preconditioner=fl.BlockJacobi(groups))).info.iterations


def _callable(A):
    D = A.to_dense()
    gram = D.T @ D if D.shape[0] > D.shape[1] else D @ D.T
    M = torch.linalg.inv(gram + 0.1 * torch.eye(len(gram), dtype=torch.float64))
    return lambda g: M @ g


@pytest.mark.parametrize("shape", [(60, 20), (20, 60)], ids=str)
@pytest.mark.parametrize(
    "make",
    [_callable, fl.GramFactor, lambda A: fl.BlockJacobi(torch.arange(min(A.shape)) // 3)],
    ids=["callable", "factor", "blocks"],
)
@pytest.mark.parametrize(
    ("transform", "tolerance"),
    [
        (lambda f, v, b: vmap(f)(torch.stack([v, v * 1.01]), torch.stack([b, b + 1])), 1e-8),
        (lambda f, v, b: vmap(f, (None, 0))(v, torch.stack([b, b + 1])), 1e-8),
        (lambda f, v, b: jacrev(f)(v, b), 1e-8),
        (lambda f, v, b: jacfwd(f)(v, b), 1e-8),
        (lambda f, v, b: grad(lambda v: grad(lambda v: f(v, b).sum())(v).square().sum())(v), 1e-7),
    ],
    ids=["vmap", "vmap over b", "jacrev", "jacfwd", "grad of grad"],
)
def test_under_transformations(shape, make, transform, tolerance):
    pattern, values, b = problem(*shape)
    solver = fl.CGLS(preconditioner=make(fl.SparseMatrix(values, pattern)))
    f, want = (
        lambda v, b, solver=solver: fl.lstsq(fl.SparseMatrix(v, pattern), b, solver=solver) for solver in (solver, None)
    )
    close(transform(f, values, b), transform(want, values, b), tolerance)


def test_a_factor_is_kept_for_near_matrices():
    pattern, values, b = problem(200, 60, density=0.1)
    factor = fl.GramFactor(fl.SparseMatrix(values, pattern))
    near = fl.SparseMatrix(values * (1 + 1e-3 * torch.linspace(-1, 1, len(values), dtype=torch.float64)), pattern)
    got = fl.solve(near, b, solver=fl.CGLS(preconditioner=factor))
    close(got.x, fl.lstsq(near, b), 1e-11)
    assert 2 * got.info.iterations < fl.solve(near, b, solver=fl.CGLS()).info.iterations


def test_solvers_made_anew_for_every_step_are_not_kept():
    from functional_lstsq.linear import settings

    pattern, values, b = problem(12, 4)
    A = fl.SparseMatrix(values, pattern)
    before = len(settings._here)
    for _ in range(5):
        x = fl.lstsq(A, b, solver=fl.CGLS(preconditioner=fl.GramFactor(A)))
    assert x.isfinite().all()
    assert len(settings._here) <= before + 1


@pytest.mark.parametrize(
    ("preconditioner", "error", "words"),
    [
        (3, TypeError, "preconditioner must be callable"),
        (fl.BlockJacobi, TypeError, "preconditioner must be callable"),
        (lambda g: -g, ValueError, "must be Hermitian and positive definite"),
        (lambda g: g * torch.arange(len(g))[:, None] + g.roll(1, 0), ValueError, "must be Hermitian"),
        (lambda g: g[1:], ValueError, r"must return a tensor of torch.float64, shape \(4, 1\), got .* \(3, 1\)"),
        (lambda g: None, ValueError, "got NoneType"),
        (fl.BlockJacobi(torch.arange(3)), ValueError, r"groups must have shape \(4,\)"),
    ],
)
def test_a_bad_preconditioner_is_refused(preconditioner, error, words):
    pattern, values, b = problem(12, 4)
    with pytest.raises(error, match=words):
        fl.lstsq(fl.SparseMatrix(values, pattern), b, solver=fl.CGLS(preconditioner=preconditioner))


@pytest.mark.parametrize("groups", [torch.zeros(4), torch.zeros(2, 2, dtype=torch.int64), [0, 1]], ids=str)
def test_groups_that_are_none_are_refused(groups):
    with pytest.raises(TypeError, match="groups must be an integer tensor"):
        fl.BlockJacobi(groups)


def test_bad_settings_of_a_factor_are_refused():
    with pytest.raises(TypeError, match="A must be a SparseMatrix"):
        fl.GramFactor("A")
    pattern, values, _ = problem(12, 4)
    with pytest.raises(TypeError, match="solver must be"):
        fl.GramFactor(fl.SparseMatrix(values, pattern), solver=fl.CGLS())


@pytest.mark.parametrize("make", [lambda solver: solver, lambda solver: fl.Auto(cgls=solver)], ids=["cgls", "auto"])
def test_a_linear_operator_has_no_blocks_and_is_not_touched_to_say_so(make):
    def matvec(params, x):
        raise AssertionError("there was no need to")

    A, solver = fl.LinearOperator(matvec, torch.ones(4), 4), fl.CGLS(preconditioner=fl.BlockJacobi(torch.arange(4)))
    with pytest.raises(TypeError, match=r"preconditioner must be .* for a LinearOperator, got a BlockJacobi"):
        fl.lstsq(A, torch.ones(4), solver=make(solver))


def test_a_linear_operator_takes_a_factor():
    pattern, values, b = problem(12, 4)
    matrix = fl.SparseMatrix(values, pattern)
    A = fl.LinearOperator(lambda D, x: D @ x, matrix.to_dense(), 4)
    close(fl.lstsq(A, b, solver=fl.CGLS(preconditioner=fl.GramFactor(matrix))), fl.lstsq(matrix, b), 1e-9)


@pytest.mark.parametrize("solver", [None, fl.Dense(), fl.Direct()], ids=["auto", "dense", "direct"])
@pytest.mark.parametrize(
    "of",
    [lambda A: A, lambda A: A.T, lambda A: A * torch.tensor([1.0, 0, 1, 1])],
    ids=["tall", "wide", "a zero column"],
)
def test_a_gram_factor_needs_full_rank(solver, of):
    A = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A[:, 3] = A[:, 0] - A[:, 1]
    D = of(A)
    matrix = fl.SparseMatrix.from_torch(D.to_sparse())
    with pytest.raises(fl.RankDeficientError, match=r"rank 3, not full rank 4\. Try: damp > 0"):
        fl.GramFactor(matrix, solver=solver)
    factor = fl.GramFactor(matrix, damp=0.1, solver=solver)
    x = fl.lstsq(matrix, D.sum(1), damp=0.1, solver=fl.CGLS(preconditioner=factor))
    close(x, fl.lstsq(matrix, D.sum(1), damp=0.1), 1e-9)


def test_a_preconditioner_cannot_hide_a_weak_direction():
    """A factor of another matrix, weak elsewhere, sees little of the direction in which A is weak."""

    def matrix(singular_values):
        g = torch.Generator().manual_seed(12)
        U, V = (torch.linalg.qr(torch.randn(k, 6, generator=g, dtype=torch.float64)).Q for k in (12, 6))
        return fl.SparseMatrix.from_torch((U * torch.tensor(singular_values, dtype=torch.float64) @ V.T).to_sparse()), U

    (A, U), (other, _) = matrix([1, 1, 1, 1, 1, 1e-5]), matrix([1, 1, 1e-5, 4e-7, 4e-7, 4e-7])
    b = 1e-5 * U[:, 5] + 1e-6 * U[:, 0]
    got = fl.solve(A, b, solver=fl.CGLS(preconditioner=fl.GramFactor(other), max_iterations=2000), throw=False)
    want, true = fl.lstsq(A, b), torch.linalg.cond(A.to_dense())
    if got.info.status == "converged":
        assert (got.x - want).norm() / want.norm() <= 10 * got.info.forward_error + 1e-12
        assert true / 30 < got.info.condition < 30 * true
    else:
        assert got.info.forward_error > 1e-8
