"""More right-hand sides than are solved for together: each column comes out as it does alone."""

import pytest
import torch
from helpers import SOLVERS, close, problem
from torch.func import grad, vmap

import functional_lstsq as fl
from functional_lstsq.linear import blocks as rooms
from functional_lstsq.linear import small

COLUMNS = 11  # in blocks of four: two whole ones, and a rest of three
SHAPES = {"tall": (9, 5), "wide": (9, 14)}
OPTIONS = {
    "plain": {},
    "damp": {"damp": 0.3},
    "weights": {"weights": torch.linspace(0.5, 2, 9, dtype=torch.float64)},
    "constraint": {"weights": torch.tensor([torch.inf, *range(1, 9)], dtype=torch.float64)},
    "extended": {"refine": "extended"},
}


@pytest.fixture
def blocks(monkeypatch):
    """The columns of each block that was solved for, four at most where nothing else is said."""
    widths, solve = [], rooms._solve_block

    def counted(system, factors, b, *rest):
        widths.append(b.shape[2])
        return solve(system, factors, b, *rest)

    for name in ("_BLOCK", "_FACTOR_BLOCK"):
        monkeypatch.setattr(rooms, name, 1)
    monkeypatch.setattr(rooms, "_FACTOR_COLUMNS", 4)
    monkeypatch.setattr(small, "is_small", lambda *given: False)
    monkeypatch.setattr(rooms, "_solve_block", counted)
    return widths


def many(m, n, columns=COLUMNS, dtype=torch.float64):
    """(A, right-hand sides of sizes over sixty decades, one of zeros among them)."""
    pattern, values, b = problem(m, n, dtype=dtype)
    noise = torch.randn(m, columns, dtype=dtype, generator=torch.Generator().manual_seed(1))
    B = (b[:, None] + noise) * 10 ** torch.linspace(-30, 30, columns, dtype=torch.float64)
    B[:, 5] = 0
    return fl.SparseMatrix(values, pattern), B


def held(together, alone, b, j, tolerance=1e-12):
    """Column j of a solution for all against the solution for it alone, the right-hand side b."""
    unit = float(alone.x.abs().max()) or 1.0
    close(together.x[..., j] / unit, alone.x / unit, tolerance)
    unit = float(b.abs().max()) or 1.0
    close(together.residual[..., j] / unit, alone.residual / unit, tolerance)
    for name in ("status_code", "method_code", "rank"):
        assert getattr(together.info, name)[j] == getattr(alone.info, name), name
    for name in ("condition", "norm"):
        close(getattr(together.info, name)[j], getattr(alone.info, name), 1e-12)


CELLS = [("tall", name) for name in OPTIONS] + [("wide", name) for name in OPTIONS if name != "constraint"]


@pytest.mark.parametrize(("shape", "options"), CELLS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_columns_in_blocks_are_those_that_are_solved_for_alone(solver, shape, options, blocks):
    A, B = many(*SHAPES[shape])
    settings = {"solver": SOLVERS[solver], **OPTIONS[options]}
    together = fl.solve(A, B, **settings)
    assert blocks == [4, 4, 3]
    for j in range(COLUMNS):
        alone = fl.solve(A, B[:, j], **settings)
        assert blocks.pop() == 1
        held(together, alone, B[:, j], j)
        # An estimate of the error, of this column and no other.
        claims = float(together.info.forward_error[j]), float(alone.info.forward_error)
        assert claims[0] <= 100 * claims[1] + 1e-13
        assert claims[1] <= 100 * claims[0] + 1e-13


@pytest.mark.parametrize("solver", SOLVERS)
def test_starts_are_cut_as_right_hand_sides_are(solver, blocks):
    """A start that is the solution needs no iterations; the one of another column would."""
    A, B = many(9, 5)
    x0 = fl.lstsq(A, B, solver=SOLVERS[solver])
    del blocks[:]
    again = fl.solve(A, B, x0=x0, solver=SOLVERS[solver])
    assert blocks == [4, 4, 3]
    for j in range(COLUMNS):
        held(again, fl.solve(A, B[:, j], x0=x0[:, j], solver=SOLVERS[solver]), B[:, j], j)
    if solver == "cgls":
        assert (again.info.iterations < fl.solve(A, B, solver=SOLVERS[solver]).info.iterations).sum() > COLUMNS // 2


@pytest.mark.parametrize("transform", ["values", "b", "damp", "weights"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_derivatives_in_blocks_are_sums_of_those_of_columns(solver, shape, transform, blocks):
    A, _ = many(*SHAPES[shape])
    B = torch.randn(9, COLUMNS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x_bar = torch.randn(A.shape[1], COLUMNS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    place = ["values", "b", "damp", "weights"].index(transform)
    rest = torch.tensor(0.3, dtype=torch.float64), torch.linspace(0.5, 2, 9, dtype=torch.float64)

    def loss(values, b, damp, weights, x_bar):
        matrix = fl.SparseMatrix(values, A.pattern)
        return (fl.lstsq(matrix, b, damp=damp, weights=weights, solver=SOLVERS[solver]) * x_bar).sum()

    together = grad(loss, place)(A.values, B, *rest, x_bar)
    assert len(blocks) >= 6
    assert max(blocks) == 4
    alone = [grad(loss, place)(A.values, B[:, j], *rest, x_bar[:, j]) for j in range(COLUMNS)]
    close(together, torch.stack(alone, 1) if transform == "b" else sum(alone), 1e-11)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_batch_of_matrices_in_blocks(solver, blocks):
    A, B = many(9, 5, dtype=torch.complex128)
    values = torch.stack([A.values, A.values.conj() + 0.1])

    def solve(values, b):
        return fl.lstsq(fl.SparseMatrix(values, A.pattern), b, solver=SOLVERS[solver])

    together = vmap(solve, (0, None))(values, B)
    assert blocks == [4, 4, 3]
    for p in range(2):
        for j in range(COLUMNS):
            want = solve(values[p], B[:, j])
            unit = float(want.abs().max()) or 1.0
            close(together[p, :, j] / unit, want / unit, 1e-12)


@pytest.mark.parametrize("solver", ["dense", "direct"])
def test_a_null_space_serves_every_block(solver, blocks):
    A = torch.randn(9, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    A[:, 4] = A[:, 3]
    _, B = many(9, 5)
    x = fl.lstsq(A.to_sparse(), B, rank_deficient="minimum_norm", solver=SOLVERS[solver])
    assert blocks == [4, 4, 3]
    for column, b in zip(x.T, B.T, strict=True):
        unit = float(b.abs().max()) or 1.0
        close(column / unit, torch.linalg.pinv(A, rtol=1e-10) @ b / unit, 1e-11)


@pytest.mark.parametrize("column", [0, 6, 10])
def test_a_column_that_fails_in_a_later_block_is_named(column, blocks):
    """Its own number, not that in its block; and without exceptions the others are not spoilt."""
    A, _ = many(9, 5)
    B = torch.ones(9, COLUMNS, dtype=torch.float64)
    B[:, column] = 1e300  # beside so small a matrix x overflows
    A = fl.SparseMatrix(1e-20 * A.values, A.pattern)
    with pytest.raises(fl.ConvergenceError, match=rf"1 of 11 right-hand sides failed; the first: column {column}\b"):
        fl.lstsq(A, B)
    codes = fl.solve(A, B, throw=False).info.status_code
    assert codes.nonzero().flatten().tolist() == [column]


@pytest.mark.parametrize("name", ["dense", "direct"])
def test_blocks_of_their_real_size(name, monkeypatch):
    """More than 2^21 numbers: 33 columns of 2^16 rows and more, in blocks of 32 at most."""
    widths, solve = [], rooms._solve_block
    monkeypatch.setattr(
        rooms, "_solve_block", lambda s, f, b, *rest: widths.append(b.shape[2]) or solve(s, f, b, *rest)
    )
    m, n, columns = 2**16, 4 if name == "dense" else 2000, 33
    row = torch.arange(m)
    indices = torch.stack([row.repeat(2), torch.cat([row % n, (row + 1) % n])])
    assert m * n > 2**17
    g = torch.Generator().manual_seed(0)
    A = fl.SparseMatrix(torch.randn(2 * m, generator=g, dtype=torch.float64), fl.SparsePattern(indices, (m, n)))
    B = torch.randn(m, columns, generator=g, dtype=torch.float64)
    together = fl.solve(A, B, solver=SOLVERS[name])
    assert len(widths) == 2
    assert sum(widths) == columns
    for j in (0, widths[0] - 1, widths[0], columns - 1):
        held(together, fl.solve(A, B[:, j], solver=SOLVERS[name]), B[:, j], j)
