"""What a process sees: threads, forks, its end, pickles that another process opens."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import close, problem
from test_compile import run
from torch.func import grad

import functional_lstsq as fl
from functional_lstsq.linear.factor_cache import Holder


@pytest.mark.parametrize("solver", [fl.Dense(), fl.Direct(), fl.CGLS()], ids=repr)
def test_threads_share_a_pattern(solver):
    pattern, values, b = problem(60, 20)
    fresh = fl.SparsePattern(pattern.indices, pattern.shape)

    def solve(scale):
        loss = lambda v: fl.lstsq(fl.SparseMatrix(v, fresh), b, solver=solver).sin().sum()  # noqa: E731
        return grad(loss)(scale * values)

    scales = [1 + i / 7 for i in range(16)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(solve, scales))
    for scale, result in zip(scales, together, strict=True):
        close(result, solve(scale), 1e-12)


def test_no_factor_outlives_its_graph():
    pattern, values, b = problem(12, 4)
    before = len(Holder.living)
    with torch.no_grad():
        fl.lstsq(fl.SparseMatrix(values.requires_grad_(), pattern), b)
        assert len(Holder.living) == before
    with torch.inference_mode():
        x = fl.lstsq(fl.SparseMatrix(values, pattern), b)
        assert len(Holder.living) == before
    x = fl.lstsq(fl.SparseMatrix(values, pattern), b)
    assert len(Holder.living) == before + 1
    x.sum().backward(retain_graph=True)
    assert len(Holder.living) == before + 1
    del x
    assert len(Holder.living) == before


def test_pickles_say_the_same_elsewhere(tmp_path):
    pattern, values, b = problem(12, 4)
    A = fl.SparseMatrix(values, pattern)
    solution = fl.solve(A, b, solver=fl.Direct())
    for there in (pickle.loads(pickle.dumps((A, solution))), copy.deepcopy((A, solution))):
        assert there[0].pattern == pattern
        assert there[1].info.method == solution.info.method
        assert there[1].info.tried == solution.info.tried
        close(fl.lstsq(there[0], b), fl.lstsq(A, b), 1e-12)
    torch.save((A, solution), tmp_path / "saved.pt")
    result = run(f"""
        eye = torch.eye(3, 2, dtype=torch.float64).to_sparse()
        for solver in (fl.CGLS(), fl.Dense()):
            fl.solve(eye, torch.ones(3), solver=solver)
        A, solution = torch.load({str(tmp_path / "saved.pt")!r}, weights_only=False)
        print(solution.info.method, solution.info.status, A)
    """)
    assert result.stdout.split()[:2] == [solution.info.method, "converged"], result.stderr


@pytest.mark.parametrize("A", ["A", "fl.jacobian_operator(A, b)"])
def test_matrices_and_operators_pickle(A):
    pattern, values, b = problem(12, 4)
    known = {"A": fl.SparseMatrix(values, pattern), "b": b, "fl": fl}
    A = eval(A, known)
    there = pickle.loads(pickle.dumps(A))
    x = torch.randn(A.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(A @ x, there @ x)
