"""Refinement whose corrections are nothing, wrong, growing or no numbers, which is no convergence."""

import math

import pytest
import torch
from room import DOUBLE, Room

from functional_lstsq.result import CONVERGED, INACCURATE, ITERATION_LIMIT
from functional_lstsq.solvers.conjugate_gradients import Run
from functional_lstsq.solvers.system import EPS


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
