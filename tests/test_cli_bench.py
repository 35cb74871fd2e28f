"""`bench`: times of this library's solvers, and what it says of those that have no answer."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
from helpers import problem

import functional_lstsq as fl
from functional_lstsq.cli import bench, main, timing

NAMES = ["auto", "dense", "direct", "cgls"]


@pytest.fixture
def file(tmp_path):
    def made(matrix, name="A.mtx"):
        scipy.io.mmwrite(tmp_path / name, scipy.sparse.coo_array(matrix), precision=17)
        return f"{tmp_path}/{name}"

    return made


@pytest.fixture
def tall(file):
    pattern, values, _ = problem(40, 10)
    return file(fl.SparseMatrix(values, pattern).to_dense().numpy())


def told(capsys, *arguments):
    status = main(["bench", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_medians_ratios_and_errors(tall, capsys):
    status, found = told(capsys, tall, "--repeats", "3")
    assert status == 0
    assert (found["rows"], found["columns"], found["repeats"]) == (40, 10, 3)
    assert found["threads"] == torch.get_num_threads()
    assert [row["name"] for row in found["solvers"]] == NAMES
    for name in ("solve", "gradient"):
        fastest = min(row[name] for row in found["solvers"])
        for row in found["solvers"]:
            times = row[f"{name}_times"]
            assert len(times) == 3
            assert row[name] == sorted(times)[1]
            assert row[f"{name}_ratio"] == row[name] / fastest
    for row, method in zip(found["solvers"], ("dense", "dense", "direct", "cgls"), strict=True):
        assert row["forward_error"] < 1e-9
        assert row["method"].startswith(method)
        assert row["first"] > 0
        assert row["refused"] is row["reason"] is None


def test_the_order_alternates(tall, capsys, monkeypatch):
    order, measure = [], bench._Contestant.measure
    monkeypatch.setattr(
        bench._Contestant, "measure", lambda self, A, b: (order.append(self.name), measure(self, A, b))[1]
    )
    assert main(["bench", tall, "--repeats", "2"]) == 0
    assert order == NAMES[::-1] + NAMES


def test_a_problem_is_made_where_none_is_given(capsys, monkeypatch):
    monkeypatch.setattr(bench, "_STATIONS", 30)
    monkeypatch.setattr(bench, "_LINES", 90)
    assert main(["bench", "--repeats", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("a levelling network: 90 x 30")
    for name in NAMES:
        assert re.search(rf"^{name} +[\d.]+ ms +[\d.]+ ms +[\d.]+ +[\d.]+ ms", printed.out, re.MULTILINE)
    assert printed.err == ""


def test_right_hand_sides_from_a_file(tall, tmp_path, capsys):
    scipy.io.mmwrite(tmp_path / "b.mtx", np.random.default_rng(0).standard_normal((40, 3)))
    status, found = told(capsys, tall, f"{tmp_path}/b.mtx", "--repeats", "1")
    assert status == 0
    assert all(row["gradient"] > 0 for row in found["solvers"])


def test_what_all_refuse_ends_with_1(file, capsys):
    matrix = file(np.ones((4, 2)))
    assert main(["bench", matrix]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("refused: ") == 4
    assert "refused: rank deficient" in printed.out
    assert printed.err == "functional_lstsq: no solver has an answer\n"
    status, found = told(capsys, matrix)  # one object, not two
    assert status == 1
    assert "rank 1, not full rank 2" in found["solvers"][1]["reason"]


def test_what_cannot_end_in_time_is_not_begun_or_ended(tall, capsys, monkeypatch):
    monkeypatch.setattr(bench, "_DENSE", 9)
    assert main(["bench", tall, "--repeats", "1"]) == 0
    assert "refused: not tried: 10 columns" in capsys.readouterr().out
    contestant = bench._Contestant("cgls", bench._solvers()["cgls"])
    pattern, values, b = problem(40, 10)
    A = fl.SparseMatrix(values, pattern)
    contestant.begin(A, b, limit=0)
    assert contestant.refused == "ended after 0 s"
    contestant = bench._Contestant("direct", bench._solvers()["direct"])
    contestant.begin(A, b, limit=0)
    assert contestant.refused.startswith("not tried: predicted")


def test_what_is_slow_is_called_once(tall, capsys, monkeypatch):
    real = timing.solve

    def slow(A, b, *, solver):
        solution = real(A, b, solver=solver)
        if isinstance(solver, fl.Dense) and A.nnz > 2:
            bench.time.sleep(1.1)
        return solution

    monkeypatch.setattr(bench, "solve", slow)
    assert main(["bench", tall, "--repeats", "1", "--limit", "1"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("dense"))
    assert row.endswith("not repeated")


def test_what_a_process_loads_at_first_is_nobodys_time(tall):
    """Even where there is one call of each, in a new process, gradients take about as long as two solutions."""
    script = f"from functional_lstsq.cli import main; main(['bench', '{tall}', '--repeats', '1', '--json'])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for row in json.loads(run.stdout)["solvers"]:
        assert row["gradient"] < 20 * row["solve"] + 0.5


def test_a_gradient_that_is_refused_is_told(tall, capsys, monkeypatch):
    real = timing.solve

    def spoilt(A, b, *, solver):
        if A.nnz > 2 and torch._C._functorch.maybe_get_level(A.values) > 0:
            raise fl.ConvergenceError("gradient inaccurate")
        return real(A, b, solver=solver)

    monkeypatch.setattr(timing, "solve", spoilt)
    status, found = told(capsys, tall, "--repeats", "1")
    assert status == 0
    for row in found["solvers"]:
        assert row["solve"] > 0
        assert row["gradient"] is None
        assert row["reason"] == "gradient inaccurate"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.mtx"], "no such file"),
        (["{}", "none.mtx"], "no such file"),
        (["{}", "--repeats", "no"], "--repeats: must be a positive integer, got 'no'"),
        (["{}", "--limit", "-1"], "--limit: must be a positive integer, got '-1'"),
    ],
)
def test_bad_input_is_one_line(tall, capsys, arguments, message):
    assert main(["bench", *(argument.format(tall) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
