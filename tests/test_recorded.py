"""Programs that were recorded, by torch.export, make_fx and linearize: every transformation of them, and of batches."""

import warnings

import pytest
import torch
from test_compile import same
from test_programs import VALUES, B, batch, close, exported, loss, lstsq
from torch.func import grad, jacfwd, jacrev, jvp, linearize, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import functional_lstsq as fl

RECORDED = {
    "export": exported,
    "strict export": lambda f, *inputs: exported(f, *inputs, strict=True),
    "make_fx": lambda f, *inputs: make_fx(f)(*inputs),
}
OF_PROGRAM = {
    "call": lambda f: f(VALUES, B),
    "grad": lambda f: grad(lambda v, b: f(v, b).sin().sum(), (0, 1))(VALUES, B),
    "jacrev": lambda f: jacrev(f)(VALUES, B),
    "jacfwd": lambda f: jacfwd(f)(VALUES, B),
    "jacfwd(jacrev)": lambda f: jacfwd(jacrev(f))(VALUES, B),
    "jacfwd(jacfwd)": lambda f: jacfwd(jacfwd(f))(VALUES, B),
    "vmap": lambda f: vmap(f)(*batch(3)),
    "vmap by b": lambda f: vmap(f, (None, 0))(VALUES, batch(3)[1]),
    "vmap(grad)": lambda f: vmap(grad(lambda v, b: f(v, b).sin().sum()))(*batch(3)),
    "vmap(jacfwd)": lambda f: vmap(jacfwd(f))(*batch(3)),
}


@pytest.fixture(scope="module")
def programs():
    def solving(v, b):
        return lstsq(v, b)

    def least(v, b):
        return lstsq(v, b, damp=0.3, weights=b.abs() + 1)

    return {(how, f): RECORDED[how](f, VALUES, B) for how in RECORDED for f in (solving, least)}


@pytest.mark.parametrize("name", OF_PROGRAM)
def test_transforms_of_a_recorded_program(programs, name):
    for (_, function), program in programs.items():
        same(OF_PROGRAM[name](program), OF_PROGRAM[name](function))


def test_transforms_of_a_recorded_derivative():
    def derivative(v, b):
        return grad(loss)(v, b)

    program = make_fx(derivative)(VALUES, B)
    for name in ("call", "grad", "jacrev", "jacfwd", "jacfwd(jacrev)", "vmap", "vmap(jacfwd)"):
        same(OF_PROGRAM[name](program), OF_PROGRAM[name](derivative))


def test_linearize_is_mapped_over_without_a_loop():
    _, along = linearize(lambda v: lstsq(v, B), VALUES)
    tangents = torch.randn(50, len(VALUES), dtype=torch.float64)

    def directly(t):
        return jvp(lambda v: lstsq(v, B), (VALUES,), (t,))[1]

    close(jacrev(along)(VALUES), jacfwd(lstsq)(VALUES, B), 1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch tells of operations without a rule, which it loops over
        close(vmap(along)(tangents), vmap(directly)(tangents), 1e-10)


def test_export_of_a_batch():
    for function in (vmap(lstsq), vmap(lambda v, b: lstsq(v, b, damp=0.1, solver=fl.CGLS()))):
        program = exported(function, *batch(3))
        v, b = (t * 1.1 for t in batch(3))
        same(program(v, b), function(v, b))
        v.requires_grad_()
        same(torch.autograd.grad(program(v, b).sum(), v), torch.autograd.grad(function(v, b).sum(), v))


def test_export_of_a_derivative_says_what_to_do():
    """torch exports none of a dense function either."""
    with pytest.raises(NotImplementedError, match="export the function itself, and differentiate the program"):
        exported(grad(loss), VALUES, B)
