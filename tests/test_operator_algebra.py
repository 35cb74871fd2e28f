"""Sums, products, multiples, adjoints and stacks of operators, with matrices among them: what dense ones give."""

from types import SimpleNamespace

import pytest
import torch
from helpers import close, dense, normal, problem
from torch.func import grad, jacfwd, jacrev, vmap

import functional_lstsq as fl

SOLVER = fl.CGLS(tolerance=1e-14)


def operator(values, pattern, *, given):
    """Known by its products, with its adjoint `given` or made by torch."""

    def matvec(v, x):
        return dense(v, pattern) @ x

    def rmatvec(v, y):
        return dense(v, pattern).mH @ y

    return fl.LinearOperator(matvec, values, pattern.shape[1], values.dtype, rmatvec=rmatvec if given else None)


# Of a matrix M (8, 4), operators P (8, 4) and Q (4, 4), and a number s; stacks and adjoints as `kind` has them.
COMBINED = {
    "P + M": lambda M, P, Q, s, kind: P + M,
    "M + P": lambda M, P, Q, s, kind: M + P,
    "M - P": lambda M, P, Q, s, kind: M - P,
    "P - M": lambda M, P, Q, s, kind: P - M,
    "s * P": lambda M, P, Q, s, kind: s * P,
    "P / 2": lambda M, P, Q, s, kind: P / 2,
    "-P": lambda M, P, Q, s, kind: -P,
    "M @ Q": lambda M, P, Q, s, kind: M @ Q,
    "P @ Q": lambda M, P, Q, s, kind: P @ Q,
    "P.H @ M": lambda M, P, Q, s, kind: kind.H(P) @ M,
    "P.T @ P": lambda M, P, Q, s, kind: P.T @ P + Q,
    "P.H": lambda M, P, Q, s, kind: kind.H(P),
    "P.T": lambda M, P, Q, s, kind: P.T,
    "vstack": lambda M, P, Q, s, kind: kind.vstack([P, s * Q, M]),
    "hstack": lambda M, P, Q, s, kind: kind.hstack([M, P, P]),
    "block_diag": lambda M, P, Q, s, kind: kind.block_diag([Q, M, P]),
    "all": lambda M, P, Q, s, kind: kind.vstack([(P + s * M) @ Q, kind.H(M) @ P - Q]),
}


BY_PRODUCTS = SimpleNamespace(vstack=fl.vstack, hstack=fl.hstack, block_diag=fl.block_diag, H=lambda A: A.H)
DENSE = SimpleNamespace(
    vstack=torch.cat,
    hstack=lambda blocks: torch.cat(blocks, 1),
    block_diag=lambda blocks: torch.block_diag(*blocks),
    H=lambda A: A.mH,
)


def both(name, dtype, given):
    """(by products, dense, their arguments): functions of the values of M, P and Q and of s."""
    patterns, values = zip(
        *(problem(*size, dtype=dtype, seed=i)[:2] for i, size in enumerate([(8, 4), (8, 4), (4, 4)])), strict=True
    )

    def by_products(m, p, q, s):
        P, Q = (operator(v, where, given=given) for v, where in ((p, patterns[1]), (q, patterns[2])))
        return COMBINED[name](fl.SparseMatrix(m, patterns[0]), P, Q, s, BY_PRODUCTS)

    def by_dense(m, p, q, s):
        return COMBINED[name](*(dense(v, where) for v, where in zip((m, p, q), patterns, strict=True)), s, DENSE)

    return by_products, by_dense, (*values, torch.tensor(0.5, dtype=torch.float64))


@pytest.mark.parametrize("given", [True, False], ids=["rmatvec", "by vjp"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("name", COMBINED)
def test_products_adjoints_and_derivatives(name, dtype, given):
    by_products, by_dense, arguments = both(name, dtype, given)
    A, D = by_products(*arguments), by_dense(*arguments)
    assert isinstance(A, fl.LinearOperator)
    assert A.shape == D.shape
    X, Y = normal(D.shape[1], 3, dtype=dtype), normal(D.shape[0], 2, dtype=dtype)
    close(A @ X, D @ X, 1e-13)
    close(A.adjoint(Y), D.mH @ Y, 1e-13)
    close(A.T @ Y, D.T @ Y, 1e-13)
    gradients = (
        grad(lambda *a, f=f: (f(*a) @ X).abs().square().sum(), (0, 1, 2, 3))(*arguments)
        for f in (by_products, by_dense)
    )
    for got, want in zip(*gradients, strict=True):
        close(got, want, 1e-12)


@pytest.mark.parametrize("name", ["vstack", "all", "P + M", "s * P", "P @ Q"])
def test_solutions_and_their_derivatives(name):
    by_products, by_dense, arguments = both(name, torch.float64, given=True)
    b = normal(by_dense(*arguments).shape[0])

    def solved(*a):
        return fl.lstsq(by_products(*a), b, solver=SOLVER)

    def wanted(*a):
        return torch.linalg.pinv(by_dense(*a)) @ b

    close(solved(*arguments), wanted(*arguments), 1e-10)
    for got, want in zip(
        jacrev(solved, (0, 1, 2, 3))(*arguments), jacrev(wanted, (0, 1, 2, 3))(*arguments), strict=True
    ):
        close(got, want, 1e-8)
    close(jacfwd(solved, 1)(*arguments), jacfwd(wanted, 1)(*arguments), 1e-8)
    many = torch.stack([arguments[1], 2 * arguments[1]])
    m, _, q, s = arguments
    close(vmap(lambda p: solved(m, p, q, s))(many), vmap(lambda p: wanted(m, p, q, s))(many), 1e-8)


def test_what_is_refused():
    pattern, values, _ = problem(8, 4)
    M, P = fl.SparseMatrix(values, pattern), operator(values, pattern, given=True)
    with pytest.raises(ValueError, match=r"one shape, got \(8, 4\) and \(4, 8\)"):
        P + M.T
    with pytest.raises(ValueError, match="as many rows of B as A has columns, got 8 and 4"):
        P @ M
    with pytest.raises(ValueError, match=r"one dtype, that of the result, got torch.complex128, torch.float64"):
        P + M.to(torch.complex128)
    with pytest.raises(ValueError, match=r"blocks must have one number of columns, got \[4, 8\]"):
        fl.vstack([P, M.T])
    with pytest.raises(ValueError, match=r"s of shape \(\), got \(8,\)"):
        torch.ones(8) * P
    with pytest.raises(ValueError, match=r"needs a real s for an operator of torch.float64, got torch.complex128"):
        1j * P
    with pytest.raises(TypeError, match="unsupported operand"):
        P + 1.0
    with pytest.raises(TypeError, match="got for number 1 a dense tensor"):
        fl.vstack([P, M.to_dense()])


def overwriting(P):
    """Products that overwrite what they are given, into one buffer each, as compiled ones may."""
    buffer = torch.zeros(6, dtype=torch.float64)

    def forward(p, x):
        buffer.copy_(P @ x)
        x.zero_()
        return buffer

    return fl.LinearOperator(forward, (), 4, rmatvec=lambda p, y: P.T @ y)


@pytest.mark.parametrize(
    ("join", "dense"),
    [
        (lambda A: A + A, lambda P: 2 * P),
        (lambda A: fl.vstack([A, A]), lambda P: torch.cat([P, P])),
        (lambda A: fl.hstack([A, 2 * A]), lambda P: torch.cat([P, 2 * P], 1)),
    ],
)
def test_parts_may_overwrite_what_they_are_given_and_gave(join, dense):
    P = normal(6, 4)
    A = overwriting(P)
    close(join(A) @ torch.ones(join(A).in_size), dense(P).sum(1), 1e-14)


@pytest.mark.parametrize("given", [None, torch.float32], ids=str)
@pytest.mark.parametrize("join", [lambda A: 0.5 * A, lambda A: A + A, lambda A: A.H, lambda A: fl.vstack([A, A])])
def test_what_is_made_of_operators_has_their_precision(join, given):
    A = fl.LinearOperator(lambda P, x: P @ x, normal(6, 4).float(), 4, given)
    made = join(A)
    assert made.dtype == torch.float32
    assert (made @ torch.ones(made.in_size, dtype=torch.float64)).dtype == torch.float32


def test_operators_whose_params_are_a_matrix_are_joined():
    P = normal(6, 4)
    A = fl.LinearOperator(lambda S, x: S.matmul(x), fl.SparseMatrix.from_dense(P), 4)
    close((A + A) @ torch.ones(4, dtype=torch.float64), 2 * P.sum(1), 1e-14)
