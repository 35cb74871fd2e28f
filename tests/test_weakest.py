"""The smallest singular values and their vectors: those of a dense decomposition, with derivatives to third order."""

import math

import pytest
import torch
from helpers import close, dense, normal
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import functional_lstsq as fl

F64 = torch.float64


def matrix(m=12, n=6, dtype=F64, seed=0):
    D = normal(m, n, dtype=dtype, seed=seed) * (normal(m, n, seed=seed + 1).abs() < 0.9)
    return fl.SparseMatrix.from_dense(D)


def network(nodes, parts, seed=0):
    """Differences along the edges of a random graph of so many connected parts."""
    g, size = torch.Generator().manual_seed(seed), nodes // parts
    later = torch.arange(1, size)
    tree = torch.stack([(torch.rand(size - 1, generator=g) * later).long(), later])
    more = torch.randint(size, (2, 2 * size), generator=g)
    one = torch.cat([tree, more[:, more[0] != more[1]]], 1)
    ends = torch.cat([one + p * size for p in range(parts)], 1)
    row = torch.arange(ends.shape[1])
    pattern = fl.SparsePattern(torch.stack([row.repeat(2), ends.reshape(-1)]), (len(row), nodes))
    weights = torch.rand(len(row), generator=g, dtype=F64) + 0.5
    return fl.SparseMatrix(torch.cat([weights, -weights]), pattern)


def both(A, k):
    """(by `weakest`, by a dense decomposition): values and vectors in one, as functions of the entries."""
    foremost = fl.weakest(A, k).vectors.abs().argmax(0, keepdim=True)

    def by_weakest(v):
        return torch.cat([part.reshape(-1) for part in fl.weakest(fl.SparseMatrix(v, A.pattern), k)])

    def by_dense(v):
        D = dense(v, A.pattern)
        squares, V = torch.linalg.eigh(D.mH @ D)
        V = V[:, :k] * torch.sgn(V[:, :k].gather(0, foremost)).detach()
        return torch.cat([squares[:k].sqrt(), V.reshape(-1)])

    return by_weakest, by_dense


TRANSFORMS = {
    "call": lambda f, v: f(v),
    "jacrev": lambda f, v: jacrev(f)(v),
    "jacfwd": lambda f, v: jacfwd(f)(v),
    "hessian": lambda f, v: jacfwd(jacrev(f))(v),
    "jacrev(jacrev)": lambda f, v: jacrev(jacrev(f))(v),
    "vmap(jacrev)": lambda f, v: vmap(jacrev(f))(torch.stack([v, 2 * v])),
    "vmap(jacfwd)": lambda f, v: vmap(jacfwd(f), chunk_size=1)(torch.stack([v, 2 * v])),
}


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_a_dense_decomposition_gives(transform, k):
    A = matrix()
    got, want = (TRANSFORMS[transform](f, A.values) for f in both(A, k))
    close(got, want, 1e-11)


@pytest.mark.parametrize(
    "third",
    [lambda f: jacrev(jacfwd(jacrev(f))), lambda f: jacfwd(jacfwd(jacfwd(f))), lambda f: jacrev(jacrev(jacrev(f)))],
    ids=["reverse-forward-reverse", "forward", "reverse"],
)
def test_third_derivatives_are_the_differences_of_second_ones(third):
    A, step, zero = matrix(), 1e-4, torch.zeros((), dtype=F64)

    def along(t):
        return both_along(A.values * (1 + t) + t.square() * A.values.flip(0))

    both_along = both(A, 3)[0]
    second = jacfwd(jacrev(along))
    close(third(along)(zero), (second(zero + step) - second(zero - step)) / (2 * step), 1e-5)


def test_fourth_derivatives_are_refused():
    A = matrix()
    of_time = both(A, 2)[0]
    fourth = jacfwd(jacfwd(jacfwd(jacfwd(lambda t: of_time(A.values * (1 + t))))))
    with pytest.raises(NotImplementedError, match="derivatives to order 3, got order 4"):
        fourth(torch.zeros((), dtype=F64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.complex128], ids=str)
def test_dtypes(dtype):
    A, tolerance = matrix(dtype=dtype), 1e-5 if dtype != torch.complex128 else 1e-11
    values, vectors = fl.weakest(A, 3)
    assert (values.dtype, vectors.dtype) == (values.real.dtype, dtype)
    assert torch.finfo(values.dtype).eps == torch.finfo(dtype).eps
    close(values, torch.linalg.svdvals(A.to_dense()).flip(0)[:3], tolerance)
    close(torch.linalg.vector_norm(A @ vectors, dim=0), values, tolerance)

    def of_space(v):
        V = fl.weakest(fl.SparseMatrix(v, A.pattern), 3).vectors
        return (V @ V.mH)[0, 1].abs()

    def by_dense(v):
        D = dense(v, A.pattern).to(torch.promote_types(dtype, F64))
        V = torch.linalg.eigh(D.mH @ D)[1][:, :3]
        return (V @ V.mH)[0, 1].abs()

    close(grad(of_space)(A.values), grad(by_dense)(A.values), 100 * tolerance)


def test_the_null_space_of_a_network_in_parts():
    A = network(90, 3)
    values, vectors = fl.weakest(A, 5)
    close(values, torch.linalg.svdvals(A.to_dense()).flip(0)[:5], 1e-13)
    assert float(values[:3].max()) < 1e-14 < float(values[3])
    parts = torch.arange(90) // 30
    space = (parts[:, None] == parts).to(F64) / 30  # is constant on each part
    close(vectors[:, :3] @ vectors[:, :3].T, space, 1e-13)


def test_derivatives_of_a_null_space_are_those_of_the_space():
    A, direction = network(30, 2), normal(network(30, 2).nnz)

    def projector(v):
        V = fl.weakest(fl.SparseMatrix(v, A.pattern), 2).vectors
        return V @ V.T

    def by_dense(v):
        V = torch.linalg.svd(dense(v, A.pattern)).Vh[-2:]
        return V.T @ V

    step = 1e-5
    want = (by_dense(A.values + step * direction) - by_dense(A.values - step * direction)) / (2 * step)
    close(jvp(projector, (A.values,), (direction,))[1], want, 1e-8)
    turned = grad(lambda v: (projector(v) * projector(A.values + 0.1 * direction)).sum())(A.values)
    assert bool(turned.isfinite().all())
    kinks = jacrev(lambda v: fl.weakest(fl.SparseMatrix(v, A.pattern), 3).values)(A.values).abs().amax(1)
    assert kinks[:2].tolist() == [0.0, 0.0]
    assert float(kinks[2]) > 0.1


def test_a_group_that_is_cut_in_two_has_no_derivative():
    A = network(30, 2)
    gradient = grad(lambda v: fl.weakest(fl.SparseMatrix(v, A.pattern), 1).vectors.pow(3).sum())(A.values)
    assert bool(gradient.isnan().any())


@pytest.mark.parametrize("smallest", [1e-3, 1e-6, 1e-9])
def test_graded_singular_values(smallest):
    U, V = (torch.linalg.qr(normal(*size, seed=i)).Q for i, size in enumerate([(40, 20), (20, 20)]))
    wanted = torch.logspace(0, math.log10(smallest), 20, dtype=F64)
    values, vectors = fl.weakest(fl.SparseMatrix.from_dense(U * wanted @ V.T), 4)
    assert float((values / wanted.flip(0)[:4] - 1).abs().max()) < 1e-15 / smallest
    overlap = (vectors * V.flip(1)[:, :4]).sum(0).abs()
    assert float((1 - overlap).abs().max()) < 1e-15 / smallest


def test_columns_of_zeros_are_null_vectors():
    A = fl.SparseMatrix.from_dense(torch.tensor([[1.0, 0, 0, 0], [0, 0, 2, 0], [0, 0, 1, 0], [1, 0, 1, 0]]).double())
    for k in range(1, 5):
        values, vectors = fl.weakest(A, k)
        close(values, torch.linalg.svdvals(A.to_dense()).flip(0)[:k], 1e-14)
        close(vectors.T @ vectors, torch.eye(k, dtype=F64), 1e-14)


def test_a_grid_is_not_formed_densely():
    """40,000 unknowns, whose singular values are known: 2 sin(pi i / 2 N) and what they combine to."""
    N = 200
    nodes = torch.arange(N * N).reshape(N, N)
    across = torch.stack([nodes[:, :-1].reshape(-1), nodes[:, 1:].reshape(-1)])
    ends = torch.cat([across, torch.stack([nodes[:-1].reshape(-1), nodes[1:].reshape(-1)])], 1)
    row = torch.arange(ends.shape[1])
    pattern = fl.SparsePattern(torch.stack([row.repeat(2), ends.reshape(-1)]), (len(row), N * N))
    values = fl.weakest(fl.SparseMatrix(torch.cat([torch.ones(len(row)), -torch.ones(len(row))]).double(), pattern), 4)
    one = 2 * math.sin(math.pi / (2 * N))
    close(values.values, torch.tensor([0.0, one, one, math.sqrt(2) * one], dtype=F64), 1e-9)


def test_errors_name_the_columns_of_a_dependence():
    D = normal(8, 4)
    D[:, 3] = D[:, 1] - D[:, 0]
    A = fl.SparseMatrix.from_dense(D)
    with pytest.raises(fl.RankDeficientError) as caught:
        fl.lstsq(A, normal(8))
    assert sorted(caught.value.columns) == [0, 1, 3]
    values, vectors = fl.weakest(A, 1)
    assert float(values) < 1e-14
    close(vectors[:, 0] / vectors[0, 0], torch.tensor([1.0, -1, 0, 1], dtype=F64), 1e-12)
    with pytest.raises(fl.RankDeficientError) as caught:
        fl.lstsq(
            fl.SparseMatrix(torch.ones(2), fl.SparsePattern(torch.tensor([[0, 1], [0, 0]]), (3, 2))), torch.ones(3)
        )
    assert caught.value.columns == (1,)


@pytest.mark.parametrize(
    ("A", "k", "error", "match"),
    [
        (matrix().T, 1, ValueError, r"at least as many rows as columns, got shape \(6, 12\)"),
        (matrix(), 0, ValueError, "k must lie between 1 and the number of columns, 6, got 0"),
        (matrix(), 7, ValueError, "k must lie between 1"),
        (matrix(), 1.0, TypeError, r"k must be an integer, got 1\.0"),
        ([[1.0]], 1, TypeError, "A must be a SparseMatrix or a torch sparse tensor, got list"),
        (matrix() * math.nan, 1, ValueError, "A must be finite, got NaN"),
    ],
)
def test_what_is_refused(A, k, error, match):
    with pytest.raises(error, match=match):
        fl.weakest(A, k)
