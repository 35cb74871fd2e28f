"""How the default chooses among methods; their settings; what `info` says of both."""

import ast
import inspect
import math
import pickle
import textwrap
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers import close, problem, with_singular_values
from worlds import grid as cube

import functional_lstsq as fl
from functional_lstsq import result
from functional_lstsq.solvers import Factors, Solver, costs
from functional_lstsq.solvers.auto import _Chain
from functional_lstsq.solvers.plan import Step


def grid(k=64):
    """(A, edges, x): first differences on a k x k grid, and a few fixed points, too many for a dense factor."""
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
    return A, edges, x


@pytest.mark.parametrize(
    ("solver", "method"), [(None, "cgls"), (fl.CGLS(), "cgls"), (fl.Direct(), "direct")], ids=["auto", "cgls", "direct"]
)
def test_large_and_sparse(solver, method):
    A, _, x = grid()
    solution = fl.solve(A, A @ x, solver=solver)
    assert solution.info.method.startswith(method)
    assert float((solution.x - x).norm() / x.norm()) < 1e-10


def test_large_and_sparse_without_full_rank():
    """The grid without its fixed points: a constant is free."""
    A, edges, x = grid()
    n = len(x)
    pattern = fl.SparsePattern(A.pattern.indices[:, : 2 * edges], (edges, n))
    free, ones = fl.SparseMatrix(A.values[: 2 * edges], pattern), torch.ones(edges, dtype=torch.float64)
    with pytest.raises(fl.RankDeficientError, match=f"rank below {n}"):
        fl.lstsq(free, ones, solver=fl.CGLS())
    with pytest.raises(fl.RankDeficientError, match=f"rank {n - 1}, not full rank {n}.*columns .* take part"):
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


def test_the_default_moves_on_and_says_so(monkeypatch):
    """From an iteration that ends too early to a factor; from few columns to a dense factor at once."""
    pattern, values, b = problem(60, 20)
    A = fl.SparseMatrix(values, pattern)
    assert fl.solve(A, b).info.tried == "Dense (few columns)"
    monkeypatch.setattr(costs, "PATIENCE", 1e9)
    assert fl.solve(A, b, solver=fl.Auto(dense_columns=1, dense_bytes=1)).info.method.startswith("direct")
    poor, pattern = with_singular_values(np.logspace(0, -9, 12), 30)
    planned = _Planned((Step(fl.CGLS(), "no factor"), Step(fl.Direct(), "ill-conditioned")))
    solution = fl.solve(fl.SparseMatrix(poor.reshape(-1), pattern), torch.ones(30, dtype=torch.float64), solver=planned)
    assert solution.info.method.startswith("direct")
    assert solution.info.tried == "CGLS (no factor): inaccurate, then Direct (ill-conditioned)"


class _Planned(Solver):
    """The default with a plan of its own."""

    def __init__(self, plan):
        self.plan = plan

    def prepare(self, system, *, minimum_norm):
        return _Chain(iter(self.plan), system, minimum_norm)


STEPS = list(zip(result.SOLVERS * 4, result.REASONS, result.ENDS[1:], strict=False))


@pytest.mark.parametrize("some", [STEPS[:6], STEPS[5:], STEPS[3:4], STEPS[::-2]], ids=len)
def test_what_was_tried_is_a_number_that_a_report_can_hold(some):
    """As many steps as `Auto` plans, each with its reason and its end."""
    code = result.tried_code(some)
    assert int(torch.tensor(float(code), dtype=torch.float64)) == code < 2**53
    assert result.tried_of(code, 0) == ", then ".join(f"{solver} ({reason}): {end}" for solver, reason, end in some)


def test_six_steps_of_the_largest_numbers_fit_into_a_report():
    assert result.tried_code([(result.SOLVERS[-1], result.REASONS[-1], result.ENDS[-1])] * 6) < 2**53
    assert result.tried_of(0, result.method_code("cgls")) == "cgls"


@pytest.mark.parametrize("name", [*result.METHODS, "a", "lsqr-2", "9" * 10, "-" * 10])
def test_the_name_of_a_method_is_a_number_that_a_report_can_hold(name):
    code = result.method_code(name)
    assert int(torch.tensor(float(code), dtype=torch.float64)) == code
    assert result.method_of(code) == name


@pytest.mark.parametrize("name", ["", "LSQR", "a name of mine", "a" * 11])
def test_names_that_a_report_cannot_hold_are_refused(name):
    with pytest.raises(ValueError, match="the name of a method must be"):
        result.method_code(name)


def test_every_reason_of_the_plan_can_be_told():
    tree = ast.parse(textwrap.dedent(inspect.getsource(fl.Auto.plan) + inspect.getsource(fl.Auto._plan_in_memory)))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    docstrings = {ast.get_docstring(node, clean=False) for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert texts - docstrings - {""} <= set(result.REASONS)
    pattern, values, b = problem(60, 20)

    class Patient(fl.CGLS):
        """A solver of the user's own in the default's place."""

    solver = fl.Auto(dense_columns=1, dense_bytes=1, cgls=Patient(), direct=fl.Direct(memory=1))
    assert fl.solve(fl.SparseMatrix(values, pattern), b, solver=solver).info.tried.startswith("CGLS (A^H A would not")


@dataclass(frozen=True)
class Own(Solver):
    """A solver of the user's own that names its method."""

    name: str

    def prepare(self, system, *, minimum_norm):
        return _Named(fl.Dense().prepare(system, minimum_norm=minimum_norm), result.method_code(self.name))


class _Named(Factors):
    def __init__(self, factors, code):
        self.factors, self.code, self.accept = factors, code, factors.accept

    def solve(self, b, c, start=None, *, judged=True):
        r, y, report = self.factors.solve(b, c, judged=judged)
        return r, y, report._replace(method=torch.full_like(report.method, self.code))


@pytest.mark.parametrize("name", ["lsqr", "my-qr-2024"])
@pytest.mark.parametrize(
    "through",
    [
        lambda f, b: f(b),
        lambda f, b: torch.vmap(f)(torch.stack([b, b + 1])),
        lambda f, b: pickle.loads(pickle.dumps(f(b))),
    ],
    ids=["plain", "vmap", "pickle"],
)
def test_a_solver_of_ones_own_names_its_method(name, through):
    pattern, values, b = problem(30, 10)
    info = through(lambda b: fl.solve(fl.SparseMatrix(values, pattern), b, solver=Own(name)).info, b)
    assert info.method == info.tried == name


@pytest.mark.parametrize("solver", [None, fl.Direct(), fl.CGLS()], ids=["auto", "direct", "cgls"])
def test_info_tells_of_the_norm_in_and_out_of_transformations(solver):
    pattern, values, b = problem(30, 10)

    def loss(values):
        solution = fl.solve(fl.SparseMatrix(values, pattern), b, solver=solver)
        return solution.x.sum(), solution.info

    info = loss(values)[1]
    close(info.norm, values.norm(), 1e-14)
    _, inside = torch.func.grad(loss, has_aux=True)(values)
    assert repr(inside) == repr(info)
    assert "norm=" in repr(info)
    assert "code" not in repr(info)  # numbers that stand for words


def test_iterating_is_left_for_a_factor_when_it_promises_to_take_longer(monkeypatch):
    """A random matrix needs few iterations; a path needs about as many as it has steps."""
    monkeypatch.setattr(costs, "PATIENCE", 0)
    monkeypatch.setattr(costs, "_ORDERED", 1e5)
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
    assert found.info.tried == "CGLS (a factor costs more): iteration limit reached, then Direct (a factor costs less)"
    assert len(calls) < n / 4
    close(found.x, truth, 1e-10)
    # The pattern remembers it for nine solves; then values may have changed for the better.
    said = [fl.solve(A, A @ truth, solver=watched).info.tried for _ in range(10)]
    assert said == 9 * ["Direct (a factor costs less)"] + [found.info.tried]
    assert fl.Auto(dense_columns=1, dense_bytes=1).predict(A)[0].method == "Direct"


def test_what_is_predicted_is_what_is_done():
    """Steps in their order, with finite costs where a factor is made; the same plan for A and its transpose."""
    pattern, values, b = problem(60, 20)
    A = fl.SparseMatrix(values, pattern)
    (step,) = fl.Auto().predict(A)
    assert fl.solve(A, b).info.tried == f"{step.method} ({step.reason})"
    assert 0 < step.seconds < 1
    assert math.isnan(step.iteration)
    assert fl.Auto().predict(A.T)[0][:3] == step[:3]
    assert fl.Auto().predict(A.to_torch())[0][:3] == step[:3]
    assert fl.Auto().predict(A.to(torch.float32))[0][:3] == step[:3]
    assert fl.Auto().predict(fl.SparseMatrix(values[:0], fl.SparsePattern(pattern.indices[:, :0], (0, 20)))) == []
    n = 4000
    rows, columns = torch.arange(n).repeat(2), torch.cat([torch.arange(n), torch.arange(1, n + 1) % n])
    path = fl.SparseMatrix(
        torch.cat([torch.ones(n), -0.999 * torch.ones(n)]).double(),
        fl.SparsePattern(torch.stack([rows, columns]), (n, n)),
    )
    steps = fl.Auto().predict(path)
    said = [f"{step.method} ({step.reason})" for step in steps]
    tried = fl.solve(path, path @ torch.ones(n, dtype=torch.float64)).info.tried.split(", then ")
    assert [part.split("):")[0].rstrip(")") for part in tried] == [part.rstrip(")") for part in said[: len(tried)]]
    direct = next(step for step in steps if step.method == "Direct")
    assert 0 < direct.seconds < 60
    assert all(0 < step.iteration < 1 for step in steps if step.method == "CGLS")


@pytest.mark.parametrize("size", [8, 14])
def test_a_total_is_predicted_of_iterating(size):
    """As many iterations as the solve takes, or as the errors of half a second of them promise."""
    A = cube(size)
    told = fl.Auto(dense_columns=1, dense_bytes=1, direct=fl.Direct(memory=1)).predict(A)
    assert [step.method for step in told] == ["CGLS"]
    solution = fl.solve(A, torch.linspace(0, 1, A.shape[0], dtype=torch.float64), solver=fl.CGLS())
    taken = float(solution.info.iterations) * told[0].iteration
    assert taken / 3 < told[0].seconds < 5 * taken + 0.05


def test_a_factor_that_does_not_fit_is_the_only_one_said_not_to_fit():
    pattern, values, _ = problem(900, 600, density=0.01)
    A = fl.SparseMatrix(values, pattern)
    assert "fit into memory" not in str(fl.Auto().predict(A))
    both = fl.Auto(dense_bytes=1).predict(fl.SparseMatrix(values + 1j, pattern))
    assert next(step for step in both if step.method == "Direct").seconds > 0
    tight = fl.Auto(dense_bytes=1, direct=fl.Direct(memory=1))
    assert [(step.method, step.reason) for step in tight.predict(A)] == [("CGLS", "A^H A would not fit into memory")]


def test_what_is_iterated_again_and_again_is_left_for_a_factor_that_takes_less():
    """Once iterating has taken as long as an ordering, which all solves to come have for nothing; then it is tried."""
    A, _, x = grid(100)
    said = [fl.solve(A, A @ x).info.method[:6] for _ in range(25)]
    first = said.index("direct")
    assert said[:first] == first * ["cgls"] != []
    assert said[first : first + 12] == 10 * ["direct"] + ["cgls", "direct"]


def test_columns_that_iterating_was_given_up_for_are_not_searched_for_again(monkeypatch):
    """Three right-hand sides of a mesh, whose known solutions take long to find: a factor, nine times at once."""
    d = torch.arange(31)
    eye, path = torch.eye(32, dtype=torch.float64), torch.zeros(31, 32, dtype=torch.float64)
    path[d, d], path[d, d + 1] = -1.0, 1.0
    G = torch.cat([torch.kron(path, eye), torch.kron(eye, path)])
    A = fl.SparseMatrix.from_torch((torch.eye(1024, dtype=torch.float64) + 10 * G.T @ G).to_sparse())
    searches = []
    prepare = Step.prepare
    monkeypatch.setattr(Step, "prepare", lambda step, *a, **k: searches.append(step.name) or prepare(step, *a, **k))
    b = torch.randn(1024, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(12):
        x = fl.lstsq(A, b)
        close(A @ x, b, 1e-10)
    assert 1 <= searches.count("CGLS") <= 2 < searches.count("Direct")
    before = len(searches)
    fl.lstsq(A, b[:, 0])
    assert searches[before] == "CGLS"  # one column is another matter
