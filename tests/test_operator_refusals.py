"""What is no linear operator is refused, and what a product takes from elsewhere is not lost."""

import pytest
import torch
from helpers import close, normal
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import functional_lstsq as fl

SOLVER = fl.CGLS(tolerance=1e-14)


def ones(params, x):
    return x * params


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: fl.LinearOperator(3, torch.ones(3), 3), TypeError, "matvec must be callable"),
        (
            lambda: fl.LinearOperator(ones, [1.0], 3),
            TypeError,
            "params must be a pytree of tensors, got .*float",
        ),
        (lambda: fl.LinearOperator(ones, torch.ones(3), 3.0), TypeError, "in_size must be an integer"),
        (lambda: fl.LinearOperator(ones, torch.ones(3), -3), ValueError, "in_size must not be negative"),
        (lambda: fl.LinearOperator(ones, torch.ones(3), 3, torch.int64), TypeError, "dtype must be"),
        (lambda: fl.LinearOperator(ones, torch.ones(3), 3) @ torch.ones(4), ValueError, r"needs X of shape \(3,\)"),
        (lambda: solved(ones, solver=fl.Dense()), TypeError, r"solver must be CGLS\(\) or None for a LinearOperator"),
        (
            lambda: solved(ones, rank_deficient="minimum_norm", solver=fl.CGLS(preconditioner=lambda g: g)),
            ValueError,
            "allows no preconditioner",
        ),
        (lambda: solved(ones, refine="extended"), ValueError, "needs the entries"),
        (lambda: solved(lambda p, x: x[None]), ValueError, r"matvec must give .* shape \(m,\)"),
        (lambda: solved(lambda p, x: (p * x).float()), ValueError, "matvec must give a tensor of torch.float64"),
        (lambda: solved(ones, rmatvec=lambda p, y: y[:2]), ValueError, r"rmatvec must give .* \(3,\).* got .*\(2,\)"),
        (lambda: solved(lambda p, x: x * p / 0), ValueError, "matvec must give finite numbers"),
        (lambda: solved(ones, p=torch.tensor([1.0, torch.nan, 1.0]).double()), ValueError, "A must be finite"),
    ],
)
def test_bad_input_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def solved(matvec, rmatvec=None, p=None, **options):
    p = torch.ones(3, dtype=torch.float64) if p is None else p
    return fl.lstsq(fl.LinearOperator(matvec, p, 3, rmatvec=rmatvec), torch.ones(3).double(), **options)


tall_or_wide = pytest.mark.parametrize("A", [normal(8, 5), normal(5, 8)], ids=["tall", "wide"])


def solve_by(matvec, A, rmatvec=None):
    return fl.lstsq(fl.LinearOperator(matvec, A, A.shape[1], A.dtype, rmatvec=rmatvec), A[:, 0].abs(), solver=SOLVER)


@tall_or_wide
@pytest.mark.parametrize(
    "matvec",
    [
        lambda A, x: A @ torch.tanh(x),
        lambda A, x: A @ x.abs(),
        lambda A, x: A @ (x + 1e-4 * x.sin()),
        lambda A, x: A @ (x + 1e-5 * x.square()),
        lambda A, x: A @ x + 1e-3,
    ],
    ids=["tanh", "abs", "sine", "square", "affine"],
)
def test_maps_that_are_not_linear_are_refused(A, matvec):
    with pytest.raises(ValueError, match="must be linear"):
        solve_by(matvec, A)


@tall_or_wide
def test_maps_that_are_linear_over_real_numbers_alone_are_refused(A):
    with pytest.raises(ValueError, match="must be linear over complex numbers"):
        solve_by(lambda A, x: A @ x.conj(), A.to(torch.complex128))


@tall_or_wide
@pytest.mark.parametrize("error", [1.0, 1e-3, 1e-6])
def test_maps_that_are_not_adjoint_are_refused(A, error):
    with pytest.raises(ValueError, match="rmatvec must be the adjoint of matvec"):
        solve_by(lambda A, x: A @ x, A, lambda A, y: (A * (1 + error * A.cos())).T @ y)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8)], ids=str)
@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
def test_an_adjoint_need_not_be_differentiable(shape, transform):
    p = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b = torch.arange(float(shape[0]), dtype=torch.float64)

    def f(p):
        operator = fl.LinearOperator(lambda p, x: p @ x, p, shape[1], rmatvec=lambda p, y: p.detach().T @ y)
        return fl.lstsq(operator, b, solver=SOLVER)

    close(transform(f)(p), transform(lambda p: torch.linalg.pinv(p) @ b)(p), 1e-8)


IDENTITY, TWO, FOUR = torch.eye(4, dtype=torch.float64), torch.tensor(2.0).double(), torch.arange(4.0).double()


def closed_over(s, p=IDENTITY):
    """x of s p x = (0, 1, 2, 3), by an operator that closes over s."""
    return fl.lstsq(fl.LinearOperator(lambda p, x: s * (p @ x), p, 4), FOUR)


@pytest.mark.parametrize(
    "call",
    [
        lambda f, s: f(s.clone().requires_grad_()),
        lambda f, s: grad(lambda s: f(s).sum())(s),
        lambda f, s: grad(lambda s: f(s, IDENTITY * s).sum())(s),
        lambda f, s: jacfwd(f)(s),
        lambda f, s: vmap(f)(torch.stack([s, s])),
    ],
    ids=["autograd", "grad", "grad, in params too", "jacfwd", "vmap"],
)
def test_derivatives_by_what_is_not_in_params_are_not_lost_silently(call):
    with pytest.raises(ValueError, match="not in params"):
        call(closed_over, TWO)


def test_what_is_not_in_params_may_be_closed_over_where_nothing_is_differentiated():
    close(closed_over(TWO), FOUR / 2, 1e-12)
    with torch.no_grad():
        close(closed_over(TWO.clone().requires_grad_()), FOUR / 2, 1e-12)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    "transform",
    [
        grad,
        jacfwd,
        hessian,
        lambda f: jacrev(jacfwd(f)),
        lambda f: torch.no_grad()(grad(f)),
        lambda f: lambda b: vmap(f)(torch.stack([b, b.cos()])),
        lambda f: lambda b: vmap(hessian(f))(torch.stack([b, b.cos()])),
        lambda f: grad(lambda b: vmap(f)(torch.stack([b, 2 * b])).sum()),
    ],
    ids=["grad", "jacfwd", "hessian", "jacfwd-jacrev", "no_grad", "vmap", "vmap(hessian)", "grad(vmap)"],
)
def test_products_may_close_over_what_a_transformed_function_made(given, transform):
    p, b = normal(8, 5), normal(8, seed=1)

    def f(b):
        s = 2 * torch.ones((), dtype=torch.float64)  # wrapped by every transformation around
        adjoint = (lambda p, y: s * (p.T @ y)) if given else None
        operator = fl.LinearOperator(lambda p, x: s * (p @ x), p, 5, rmatvec=adjoint)
        return fl.lstsq(operator, b, solver=SOLVER).sin().sum()

    def want(b):
        return (torch.linalg.pinv(2 * p) @ b).sin().sum()

    close(transform(f)(b), transform(want)(b), 1e-9)
