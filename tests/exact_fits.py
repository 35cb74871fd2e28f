"""Minima of robust and of nonlinear fits, and their derivatives by the data, by mpmath with 60 digits."""

from functools import cache

import mpmath as mp
import torch
from helpers import full_pattern

import functional_lstsq as fl

D = torch.float64
DIGITS, STEP = 60, mp.mpf(10) ** -16
M = 16


def exactly(t):
    return mp.matrix(t.tolist())


def rounded(v):
    return torch.tensor([float(entry) for entry in v], dtype=D)


def scaled(rows, A):
    return mp.matrix([[rows[i] * A[i, j] for j in range(A.cols)] for i in range(A.rows)])


def outside(E):
    """A vector orthogonal to the columns of E."""
    q = mp.matrix([(-1) ** i * (1 + mp.mpf(i) / 10) for i in range(E.rows)])
    return q - E * mp.lu_solve(E.T * E, E.T * q)


def losses(kind, t, r):
    """(psi, psi')"""
    t = mp.mpf(t)
    if kind is fl.Huber:
        return mp.matrix([max(-t, min(t, z)) for z in r]), [mp.mpf(abs(z) <= t) for z in r]
    if kind is fl.Cauchy:
        squares = [(z / t) ** 2 for z in r]
        return mp.matrix([z / (1 + q) for z, q in zip(r, squares, strict=True)]), [
            (1 - q) / (1 + q) ** 2 for q in squares
        ]
    return r, [mp.mpf(1)] * r.rows


class Reference:
    """The minimum near x of sum rho(r(x, b)) with r = f(x) - b, by Newton's steps, and its derivatives by b."""

    def __init__(self, kind, t, x):
        self.kind, self.t, self.x = kind, t, exactly(x)

    def at(self, b):
        x = self.x
        for _ in range(100):
            f, J, bend = self.model(x)
            psi, slopes = losses(self.kind, self.t, f - b)
            H = J.T * scaled(slopes, J) + bend(psi)
            step = mp.lu_solve(H, J.T * psi)
            x = x - step
            if mp.norm(step) < mp.mpf(10) ** -50 * mp.norm(x):
                return x, H, J, slopes, psi
        raise AssertionError("no minimum")

    def direction(self, b, k, size=1):
        """J cos(j) + k (a vector that J^T psi' takes to zero)"""
        _, _, J, slopes, _ = self.at(exactly(b))
        return size * rounded(J * mp.matrix([mp.cos(j) for j in range(J.cols)]) + k * outside(scaled(slopes, J)))

    def tangent(self, b, db):
        _, H, J, slopes, _ = self.at(exactly(b))
        return rounded(mp.lu_solve(H, scaled(slopes, J).T * exactly(db)))

    def cotangent(self, b, x_bar):
        _, H, J, slopes, _ = self.at(exactly(b))
        return rounded(scaled(slopes, J) * mp.lu_solve(H, exactly(x_bar)))

    def second(self, b, db, x_bar):
        """The second derivative of x_bar . x along db."""
        b, db = exactly(b), exactly(db)
        low, middle, high = (sum(map(mp.fmul, exactly(x_bar), self.at(b + i * STEP * db)[0])) for i in (-1, 0, 1))
        return torch.tensor(float((low - 2 * middle + high) / STEP**2), dtype=D)


class Linear(Reference):
    def __init__(self, A, weights, *args):
        super().__init__(*args)
        self.A = scaled([mp.sqrt(w) for w in exactly(weights)], exactly(A))

    def model(self, x):
        return self.A * x, self.A, lambda psi: mp.zeros(self.A.cols)


class Decays(Reference):
    """x_0 exp(-x_2 t) + x_1 exp(-x_3 t)"""

    def model(self, x):
        J, second = mp.zeros(M, 4), [mp.zeros(4) for _ in range(M)]
        for i, t in enumerate(exactly(T)):
            for j in range(2):
                e = mp.exp(-x[2 + j] * t)
                J[i, j], J[i, 2 + j] = e, -x[j] * t * e
                second[i][j, 2 + j] = second[i][2 + j, j] = -t * e
                second[i][2 + j, 2 + j] = x[j] * t**2 * e
        f = mp.matrix([x[0] * J[i, 0] + x[1] * J[i, 1] for i in range(M)])
        return f, J, lambda psi: sum((p * B for p, B in zip(psi, second, strict=True)), mp.zeros(4))


def off(got, want):
    return float((got - want).norm() / want.norm())


def off_unless_refused(call, want):
    try:
        return off(call(), want)
    except torch.linalg.LinAlgError:
        return 0.0


def polynomial(n):
    """(A, b) of condition number about 10^(0.8 (n - 1)) with an outlier, small residuals otherwise."""
    A = (torch.arange(1, M + 1, dtype=D) / M)[:, None] ** torch.arange(n)
    b = A @ torch.ones(n, dtype=D) + 5e-3 * torch.sin(7.0 * torch.arange(M, dtype=D))
    b[4] += 3
    return A, b


WEIGHTS = 1 + torch.arange(M, dtype=D) % 3


@cache
def linear(kind, n, *, weighted=False):
    """(the fit, b, the reference)"""
    A, b = polynomial(n)
    weights = WEIGHTS if weighted else None
    # Of Huber's all others are within, of Cauchy's some beyond the threshold.
    t, matrix = 1.0 if kind is fl.Huber else 0.02, fl.SparseMatrix(A.reshape(-1), full_pattern(M, n))
    f = lambda b: fl.lstsq(matrix, b, robust=kind(t), weights=weights)  # noqa: E731
    return f, b, Linear(A, torch.ones(M, dtype=D) if weights is None else weights, kind, t, f(b))


T = torch.linspace(0, 3, M, dtype=D)


@cache
def decays(gap, kind=None, noise=1e-6):
    """(gauss_newton of b, variable_projection of b, b, the reference); the condition number is about 100 / gap^3."""
    x0, t = torch.tensor([2.0, 1.0, 1.0, 1.0 + gap], dtype=D), 5 * noise
    f = lambda x: torch.exp(-T[:, None] * x[2:]) @ x[:2]  # noqa: E731
    b = (
        f(x0)
        + noise * torch.cos(9 * torch.arange(M, dtype=D))
        + (kind is not None) * 20 * noise * (torch.arange(M) == 5)
    )
    robust, pattern = None if kind is None else kind(t), full_pattern(M, 2)
    design = lambda p: fl.SparseMatrix(torch.exp(-T[:, None] * p).reshape(-1), pattern)  # noqa: E731

    def separable(b, **options):
        fit = fl.variable_projection(design, x0[2:], b, **options)
        return torch.cat([fit.x, fit.p])

    def nonlinear(b, **options):
        return fl.gauss_newton(lambda x, b: f(x) - b, x0, (b,), robust=robust, **options).x

    start = nonlinear(b) if gap > 0.05 else x0
    return nonlinear, separable, b, Decays(kind, t, start)
