"""What tests/test_distributed_fits.py asks of fits in one process, and on several ranks; see sharded.py."""

from functools import partial

import torch
from helpers import normal
from sharded import CGLS, Place, of_rank
from torch.func import grad, hessian, jacfwd, jacrev, jvp

import functional_lstsq as fl

LOSSES = {"Huber": fl.Huber, "Cauchy": fl.Cauchy}


def fit(place, residual, x0, args=(), **options):
    function = fl.gauss_newton if place.alone else fl.distributed.gauss_newton
    return function(residual, x0, args, **options)


def exponentials(place):
    """(residual, x0, (y,)) of two exponentials, with some data far off."""
    t = place.rows(torch.linspace(0, 3, place.m))
    far = place.rows(torch.arange(place.m)) % 9 == 4
    y = torch.exp(-0.5 * t) + 0.4 * torch.exp(-2 * t) + 0.02 * place.b + torch.where(far, 0.3, 0.0)

    def of(x, y):
        return x[0] * torch.exp(-x[1] * t) + x[2] * torch.exp(-x[3] * t) - y

    return of, torch.tensor([0.9, 0.6, 0.5, 1.8]), (y,)


def loss_of(place, found):
    return found.x.sin().sum() + place.total((place.shared(found.x).sum() * found.residual.square()).sum())


def derivatives(place, of_all, given, along):
    """A value, its gradient by all that is given, and what `of_all` gives along a direction, to second order."""
    value = lambda *given: loss_of(place, of_all(*given))  # noqa: E731
    bars = grad(value, tuple(range(len(given))))(*given)
    forward = jvp(lambda *given: of_all(*given).x, given, along)[1]
    second = jvp(grad(value, tuple(range(len(given)))), given, along)[1]
    return bars, forward, second


def told(found):
    return [torch.stack([t.double().reshape(()) for t in (found.info.status_code, found.info.cost)])]


def weighted(place, by="weights"):
    """Some of weight zero, which have ordinary derivatives."""
    of, x0, (y,) = exponentials(place)
    zero = place.rows(torch.arange(place.m)) % 7 == 3
    weights = torch.where(zero, 0.0, place.weights) if by == "weights" else place.weights

    def of_all(y, weights):
        return fit(place, of, x0, (y,), **{by: weights})

    bars, forward, second = derivatives(place, of_all, (y, weights), (y.cos(), weights))
    found = of_all(y, weights)
    columns = torch.vmap(lambda y: of_all(y, weights).x)(torch.stack([y, 1.1 * y]))
    by_weights = jacrev(lambda w: of_all(y, w).x)(weights).T
    return {
        "same": [found.x, forward, columns],
        "rows": [found.residual, *bars, *second, by_weights],
        "info": told(found),
    }


def robust(place, kind):
    """By the data and by the threshold, which all ranks have."""
    of, x0, (y,) = exponentials(place)

    def of_all(y, threshold):
        return fit(place, of, x0, (y,), robust=LOSSES[kind](threshold), weights=place.weights)

    given, along = (y, torch.tensor(0.15)), (y.cos(), torch.tensor(1.0))
    bars, forward, second = derivatives(place, of_all, given, along)
    twice = hessian(lambda t: loss_of(place, of_all(y, t)))(given[1])
    found = of_all(*given)
    same = [found.x, forward, bars[1], second[1], twice, found.info.scale]
    return {"same": same, "rows": [found.residual, bars[0], second[0]], "info": told(found)}


def chain(place, how, solver=None, second=False):
    """Unknowns of a chain, which neighbours and data hold: twice as many rows as unknowns, in any order."""
    n = place.m // 2
    mine = place.rows(torch.randperm(place.m, generator=torch.Generator().manual_seed(3)))
    data = place.rows(normal(place.m, seed=5))
    at, ahead, held = mine % n, (mine + 1) % n, mine < n

    def of(x, data, s):
        return torch.where(held, x[at] + s * x[at] ** 3 - data, x[ahead] - x[at].sin() + 0.1 * data)

    rows = torch.arange(len(mine))
    indices = torch.cat([torch.stack([rows, at]), torch.stack([rows, ahead])], 1)
    pattern = fl.SparsePattern(indices, (len(mine), n))

    def jacobian(x, data, s):
        by_at = torch.where(held, 1 + 3 * s * x[at] ** 2, -x[at].cos())
        return fl.SparseMatrix(torch.cat([by_at, torch.where(held, 0.0, torch.ones_like(data))]), pattern)

    of_rows = {"pattern": pattern, "function": jacobian, "whole": None}[how]

    def of_all(data, s):
        return fit(place, of, torch.zeros(n), (data, place.shared(s)), jacobian=of_rows, solver=solver)

    found, given, along = of_all(data, torch.tensor(0.2)), (data, torch.tensor(0.2)), (data.cos(), torch.tensor(1.0))
    if second:
        bars, forward, twice = derivatives(place, of_all, given, along)
        same, rows = [found.x, forward, bars[1], twice[1]], [found.residual, bars[0], twice[0]]
    else:
        by_data, by_s = grad(lambda *given: loss_of(place, of_all(*given)), (0, 1))(*given)
        same, rows = [found.x, by_s], [found.residual, by_data]
    return {"same": same, "rows": rows, "info": told(found)}


def bounded(place):
    of, x0, (y,) = exponentials(place)
    bounds = torch.tensor([0.0, 0.2, 0.0, 0.0]), torch.tensor([0.9, 3.0, 0.3, 3.0])

    def of_all(y, lower, upper):
        return fit(place, of, x0, (y,), bounds=(lower, upper), weights=place.weights)

    found = of_all(y, *bounds)
    assert found.info.active.any()
    value = lambda y, lower, upper: loss_of(place, of_all(y, lower, upper))  # noqa: E731
    by_y, *by_bounds = grad(value, (0, 1, 2))(y, *bounds)
    second = jacfwd(jacrev(lambda upper: of_all(y, bounds[0], upper).x))(bounds[1])
    same = [found.x, *by_bounds, second, found.info.active, found.info.multipliers]
    return {"same": same, "rows": [found.residual, by_y], "info": told(found)}


def of_a_gauge(place):
    """Only sums and a product of unknowns are determined."""
    t = place.rows(torch.linspace(0, 1, place.m))

    def of(x, y):
        return (x[0] + x[1]) * t + torch.exp(-(x[2] + x[3]) * t) - y

    y = 1.5 * t + torch.exp(-2 * t) + 0.01 * place.b

    def of_all(y):
        return fit(place, of, torch.tensor([1.0, 0.2, 0.5, 0.9]), (y,), rank_deficient="minimum_norm")

    found = of_all(y)
    by_y = grad(lambda y: (of_all(y).x[:2].sum() * of_all(y).x[2:].sum()).sin())(y)
    return {"same": [found.x], "rows": [found.residual, by_y], "info": told(found)}


def without_a_minimum(place):
    """What is reached is the same on all ranks, and derivatives are NaN, or zero where nothing depends on it."""

    def reached(b):
        return fit(place, lambda x, b: torch.exp(x[0]) * b, torch.ones(1), (b,), throw=False, max_iterations=5)

    found = reached(place.b)
    assert found.info.status == "iteration limit reached"
    used = grad(lambda b: reached(b).x.sum())(place.b)
    assert bool(used.isnan().all())
    masked = grad(lambda b: torch.where(torch.tensor(True), place.total(b.sum()), reached(b).x.sum()))(place.b)
    return {"same": [found.x], "rows": [masked], "info": told(found)}


def in_single_precision(place):
    t = place.rows(torch.linspace(0, 1, place.m)).float()

    def of_all(y):
        return fit(place, lambda x, y: x[0] * torch.exp(-x[1] * t) - y, torch.ones(2).float(), (y,))

    y = 2 * torch.exp(-3 * t) + 0.01 * place.b.float()
    found = of_all(y)
    return {"same": [found.x], "rows": [found.residual, grad(lambda y: of_all(y).x.sum())(y)]}


CASES = {
    "weights": (weighted, {}),
    "sigma": (partial(weighted, by="sigma"), {}),
    **{name: (partial(robust, kind=name), {}) for name in LOSSES},
    "a pattern": (partial(chain, how="pattern", second=True), {"m": 60}),
    "a Jacobian": (partial(chain, how="function"), {"m": 60}),
    "a pattern, CGLS": (partial(chain, how="pattern", solver=CGLS), {"m": 60}),
    "many unknowns": (partial(chain, how="pattern"), {"m": 1100}),
    "a whole Jacobian": (partial(chain, how="whole"), {"m": 150}),
    "bounds": (bounded, {}),
    "a gauge": (of_a_gauge, {}),
    "without a minimum": (without_a_minimum, {}),
    "float32": (in_single_precision, {}),
}


def refusals(rank):
    """{name: what is refused} of this rank of two; what differs, does so on rank 1."""
    place = Place("even")
    of, x0, args = exponentials(place)
    differ = partial(of_rank, rank)
    m, few = len(place.b), fl.SparsePattern(torch.zeros(2, 1, dtype=torch.int64), (3, 4))
    ones = fl.SparseMatrix(torch.ones(m), fl.SparsePattern(torch.stack([torch.arange(m), torch.arange(m) % 4]), (m, 4)))

    many = 600 * rank + torch.arange(600)

    def call(**options):
        return lambda: fit(place, of, x0, args, **options)

    return {
        "weights of another size": call(weights=differ(place.b[1:] ** 2, place.b**2)),
        "negative weights": call(weights=differ(-1.0, 1.0) * place.weights),
        "weights and sigma": call(weights=place.weights, sigma=place.weights),
        "another loss": call(robust=differ(fl.Huber(0.1), fl.Cauchy(0.1))),
        "another threshold": call(robust=fl.Huber(differ(0.1, 0.2))),
        "another solver": call(solver=differ(fl.CGLS(), fl.Dense())),
        "a preconditioner": call(solver=fl.CGLS(preconditioner=lambda g: g)),
        "other bounds": call(bounds=(0, differ(1.0, 2.0))),
        "bounds on one rank": call(bounds=differ((0, 1), None)),
        "another pattern's size": call(jacobian=differ(few, None)),
        "a Jacobian of something else": call(jacobian=differ(lambda x, y: ones, None)),
        "throw on one rank": call(throw=differ(False, True)),
        "NaN in args": lambda: fit(place, of, x0, (differ(torch.nan, 1.0) * args[0],)),
        "pytrees": lambda: fit(place, of, (x0,), args),
        "an estimated scale": call(robust=fl.Huber()),
        "a maximum": lambda: fit(place, lambda x, y: 3 * x.cos().sum() - 0.1 * y, torch.zeros(2), args, solver=CGLS),
        "a maximum of many": lambda: fit(
            place,
            lambda x, of: 3 * x[of].cos() - 1,
            torch.zeros(520),
            (many % 520,),
            jacobian=fl.SparsePattern(torch.stack([torch.arange(600), many % 520]), (600, 520)),
        ),
        "no full rank, by CGLS": lambda: fit(place, lambda x, y: x.sum() - y, torch.zeros(2), args, solver=CGLS),
        "no full rank": lambda: fit(place, lambda x, y: x.sum() - y, torch.zeros(2), args),
    }
