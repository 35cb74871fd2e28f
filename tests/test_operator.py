"""LinearOperator: what a SparseMatrix of the same entries gives, by products alone."""

import optree
import pytest
import torch
from helpers import close, dense, problem
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves

import functional_lstsq as fl

SHAPES = [(12, 5), (5, 12), (6, 6)]
SOLVER = fl.CGLS(tolerance=1e-14)


def pair(shape, dtype=torch.float64, *, given=False):
    """(by a SparseMatrix, by a LinearOperator, values, b): functions of values, b and options."""
    pattern, values, b = problem(*shape, dtype=dtype)

    def matvec(params, x):
        return dense(params["values"], pattern) @ x

    def rmatvec(params, y):
        return dense(params["values"], pattern).mH @ y

    def by_matrix(v, b, **options):
        return fl.lstsq(fl.SparseMatrix(v, pattern), b, **options)

    def by_products(v, b, **options):
        adjoint = rmatvec if given else None
        operator = fl.LinearOperator(matvec, {"values": v}, shape[1], v.dtype, rmatvec=adjoint)
        return fl.lstsq(operator, b, solver=SOLVER, **options)

    return by_matrix, by_products, values, b


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("named", [(), ("damp",), ("weights",), ("damp", "weights")], ids=" and ".join)
def test_solutions_and_gradients(shape, dtype, given, named):
    want, got, v, b = pair(shape, dtype, given=given)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    options = {"damp": 0.3, "weights": torch.linspace(0.5, 2, shape[0], dtype=v.real.dtype)}
    options = {name: options[name] for name in named}
    columns = torch.stack([b, b.flip(0)], 1)
    close(got(v, b, **options), want(v, b, **options), tolerance)
    close(got(v, columns, **options), want(v, columns, **options), tolerance)
    gradients = (grad(lambda v, b, f=f: f(v, b, **options).abs().sum(), (0, 1))(v, b) for f in (got, want))
    for one, other in zip(*gradients, strict=True):
        close(one, other, 10 * tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jacrev(f, (0, 1)),
        lambda f: jacfwd(f, (0, 1)),
        lambda f: hessian(lambda v, b: f(v, b).sin().sum(), (0, 1)),
        lambda f: jacrev(jacrev(lambda v, b: f(v, b).sin().sum()), 1),
        lambda f: jacfwd(jacfwd(lambda v, b: f(v, b).sin().sum(), 1)),
        lambda f: grad(lambda v, b: f(v, b, damp=b[0].abs(), weights=b.square() + 1).sum(), (0, 1)),
        lambda f: lambda v, b: jvp(f, (v, b), (v.cos(), b.sin())),
        lambda f: lambda v, b: vmap(f)(torch.stack([v, 1.1 * v]), torch.stack([b, b + 1])),
        lambda f: lambda v, b: vmap(f, (None, 0))(v, torch.stack([b, b + 1, b - 1])),
        lambda f: lambda v, b: vmap(f, (0, None))(torch.stack([v, 1.1 * v]), b),
        lambda f: lambda v, b: vmap(grad(lambda v, b: f(v, b).sum()))(torch.stack([v, 1.1 * v]), torch.stack([b, -b])),
        lambda f: lambda v, b: jacfwd(lambda v: vmap(f, (None, 0))(v, torch.stack([b, b + 1])))(v),
    ],
)  # fmt: skip
def test_transformations(shape, transform):
    want, got, v, b = pair(shape)
    for one, other in zip(*(tree_leaves(transform(f)(v, b)) for f in (got, want)), strict=True):
        close(one, other, 1e-8)


@pytest.mark.parametrize("of_params", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("of_operator", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("transform", [lambda f: f, jacrev, jacfwd], ids=["plain", "jacrev", "jacfwd"])
def test_params_are_converted_whatever_the_dtype(of_params, of_operator, given, transform):
    p = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=of_params)
    b = torch.arange(8.0, dtype=of_operator)

    def f(p):
        adjoint = (lambda p, y: p.T @ y) if given else None
        return fl.lstsq(fl.LinearOperator(lambda p, x: p @ x, p, 5, of_operator, rmatvec=adjoint), b)

    def want(p):
        return (torch.linalg.pinv(p.double()) @ b.double()).to(of_operator)

    assert f(p).dtype == of_operator
    tolerance = 1e-5 if torch.float32 in (of_params, of_operator) else 1e-9
    close(transform(f)(p), transform(want)(p), tolerance)


@pytest.mark.parametrize("of_params", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("of_operator", [torch.float32, torch.float64], ids=str)
def test_the_condition_number_of_params_of_any_dtype(of_params, of_operator):
    p = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=of_params)
    condition = fl.condition(fl.LinearOperator(lambda p, x: p @ x, p, 5, of_operator))
    assert 0.1 < condition / torch.linalg.cond(p) < 10


def test_it_is_a_pytree_and_gradients_are_operators():
    def matvec(params, x):
        return params["d"] * x.repeat(2) + params["low"][0].sum() * x.sum()

    params = {"d": torch.linspace(1, 2, 8, dtype=torch.float64), "low": [torch.ones(2, dtype=torch.float64)]}
    A, b = fl.LinearOperator(matvec, params, 4), torch.arange(8.0, dtype=torch.float64)
    D = torch.stack([A @ e for e in torch.eye(4, dtype=torch.float64)], 1)
    close(fl.lstsq(A, b), torch.linalg.lstsq(D, b[:, None]).solution[:, 0], 1e-12)
    close(A @ torch.ones(4, 3), D.sum(1)[:, None].expand(-1, 3), 1e-12)
    gradient = grad(lambda A: fl.lstsq(A, b).sum())(A)
    assert isinstance(gradient, fl.LinearOperator)
    assert gradient.params["low"][0].shape == (2,)
    assert optree.tree_map(lambda t: 2 * t, A).params["d"][0] == 2
    moved = vmap(lambda s: fl.lstsq(fl.LinearOperator(matvec, {"d": s * params["d"], "low": params["low"]}, 4), b))
    assert moved(torch.tensor([1.0, 2.0], dtype=torch.float64)).shape == (2, 4)


def test_costs_one_further_solve_and_one_probe():
    calls = {"forward": 0}

    def matvec(params, x):
        calls["forward"] += 1
        return torch.cat([params * x, x])

    d, b = torch.linspace(1, 3, 5, dtype=torch.float64), torch.arange(10.0, dtype=torch.float64)
    f = lambda d: fl.lstsq(fl.LinearOperator(matvec, d, 5, rmatvec=lambda d, y: d * y[:5] + y[5:]), b)  # noqa: E731
    f(d)
    alone = calls["forward"]
    jacrev(f)(d)
    assert calls["forward"] - alone < 1.8 * alone


@pytest.mark.parametrize("size", [1e-200, 1.0, 1e150])
def test_info_is_honest(size):
    g = torch.Generator().manual_seed(0)
    A = torch.randn(60, 20, generator=g, dtype=torch.float64) @ torch.diag(torch.logspace(0, -4, 20).double())
    x = torch.randn(20, generator=g, dtype=torch.float64)
    b = A @ x + 1e-3 * torch.randn(60, generator=g, dtype=torch.float64)
    want = torch.linalg.lstsq(A, b[:, None], driver="gelsd").solution[:, 0]
    solution = fl.solve(fl.LinearOperator(lambda A, x: A @ x, size * A, 20), b)
    error = (solution.x * size - want).norm() / want.norm()
    assert solution.info.status == "converged"
    assert error <= 10 * solution.info.forward_error + 1e-10  # the reference is not exact either
    assert solution.info.forward_error < 1e-6
    true = torch.linalg.cond(A)
    assert true / 10 < solution.info.condition < 10 * true
    close(solution.residual, b - A @ want, 1e-9)


def test_what_has_no_full_rank_or_is_too_hard_is_refused():
    A = torch.ones(6, 3, dtype=torch.float64)
    A[0, 0] = 2
    with pytest.raises(fl.RankDeficientError):
        fl.lstsq(fl.LinearOperator(lambda A, x: A @ x, A, 3), torch.arange(6.0))
    hard = torch.vander(torch.linspace(0, 1, 30, dtype=torch.float64), 20)
    with pytest.raises(torch.linalg.LinAlgError):
        fl.lstsq(fl.LinearOperator(lambda A, x: A @ x, hard, 20), torch.ones(30))


def test_jacobian_operator():
    def function(p):
        return torch.cat([p.square(), p.sin(), p.prod()[None]])

    p, b = torch.tensor([0.3, 0.7, 1.1], dtype=torch.float64), torch.arange(7.0, dtype=torch.float64)
    step = lambda p: fl.lstsq(fl.JacobianOperator(function, p), b)  # noqa: E731
    want = lambda p: torch.linalg.pinv(jacfwd(function)(p)) @ b  # noqa: E731
    close(step(p), want(p), 1e-10)
    close(jacrev(step)(p), jacrev(want)(p), 1e-8)
    close(jacfwd(step)(p), jacrev(want)(p), 1e-8)
    with pytest.raises(TypeError, match="point must be a tensor of shape"):
        fl.JacobianOperator(function, 3.0)


def test_a_start_for_a_wide_operator_is_left_alone():
    _, got, v, b = pair((5, 12))
    close(got(v, b, x0=torch.ones(12, dtype=torch.float64)), got(v, b), 1e-12)
