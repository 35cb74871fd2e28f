"""Designs without full rank, beyond `lstsq`: two-way dummies, free networks."""

import pytest
import torch
from helpers import close, normal
from torch.func import grad, jvp

import functional_lstsq as fl
from functional_lstsq import hat_matrix

F64 = torch.float64
LEAST = {"rank_deficient": "minimum_norm"}
ROWS = 60


def two_way():
    """(A, dense): one regressor, dummies of eight units and of four times, of which one is too many; one lone row."""
    unit, time = torch.arange(ROWS) % 8, (torch.arange(ROWS) * 7 // 11) % 4
    X = torch.cat([normal(ROWS, 1), torch.eye(8, dtype=F64)[unit], torch.eye(4, dtype=F64)[time]], 1)
    X = torch.cat([torch.cat([X, torch.zeros(ROWS, 1, dtype=F64)], 1), torch.ones(1, 14, dtype=F64)])
    return fl.SparseMatrix.from_torch(X.to_sparse()), X


A, X = two_way()
W, Y = torch.linspace(0.5, 2, ROWS + 1, dtype=F64), normal(ROWS + 1, seed=1)


def inverse(X, weights):
    """(X^T W X)^+, whose smallest eigenvalue that is not zero is above 1e-3 of the largest."""
    return torch.linalg.pinv(X.T @ (weights[:, None] * X), rtol=1e-9)


def left_out(X, weights):
    """By leaving out one row after the other."""

    def without(i):
        keep = torch.arange(len(X)) != i
        return Y[i] - X[i] @ inverse(X[keep], weights[keep]) @ (X[keep].T @ (weights[keep] * Y[keep]))

    return torch.stack([without(i) for i in range(len(X) - 1)])


def KEPT(X):
    """Columns that are independent, with the same range."""
    return torch.cat([X[:, :-2], X[:, -1:]], 1)


STUDIES = {
    "leverage": (
        lambda A, w: fl.leverage(A, w, **LEAST),
        lambda X, w: (X @ inverse(X, w) @ X.T).diagonal() * w,
    ),
    "covariance": (lambda A, w: fl.covariance(A, [0, 3], w, **LEAST), lambda X, w: inverse(X, w)[:, [0, 3]]),
    "covariance_diagonal": (
        lambda A, w: fl.covariance_diagonal(A, w, **LEAST),
        lambda X, w: inverse(X, w).diagonal(),
    ),
    "leave_one_out": (lambda A, w: fl.leave_one_out(A, Y, w, **LEAST)[:-1], left_out),
    "robust": (
        lambda A, w: A.matmul(fl.lstsq(A, Y, weights=w, robust=fl.Huber(0.5), **LEAST)),
        lambda X, w: KEPT(X) @ fl.lstsq(KEPT(X).to_sparse(), Y, weights=w, robust=fl.Huber(0.5)),
    ),
}


@pytest.mark.parametrize("study", STUDIES)
def test_studies_are_those_of_the_pseudoinverse(study):
    ours, dense = STUDIES[study]
    close(ours(A, W), dense(X, W), 1e-10)


@pytest.mark.parametrize("study", STUDIES)
def test_studies_have_derivatives_along_changes_that_keep_the_rank(study):
    ours, dense = STUDIES[study]
    rows, columns = normal(ROWS + 1, seed=2), normal(14, seed=3)
    change = X * (rows[:, None] + columns)
    along = change[tuple(A.pattern.indices)]
    h = 1e-6
    want = (dense(X + h * change, W).sin().sum() - dense(X - h * change, W).sin().sum()) / (2 * h)
    f = lambda v: ours(fl.SparseMatrix(v, A.pattern), W).sin().sum()  # noqa: E731
    close(grad(f)(A.values) @ along, want, 1e-6)
    close(jvp(f, (A.values,), (along,))[1], want, 1e-6)


def test_a_row_that_no_other_controls_is_not_a_number():
    assert fl.leave_one_out(A, Y, **LEAST)[-1].isnan()


KEPT_STUDIES = {name: study for name, study in STUDIES.items() if name != "robust"}


@pytest.mark.parametrize("study", KEPT_STUDIES)
def test_studies_take_factors_of_least_norm(study, monkeypatch):
    """Everything is decided when they are made: what was A is F, and no study is told of weights or rank."""
    F = fl.factorize(A, weights=W, **LEAST)
    monkeypatch.setitem(LEAST, "rank_deficient", "raise")
    close(STUDIES[study][0](F, None), STUDIES[study][1](X, W), 1e-10)


def test_factors_hold_what_rank_is():
    near = fl.SparseMatrix(A.values + 1e-9 * normal(len(A.values), seed=4), A.pattern)
    F = fl.factorize(near, rank_tolerance=1e-7, **LEAST)
    assert F.info.rank == 13
    close(fl.lstsq(F, Y), torch.linalg.pinv(X, rtol=1e-9) @ Y, 1e-7)
    with pytest.raises(TypeError, match=r"factorize\(A, rank_tolerance=...\) takes it"):
        fl.leverage(F, rank_tolerance=1e-7)
    with pytest.raises(ValueError, match="rank_deficient='minimum_norm', which factorize takes"):
        fl.covariance_diagonal(F, **LEAST)


def test_leverages_of_least_norm_are_taken_by_the_columns_of_A(monkeypatch):
    monkeypatch.setattr(hat_matrix, "_by_rows", None)
    close(fl.leverage(A, W, **LEAST), STUDIES["leverage"][1](X, W), 1e-10)


@pytest.mark.parametrize("solver", [fl.Dense(), fl.Direct()])
def test_leverages_by_samples(solver):
    close(fl.leverage(A, W, samples=4000, **LEAST, solver=solver), STUDIES["leverage"][1](X, W), 0.1)


@pytest.mark.parametrize("solver", [fl.Dense(), fl.Direct()])
@pytest.mark.parametrize("noise", [1e-12, 1e-9])
def test_rank_tolerance_says_what_is_rank(solver, noise):
    near = fl.SparseMatrix(A.values + noise * normal(len(A.values), seed=4), A.pattern)
    assert fl.solve(near, Y, solver=solver, throw=False).info.rank == 14
    with pytest.raises(fl.RankDeficientError):
        fl.lstsq(near, Y, solver=solver, rank_tolerance=1e-7)
    close(fl.lstsq(near, Y, solver=solver, rank_tolerance=1e-7, **LEAST), torch.linalg.pinv(X, rtol=1e-9) @ Y, 1e-7)
    close(
        fl.leverage(near, solver=solver, rank_tolerance=1e-7, **LEAST), STUDIES["leverage"][1](X, torch.ones(61)), 1e-7
    )


@pytest.mark.parametrize("tolerance", [0.0, -1.0, 1e-3])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    with pytest.raises(ValueError, match="rank_tolerance must be above 0 and below 1e-06"):
        fl.lstsq(A, Y, rank_tolerance=tolerance)


@pytest.mark.parametrize(
    ("call", "absent"),
    [
        (lambda: fl.leverage(A), "damp"),
        (lambda: fl.covariance(A, [0], solver=fl.CGLS()), "damp"),
        (lambda: fl.lstsq(A, Y, bounds=(-9.0, 9.0)), "minimum_norm"),
        (lambda: fl.variable_projection(lambda p: A, torch.ones(1, dtype=F64), Y), "minimum_norm|damp"),
    ],
)
def test_no_message_offers_what_is_not_taken(call, absent):
    with pytest.raises(fl.RankDeficientError) as error:
        call()
    assert not any(word in str(error.value) for word in absent.split("|"))


@pytest.mark.parametrize("study", [fl.leverage, fl.covariance_diagonal, fl.condition])
def test_studies_need_solutions(study):
    with pytest.raises(ValueError, match=r"needs solutions, and solver=CGLS\(steps=3\) stops short"):
        study(A, solver=fl.CGLS(steps=3))


def test_a_robust_fit_has_the_least_norm_and_its_derivatives():
    """They include the turning of the null space, which A^+ has: seen by its own differences."""

    def fit(v):
        return fl.lstsq(fl.SparseMatrix(v, A.pattern), Y, robust=fl.Huber(0.5), x0=torch.ones(14, dtype=F64), **LEAST)

    x = fit(A.values)
    null = torch.linalg.svd(X).Vh[-1]
    assert float((null @ x).abs()) < 1e-12
    rows, columns = normal(ROWS + 1, seed=2)[:, None], normal(14, seed=3)
    places = tuple(A.pattern.indices)
    scaled = lambda h: (X * (1 + h * rows) * (1 + h * columns))[places]  # noqa: E731 (which keeps the rank)
    along = (X * (rows + columns))[places]
    want = (fit(scaled(1e-5)) - fit(scaled(-1e-5))) / 2e-5
    close(jvp(fit, (A.values,), (along,))[1], want, 1e-6)


POINTS = 100 * torch.rand(8, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
FROM, TO = torch.combinations(torch.arange(8)).T
START = (POINTS + 0.5 * normal(8, 2, seed=1)).reshape(-1)


def lengths(x):
    return (x.view(-1, 2)[FROM] - x.view(-1, 2)[TO]).norm(dim=1)


MEASURED = lengths(POINTS) + 0.01 * normal(len(FROM), seed=2)


def held(measured):
    """The network with a point held, and a direction: the same shape."""
    x = lambda y: torch.cat([START[:3], y])  # noqa: E731
    return x(fl.gauss_newton(lambda y, d: lengths(x(y)) - d, START[3:], (measured,)).x)


def free(measured, **options):
    return fl.gauss_newton(lambda x, d: lengths(x) - d, START, (measured,), **LEAST, **options).x


@pytest.mark.parametrize("options", [{}, {"solver": fl.Direct()}, {"robust": fl.Huber(1.0)}], ids=str)
def test_a_free_network_has_the_shape_of_one_that_is_held(options):
    x = free(MEASURED, **options)
    close(lengths(x), lengths(held(MEASURED)), 1e-10)
    moved = (x - START).view(-1, 2)  # three steps of least change, each about the centre of where it starts
    assert float(moved.mean(0).norm()) < 1e-10
    assert float((x - START).norm()) < float((held(MEASURED) - START).norm())


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd])
@pytest.mark.parametrize("options", [{}, {"solver": fl.Direct()}], ids=str)
def test_what_a_free_network_determines_is_differentiable(transform, options):
    shape = lambda f, d: lengths(f(d))[:6]  # noqa: E731
    close(
        transform(lambda d: shape(lambda d: free(d, **options), d))(MEASURED),
        transform(lambda d: shape(held, d))(MEASURED),
        1e-8,
    )


def test_second_derivatives_of_a_free_network():
    of = lambda f: torch.func.hessian(lambda s: lengths(f(MEASURED + s * MEASURED.sin())).cos().sum())  # noqa: E731
    s = torch.zeros((), dtype=F64)
    close(of(free)(s), of(held)(s), 1e-6)


def test_a_direction_that_is_no_gauge_is_refused():
    """J has no part in x_1 at 0, where the cost is a minimum by its second derivative."""
    with pytest.raises(
        fl.RankDeficientError, match=r"changes along its null space all the same.*rank_deficient='raise'"
    ):
        fl.gauss_newton(
            lambda x: torch.stack([x[0] - 1, x[1].square() + 1]), torch.tensor([3.0, 0.0], dtype=F64), **LEAST
        )


def test_without_full_rank_the_advice_is_to_take_a_gauge():
    with pytest.raises(fl.RankDeficientError, match="rank_deficient='minimum_norm' where the fit has a gauge"):
        fl.gauss_newton(lambda x, d: lengths(x) - d, START, (MEASURED,))


@pytest.mark.parametrize("solver", [None, fl.Dense(), fl.Direct()])
def test_a_row_without_weight_has_the_residual_of_the_solution_of_least_norm(solver):
    """It may see what no other row does, and what is projected off x."""
    A = torch.tensor([[1.0, 1], [1, 2], [1, 2]], dtype=torch.float64)
    b, weights = torch.tensor([1.0, 2, 3]).double(), torch.tensor([0.0, 1, 1]).double()
    matrix = fl.SparseMatrix.from_dense(A)

    def residual(values):
        matrix_of = fl.SparseMatrix(values, matrix.pattern)
        found = fl.solve(matrix_of, b, weights=weights, rank_deficient="minimum_norm", solver=solver)
        return found.residual

    x = torch.tensor([0.5, 1.0]).double()
    torch.testing.assert_close(residual(matrix.values), b - A @ x, rtol=1e-14, atol=0)
    backward, forward = (transform(residual)(matrix.values) for transform in (torch.func.jacrev, torch.func.jacfwd))
    want = [[-0.5, -1.0, 0.08, 0.41, 0.02, 0.29]]  # of the row without weight
    torch.testing.assert_close(backward[:1], torch.tensor(want).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(forward, backward, rtol=1e-12, atol=1e-12)
    left_out = fl.leave_one_out(matrix, b, weights, rank_deficient="minimum_norm", solver=solver)
    assert float(left_out[0]) == pytest.approx(-0.5, rel=1e-12)
