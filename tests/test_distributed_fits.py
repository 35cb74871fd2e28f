"""Fits over ranks: processes that have some of the residuals each, held against `gauss_newton` of all of them."""

import pytest
import torch
from on_ranks import compare, fixtures
from sharded_fits import CASES

import functional_lstsq as fl

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch has no gloo"
)


on_ranks, alone = fixtures(CASES, "sharded_fits")


# Of the other splits, by which `test_distributed` holds the sums that fits are made of, the hardest one.
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("split", ["even", pytest.param("of one row and of none", marks=pytest.mark.slow)])
def test_as_in_one_process(on_ranks, alone, split, name):
    compare(name, split, *alone(name), [found[name] for found in on_ranks(split)])


REFUSALS = {  # name: (what is raised, words of the message)
    "weights of another size": (ValueError, "on rank 1: weights must have shape (20,), one for each residual, got (19"),
    "negative weights": (ValueError, "on rank 1: weights must not be negative"),
    "weights and sigma": (TypeError, "sigma must be None beside weights"),
    "another loss": (ValueError, "robust must be the same on all ranks, got ('Cauchy', None, None) on rank 0"),
    "another threshold": (ValueError, "the threshold of robust must be the same on all ranks"),
    "another solver": (ValueError, "solver, rank_deficient and rank_tolerance must be the same on all ranks"),
    "a preconditioner": (ValueError, "allows no preconditioner of CGLS"),
    "other bounds": (ValueError, "the upper bound must be the same on all ranks"),
    "bounds on one rank": (ValueError, "whether there are bounds must be the same on all ranks"),
    "another pattern's size": (ValueError, "on rank 1: jacobian must have shape (20, 4), got (3, 4)"),
    "a Jacobian of something else": (ValueError, "on rank 1: jacobian must be that of residual, got a relative"),
    "throw on one rank": (ValueError, "throw must be the same on all ranks"),
    "NaN in args": (ValueError, "on rank 1: args must be finite, got NaN in it"),
    "pytrees": (TypeError, "x0 must be a dense tensor of shape (n,), got tuple"),
    "an estimated scale": (ValueError, "scale of robust must be a number over ranks"),
    "a maximum": (fl.RankDeficientError, "gauss_newton came to a point where the Jacobian has rank"),
    "a maximum of many": (fl.RankDeficientError, "gauss_newton came to a point where the Jacobian has rank"),
    "no full rank, by CGLS": (fl.RankDeficientError, "gauss_newton came to a point where the Jacobian has rank"),
    "no full rank": (fl.RankDeficientError, "gauss_newton came to a point where the Jacobian has rank 1, not full"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_all_ranks_raise_the_same_error(on_ranks, name):
    (kind, message), other = (of_rank[name] for of_rank in on_ranks("even"))
    assert (kind, message) == other
    assert kind == REFUSALS[name][0].__name__
    assert REFUSALS[name][1] in message
