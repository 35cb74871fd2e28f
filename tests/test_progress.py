"""`progress`: every long thing tells how far it has come, and counts add up."""

import functools
import math

import pytest
import torch
from helpers import normal, problem
from tqdm import tqdm

import functional_lstsq as fl

F64 = torch.float64


def network(n=400):
    """Differences along a ring and its chords: some tens of iterations."""
    g = torch.Generator().manual_seed(0)
    ring = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
    ends = torch.cat([ring, torch.randint(n, (2, n), generator=g)], 1)
    ends = ends[:, ends[0] != ends[1]]
    rows = torch.arange(ends.shape[1])
    D = fl.SparseMatrix(
        torch.cat([torch.ones(len(rows)), -torch.ones(len(rows))]).double(),
        fl.SparsePattern(torch.stack([rows.repeat(2), ends.reshape(-1)]), (len(rows), n)),
    )
    return fl.vstack([D, 0.3 * fl.eye(n)])


def watched(compute):
    steps = []
    with fl.progress(steps.append):
        result = compute()
    return steps, result


def count(steps, phase):
    return sum(step.phase == phase for step in steps)


@pytest.mark.parametrize("columns", [None, 1, 3])
@pytest.mark.parametrize(
    "solver",
    [fl.CGLS(), fl.CGLS(tolerance=1e-14), fl.Direct(), fl.Dense(), fl.CGLS(preconditioner=lambda g: g / 5)],
    ids=["cgls", "tight", "direct", "dense", "preconditioned"],
)
def test_solving_steps_add_up_to_the_iterations(solver, columns):
    A = network()
    b = normal(*((A.shape[0],) if columns is None else (A.shape[0], columns)))
    steps, solution = watched(lambda: fl.solve(A, b, solver=solver))
    solving = [step for step in steps if step.phase == "solve"]
    assert [step.iteration for step in solving] == list(range(1, len(solving) + 1))
    most = int(solution.info.iterations.max())
    assert len(solving) == most if columns in (None, 1) else len(solving) >= most
    assert (count(steps, "search") > 0) == isinstance(solver, fl.CGLS)
    assert count(steps, "factor") == isinstance(solver, fl.Direct)


def test_a_callback_is_called_for_each_iteration_of_a_solution():
    A, seen = network(), []
    b = normal(A.shape[0])
    solution = fl.solve(A, b, solver=fl.CGLS(callback=lambda *step: seen.append(step)))
    assert len(seen) == int(solution.info.iterations) > 20
    assert seen[0][0] == 1
    assert torch.equal(fl.solve(A, b, solver=fl.CGLS()).x.isfinite(), solution.x.isfinite())


def test_errors_of_a_run_fall():
    A = network()
    steps, _ = watched(lambda: fl.solve(A, normal(A.shape[0]), solver=fl.CGLS()))
    errors = [step.error for step in steps if step.phase == "solve"]
    assert min(errors) < 1e-8 * errors[0]


@pytest.mark.parametrize("bounds", [None, (0.0, 2.5)])
def test_fits_and_robust_fits(bounds):
    t = torch.linspace(0, 2, 20, dtype=F64)

    def misfit(x, y):
        return x[0] * torch.exp(-x[1] * t) - y

    y = 3 * torch.exp(-0.7 * t) + 0.1 * normal(20)
    steps, fit = watched(lambda: fl.gauss_newton(misfit, torch.ones(2, dtype=F64), (y,), bounds=bounds))
    assert count(steps, "fit") == int(fit.info.iterations) > 1
    assert all(step.total is not None and step.total >= step.iteration for step in steps if step.phase == "fit")
    pattern, values, b = problem(30, 4)
    A = fl.SparseMatrix(values, pattern)
    steps, solution = watched(lambda: fl.solve(A, b, robust=fl.Huber(0.5)))
    assert count(steps, "fit") == int(solution.info.iterations) > 1


def test_derivatives_are_told_and_nothing_outside():
    A = network(60)
    b = normal(A.shape[0])
    alone, _ = watched(lambda: fl.lstsq(A, b, solver=fl.CGLS()))
    steps, gradient = watched(lambda: torch.func.grad(lambda b: fl.lstsq(A, b, solver=fl.CGLS()).sum())(b))
    assert len(steps) > len(alone)
    before = len(steps)
    assert torch.equal(gradient, torch.func.grad(lambda b: fl.lstsq(A, b, solver=fl.CGLS()).sum())(b))
    assert len(steps) == before


def test_one_watch_within_another():
    A, outer, inner = network(60), [], []
    b = normal(A.shape[0])
    with fl.progress(outer.append):
        with fl.progress(inner.append):
            fl.lstsq(A, b, solver=fl.CGLS())
        fl.lstsq(A, b, solver=fl.Dense())
    assert outer[: len(inner)] == inner
    assert len(outer) > len(inner) > 0


class _Stop(Exception):
    pass


def test_an_exception_ends_the_computation():
    A = network()

    def stop(step):
        if step.iteration == 5:
            raise _Stop

    with pytest.raises(_Stop), fl.progress(stop):
        fl.lstsq(A, normal(A.shape[0]), solver=fl.CGLS())
    assert watched(lambda: fl.lstsq(A, normal(A.shape[0]), solver=fl.Dense()))[0][0].iteration == 1


def test_a_line_on_standard_error(capsys, monkeypatch):
    A = network()
    every = functools.partial(tqdm, mininterval=0)
    monkeypatch.setattr("functional_lstsq.solvers.watching.tqdm", every)
    monkeypatch.setattr("functional_lstsq.solvers.watching._DELAY", 0.0)
    with fl.progress():
        fl.lstsq(A, normal(A.shape[0]), solver=fl.CGLS())
    told = capsys.readouterr().err
    assert "solve" in told
    assert "error=" in told


def test_what_is_refused():
    with pytest.raises(TypeError, match="show must be callable or None, got 3"):
        fl.progress(3)


def test_steps_without_an_error_are_nan():
    steps, _ = watched(lambda: fl.lstsq(network(30), normal(network(30).shape[0]), solver=fl.Direct()))
    (factor,) = [step for step in steps if step.phase == "factor"]
    assert math.isnan(factor.error)
    assert factor.total == 1


def test_studies_tell_of_their_blocks():
    A = network(300)
    steps, _ = watched(lambda: fl.covariance_diagonal(A, solver=fl.Dense()))
    studied = [step for step in steps if step.phase == "study"]
    assert [(step.iteration, step.total) for step in studied] == [(1, 2), (2, 2)]  # of 256 columns each


@pytest.mark.parametrize(
    "study", [fl.leverage, lambda A: fl.leave_one_out(A, normal(A.shape[0]))], ids=["leverage", "leave_one_out"]
)
def test_studies_tell_of_their_end(study):
    A = network(300)
    last = [step for step in watched(lambda: study(A))[0] if step.phase == "study"][-1]
    assert last.iteration == last.total


A_SMALL = fl.vstack([network(40), network(40)])
B_SMALL = torch.linspace(-1, 1, A_SMALL.shape[0], dtype=F64) ** 2
DECAY = torch.exp(-torch.linspace(0, 2, 9, dtype=F64))
START = torch.tensor([0.5], dtype=F64)


def as_column(p):
    return fl.SparseMatrix(torch.exp(-p * torch.linspace(0, 2, 9, dtype=F64)), fl.SparsePattern(ONE, (9, 1)))


ONE = torch.stack([torch.arange(9), torch.zeros(9, dtype=torch.int64)])
OPTION = {
    "lstsq": lambda **o: fl.lstsq(A_SMALL, B_SMALL, solver=fl.CGLS(), **o),
    "solve": lambda **o: fl.solve(A_SMALL, B_SMALL, solver=fl.Direct(), **o).x,
    "robust": lambda **o: fl.lstsq(A_SMALL, B_SMALL, robust=fl.Huber(1.0), **o),
    "bounds": lambda **o: fl.lstsq(A_SMALL, B_SMALL, bounds=(0.1, 0.3), **o),
    "leverage": lambda **o: fl.leverage(A_SMALL, **o),
    "leave_one_out": lambda **o: fl.leave_one_out(A_SMALL, B_SMALL, **o),
    "covariance": lambda **o: fl.covariance(A_SMALL, [0, 3], solver=fl.CGLS(), **o),
    "covariance_diagonal": lambda **o: fl.covariance_diagonal(A_SMALL, **o),
    "gauss_newton": lambda **o: fl.gauss_newton(lambda x, y: as_column(x).matmul(x / x) - y, START, (DECAY,), **o).x,
    "variable_projection": lambda **o: fl.variable_projection(as_column, START, DECAY, **o).p,
}


@pytest.mark.parametrize("name", OPTION)
def test_the_option_tells_what_a_watch_is_told(name):
    call, told = OPTION[name], []
    steps, want = watched(call)
    assert torch.equal(call(progress=told.append), want)
    assert told == steps or all(math.isnan(step.error) for step in steps)
    assert len(told) == len(steps) > 0


def test_the_option_shows_a_line(capsys, monkeypatch):
    monkeypatch.setattr("functional_lstsq.solvers.watching._DELAY", 0)
    OPTION["lstsq"](progress=True)
    assert "starting" in capsys.readouterr().err
    OPTION["lstsq"]()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("wrong", [None, 1, "yes"])
def test_other_options_are_refused(wrong):
    with pytest.raises(TypeError, match="progress must be True, False or callable, got"):
        OPTION["lstsq"](progress=wrong)
