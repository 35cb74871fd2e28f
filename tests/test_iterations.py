"""Conjugate gradients in compiled code: one pass over A an iteration or two, by any number of threads, and in torch."""

import math

import numpy as np
import pytest
import torch
from helpers import close, dense, problem, with_singular_values

import functional_lstsq as fl
from functional_lstsq.solvers import one_pass
from functional_lstsq.solvers.certificate import Certificate
from functional_lstsq.solvers.system import System
from functional_lstsq.sparse import entry_kernels, kernels, normal_iteration, plain_products
from functional_lstsq.sparse.plain_products import Operator

pytest.importorskip("numba")

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]


@pytest.mark.parametrize("passes", ["twice", "by rows", "whole"])
@pytest.mark.parametrize("damp", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_iterations_come_to_the_same(monkeypatch, dtype, damp, passes):
    """Compiled and in torch: x, its derivatives by values and b, and how often was iterated."""
    pattern, values, b = problem(60, 20, dtype=dtype)
    monkeypatch.setattr(normal_iteration, "_DENSER", 1e9 if passes == "whole" else 0.0)
    kind = (kernels, "Iteration") if passes == "twice" else (plain_products, "NormalIteration")
    if passes == "twice":
        monkeypatch.setattr(plain_products.NormalProducts, "suit", lambda *_: False)

    def solved():
        def objective(values, b):
            A = fl.SparseMatrix(values, pattern)
            solution = fl.solve(A, b, damp=damp or None, solver=fl.CGLS())
            return solution.x.abs().square().sum(), solution

        gradients, solution = torch.func.grad(objective, argnums=(0, 1), has_aux=True)(values, b)
        return (solution.x, solution.residual, *gradients), solution.info

    entered, steps = [], getattr(*kind)
    monkeypatch.setattr(*kind, lambda *given: entered.append(given[0]) or steps(*given))
    compiled, info = solved()
    assert entered
    assert passes == "twice" or entered[0].arrays[0] == (passes == "whole" and not dtype.is_complex)
    monkeypatch.setattr(kernels, "available", lambda device: False)
    entered.clear()
    by_torch, other = solved()
    assert not entered
    for got, want in zip(compiled, by_torch, strict=True):
        close(got, want, 20 * torch.finfo(dtype).eps)
    assert info.status == other.status
    assert abs(info.iterations - other.iterations) <= 2
    double = torch.complex128 if dtype.is_complex else torch.float64
    A = dense(values.to(double), pattern)
    x = torch.linalg.solve(A.mH @ A + damp**2 * torch.eye(20, dtype=A.dtype), A.mH @ b.to(double))
    assert float((compiled[0].to(double) - x).norm() / x.norm()) <= max(4 * torch.finfo(dtype).eps, 1e-11)


@pytest.mark.parametrize("whole", [False, True])
def test_iterations_are_the_same_for_any_number_of_threads(monkeypatch, whole):
    """Sums are taken in the same parts, whoever takes them, and whoever watches."""
    monkeypatch.setattr(normal_iteration, "_PARALLEL", 0)
    monkeypatch.setattr(normal_iteration, "_DENSER", 1e9 if whole else 0.0)
    pattern, values, b = problem(3000, 600)
    A = fl.SparseMatrix(values, pattern)

    def solution(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return fl.lstsq(A, b, solver=fl.CGLS(), damp=0.1)
        finally:
            torch.set_num_threads(before)

    alone = solution(1)
    for threads in 2, 3, 4:
        for _ in range(3):
            assert torch.equal(solution(threads), alone)
    with fl.progress(lambda step: None):
        assert torch.equal(solution(2), alone)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("condition", [30.0, 2000.0, 1e5])
def test_updated_gradients_are_computed_anew(monkeypatch, condition, whole):
    """Of a consistent system, whose residual vanishes, an updated gradient alone would leave eps cond^2."""
    monkeypatch.setattr(normal_iteration, "_DENSER", 1e9 if whole else 0.0)
    A, pattern = with_singular_values(np.logspace(0, -np.log10(condition), 40), 90)
    x = torch.linspace(-1, 1, 40, dtype=torch.float64)
    entered, steps = [], plain_products.NormalIteration
    monkeypatch.setattr(plain_products, "NormalIteration", lambda *given: entered.append(1) or steps(*given))
    solution = fl.solve(fl.SparseMatrix(A.reshape(-1), pattern), A @ x, solver=fl.CGLS())
    assert bool(entered) == (condition < one_pass.CONDITION)
    assert float((solution.x - x).norm() / x.norm()) < max(1e-15 * condition, 1e-12)
    assert float(solution.residual.norm() / (A @ x).norm()) < max(1e-15 * condition, 1e-12)


def test_iterations_end_where_there_is_no_curvature():
    pattern = fl.SparsePattern(torch.tensor([[0], [0]]), (1, 1))
    zero, one = torch.zeros((1, 1, 1), dtype=torch.float64), torch.ones((1, 1, 1), dtype=torch.float64)
    values, r, gradient = torch.zeros((1, 1), dtype=torch.float64), one.clone(), one.clone()
    steps = kernels.Iteration(pattern, values, values, one, None, None, r, zero, gradient, 1.0)
    assert steps.advance(5, 0.0, 1e20) == (0, False)


@pytest.mark.parametrize("kind", ["plain", "damped", "deficient", "given up", "ill-conditioned"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_searches_for_known_solutions(monkeypatch, dtype, kind):
    """Compiled and in torch: extreme singular values, and after how many iterations it is known enough."""
    pattern, values, _ = problem(200, 60, dtype=dtype)
    if kind == "ill-conditioned":  # of which one pass finds out that it takes two
        A, pattern = with_singular_values(np.logspace(0, -3.8, 60), 200)
        values = A.reshape(-1).to(dtype)
    if kind == "deficient":
        values = torch.where(pattern.indices[1] == 0, 0.0, values)
        first = (pattern.indices[1] == 1).nonzero()[:, 0]
        twin = torch.stack([pattern.indices[0][first], torch.zeros_like(first)])
        kept = pattern.indices[:, pattern.indices[1] != 0]
        values = torch.cat([values[pattern.indices[1] != 0], values[first]])
        pattern = fl.SparsePattern(torch.cat([kept, twin], 1), pattern.shape)
    damp = torch.tensor([[0.5]], dtype=torch.float64) if kind == "damped" else None
    patience = 30.0 if kind == "given up" else math.inf

    def certified():
        system = System(Operator(pattern, values[None]), damp, torch.finfo(torch.float64).eps)
        return Certificate(system, None, limit=1000, patience=patience), system

    # Both search the same matrix, to the bit: where it is ill-conditioned, iterations depend on how it is rounded.
    monkeypatch.setattr(entry_kernels, "suit", lambda values: False)
    entered, search = [], plain_products.search
    monkeypatch.setattr(plain_products, "search", lambda *given: entered.append(1) or search(*given))
    compiled, system = certified()
    assert entered
    monkeypatch.setattr(kernels, "available", lambda device: False)
    by_torch, _ = certified()
    assert len(entered) == 1
    for name in ("deficient", "failed"):
        assert getattr(compiled, name).tolist() == getattr(by_torch, name).tolist() == [[kind == "deficient"]]
    if kind == "deficient":  # which one column tells another after 16 iterations, and after 32 more
        assert compiled.iterations <= 48
        return
    apart = 0.15 * by_torch.iterations if kind == "ill-conditioned" else 2
    assert abs(compiled.iterations - by_torch.iterations) <= apart
    assert abs(compiled.expected - by_torch.expected) <= apart
    near = 1e-2 if kind == "ill-conditioned" else 1e-6
    torch.testing.assert_close(compiled.condition, by_torch.condition, rtol=near, atol=0)
    A = system.A.dense()[0] * system.norms[0, :, 0].reciprocal()
    if damp is not None:
        A = torch.cat([A, torch.diag(system.damp[0, :, 0] / system.norms[0, :, 0]).to(A.dtype)])
    sizes = torch.linalg.svdvals(A)
    assert sizes[-1] <= compiled.smallest * (1 + 1e-9) <= 1.5 * sizes[-1]
    assert 0.5 * sizes[0] <= compiled.largest <= sizes[0] * (1 + 1e-9)


@pytest.mark.parametrize("damp", [None, 1e-5])
def test_a_part_begins_anew_where_rounding_has_taken_over(damp):
    """Of a consistent system: the last direction would not move it any more, up to the limit of iterations."""
    n, g = 800, torch.Generator().manual_seed(3)
    i, size = torch.arange(n), 10.0 ** (10 * torch.rand(n, generator=g, dtype=torch.float64) - 5)
    indices = torch.stack([torch.cat([i, i[:-1]]), torch.cat([i, i[1:]])])
    A = fl.SparseMatrix(torch.cat([size, -0.9 * size[1:]]), fl.SparsePattern(indices, (n, n)))
    b = A @ torch.randn(n, generator=g, dtype=torch.float64)
    solution = fl.solve(A, b, damp=damp, solver=fl.CGLS())
    assert solution.info.iterations < 1500
    x = fl.lstsq(A, b, damp=damp, solver=fl.Direct(), refine="extended")
    assert float((solution.x - x).norm() / x.norm()) < 1e-12
