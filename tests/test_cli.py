"""The command line, as a person would call it: `solve` and `demo`."""

import gzip
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
from helpers import SHARED, close, problem

import functional_lstsq as fl
from functional_lstsq.cli import main


@pytest.fixture
def files(tmp_path):
    pattern, values, b = problem(8, 3)
    A = fl.SparseMatrix(values, pattern)
    with gzip.open(tmp_path / "A.mtx.gz", "wb") as file:
        scipy.io.mmwrite(file, scipy.sparse.coo_array((values.numpy(), pattern.indices.numpy()), A.shape), precision=17)
    scipy.io.mmwrite(tmp_path / "b.mtx", b.numpy()[:, None], precision=17)
    scipy.io.mmwrite(tmp_path / "bb.mtx", np.stack([b.numpy(), 2 * b.numpy()], 1), precision=17)
    return tmp_path, A, b


def test_solve_writes_solution_and_gradient(files, capsys):
    folder, A, b = files
    arguments = ["solve", f"{folder}/A.mtx.gz", f"{folder}/b.mtx", "-o", f"{folder}/x.mtx", "--damp", "0.5"]
    assert main([*arguments, "--gradient", f"{folder}/G.mtx.gz"]) == 0
    printed = capsys.readouterr().out.replace("estimated error", "error")
    table = dict(line.split(None, 1) for line in printed.splitlines())
    assert table["status"].strip() == "converged"
    assert float(table["error"].split()[0]) < 1e-12
    close(torch.tensor(scipy.io.mmread(folder / "x.mtx"))[:, 0], fl.lstsq(A, b, damp=0.5), 1e-14)
    want = torch.func.grad(lambda A: fl.lstsq(A, b, damp=0.5).sum())(A).to_dense()
    close(torch.tensor(scipy.io.mmread(folder / "G.mtx.gz").toarray()), want, 1e-14)


def test_solve_several_columns_and_none(files, capsys):
    folder, A, b = files
    assert main(["solve", f"{folder}/A.mtx.gz", f"{folder}/bb.mtx", "-o", f"{folder}/x.mtx"]) == 0
    close(torch.tensor(scipy.io.mmread(folder / "x.mtx")), fl.lstsq(A, torch.stack([b, 2 * b], 1)), 1e-14)
    assert main(["solve", f"{folder}/A.mtx.gz", "-o", f"{folder}/x.mtx"]) == 0
    close(torch.tensor(scipy.io.mmread(folder / "x.mtx"))[:, 0], torch.ones(3, dtype=torch.float64), 1e-12)
    assert "right-hand sides: 2" in capsys.readouterr().out


def test_weights_and_refinement_reach_the_solver(files, capsys):
    folder, A, b = files
    weights = torch.arange(1.0, 9.0, dtype=torch.float64)
    scipy.io.mmwrite(folder / "w.mtx", weights.numpy()[:, None])
    arguments = ["solve", f"{folder}/A.mtx.gz", f"{folder}/b.mtx", "-o", f"{folder}/x.mtx"]
    assert main([*arguments, "--weights", f"{folder}/w.mtx", "--refine", "extended", "--quiet"]) == 0
    want = fl.lstsq(A, b, weights=weights, refine="extended")
    close(torch.tensor(scipy.io.mmread(folder / "x.mtx"))[:, 0], want, 1e-15)
    assert capsys.readouterr() == ("", "")


def test_a_robust_loss(files, capsys):
    folder, A, b = files
    arguments = ["solve", f"{folder}/A.mtx.gz", f"{folder}/b.mtx", "-o", f"{folder}/x.mtx", "--robust", "cauchy"]
    assert main([*arguments, "--threshold", "0.7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "IRLS"
    want = fl.lstsq(A, b, robust=fl.Cauchy(0.7))
    close(torch.tensor(scipy.io.mmread(folder / "x.mtx"))[:, 0], want, 1e-14)


@pytest.mark.parametrize(("solver", "method"), [("dense", "dense-"), ("direct", "direct-"), ("cgls", "cgls")])
def test_the_solver_is_the_one_asked_for(files, capsys, solver, method):
    folder, *_ = files
    assert main(["solve", f"{folder}/A.mtx.gz", f"{folder}/b.mtx", "--solver", solver, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"].startswith(method)


def test_a_matrix_without_rows(tmp_path, capsys):
    scipy.io.mmwrite(tmp_path / "A.mtx", scipy.sparse.coo_array((0, 3)))
    assert main(["solve", f"{tmp_path}/A.mtx", "-o", f"{tmp_path}/x.mtx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forward_error"] == 0
    assert (scipy.io.mmread(tmp_path / "x.mtx") == np.zeros((3, 1))).all()


def test_deficient_matrix(tmp_path, capsys):
    scipy.io.mmwrite(tmp_path / "A.mtx", scipy.sparse.coo_array(np.ones((4, 2))))
    assert main(["solve", f"{tmp_path}/A.mtx"]) == 1
    error = capsys.readouterr().err
    assert "rank 1, not full rank 2" in error
    assert "--minimum-norm" in error
    assert main(["solve", f"{tmp_path}/A.mtx", "--minimum-norm"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/none.mtx"], "no such file"),
        (["{}/text.mtx"], "line 1: not a Matrix Market file"),
        (["{}/A.mtx.gz", "{}/A.mtx.gz", "-o", "{}/no/x.mtx"], "is not a folder"),
        (["{}/A.mtx.gz", "{}/short.mtx"], "has 5 rows, .* has 8"),
        (["{}/A.mtx.gz", "--damp", "-1"], "damp must not be negative"),
        (["{}/A.mtx.gz", "{}/nan.mtx"], "nan.mtx, line .: value must be finite, got .nan."),
        (["{}/A.mtx.gz", "-o", "{}/A.mtx.gz"], "it is an input too"),
        (["{}/A.mtx.gz", "-o", "{}/x.mtx", "--gradient", "{}/x.mtx"], "cannot write both results"),
        (["{}/A.mtx.gz", "-o", ""], "not the name of a file"),
        (["{}"], "it is a folder"),
        (["{}/empty.mtx"], "the file is empty"),
        (["{}/huge.mtx"], "huge.mtx, line 2: 1000000000000 entries take about .* of memory"),
        (["-", "-"], "standard input can be read once only"),
        (["{}/A.mtx.gz", "-o", "-", "--gradient", "-"], "cannot write both results to -"),
        (["{}/A.mtx.gz", "-o", "-", "--json"], "--json: not allowed with a result on standard output"),
        (["{}/A.mtx.gz", "{}/b.mtx", "-o", "{}"], "cannot write"),
        (["{}/A.mtx.gz", "--weights", "{}/none.mtx"], "none.mtx: no such file"),
        (["{}/A.mtx.gz", "--weights", "{}/short.mtx"], "short.mtx has 5 rows, .* has 8"),
        (["{}/A.mtx.gz", "--weights", "{}/bb.mtx"], "bb.mtx must hold one column of weights, got 2"),
        (["{}/A.mtx.gz", "--weights", "{}/complex.mtx"], "complex.mtx must hold real weights, got complex ones"),
        (["{}/A.mtx.gz", "--weights", "{}/minus.mtx"], "no negative weight, got -1"),
        (["{}/A.mtx.gz", "--weights", "{}/b.mtx", "-o", "{}/b.mtx"], "it is an input too"),
        (["{}/A.mtx.gz", "--solver", "qr"], "invalid choice: 'qr'.*dense.*direct.*cgls.*; see .* solve --help"),
        (["{}/A.mtx.gz", "--refine", "much"], "invalid choice: 'much'.*extended"),
        (["{}/A.mtx.gz", "--damp", "much"], "--damp: invalid float value: 'much'"),
        (["{}/A.mtx.gz", "--threshold", "2"], "add --robust huber or --robust cauchy"),
        (["{}/A.mtx.gz", "--robust", "huber", "--threshold", "-2"], "must be positive and finite, got -2"),
        (["{}/A.mtx.gz", "--robust", "huber", "--minimum-norm"], "--robust: not allowed with --minimum-norm"),
        ([], "arguments are required: A.mtx"),
    ],
)
def test_bad_input_is_one_line_and_status_2(files, capsys, arguments, message):
    folder, *_ = files
    (folder / "text.mtx").write_text("hello")
    (folder / "empty.mtx").write_text("")
    (folder / "huge.mtx").write_text("%%MatrixMarket matrix coordinate real general\n3 3 1000000000000\n1 1 1\n")
    scipy.io.mmwrite(folder / "short.mtx", np.ones((5, 1)))
    scipy.io.mmwrite(folder / "complex.mtx", 1j * np.ones((8, 1)))
    scipy.io.mmwrite(folder / "minus.mtx", -np.ones((8, 1)))
    (folder / "nan.mtx").write_text("%%MatrixMarket matrix array real general\n8 1\n" + "nan\n" * 8)
    assert main(["solve", *(argument.format(folder) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_demo_as_a_process():
    command = [sys.executable, "-m", "functional_lstsq", "demo"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "relative difference" in run.stdout


@pytest.mark.external
@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared matrices")
def test_a_real_file(tmp_path, capsys):
    name = SHARED / "matrices" / "illc1033"
    assert main(["solve", f"{name}.mtx.gz", f"{name}_rhs.mtx.gz", "-o", f"{tmp_path}/x.mtx"]) == 0
    claim = float(next(line for line in capsys.readouterr().out.splitlines() if "error" in line).split()[2])
    x, want = scipy.io.mmread(tmp_path / "x.mtx")[:, 0], np.load(f"{name}.ref.npz")["x"]
    assert claim < 1e-10
    assert np.linalg.norm(x - want) <= 10 * claim * np.linalg.norm(want)
