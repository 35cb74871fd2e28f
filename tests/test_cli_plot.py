"""`plot`: pictures of patterns and of convergence."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch

from functional_lstsq.cli import main
from functional_lstsq.plot_parts import pattern_image


@pytest.fixture
def files(tmp_path):
    g = np.random.default_rng(0)
    scipy.io.mmwrite(
        tmp_path / "A.mtx", scipy.sparse.coo_array(g.standard_normal((30, 10)) * (g.random((30, 10)) < 0.4))
    )
    scipy.io.mmwrite(tmp_path / "b.mtx", g.standard_normal((30, 2)))
    return tmp_path


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib")


def image(dense, cells):
    index = torch.as_tensor(np.stack(np.nonzero(dense)))
    return pattern_image(index, dense.shape, cells)


def test_a_small_pattern_is_itself():
    dense = np.random.default_rng(0).random((7, 5)) < 0.4
    got = image(dense, 300)
    assert np.array_equal(~np.isnan(got), dense)
    assert (got[dense] == 1).all()


@pytest.mark.parametrize("shape", [(10, 4), (13, 7), (3, 50)])
def test_a_large_pattern_is_shares_of_cells(shape):
    """A full matrix is full everywhere, whatever the sizes of cells; no entry is lost or counted twice."""
    assert (image(np.ones(shape), 4) == 1).all()
    dense = np.random.default_rng(0).random(shape) < 0.2
    sizes = [min(size, 4) for size in shape]
    row, column = (np.arange(size) * k // size for size, k in zip(shape, sizes, strict=True))
    want = [[dense[np.ix_(row == i, column == j)].mean() for j in range(sizes[1])] for i in range(sizes[0])]
    assert np.allclose(np.nan_to_num(image(dense, 4)), want, rtol=1e-15)


def test_pictures_have_the_format_of_their_name(files, capsys, matplotlib):
    for name in ("p.png", "p.svg", "p.PNG"):
        assert main(["plot", f"{files}/A.mtx", f"{files}/b.mtx", "-o", f"{files}/{name}", "--quiet"]) == 0
    for name in ("p.png", "p.PNG"):
        assert (files / name).read_bytes().startswith(b"\x89PNG")
    ElementTree.parse(files / "p.svg")
    text = (files / "p.svg").read_text()
    for label in ("column", "row", "iteration, all runs", "norm of the gradient", "search for the weakest", "A.mtx"):
        assert label in text, label
    assert re.search("converged: estimated forward error .*, condition", text)
    assert capsys.readouterr() == ("", "")


def test_the_history_is_that_of_the_solver(files, capsys, matplotlib):
    assert main(["plot", f"{files}/A.mtx", "-o", f"{files}/p.png", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["status"] == "converged"
    assert told["forward_error"] < 1e-10
    phases = [run["phase"] for run in told["runs"]]
    assert phases[0].startswith("search")
    assert phases[-1].startswith("solution")
    assert phases == sorted(phases)  # the search comes first
    assert told["iterations"] == sum(len(run["gradients"]) for run in told["runs"])
    first = next(run["gradients"] for run in told["runs"] if run["phase"].startswith("solution"))
    assert first[-1] < 1e-9 * first[0]


def test_no_convergence_is_told_and_drawn(files, capsys, matplotlib):
    hard = np.vander(np.linspace(0, 1, 40), 12)
    scipy.io.mmwrite(files / "hard.mtx", scipy.sparse.coo_array(hard), precision=17)
    assert main(["plot", f"{files}/hard.mtx", "-o", f"{files}/p.svg", "--iterations", "5"]) == 0
    printed = capsys.readouterr().out
    assert "iteration limit reached" in printed
    assert "not known" in printed
    assert "or more" in printed
    assert "iteration limit reached" in (files / "p.svg").read_text()


def test_a_large_pattern_makes_a_small_picture(files, capsys, matplotlib):
    A = scipy.sparse.random_array((30_000, 3_000), density=0.003, rng=0)
    scipy.io.mmwrite(files / "large.mtx", A, precision=3)
    assert main(["plot", f"{files}/large.mtx", "-o", f"{files}/p.svg", "--pattern-only"]) == 0
    assert (files / "p.svg").stat().st_size < 400_000
    assert "share stored" in (files / "p.svg").read_text()
    assert "status" not in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (0, 3), (1, 1)])
def test_empty_and_tiny_matrices(files, capsys, matplotlib, shape):
    scipy.io.mmwrite(files / "tiny.mtx", scipy.sparse.coo_array(shape))
    assert main(["plot", f"{files}/tiny.mtx", "-o", f"{files}/p.png"]) == 0
    assert (files / "p.png").exists()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/A.mtx", "-o", "{}/p.jpg"], "p.jpg: its name must end in .png or .svg"),
        (["{}/A.mtx"], "arguments are required: -o"),
        (["{}/A.mtx", "-o", "{}/no/p.png"], "is not a folder"),
        (["{}/none.mtx", "-o", "{}/p.png"], "no such file"),
        (["{}/A.mtx", "{}/A.mtx", "-o", "{}/A.mtx"], "it is an input too"),
        (["{}/A.mtx", "-o", "{}/p.png", "--iterations", "0"], "--iterations: must be a positive integer, got '0'"),
        (["{}/A.mtx", "{}/b.mtx", "-o", "{}/p.png", "--pattern-only"], "--pattern-only: .* takes no .*b.mtx"),
    ],
)
def test_bad_input_is_one_line(files, capsys, matplotlib, arguments, message):
    assert main(["plot", *(argument.format(files) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_without_matplotlib_it_says_what_to_install(files, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", f"{files}/A.mtx", "-o", f"{files}/p.png"]) == 2
    assert capsys.readouterr().err == (
        "functional_lstsq: plot needs matplotlib: pip install 'functional-lstsq[plot]'\n"
    )


def test_nothing_else_loads_matplotlib(files):
    script = f"import sys; from functional_lstsq.cli import main; main(['info', '{files}/A.mtx', '--quiet'])"
    script += "; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
