"""CGLS stopped early, as asked or by its limit: iterates are those of the textbook."""

import pytest
import torch
from helpers import close, normal

import functional_lstsq as fl

K = 4


def textbook(A, b, x, steps=K):
    """Björck, Numerical Methods for Least Squares Problems, SIAM 1996, algorithm 7.4.1."""
    r = b - A @ x
    p = s = A.mH @ r
    for _ in range(steps):
        q = A @ p
        alpha = s.norm().square() / q.norm().square()
        x, r = x + alpha * p, r - alpha * q
        s, before = A.mH @ r, s
        p = s + s.norm().square() / before.norm().square() * p
    return x


def case(shape, dtype=torch.float64, size=1.0):
    """A matrix whose columns have very different norms, and b."""
    A = size * normal(*shape, dtype=dtype) * torch.logspace(0, 3, shape[1], dtype=torch.float64)
    return A, normal(shape[0], seed=1, dtype=dtype)


def as_matrix(A):
    return fl.SparseMatrix.from_torch(A.to_sparse())


def as_operator(A):
    return fl.LinearOperator(lambda A, x: A @ x, A, A.shape[1], A.dtype)


@pytest.mark.parametrize("make", [as_matrix, as_operator])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (20, 20)], ids=str)
@pytest.mark.parametrize("given", ["", "damp", "weights", "damp weights", "x0"])
def test_iterates_are_those_of_the_textbook(make, dtype, shape, given):
    A, b = case(shape, dtype)
    m, n = shape
    damp, weights = 5.0, torch.linspace(0, 2, m, dtype=torch.float64)
    x0 = normal(n, seed=2, dtype=dtype) if "x0" in given else torch.zeros(n, dtype=dtype)
    options = {name: value for name, value in (("damp", damp), ("weights", weights), ("x0", x0)) if name in given}
    root = weights.sqrt() if "weights" in given else torch.ones_like(weights)
    stacked = torch.cat([root[:, None] * A, (damp if "damp" in given else 0.0) * torch.eye(n, dtype=dtype)])
    want = textbook(stacked, torch.cat([root * b, torch.zeros(n, dtype=dtype)]), x0)
    solution = fl.solve(make(A), b, solver=fl.CGLS(steps=K), **options)
    close(solution.x, want, 1e-11)
    close(solution.residual, b - A @ want, 1e-9)
    assert solution.info.status == "stopped as asked"
    assert (int(solution.info.iterations), float(solution.info.forward_error)) == (K, torch.inf)


@pytest.mark.parametrize("make", [as_matrix, as_operator])
@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_sizes_do_not_matter(make, size):
    A, b = case((40, 12), size=size)
    close(size * fl.lstsq(make(A), b, solver=fl.CGLS(steps=K)), textbook(A / size, b, 0 * A[0]), 1e-11)


def test_columns_and_batches_are_iterated_side_by_side():
    A, b = case((40, 12))
    B = torch.stack([b, 0 * b, b.cos()], 1)
    wanted = torch.stack([textbook(A, B[:, 0], 0 * A[0]), 0 * A[0], textbook(A, B[:, 2], 0 * A[0])], 1)
    close(fl.lstsq(as_matrix(A), B, solver=fl.CGLS(steps=K)), wanted, 1e-11)
    close(torch.vmap(lambda A: fl.lstsq(as_operator(A), b, solver=fl.CGLS(steps=K)))(A[None]), wanted.T[:1], 1e-11)


def test_no_products_are_spent_on_anything_else():
    (A, b), calls = case((40, 12)), []

    def forward(A, x):
        calls.append("forward")
        return A @ x

    def backward(A, y):
        calls.append("backward")
        return A.T @ y

    fl.solve(fl.LinearOperator(forward, A, 12, rmatvec=backward), b, solver=fl.CGLS(steps=K))
    assert calls.count("forward") == calls.count("backward") == K + 1  # one shows what shapes come out


def test_a_pair_that_is_not_quite_adjoint_is_taken_where_nothing_is_certified():
    A, b = case((40, 12))
    back = A * (1 + 1e-3 * A.cos())
    operator = fl.LinearOperator(lambda A, x: A @ x, A, 12, rmatvec=lambda A, y: back.T @ y)
    with pytest.raises(ValueError, match=r"rmatvec must be the adjoint of matvec.*CGLS\(steps="):
        fl.lstsq(operator, b)
    close(fl.lstsq(operator, b, solver=fl.CGLS(steps=2)), textbook(A, b, 0 * A[0], 2), 0.01)


def test_a_preconditioner_makes_other_iterates():
    A, b = case((40, 12))
    x = fl.lstsq(as_matrix(A), b, solver=fl.CGLS(steps=1, preconditioner=fl.GramFactor(as_matrix(A))))
    close(x, torch.linalg.lstsq(A, b[:, None]).solution[:, 0], 1e-10)


@pytest.mark.parametrize("make", [as_matrix, as_operator])
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd])
def test_a_derivative_is_refused(make, transform):
    A, b = case((40, 12))
    operand = make(A)
    for throw in (True, False):
        with pytest.raises(fl.ConvergenceError, match="short of the solution, has no derivative here"):
            transform(lambda b, t=throw: fl.solve(operand, b, solver=fl.CGLS(steps=K), throw=t).x)(b)


STOP = fl.CGLS(steps=2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda A, b: fl.CGLS(steps=0), "steps must be above 0"),
        (lambda A, b: fl.CGLS(steps=3, tolerance=1e-3), "give one of them"),
        (lambda A, b: fl.Auto(cgls=STOP), "cgls must have no steps"),
        (lambda A, b: fl.lstsq(A, b, solver=STOP, robust=fl.Huber(1.0)), r"robust needs solutions"),
        (lambda A, b: fl.lstsq(A, b, solver=STOP, bounds=(0, 1)), r"bounds= needs solutions"),
        (lambda A, b: fl.lstsq(A, b, solver=STOP, refine="extended"), "refine='extended' needs a solution"),
        (lambda A, b: fl.lstsq(A, b, solver=STOP, weights=torch.full((40,), torch.inf)), "weights must be finite"),
        (lambda A, b: fl.gauss_newton(lambda x: x - 1, b, solver=STOP), "gauss_newton needs solutions"),
        (lambda A, b: fl.factorize(A, solver=STOP), "factorize needs solutions"),
        (lambda A, b: fl.lstsq(as_operator(A.to_dense() * torch.nan), b, solver=STOP), "A must be finite"),
    ],
)
def test_what_needs_a_solution_refuses_to_stop(call, words):
    A, b = case((40, 12))
    with pytest.raises(ValueError, match=words):
        call(as_matrix(A), b)


@pytest.mark.parametrize("make", [as_matrix, as_operator])
def test_what_was_reached_by_the_limit_is_returned(make):
    A, b = case((40, 12))
    scaled = A / A.norm(dim=0)  # as columns of matrices are, unless steps are asked for
    want = textbook(scaled, b, 0 * A[0], 3) / A.norm(dim=0) if make is as_matrix else textbook(A, b, 0 * A[0], 3)
    solution = fl.solve(make(A), b, solver=fl.CGLS(max_iterations=3), throw=False)
    close(solution.x, want, 1e-11)
    close(solution.residual, b - A @ want, 1e-10)
    assert solution.info.status == "iteration limit reached"
    assert solution.info.forward_error == torch.inf
