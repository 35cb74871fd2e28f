"""Small problems for gauss_newton, and their minima by steps of Newton."""

import torch
from torch.func import grad, jacfwd

import functional_lstsq as fl

D = torch.float64
T = torch.linspace(0, 2, 6, dtype=D)
Y = torch.tensor([2.0, 1.3, 0.8, 0.5, 0.4, 0.2], dtype=D)
X0 = torch.tensor([1.0, 1.0], dtype=D)


def tensor(*numbers):
    return torch.tensor(numbers, dtype=D)


def decay(x, y):
    return x[0] * torch.exp(-x[1] * T.to(y.dtype)) - y


def fit(y, **options):
    return fl.gauss_newton(decay, X0, (y,), **options).x


def by_newton(residual, x, *args, steps=3):
    """The minimum near x, differentiable to order `steps`: each step of Newton makes one more derivative right."""
    cost = lambda x: residual(x, *args).square().sum() / 2  # noqa: E731
    for _ in range(steps):
        x = x - torch.linalg.inv(jacfwd(grad(cost))(x)) @ grad(cost)(x)
    return x


def chain(x, y):
    """Each residual knows two neighbours of n unknowns."""
    return torch.cat([torch.sin(x[:-1]) + 2 * x[1:].square() - y[:-1], (x - y.mean()) / 3])


def chain_pattern(n):
    i = torch.arange(n - 1)
    rows = torch.cat([i, i, n - 1 + torch.arange(n)])
    return fl.SparsePattern(torch.stack([rows, torch.cat([i, i + 1, torch.arange(n)])]), (2 * n - 1, n))
