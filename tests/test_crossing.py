"""Transformations x ways to run a program x kinds of solve: each of 180 cells is right, or refused with its reason."""

import itertools

import pytest
import torch
from helpers import close, full_pattern
from torch.func import grad, jacfwd, jacrev, jvp, linearize, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import functional_lstsq as fl

TIMES = torch.linspace(0, 2, 6, dtype=torch.float64)
LINE = torch.stack([torch.ones_like(TIMES), TIMES], 1)
MATRIX = fl.SparseMatrix(LINE.reshape(-1), full_pattern(6, 2))
B = 1 + 2 * TIMES + torch.tensor([0.1, -0.1, 0.05, -0.12, 0.07, 6.0], dtype=torch.float64)
THRESHOLD = 0.5  # of the residuals only the last is larger

# a + c cos(t - p) = a + c cos(p) cos(t) + c sin(p) sin(t), of which the right side is linear.
ANGLES = 2.5 * TIMES
WAVE = torch.linalg.pinv(torch.stack([torch.ones_like(ANGLES), torch.cos(ANGLES), torch.sin(ANGLES)], 1))
START = torch.atan2((WAVE @ B)[2:], (WAVE @ B)[1:2]) + 0.3


def wave(p):
    return fl.SparseMatrix(torch.stack([torch.ones_like(ANGLES), torch.cos(ANGLES - p)], 1).reshape(-1), MATRIX.pattern)


def line(b):
    return torch.linalg.pinv(LINE) @ b


def robust_line(b):
    # Not torch.linalg.solve, whose vmap(jacfwd) is off by 100 % for a vector on the right.
    return torch.linalg.inv(LINE[:5].T @ LINE[:5]) @ (LINE[:5].T @ b[:5] + THRESHOLD * LINE[5])


def phase(b):
    return torch.atan2((WAVE @ b)[2:], (WAVE @ b)[1:2])


def curve(z, b):
    return LINE @ torch.sinh(z) - b


# (by this library, in closed form), of b.
SOLVES = {
    "lstsq": (lambda b: fl.lstsq(MATRIX, b), line),
    "robust": (lambda b: fl.lstsq(MATRIX, b, robust=fl.Huber(THRESHOLD)), robust_line),
    "LinearOperator": (lambda b: fl.lstsq(fl.LinearOperator(torch.matmul, LINE, 2), b), line),
    "gauss_newton": (lambda b: fl.gauss_newton(curve, torch.zeros_like(LINE[0]), (b,)).x, lambda b: line(b).asinh()),
    "variable_projection": (lambda b: fl.variable_projection(wave, START, b).p, phase),
}
FITS = "robust", "gauss_newton", "variable_projection"


def loss(f):
    return lambda b: f(b).square().sum()


TRANSFORMATIONS = {
    "grad": lambda f: grad(loss(f)),
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "vmap": vmap,
    "vmap(grad)": lambda f: vmap(grad(loss(f))),
    "vmap(jacfwd)": lambda f: vmap(jacfwd(f)),
}


def exported(f, b):
    class Program(torch.nn.Module):
        def forward(self, b):
            return f(b)

    return torch.export.export(Program(), (b,)).module()(b)


WAYS = {
    "plain": lambda f, b: f(b),
    "compiled": lambda f, b: torch.compile(f, backend="aot_eager")(b),
    "fullgraph": lambda f, b: torch.compile(f, backend="aot_eager", fullgraph=True)(b),
    "exported": exported,
    "linearized": lambda f, b: linearize(f, b)[1](b.flip(-1)),
    "make_fx": lambda f, b: make_fx(f)(b)(b),
}


def reason(solve, transformation, way):
    """Why a cell is refused, None where it is not; what torch refuses, or fails at, for any function is torch's own."""
    forward = transformation in ("jacfwd", "vmap(jacfwd)")
    if way == "fullgraph" and solve not in ("lstsq", "LinearOperator"):
        return "torch.compile cannot take"
    if way == "exported" and transformation == "vmap(jacfwd)":
        return "'Tensor' object has no attribute 'constant'"  # torch's own, as of vmap(jacfwd(torch.sin))
    if way == "exported" and (transformation != "vmap" or solve in FITS):
        return "torch.export cannot take derivatives inside|torch.compile cannot take"
    if way == "linearized" and forward:
        return "Nested forward mode AD is not supported"  # torch's own
    return "linearize cannot record" if way in ("linearized", "make_fx") and solve in FITS else None


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()


def cells():
    for solve, transformation, way in itertools.product(SOLVES, TRANSFORMATIONS, WAYS):
        marks = () if solve == "lstsq" or way == "plain" else pytest.mark.table
        yield pytest.param(solve, transformation, way, marks=marks, id=f"{solve}-{transformation}-{way}")


@pytest.mark.parametrize(("solve", "transformation", "way"), [*cells()])
def test_cell(solve, transformation, way):
    ours, closed = (TRANSFORMATIONS[transformation](f) for f in SOLVES[solve])
    b = torch.stack([B, 1.01 * B, B + 0.01]) if transformation.startswith("vmap") else B
    why = reason(solve, transformation, way)
    if why:
        with pytest.raises(Exception, match=why):
            WAYS[way](ours, b)
        return
    want = jvp(closed, (b,), (b.flip(-1),))[1] if way == "linearized" else closed(b)
    close(WAYS[way](ours, b), want, 1e-9)


def test_a_fit_within_what_dynamo_gave_up_is_not_compiled_function_by_function():
    """Where a graph cannot hold a fit, Dynamo would look at each of its functions, for many seconds."""
    torch._dynamo.utils.counters.clear()
    torch.compile(vmap(SOLVES["robust"][0]), backend="aot_eager")(torch.stack([B, 1.01 * B]))
    assert torch._dynamo.utils.counters["frames"]["total"] <= 20, dict(torch._dynamo.utils.counters["frames"])
