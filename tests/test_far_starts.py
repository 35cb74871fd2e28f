"""The problems of Moré, Garbow and Hillstrom, from their own starts and from ten and a hundred times as far."""

import pytest
import torch
from hillstrom import PROBLEMS

import functional_lstsq as fl

# Where nothing is found: J lacks rank at the minimum (Powell's), the cost is no number, or no minimum is in reach.
REFUSED = {
    1: {"powell singular"},
    10: {"powell singular", "osborne2"},
    100: {"powell singular", "osborne2", "powell bad", "jennrich", "gaussian", "meyer", "gulf", "box3", "biggs"}
    | {"chebyquad"},
}


def fit_from(name, times, **options):
    start, residual, sums = PROBLEMS[name]
    far = times * start if start.any() or times == 1 else torch.full_like(start, float(times))
    return fl.gauss_newton(residual, far, throw=False, **options), sums


@pytest.mark.parametrize(
    "times", [1, pytest.param(10, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_minimum_is_found_or_the_user_is_told(name, times):
    fit, sums = fit_from(name, times)
    if fit.info.status != "converged":
        assert name in REFUSED[times], fit.info
        return
    cost = 2 * float(fit.info.cost)
    assert any(abs(cost - known) <= 2e-5 * known + 1e-18 for known in sums), cost


@pytest.mark.parametrize("name", ["beale", "jennrich", "bard"])
def test_a_second_attempt_finds_what_the_first_does_not(name):
    """Without a limit of the user's own, which holds for all steps together."""
    start = PROBLEMS[name][0]
    limit = 100 * (len(start) + 1)
    fit, (least, *_) = fit_from(name, 10)
    alone, _ = fit_from(name, 10, max_iterations=limit)
    assert alone.info.status != "converged"
    assert int(alone.info.iterations) <= limit < int(fit.info.iterations) + limit
    assert fit.info.status == "converged"
    assert abs(2 * float(fit.info.cost) - least) <= 2e-5 * least + 1e-18


def test_a_batch_goes_on_where_it_has_to():
    start, residual, _ = PROBLEMS["beale"]
    starts = torch.stack([start, 10 * start, 0.9 * start])
    found = torch.vmap(lambda x: fl.gauss_newton(residual, x).x)(starts)
    assert (found - torch.tensor([3.0, 0.5])).abs().max() < 1e-10
