"""Refinement around an inaccurate solver, whose answers and claims are held against exact rational solutions."""

import math

import pytest
import torch
from room import DOUBLE, DTYPES, Room

import functional_lstsq as fl
from functional_lstsq.result import CONVERGED
from functional_lstsq.solvers.system import EPS, Weighting
from functional_lstsq.sparse.base import norm

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


def test_a_direction_that_residuals_hide_is_looked_for_once_more():
    """A square system, weights of which make a condition number of 1e14: the third correction is the large one."""
    A = torch.tensor([[0, 1, 0], [0, -3, 1], [-3, 0, -3e8]], dtype=torch.float64)
    b, weights = (torch.tensor(t, dtype=torch.float64) for t in ([1e8, 2, -1e-8], [2, 1e-8, 3e8]))
    solution = fl.solve(fl.SparseMatrix.from_dense(A), b, weights=weights)
    x = torch.tensor([-3e8 * (3e8 + 2) / 3, 1e8, 3e8 + 2], dtype=torch.float64)
    assert float(((solution.x - x) / x).abs().max()) <= 2 * EPS
    assert solution.info.forward_error < 2 * EPS
