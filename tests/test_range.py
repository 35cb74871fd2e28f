"""Numbers at the ends of what a dtype has: results and derivatives that overflow, or vanish, are told."""

import math
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import SOLVERS, close, dense, full_pattern, problem
from torch.func import grad, jacrev, jvp, vmap

import functional_lstsq as fl
from functional_lstsq.errors import TooLarge
from functional_lstsq.sparse import gram_pattern
from functional_lstsq.sparse.lazy import lazy

pattern, values, b = problem(6, 3)
tiny = (values * 1e-25).float()
DERIVATIVES = {
    "grad": lambda b: grad(lambda v: fl.lstsq(fl.SparseMatrix(v, pattern), b).sum())(tiny),
    "jacrev": lambda b: jacrev(lambda v: fl.lstsq(fl.SparseMatrix(v, pattern), b))(tiny),
    "jvp": lambda b: jvp(lambda v: fl.lstsq(fl.SparseMatrix(v, pattern), b), (tiny,), (torch.ones_like(tiny),))[1],
    "vmap": lambda b: vmap(grad(lambda v: fl.lstsq(fl.SparseMatrix(v, pattern), b).sum()))(tiny.expand(2, -1)),
    "weights": lambda b: grad(
        lambda w: fl.lstsq(fl.SparseMatrix((1e-20 * values).float(), pattern), 1e9 * b, weights=w).sum()
    )(torch.full((6,), 1e-20)),
}


@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_a_derivative_that_overflows_single_precision_raises(derivative):
    """x is about 1e15 and more, d x / d A about 1e40, where 3e38 is the largest number."""
    with pytest.raises(fl.ConvergenceError, match=r"leaves the range of torch\.float32"):
        derivative(1e-10 * b.float())


def test_without_exceptions_such_a_derivative_is_nan():
    loss = lambda v: fl.solve(fl.SparseMatrix(v, pattern), 1e-10 * b.float(), throw=False).x.sum()  # noqa: E731
    assert loss(tiny).isfinite()
    got, want = grad(loss)(tiny), grad(loss)(tiny.double())
    assert (got.isnan() == (want.abs() > torch.finfo(torch.float32).max)).all()
    assert 0 < got.isnan().sum() < len(got)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_derivative_that_overflows_double_precision_raises(solver):
    """d x / d A is about 1e200 1e200."""
    loss = lambda v: fl.lstsq(fl.SparseMatrix(v, pattern), b, solver=solver).sum()  # noqa: E731
    assert fl.lstsq(fl.SparseMatrix(1e-200 * values, pattern), b, solver=solver).isfinite().all()
    with pytest.raises(fl.ConvergenceError, match="leave the range of double precision"):
        grad(loss)(1e-200 * values)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_what_no_number_can_hold_is_out_of_range(solver, scale):
    with pytest.raises(fl.ConvergenceError, match=r"leave the range of double precision\. Try: scale unknowns"):
        fl.lstsq(fl.SparseMatrix(values / scale, pattern), b * scale, solver=solver)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_what_no_number_can_hold_in_single_precision(solver):
    small = fl.solve(fl.SparseMatrix(1e30 * values.float(), pattern), 1e-30 * b.float(), solver=solver, throw=False)
    assert small.info.status == "out of range"
    with pytest.raises(fl.ConvergenceError, match="double precision"):
        fl.lstsq(fl.SparseMatrix(1e30 * values.float(), pattern), 1e-30 * b.float(), solver=solver)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("scale", [1e-290, 1e-150, 1.0, 1e150, 1e290])
def test_scales_of_a_problem_change_nothing(solver, scale):
    """As long as the results are numbers: x as accurate, gradients by b, claims."""
    solution = fl.solve(fl.SparseMatrix(scale * values, pattern), scale * b, solver=solver)
    want = fl.solve(fl.SparseMatrix(values, pattern), b, solver=solver)
    close(solution.x, want.x, 1e-14)
    close(solution.residual / scale, want.residual, 1e-13)
    assert solution.info.forward_error < 1e-10


def test_a_solution_that_is_zero_but_for_rounding_says_so():
    A = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1 / 3, 1 / 7], [1 / 7, 1 / 3]], dtype=torch.float64)
    aside = torch.linalg.svd(A).U[:, 2]  # orthogonal to the range, but for its rounding
    solution = fl.solve(A.to_sparse(), aside, solver=fl.CGLS())
    assert solution.info.status == "zero but for rounding"
    assert solution.info.forward_error == math.inf
    assert solution.x.abs().max() < 1e-15
    nothing = fl.solve(A.to_sparse(), torch.zeros(4, dtype=torch.float64))
    assert nothing.info.status == "converged"
    assert nothing.info.forward_error < 1e-15
    # Its derivatives are those of any other.
    close(jacrev(lambda b: fl.lstsq(A.to_sparse(), b))(aside), torch.linalg.pinv(A), 1e-12)


def test_too_large_pickles_and_is_caught_as_either():
    error = pickle.loads(pickle.dumps(TooLarge("much", "less", "more")))
    assert (str(error), error.advice) == ("much. Try: less; more", ("less", "more"))
    assert isinstance(error, MemoryError)
    assert isinstance(error, torch.linalg.LinAlgError)


def test_a_lazy_attribute_is_made_once_and_pickles():
    class Thing:
        made = 0

        @lazy
        def part(self):
            Thing.made += 1
            return [1]

    thing = Thing()
    assert thing.part is thing.part
    assert Thing.made == 1
    assert "part" in vars(thing)


def test_wide_complex_batches_have_no_loop_of_torch():
    """With torch's loop there is a warning, here an error."""
    program = """
import torch, functional_lstsq as fl
pattern = fl.SparsePattern(torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]]), (2, 3))
values = torch.tensor([[1, 2, 3, 4], [1, 1j, 2, 1]], dtype=torch.complex128)
b = torch.ones(2, dtype=torch.complex128)
x = torch.vmap(lambda v: fl.lstsq(fl.SparseMatrix(v, pattern), b))(values)
loss = lambda v: fl.lstsq(fl.SparseMatrix(v, pattern), b).abs().sum()
torch.vmap(torch.func.grad(loss))(values)
print(x.shape)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "torch.Size([2, 3])\n"), done.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("planned", [True, False])
def test_the_gram_matrix_of_a_pattern(dtype, planned, monkeypatch):
    """Its lower triangle by columns, by a plan of sums and where that would be too large."""
    monkeypatch.setattr(gram_pattern.kernels, "available", lambda device: False)
    if not planned:
        monkeypatch.setattr(gram_pattern, "_PAIRS", 0)
    for m, n, density in ((9, 5, 0.4), (4, 6, 0.3), (3, 1, 0.5), (12, 4, 1.0)):
        pattern, values, _ = problem(m, n, density=density, dtype=dtype, seed=n)
        gram = gram_pattern.GramPattern(fl.SparsePattern(pattern.indices, pattern.shape))
        assert (gram._plan is not None) == planned
        A, found = dense(values, pattern), gram.values(values)
        got = torch.zeros(n, n, dtype=dtype).index_put((gram.rows, gram.columns), found)
        close(got, torch.tril(A.mH @ A), 1e-14)
        assert torch.equal((gram.columns * n + gram.rows).sort().values, gram.columns * n + gram.rows)
    empty = fl.SparsePattern(torch.zeros((2, 0), dtype=torch.int64), (3, 2))
    assert len(gram_pattern.GramPattern(empty).values(torch.zeros(0, dtype=dtype))) == 0
    assert full_pattern(3, 2).nnz == 6


@pytest.mark.parametrize("solver", [fl.Dense(), fl.Direct(), None], ids=["dense", "direct", "auto"])
@pytest.mark.parametrize("unit", [1.0, 1 + 1j])
@pytest.mark.parametrize("size", [1e-100, 1.0, 1e100, 1e162, 1e300])
def test_rows_and_columns_of_zeros_hide_no_others(size, unit, solver):
    """Entries of b beside a row of zeros were as large as b, and all others, divided by their rows, nothing."""
    dtype = torch.complex128 if isinstance(unit, complex) else torch.float64
    values = torch.full((2,), unit * size, dtype=dtype)
    A = fl.SparseMatrix(values, fl.SparsePattern(torch.tensor([[0, 0], [0, 1]]), (2, 3)))
    for of_b in (1.0, size):
        b = torch.full((2,), unit * of_b, dtype=dtype)
        solution = fl.solve(A, b, rank_deficient="minimum_norm", solver=solver)
        want = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64) * (of_b / size)
        assert solution.info.status == "converged"
        assert (solution.x - want).abs().max() <= 1e-15 * want.max()
