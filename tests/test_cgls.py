"""Conjugate gradients: when they end, starts, corrections in single precision."""

import numpy as np
import pytest
import torch
from helpers import SOLVERS, close, problem, with_singular_values

import functional_lstsq as fl
from functional_lstsq.solvers.single_precision import SINGLE_CONDITION, SingleSystem
from functional_lstsq.sparse import plain_products


def test_cgls_says_when_it_runs_out():
    A, pattern = with_singular_values(np.logspace(0, -3, 30), 60)
    matrix, b = fl.SparseMatrix(A.reshape(-1), pattern), torch.ones(60, dtype=torch.float64)
    with pytest.raises(fl.ConvergenceError, match=r"cgls ended after 5 iterations .*iteration limit reached"):
        fl.lstsq(matrix, b, solver=fl.CGLS(max_iterations=5))
    assert fl.solve(matrix, b, solver=fl.CGLS(max_iterations=5), throw=False).info.status == "iteration limit reached"


@pytest.mark.parametrize("solver", [fl.CGLS(max_iterations=5), fl.CGLS()], ids=["limit", "ill-conditioned"])
def test_what_was_not_measured_is_not_told(solver):
    A, pattern = with_singular_values(np.logspace(0, -3 if solver.max_iterations == 5 else -8, 12), 60)
    matrix, b = fl.SparseMatrix(A.reshape(-1), pattern), torch.ones(60, dtype=torch.float64)
    with pytest.raises(fl.ConvergenceError, match="the forward error could not be estimated") as error:
        fl.lstsq(matrix, b, solver=solver)
    for words in ("inf", "optimality", "throw=False"):
        assert words not in str(error.value)
    solution = fl.solve(matrix, b, solver=solver, throw=False)
    close(solution.residual, b - A @ solution.x, 1e-8)
    assert solution.info.forward_error == torch.inf
    assert solution.info.optimality < (0.5 if solver.max_iterations == 5 else 1e-10)
    true = torch.linalg.cond(A / A.norm(dim=0))
    if solver.max_iterations == 5:
        assert f"condition number at least {float(solution.info.condition):.1e}" in str(error.value)
        assert solution.info.condition < 1.01 * true
    else:
        assert "condition number about" in str(error.value)
        assert true / 10 < solution.info.condition < 10 * true
    with pytest.raises(fl.ConvergenceError, match=r"optimality .*throw=False in solve to see how far it came"):
        fl.lstsq(*_easy(), solver=fl.CGLS(accept=1e-17))


def _easy():
    pattern, values, b = problem(30, 10)
    return fl.SparseMatrix(values, pattern), b


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


@pytest.mark.parametrize("diagonal", [[1.0, 1.0], [1.0, 2.0, 4.0], [3.0]], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_matrices_whose_probe_is_solved_exactly(solver, diagonal):
    """Diagonal and one-column matrices: nothing is divided by the zero that is left, and a zero column is seen."""
    D = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    solution = fl.solve(D.to_sparse_csr(), torch.ones(len(D), dtype=torch.float64), solver=SOLVERS[solver])
    assert 1 <= float(solution.info.condition) < 10
    close(solution.x, 1 / D.diagonal())
    singular = torch.diag(torch.tensor([*diagonal, 0.0], dtype=torch.float64)).to_sparse_csr()
    with pytest.raises(fl.RankDeficientError):
        fl.lstsq(singular, torch.ones(len(D) + 1, dtype=torch.float64), solver=SOLVERS[solver])


def test_a_start_saves_iterations_and_changes_nothing_else():
    pattern, values, b = problem(120, 40)
    A, solver = fl.SparseMatrix(values, pattern), fl.CGLS()
    x = fl.lstsq(A, b, solver=solver)
    near = fl.SparseMatrix(values * (1 + 1e-6 * torch.linspace(-1, 1, len(values), dtype=torch.float64)), pattern)
    cold, warm = (fl.solve(near, b, solver=solver, x0=x0) for x0 in (None, x))
    assert int(warm.info.iterations) < int(cold.info.iterations)
    close(warm.x, cold.x, 1e-10)
    close(fl.lstsq(A, b, solver=solver, x0=1e6 * torch.ones_like(x)), x, 1e-9)
    B = torch.stack([b, 2 * b, b.flip(0)])
    X = torch.vmap(lambda b: fl.lstsq(A, b, solver=solver))(B)
    again = torch.vmap(lambda b, x0: fl.solve(A, b, solver=solver, x0=x0))(B, X)
    close(again.x, X, 1e-10)
    assert int(again.info.iterations.max()) < int(cold.info.iterations)
    close(fl.lstsq(A.T, b[:40], x0=b), fl.lstsq(A.T, b[:40]), 1e-10)


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd], ids=["jacrev", "jacfwd"])
def test_a_start_has_no_derivative_and_changes_none(transform):
    pattern, values, b = problem(120, 40)
    f = lambda v, x0: fl.lstsq(fl.SparseMatrix(v, pattern), b, solver=fl.CGLS(), x0=x0)  # noqa: E731
    x = f(values, None)
    close(transform(f)(values, x), transform(f)(values, None), 1e-9)
    assert not transform(f, 1)(values, x).any()


@pytest.mark.parametrize("solver", [fl.Dense(), fl.Direct(), None], ids=["dense", "direct", "auto"])
def test_a_start_that_is_of_no_use_is_left_alone(solver):
    pattern, values, b = problem(120, 40)
    A = fl.SparseMatrix(values, pattern)
    x = fl.lstsq(A, b)
    close(fl.lstsq(A, b, solver=solver, x0=x + 1), x, 1e-10)


@pytest.mark.parametrize(
    ("x0", "error", "words"),
    [
        (3, TypeError, "x0 must be a dense tensor"),
        (torch.zeros(3), ValueError, "x0 must have the shape of x"),
        (torch.full((20,), torch.nan), ValueError, "x0 must be finite"),
        (torch.zeros(20, dtype=torch.complex128), ValueError, "x0 must be torch.float64"),
    ],
)
def test_a_bad_start_is_refused(x0, error, words):
    pattern, values, b = problem(60, 20)
    with pytest.raises(error, match=words):
        fl.lstsq(fl.SparseMatrix(values, pattern), b, x0=x0)


@pytest.mark.parametrize("damp", [None, 0.3])
def test_corrections_in_single_precision(damp, monkeypatch):
    """Answers, gradients and claims are those of double precision, also where columns leave the block one by one."""
    pattern, values, b = problem(600, 100, density=0.1)
    b = torch.stack([b, values.new_zeros(600), fl.SparseMatrix(values, pattern) @ torch.ones(100).double()], 1)

    def loss(values, b):
        solution = fl.solve(fl.SparseMatrix(values, pattern), b, damp=damp, solver=fl.CGLS())
        return solution.x.square().sum(), solution

    wanted = torch.func.grad(loss, argnums=(0, 1), has_aux=True)(values, b)
    monkeypatch.setattr(plain_products, "_SINGLE_ENTRIES", 1)
    used = []
    monkeypatch.setattr(SingleSystem, "solved", lambda self, *run: used.append(1) or solved(self, *run))
    found = torch.func.grad(loss, argnums=(0, 1), has_aux=True)(values, b)
    assert used
    assert float(found[1].info.condition.max()) < SINGLE_CONDITION
    for got, want in zip(found[0], wanted[0], strict=True):
        close(got, want, 1e-10)
    errors = (found[1].x - wanted[1].x).norm(dim=0) / wanted[1].x.norm(dim=0).clamp_min(1e-300)
    assert bool((errors <= 10 * found[1].info.forward_error + 1e-13).all())


solved = SingleSystem.solved


@pytest.mark.parametrize("corner", [0.034, 0.0533, 0.06, 0.09])
def test_singular_values_are_known_where_single_precision_is_given_up(corner, monkeypatch):
    monkeypatch.setattr(plain_products, "_SINGLE_ENTRIES", 1)
    A = torch.tensor([[1.0, 1.0], [0.0, corner]], dtype=torch.float64)
    b = torch.tensor([1.0425133694426776, -0.12853466294343426], dtype=torch.float64)
    solution = fl.solve(A.to_sparse(), b, solver=fl.CGLS())
    scaled = torch.linalg.cond(A / A.norm(dim=0))
    assert scaled / 10 < solution.info.condition < 10 * scaled
    close(solution.x, torch.linalg.solve(A, b), 1e-11)


@pytest.mark.parametrize("size", [1.0, 1e6, 1e160, 1e305])
def test_a_start_that_is_worse_than_none_does_no_harm(size):
    pattern, values, b = problem(30, 10)
    A, x0 = fl.SparseMatrix(values, pattern), torch.full((10,), size, dtype=torch.float64)
    close(fl.lstsq(A, b, solver=fl.CGLS(), x0=x0), fl.lstsq(A, b), 1e-11)
    assert not fl.lstsq(A, 0 * b, solver=fl.CGLS(), x0=x0).any()


@pytest.mark.parametrize("damp", [1e4, 1e8, 1e20])
def test_a_large_damping_is_no_lack_of_rank(damp):
    pattern, values, b = problem(30, 10)
    A = fl.SparseMatrix(values, pattern)
    solution = fl.solve(A, b, damp=damp, solver=fl.CGLS(), throw=False)
    assert solution.info.rank == 10
    assert solution.info.condition < 10
    close(solution.x * damp**2, A.T @ b, 1e-5)


def test_single_precision_that_overflows_is_no_success():
    A = torch.diag(torch.tensor([1e-30, 1.0])).to_sparse()
    with pytest.raises(fl.ConvergenceError):
        fl.lstsq(A, torch.tensor([1e20, 1.0]))
    small = fl.SparsePattern(torch.tensor([[0, 1, 2, 2], [0, 1, 0, 1]]), (3, 2))  # an adjoint may leave the range
    by_b = torch.func.grad(lambda b: fl.lstsq(fl.SparseMatrix(torch.full((4,), 1e-25), small), b).sum())
    assert bool(torch.isfinite(by_b(torch.full((3,), 1e-25))).all())
    large, b = torch.diag(torch.tensor([1e30, 1e30])).to_sparse(), torch.tensor([1e-20, 1e-20])
    with pytest.raises(fl.ConvergenceError, match="leave the range of single precision"):
        fl.lstsq(large, b)
    tiny = fl.solve(large, b, throw=False)
    assert tiny.info.status == "out of range"
    assert tiny.info.forward_error > 0.1  # x is 1e-50, and rounded to zero


def test_a_search_ends_where_rounding_has_taken_over():
    """Of a condition number of 1e14 the gradient blows up by and by; only the limit of iterations ended that once."""
    for seed in range(6):
        A, pattern = with_singular_values(torch.logspace(0, -14, 8, dtype=torch.float64), 12, seed=seed)
        info = fl.solve(fl.SparseMatrix(A.reshape(-1), pattern), A.sum(1), solver=fl.CGLS(), throw=False).info
        assert info.status == "inaccurate"
        assert info.iterations < 5000


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_a_matrix_of_stored_zeros_is_of_rank_zero(shape, dtype):
    """No gradient of a known solution says anything there, so that a search ends before its first iteration."""
    matrix, b = torch.zeros(shape, dtype=dtype), torch.zeros(shape[0], dtype=dtype)
    pattern = fl.SparsePattern(torch.ones(shape).nonzero().T, shape)
    by_b = torch.func.grad(lambda *call, **options: fl.lstsq(*call, **options).abs().sum(), argnums=1)
    for solve in (fl.lstsq, by_b):
        with pytest.raises(fl.RankDeficientError, match="has rank below"):
            solve(fl.SparseMatrix(matrix.reshape(-1), pattern), b, solver=fl.CGLS())
