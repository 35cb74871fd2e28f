"""Fits in a pool of threads, and residuals that have rules for reverse mode only."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import close, full_pattern
from torch.func import grad, jacrev

import functional_lstsq as fl

TIMES = torch.linspace(0, 2, 12, dtype=torch.float64)
DECAY = 2 * torch.exp(-0.5 * TIMES) + torch.exp(-3 * TIMES)
FULL = full_pattern(12, 2)
START = torch.tensor([0.4, 2.5], dtype=torch.float64)


def misfit(x, b):
    return x[0] * torch.exp(-x[1] * TIMES) - b


FITS = {
    "gauss_newton": lambda b: fl.gauss_newton(misfit, torch.ones_like(START), (b,)).x,
    "pattern": lambda b: fl.gauss_newton(misfit, torch.ones_like(START), (b,), jacobian=FULL).x,
    "gradient": grad(lambda b: fl.gauss_newton(misfit, torch.ones_like(START), (b,)).x.sum()),
    "variable_projection": lambda b: (
        fl.variable_projection(lambda q: fl.SparseMatrix(torch.exp(-TIMES[:, None] * q).flatten(), FULL), START, b).p
    ),
    "JacobianOperator": lambda b: fl.lstsq(fl.JacobianOperator(lambda x: misfit(x, b), START), b),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "variable_projection" else name for name in FITS]
)
def test_fits_in_a_pool_of_threads(name):
    data = [DECAY * (1 + i / 99) for i in range(48 if name == "gauss_newton" else 6)]
    want = [FITS[name](b) for b in data]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(FITS[name], data))
    for a, b in zip(got, want, strict=True):
        close(a, b, 1e-12)


class Exp(torch.autograd.Function):
    """As most Functions are: without a rule for forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, bar):
        return bar * ctx.saved_tensors[0]


def by_reverse(x, b):
    return x[0] * Exp.apply(-x[1] * TIMES) - b


@pytest.mark.parametrize(
    "how",
    [None, FULL, lambda x, b: fl.SparseMatrix(jacrev(by_reverse)(x, b).flatten(), FULL)],
    ids=["whole", "pattern", "given"],
)
def test_a_residual_with_rules_for_reverse_mode_only(how):
    def fit(b, residual=by_reverse):
        return fl.gauss_newton(
            residual, torch.ones_like(START), (b,), jacobian=how if residual is by_reverse else None
        ).x

    close(fit(DECAY), fit(DECAY, misfit), 1e-10)
    close(jacrev(fit)(DECAY), jacrev(lambda b: fit(b, misfit))(DECAY), 1e-9)


def test_an_operator_with_rules_for_reverse_mode_only():
    operator, other = (fl.JacobianOperator(lambda x, r=r: r(x, DECAY), START) for r in (by_reverse, misfit))
    close(fl.lstsq(operator, DECAY), fl.lstsq(other, DECAY), 1e-10)
