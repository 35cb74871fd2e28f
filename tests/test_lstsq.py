"""lstsq and solve against dense references: shapes, patterns, dtypes, scalings, errors."""

import pytest
import torch
from helpers import (
    SHARED,
    SOLVERS,
    close,
    dense,
    full_pattern,
    normal,
    problem,
    through_normal_equations,
    with_singular_values,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from test_matrix import DTYPES, matrices

import functional_lstsq as fl

TOLERANCE = {torch.float32: 1e-5, torch.complex64: 1e-5, torch.float64: 1e-9, torch.complex128: 1e-9}


@given(matrices(), st.integers(0, 3), st.booleans(), st.integers(-8, 8), st.integers(0, 100))
def test_random_patterns_are_solved_or_refused(A, k, vector, exponent, seed):
    """Empty rows and columns included; the pseudoinverse in double precision says what is right."""
    A = fl.SparseMatrix(A.values * 10.0**exponent, A.pattern)
    D = dense(A.values, A.pattern).to(torch.promote_types(A.dtype, torch.float64))
    s = torch.linalg.svdvals(D)
    rank = int((s > 1e-5 * s[0]).sum())
    assume(rank == len(s) or s[rank] <= 1e-14 * s[0])  # a rank that rounding does not blur
    b = normal(A.shape[0], *(() if vector else (k,)), dtype=A.dtype, seed=seed)
    want = (torch.linalg.pinv(D, rtol=1e-7) @ b.to(D.dtype)).to(A.dtype)
    tolerance = TOLERANCE[A.dtype] * (1 + float(s[0] / s[max(rank - 1, 0)])) if rank else 1.0
    size = max(float(want.abs().max()), 1e-30) if want.numel() else 1.0
    if rank == min(A.shape):
        close(fl.lstsq(A, b) / size, want / size, tolerance)
    elif b.numel():
        with pytest.raises(fl.RankDeficientError, match=f"rank {rank}"):
            fl.lstsq(A, b)
    close(fl.lstsq(A, b, rank_deficient="minimum_norm") / size, want / size, tolerance)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8, 3), (3, 8), (4, 4), (5, 1), (1, 5), (1, 1)], ids=str)
def test_dtypes_and_shapes(solver, dtype, shape):
    pattern, values, b = problem(*shape, dtype=dtype)
    A = fl.SparseMatrix(values, pattern)
    want = torch.linalg.pinv(dense(values, pattern).to(torch.promote_types(dtype, torch.float64))).to(dtype)
    for right in (b, torch.stack([b, 2 * b], 1), b[:, None][:, :0]):
        x = fl.lstsq(A, right, solver=SOLVERS[solver])
        assert x.dtype == dtype
        close(x, want @ right, TOLERANCE[dtype])


def test_dtypes_are_promoted():
    pattern, values, b = problem(6, 3)
    A = fl.SparseMatrix(values.float(), pattern)
    assert fl.lstsq(A, b).dtype == torch.float64
    assert fl.lstsq(A, b.to(torch.complex64)).dtype == torch.complex64
    assert fl.lstsq(A, torch.arange(6)).dtype == torch.float32
    gradient = torch.func.grad(lambda A: fl.lstsq(A, b).sum())(A)
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(8, 3), (3, 8)], ids=str)
@pytest.mark.parametrize("damped", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_residual_with_weights_and_damp(solver, shape, damped, weighted):
    pattern, values, b = problem(*shape)
    A = fl.SparseMatrix(values, pattern)
    weights = torch.linspace(0.2, 1.2, len(b), dtype=torch.float64)
    settings = ({"damp": 0.4} if damped else {}) | ({"weights": weights} if weighted else {})
    solution = fl.solve(A, b, solver=SOLVERS[solver], **settings)
    close(solution.residual, b - dense(values, pattern) @ solution.x)
    if shape[0] > shape[1] or damped:
        close(solution.x, through_normal_equations(values, pattern, b, **settings))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1e-30), (torch.float32, 1e30), (torch.float64, 1e-200), (torch.float64, 1e200)],
)
def test_extreme_scales(dtype, scale):
    """Entries whose squares overflow or underflow."""
    pattern, values, b = problem(8, 3, dtype=dtype)
    x = fl.lstsq(fl.SparseMatrix(values, pattern), b)
    close(fl.lstsq(fl.SparseMatrix(values * scale, pattern), b) * scale, x, 1e-5)
    close(fl.lstsq(fl.SparseMatrix(values, pattern), b * scale) / scale, x, 1e-5)
    columns = torch.tensor([1.0, scale, 1 / scale], dtype=dtype)
    scaled = fl.SparseMatrix(values * columns[pattern.indices[1]], pattern)
    close(fl.lstsq(scaled, b) * columns, x, 1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solutions_that_are_zero(solver):
    """b orthogonal to the range, b = 0, cotangents without effect: nothing to divide by, and no reason to refuse."""
    A, pattern = with_singular_values([1.0, 0.5, 0.01], 6)
    matrix = fl.SparseMatrix(A.reshape(-1), pattern)
    b = normal(6)
    b = b - A @ torch.linalg.lstsq(A, b[:, None]).solution[:, 0]
    close(fl.lstsq(matrix, b, solver=SOLVERS[solver]), torch.zeros(3, dtype=torch.float64), 1e-9)
    solution = fl.solve(matrix, torch.zeros(6, dtype=torch.float64), solver=SOLVERS[solver])
    assert solution.x.tolist() == [0, 0, 0]
    assert float(solution.info.forward_error) < 1e-15
    gradient = torch.func.grad(lambda A: fl.solve(A, b + 1, solver=SOLVERS[solver]).residual.square().sum())(matrix)
    want = torch.func.grad(lambda A: (b + 1 - A @ (torch.linalg.pinv(A) @ (b + 1))).square().sum())(A)
    close(gradient.values.view(6, 3), want)


def test_throw_false_tells_instead_of_raising():
    values = torch.tensor([1.0, 1.0, 2.0, 2.0], dtype=torch.float64, requires_grad=True)
    solution = fl.solve(fl.SparseMatrix(values, full_pattern(2, 2)), torch.ones(2, dtype=torch.float64), throw=False)
    assert solution.info.status == "rank deficient"
    assert int(solution.info.rank) == 1
    assert solution.x.isnan().all()
    assert float(solution.info.forward_error) == float("inf")
    solution.x.sum().backward()
    assert values.grad.isnan().all()
    both = torch.stack([values.detach(), torch.tensor([1.0, 0.0, 0.0, 1.0]).double()])
    batch = torch.vmap(
        lambda v: fl.solve(fl.SparseMatrix(v, full_pattern(2, 2)), torch.ones(2, dtype=torch.float64), throw=False)
    )(both)
    assert batch.info.rank.tolist() == [1, 2]
    assert batch.x[1].tolist() == [1, 1]
    assert batch.x[0].isnan().all()


PATTERN, VALUES, B = problem(6, 3)
A = fl.SparseMatrix(VALUES, PATTERN)
WITH_NAN = B.index_fill(0, torch.tensor([1]), torch.nan)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fl.lstsq(A.to_dense(), B), TypeError, r"A must be a SparseMatrix, .* got a dense tensor"),
        (lambda: fl.lstsq(A, B[:5]), ValueError, r"b must have shape \(6,\) or \(6, k\) .* got \(5,\)"),
        (lambda: fl.lstsq(A, B[None]), ValueError, r"b must have shape"),
        (lambda: fl.lstsq(A, B[:, None, None]), ValueError, r"use torch\.vmap"),
        (lambda: fl.lstsq(A, B.tolist()), TypeError, r"b must be a dense tensor .* got list"),
        (lambda: fl.lstsq(A, B.half().to_sparse()), TypeError, r"b must be a dense tensor"),
        (lambda: fl.lstsq(A, WITH_NAN), ValueError, r"b must be finite, got NaN"),
        (lambda: fl.lstsq(A, B / 0), ValueError, r"b must be finite, got infinity"),
        (
            lambda: fl.lstsq(fl.SparseMatrix(VALUES * torch.nan, PATTERN), B),
            ValueError,
            r"A must be finite, got NaN",
        ),
        (lambda: fl.lstsq(A, B, damp=-1), ValueError, r"damp must not be negative, got -1"),
        (lambda: fl.lstsq(A, B, damp="1"), TypeError, r"damp must be a non-negative number"),
        (
            lambda: fl.lstsq(A, B, damp=torch.ones(2)),
            ValueError,
            r"damp must be a number or of shape \(3,\).* got \(2,\)",
        ),
        (lambda: fl.lstsq(A, B, damp=float("inf")), ValueError, r"damp must be finite, got infinity"),
        (lambda: fl.lstsq(A, B, weights=B[:2]), ValueError, r"weights must have shape \(6,\)"),
        (lambda: fl.lstsq(A, B, weights=-B.abs()), ValueError, r"weights must not be negative"),
        (lambda: fl.lstsq(A, B, weights=B * 1j), TypeError, r"weights must be a real tensor"),
        (lambda: fl.lstsq(A, B, solver="lsmr"), TypeError, r"solver must be None or a Solver"),
        (lambda: fl.lstsq(A, B, solver=fl.CGLS), TypeError, r"solver must be None or a Solver"),
        (lambda: fl.lstsq(A, B.half()), TypeError, r"A and b must be float32"),
        (lambda: fl.SparsePattern(PATTERN.indices, (6.5, 3)), ValueError, r"shape must be a pair"),
        (lambda: fl.lstsq(A, B, rank_deficient="ignore"), ValueError, r"rank_deficient must be"),
        (lambda: fl.CGLS(tolerance=0.5), ValueError, r"tolerance must be above 0 and below 0.1"),
        (lambda: fl.CGLS(max_iterations=0), ValueError, r"max_iterations must be above 0"),
        (lambda: torch.vmap(lambda b: fl.lstsq(A, b))(torch.stack([B, WITH_NAN])), ValueError, r"b must be finite"),
        (
            lambda: torch.func.grad(lambda v: fl.lstsq(fl.SparseMatrix(v / 0, PATTERN), B).sum())(VALUES),
            ValueError,
            "A ",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("columns", [(), (2,)])
@pytest.mark.parametrize(("m", "n"), [(0, 0), (3, 0), (0, 3)])
def test_empty_sizes(m, n, columns):
    A = fl.SparseMatrix(torch.zeros(0, dtype=torch.float64), fl.SparsePattern(torch.zeros(2, 0).long(), (m, n)))
    b = torch.ones(m, *columns, dtype=torch.float64)
    solution = fl.solve(A, b)
    assert solution.x.shape == (n, *columns)
    assert solution.info.method == "none"
    assert torch.equal(solution.residual, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("solver", SOLVERS)
def test_on_a_gpu(solver):
    for shape in ((40, 10), (10, 40)):
        pattern, values, b = problem(*shape)
        there = pattern.to("cuda")

        def loss(values, b, pattern=pattern):
            return fl.lstsq(fl.SparseMatrix(values, pattern), b, solver=SOLVERS[solver]).sin().sum()

        want = torch.func.hessian(loss)(values, b)
        close(torch.func.hessian(lambda v, b, p=there: loss(v, b, p))(values.cuda(), b.cuda()).cpu(), want)


@pytest.mark.external
@pytest.mark.skipif(not (SHARED / "portfolio.py").exists(), reason="needs the shared matrices")
def test_the_portfolio_of_real_problems():
    import subprocess
    import sys

    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(SHARED / "portfolio.py")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_nonlinear_loss_of_what_failed_has_nan_for_a_gradient():
    flat = torch.ones(3, 2, dtype=torch.float64).to_sparse()
    loss = lambda b: fl.solve(flat, b, throw=False).x.square().sum()  # noqa: E731
    assert torch.func.grad(loss)(torch.ones(3, dtype=torch.float64)).isnan().all()
