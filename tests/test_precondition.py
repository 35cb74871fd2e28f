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


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("damp", [None, 1e-3])
def test_block_jacobi(dtype, damp):
    A, groups, b = coupled(dtype=dtype)
    want = fl.solve(A, b, damp=damp)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(1))
    for preconditioner in (fl.BlockJacobi(groups), fl.BlockJacobi(groups + 7), fl.GramFactor(A, damp=damp)):
        got = fl.solve(A, b, damp=damp, solver=fl.CGLS(preconditioner=preconditioner))
        close(got.x, want.x, 1e-9)
        assert int(got.info.iterations) <= 10
        assert want.info.condition / 10 < got.info.condition < 10 * want.info.condition
        assert (got.x - want.x).norm() / want.x.norm() <= 10 * got.info.forward_error + 1e-14
    shuffled = fl.SparseMatrix.from_torch(A.to_dense()[:, order].to_sparse())
    got = fl.solve(shuffled, b, damp=damp, solver=fl.CGLS(preconditioner=fl.BlockJacobi(groups[order])))
    close(got.x, want.x[order], 1e-9)


def test_without_one_it_takes_far_more_iterations():
    A, groups, b = coupled()
    plain = fl.solve(A, b, solver=fl.CGLS()).info.iterations
    assert plain > 20 * fl.solve(A, b, solver=fl.CGLS(preconditioner=fl.BlockJacobi(groups))).info.iterations


@pytest.mark.parametrize("shape", [(60, 20), (20, 60)])
def test_a_callable_under_transformations(shape):
    pattern, values, b = problem(*shape)
    A, n = fl.SparseMatrix(values, pattern), min(shape)
    dense = A.to_dense()
    gram = dense.T @ dense if shape[0] > n else dense @ dense.T
    M = torch.linalg.inv(gram + 0.1 * torch.eye(n, dtype=torch.float64))
    V, B = torch.stack([values, values * 1.01]), torch.stack([b, b + 1])
    for solver in (
        fl.CGLS(preconditioner=lambda g: M @ g),
        fl.CGLS(preconditioner=fl.GramFactor(A)),
        fl.CGLS(preconditioner=fl.BlockJacobi(torch.arange(n) // 3)),
    ):

        def f(v, b, solver=solver):
            return fl.lstsq(fl.SparseMatrix(v, pattern), b, solver=solver)

        def want(v, b):
            return fl.lstsq(fl.SparseMatrix(v, pattern), b)

        close(vmap(f)(V, B), vmap(want)(V, B))
        close(vmap(f, (None, 0))(values, B), vmap(want, (None, 0))(values, B))
        for transform in (jacrev, jacfwd):
            close(transform(f)(values, b), transform(want)(values, b))
        twice = grad(lambda v, f=f: grad(lambda v: f(v, b).sum())(v).square().sum())
        close(twice(values), grad(lambda v: grad(lambda v: want(v, b).sum())(v).square().sum())(values), 1e-7)


def test_a_factor_is_kept_for_near_matrices():
    pattern, values, b = problem(200, 60, density=0.1)
    factor = fl.GramFactor(fl.SparseMatrix(values, pattern))
    near = fl.SparseMatrix(values * (1 + 1e-3 * torch.linspace(-1, 1, len(values), dtype=torch.float64)), pattern)
    got = fl.solve(near, b, solver=fl.CGLS(preconditioner=factor))
    close(got.x, fl.lstsq(near, b), 1e-11)
    assert 2 * got.info.iterations < fl.solve(near, b, solver=fl.CGLS()).info.iterations


def test_solvers_made_anew_for_every_step_are_not_kept():
    from functional_lstsq import holder

    pattern, values, b = problem(12, 4)
    A = fl.SparseMatrix(values, pattern)
    before = len(holder._named)
    for _ in range(5):
        x = fl.lstsq(A, b, solver=fl.CGLS(preconditioner=fl.GramFactor(A)))
    assert x.isfinite().all()
    assert len(holder._named) <= before + 1


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


def test_bad_settings_of_preconditioners_are_refused():
    for groups in (torch.zeros(4), torch.zeros(2, 2, dtype=torch.int64), [0, 1]):
        with pytest.raises(TypeError, match="groups must be an integer tensor"):
            fl.BlockJacobi(groups)
    with pytest.raises(TypeError, match="A must be a SparseMatrix"):
        fl.GramFactor("A")
    pattern, values, _ = problem(12, 4)
    with pytest.raises(TypeError, match="solver must be"):
        fl.GramFactor(fl.SparseMatrix(values, pattern), solver=fl.CGLS())


def test_a_linear_operator_has_no_blocks_and_is_not_touched_to_say_so():
    def matvec(params, x):
        raise AssertionError("there was no need to")

    A, solver = fl.LinearOperator(matvec, torch.ones(4), 4), fl.CGLS(preconditioner=fl.BlockJacobi(torch.arange(4)))
    for given in (solver, fl.Auto(cgls=solver)):
        with pytest.raises(TypeError, match=r"preconditioner must be .* for a LinearOperator, got a BlockJacobi"):
            fl.lstsq(A, torch.ones(4), solver=given)
    pattern, values, b = problem(12, 4)
    matrix = fl.SparseMatrix(values, pattern)
    A = fl.LinearOperator(lambda D, x: D @ x, matrix.to_dense(), 4)
    close(fl.lstsq(A, b, solver=fl.CGLS(preconditioner=fl.GramFactor(matrix))), fl.lstsq(matrix, b), 1e-9)


@pytest.mark.parametrize("solver", [None, fl.Dense(), fl.Direct()])
def test_a_gram_factor_needs_full_rank(solver):
    A = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A[:, 3] = A[:, 0] - A[:, 1]
    for D in (A, A.T, A * torch.tensor([1.0, 0, 1, 1])):
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
