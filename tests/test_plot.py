"""`fl.plot`: axes with what is to be seen on them; and what notebooks show of matrices, solutions and their info."""

import re
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from helpers import normal

import functional_lstsq as fl
from functional_lstsq.cli.demo import levelling_network
from functional_lstsq.plot_parts import is_dark

F64 = torch.float64


@pytest.fixture
def plt():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def network():
    pattern, values, b, weights = levelling_network(40, 120)
    return fl.SparseMatrix(values, pattern), b, weights


PICTURES = {
    "pattern": lambda A, b, w, ax: fl.plot.pattern(A, ax),
    "convergence": lambda A, b, w, ax: fl.plot.convergence(A, b, ax, weights=w),
    "leverage": lambda A, b, w, ax: fl.plot.leverage(A, w, ax),
    "residuals": lambda A, b, w, ax: fl.plot.residuals(fl.solve(A, b, weights=w), w, ax),
    "weakest": lambda A, b, w, ax: fl.plot.weakest(A, 3, ax),
    "jacobian": lambda A, b, w, ax: fl.plot.jacobian(A, b, ax, weights=w),
}


@pytest.mark.parametrize("style", ["default", "dark_background"])
@pytest.mark.parametrize("name", PICTURES)
def test_each_draws_into_axes_of_its_own_or_given(name, style, plt):
    with plt.style.context(style):
        given = plt.subplots()[1]
        for ax in (None, given):
            got = PICTURES[name](*network(), ax)
            assert got is given or ax is None
            assert got.get_xlabel()
            assert got.get_ylabel()
            assert got.lines or got.images
            assert is_dark(got) == (style == "dark_background")
            got.figure.canvas.draw()


def luminance(colour):
    return 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]


@pytest.mark.parametrize(("style", "ground"), [("default", 1.0), ("dark_background", 0.0)])
def test_a_lone_entry_stands_out(style, ground, plt):
    with plt.style.context(style):
        ax = fl.plot.pattern(fl.SparsePattern(torch.tensor([[7], [900]]), (1000, 1000)))
        (image,) = ax.images
        shown = image.to_rgba(image.get_array())
        assert abs(luminance(shown[2, 270]) - ground) > 0.25
        assert shown[..., 3].sum() == 1  # all else is clear


def test_numbers_drawn_are_those_computed(plt):
    A, b, weights = network()
    (line, limit) = fl.plot.leverage(A, weights).lines
    assert np.allclose(line.get_ydata(), fl.leverage(A, weights).numpy())
    assert limit.get_ydata()[0] == pytest.approx(2 * 40 / 120)
    solution = fl.solve(A, b, weights=weights)
    scaled = (solution.residual * weights.sqrt()).numpy()
    assert np.allclose(fl.plot.residuals(solution, weights).lines[0].get_ydata(), scaled)
    image = fl.plot.jacobian(A, b).images[0].get_array()
    J = torch.func.jacrev(lambda v: fl.lstsq(fl.SparseMatrix(v, A.pattern), b))(A.values).abs()
    assert np.allclose(np.ma.filled(image, 0.0), J.numpy(), rtol=1e-6, atol=1e-12)
    image = fl.plot.weakest(A, 2).images[0].get_array()
    assert np.allclose(image, fl.weakest(A, 2).vectors.abs().T.numpy())


def test_a_large_jacobian_is_a_small_picture(plt):
    n = 700
    A = fl.vstack([fl.eye(n), fl.diags([[1.0], [-1.0]], [0, 1], (n - 1, n))])
    assert fl.plot.jacobian(A, normal(2 * n - 1)).images[0].get_array().shape == (300, 300)


def test_no_convergence_is_drawn(plt):
    A = fl.SparseMatrix.from_dense(torch.vander(torch.linspace(0, 1, 40, dtype=F64), 12))
    ax = fl.plot.convergence(A, normal(40), iterations=5)
    assert re.match("iteration limit reached: condition .* or more", ax.get_title())


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: fl.plot.pattern(torch.ones(3)), TypeError, "SparseMatrix|sparse"),
        (lambda: fl.plot.residuals(torch.ones(3, 2)), ValueError, r"shape \(m,\), got \(3, 2\)"),
        (lambda: fl.plot.residuals([1.0]), TypeError, "a Solution or a real tensor, got list"),
        (lambda: fl.plot.residuals(torch.ones(3), torch.ones(2)), ValueError, r"weights .* shape \(3,\), got \(2,\)"),
    ],
)
def test_what_is_refused(call, error, match, plt):
    with pytest.raises(error, match=match):
        call()


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'functional-lstsq\[plot\]'"):
        fl.plot.pattern(fl.eye(3))


def parsed(text):
    return ElementTree.fromstring(f"<div>{text}</div>")


@pytest.mark.parametrize("size", [(3, 2), (0, 4), (400, 300), (100_000, 100_000)])
def test_a_matrix_in_a_notebook_is_small_and_complete(size):
    m, n = size
    k = min(m, n)
    A = fl.SparseMatrix(torch.ones(2, k), fl.SparsePattern(torch.arange(k).expand(2, -1), size))
    text = A._repr_html_()
    assert len(text) < 8000
    told = " ".join(parsed(text).itertext())
    for part in (f"{m:,} x {n:,}", f"{k:,}, density", "torch.float32, on cpu", "(2,)"):
        assert part in told
    paths = parsed(text).findall(".//{http://www.w3.org/2000/svg}path")
    drawn = sum(int(run) for path in paths for run in re.findall(r"h(\d+)v1", path.get("d")))
    assert drawn == min(k, 48) or (m != n and drawn >= min(k, 48))


def test_a_solution_in_a_notebook_tells_the_worst_of_a_batch():
    A, b, weights = network()
    columns = torch.stack([b, 2 * b, b.flip(0), b + 1, 3 * b], 1)
    info = fl.solve(A, columns, weights=weights).info
    told = " ".join(parsed(fl.Solution(b, b, info)._repr_html_()).itertext())
    assert f"{float(info.forward_error.max()):.2g} in (5,)" in told
    assert "converged" in told
    assert "in (5,)" in repr(info)
    one = fl.solve(A, b).info
    assert f"{float(one.condition):.2g}" in " ".join(parsed(one._repr_html_()).itertext())


def test_other_infos_in_a_notebook():
    A, b, _ = network()
    bounded = fl.solve(A, b, bounds=(20.0, 60.0))
    told = " ".join(parsed(bounded._repr_html_()).itertext())
    active = bounded.info.active
    assert f"{int((active < 0).sum())} lower, {int((active > 0).sum())} upper" in told
    fit = fl.gauss_newton(lambda x, y: x - y, torch.zeros(3, dtype=F64), (torch.ones(3, dtype=F64),))
    assert "converged" in fit.info._repr_html_()
