"""A small system of a known condition number, with its exact solutions and a solver as wrong as is asked for."""

import math
from fractions import Fraction

import torch
from helpers import with_singular_values
from rationals import rational, size, solved, transpose

from functional_lstsq.solvers.acceptance import report
from functional_lstsq.solvers.conjugate_gradients import Run
from functional_lstsq.solvers.refinement import Measure, refine
from functional_lstsq.solvers.system import EPS, System
from functional_lstsq.sparse.plain_products import Operator

DOUBLE = torch.float64


BOUND, TARGET, ACCEPT = 1e-11, 4 * EPS, EPS ** (1 / 3)  # as solvers with a factor have them


DTYPES = (DOUBLE, torch.complex128)


class Room:
    """A system of condition number `condition`, right-hand sides, and the exact solutions for them.

    The right-hand sides: b at an angle to the range, b close to it, c alone, and both.
    """

    def __init__(self, condition, *, dtype=DOUBLE, damp=None, weighting=None, extended=False, exact=True, m=5, n=3):
        s = torch.logspace(0, -math.log10(condition), n)
        A, pattern = with_singular_values(s, m, seed=3, dtype=dtype)
        g = torch.Generator().manual_seed(4)
        A = A * torch.exp(2j * torch.randn(m, 1, generator=g, dtype=DOUBLE)) if dtype.is_complex else A
        d = None if damp is None else torch.tensor([[damp]], dtype=DOUBLE)
        operator = Operator(pattern, A.reshape(1, -1))
        self.system = System(operator, d, EPS, extended=extended, exact=exact, weighting=weighting)
        b, c = (torch.randn(1, rows, 4, dtype=dtype, generator=g) for rows in (m, n))
        scaled = self.system.plain.dense()
        b[:, :, 1] = (scaled @ c)[:, :, 1] + 1e-6 * b[:, :, 1]
        b[:, :, 2] = 0
        c[:, :, :2] = 0
        self.b, self.c, self.m, self.n = b, c, m, n
        self.K = self._augmented(scaled[0])
        values = torch.linalg.svdvals(torch.cat([self.system.A.dense()[0], self._damping()]))
        self.largest, self.smallest = values[:1, None], values[-1:, None]

    def _damping(self):
        d = self.system.damp
        return torch.zeros(self.n, self.n).double() if d is None else torch.diag(d[0, :, 0])

    def _augmented(self, A):
        """[[T, A], [A^H W, -d^2]] as a dense matrix."""
        system, m, n = self.system, self.m, self.n
        K = torch.zeros(m + n, m + n, dtype=A.dtype)
        K[:m, :m] = torch.eye(m) if system.slack is None else torch.diag(system.slack[0, :, 0])
        K[:m, m:], K[m:, :m] = A, A.mH if system.weights is None else A.mH * system.weights[0]
        K[m:, m:] = -self._damping().square()
        return K

    def exact(self):
        """(r, y) of rationals; complex ones as two rows and two columns for one."""
        K = self._rational_augmented()
        m, twice = self.m, 2 if self.b.is_complex() else 1
        total = self.m + self.n
        right = rational(torch.cat([self.b[0], self.c[0]]))
        s = solved(K, right)
        of_r = [i for half in range(twice) for i in range(half * total, half * total + m)]
        of_y = [i for i in range(twice * total) if i not in of_r]
        return [s[i] for i in of_r], [s[i] for i in of_y]

    def _rational_augmented(self):
        """K with products of its numbers (A^H W, d^2) that no rounding has touched."""
        system, m, total = self.system, self.m, self.m + self.n
        K = rational(self.K)
        twice = len(K) // total
        W = [Fraction(1)] * m if system.weights is None else [Fraction(v) for v in system.weights[0].tolist()]
        plain = rational(system.plain.dense()[0])
        adjoint = transpose(plain, twice * self.n)
        for p in range(twice * self.n):
            row = p // self.n * total + m + p % self.n
            for q in range(twice * m):
                K[row][q // m * total + q % m] = adjoint[p][q] * W[q % m]
            if system.damp is not None:
                K[row][row] = -(Fraction(float(system.damp[0, p % self.n, 0])) ** 2)
        return K

    def inaccurate(self, contraction, seed=0):
        """K^-1 f with an r and a y that are each wrong by about `contraction`, always in the same way; calls count."""
        g = torch.Generator().manual_seed(seed)
        total = self.m + self.n
        inverse = torch.tensor([[float(v) for v in row] for row in _inverse(self.K)], dtype=DOUBLE)
        if self.K.is_complex():
            inverse = torch.complex(inverse[:total, :total], inverse[total:, :total])
        turns = (torch.linalg.qr(torch.randn(k, k, generator=g, dtype=DOUBLE)).Q for k in (self.m, self.n))
        wrong = torch.eye(total) + contraction * torch.block_diag(*turns)
        self.calls = 0

        def correct(b, c):
            self.calls += 1
            s = wrong.to(inverse.dtype) @ (inverse @ torch.cat([b, c], 1))
            iterations = torch.ones((1, b.shape[2]), dtype=DOUBLE)
            return Run(s[:, : self.m], s[:, self.m :], iterations, iterations)

        return correct

    def by_factor(self, contraction):
        """K^-1 f by R^-1 (1 + E) R^-H for A^H A + d^2 = R^H R, whose error is small in the norm of A^H A + d^2."""
        A = self.system.A.dense()[0]
        R = torch.linalg.qr(torch.cat([A, self._damping().to(A.dtype)])).R
        g = torch.Generator().manual_seed(0)
        wrong = torch.eye(self.n) + contraction * torch.linalg.qr(torch.randn(self.n, self.n, generator=g).double()).Q

        def correct(b, c):
            half = torch.linalg.solve_triangular(R.mH, A.mH @ b - c, upper=False)
            y = torch.linalg.solve_triangular(R, wrong.to(A.dtype) @ half, upper=True)
            iterations = torch.ones((1, b.shape[2]), dtype=DOUBLE)
            return Run(b - A @ y, y, iterations, iterations)

        return correct

    def refined(self, correct, *, contraction=0.03, **options):
        settings = {"target": TARGET, "bound": BOUND, "contraction": contraction, "accept": ACCEPT} | options
        return refine(self.system, self.b, self.c, correct, largest=self.largest, smallest=self.smallest, **settings)

    def judged(self, refined, **options):
        """The report on a solution, as solvers ask for it."""
        settings = {"method": 1, "rank": self.n, "accept": ACCEPT} | options
        return report(self.system, self.b, self.c, refined, largest=self.largest, smallest=self.smallest, **settings)

    def errors(self, refined):
        """Of r and of x: (k,) each, relative, in the norms in which refinement claims them."""
        system, r, y = self.system, *self.exact()
        k = self.b.shape[2]
        weigh = torch.ones(1, self.m).double() if system.weights is None else system.root
        found = []
        for got, want, by in ((refined.r, r, weigh[0]), (refined.y, y, system.weight[0, :, 0])):
            parts, factors = rational(got[0]), [Fraction(v) for v in by.tolist()]
            factors = factors * (len(parts) // len(factors))
            columns = []
            for j in range(k):
                right = [[w * row[j]] for w, row in zip(factors, want, strict=True)]
                left = [[w * (p[j] - q[j])] for w, p, q in zip(factors, parts, want, strict=True)]
                columns.append(2.0 ** (size(left) - size(right)))
            found.append(torch.tensor(columns, dtype=DOUBLE))
        return found

    def claims(self, refined):
        measure = Measure(self.system, self.b, self.c, self.largest, ACCEPT)
        whole = measure.sizes(refined.r, refined.y)
        return [(refined.errors.r / whole.r)[0], (refined.errors.x / whole.x)[0]]


def _inverse(K):
    A = rational(K)
    return solved(A, [[Fraction(int(i == j)) for j in range(len(A))] for i in range(len(A))])
