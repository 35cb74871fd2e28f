"""Bounds on the unknowns of a LinearOperator: as on those of the matrix that it stands for."""

import pytest
import torch
from helpers import close, full_pattern, normal
from torch.func import grad, jacfwd, jacrev, vmap

import functional_lstsq as fl

D = torch.float64
M, N = 30, 8
MATRIX, B = normal(M, N), normal(M)
LOWER, UPPER = torch.full((N,), -0.05, dtype=D), torch.full((N,), 0.1, dtype=D)
ONE_FREE = LOWER.index_fill(0, torch.tensor([2]), -torch.inf)
PATTERN = full_pattern(M, N)
OPTIONS = {
    "plain": {},
    "damped": {"damp": 0.5},
    "each damped": {"damp": torch.linspace(0, 2, N, dtype=D)},
    "weighted": {"weights": torch.linspace(0, 2, M, dtype=D)},
    "both": {"weights": torch.linspace(0, 2, M, dtype=D), "damp": torch.tensor(0.3, dtype=D)},
}


def operator(A=MATRIX, **options):
    return fl.LinearOperator(lambda A, x: A @ x, A, A.shape[1], **options)


def matrix(A=MATRIX):
    return fl.SparseMatrix(A.reshape(-1), PATTERN if A.shape == (M, N) else full_pattern(*A.shape))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    "bounds",
    [(LOWER, UPPER), (0, torch.inf), (-torch.inf, 0.02), (ONE_FREE, UPPER), (LOWER, LOWER)],
    ids=["box", "from zero", "up to", "one free", "pinned"],
)
def test_solutions_are_those_of_the_matrix(options, bounds):
    bounds = tuple(
        torch.nan_to_num(t, nan=-0.05, neginf=-torch.inf) if isinstance(t, torch.Tensor) else t for t in bounds
    )
    found = fl.solve(operator(), B, bounds=bounds, **options)
    want = fl.solve(matrix(), B, bounds=bounds, **options)
    close(found.x, want.x, 1e-11)
    close(found.residual, want.residual, 1e-11)
    close(found.info.multipliers, want.info.multipliers, 1e-9)
    assert torch.equal(found.info.active, want.info.active)
    assert torch.equal(found.info.weak, want.info.weak)
    assert found.info.status == "converged"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_are_those_of_the_matrix(options):
    tensors = {name: t for name, t in options.items() if isinstance(t, torch.Tensor)}

    def loss(make, A, b, lower, tensors):
        return fl.lstsq(make(A), b, bounds=(lower, UPPER), **(options | tensors)).pow(3).sum()

    found, want = (
        grad(lambda *given: loss(make, *given), (0, 1, 2, 3))(MATRIX, B, LOWER, tensors)  # noqa: B023
        for make in (operator, matrix)
    )
    for a, b in zip(found[:3], want[:3], strict=True):
        close(a, b, 1e-9)
    for name in tensors:
        close(found[3][name], want[3][name], 1e-9)


@pytest.mark.parametrize("outer", [jacfwd, jacrev])
def test_second_orders_are_those_of_the_matrix(outer):
    def slope(make):
        return outer(grad(lambda A: fl.lstsq(make(A), B, bounds=(LOWER, UPPER)).pow(3).sum()))(MATRIX)

    close(slope(operator), slope(matrix), 1e-8)


def test_batches_and_columns_have_sets_of_their_own():
    many, matrices, lowest = normal(5, M), normal(4, M, N), torch.linspace(-1, 0, 3, dtype=D)

    def each(make):
        yield fl.lstsq(make(MATRIX), many.T, bounds=(LOWER, UPPER)).T
        yield vmap(lambda b: fl.lstsq(make(MATRIX), b, bounds=(LOWER, UPPER)))(many)
        yield vmap(lambda A: fl.lstsq(make(A), B, bounds=(LOWER, UPPER)))(matrices)
        yield vmap(lambda t: fl.lstsq(make(MATRIX), B, bounds=(t * torch.ones(N), 0.1)))(lowest)
        yield vmap(grad(lambda A, b: fl.lstsq(make(A), b, bounds=(LOWER, UPPER)).sum(), 1))(matrices, many[:4])

    for found, want in zip(each(operator), each(matrix), strict=True):
        close(found, want, 1e-10)


def test_a_wide_operator_whose_bounds_make_the_answer_unique():
    A, b = normal(5, N), normal(5)
    close(fl.lstsq(operator(A), b, bounds=(0, 1)), fl.lstsq(matrix(A), b, bounds=(0, 1)), 1e-10)


def test_products_in_numpy_and_in_single_precision():
    def by_numpy(A, x):
        return torch.from_numpy(A.numpy() @ x.numpy())

    foreign = fl.LinearOperator(by_numpy, MATRIX, N, rmatvec=lambda A, y: by_numpy(A.T, y))
    want = fl.lstsq(matrix(), B, bounds=(LOWER, UPPER))
    close(fl.lstsq(foreign, B, bounds=(LOWER, UPPER)), want, 1e-10)
    single = fl.lstsq(operator(MATRIX.float()), B.float(), bounds=(LOWER.float(), UPPER.float()))
    assert single.dtype == torch.float32
    close(single.double(), want, 1e-5)


def test_bounds_of_a_pytree():
    def product(A, x):
        return {"all": A @ torch.cat([x["a"], x["b"]])}

    A = fl.LinearOperator(product, MATRIX, {"a": torch.empty(3), "b": torch.empty(5)})
    lower = {"a": LOWER[:3], "b": LOWER[3:]}
    found, want = fl.solve(A, {"all": B}, bounds=(lower, 0.1)), fl.solve(matrix(), B, bounds=(LOWER, 0.1))
    close(torch.cat([found.x["a"], found.x["b"]]), want.x, 1e-10)
    assert torch.equal(found.info.active, want.info.active)


def test_where_a_bound_is_touched_freely_there_is_no_derivative():
    x = 0.05 * (torch.arange(N) > 2).to(D)
    b = MATRIX @ x
    assert fl.solve(operator(), b, bounds=(0, 1)).info.weak.tolist() == [True] * 3 + [False] * 5
    with pytest.raises(fl.ConvergenceError, match=r"x has no derivative.*\(0, 1, 2\)"):
        grad(lambda b: fl.lstsq(operator(), b, bounds=(0, 1)).sum())(b)
    slope = grad(lambda b: fl.solve(operator(), b, bounds=(0, 1), throw=False).x.sum())(b)
    assert bool(slope.isnan().all())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"bounds": (1, 0)}, ValueError, "bounds must be lower <= upper"),
        ({"bounds": (torch.zeros(3), 1)}, ValueError, "the lower bound must be a number or of shape"),
        ({"bounds": (0, 1), "damp": torch.full((N,), torch.inf)}, ValueError, "damp must be finite"),
        ({"bounds": (0, 1), "rank_deficient": "minimum_norm"}, ValueError, "bounds allow no rank_deficient"),
        ({"bounds": (0, 1), "solver": fl.CGLS(steps=3)}, ValueError, "stops short"),
        ({"bounds": (0, 1), "robust": fl.Huber(1.0)}, (TypeError, ValueError), "robust"),
    ],
)
def test_bad_input_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        fl.lstsq(operator(), B, **options)
