"""What the tests of SciPy's, lineax's and matfree's LSMR ask of operators, posed anew: right, and nothing refused."""

import numpy as np
import pytest
import torch
from helpers import close
from torch.func import grad, jvp, vmap

import functional_lstsq as fl

N = 10
DOWN = torch.arange(N, 0, -1).double()
EYE, ONES = torch.eye(N, dtype=torch.float64), torch.ones(N, N, dtype=torch.float64)


def operator(A):
    return fl.LinearOperator(torch.matmul, A, A.shape[1], A.dtype)


def bidiagonal(m, n):
    """1, 2, ... on the diagonal, 2, 3, ... below it, with as many rows and columns as there are."""
    i, j = torch.arange(m)[:, None], torch.arange(n)
    return torch.where(i == j, j + 1, torch.where(i == j + 1, j + 2, 0)).double()


def pinv(A, b):
    return torch.from_numpy(np.linalg.lstsq(A.numpy(), b.numpy(), rcond=1e-12)[0])


# SciPy: (A, the x that b is made of).
MADE = {
    "identity": (EYE, DOWN),
    "bidiagonal, tall": (bidiagonal(20, N), DOWN),
    "bidiagonal, square": (bidiagonal(N, N), DOWN),
    "complex x": (EYE, DOWN * (1 + 1j)),
    "complex A": (4 * EYE + 1j * ONES, DOWN * (1 + 0j)),
    "complex b": (4 * EYE + ONES, DOWN * (1 + 1j)),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("start", ["none", "zero", "near", "the solution"])
def test_x_is_what_b_was_made_of(name, start):
    A, x = MADE[name]
    b = A.to(x.dtype) @ x
    x0 = {"none": None, "zero": torch.zeros_like(x), "near": x + 0.1, "the solution": x.clone()}[start]
    kept = [None if t is None else t.clone() for t in (A, b, x0)]
    solution = fl.solve(operator(A), b, x0=x0)
    close(solution.x, x, 1e-12)
    assert float(torch.linalg.vector_norm(solution.residual)) <= 1e-10 * float(torch.linalg.vector_norm(b))
    for given, copy in zip((A, b, x0), kept, strict=True):
        assert given is None or torch.equal(given, copy)


def test_zero_gives_zero():
    for A in (EYE, bidiagonal(20, N)):
        solution = fl.solve(operator(A), torch.zeros(len(A), dtype=torch.float64))
        assert not solution.x.any()
        assert int(solution.info.iterations) == 0


def test_one_row_and_one_column():
    row = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    close(fl.lstsq(operator(row), 3 * row[:, 0]), 0.6 * row[0], 1e-15)
    close(fl.lstsq(operator(row.T), row[0].flip(0)), 0.8 * row[0, :1], 1e-15)


def test_a_column_is_as_a_vector():
    b = torch.ones(N, 1, dtype=torch.float64)
    close(fl.lstsq(operator(EYE), b), b, 1e-15)


@pytest.mark.parametrize("damp", [0.1, 1.0, 30.0])
def test_norms_and_the_damped_solution(damp):
    A = bidiagonal(20, N)
    b = torch.ones(20, dtype=torch.float64)
    solution = fl.solve(operator(A), b, damp=damp)
    right = torch.linalg.solve(A.T @ A + damp**2 * EYE, A.T @ b)
    close(solution.x, right, 1e-12)
    close(solution.residual, b - A @ right, 1e-12)
    whole = torch.cat([A, damp * EYE])  # whose norm is estimated from a few products
    assert float(solution.info.norm) == pytest.approx(float(torch.linalg.matrix_norm(whole)), rel=0.2)
    assert float(solution.info.condition) == pytest.approx(float(torch.linalg.cond(whole)), rel=0.5)


# lineax: kinds of operators, and of shapes and ranks.
GENERATOR = torch.Generator().manual_seed(0)
SQUARE = torch.randn(6, 6, generator=GENERATOR, dtype=torch.float64) + 3 * torch.eye(6, dtype=torch.float64)
TALL = torch.randn(9, 6, generator=GENERATOR, dtype=torch.float64)
DIAGONAL = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 4.0], dtype=torch.float64)
POINT = torch.linspace(0.2, 1.2, 6, dtype=torch.float64)


def tridiagonal(parts, x):
    main, upper, lower = parts
    above, below = torch.zeros_like(x), torch.zeros_like(x)
    above[:-1], below[1:] = upper * x[1:], lower * x[:-1]
    return main * x + above + below


def curve(x):
    return torch.cat([TALL @ torch.tanh(x), x.square()])


THREE = (4 + DIAGONAL, torch.ones(5, dtype=torch.float64), -torch.ones(5, dtype=torch.float64))
KINDS = {
    "matrix": (operator(SQUARE), SQUARE),
    "diagonal": (fl.LinearOperator(torch.mul, DIAGONAL, 6), torch.diag(DIAGONAL)),
    "tridiagonal": (
        fl.LinearOperator(tridiagonal, THREE, 6),
        torch.diag(THREE[0]) + torch.diag(THREE[1], 1) + torch.diag(THREE[2], -1),
    ),
    "Jacobian": (fl.JacobianOperator(curve, POINT), torch.func.jacrev(curve)(POINT)),
    "sum": (operator(SQUARE) + fl.LinearOperator(torch.mul, DIAGONAL, 6), SQUARE + torch.diag(DIAGONAL)),
    "difference": (operator(SQUARE) - 0.5 * operator(torch.diag(DIAGONAL)), SQUARE - 0.5 * torch.diag(DIAGONAL)),
    "product": (operator(TALL) @ operator(SQUARE), TALL @ SQUARE),
    "negative": (-operator(SQUARE), -SQUARE),
    "quotient": (operator(SQUARE) / 3.0, SQUARE / 3),
    "adjoint": (operator(TALL).H, TALL.T),
    "stack": (fl.vstack([operator(SQUARE), operator(TALL)]), torch.cat([SQUARE, TALL])),
    "diagonal blocks": (fl.block_diag([operator(SQUARE), operator(TALL)]), torch.block_diag(SQUARE, TALL)),
    "tall": (operator(TALL), TALL),
    "wide": (operator(TALL.T.contiguous()), TALL.T),
}
LOW = {
    "square, singular": TALL[:6, :3] @ TALL[:3],
    "tall, of low rank": TALL[:, :2] @ TALL[:2],
    "wide, of low rank": (TALL[:, :2] @ TALL[:2]).T.contiguous(),
    "a zero column": TALL * torch.tensor([1.0, 1, 0, 1, 1, 1], dtype=torch.float64),
    "zero": torch.zeros(5, 3, dtype=torch.float64),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_operators(name):
    A, dense = KINDS[name]
    b = torch.linspace(-1, 2, dense.shape[0], dtype=torch.float64)
    close(fl.lstsq(A, b), pinv(dense, b), 1e-11)
    many = torch.stack([b, b.flip(0), b.square()])
    close(vmap(lambda b: fl.lstsq(A, b))(many), pinv(dense, many.T).T, 1e-11)


@pytest.mark.parametrize("name", LOW)
def test_least_norm_without_full_rank(name):
    A = LOW[name]
    b = torch.linspace(-1, 2, len(A), dtype=torch.float64)
    close(fl.lstsq(operator(A), b, rank_deficient="minimum_norm"), pinv(A, b), 1e-11)
    consistent = A @ torch.linspace(1, 2, A.shape[1], dtype=torch.float64)
    close(fl.lstsq(operator(A), consistent, rank_deficient="minimum_norm"), pinv(A, consistent), 1e-11)


@pytest.mark.parametrize("power", [1, 2, 3, 4, 5])
def test_condition_numbers(power):
    """Singular values from 1 down to 10^-power, evenly on a logarithmic scale."""
    U, V = torch.linalg.qr(torch.cat([TALL, TALL.square()])).Q, torch.linalg.qr(SQUARE).Q
    A = U @ torch.diag(torch.logspace(0, -power, 6, dtype=torch.float64)) @ V.T
    x = torch.linspace(1, 2, 6, dtype=torch.float64)
    b = A @ x + 0.1 * (torch.ones(18, dtype=torch.float64) - U @ (U.T @ torch.ones(18, dtype=torch.float64)))
    solution = fl.solve(operator(A), b)
    error = float(torch.linalg.vector_norm(solution.x - x) / torch.linalg.vector_norm(x))
    assert error <= float(solution.info.forward_error) <= max(1e-11, 1e-16 * 10.0 ** (2 * power)) * 1e3


# matfree: values, and gradients by the parameters of the products, b and the damping.
SHAPES = {"tall": TALL, "square": SQUARE, "wide": TALL.T.contiguous()}


@pytest.mark.parametrize("damped", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_derivatives_are_those_of_the_pseudoinverse(shape, damped):
    A = SHAPES[shape]
    b, toward = torch.linspace(-1, 2, len(A)).double(), torch.linspace(1, 3, A.shape[1]).double()
    damp = torch.tensor(0.7, dtype=torch.float64)

    def by_products(A, b, damp):
        return fl.lstsq(operator(A), b, damp=damp if damped else None) @ toward

    def by_numbers(A, b, damp):
        added = damp.square() * torch.eye(min(A.shape), dtype=A.dtype) if damped else 0.0
        if A.shape[0] >= A.shape[1]:
            return torch.linalg.solve(A.T @ A + added, A.T @ b) @ toward
        return A.T @ torch.linalg.solve(A @ A.T + added, b) @ toward

    which = (0, 1, 2) if damped else (0, 1)
    close(by_products(A, b, damp), by_numbers(A, b, damp), 1e-12)
    for found, right in zip(grad(by_products, which)(A, b, damp), grad(by_numbers, which)(A, b, damp), strict=True):
        close(found, right, 1e-9)
    directions = torch.ones_like(A), torch.ones_like(b), torch.ones_like(damp)
    close(jvp(by_products, (A, b, damp), directions)[1], jvp(by_numbers, (A, b, damp), directions)[1], 1e-9)


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["by params and b", "real"])
def test_a_real_operator_takes_complex_numbers(dtype):
    seen = []

    def matvec(A, x):
        seen.append(x.dtype)
        return A @ x

    b = torch.linspace(-1, 2, 9).double() * (1 + 2j)
    A = fl.LinearOperator(matvec, TALL, 6, dtype)
    close(fl.lstsq(A, b), pinv(TALL, b), 1e-12)
    toward = torch.linspace(1, 2, 6, dtype=torch.complex128)
    found = grad(lambda T: (fl.lstsq(fl.LinearOperator(matvec, T, 6, dtype), b) * toward).sum().real)(TALL)
    right = grad(lambda T: (torch.linalg.solve(T.T @ T, T.T @ b.real) * toward.real).sum())(TALL)
    close(found, right, 1e-10)
    assert dtype is None or set(seen) == {torch.float64}


def test_real_params_may_make_a_complex_operator():
    A = fl.LinearOperator(lambda scale, x: torch.fft.fft(scale * x), DIAGONAL, 6)
    b = torch.linspace(-1, 2, 6).double() * (1 + 2j)
    close(fl.lstsq(A, b), torch.fft.ifft(b) / DIAGONAL, 1e-13)


KERNEL = torch.tensor([0.25, 0.5, 0.3], dtype=torch.float64)
REAL = {
    "conv1d": (lambda k, x: torch.nn.functional.conv1d(x[None, None], k[None, None], padding=2)[0, 0], KERNEL, 8),
    "rfft": (lambda s, x: torch.fft.irfft(torch.fft.rfft(x)[: len(s)] * s, n=len(x)), 1 + DIAGONAL.abs()[:4], 6),
    "avg_pool1d": (lambda s, x: torch.cat([torch.nn.functional.avg_pool1d((s * x)[None], 2)[0], x]), DIAGONAL, 6),
    "a buffer": (lambda s, x: torch.zeros(6, dtype=torch.float64).index_add_(0, torch.arange(6), s * x), DIAGONAL, 6),
}


@pytest.mark.parametrize("name", REAL)
def test_real_functions_take_complex_numbers_by_their_parts(name):
    matvec, params, n = REAL[name]
    A = fl.LinearOperator(matvec, params, n)
    matrix = torch.stack([matvec(params, e) for e in torch.eye(n, dtype=torch.float64)], 1)
    b = torch.linspace(-1, 2, len(matrix)).double() * (1 + 2j) + 1j
    close(fl.lstsq(A, b), pinv(matrix, b), 1e-10)
    x, rows = b[:n], matrix.to(b.dtype)
    close(A @ x, rows @ x, 1e-12)
    close(A @ torch.stack([x, 1j * x], 1), rows @ torch.stack([x, 1j * x], 1), 1e-12)
    close(A.adjoint(b), rows.mH @ b, 1e-12)
    close(A.H @ b, rows.mH @ b, 1e-12)


def test_a_jacobian_takes_complex_numbers():
    A, dense = KINDS["Jacobian"]
    b = torch.linspace(-1, 2, len(dense)).double() * (1 + 2j)
    close(fl.lstsq(A, b), pinv(dense, b), 1e-11)
