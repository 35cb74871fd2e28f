"""Each method, its settings and its limits; how the default chooses among them."""

import numpy as np
import pytest
import torch
from helpers import SOLVERS, close, problem, through_pinv, with_singular_values

import functional_lstsq as fl
from functional_lstsq.solvers import auto, cgls, gram
from functional_lstsq.solvers.auto import _Chain, _Step


def test_cgls_says_when_it_runs_out():
    A, pattern = with_singular_values(np.logspace(0, -3, 30), 60)
    matrix, b = fl.SparseMatrix(A.reshape(-1), pattern), torch.ones(60, dtype=torch.float64)
    with pytest.raises(fl.ConvergenceError, match=r"cgls ended after 5 iterations .*iteration limit reached"):
        fl.lstsq(matrix, b, solver=fl.CGLS(max_iterations=5))
    assert fl.solve(matrix, b, solver=fl.CGLS(max_iterations=5), throw=False).info.status == "iteration limit reached"


def test_cgls_tolerance_and_callback():
    seen = []
    pattern, values, b = problem(300, 100, density=0.05)
    A = fl.SparseMatrix(values, pattern)
    want = fl.lstsq(A, b, solver=fl.Dense())
    counts = []
    for tolerance in (1e-4, 1e-8, 1e-12):
        solution = fl.solve(A, b, solver=fl.CGLS(tolerance=tolerance, callback=lambda *step: seen.append(step)))
        assert float((solution.x - want).norm() / want.norm()) <= 10 * tolerance
        counts.append(int(solution.info.iterations))
    assert counts == sorted(counts)
    assert seen[0][0] == 1


def test_large_and_sparse():
    """A grid of first differences with a few fixed points, too large for a dense factor; and without them."""
    k = 64
    index = torch.arange(k * k).view(k, k)
    neighbours = (index[:-1], index[1:]), (index[:, :-1], index[:, 1:])
    ends = torch.cat([torch.stack([a.reshape(-1), b.reshape(-1)]) for a, b in neighbours], 1)
    edges, fixed = ends.shape[1], torch.arange(0, k * k, 97)
    row = torch.arange(edges)
    rows = torch.cat([row, row, edges + torch.arange(len(fixed))])
    indices = torch.stack([rows, torch.cat([ends[0], ends[1], fixed])])
    values = torch.cat([-torch.ones(edges), torch.ones(edges + len(fixed))]).double()
    A = fl.SparseMatrix(values, fl.SparsePattern(indices, (edges + len(fixed), k * k)))
    x = torch.randn(k * k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for solver, method in ((None, "direct"), (fl.CGLS(), "cgls")):
        solution = fl.solve(A, A @ x, solver=solver)
        assert solution.info.method.startswith(method)
        assert float((solution.x - x).norm() / x.norm()) < 1e-10
    pattern = fl.SparsePattern(indices[:, : 2 * edges], (edges, k * k))
    free, ones = fl.SparseMatrix(values[: 2 * edges], pattern), torch.ones(edges, dtype=torch.float64)
    with pytest.raises(fl.RankDeficientError, match=f"rank below {k * k}"):
        fl.lstsq(free, ones, solver=fl.CGLS())
    with pytest.raises(fl.RankDeficientError, match=f"rank {k * k - 1}, not full rank {k * k}.*columns .* take part"):
        fl.lstsq(free, ones)
    least = fl.lstsq(free, free @ x, rank_deficient="minimum_norm")
    assert float((least - (x - x.mean())).norm() / x.norm()) < 1e-12


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: fl.Dense(accept="x"), TypeError, "accept"),
        (lambda: fl.Dense(accept=-1), ValueError, "accept"),
        (lambda: fl.CGLS(tolerance="a"), TypeError, "tolerance"),
        (lambda: fl.CGLS(tolerance=float("nan")), ValueError, "tolerance"),
        (lambda: fl.CGLS(max_iterations=1e3), TypeError, "max_iterations"),
        (lambda: fl.CGLS(callback=3), TypeError, "callback"),
        (lambda: fl.Auto(cgls=3), TypeError, "cgls"),
        (lambda: fl.Auto(dense_columns=0), ValueError, "dense_columns"),
    ],
)
def test_bad_settings_are_refused_when_they_are_made(make, error, name):
    with pytest.raises(error, match=f"{name} must be"):
        make()


@pytest.mark.parametrize("solver", SOLVERS)
def test_matrices_whose_probe_is_solved_exactly(solver):
    """Diagonal and one-column matrices: nothing is divided by the zero that is left, and a zero column is seen."""
    for diagonal in ([1.0, 1.0], [1.0, 2.0, 4.0], [3.0]):
        D = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        solution = fl.solve(D.to_sparse_csr(), torch.ones(len(D), dtype=torch.float64), solver=SOLVERS[solver])
        assert 1 <= float(solution.info.condition) < 10
        close(solution.x, 1 / D.diagonal())
        singular = torch.diag(torch.tensor([*diagonal, 0.0], dtype=torch.float64)).to_sparse_csr()
        with pytest.raises(fl.RankDeficientError):
            fl.lstsq(singular, torch.ones(len(D) + 1, dtype=torch.float64), solver=SOLVERS[solver])


@pytest.mark.parametrize("backend", ["rslab", "superlu"])
@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32])
@pytest.mark.parametrize("shape", [(60, 20), (20, 60)])
def test_direct(backend, heavy, dtype, shape, monkeypatch):
    """Both backends, with and without rows that are left out of the factor, against the pseudoinverse."""
    if backend == "superlu":
        monkeypatch.setattr(gram, "rslab", None)
    if heavy:
        monkeypatch.setattr(gram, "_HEAVY_WORK", 0)
        monkeypatch.setattr(gram, "_HEAVY_ROW", 10)
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
    assert len(gram.GramAnalysis(system, complex_values=dtype.is_complex).heavy) == heavy
    close(ours(values, b), theirs(values, b), tolerance)
    for mine, want in zip(*(torch.func.grad(loss, (0, 1))(values, b, f) for f in (ours, theirs)), strict=True):
        close(mine, want, tolerance)


@pytest.mark.skipif(gram.rslab is None, reason="rslab is not installed")
def test_one_analysis_a_pattern_and_one_factor_a_matrix(monkeypatch):
    """Whatever is asked for: derivatives, batches, many right-hand sides."""
    calls = {"analyses": 0, "factors": 0}
    analyze, factor = gram.rslab.analyze, gram.GramAnalysis.factor

    def counted(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(gram.rslab, "analyze", counted("analyses", analyze))
    monkeypatch.setattr(gram.GramAnalysis, "factor", counted("factors", factor))
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
    with pytest.raises(torch.linalg.LinAlgError, match="was not started: it would take about"):
        fl.lstsq(A, b, solver=fl.Direct(memory=1))
    solution = fl.solve(A, b, solver=fl.Auto(dense_columns=1, dense_bytes=1, direct=fl.Direct(memory=1)))
    assert solution.info.tried == "CGLS (A^H A would not fit into memory)"


def test_the_default_moves_on_and_says_so():
    """From an iteration that ends too early to a factor; from few columns to a dense factor at once."""
    pattern, values, b = problem(60, 20)
    A = fl.SparseMatrix(values, pattern)
    assert fl.solve(A, b).info.tried == "Dense (few columns)"
    assert fl.solve(A, b, solver=fl.Auto(dense_columns=1, dense_bytes=1)).info.method.startswith("direct")
    poor, pattern = with_singular_values(np.logspace(0, -9, 12), 30)
    planned = _Planned((_Step(fl.CGLS(), "first"), _Step(fl.Direct(), "second")))
    solution = fl.solve(fl.SparseMatrix(poor.reshape(-1), pattern), torch.ones(30, dtype=torch.float64), solver=planned)
    assert solution.info.method.startswith("direct")
    assert solution.info.tried == "CGLS (first): inaccurate, Direct (second)"


class _Planned:
    """The default with a plan of its own."""

    def __init__(self, plan):
        self.plan = plan

    def prepare(self, system, *, minimum_norm):
        return _Chain(iter(self.plan), system, minimum_norm)


def test_info_tells_of_the_norm_and_of_the_last_derivative():
    pattern, values, b = problem(30, 10)
    for solver in (None, fl.Direct(), fl.CGLS()):

        def loss(values, solver=solver):
            solution = fl.solve(fl.SparseMatrix(values, pattern), b, solver=solver)
            return solution.x.sum(), solution.info

        info = fl.solve(fl.SparseMatrix(values, pattern), b, solver=solver).info
        close(info.norm, values.norm(), 1e-14)
        assert info.adjoint_error != info.adjoint_error  # NaN: nothing was differentiated
        _, info = torch.func.grad(loss, has_aux=True)(values)
        assert 0 < info.adjoint_error < 1e-9
        assert f"adjoint_error={info.adjoint_error:.2g}" in repr(info)


@pytest.mark.parametrize("weight", [1e-3, 1.0, 1e3, 1e6, 1e8])
def test_full_rank_that_hangs_on_a_row_left_out_of_the_factor(weight, monkeypatch):
    """Differences along a path and their sum: what is factored is singular; the answer is right, or there is none."""
    monkeypatch.setattr(gram, "_HEAVY_WORK", 0)
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


def test_iterating_is_left_for_a_factor_when_it_promises_to_take_longer(monkeypatch):
    """A random matrix needs few iterations; a path needs about as many as it has steps."""
    monkeypatch.setattr(auto, "_PATIENCE", 0)
    monkeypatch.setattr(auto, "_ORDERED", 1e3)
    pattern, values, b = problem(2000, 500)
    default = fl.Auto(dense_columns=1, dense_bytes=1)
    found = fl.solve(fl.SparseMatrix(values, pattern), b, solver=default)
    assert found.info.tried == "CGLS (a factor costs more)"
    n, calls = 3000, []
    rows, columns = torch.arange(n).repeat(2), torch.cat([torch.arange(n), torch.arange(1, n + 1) % n])
    pattern = fl.SparsePattern(torch.stack([rows, columns]), (n, n))
    A = fl.SparseMatrix(torch.cat([torch.ones(n), -0.999 * torch.ones(n)]).double(), pattern)
    truth = torch.arange(n, dtype=torch.float64).sin()
    watched = fl.Auto(dense_columns=1, dense_bytes=1, cgls=fl.CGLS(callback=lambda step, size: calls.append(step)))
    found = fl.solve(A, A @ truth, solver=watched)
    assert found.info.tried == "CGLS (a factor costs more): iteration limit reached, Direct (a factor costs less)"
    assert len(calls) < n / 4
    close(found.x, truth, 1e-10)


def test_a_start_saves_iterations_and_changes_nothing_else():
    pattern, values, b = problem(400, 120)
    A, solver = fl.SparseMatrix(values, pattern), fl.CGLS()
    x = fl.lstsq(A, b, solver=solver)
    near = fl.SparseMatrix(values * (1 + 1e-6 * torch.linspace(-1, 1, len(values), dtype=torch.float64)), pattern)
    cold, warm = (fl.solve(near, b, solver=solver, x0=x0) for x0 in (None, x))
    assert int(warm.info.iterations) < int(cold.info.iterations)
    close(warm.x, cold.x, 1e-10)
    close(fl.lstsq(A, b, solver=solver, x0=1e6 * torch.ones_like(x)), x, 1e-9)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        with_start, without = (
            transform(lambda v, x0=x0: fl.lstsq(fl.SparseMatrix(v, pattern), b, solver=solver, x0=x0))
            for x0 in (x, None)
        )
        close(with_start(values), without(values), 1e-9)
        assert not transform(lambda x0: fl.lstsq(A, b, solver=solver, x0=x0))(x).any()
    B = torch.stack([b, 2 * b, b.flip(0)])
    X = torch.vmap(lambda b: fl.lstsq(A, b, solver=solver))(B)
    again = torch.vmap(lambda b, x0: fl.solve(A, b, solver=solver, x0=x0))(B, X)
    close(again.x, X, 1e-10)
    assert int(again.info.iterations.max()) < int(cold.info.iterations)
    for other in (fl.Dense(), fl.Direct(), None):
        close(fl.lstsq(A, b, solver=other, x0=x), x, 1e-10)
    close(fl.lstsq(A.T, b[:120], x0=b), fl.lstsq(A.T, b[:120]), 1e-10)


@pytest.mark.parametrize(
    ("x0", "error", "words"),
    [
        (3, TypeError, "x0 must be a dense tensor"),
        (torch.zeros(3), ValueError, "x0 must have the shape of x"),
        (torch.full((20,), torch.nan), ValueError, "x0 must be finite"),
        (torch.zeros(20, dtype=torch.complex128), ValueError, "x0 must be torch.float64"),
    ],
)
def test_a_bad_start_is_refused(x0, error, words):
    pattern, values, b = problem(60, 20)
    with pytest.raises(error, match=words):
        fl.lstsq(fl.SparseMatrix(values, pattern), b, x0=x0)


@pytest.mark.parametrize("damp", [None, 0.3])
def test_corrections_in_single_precision(damp, monkeypatch):
    """Answers, gradients and claims are those of double precision, also where columns leave the block one by one."""
    pattern, values, b = problem(600, 100, density=0.1)
    b = torch.stack([b, values.new_zeros(600), fl.SparseMatrix(values, pattern) @ torch.ones(100).double()], 1)

    def loss(values, b):
        solution = fl.solve(fl.SparseMatrix(values, pattern), b, damp=damp, solver=fl.CGLS())
        return solution.x.square().sum(), solution

    wanted = torch.func.grad(loss, argnums=(0, 1), has_aux=True)(values, b)
    monkeypatch.setattr(cgls, "_SINGLE_ENTRIES", 1)
    used = []
    monkeypatch.setattr(cgls._Single, "of", classmethod(lambda cls, system: used.append(1) or of(system)))
    found = torch.func.grad(loss, argnums=(0, 1), has_aux=True)(values, b)
    assert used
    assert float(found[1].info.condition.max()) < cgls._SINGLE_CONDITION
    for got, want in zip(found[0], wanted[0], strict=True):
        close(got, want, 1e-10)
    errors = (found[1].x - wanted[1].x).norm(dim=0) / wanted[1].x.norm(dim=0).clamp_min(1e-300)
    assert bool((errors <= 10 * found[1].info.forward_error + 1e-13).all())


of = cgls._Single.of


@pytest.mark.parametrize("corner", [0.034, 0.0533, 0.06, 0.09])
def test_singular_values_are_known_where_single_precision_is_given_up(corner, monkeypatch):
    monkeypatch.setattr(cgls, "_SINGLE_ENTRIES", 1)
    A = torch.tensor([[1.0, 1.0], [0.0, corner]], dtype=torch.float64)
    b = torch.tensor([1.0425133694426776, -0.12853466294343426], dtype=torch.float64)
    solution = fl.solve(A.to_sparse(), b, solver=fl.CGLS())
    scaled = torch.linalg.cond(A / A.norm(dim=0))
    assert scaled / 10 < solution.info.condition < 10 * scaled
    close(solution.x, torch.linalg.solve(A, b), 1e-11)


def test_a_start_that_is_worse_than_none_does_no_harm():
    pattern, values, b = problem(30, 10)
    A = fl.SparseMatrix(values, pattern)
    for size in (1.0, 1e6, 1e160, 1e305):
        x0 = torch.full((10,), size, dtype=torch.float64)
        close(fl.lstsq(A, b, solver=fl.CGLS(), x0=x0), fl.lstsq(A, b), 1e-11)
        assert not fl.lstsq(A, 0 * b, solver=fl.CGLS(), x0=x0).any()


@pytest.mark.parametrize("damp", [1e4, 1e8, 1e20])
def test_a_large_damping_is_no_lack_of_rank(damp):
    pattern, values, b = problem(30, 10)
    A = fl.SparseMatrix(values, pattern)
    solution = fl.solve(A, b, damp=damp, solver=fl.CGLS(), throw=False)
    assert solution.info.rank == 10
    assert solution.info.condition < 10
    close(solution.x * damp**2, A.T @ b, 1e-5)


def test_single_precision_that_overflows_is_no_success():
    A = torch.diag(torch.tensor([1e-30, 1.0])).to_sparse()
    with pytest.raises(fl.ConvergenceError):
        fl.lstsq(A, torch.tensor([1e20, 1.0]))
    small = fl.SparsePattern(torch.tensor([[0, 1, 2, 2], [0, 1, 0, 1]]), (3, 2))  # an adjoint may leave the range
    by_b = torch.func.grad(lambda b: fl.lstsq(fl.SparseMatrix(torch.full((4,), 1e-25), small), b).sum())
    assert bool(torch.isfinite(by_b(torch.full((3,), 1e-25))).all())
    tiny = fl.solve(torch.diag(torch.tensor([1e30, 1e30])).to_sparse(), torch.tensor([1e-20, 1e-20]))
    assert tiny.info.forward_error > 0.1  # x is 1e-50, and rounded to zero
