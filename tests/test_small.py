"""Whole solves of small systems in compiled code: right and honest as by tensor operations, or left to these."""

import pytest
import torch
from helpers import close, full_pattern, problem
from rationals import distance, gradients, least_squares, size
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import functional_lstsq as fl
from functional_lstsq.linear import small
from functional_lstsq.sparse.kernels import available

pytestmark = pytest.mark.skipif(not available(torch.device("cpu")), reason="no compiled code here")
SHAPES = {"tall": (9, 4), "square": (5, 5), "wide": (4, 9), "one row": (1, 3), "one column": (6, 1)}
DTYPES = (torch.float64, torch.complex128, torch.float32)


@pytest.fixture
def left(monkeypatch):
    """Appended to for each solve: whether it was left to tensor operations."""
    answers, solve = [], small._solve

    def told(*given, **how):
        found = solve(*given, **how)
        answers.append(found[0] is None or len(found[1]) > 0)
        return found

    monkeypatch.setattr(small, "_solve", told)
    return answers


def by_operations(monkeypatch, function):
    with monkeypatch.context() as patch:
        patch.setattr(small, "is_small", lambda *given: False)
        return function()


@pytest.mark.parametrize("damp", [None, 0.5])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(2))
def test_solutions_and_gradients_are_exact_and_claims_are_honest(shape, dtype, weighted, damp, seed, left):
    m, n = SHAPES[shape]
    pattern, values, b = problem(m, n, dtype=dtype, seed=seed, density=0.9)
    A = fl.SparseMatrix(values, pattern)
    eps = torch.finfo(dtype).eps
    c = torch.linspace(1, 2, n, dtype=torch.float64)
    weights = torch.logspace(-2, 1, m, dtype=torch.float64) if weighted else None
    if weighted and m > 1 and (m > n or damp):
        weights[0] = 0
    solution = fl.solve(A, b, damp=damp, weights=weights)
    exact = least_squares(A.to_dense(), b, damp, weights)[0]
    error = 2.0 ** (distance(solution.x, exact) - size(exact))
    assert error <= solution.info.forward_error
    assert solution.info.forward_error < 1e4 * eps
    # Where nothing is left of b, not even rounding, it is for others to say what that means.
    assert (weighted and m < n) or (m == n and damp is None) or not any(left)
    if dtype.is_complex or (damp is None and m < n):
        return
    want = gradients(A.to_dense(), b, c, damp, weights)
    given = (values, b) if weights is None else (values, b, weights)
    f = lambda v, b, w=None: fl.lstsq(fl.SparseMatrix(v, pattern), b, damp=damp, weights=w).double() @ c  # noqa: E731
    for which, name in enumerate(("A", "b", "weights")[: len(given)]):
        got = grad(f, which)(*given)
        got = fl.SparseMatrix(got, pattern).to_dense() if name == "A" else got
        stored = fl.SparseMatrix(torch.ones_like(values), pattern).to_dense() if name == "A" else torch.ones_like(b)
        near = torch.tensor([[float(v) for v in row] for row in want[name]], dtype=torch.float64).reshape(got.shape)
        close(got, near * stored, 1e4 * eps)


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("damp", [None, 0.3, "each"])
@pytest.mark.parametrize("shape", SHAPES)
def test_reports_and_derivatives_are_those_by_tensor_operations(shape, damp, weighted, columns, left, monkeypatch):
    m, n = SHAPES[shape]
    weights = torch.logspace(-2, 1, m, dtype=torch.float64) if weighted else None
    parts = 1 if m == n and damp is None else 2  # where b - A x is nothing, it has no derivative but rounding
    pattern, values, b = problem(m, n, density=0.9)
    b = b if columns == 1 else torch.stack([b, b.flip(0), b**2], 1)
    damp = torch.linspace(0.1, 1, n, dtype=torch.float64) if damp == "each" else damp

    def solve(v=values, b=b):
        return fl.solve(fl.SparseMatrix(v, pattern), b, damp=damp, weights=weights)

    fast, slow = solve(), by_operations(monkeypatch, solve)
    close(fast.x, slow.x, 1e-12)
    close(fast.residual, slow.residual, 1e-12)
    for name in ("condition", "norm"):
        close(getattr(fast.info, name), getattr(slow.info, name), 0.3)
    for name in ("status", "method", "rank", "tried", *(["iterations"] if parts == 2 else [])):
        assert getattr(fast.info, name) == pytest.approx(getattr(slow.info, name)), name
    for transform in (jacrev, jacfwd):
        for which in (0, 1):
            derivative = lambda: transform(lambda v, b: solve(v, b)[:parts], which)(values, b)  # noqa: B023, E731
            for got, want in zip(derivative(), by_operations(monkeypatch, derivative), strict=True):
                close(got, want, 1e-11)


HARD = {
    "ill-conditioned": lambda A, b: (A * torch.logspace(0, -6, 4) @ torch.linalg.qr(torch.vander(b[:4]))[0], b),
    "dependent columns": lambda A, b: (torch.cat([A[:, :3], A[:, :1] + A[:, 1:2]], 1), b),
    "in the range": lambda A, b: (A.round(), A.round() @ torch.tensor([1.0, 2.0, -1.0, 3.0], dtype=b.dtype)),
    "a column of 1e-200": lambda A, b: (A * torch.tensor([1.0, 1.0, 1.0, 1e-200], dtype=b.dtype), b),
    "b of 1e200": lambda A, b: (A, 1e200 * b),
    "b with a NaN": lambda A, b: (A, b / b.new_tensor([0] + [1] * 8) * 0),
}


@pytest.mark.parametrize("damp", [1e-3, 1e-6, 1e-9])
def test_a_residual_far_below_the_rounding_of_b_has_derivatives_of_its_own_size(damp, monkeypatch):
    """W r = -A^-H d^2 x for a square A, and the gradient of |W^(1/2) r|^2 by b is another d^2 below that."""
    A, b = (torch.randn(*s, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) for s in ((3, 3), (3,)))
    w = torch.tensor([0.6, 1.4, 0.9], dtype=torch.float64)
    matrix = fl.SparseMatrix.from_dense(A)
    gradient = lambda: grad(  # noqa: E731
        lambda b: (w * fl.solve(matrix, b, weights=w, damp=damp).residual.square()).sum()
    )(b)
    got, want = gradient(), by_operations(monkeypatch, gradient)
    assert 0 < want.abs().max() < 1e4 * damp**4
    close(got / want.abs().max(), want / want.abs().max(), 1e-9)


@pytest.mark.parametrize(("of_A", "of_b"), [(1e-25, 1e25), (1e25, 1e-25), (1e23, 1e-20)])
def test_what_leaves_the_range_of_single_precision_is_refused(of_A, of_b):
    A = torch.tensor([[1.0, 2], [3, 1], [1, 1]]) * of_A
    with pytest.raises(fl.ConvergenceError, match="range"):
        fl.lstsq(A.to_sparse(), torch.tensor([1.0, 2, 3]) * of_b)


def test_tangents_of_a_hard_member_beside_a_pinned_unknown(monkeypatch):
    """The last is left to tensor operations, whose tangents need what rounding has left out of its solution."""
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64, generator=generator))[0]
    bad, r = torch.stack([U[:, 0], U[:, 0] + 1e-5 * U[:, 1], U[:, 2]], 1), torch.arange(8.0).double().cos()
    b = bad[:, :2].sum(1) + 1e4 * (r - U @ (U.T @ r))
    V = torch.stack([*torch.randn(3, 8, 3, dtype=torch.float64, generator=generator), bad])
    damp = torch.tensor([0.0, 0.0, torch.inf], dtype=torch.float64)
    f = vmap(lambda v: fl.lstsq(fl.SparseMatrix(v.reshape(-1), full_pattern(8, 3)), b, damp=damp))
    along = V[:, :, [1, 0, 2]] * torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64)
    tangent = lambda: jvp(f, (V,), (along,))[1]  # noqa: E731
    close(tangent(), by_operations(monkeypatch, tangent), 1e-10)


@pytest.mark.parametrize("what", HARD)
def test_what_is_not_plain_is_left_to_tensor_operations(what, left, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    A, b = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((9, 4), (9,)))
    A, b = HARD[what](A.double(), b)
    A = fl.SparseMatrix.from_dense(A)

    def answer():
        try:
            return fl.lstsq(A, b)
        except Exception as error:
            return str(error)

    fast, slow = answer(), by_operations(monkeypatch, answer)
    assert fast == slow if isinstance(slow, str) else torch.equal(fast, slow)
    assert all(left) or what == "in the range"


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pinned", [[1], [0, 2], [0, 1, 2, 3]], ids=str)
def test_pinned_unknowns_are_zero_and_the_others_are_solved_for_alone(pinned, weighted, left):
    pattern, values, b = problem(9, 4, density=1.0)
    free = [j for j in range(4) if j not in pinned]
    weights = torch.linspace(0, 2, 9, dtype=torch.float64) if weighted else None
    damp = torch.full((4,), 0.5, dtype=torch.float64)
    damp[pinned] = torch.inf
    A = fl.SparseMatrix(values, pattern)
    solution = fl.solve(A, b, damp=damp, weights=weights)
    assert not solution.x[pinned].any()
    want = fl.lstsq(fl.SparseMatrix.from_dense(A.to_dense()[:, free]), b, damp=0.5, weights=weights) if free else b[:0]
    close(solution.x[free], want, 1e-12)
    close(solution.residual, b - A @ solution.x, 1e-12)
    gradient = grad(lambda v: fl.lstsq(fl.SparseMatrix(v, pattern), b, damp=damp, weights=weights).sum())(values)
    assert not fl.SparseMatrix(gradient, pattern).to_dense()[:, pinned].any()
    assert not any(left)


def test_a_cotangent_that_is_no_number_is_refused_where_all_unknowns_are_pinned():
    pattern, values, b = problem(9, 4)
    _, back = vjp(lambda b: fl.lstsq(fl.SparseMatrix(values, pattern), b, damp=torch.full((4,), torch.inf)), b)
    with pytest.raises(ValueError, match="NaN or infinity"):
        back(torch.full((4,), torch.nan, dtype=torch.float64))


def test_zeros_solve_for_zeros(left):
    pattern, values, b = problem(9, 4)
    A = fl.SparseMatrix(values, pattern)
    solution = fl.solve(A, torch.stack([0 * b, b], 1))
    assert not solution.x[:, 0].any()
    assert solution.info.status == "converged"
    assert not any(left)


def test_a_batch_with_one_bad_member_is_that_of_its_members():
    pattern, values, b = problem(9, 4)
    batch = torch.stack([values, 0 * values, 2 * values])
    solved = vmap(lambda v: fl.solve(fl.SparseMatrix(v, pattern), b, throw=False).x)(batch)
    alone = fl.lstsq(fl.SparseMatrix(values, pattern), b)
    close(solved[0], alone, 1e-12)
    close(solved[2], alone / 2, 1e-12)
    assert solved[1].isnan().all()


def test_members_of_a_batch_that_are_hard_have_the_derivatives_that_they_have_alone(left):
    """The fourth has a condition number of 1e6, so it alone is left to tensor operations."""
    pattern, values, b = problem(9, 4, density=1.0)
    hard = fl.SparseMatrix(values, pattern).to_dense() @ (torch.ones(4, 4).double() + 1e-6 * torch.eye(4).double())
    hard = hard[pattern.indices[0], pattern.indices[1]]
    batch = torch.stack([values, 2 * values, 3 * values, hard, 4 * values])
    f = lambda v: fl.lstsq(fl.SparseMatrix(v, pattern), b)  # noqa: E731
    for transform in (jacrev, jacfwd):
        together = vmap(transform(f))(batch)
        for one, v in zip(together, batch, strict=True):
            close(one, transform(f)(v), 1e-8)
    left.clear()
    vmap(f)(batch)
    assert left == [True, True]  # the batch, and then the one


def test_large_batches_are_worked_through_by_any_number_of_threads(left):
    pattern, values, b = problem(30, 10, density=1.0)
    scales = torch.linspace(0.5, 3, 500, dtype=torch.float64)
    f = lambda v: fl.lstsq(fl.SparseMatrix(v, pattern), b).square().sum()  # noqa: E731
    got = vmap(grad(f))(scales[:, None] * values)
    close(got, grad(f)(values) / scales[:, None] ** 3, 1e-11)
    assert not any(left)
