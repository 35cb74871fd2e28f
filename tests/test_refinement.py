"""Refinement around an inaccurate solver, whose answers and claims are held against exact rational solutions."""

import math
from fractions import Fraction

import pytest
import torch
from helpers import with_singular_values
from rationals import rational, size, solved, transpose

from functional_lstsq.result import CONVERGED, INACCURATE, ITERATION_LIMIT
from functional_lstsq.solvers.acceptance import report
from functional_lstsq.solvers.conjugate_gradients import Run
from functional_lstsq.solvers.refinement import Measure, refine
from functional_lstsq.solvers.system import EPS, System, Weighting
from functional_lstsq.sparse.base import norm
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


CONDITIONS = [2.0, 1e3, 1e6]


def honest(errors, claims, *, vague=1e4, least=50 * EPS):
    """A claim is at least a tenth of the true error, and not more than `vague` times it above some rounding errors."""
    for name, error, claim in zip(("r", "x"), errors, claims, strict=True):
        assert (claim >= (error - EPS) / 10).all(), f"{name}: wrong by {error.tolist()}, claimed {claim.tolist()}"
        assert (claim <= vague * error + least).all(), f"{name}: wrong by {error.tolist()}, claimed {claim.tolist()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("damp", [None, 1e-2])
@pytest.mark.parametrize("contraction", [0.03, 1e-3])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_extended_refinement_reaches_the_exact_solution(condition, contraction, damp, dtype):
    room = Room(condition, damp=damp, dtype=dtype, extended=True)
    refined = room.refined(room.inaccurate(contraction), contraction=contraction)
    errors = room.errors(refined)
    for error in errors:
        assert (error <= 4 * EPS).all()
    honest(errors, room.claims(refined))
    assert (room.judged(refined).status == CONVERGED).all()
    # Digits of each correction, out of 16 in plain residuals and 16 more in exact ones, and a last one that shows it.
    assert room.calls <= 10 + 2 * 2 * 16 / -math.log10(contraction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("damp", [None, 1e-2])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_plain_refinement_is_as_good_as_a_stable_method(condition, damp, dtype):
    """Rounding errors of the residuals, magnified once for x where b is in the range and twice where it is not."""
    room = Room(condition, damp=damp, dtype=dtype, exact=False)  # not the user's own numbers: never extended
    refined = room.refined(room.inaccurate(1e-2), contraction=1e-2)
    errors = room.errors(refined)
    effective = float(room.largest / room.smallest)
    assert (errors[1] <= 200 * EPS * effective**2).all()
    assert errors[1][1] <= 200 * EPS * effective * (1 + 1e-6 * effective)
    honest(errors, room.claims(refined), vague=1e4, least=1e3 * EPS * effective**2)
    assert (room.judged(refined).status == CONVERGED).all()


@pytest.mark.parametrize("slack", [False, True])
@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_weights_and_constraints(dtype, extended, slack):
    """Solutions of the system with W and T in it, by a solver of the one in which A is W^(1/2) A."""
    W = torch.tensor([[4, 1, 0.5, 2, 1e-3]], dtype=DOUBLE)
    T = torch.ones(1, 5, dtype=DOUBLE)
    if slack:  # heavy rows are met by their weight in the factor, and corrections
        T[0, 0], T[0, 3] = 0.0, 0.125
        W = torch.where(T < 1, 4.0, W * 2.0**-24)
    room = Room(30.0, dtype=dtype, extended=extended, weighting=Weighting(W, torch.zeros(1, 1), T if slack else None))
    refined = room.refined(room.by_factor(1e-3), contraction=0.01, strict=slack)
    errors, claims = room.errors(refined), room.claims(refined)
    honest(errors, claims, vague=1e6, least=1e-11)
    if extended or not slack:  # multipliers of heavy rows are what is left of larger numbers
        for error in errors:
            assert (error <= (32 * EPS if extended else 1e-12)).all()


@pytest.mark.parametrize("condition", [1e7, 1e9])
def test_where_rounding_is_too_large_it_goes_on_in_extended_precision(condition):
    """Without being asked for it, but only for numbers that are the user's own."""
    own, computed = Room(condition), Room(condition, exact=False)
    refined = [room.refined(room.inaccurate(1e-2), contraction=1e-2) for room in (own, computed)]
    better, plain = own.errors(refined[0]), computed.errors(refined[1])
    assert (better[1] <= 1e-13).all()
    assert plain[1][0] > 1e-11
    honest(better, own.claims(refined[0]))
    assert (computed.claims(refined[1])[1] >= plain[1] / 10).all()


def test_each_column_stops_by_itself():
    """A column of zeros, one that is solved at once, one that is not: iterations are counted for each."""
    room = Room(10.0)
    room.b[:, :, 1:3], room.c[:, :, 1:] = 0, 0
    correct = room.inaccurate(0.03)

    def exact_for_the_last(b, c):
        run, right = correct(b, c), torch.linalg.solve(room.K, torch.cat([b, c], 1))
        last = torch.arange(b.shape[2]) % 4 == 3
        r, y = right[:, : room.m], right[:, room.m :]
        return run._replace(r=torch.where(last, r, run.r), y=torch.where(last, y, run.y))

    refined = room.refined(exact_for_the_last)
    spent = refined.iterations[0].tolist()
    assert spent[0] > spent[3] >= 1
    assert spent[1] <= 2
    assert (refined.r[:, :, 1:3] == 0).all()
    assert (refined.y[:, :, 1:3] == 0).all()
    assert (room.judged(refined).status == CONVERGED).all()


def test_one_and_the_same_answer_for_one_column_or_several():
    room = Room(1e3, extended=True)
    together = room.refined(room.inaccurate(0.03))
    b, c = room.b, room.c
    for j in range(4):
        room.b, room.c = b[:, :, j : j + 1], c[:, :, j : j + 1]
        alone = room.refined(room.inaccurate(0.03))
        assert norm(together.y[:, :, j : j + 1] - alone.y) <= 2 * EPS * norm(alone.y)
        assert norm(together.r[:, :, j : j + 1] - alone.r) <= 2 * EPS * norm(alone.r)


# What is no convergence.


def _nothing(b, c):
    zero = torch.zeros((1, b.shape[2]), dtype=DOUBLE)
    return Run(torch.zeros_like(b), torch.zeros_like(c), zero, zero)


@pytest.mark.parametrize("extended", [False, True])
def test_a_correction_of_zero_is_no_convergence(extended):
    """A solver that gives zeros from the start gives a solution of zeros that does not change."""
    room = Room(10.0, extended=extended)
    judged = room.judged(room.refined(_nothing))
    assert (judged.status == INACCURATE).all()
    assert (torch.maximum(judged.residual_error, judged.solution_error) >= 0.1).all()
    room.b, room.c = torch.zeros_like(room.b), torch.zeros_like(room.c)
    judged = room.judged(room.refined(_nothing))  # of zeros it is right
    assert (judged.status == CONVERGED).all()
    assert (judged.solution_error <= EPS).all()


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("wrong", [1e-2, 1.0])
def test_corrections_that_become_zero_leave_an_error_that_residuals_show(wrong, extended):
    room = Room(3.0, extended=extended)
    first = room.inaccurate(wrong)

    def once(b, c):
        return first(b, c) if not room.calls else _nothing(b, c)

    refined = room.refined(once)
    errors, judged = room.errors(refined), room.judged(refined)
    assert errors[1].max() > wrong / 100
    assert (judged.status == INACCURATE).all()
    whole = torch.maximum(judged.residual_error, judged.solution_error)[0]
    assert (whole >= torch.maximum(*errors).clamp(max=1) / 100).all()


@pytest.mark.parametrize("extended", [False, True])
def test_corrections_that_grow_are_not_taken(extended):
    """A solver that is wrong by more than the whole: no iteration repairs it, and none is claimed to."""
    room = Room(10.0, extended=extended)
    refined = room.refined(room.inaccurate(20.0), contraction=0.5)
    judged = room.judged(refined)
    assert (judged.status == INACCURATE).all()
    if not extended:  # the first answer and the correction that shows what it is: 20^2, in the norms of y and x
        assert (room.errors(refined)[1] <= 1000).all()
    limited = room.judged(refined, limited=torch.ones(1, 4, dtype=torch.bool))
    assert (limited.status == ITERATION_LIMIT).all()


@pytest.mark.parametrize("what", [math.nan, math.inf])
@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("call", [1, 2])
def test_what_is_not_finite_is_never_accepted(call, extended, what):
    """From the first call there is nothing; from the second, the first solution is kept, and its error not known."""
    room = Room(10.0, extended=extended)
    right = room.inaccurate(1e-3)

    def spoilt(b, c):
        run = right(b, c)
        return run if room.calls < call else run._replace(r=run.r * what, y=run.y * what)

    judged = room.judged(room.refined(spoilt))
    assert (judged.status == INACCURATE).all()
    assert not (judged.solution_error < 1e-3).any()


def test_a_weak_direction_that_corrections_leave_is_claimed():
    """`correct` finds nothing of one direction; corrections then look as if all were done."""
    room = Room(1e2)
    weakest = torch.linalg.svd(room.system.A.dense()[0], full_matrices=False).Vh[-1].conj()[:, None]
    right = room.inaccurate(0.0)

    def without(b, c):
        run = right(b, c)
        lost = weakest @ (weakest.mH @ run.y)
        return run._replace(y=run.y - lost, r=run.r + room.system.A.matmul(lost))

    refined = room.refined(without)
    errors, judged = room.errors(refined), room.judged(refined)
    assert errors[1].min() > 1e-3
    assert (judged.status != CONVERGED).all()


@pytest.mark.parametrize("exponent", [-300, 0, 300])
def test_the_unit_of_the_right_hand_sides_does_not_matter(exponent):
    room = Room(1e3, extended=True)
    one = room.refined(room.inaccurate(0.03))
    room.b, room.c = room.b * 2.0**exponent, room.c * 2.0**exponent
    other = room.refined(room.inaccurate(0.03))
    assert torch.equal(one.y * 2.0**exponent, other.y)
    assert torch.equal(one.r * 2.0**exponent, other.r)
    assert torch.equal(one.iterations, other.iterations)


def test_the_claims_of_a_report_are_those_of_refinement():
    room = Room(1e3)
    refined = room.refined(room.inaccurate(1e-3), contraction=1e-3)
    judged, claims = room.judged(refined), room.claims(refined)
    assert (judged.residual_error[0] >= claims[0]).all()
    assert (judged.solution_error[0] >= claims[1]).all()
    torch.testing.assert_close(judged.solution_error[0], claims[1] + EPS / 2, rtol=1e-12, atol=0)
    assert (judged.condition == room.largest / room.smallest).all()
