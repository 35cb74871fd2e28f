"""The sparse factor: its methods, what it finds and what it refuses."""

import pytest
import torch
from helpers import close, dense, problem, through_pinv

import functional_lstsq as fl
from functional_lstsq.solvers import sparse_factor
from functional_lstsq.solvers.system import EPS, System
from functional_lstsq.sparse.plain_products import Operator


@pytest.mark.parametrize("backend", ["rslab", "superlu"])
@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32])
@pytest.mark.parametrize("shape", [(60, 20), (20, 60)])
def test_direct(backend, heavy, dtype, shape, monkeypatch):
    """Both backends, with and without rows that are left out of the factor, against the pseudoinverse."""
    if backend == "superlu":
        monkeypatch.setattr(sparse_factor, "rslab", None)
    if heavy:
        monkeypatch.setattr(sparse_factor, "_HEAVY_WORK", 0)
        monkeypatch.setattr(sparse_factor, "_HEAVY_ROW", 10)
    pattern, values, b = problem(*shape, dtype=dtype, density=0.06)
    if heavy:  # a full row, or a full column of a wide A
        full = torch.zeros(shape, dtype=torch.bool)
        full[tuple(pattern.indices)] = True
        if shape[0] > shape[1]:
            full[7] = True
        else:
            full[:, 7] = True
        pattern = fl.SparsePattern(full.nonzero().T, shape)
        values = torch.randn(pattern.nnz, dtype=dtype, generator=torch.Generator().manual_seed(0))
    A = fl.SparseMatrix(values, pattern)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10

    def loss(values, b, solution):
        return solution(values, b).abs().square().sum()

    def ours(values, b):
        return fl.lstsq(fl.SparseMatrix(values, pattern), b, solver=fl.Direct())

    def theirs(values, b):
        return through_pinv(values, pattern, b)

    assert fl.solve(A, b, solver=fl.Direct()).info.method == f"direct-{backend}"
    system = pattern if shape[0] > shape[1] else pattern.T
    assert len(sparse_factor.GramAnalysis(system, complex_values=dtype.is_complex).heavy) == heavy
    close(ours(values, b), theirs(values, b), tolerance)
    for mine, want in zip(*(torch.func.grad(loss, (0, 1))(values, b, f) for f in (ours, theirs)), strict=True):
        close(mine, want, tolerance)


@pytest.mark.skipif(sparse_factor.rslab is None, reason="rslab is not installed")
def test_one_analysis_a_pattern_and_one_factor_a_matrix(monkeypatch):
    """Whatever is asked for: derivatives, batches, many right-hand sides."""
    calls = {"analyses": 0, "factors": 0}
    analyze, factor = sparse_factor.rslab.analyze, sparse_factor.GramAnalysis.factor

    def counted(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(sparse_factor.rslab, "analyze", counted("analyses", analyze))
    monkeypatch.setattr(sparse_factor.GramAnalysis, "factor", counted("factors", factor))
    pattern, values, b = problem(40, 15)

    def x(values, b):
        return fl.lstsq(fl.SparseMatrix(values, pattern), b, solver=fl.Direct())

    torch.func.jacrev(x, (0, 1))(values, b)
    assert calls == {"analyses": 1, "factors": 1}
    torch.vmap(x, (None, 0))(values, torch.stack([b] * 5))
    torch.func.hessian(lambda v: x(v, b).square().sum())(values)
    assert calls == {"analyses": 1, "factors": 3}
    batch = values * torch.linspace(1, 2, 4, dtype=torch.float64)[:, None]
    together = torch.vmap(x, (0, None))(batch, b)
    assert calls == {"analyses": 1, "factors": 7}
    for one, v in zip(together, batch, strict=True):
        close(one, x(v, b), 1e-12)


@pytest.mark.parametrize("weak", [3, 20, 200])
def test_direct_finds_every_weak_direction(weak):
    """Pairs of nearly equal columns, more of them than a block of the inverse iteration holds at first."""
    n, generator = 3 * weak, torch.Generator().manual_seed(weak)
    row = torch.arange(3 * n)
    columns = torch.stack([row % n, (row * 7 + 1) % n, (row * 5 + 3) % n])
    dense = torch.zeros(3 * n, n, dtype=torch.float64)
    dense.index_put_((row.repeat(3), columns.reshape(-1)), torch.randn(9 * n, generator=generator).double())
    dense[:, :weak] = dense[:, weak : 2 * weak]
    dense[range(weak), range(weak)] += 1e-9
    A = fl.SparseMatrix.from_torch(dense.to_sparse_coo())
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    b = (A @ x)[:, None]
    s = torch.linalg.svdvals(dense)
    solution = fl.solve(A, b, solver=fl.Direct())
    assert 0.1 < float(solution.info.condition) / float(s[0] / s[-1]) < 10
    # b is rounded, so x is not quite the solution.
    difference = float((solution.x[:, 0] - x).norm() / x.norm())
    assert difference < 1e-15 * float(s[0] / s[-1])
    by_qr = torch.linalg.lstsq(dense, b).solution
    assert float((A @ solution.x - b).norm()) < 10 * float((A @ by_qr - b).norm()) + 1e-12


def test_a_factor_that_does_not_fit_is_not_started():
    pattern, values, b = problem(60, 20)
    A = fl.SparseMatrix(values, pattern)
    assert issubclass(fl.TooLarge, torch.linalg.LinAlgError)
    with pytest.raises(fl.TooLarge, match="was not started: it would take about"):
        fl.lstsq(A, b, solver=fl.Direct(memory=1))
    solution = fl.solve(A, b, solver=fl.Auto(dense_columns=1, dense_bytes=1, direct=fl.Direct(memory=1)))
    assert solution.info.tried == "CGLS (A^H A would not fit into memory)"


@pytest.mark.parametrize("weight", [1e-3, 1.0, 1e3, 1e6, 1e8])
def test_full_rank_that_hangs_on_a_row_left_out_of_the_factor(weight, monkeypatch):
    """Differences along a path and their sum: what is factored is singular; the answer is right, or there is none."""
    monkeypatch.setattr(sparse_factor, "_HEAVY_WORK", 0)
    n = 200
    D = torch.diag(-torch.ones(n, dtype=torch.float64)) + torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)
    D[-1] = weight
    b = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([torch.zeros(1), b[:-1].cumsum(0)])
    x = x - x.mean() + b[-1] / weight / n
    try:
        solution = fl.solve(D.to_sparse_coo(), b, solver=fl.Direct())
    except torch.linalg.LinAlgError:
        assert weight > 1e6
        return
    assert float((solution.x - x).norm() / x.norm()) < 1e-11
    default = fl.solve(D.to_sparse_coo(), b, solver=fl.Auto(dense_columns=1))
    assert float((default.x - x).norm() / x.norm()) < 1e-11


@pytest.mark.parametrize("damp", [1.0, 1e-4, 1e-9])
def test_a_damped_step_is_near_its_solution_without_a_search_for_weak_directions(damp):
    """Unless there may be some: a damping of 1e-9 is less than the shift of the factor."""
    pattern, values, b = problem(60, 9, density=0.3, seed=1)
    A = dense(values, pattern)
    A[:, 4] = A[:, 3]
    indices = A.nonzero().T
    operator = Operator(fl.SparsePattern(indices, A.shape), A[tuple(indices)][None])
    system = System(operator, torch.full((1, 9), damp, dtype=b.dtype), EPS)
    right = b[None, :, None], torch.zeros(1, 9, 1, dtype=b.dtype)
    factors = fl.Direct().prepare(system, minimum_norm=False)
    _, step, _ = factors.solve(*right, judged=False)
    assert ("known" in vars(factors)) is (damp < 1e-8)
    _, solution, _ = factors.solve(*right)
    assert "known" in vars(factors)
    # The two equal columns get equal unknowns: one of them times the root of 2 takes a root of 2 less of one.
    one = torch.cat([A[:, :3], A[:, 4:]], 1)
    one[:, 3] *= 2**0.5
    both = torch.cat([one, damp * torch.eye(8, dtype=b.dtype)])
    want = torch.linalg.lstsq(both, torch.cat([b, b.new_zeros(8)])).solution
    want[3] /= 2**0.5
    want = torch.cat([want[:4], want[3:]])
    close(solution[0, :, 0] / system.scale[0, :, 0], want, 1e-10)
    close(step, solution, 1e-6)
