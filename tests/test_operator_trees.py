"""A LinearOperator whose unknowns and right-hand sides are pytrees: as that of vectors, leaf after leaf."""

import pickle

import pytest
import torch
from helpers import close, normal
from torch.func import grad, jacfwd, jacrev, vmap

import functional_lstsq as fl

D = torch.float64
LIKE = {"level": torch.empty(3), "slope": torch.empty(2, 1)}
MATRIX = normal(9, 5)
WEIGHTS = torch.linspace(0.2, 2, 9, dtype=D)


def apart(y):
    return y[:4].reshape(2, 2), {"rest": y[4:]}


def together(tree):
    first, others = tree
    return torch.cat([first.reshape(-1), others["rest"]])


def unknowns(x):
    return {"level": x[:3], "slope": x[3:].reshape(2, 1)}


def vector(tree):
    return torch.cat([tree["level"], tree["slope"].reshape(-1)])


def product(M, x):
    return apart(M @ vector(x))


def adjoint(M, y):
    return unknowns(M.mH @ together(y))


def operator(M=MATRIX, **options):
    return fl.LinearOperator(product, M, LIKE, **options)


def plain(M=MATRIX):
    return fl.SparseMatrix.from_dense(M)


B = normal(9)


@pytest.mark.parametrize("rmatvec", [None, adjoint], ids=["made", "given"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"damp": 0.3},
        {"damp": torch.tensor(0.3, dtype=D)},
        {"damp": torch.linspace(0, 1, 5, dtype=D)},
        {"weights": WEIGHTS},
        {"x0": torch.ones(5, dtype=D)},
    ],
    ids=["plain", "number", "tensor", "each", "weights", "start"],
)
def test_the_solution_is_that_of_vectors(options, rmatvec):
    of_trees = dict(options)
    for name, make in (("damp", unknowns), ("weights", apart), ("x0", unknowns)):
        given = options.get(name)
        if isinstance(given, torch.Tensor) and given.ndim:
            of_trees[name] = make(given)
    found, want = fl.solve(operator(rmatvec=rmatvec), apart(B), **of_trees), fl.solve(plain(), B, **options)
    assert found.x.keys() == LIKE.keys()
    assert found.x["slope"].shape == (2, 1)
    close(vector(found.x), want.x, 1e-10)
    close(together(found.residual), want.residual, 1e-10)
    assert torch.equal(vector(fl.lstsq(operator(rmatvec=rmatvec), apart(B), **of_trees)), vector(found.x))


@pytest.mark.parametrize("along", [jacrev, jacfwd])
def test_derivatives_are_those_of_vectors(along):
    by_M = along(lambda M: vector(fl.lstsq(operator(M), apart(B))))(MATRIX)
    close(by_M, along(lambda M: torch.linalg.lstsq(M, B[:, None]).solution[:, 0])(MATRIX), 1e-8)
    by_b = along(lambda b: vector(fl.lstsq(operator(), b)))(apart(B))
    close(torch.cat([by_b[0].reshape(5, 4), by_b[1]["rest"]], 1), torch.linalg.pinv(MATRIX), 1e-8)
    twice = along(grad(lambda M: vector(fl.lstsq(operator(M), apart(B))).square().sum()))(MATRIX)
    want = along(grad(lambda M: torch.linalg.pinv(M).matmul(B).square().sum()))(MATRIX)
    close(twice, want, 1e-7)


def test_batches_of_right_hand_sides_and_of_operators():
    many = normal(4, 9)
    found = vmap(lambda b: fl.lstsq(operator(), apart(b)))(many)
    close(vmap(vector)(found), many @ torch.linalg.pinv(MATRIX).T, 1e-10)
    matrices = normal(3, 9, 5)
    found = vmap(lambda M: fl.lstsq(operator(M), apart(B)))(matrices)
    close(vmap(vector)(found), torch.linalg.pinv(matrices) @ B, 1e-9)


def test_it_is_a_pytree_of_its_params():
    loss = lambda A: vector(fl.lstsq(A, apart(B))).sum()  # noqa: E731
    close(grad(loss)(operator()).params, grad(lambda M: loss(operator(M)))(MATRIX), 1e-12)
    again = pickle.loads(pickle.dumps(operator()))
    close(vector(fl.lstsq(again, apart(B))), vector(fl.lstsq(operator(), apart(B))), 0)


def test_an_image_is_a_pytree_too():
    def blur(kernel, image):
        return torch.nn.functional.conv2d(image[None, None], kernel[None, None], padding=2)[0, 0]

    kernel, image = torch.rand(3, 3, dtype=D, generator=torch.Generator().manual_seed(0)), normal(5, 4)
    A = fl.LinearOperator(blur, kernel, image)
    close(fl.lstsq(A, A @ image), image, 1e-10)
    close((A.adjoint(A @ image) * image).sum(), (A @ image).square().sum(), 1e-12)
    assert A.shape == (42, 20)


def test_products_and_algebra():
    A, x, y = operator(), normal(5), normal(9)
    close(together(A @ unknowns(x)), MATRIX @ x, 1e-14)
    close(A @ x, MATRIX @ x, 1e-14)
    close(vector(A.adjoint(apart(y))), MATRIX.T @ y, 1e-14)
    close(A.H @ y, MATRIX.T @ y, 1e-14)
    close((A + A) @ x, 2 * MATRIX @ x, 1e-14)
    close(fl.condition(A), fl.condition(A.of_vectors), 0)


def test_keys_may_come_in_any_order():
    A = fl.LinearOperator(lambda M, x: {"b": M[:4] @ x, "a": M[4:] @ x}, MATRIX, torch.empty(5))
    found = fl.lstsq(A, {"a": B[4:], "b": B[:4]})
    close(found, torch.linalg.pinv(MATRIX) @ B, 1e-10)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fl.lstsq(operator(), B), ValueError, r"b must be a pytree of dense tensors of shapes \(\(2, 2\), "),
        (lambda: fl.lstsq(operator(), apart(B)[0]), ValueError, r"b must be a pytree"),
        (lambda: fl.lstsq(operator(), (B[:4].reshape(2, 2), {"other": B[4:]})), ValueError, r"got \(.*'other'"),
        (lambda: fl.lstsq(operator(), apart(B), x0=torch.ones(5)), ValueError, "x0 must be a pytree"),
        (lambda: fl.lstsq(operator(), apart(B), weights=WEIGHTS), ValueError, "weights must be a pytree"),
        (lambda: fl.lstsq(operator(), apart(B), damp=torch.ones(5)), ValueError, "damp must be a pytree"),
        (lambda: fl.LinearOperator(product, MATRIX, {"level": 3}), TypeError, "in_size must be an integer or a pytree"),
        (lambda: fl.LinearOperator(product, MATRIX, ()), TypeError, "in_size must be an integer or a pytree"),
        (lambda: fl.LinearOperator(lambda M, x: 3, MATRIX, LIKE), TypeError, "matvec must give a pytree of dense"),
        (
            lambda: fl.lstsq(operator(rmatvec=lambda M, y: {"level": M[:3, 0]}), apart(B)),
            ValueError,
            "what rmatvec gives must be a pytree of dense tensors of shapes {'level'",
        ),
    ],
)
def test_other_trees_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
