"""More weak directions than can be told one by one: lines far from their origin, alone and linked, of any rank.

References are in exact rational arithmetic, block by block, or in mpmath to eighty digits.
"""

from fractions import Fraction

import mpmath
import pytest
import rationals
import torch
from helpers import close

import functional_lstsq as fl
from functional_lstsq.solvers import inverse_iteration
from functional_lstsq.solvers.clusters import Clusters, clustered
from functional_lstsq.solvers.sparse_factor import GramAnalysis

COUNT = 600  # blocks
assert max(inverse_iteration.WIDTHS) < COUNT
SAMPLE = range(0, COUNT, 23)
SOLVERS = pytest.mark.parametrize("solver", [None, fl.Direct()])


def blocks(rows, columns, *, dtype=torch.float64, deficient=False, seed=0):
    """(COUNT, rows, columns) of integers, columns all but parallel; condition numbers of about 1e8.

    Every third of the deficient ones has columns that depend on each other exactly.
    """
    generator = torch.Generator().manual_seed(seed)

    def digits():
        return torch.randint(-8, 9, (COUNT, rows, columns), generator=generator).double()

    B = digits() + 1j * digits() if dtype.is_complex else digits()
    B[:, 0, 0], B[:, :, 1:] = 9, B[:, :, 1:] + 2.0**26 * B[:, :, :1]
    if deficient:
        B[::3, :, -1] = 2 * B[::3, :, 0] if columns == 2 else B[::3, :, 0] - B[::3, :, 1]
    return B


def block_diagonal(B):
    """(pattern, values) of the matrix with the blocks B (count, rows, columns)."""
    count, m, n = B.shape
    block, i, j = torch.meshgrid(*(torch.arange(size) for size in B.shape), indexing="ij")
    indices = torch.stack([(block * m + i).reshape(-1), (block * n + j).reshape(-1)])
    return fl.SparsePattern(indices, (count * m, count * n)), B.reshape(-1)


def randn(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def relative(got, want):
    """|got - want| / |want| for exact numbers."""
    return 2.0 ** (rationals.distance(got, want) - rationals.size(want))


@SOLVERS
@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.complex128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind", ["full", "deficient", "damped", "weighted"])
def test_many_blocks(solver, dtype, wide, kind):
    B = blocks(6, 3, dtype=dtype, deficient=kind == "deficient")
    B = B.mH.contiguous() if wide else B
    pattern, values = block_diagonal(B)
    A, b = fl.SparseMatrix(values, pattern), randn(pattern.shape[0], dtype=dtype)
    damp = 2.0**-10 if kind == "damped" else None
    weights = wide + torch.arange(pattern.shape[0]).double() % 5 if kind == "weighted" else None
    rank = min(pattern.shape) - (COUNT // 3 if kind == "deficient" else 0)
    if kind == "deficient":
        with pytest.raises(fl.RankDeficientError, match=f"rank {rank}, not full rank {3 * COUNT}.*take part"):
            fl.lstsq(A, b, solver=solver)
    solution = fl.solve(A, b, damp=damp, weights=weights, rank_deficient="minimum_norm", solver=solver)
    assert solution.info.method.startswith("direct")
    assert solution.info.rank == rank
    (_, m, n), error = B.shape, 0.0
    for p in SAMPLE:
        rows, found = slice(p * m, p * m + m), solution.x[p * n : p * n + n]
        want, _, _ = rationals.least_squares(B[p], b[rows], damp, None if weights is None else weights[rows])
        # Square roots of the weights of a wide A are multiplied into it, which rounds it.
        assert relative(found, want) < (1e-6 if wide and kind == "weighted" else 1e-13)
        error = max(error, 2.0 ** rationals.distance(found, want))
    assert error <= 10 * float(solution.info.forward_error) * float(solution.x.norm())


@SOLVERS
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("damp", [None, 2.0**-10])
def test_gradients_of_many_blocks(solver, wide, damp):
    B = blocks(6, 3)
    B = B.mT.contiguous() if wide else B
    pattern, values = block_diagonal(B)
    (_, m, n), b, w = B.shape, randn(pattern.shape[0]), randn(pattern.shape[1], seed=2)

    def loss(values, b):
        return fl.lstsq(fl.SparseMatrix(values, pattern), b, damp=damp, solver=solver) @ w

    by_A, by_b = torch.func.grad(loss, (0, 1))(values, b)
    for p in SAMPLE:
        rows, columns = slice(p * m, p * m + m), slice(p * n, p * n + n)
        want = rationals.gradients(B[p], b[rows], w[columns], damp)
        assert relative(by_A.view_as(B)[p], want["A"]) < 1e-12
        assert relative(by_b[rows], want["b"]) < 1e-12


def lines(common):
    """A line in Julian date for each of COUNT stars, and a column (rows,) that all of them share: (pattern, values)."""
    count = len(common)
    times = 2460000.5 + torch.randint(0, 2**12, (count,), generator=torch.Generator().manual_seed(0)).double() / 2**14
    row, star = torch.arange(count), torch.arange(count) // 6
    columns = torch.cat([2 * star, 2 * star + 1, torch.full_like(row, 2 * COUNT)])
    values = torch.cat([torch.ones(count).double(), times, common])
    return fl.SparsePattern(torch.stack([row.repeat(3), columns]), (count, 2 * COUNT + 1)), values


@SOLVERS
def test_lines_that_share_a_column(solver):
    """min |b - [A_1 A_2 ... c] (x, a)|: with c~, what no star explains of c, a = c~ . b / c~ . c, x = A^+ (b - a c)."""
    common = 1 + torch.randint(0, 2**20, (6 * COUNT,), generator=torch.Generator().manual_seed(1)).double() / 2**20
    pattern, values = lines(common)
    b = randn(6 * COUNT)
    with mpmath.workdps(80):
        t, c, y = (mpmath.matrix(v.view(COUNT, 6).tolist()) for v in (values[6 * COUNT : 12 * COUNT], common, b))

        def fit(v, star):  # (intercept, slope, what is left)
            mean_t, mean_v = (sum(u[star, :]) / 6 for u in (t, v))
            slope = sum((t[star, i] - mean_t) * v[star, i] for i in range(6)) / sum(
                (t[star, i] - mean_t) ** 2 for i in range(6)
            )
            offset = mean_v - slope * mean_t
            return offset, slope, [v[star, i] - offset - slope * t[star, i] for i in range(6)]

        of_c, of_y = ([fit(v, star) for star in range(COUNT)] for v in (c, y))
        left, rest = ([v for part in fits for v in part[2]] for fits in (of_c, of_y))
        size = sum(v * v for v in left)
        a = sum(u * v for u, v in zip(left, rest, strict=True)) / size
        x = [p[k] - a * q[k] for p, q in zip(of_y, of_c, strict=True) for k in range(2)] + [a]
        # Of a: by b it is c~ / |c~|^2, and (A^H A)^-1 e = (-A^+ c, 1) / |c~|^2.
        back = [-q[k] / size for q in of_c for k in range(2)] + [1 / size]
        r, by_b = [v - a * u for u, v in zip(left, rest, strict=True)], [u / size for u in left]
        by_A = [r[i] * back[j] - by_b[i] * x[j] for i, j in pattern.indices.T.tolist()]
        x, by_A, by_b = (torch.tensor([float(v) for v in part], dtype=torch.float64) for part in (x, by_A, by_b))
    solution = fl.solve(fl.SparseMatrix(values, pattern), b, solver=solver)
    found = torch.func.grad(lambda v, b: fl.lstsq(fl.SparseMatrix(v, pattern), b, solver=solver)[-1], (0, 1))(values, b)
    for got, want in ((solution.x, x), (found[0], by_A), (found[1], by_b)):
        assert float((got - want).norm() / want.norm()) < 1e-14


@SOLVERS
def test_a_dependence_of_all_lines(solver):
    """The shared column is a sum of lines: one null vector z, of entries everywhere, x = x_0 - z (z . x_0) / |z|^2."""
    steps = torch.randint(-3, 4, (2, COUNT), generator=torch.Generator().manual_seed(1)).double()
    pattern, values = lines(torch.ones(6 * COUNT).double())
    times = values[6 * COUNT : 12 * COUNT].view(COUNT, 6)
    values[12 * COUNT :] = (steps[0, :, None] + steps[1, :, None] * times).reshape(-1)
    A, b = fl.SparseMatrix(values, pattern), randn(6 * COUNT)
    with pytest.raises(fl.RankDeficientError, match=f"rank {2 * COUNT}, not full rank {2 * COUNT + 1},.*column"):
        fl.lstsq(A, b, solver=solver)
    solution = fl.solve(A, b, rank_deficient="minimum_norm", solver=solver)
    assert solution.info.rank == 2 * COUNT
    stars = torch.stack([torch.ones_like(times), times], 2)
    x = [v for A, y in zip(stars, b.view(COUNT, 6), strict=True) for v in rationals.least_squares(A, y)[0]]
    x.append([Fraction(0)])
    z = [v[0] for v in rationals.rational(steps.T.reshape(-1))] + [Fraction(-1)]
    share = sum(u * v[0] for u, v in zip(z, x, strict=True)) / sum(u * u for u in z)
    assert relative(solution.x, [[v[0] - share * u] for u, v in zip(z, x, strict=True)]) < 1e-14


def test_a_batch_of_matrices_of_different_kinds():
    """Null vectors that are kept sparse, beside matrices without any, each in its place; and derivatives."""
    B = blocks(5, 2, deficient=True)[:120]
    pattern, poor = block_diagonal(B)
    good, last = randn(len(poor)), poor.clone()
    last[-10:-1:2] = last[-9::2]  # one dependence more
    b, w = randn(pattern.shape[0]), randn(pattern.shape[1], seed=2)

    def solution(values, solver):
        A = fl.SparseMatrix(values, pattern)
        return fl.solve(A, b, rank_deficient="minimum_norm", solver=solver)

    batch = torch.stack([poor, good, last])
    together = torch.vmap(lambda v: solution(v, fl.Direct()))(batch)
    assert together.info.rank.tolist() == [200, 240, 199]
    for x, v in zip(together.x, batch, strict=True):
        close(x, solution(v, fl.Dense()).x, 1e-12)

    def derivatives(solver):
        def loss(values):
            return solution(values, solver).x @ w

        return torch.func.grad(loss)(poor), torch.func.jvp(loss, (poor,), (poor * randn(len(poor), seed=3),))[1]

    for got, want in zip(derivatives(fl.Direct()), derivatives(fl.Dense()), strict=True):
        close(got, want, 1e-10)


def test_clusters_are_small_and_hold_what_depends_strongly():
    """Lines that share a column: one cluster for each star, though all hang together; those of a file stay in order."""
    common = torch.linspace(1, 2, 6 * COUNT).double()
    pattern, values = lines(common)
    norms = torch.zeros(pattern.shape[1]).double().index_add_(0, pattern.indices[1], values.square()).sqrt()
    label = clustered(GramAnalysis(pattern, complex_values=False), values, norms)
    assert label.tolist() == [j // 2 for j in range(2 * COUNT + 1)]
    (stars, alone) = sorted(Clusters(pattern, label).kinds, key=lambda kind: -kind.columns.shape[1])
    assert (stars.columns.shape, alone.columns.shape) == ((COUNT, 2), (1, 1))
    dense = stars.dense(values, None)
    assert torch.equal(dense[7, :6], values[: 12 * COUNT].view(2, COUNT, 6)[:, 7].T)
    assert not dense[:, 6:].any()
