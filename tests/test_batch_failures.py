"""One failure in a batch harms nobody: masked out of the loss, it has zero for a gradient, as if it were not there."""

import pytest
import torch
from helpers import close, full_pattern, normal
from torch.func import grad, hessian, vmap

import functional_lstsq as fl

POINTS = torch.cat([normal(30, 2), torch.ones(30, 1, dtype=torch.float64)], 1)
Y = POINTS @ torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) + 0.01 * normal(30, seed=1)
GOOD = torch.arange(20).reshape(5, 4)
BOTH = torch.cat([GOOD[:2], torch.full((1, 4), 5), GOOD[2:]])  # the third is four times the same point
PATTERN = full_pattern(4, 3)


def matrix(points):
    return fl.SparseMatrix(points.reshape(-1), PATTERN)


KINDS = {
    "matrix": lambda P, y, s: fl.solve(matrix(P), y, throw=False),
    "cgls": lambda P, y, s: fl.solve(matrix(P), y, throw=False, solver=fl.CGLS()),
    "weights": lambda P, y, s: fl.solve(matrix(P), y, weights=s.expand(4), throw=False),
    "operator": lambda P, y, s: fl.solve(fl.LinearOperator(lambda P, x: P @ x, P, 3), y, throw=False),
    "bounds": lambda P, y, s: fl.solve(matrix(P), y, bounds=(-10.0, 10.0), throw=False),
    "robust": lambda P, y, s: fl.solve(matrix(P), y, robust=fl.Huber(0.1), throw=False),
    "gauss_newton": lambda P, y, s: fl.gauss_newton(
        lambda x, P, y: P @ x - y, torch.zeros(3, dtype=torch.float64), (P, y), throw=False
    ),
}


def loss(kind, samples):
    def of(scale):
        fit = vmap(lambda s: KINDS[kind](scale[0] * POINTS[s], scale[1] * Y[s], scale[2]))(samples)
        code = fit.info.solve.status_code if kind == "bounds" else fit.info.status_code
        assert int((code != 0).sum()) == len(samples) - len(GOOD)
        return torch.where((code == 0)[:, None], fit.x, 0.0).sin().sum()

    return of


@pytest.mark.parametrize("transform", [grad, hessian])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_masked_is_not_there(kind, transform):
    scale = torch.tensor([1.0, 1.1, 0.9], dtype=torch.float64)
    close(transform(loss(kind, BOTH))(scale), transform(loss(kind, GOOD))(scale), 1e-7)


def test_what_is_not_masked_is_not_a_number():
    found = grad(lambda P: vmap(lambda s: KINDS["matrix"](P[s], Y[s], None).x)(BOTH).sum())(POINTS)
    assert found[5].isnan().all()
    assert found[:5].isfinite().all()
