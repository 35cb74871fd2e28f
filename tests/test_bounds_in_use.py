"""Bounded least squares as it is used: columns, batches, derivatives of every mode, solvers, and what is refused."""

import pickle

import pytest
import scipy.io
import scipy.optimize
import torch
from helpers import full_pattern
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import functional_lstsq as fl
from functional_lstsq.cli import main

F64 = torch.float64


INF = float("inf")


def small(seed=3, m=9, n=4, k=6):
    """(values, b (m, k), lower, upper) of which each column has an active set of its own, and f of these."""
    g = torch.Generator().manual_seed(seed)
    A, b = torch.randn(m, n, generator=g, dtype=F64), torch.randn(m, k, generator=g, dtype=F64)
    lower, upper = torch.tensor([0.0, -0.1, 0.05, -INF], dtype=F64), torch.tensor([INF, 0.1, 0.06, INF], dtype=F64)
    pattern = full_pattern(m, n)

    def f(values, b, lower=lower, upper=upper, **settings):
        return fl.lstsq(fl.SparseMatrix(values, pattern), b, bounds=(lower, upper), **settings)

    return f, A.reshape(-1), b, lower, upper


def test_columns_and_batches_are_problems_of_their_own():
    f, values, b, lower, upper = small()
    X = f(values, b)
    each = torch.stack([f(values, column) for column in b.T], 1)
    torch.testing.assert_close(X, each, rtol=1e-13, atol=0)
    torch.testing.assert_close(vmap(lambda b: f(values, b), 1, 1)(b), each, rtol=1e-13, atol=0)
    different = torch.stack([lower - 0.1 * t for t in range(6)], 1)
    some = f(values, b, different, upper[:, None].expand(-1, 6))
    torch.testing.assert_close(vmap(lambda b, low: f(values, b, low), 1, 1)(b, different), some, rtol=1e-13, atol=0)
    several = torch.stack([values, 1.1 * values, values + 0.1])
    want = torch.stack([f(v, c) for v, c in zip(several, b.T[:3], strict=True)])
    torch.testing.assert_close(vmap(f)(several, b.T[:3]), want, rtol=1e-13, atol=0)
    info = fl.solve(fl.SparseMatrix(values, full_pattern(9, 4)), b, bounds=(lower, upper)).info
    assert info.active.shape == info.multipliers.shape == info.weak.shape == (4, 6)
    assert len(info.active.unique(dim=1).T) > 2
    assert info.forward_error.shape == (6,)
    outward = info.multipliers * info.active
    assert (outward[info.active != 0] > 0).all()
    assert (info.multipliers[info.active == 0] == 0).all()


@pytest.mark.parametrize("number", range(4), ids=["values", "b", "lower", "upper"])
def test_derivatives_of_every_mode_and_of_second_order(number):
    f, values, b, _, _ = small()
    finite = torch.tensor([0.0, -0.1, 0.05, -9.0], dtype=F64), torch.tensor([9.0, 0.1, 0.06, 9.0], dtype=F64)
    args = (values, b[:, 0], *finite)

    def differences(g):
        for e in torch.eye(args[number].numel(), dtype=F64):
            yield (g(*moved(1e-6 * e)) - g(*moved(-1e-6 * e))) / 2e-6

    def moved(by):
        return [a + by if i == number else a for i, a in enumerate(args)]

    def curved(*args):
        return f(*args).sin().sum()

    by_rows, by_columns = jacrev(f, number)(*args), jacfwd(f, number)(*args)
    torch.testing.assert_close(by_rows, by_columns)
    torch.testing.assert_close(by_rows, torch.stack(list(differences(f)), 1), rtol=1e-7, atol=1e-8)
    want = torch.stack(list(differences(grad(curved, number))))
    for second in (hessian, lambda g, i: jacfwd(jacfwd(g, i), i), lambda g, i: jacrev(jacrev(g, i), i)):
        torch.testing.assert_close(second(curved, number)(*args), want, rtol=1e-7, atol=1e-8)
    batched = vmap(jacrev(f, number), (None, 1, None, None))(values, b, *finite)
    torch.testing.assert_close(batched[0], by_rows)


def test_without_strict_complementarity_there_is_an_answer_and_no_derivative():
    _, values, b, _, _ = small()
    matrix, both = fl.SparseMatrix(values, full_pattern(9, 4)), torch.stack([b[:, 0], torch.zeros(9, dtype=F64)])
    assert (fl.lstsq(matrix, both[1], bounds=(0.0, INF)) == 0).all()

    def loss(b, throw):
        return fl.solve(matrix, b, bounds=(0.0, INF), throw=throw).x.sum()

    got = vmap(grad(lambda b: loss(b, False)))(both)
    torch.testing.assert_close(got[0], grad(lambda b: loss(b, True))(both[0]))
    assert got[1].isnan().all()
    for derivative in (grad, jacfwd, hessian):
        with pytest.raises(fl.ConvergenceError, match=r"x has no derivative .*unknowns at their bounds \(0, 1, 2, 3\)"):
            vmap(derivative(lambda b: loss(b, True)))(both)
    info = vmap(lambda b: fl.solve(matrix, b, bounds=(0.0, INF)))(both).info
    assert info.weak.tolist() == [[False] * 4, [True] * 4]
    # What does not depend on that column has a derivative.
    alone = grad(lambda b: fl.lstsq(matrix, b, bounds=(0.0, INF))[:, 0].sum())(both.T)
    torch.testing.assert_close(alone[:, 0], got[0])


def test_equal_bounds_pin_an_unknown_and_it_goes_where_they_go():
    f, values, b, _, _ = small()
    fixed = torch.tensor([0.3, -INF, 0.2, -INF], dtype=F64)

    def x(t):
        return f(
            values, b[:, 0], torch.where(fixed == -INF, -INF, fixed + t), torch.where(fixed == -INF, INF, fixed + t)
        )

    assert x(0.0)[[0, 2]].tolist() == [0.3, 0.2]
    along = jacfwd(x)(torch.zeros((), dtype=F64))
    torch.testing.assert_close(along, (x(1e-6) - x(-1e-6)) / 2e-6, rtol=1e-7, atol=1e-9)
    assert along[[0, 2]].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_without_bounds_that_bind_it_is_lstsq(dtype):
    _, values, b, _, _ = small()
    matrix = fl.SparseMatrix(values.to(dtype), full_pattern(9, 4))
    want = fl.lstsq(matrix, b.to(dtype))
    got = fl.lstsq(matrix, b.to(dtype), bounds=(-INF, torch.full((), 1e3, dtype=dtype)))
    assert got.dtype == dtype
    # Columns that are solved for alone and side by side are rounded in other places, relative to the largest unknown.
    assert ((got - want).abs() <= 4 * torch.finfo(dtype).eps * want.abs().amax(0)).all()


@pytest.mark.parametrize("solver", [fl.Dense(), fl.Direct(), fl.CGLS()], ids=["dense", "direct", "cgls"])
def test_every_solver_finds_the_set(solver):
    g = torch.Generator().manual_seed(0)
    A, b = torch.randn(60, 20, generator=g, dtype=F64), torch.randn(60, generator=g, dtype=F64)
    x = fl.lstsq(A.to_sparse(), b, bounds=(0.0, INF), solver=solver)
    want = torch.from_numpy(scipy.optimize.nnls(A.numpy(), b.numpy())[0])
    torch.testing.assert_close(x, want, rtol=1e-9, atol=1e-12)
    assert torch.equal(x == 0, want == 0)


def test_a_set_that_blocks_do_not_find():
    # Without full rank pivoting has no systems to solve; one unknown after the other is freed.
    g = torch.Generator().manual_seed(1)
    A, b = torch.rand(15, 40, generator=g, dtype=F64), torch.randn(15, generator=g, dtype=F64)
    want = torch.from_numpy(scipy.optimize.nnls(A.numpy(), b.numpy())[0])
    torch.testing.assert_close(fl.lstsq(A.to_sparse(), b, bounds=(0.0, INF)), want, rtol=1e-9, atol=1e-12)
    tall = torch.cat([A[:, :10], A[:, :10]], 1)  # each column twice
    with pytest.raises(fl.RankDeficientError, match="not unique"):
        fl.lstsq(tall.to_sparse(), tall.sum(1), bounds=(0.0, INF))


def test_shares_that_sum_to_one():
    g = torch.Generator().manual_seed(2)
    A, b = torch.rand(30, 8, generator=g, dtype=F64), torch.rand(30, generator=g, dtype=F64)
    A, b = (torch.cat([torch.ones_like(t[:1]), t]) for t in (A, b))
    weights = torch.ones(31, dtype=F64)
    weights[0] = INF
    matrix = fl.SparseMatrix.from_torch(A.to_sparse())
    solution = fl.solve(matrix, b, weights=weights, bounds=(0.0, INF))
    assert float(solution.x.sum()) == pytest.approx(1, abs=1e-15)
    assert solution.residual[0] == 0
    heavy = torch.cat([1e5 * A[:1], A[1:]]), torch.cat([1e5 * b[:1], b[1:]])
    near = torch.from_numpy(scipy.optimize.nnls(*(t.numpy() for t in heavy))[0])
    torch.testing.assert_close(solution.x, near, rtol=1e-6, atol=1e-8)
    with pytest.raises(torch.linalg.LinAlgError):
        fl.lstsq(matrix, b, weights=weights, bounds=(0.0, 0.1))  # which sum to 0.8 at most
    most = torch.tensor([1.0, 0.1], dtype=F64)
    several = vmap(lambda upper: fl.solve(matrix, b, weights=weights, bounds=(0.0, upper), throw=False))(most)
    torch.testing.assert_close(several.x[0], solution.x)
    assert several.info.status_code[0] == 0
    assert several.info.status_code[1] > 1


def test_unknowns_of_any_scale_do_not_hide_each_other():
    g = torch.Generator().manual_seed(4)
    A, b = torch.randn(30, 15, generator=g, dtype=F64), torch.randn(30, generator=g, dtype=F64)
    scales = 2.0 ** torch.randint(-27, 28, (15,), generator=g).to(F64)
    alike = fl.solve(A.to_sparse(), b, bounds=(-0.01, 0.02))
    matrix = fl.SparseMatrix((A * scales).reshape(-1), full_pattern(30, 15))
    x, _, info = fl.solve(matrix, b, bounds=(-0.01 / scales, 0.02 / scales))
    assert torch.equal(info.active, alike.info.active)
    assert not info.weak.any()
    torch.testing.assert_close(x * scales, alike.x, rtol=1e-10, atol=0)
    torch.testing.assert_close(info.multipliers / scales, alike.info.multipliers, rtol=1e-10, atol=0)


def test_no_columns_and_no_entries():
    empty = fl.lstsq(fl.SparseMatrix(torch.ones(2, dtype=F64), full_pattern(2, 1)), torch.ones(2, 0), bounds=(0, 1))
    assert empty.shape == (1, 0)
    nothing = fl.SparseMatrix(torch.ones(0, dtype=F64), fl.SparsePattern(torch.zeros(2, 0, dtype=torch.int64), (3, 2)))
    with pytest.raises(fl.RankDeficientError):
        fl.lstsq(nothing, torch.ones(3), bounds=(0, 1))
    assert (fl.lstsq(nothing, torch.ones(3), bounds=(2, 2)) == 2).all()


F, VALUES, COLUMNS, _, _ = small()
MATRIX, COLUMN, ONE = fl.SparseMatrix(VALUES, full_pattern(9, 4)), COLUMNS[:, 0], torch.ones(4, dtype=F64)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "lower <= upper.* got 2 and 1 at 0", lambda: F(VALUES, COLUMN, 2.0, 1.0)),
        (ValueError, "lower <= upper", lambda: F(VALUES, COLUMN, torch.nan, 1.0)),
        (ValueError, "lower <= upper", lambda: F(VALUES, COLUMN, INF, INF)),
        (
            ValueError,
            r"lower bound must be a number or of shape \(\) or \(4,\), got \(3,\)",
            lambda: F(VALUES, COLUMN, ONE[:3]),
        ),
        (
            TypeError,
            "upper bound must be a number or a dense real tensor, got None",
            lambda: F(VALUES, COLUMN, 0.0, None),
        ),
        (TypeError, r"a pair \(lower, upper\), got float", lambda: fl.lstsq(MATRIX, COLUMN, bounds=0.0)),
        (TypeError, "need real A and b", lambda: fl.lstsq(MATRIX, COLUMN.to(torch.complex128), bounds=(0.0, INF))),
        (ValueError, "allow no robust", lambda: F(VALUES, COLUMN, robust=fl.Huber())),
        (ValueError, "allow no rank_deficient", lambda: F(VALUES, COLUMN, rank_deficient="minimum_norm")),
        (
            ValueError,
            "pins unknown 0 at zero, which its bounds exclude",
            lambda: F(VALUES, COLUMN, ONE, 2.0, damp=ONE * INF),
        ),
    ],
)
def test_what_is_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_traced_by_make_fx():
    f, values, b, _, _ = small()
    loss = grad(lambda values, b: f(values, b).sin().sum())
    graph = make_fx(loss)(values, b[:, 0])
    torch.testing.assert_close(graph(values, b[:, 1]), loss(values, b[:, 1]))


def test_info_goes_through_pickle_and_reads_as_that_of_any_solve():
    _, values, b, lower, upper = small()
    info = fl.solve(fl.SparseMatrix(values, full_pattern(9, 4)), b[:, 0], bounds=(lower, upper)).info
    again = pickle.loads(pickle.dumps(info))
    assert again.status == info.status == "converged"
    assert again.method == info.method
    assert torch.equal(again.active, info.active)
    assert isinstance(info, fl.BoundedInfo)
    assert repr(info).startswith("BoundedInfo(active=[")
    with pytest.raises(AttributeError):
        info.nothing  # noqa: B018


def test_the_command_line(tmp_path, capsys):
    _, values, b, _, _ = small()
    A = fl.SparseMatrix(values, full_pattern(9, 4))
    for name, numbers in (
        ("A", A.to_dense()),
        ("b", b[:, :1]),
        ("u", torch.tensor([[0.1], [1e300], [0.05], [1.0]], dtype=F64)),
    ):
        scipy.io.mmwrite(tmp_path / f"{name}.mtx", numbers.numpy(), precision=17)
    call = ["solve", f"{tmp_path}/A.mtx", f"{tmp_path}/b.mtx", "-o", f"{tmp_path}/x.mtx"]
    upper = torch.tensor([0.1, INF, 0.05, 1.0], dtype=F64)
    for options, bounds in [
        (["--nonnegative"], (0.0, INF)),
        (["--lower", "-0.05", "--upper", "0.05"], (-0.05, 0.05)),
        (["--lower=-inf", "--upper", f"{tmp_path}/u.mtx"], (-INF, upper)),
    ]:
        assert main([*call, *options, "--gradient", f"{tmp_path}/G.mtx"]) == 0
        solution = fl.solve(A, b[:, 0], bounds=bounds)
        low, high = (int((solution.info.active == side).sum()) for side in (-1, 1))
        assert f"{low} lower, {high} upper" in capsys.readouterr().out
        torch.testing.assert_close(torch.tensor(scipy.io.mmread(tmp_path / "x.mtx"))[:, 0], solution.x)
        want = grad(lambda A, bounds=bounds: fl.lstsq(A, b[:, 0], bounds=bounds).sum())(A).to_dense()
        torch.testing.assert_close(torch.tensor(scipy.io.mmread(tmp_path / "G.mtx").toarray()), want)
    for options, message in [
        (["--nonnegative", "--lower", "1"], "argument --nonnegative: not allowed with --lower"),
        (["--lower", "1", "--upper", "0"], "the lower bound must not be above the upper one"),
        (["--upper", "nan"], "argument --upper: must be a number"),
        (["--upper", f"{tmp_path}/b.mtx"], "must hold one column of 4 bounds"),
        (["--nonnegative", "--minimum-norm"], "not allowed with --minimum-norm"),
        (["--nonnegative", "--robust", "huber"], "not allowed with --robust"),
    ]:
        assert main([*call, *options]) == 2
        assert message in capsys.readouterr().err
