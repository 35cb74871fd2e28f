"""Right or refused, and honest about it: from well to ill-conditioned, with small and large residuals."""

import itertools

import mpmath
import numpy as np
import pytest
import rationals
import torch
from helpers import SOLVERS, full_pattern, with_singular_values
from rationals import gradients
from references import distance, exact, householder

import functional_lstsq as fl

CONDITIONS = [1.0, 1e2, 1e4, 1e6, 1e8, 1e10, 1e12, 1e14]
EPS = {torch.float64: 2.2e-16, torch.float32: 1.2e-7}
FLOOR = {torch.float64: 1e-9, torch.float32: 1e-6}  # relative errors that are always good enough


@pytest.mark.parametrize("solver", [*SOLVERS, "default"])
@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "condition", [c if k % 2 else pytest.param(c, marks=pytest.mark.slow) for k, c in enumerate(CONDITIONS)]
)
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
            # Only where QR is of no use either, or the matrix is singular in the precision of its entries.
            smallest, largest = torch.linalg.svdvals(A.double() / torch.linalg.vector_norm(A.double(), dim=0))[[-1, 0]]
            useless = max(errors) > EPS[dtype] ** (1 / 3) / 10 or smallest < EPS[dtype] * largest
            assert useless or solver == "cgls"  # which is refused more, for want of a factor
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


@pytest.mark.parametrize("solver", [fl.Dense(), fl.Direct()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("condition", [1e2, 1e6, 1e10, 1e12])
@pytest.mark.parametrize("damp", [None, 1e-6])
def test_extended_precision_reaches_the_rounding_of_the_answer(solver, dtype, condition, damp):
    """Errors of a few eps in x, the residual and both gradients, with a residual as large as b."""
    m, n = 20, 6
    A, pattern = with_singular_values(np.logspace(0, -np.log10(condition), n), m, seed=3)
    generator = torch.Generator().manual_seed(1)
    A = A.to(dtype) * torch.exp(1j * torch.rand(m, 1, generator=generator)).to(dtype) if dtype.is_complex else A
    b, w = (torch.randn(k, generator=generator, dtype=dtype) for k in (m, n))
    with mpmath.workdps(60):
        M, B, W = (mpmath.matrix(t.tolist()) for t in (A, b, w))
        gram = M.H * M + mpmath.mpf(damp or 0) ** 2 * mpmath.eye(n)
        x, back = mpmath.lu_solve(gram, M.H * B), mpmath.lu_solve(gram, W)
        r, by_b = B - M * x, M * back
        by_A = -by_b * x.H + r * back.H
        want = [np.array(t.tolist(), dtype=complex) for t in (x, r, by_A, by_b)]

    def loss(values, b):
        solution = fl.solve(fl.SparseMatrix(values, pattern), b, solver=solver, refine="extended", damp=damp)
        return (solution.x.conj() * w).sum().real, solution

    (got_A, got_b), solution = torch.func.grad(loss, (0, 1), has_aux=True)(A.reshape(-1), b)
    for mine, right in zip((solution.x, solution.residual, got_A.view(m, n), got_b), want, strict=True):
        assert distance(mine.numpy().reshape(right.shape), right) < 4 * EPS[torch.float64]
    assert float(solution.info.forward_error) < 1e-15


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


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("signs", list(itertools.product((1.0, -1.0), repeat=2)))
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


HARDLY_DAMPED = [
    ([[-1.0, 3.0]], [-4.0], [1e-10, 1e-10]),
    ([[-2.0, -2.0, 1.0], [-2.0, -2.0, -2.0]], [2.0, 4.0], [1e-11, 1e-11, 1e-11]),
    ([[2.0, -2.0, 2.0], [0.0, 3.0, -3.0]], [2.0, 1.0], [0.0, 0.0, 3e-14]),
    ([[-2.0, -3.0, 1.0]], [1.0], [3e-11, 1e-10, 2e-11]),
    ([[1.0, 2.0, 2.0, -1.0], [3.0, 0.0, 1.0, 1.0]], [2.0, -3.0], [1e-12, 1e-12, 2e-12, 3e-12]),
]


@pytest.mark.parametrize("solver", [fl.Dense(), fl.Direct(), None], ids=["dense", "direct", "auto"])
@pytest.mark.parametrize(("A", "b", "damp"), HARDLY_DAMPED)
def test_directions_that_a_small_damping_determines(A, b, damp, solver):
    """Errors were 3e-12 to 8e-8 where some 1e-15 were claimed."""
    A, b, damp = (torch.tensor(numbers, dtype=torch.float64) for numbers in (A, b, damp))
    both = torch.cat([A, torch.diag(damp)]), torch.cat([b, torch.zeros_like(damp)])
    want, *_ = rationals.least_squares(*both)
    solution = fl.solve(A.to_sparse(), b, damp=damp, solver=solver)
    error = 2 ** (rationals.distance(solution.x[:, None], want) - rationals.size(want))
    assert error <= 1e-14
    assert error <= 10 * float(solution.info.forward_error)


def test_single_precision_with_weights_is_honest():
    A, pattern = with_singular_values(np.logspace(0, -4, 4), 20, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    b, w = torch.randn(20, generator=generator), torch.rand(20, generator=generator) + 0.1
    solution = fl.solve(fl.SparseMatrix(A.reshape(-1), pattern), b, weights=w)
    root = w.double().sqrt()[:, None]
    want = torch.linalg.pinv(root * A.double()) @ (root[:, 0] * b.double())
    assert float((solution.x - want).norm() / want.norm()) <= 10 * float(solution.info.forward_error) < 1e-6


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
    got = torch.func.grad(lambda v: fl.lstsq(fl.SparseMatrix(v, pattern), b) @ w)(A[rows, columns])
    want = torch.tensor(exact(A, b, w)[1])[rows, columns]
    assert float((got - want).norm() / want.norm()) < 1e-9
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


def test_a_gradient_that_rounding_spoils_is_told_what_helps():
    """Two blocks without a common row or column, the gradient that of the second, the errors those of the first."""

    def blocks(condition):
        H, _ = with_singular_values(np.logspace(0, -np.log10(condition), 10), 20, seed=1)
        b = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return torch.block_diag(H, H), torch.cat([b, 1e-6 * H.sum(1)]), torch.cat([torch.zeros(10), torch.ones(10)])

    def gradient(A, b, w, refine):
        matrix = fl.SparseMatrix.from_torch(A.to_sparse())
        return torch.func.grad(lambda A: fl.lstsq(A, b, refine=refine) @ w.double())(matrix).values

    def advised(*args):
        with pytest.raises(fl.ConvergenceError, match="solved for the gradient by A") as error:
            gradient(*args)
        assert "scale unknowns and equations" in str(error.value)
        return "extended" in str(error.value)

    mild, (A, b, w) = blocks(1e2), blocks(1e6)
    assert advised(*mild, "auto")
    assert gradient(*mild, "extended").isfinite().all()
    # Where it takes extended precision anyway the errors of the first block do not reach the second.
    want = gradients(A[20:, 10:], b[20:], w[10:].double())["A"]
    for refine in ("auto", "extended"):
        found = gradient(A, b, w, refine)
        assert not found[:200].any()
        assert rationals.distance(found[200:].view(20, 10), want) < rationals.size(want) - 40
    x, equations = torch.linalg.lstsq(A, b[:, None]).solution[:, 0].abs(), torch.ones(40, 1, dtype=torch.float64)
    equations[20:] = 1e6
    scaled = gradient(equations * A * x, equations[:, 0] * b, w * x, "auto")
    assert scaled.isfinite().all()
