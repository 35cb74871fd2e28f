"""`info`: what it tells of a matrix is so."""

import json
import re

import numpy as np
import pytest
import scipy.io
import scipy.sparse

import functional_lstsq as fl
from functional_lstsq import errors
from functional_lstsq.cli import info, main


def told(capsys, *arguments):
    assert main(["info", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def file(tmp_path):
    def made(dense, name="A.mtx", **options):
        scipy.io.mmwrite(tmp_path / name, scipy.sparse.coo_array(dense), precision=17, **options)
        return tmp_path / name

    return made


def test_figures_of_a_tall_matrix(file, capsys):
    g = np.random.default_rng(0)
    A = g.standard_normal((40, 12)) * (g.random((40, 12)) < 0.5)
    A[3], A[5, 5] = 0, 7
    found = told(capsys, file(A))
    assert (found["rows"], found["columns"], found["entries"], found["stored"]) == (40, 12, *[np.count_nonzero(A)] * 2)
    assert (found["format"], found["field"], found["symmetry"], found["dtype"]) == (
        *("coordinate", "real", "general"),
        "float64",
    )
    assert found["density"] == np.count_nonzero(A) / A.size
    assert found["empty_rows"] == (A == 0).all(1).sum() >= 1
    assert found["empty_columns"] == 0
    assert found["longest_row"] == (A != 0).sum(1).max()
    assert found["longest_column"] == (A != 0).sum(0).max()
    assert found["structural_rank"] == found["rank"] == 12
    want = np.linalg.cond(A / np.linalg.norm(A, axis=0))
    assert want / 2 < found["condition"] < 2 * want
    assert found["status"] == "converged"
    assert found["forward_error"] < 1e-12


def test_wide_symmetric_and_complex(file, tmp_path, capsys):
    A = np.vander(np.arange(1.0, 6.0), 3)
    wide, tall = told(capsys, file(A.T, "wide.mtx")), told(capsys, file(A, "tall.mtx"))
    for name in ("condition", "rank", "structural_rank", "plan"):
        assert wide[name] == pytest.approx(tall[name]) if name == "condition" else wide[name] == tall[name]
    H = np.array([[2.0, 1j, 0], [-1j, 3, 0], [0, 0, 1]])
    found = told(capsys, file(H, "H.mtx", symmetry="hermitian"))
    assert (found["symmetry"], found["field"], found["dtype"]) == ("hermitian", "complex", "complex128")
    assert (found["stored"], found["entries"]) == (4, 5)
    (tmp_path / "P.mtx").write_text("%%MatrixMarket matrix coordinate pattern general\n3 2 3\n1 1\n2 2\n3 1\n")
    found = told(capsys, tmp_path / "P.mtx")
    assert (found["field"], found["rank"]) == ("pattern", 2)


def test_structural_and_numerical_rank_are_told_apart(file, tmp_path, capsys):
    found = told(capsys, file(np.ones((4, 2))))
    assert (found["structural_rank"], found["rank"], found["condition"]) == (2, 1, None)
    assert (found["status"], found["forward_error"]) == ("rank deficient", None)
    empty = np.zeros((4, 3))
    empty[:, 0], empty[0, 1] = 1, 1
    assert main(["info", str(file(empty))]) == 0
    printed = capsys.readouterr().out
    assert "structural rank  2, not full: 1 of 3 missing" in printed
    assert "columns: 1" in printed
    assert re.search("condition +infinite", printed)
    assert told(capsys, file(np.zeros((0, 3))))["plan"] == []
    (tmp_path / "Z.mtx").write_text("%%MatrixMarket matrix coordinate real general\n2 2 3\n1 1 1\n2 2 0\n2 1 1\n")
    found = told(capsys, tmp_path / "Z.mtx")
    assert (found["zeros"], found["structural_rank"], found["rank"]) == (1, 2, 1)


def test_the_plan_is_that_of_the_solver(file, capsys):
    A = scipy.sparse.random_array((900, 600), density=0.01, rng=0) + scipy.sparse.eye_array(900, 600)
    found = told(capsys, file(A))
    matrix = fl.SparseMatrix.from_scipy(A)
    want = fl.Auto().predict(matrix)
    assert [(step["method"], step["reason"]) for step in found["plan"]] == [step[:2] for step in want]
    assert found["tried"].startswith(f"{want[0].method} ({want[0].reason})")
    assert found["plan"][0]["seconds"] == pytest.approx(want[0].seconds)


def test_without_a_condition_nothing_is_solved(file, capsys, monkeypatch):
    def never(*_, **__):
        raise AssertionError("solved")

    monkeypatch.setattr(info, "solve", never)
    found = told(capsys, file(np.eye(4, 3)), "--no-condition")
    assert found["structural_rank"] == 3
    assert "condition" not in found
    assert main(["info", str(file(np.eye(4, 3))), "--no-condition"]) == 0
    assert "\ncondition " not in capsys.readouterr().out


def test_what_no_method_can_begin_is_told_with_the_rest(file, capsys, monkeypatch):
    def refuse(*_, **__):
        raise fl.TooLarge("it would take about 1e13 bytes", errors.BY_CGLS, errors.MEMORY)

    monkeypatch.setattr(info, "solve", refuse)
    found = told(capsys, file(np.eye(4, 3)))
    assert (found["status"], found["condition"], found["rows"]) == ("refused", None, 4)
    assert "--solver cgls" in found["tried"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "line 1: not a Matrix Market file"),
        (
            "%%MatrixMarket matrix coordinate real general\n2 2 1\n3 1 1\n",
            "line 3: a row must lie between 1 and 2, got '3 1 1'",
        ),
        ("%%MatrixMarket matrix coordinate real general\n2 2 1\n1 1 nan\n", "line 3: value must be finite"),
        ("%%MatrixMarket matrix coordinate real general\n3 3 1000000000000\n1 1 1\n", "line 2: .* bytes of memory"),
    ],
)
def test_bad_files_are_one_line(tmp_path, capsys, text, message):
    (tmp_path / "A.mtx").write_text(text)
    assert main(["info", f"{tmp_path}/A.mtx"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert re.search(message, printed.err)
    assert printed.out == ""
