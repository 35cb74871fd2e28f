"""Cases over ranks of what else is asked of rows: constraints, bounds, least norm, studies, fits; see sharded.py."""

from functools import partial

import torch
from sharded import CGLS
from sharded_derivatives import directions, loss
from torch.func import grad, hessian, jacfwd, jacrev, jvp

import functional_lstsq as fl


def constrained(place, solver=None):
    """Rows of infinite weight are met exactly, and heavy ones nearly; others have no weight."""
    row = place.rows(torch.arange(place.m))
    weights = torch.where(row % 19 == 18, torch.inf, torch.where(row % 7 == 3, 0.0, place.weights))
    weights = torch.where(row == 1, 1e20, weights)
    by_all = grad(lambda A, b: fl.lstsq(A, b, weights=weights, solver=solver).sin().sum(), (0, 1))(place.A, place.b)
    found = fl.solve(place.A, place.b, weights=weights, solver=solver)
    assert bool((found.residual[weights.isinf()] == 0).all())
    return {
        "same": [found.x],
        "rows": [found.residual, by_all[1]],
        "entries": [place.entries_of(by_all[0])],
    }


def bounded(place, solver=None):
    solve = partial(fl.solve, solver=solver)
    n = place.A.shape[1]
    lower, upper = torch.linspace(-0.2, 0.0, n), torch.linspace(0.05, 0.2, n)

    def of_x(A, b, lower, upper, weights):
        found = solve(A, b, bounds=(lower, upper), weights=weights)
        return found.x.sin().sum() + place.total((place.shared(found.x).sum() * found.residual.square()).sum())

    found = solve(place.A, place.b, bounds=(lower, upper))
    bars = grad(of_x, (0, 1, 2, 3, 4))(place.A, place.b, lower, upper, place.weights)
    columns = solve(place.A, torch.stack([place.b, place.b.cos()], 1), bounds=(0, 0.1), damp=0.1)
    assert found.info.active.any()
    same = [found.x, found.info.active, found.info.multipliers, *bars[2:4], columns.x]
    return {"same": same, "rows": [found.residual, bars[1], bars[4]], "entries": [place.entries_of(bars[0])]}


def studied(place):
    def of_all(A, weights):
        variances, columns = fl.covariance_diagonal(A, weights), fl.covariance(A, [1, 3], weights)
        return variances.sin().sum() + columns.cos().sum() + place.total(fl.leverage(A, weights).square().sum())

    by_A, by_weights = grad(of_all, (0, 1))(place.A, place.weights)
    F = fl.factorize(place.A)
    same = [fl.covariance_diagonal(place.A, place.weights), fl.covariance(F, [0, 2])]
    rows = [fl.leverage(place.A), fl.leverage(place.A, place.weights), fl.leverage(F), by_weights]
    return {"same": same, "rows": rows, "entries": [place.entries_of(by_A)]}


def ill_conditioned_leverage(place):
    return {"rows": [fl.leverage(place.A), fl.leverage(place.A, place.weights)]}


def fitted(place):
    """Two exponentials, by times and data of each rank, a shared parameter and a shared start."""
    t = place.rows(torch.linspace(0, 3, place.m))
    y = torch.exp(-0.5 * t) + 0.4 * torch.exp(-2 * t) + 0.02 * place.b
    x0 = torch.tensor([0.9, 0.6, 0.5, 1.8])

    def of(x, y, t, offset):
        return x[0] * torch.exp(-x[1] * t) + x[2] * torch.exp(-x[3] * t) + offset - y

    def fit(y, t, offset):
        given = of, x0, (y, t, place.shared(offset))
        return fl.gauss_newton(*given) if place.alone else fl.distributed.gauss_newton(*given)

    def loss(y, t, offset):
        found = fit(y, t, offset)
        return found.x.sin().sum() + place.total((place.shared(found.x).sum() * found.residual.square()).sum())

    given = y, t, torch.tensor(0.01)
    found = fit(*given)
    by_y, by_t, by_offset = grad(loss, (0, 1, 2))(*given)
    along = jvp(lambda *given: fit(*given).x, given, (t, t.cos(), torch.tensor(1.0)))[1]
    second = hessian(lambda offset: loss(y, t, offset))(given[2])
    mixed = grad(lambda y: jvp(lambda t: loss(y, t, given[2]), (t,), (t.sin(),))[1])(y)
    third = jacfwd(jacrev(jacfwd(lambda offset: fit(y, t, offset).x)))(given[2])
    several = torch.vmap(lambda y: fit(y, t, given[2]).x)(torch.stack([y, 1.1 * y]))
    return {"same": [found.x, by_offset, along, second, third, several], "rows": [found.residual, by_y, by_t, mixed]}


def with_pinned(place, solver="auto"):
    """Infinite dampings pin unknowns at zero."""
    n = place.A.shape[1]
    damp = torch.where(torch.arange(n) % 3 == 1, torch.inf, torch.linspace(0, 1, n))
    given = place.A, place.b, place.weights, damp
    by_all = grad(partial(loss, place, solver), (0, 1, 2, 3))(*given)
    x = fl.lstsq(place.A, place.b, weights=place.weights, damp=damp, solver=CGLS)
    return {"same": [x, by_all[3]], "rows": [*by_all[1:3]], "entries": [place.entries_of(by_all[0])]}


def of_least_norm(place, weighted=True, solver=None):
    weights = torch.where(place.rows(torch.arange(place.m)) % 7 == 3, 0.0, place.weights) if weighted else None

    def of_x(A, b):
        return fl.lstsq(A, b, weights=weights, rank_deficient="minimum_norm", solver=solver)

    by_A, by_b = grad(lambda A, b: of_x(A, b).sin().sum(), (0, 1))(place.A, place.b)
    along = jvp(of_x, (place.A, place.b), directions(place)[:2])[1]
    return {"same": [of_x(place.A, place.b), along], "rows": [by_b], "entries": [place.entries_of(by_A)]}


def stopped(place):
    return {"same": [fl.lstsq(place.A, place.b, damp=0.1, solver=fl.CGLS(steps=3))]}


def cosines(params, x):
    """A row of cosines for each number of t."""
    theta, t = params
    return torch.cos(theta * t[:, None]) @ x


def of_shared_parameters(place):
    """A matrix whose parameters are the same on all ranks, beside numbers of each rank's own rows."""
    t, frequencies = place.rows(torch.linspace(0, 3, place.m)), torch.linspace(0.5, 4, 5)

    def function(theta):
        A = fl.LinearOperator(cosines, (place.shared(theta), t), 5)
        found = fl.solve(A if place.alone else fl.distributed.shard_rows(A), place.b, damp=0.1, solver=CGLS)
        return found.x.sin().sum() + place.total(found.residual.square().sum())

    return {"same": [grad(function)(frequencies), jacfwd(function)(frequencies), hessian(function)(frequencies)]}


def of_trees(place):
    """x and b in parts, and a matvec without parameters, which does not depend on x on a rank without rows."""
    t = place.rows(torch.linspace(0, 3, place.m))

    def line(t, x):
        return {"y": x["slope"] * t + x["offset"] if len(t) else torch.zeros(0)}

    A = fl.LinearOperator(line, t, {"slope": torch.zeros(()), "offset": torch.zeros(())})
    A = A if place.alone else fl.distributed.shard_rows(A)
    found = fl.solve(A, {"y": place.b}, solver=CGLS)
    by_b = grad(lambda b: fl.lstsq(A, {"y": b}, solver=CGLS)["slope"].sin())(place.b)
    return {"same": [found.x["slope"], found.x["offset"]], "rows": [found.residual["y"], by_b]}


def large_numbers(place):
    return {"same": [fl.lstsq(place.A, 1e250 * place.b) * 1e-250]}
