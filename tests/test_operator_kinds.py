"""Operators as people have them: in single precision, in NumPy, with sparse tensors, overwriting their argument."""

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from helpers import close, normal
from torch.func import grad, jacfwd, jacrev, vmap

import functional_lstsq as fl

F32, F64 = torch.float32, torch.float64
D = normal(40, 12) * (normal(40, 12, seed=1) > 0) + torch.eye(40, 12, dtype=F64)
S = scipy.sparse.csr_array(D.numpy())
CSR = D.to_sparse_csr()
B = normal(40, 3, seed=2)
FORWARD, BACKWARD = np.empty(40), np.empty(12)


def by_numpy():
    return lambda p, x: torch.from_numpy(S @ x.numpy()), lambda p, y: torch.from_numpy(S.T @ y.numpy())


def by_scipy():
    operator = scipy.sparse.linalg.aslinearoperator(S)
    return (
        lambda p, x: torch.from_numpy(operator.matvec(x.numpy())),
        lambda p, y: torch.from_numpy(operator.rmatvec(y.numpy())),
    )


def by_buffers():
    """As C has it: every product goes into the same memory."""

    def forward(p, x):
        FORWARD[:] = S @ x.numpy()
        return torch.from_numpy(FORWARD)

    def backward(p, y):
        BACKWARD[:] = S.T @ y.numpy()
        return torch.from_numpy(BACKWARD)

    return forward, backward


def by_overwriting():
    def forward(p, x):
        y = D @ x
        x.zero_()
        return y

    def backward(p, y):
        x = D.T @ y
        y[:3] = torch.nan
        return x

    return forward, backward


def by_sparse(layout):
    sparse = D.to_sparse(layout=layout)
    return lambda p, x: sparse @ x, None


KINDS = {
    "numpy": by_numpy,
    "scipy": by_scipy,
    "buffers": by_buffers,
    "overwriting": by_overwriting,
    "csr": lambda: by_sparse(torch.sparse_csr),
    "coo": lambda: by_sparse(torch.sparse_coo),
}


@pytest.fixture(params=list(KINDS))
def operator(request):
    forward, backward = KINDS[request.param]()
    return fl.LinearOperator(forward, (), 12, rmatvec=backward)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: f,
        lambda f: lambda B: f(B[:, 0]),
        lambda f: vmap(f, 1, 1),
        lambda f: lambda B: jacrev(f)(B[:, 0]),
        lambda f: lambda B: jacfwd(f)(B[:, 0]),
        lambda f: vmap(grad(lambda b: f(b).square().sum()), 1),
    ],
    ids=["columns", "alone", "vmap", "jacrev", "jacfwd", "vmap-grad"],
)
def test_solutions_and_derivatives_by_b(operator, transform):
    close(transform(lambda b: fl.lstsq(operator, b))(B), transform(lambda b: torch.linalg.pinv(D) @ b)(B), 1e-9)


def test_products_and_backward(operator):
    close(operator @ B[:12], D @ B[:12], 1e-14)
    b = B[:, 0].clone().requires_grad_()
    fl.lstsq(operator, b, damp=0.5).sum().backward()
    want = torch.linalg.solve(D.T @ D + 0.25 * torch.eye(12), D.T).sum(0)
    close(b.grad, want, 1e-9)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p: fl.LinearOperator(by_numpy()[0], p, 12), ValueError, r"adjoint of matvec \(.*\): pass rmatvec"),
        (lambda p: fl.LinearOperator(lambda p, x: (D @ x).detach(), p, 12), ValueError, "pass rmatvec"),
        (
            lambda p: fl.LinearOperator(lambda p, x: p * by_sparse(torch.sparse_csr)[0](p, x), p, 12),
            TypeError,
            "derivative by params needs a matvec .* use SparseMatrix",
        ),
        (lambda p: fl.LinearOperator(lambda p, x: p @ x, CSR, 12), TypeError, "params .* SparseMatrix"),
        (lambda p: fl.LinearOperator(lambda p, x: D.float() @ x, p, 12), TypeError, "dtype of LinearOperator says"),
        (
            lambda p: fl.LinearOperator(lambda p, x: (D.float() @ x.float()).double(), p, 12),
            ValueError,
            "must be linear, .* by dtype=torch.float32",
        ),
    ],
)
def test_what_cannot_be_done_says_what_can(make, error, words):
    with pytest.raises(error, match=words):
        grad(lambda p: fl.lstsq(make(p), B[:, 0]).sum())(torch.tensor(2.0, dtype=F64))


def with_condition(shape, condition):
    """A float32 matrix, (m, n), of this condition number, and b."""
    r = min(shape)
    U, V = (torch.linalg.qr(normal(size, r, seed=seed)).Q for seed, size in enumerate(shape))
    return ((U * torch.logspace(0, -np.log10(condition), r, dtype=F64)) @ V.T).float(), normal(shape[0], dtype=F32)


@pytest.mark.parametrize("condition", [10, 300])
@pytest.mark.parametrize("shape", [(120, 50), (50, 120)], ids=str)
@pytest.mark.parametrize("of_b", [F32, F64], ids=str)
def test_single_precision_is_told_of_and_taken_for_what_it_is(shape, condition, of_b):
    P, b = with_condition(shape, condition)
    seen = set()

    def forward(p, x):
        seen.add(x.dtype)
        return P @ x

    operator = fl.LinearOperator(forward, (), shape[1], dtype=F32, rmatvec=lambda p, y: P.T @ y)
    solution = fl.solve(operator, b.to(of_b))
    want = torch.linalg.pinv(P.double()) @ b.double()
    error = float((solution.x - want).norm() / want.norm())
    assert seen == {F32}
    assert solution.x.dtype == of_b
    assert error <= 10 * solution.info.forward_error <= max(1e4 * error, 1e-4)


@pytest.mark.parametrize("of_params", [F32, F64], ids=str)
@pytest.mark.parametrize("of_b", [F32, F64], ids=str)
def test_without_a_dtype_it_is_that_of_params_and_b(of_params, of_b):
    P, b = with_condition((60, 20), 10)
    want, seen = torch.promote_types(of_params, of_b), set()

    def forward(P, x):
        seen.update((P.dtype, x.dtype))
        return P @ x

    solve = lambda P: fl.lstsq(fl.LinearOperator(forward, P, 20), b.to(of_b))  # noqa: E731
    x = solve(P.to(of_params))
    assert x.dtype == want
    assert seen == {want}
    close(x, torch.linalg.pinv(P.double()) @ b.double(), 1e-5 if want == F32 else 1e-9)
    by_P = jacrev(solve)(P.to(of_params))
    assert by_P.dtype == of_params
    close(by_P, jacrev(lambda P: torch.linalg.pinv(P) @ b.double())(P.double()), 1e-4 if want == F32 else 1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_single_precision_holds_small_and_large_numbers(size):
    P, b = with_condition((60, 20), 10)
    operator = fl.LinearOperator(lambda P, x: P @ x, P, 20)
    close(fl.lstsq(operator, size * b) / size, torch.linalg.pinv(P.double()) @ b.double(), 1e-5)


@pytest.mark.parametrize("columns", [(), (2,)], ids=str)
def test_zeros_solve_for_zeros_whatever_the_condition(columns):
    operator = fl.LinearOperator(lambda p, x: p * x, torch.logspace(8, 0, 5, dtype=F64), 5)
    solution = fl.solve(operator, torch.zeros(5, *columns, dtype=F64))
    assert not solution.x.any()
    assert (solution.info.status, float(solution.info.forward_error.max())) == ("converged", torch.finfo(F64).eps / 2)
    with pytest.raises(fl.ConvergenceError):
        fl.lstsq(operator, torch.ones(5, *columns, dtype=F64))


def low_rank(shape, rank, dtype=F64):
    """(factors of a matrix without full rank, the operator of such factors, its pseudoinverse)"""
    factors = normal(shape[0], rank, dtype=dtype), normal(rank, shape[1], dtype=dtype, seed=1)

    def operator(factors):
        return fl.LinearOperator(lambda p, x: p[0] @ (p[1] @ x), factors, shape[1])

    return factors, operator, lambda factors: torch.linalg.pinv(factors[0] @ factors[1], rtol=1e-11)


LEAST = {"rank_deficient": "minimum_norm"}


@pytest.mark.parametrize("dtype", [F64, torch.complex128, F32], ids=str)
@pytest.mark.parametrize(("shape", "rank"), [((30, 12), 8), ((12, 30), 8), ((20, 20), 12), ((30, 12), 12)], ids=str)
def test_least_norm(shape, rank, dtype):
    factors, operator, _ = low_rank(shape, rank, dtype)
    b = normal(shape[0], 2, dtype=dtype, seed=2)
    double = torch.promote_types(dtype, F64)
    solution = fl.solve(operator(factors), b, **LEAST)
    want = torch.linalg.pinv(factors[0].to(double) @ factors[1].to(double), rtol=1e-6) @ b.to(double)
    close(solution.x, want, 1e-4 if dtype == F32 else 1e-10)
    assert solution.info.status == "converged"
    assert float((solution.x - want).norm() / want.norm()) <= 10 * float(solution.info.forward_error.max()) + 1e-14
    if rank < min(shape):
        with pytest.raises(fl.RankDeficientError, match="rank_deficient='minimum_norm'"):
            fl.lstsq(operator(factors), b)


@pytest.mark.parametrize("transform", [jacrev, jacfwd, torch.func.hessian])
@pytest.mark.parametrize("shape", [(10, 6), (6, 10)], ids=str)
def test_least_norm_has_the_derivatives_of_the_pseudoinverse(shape, transform):
    factors, operator, inverse = low_rank(shape, 4)
    b = normal(shape[0], seed=2)
    ours = lambda p, b: fl.lstsq(operator(p), b, weights=b.square() + 1, **LEAST).sin().sum()  # noqa: E731

    def dense(p, b):
        root = (b.square() + 1).sqrt()
        return (inverse((root[:, None] * p[0], p[1])) @ (root * b)).sin().sum()

    got, want = (torch.utils._pytree.tree_leaves(transform(f, (0, 1))(factors, b)) for f in (ours, dense))
    for one, other in zip(got, want, strict=True):
        close(one, other, 1e-7)


@pytest.mark.parametrize("smallest", [1e-13, 1e-10, 1e-8])
def test_what_is_neither_rank_nor_null_space_is_refused(smallest):
    U, V = (torch.linalg.qr(normal(30, 10, seed=seed)).Q for seed in (0, 1))
    A = (U * torch.tensor([*[1.0] * 9, smallest], dtype=F64)) @ V.T
    with pytest.raises(fl.ConvergenceError):
        fl.lstsq(fl.LinearOperator(lambda A, x: A @ x, A, 30), normal(30), **LEAST)


def test_damping_of_some_unknowns_leaves_the_least_norm_of_all():
    factors, operator, _ = low_rank((30, 12), 8)
    damp, b = torch.tensor([2.0, 1.0, *[0.0] * 10], dtype=F64), normal(30, seed=2)
    want = torch.linalg.pinv(torch.cat([factors[0] @ factors[1], damp.diag()]), rtol=1e-11)[:, :30] @ b
    close(fl.lstsq(operator(factors), b, damp=damp, **LEAST), want, 1e-10)


def exported(operator, b):
    class Solve(torch.nn.Module):
        def forward(self, params, b):
            return fl.lstsq(fl.LinearOperator(operator, params, 12), b)

    return torch.export.export(Solve(), (D, b)).module()


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: f,
        lambda f: grad(lambda D, b: f(D, b).sin().sum(), (0, 1)),
        lambda f: jacfwd(f, (0, 1)),
        lambda f: lambda D, b: vmap(f, (None, 0))(D, torch.stack([b, b.cos()])),
    ],
    ids=["call", "grad", "jacfwd", "vmap"],
)
def test_an_exported_program_has_its_derivatives(transform):
    program = exported(lambda D, x: D @ x, B[:, 1])
    got, want = (transform(f)(D, B[:, 0]) for f in (program, lambda D, b: torch.linalg.pinv(D) @ b))
    for one, other in zip(*map(torch.utils._pytree.tree_leaves, (got, want)), strict=True):
        close(one, other, 1e-8)


def test_linearize_by_params():
    f = lambda D, b: fl.lstsq(fl.LinearOperator(lambda D, x: D @ x, D, 12), b)  # noqa: E731
    along = D.cos(), B[:, 1]
    _, push = torch.func.linearize(f, D, B[:, 0])
    close(push(*along), torch.func.jvp(lambda D, b: torch.linalg.pinv(D) @ b, (D, B[:, 0]), along)[1], 1e-8)


def test_numpy_is_not_exported_but_refused():
    with pytest.raises(Exception, match=r"numpy|NumPy"):
        exported(by_numpy()[0], B[:, 0])
