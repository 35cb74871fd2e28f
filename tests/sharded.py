"""What tests/test_distributed.py asks of one process that has all rows, and of several that have some each.

A case is a function of a `Place`, which gives {kind: [tensors]}: "same" for what is the same on all ranks, "rows" for
what has this rank's rows in front, "entries" for what has this rank's entries there.
"""

import datetime
import importlib
import os
import threading
import time
from functools import partial

import torch
import torch.distributed as dist
from helpers import normal, problem, with_singular_values
from torch.func import grad, hessian, jacfwd, jacrev, jvp

import functional_lstsq as fl
from functional_lstsq.distributed import places
from functional_lstsq.distributed.products import RowsOverRanks
from functional_lstsq.solvers import direct, sparse_factor
from functional_lstsq.solvers.direct import analyse
from functional_lstsq.solvers.system import EPS, System
from functional_lstsq.sparse.gram_pattern import GramPattern
from functional_lstsq.sparse.plain_products import Operator

SPLITS = {
    "even": lambda m: (0, m // 2, m),
    "one": lambda m: (0, m),
    "of one row and of none": lambda m: (0, m - 1, m, m),
    "four": lambda m: (0, 1, 1, m // 3, m),
}
CGLS = fl.CGLS(tolerance=1e-14)
SOLVERS = {"auto": None, "dense": fl.Dense(), "direct": fl.Direct(), "cgls": CGLS}


def multiplied(A, x):
    return A.matmul(x)


class Place:
    """Rows first to last of a problem, in the group of all ranks; without a group all of them, in one process.

    `by_products`: as operators.
    """

    def __init__(self, split=None, *, m=40, n=8, seed=1, by_products=False, **options):
        self.alone, self.m, self.by_products = split is None, m, by_products
        pattern, values, b = options.pop("given", None) or problem(m, n, seed=seed, **options)
        rank = 0 if self.alone else dist.get_rank()
        self.first, self.last = (0, m) if self.alone else SPLITS[split](m)[rank : rank + 2]
        self.mine = (pattern.indices[0] >= self.first) & (pattern.indices[0] < self.last)
        indices = pattern.indices[:, self.mine].clone()
        indices[0] -= self.first
        self.pattern = fl.SparsePattern(indices, (self.last - self.first, n))
        self.values, self.b = values[self.mine], self.rows(b)
        self.weights = self.rows(0.5 + normal(m, seed=seed + 1).abs())
        self.A = self.matrix(self.values)

    def rows(self, whole):
        return whole[self.first : self.last]

    def entries(self, seed):
        """Normally distributed numbers at the entries."""
        return normal(len(self.mine), seed=seed)[self.mine]

    def matrix(self, values):
        A = fl.SparseMatrix(values, self.pattern)
        A = fl.LinearOperator(multiplied, A, self.pattern.shape[1]) if self.by_products else A
        return A if self.alone else fl.distributed.shard_rows(A)

    def entries_of(self, A):
        """The values of this rank's rows of A, which may be a gradient by a matrix."""
        rows = A if self.alone else A.rows
        return rows.params.values if self.by_products else rows.values

    def total(self, t):
        return t if self.alone else fl.distributed.total(t)

    def shared(self, t):
        return t if self.alone else fl.distributed.shared(t)


def solution(place, solver, **options):
    found = fl.solve(place.A, place.b, solver=SOLVERS[solver], **options)
    return {"same": [found.x], "rows": [found.residual], "info": [torch.stack([t.double() for t in found.info])]}


def weighted_columns(place):
    n = place.A.shape[1]
    weights = torch.where(place.rows(torch.arange(place.m)) % 7 == 3, 0.0, place.weights)
    b, x0 = torch.stack([place.b, place.b.sin(), torch.zeros_like(place.b)], 1), normal(n, 3, seed=9)
    found = fl.solve(place.A, b, weights=weights, damp=torch.linspace(0, 1, n), x0=x0, solver=CGLS)
    return {"same": [found.x], "rows": [found.residual]}


def vmap_over_b(place, solver=None):
    lstsq = partial(fl.lstsq, solver=solver)
    B = torch.stack([place.b, place.b.cos(), place.b.exp()])
    x = torch.vmap(lambda b: lstsq(place.A, b))(B)
    by_b = torch.vmap(grad(lambda b: lstsq(place.A, b).sin().sum()))(B)
    by_A = torch.vmap(grad(lambda v, b: lstsq(place.matrix(v), b).sin().sum()), (None, 0))(place.values, B)
    return {"same": [x], "rows": [by_b.T], "entries": [by_A.T]}


def vmap_over_values(place, solver=None):
    lstsq = partial(fl.lstsq, solver=solver)
    V = torch.stack([place.values, place.values + 0.1 * place.entries(5)])
    x = torch.vmap(lambda v: lstsq(place.matrix(v), place.b))(V)
    return {"same": [x], "entries": [torch.vmap(grad(lambda v: lstsq(place.matrix(v), place.b).exp().sum()))(V).T]}


def loss(place, solver, A, b, weights, damp):
    """Of the solution and of the residual, which every rank has a part of."""
    found = fl.solve(A, b, weights=weights, damp=damp, solver=SOLVERS[solver])
    return found.x.sin().sum() + place.total((place.shared(found.x).sum() * found.residual.square()).sum())


def arguments(place, damp):
    n = place.A.shape[1]
    return place.A, place.b, place.weights, torch.tensor(0.3) if damp == "one" else torch.linspace(0.1, 1, n)


def gradient(place, solver, damp):
    by_A, by_b, by_weights, by_damp = grad(partial(loss, place, solver), (0, 1, 2, 3))(*arguments(place, damp))
    return {"same": [by_damp], "rows": [by_b, by_weights], "entries": [place.entries_of(by_A)]}


def directions(place):
    dA = place.matrix(place.entries(3))
    return dA, place.rows(normal(place.m, seed=4)), place.rows(normal(place.m, seed=5)), torch.tensor(0.7)


def tangent(place, solver=None):
    def both(*given):
        found = fl.solve(given[0], given[1], weights=given[2], damp=given[3], solver=solver)
        return found.x, found.residual

    x_dot, residual_dot = jvp(both, arguments(place, "one"), directions(place))[1]
    return {"same": [x_dot], "rows": [residual_dot]}


def jacobian_by_values(place, solver=None):
    of_x = jacrev(partial(fl.lstsq, solver=solver), (0, 1))(place.A, place.b)
    return {"entries": [place.entries_of(of_x[0]).T], "rows": [of_x[1].T]}


def second_along_a_direction(place, solver="auto"):
    """Of all arguments at once: forward over reverse, and reverse over reverse."""
    by_all = grad(partial(loss, place, solver), (0, 1, 2, 3))
    given, along = arguments(place, "one"), directions(place)
    forward = jvp(by_all, given, along)[1]

    def slope(*given):
        found = by_all(*given)
        own = (
            (place.entries_of(found[0]) * place.entries_of(along[0])).sum()
            + (found[1] * along[1]).sum()
            + (found[2] * along[2]).sum()
        )
        return place.total(own) + found[3] * along[3]

    reverse = grad(slope, (0, 1, 2, 3))(*given)
    return {
        "same": [forward[3], reverse[3]],
        "rows": [forward[1], forward[2], reverse[1], reverse[2]],
        "entries": [place.entries_of(forward[0]), place.entries_of(reverse[0])],
    }


def of_parameters(place, solver="dense"):
    """A scalar of four parameters that make values, b, weights and damp."""

    of_entries, (of_b, of_weights) = place.entries(3), (place.rows(normal(place.m, seed=seed)) for seed in (4, 6))

    def function(theta):
        mine = place.shared(theta)
        A, b = place.matrix(place.values * (1 + mine[0] * of_entries)), place.b + mine[1].sin() * of_b
        return loss(place, solver, A, b, place.weights * mine[2].exp() + 0.1 * of_weights.abs() * mine[2], theta[3])

    return function, torch.tensor([0.1, 0.2, 0.3, 0.4])


def hessians(place, solver="dense"):
    function, theta = of_parameters(place, solver)
    mixes = (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacfwd(f)))
    return {"same": [mix(function)(theta) for mix in mixes]}


def third(place):
    function, theta = of_parameters(place)
    return {"same": [jacfwd(jacrev(jacfwd(function)))(theta)]}


def autograd(place):
    values, b = place.values.clone().requires_grad_(), place.b.clone().requires_grad_()
    fl.lstsq(place.matrix(values), b, solver=CGLS).square().sum().backward()
    return {"rows": [b.grad], "entries": [values.grad]}


def of_dtensors(place):
    """b and weights that are sharded as A is: the residual and their gradients are sharded alike."""

    def spread(rows):
        if place.alone:
            return rows.clone().requires_grad_()
        from torch.distributed.tensor import DTensor, Shard, init_device_mesh

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        shape = (place.m, *rows.shape[1:])
        stride = torch.empty(shape, device="meta").stride()
        whole = DTensor.from_local(rows.clone(), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        return whole.detach().requires_grad_()

    def here(t):
        assert t.shape[0] == place.m
        return t if place.alone else t.to_local()

    b, weights = spread(torch.stack([place.b, place.b.sin()], 1)), spread(place.weights)
    x, residual, _ = fl.solve(place.A, b, weights=weights, solver=CGLS)
    x.square().sum().backward()
    return {"same": [x.detach()], "rows": [here(residual).detach(), here(b.grad), here(weights.grad)]}


def products(place):
    X, Y = normal(8, 2, seed=7), place.rows(normal(place.m, 2, seed=8))

    def adjoint(A, Y):
        return A.H.matmul(Y) if place.alone else A.adjoint(Y)

    def function(A, X, Y):
        back = adjoint(A, Y)
        return place.total(A.matmul(X).sin().sum()) + back.cos().sum()

    by_A, by_X, by_Y = grad(function, (0, 1, 2))(place.A, X, Y)
    return {"same": [adjoint(place.A, Y), by_X], "rows": [place.A @ X, by_Y], "entries": [place.entries_of(by_A)]}


def of_dtype(place, solver=None):
    found = fl.solve(place.A, place.b, solver=solver)
    by_A, by_b = grad(lambda A, b: fl.lstsq(A, b, solver=solver).abs().square().sum(), (0, 1))(place.A, place.b)
    return {"same": [found.x], "rows": [found.residual, by_b], "entries": [place.entries_of(by_A)]}


def of_a_small_residual(place):
    """In single precision, where rounding of the cotangent 2 r would be magnified."""
    given = place.A, place.b
    by_A, by_b = grad(lambda A, b: place.total(fl.solve(A, b).residual.square().sum()), (0, 1))(*given)
    return {"rows": [by_b], "entries": [place.entries_of(by_A)]}


def ill_conditioned_gradient(place):
    """Of condition 1e5, where derivatives need what rounding has left out of solutions."""
    found = gradient(place, "dense", "each")
    along = jvp(lambda A: fl.lstsq(A, place.b, damp=1e-6).sum(), (place.A,), (place.matrix(place.entries(3)),))[1]
    return {**found, "same": [*found["same"], along]}


def wide(place, solver=None):
    lstsq = partial(fl.lstsq, solver=solver)
    by_A, by_damp = grad(lambda A, d: lstsq(A, place.b, damp=d).sin().sum(), (0, 1))(place.A, torch.tensor(0.5))
    return {"same": [lstsq(place.A, place.b, damp=0.5), by_damp], "entries": [place.entries_of(by_A)]}


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


def kept(place, solver=None):
    """Factors that are kept serve solves, derivatives and studies, and none when values have changed."""
    F = fl.factorize(place.A, weights=place.weights, damp=0.1, solver=solver)
    once = fl.lstsq(F, place.b)
    again = fl.lstsq(F, place.b.cos())
    by_b = grad(lambda b: fl.lstsq(F, b).sin().sum())(place.b)
    by_columns = torch.vmap(lambda b: fl.lstsq(F, b))(torch.stack([place.b, place.b.exp()]))
    assert F.info is not None
    of_values = lambda v: fl.factorize(place.matrix(v), solver=solver)  # noqa: E731
    by_values = grad(lambda v: fl.lstsq(of_values(v), place.b).sin().sum())(place.values)
    values = place.values.clone()
    changing = of_values(values)
    early = place.pattern.indices[0] + place.first < place.m // 2
    if early.any():  # on the first ranks alone
        values[early] *= 2
    return {"same": [once, again, by_columns, fl.lstsq(changing, place.b)], "rows": [by_b], "entries": [by_values]}


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


def compiled(place, solver="auto"):
    """Whole graphs, which all ranks make of their own rows."""
    lstsq = partial(fl.lstsq, solver=SOLVERS[solver])

    def of_A(A, b):
        return grad(lambda A: lstsq(A, b).sin().sum())(A)

    def of_columns(A, b):
        return torch.vmap(lambda b: lstsq(A, b, damp=0.1))(torch.stack([b, b.cos()]))

    def of_weights(A, b, weights):
        return grad(partial(loss, place, solver), (1, 2))(A, b, weights, 0.2)

    def whole(function, *given):
        if place.alone:
            return function(place.A, place.b, *given)
        return torch.compile(function, fullgraph=True, backend="aot_eager")(place.A, place.b, *given)

    same = [whole(lstsq), whole(of_columns)]
    return {
        "same": same,
        "rows": [*whole(of_weights, place.weights)],
        "entries": [place.entries_of(whole(of_A))],
    }


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


def ill_conditioned(place):
    found = fl.solve(place.A, place.b, solver=fl.Dense())
    assert found.info.method == "dense-qr"
    return {"same": [found.x], "rows": [found.residual]}


def many_columns(place, method, tried=""):
    """More than the 500 up to which A^H A is factored without a thought of its cost."""
    found = fl.solve(place.A, place.b)
    assert found.info.method.startswith(method), found.info.tried
    assert tried in found.info.tried, found.info.tried
    by_A, by_b = grad(lambda A, b: fl.lstsq(A, b).sin().sum(), (0, 1))(place.A, place.b)
    return {"same": [found.x], "rows": [found.residual, by_b], "entries": [place.entries_of(by_A)]}


def with_full_rows(place):
    """Rows on all ranks that are left out of A^H A, since they alone would fill it."""
    before = sparse_factor._HEAVY_WORK, sparse_factor._HEAVY_ROW
    sparse_factor._HEAVY_WORK, sparse_factor._HEAVY_ROW = 0, 10
    try:
        found = of_dtype(place, fl.Direct())
        analysis = analyse(System(_products(place), None, EPS))
        assert analysis.left_out == 2
        return found | {"same": [*found["same"], gradient(place, "direct", "one")["same"][0]]}
    finally:
        sparse_factor._HEAVY_WORK, sparse_factor._HEAVY_ROW = before


def _products(place):
    local = Operator(place.pattern, place.values[None])
    return local if place.alone else RowsOverRanks(local, place.A.ranks, place.m)


def without_memory(place):
    """`Auto` leaves a factor alone on all ranks where one of them has no memory for it."""
    auto, rank = fl.Auto(dense_columns=1, dense_bytes=1, cgls=CGLS), 0 if place.alone else dist.get_rank()
    found = on_rank_1(rank, direct, "available_bytes", lambda: 10, lambda: fl.solve(place.A, place.b, solver=auto))
    spared = not place.alone and dist.get_world_size() > 1
    assert (found.info.tried == "CGLS (A^H A would not fit into memory)") == spared
    return {"same": [found.x]}


def on_new_patterns(place):
    """A rank's pattern may be a new one while that of another is what it was: what is kept is so together."""
    found, old, first = [], place.pattern, place.first == 0
    new = fl.SparsePattern(old.indices, old.shape)
    for place.pattern in (old, new if first else old, old, old if first else new):
        found.append(fl.lstsq(place.matrix(place.values), place.b, solver=fl.Direct()))
    indices = place.pattern.indices.clone()
    if not first:  # columns in another order, on the later ranks alone
        indices[1] = place.A.shape[1] - 1 - indices[1]
    place.pattern = fl.SparsePattern(indices, place.pattern.shape)
    if not place.alone:
        found.append(fl.lstsq(place.matrix(place.values), place.b, solver=fl.Direct()))
        want = fl.lstsq(place.matrix(place.values), place.b, solver=fl.Dense())
        assert torch.allclose(found.pop(), want, rtol=1e-10)
    return {"same": found}


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


def full_rows(m=60, n=20):
    """Sparse rows, with two that are full far from each other."""
    pattern, _, b = problem(m, n, seed=4, density=0.06)
    full = torch.zeros(m, n, dtype=torch.bool)
    full[tuple(pattern.indices)] = True
    full[torch.tensor([7, m - 2])] = True
    return {"given": (fl.SparsePattern(full.nonzero().T, (m, n)), normal(int(full.sum()), seed=5), b), "m": m, "n": n}


def grid(side, least):
    """Differences of the points of a square, and each of them times `least`: the rows of one sort after the other."""
    n = side * side
    i = torch.arange(n).view(side, side)
    of_pairs = ((i[:, :-1], i[:, 1:]), (i[:-1], i[1:]))
    ends = torch.cat([torch.stack([one.reshape(-1), other.reshape(-1)]) for one, other in of_pairs], 1)
    k = ends.shape[1]
    rows = torch.cat([torch.arange(k), torch.arange(k), k + torch.arange(n)])
    weight = 0.5 + normal(k, seed=6).abs()
    values = torch.cat([-weight, weight, torch.full((n,), least)])
    pattern = fl.SparsePattern(torch.stack([rows, torch.cat([*ends, torch.arange(n)])]), (k + n, n))
    return {"given": (pattern, values, normal(k + n, seed=3)), "m": k + n, "n": n}


def apart(m=40, n=8):
    """The first half of the rows has entries in the first half of the columns only, the second half in the others."""
    pattern, values, b = problem(m, n, seed=2)
    early = pattern.indices[0] < m // 2
    kept = early == (pattern.indices[1] < n // 2)
    return {"given": (fl.SparsePattern(pattern.indices[:, kept], (m, n)), values[kept], b)}


def without_full_rank(m=40):
    """Dummies of two kinds, of which one is always too many."""
    rows = torch.arange(m)
    indices = torch.stack([rows.repeat(2), torch.cat([rows % 3, 3 + rows % 5])])
    return {"given": (fl.SparsePattern(indices, (m, 8)), torch.ones(2 * m), normal(m, seed=3)), "m": m}


def of_singular_values(s, m):
    D, pattern = with_singular_values(torch.tensor(s, dtype=torch.float64), m)
    return {"given": (pattern, D.reshape(-1), normal(m, seed=3)), "m": m, "n": len(s)}


CASES = {  # name: (case, what the problem is)
    **{f"solve, {name}": (partial(solution, solver=name), {}) for name in SOLVERS},
    "solve, extended": (partial(solution, solver="dense", refine="extended"), {}),
    **{
        f"gradient, {solver}, {damp} damp": (partial(gradient, solver=solver, damp=damp), {})
        for solver in ("dense", "direct", "cgls")
        for damp in ("one", "each")
    },
    "weighted columns": (weighted_columns, {}),
    "DTensors": (of_dtensors, {}),
    "vmap over b": (vmap_over_b, {}),
    "vmap over values": (vmap_over_values, {}),
    "jvp": (tangent, {}),
    "jacrev by values and b": (jacobian_by_values, {}),
    "second derivatives by all": (second_along_a_direction, {}),
    "hessians": (hessians, {}),
    "third derivative": (third, {}),
    "autograd": (autograd, {}),
    "products": (products, {}),
    **{
        f"operator, {name}": (partial(case, **given), {"by_products": True})
        for name, case, given in [
            ("solve", solution, {"solver": "cgls"}),
            ("gradient, one damp", gradient, {"solver": "cgls", "damp": "one"}),
            ("gradient, each damp", gradient, {"solver": "cgls", "damp": "each"}),
            ("weighted columns", weighted_columns, {}),
            ("vmap over b", vmap_over_b, {"solver": CGLS}),
            ("vmap over values", vmap_over_values, {"solver": CGLS}),
            ("jvp", tangent, {"solver": CGLS}),
            ("jacrev by values and b", jacobian_by_values, {"solver": CGLS}),
            ("second derivatives by all", second_along_a_direction, {"solver": "cgls"}),
            ("hessians", hessians, {"solver": "cgls"}),
            ("products", products, {}),
        ]
    },
    **{
        f"Direct, {name}": (partial(case, **{"solver": fl.Direct()} | given), options)
        for name, case, given, options in [
            ("vmap over b", vmap_over_b, {}, {}),
            ("vmap over values", vmap_over_values, {}, {}),
            ("jvp", tangent, {}, {}),
            ("jacrev by values and b", jacobian_by_values, {}, {}),
            ("second derivatives by all", second_along_a_direction, {"solver": "direct"}, {}),
            ("hessians", hessians, {"solver": "direct"}, {}),
            ("complex128", of_dtype, {}, {"dtype": torch.complex128}),
            ("float32", of_dtype, {}, {"dtype": torch.float32}),
            ("no common pattern", of_dtype, {}, apart()),
            ("ill-conditioned", of_dtype, {}, of_singular_values([1.0, 0.5, 1e-3, 1e-8], 30)),
            ("wide with damp", wide, {}, {"m": 6, "n": 8}),
            ("whole graphs", compiled, {"solver": "direct"}, {}),
            ("bounds", bounded, {}, {}),
            ("factors that are kept", kept, {}, {}),
            ("constraints", constrained, {}, {}),
            ("pinned unknowns", with_pinned, {"solver": "direct"}, {}),
            ("least norm", of_least_norm, {}, without_full_rank()),
            ("least norm, wide", of_least_norm, {}, {"m": 6, "n": 8}),
        ]
    },
    "Direct, full rows": (with_full_rows, full_rows()),
    "Direct, new patterns": (on_new_patterns, {}),
    "Direct, without memory": (without_memory, {}),
    "operator, complex128": (of_dtype, {"by_products": True, "dtype": torch.complex128}),
    "operator, float32": (of_dtype, {"by_products": True, "dtype": torch.float32}),
    "operator, shared parameters": (of_shared_parameters, {}),
    "operator, trees": (of_trees, {}),
    "complex128": (of_dtype, {"dtype": torch.complex128}),
    "float32": (of_dtype, {"dtype": torch.float32}),
    "float32, of the residual": (of_a_small_residual, {"dtype": torch.float32}),
    "ill-conditioned gradient": (ill_conditioned_gradient, of_singular_values([1.0, 0.3, 1e-3, 1e-5], 40)),
    "wide with damp": (wide, {"m": 6, "n": 8}),
    "whole graphs": (compiled, {}),
    "fit": (fitted, {}),
    "bounds": (bounded, {}),
    "factors that are kept": (kept, {}),
    "leverage and covariance": (studied, {}),
    "leverage, ill-conditioned": (ill_conditioned_leverage, of_singular_values([1.0, 0.3, 1e-3, 1e-5], 40)),
    "bounds, wide": (bounded, {"m": 6, "n": 8}),
    "constraints": (constrained, {}),
    "pinned unknowns": (with_pinned, {}),
    "least norm": (of_least_norm, without_full_rank()),
    "least norm, wide": (of_least_norm, {"m": 6, "n": 8}),
    "least norm, operator": (partial(of_least_norm, weighted=False), {**without_full_rank(), "by_products": True}),
    "stopped": (stopped, {}),
    "stopped operator": (stopped, {"by_products": True}),
    "ill-conditioned": (ill_conditioned, of_singular_values([1.0, 0.5, 1e-3, 1e-8], 30)),
    "many columns": (partial(many_columns, method="dense-cholesky"), {"m": 1500, "n": 520, "density": 0.01}),
    "many columns, ill-conditioned": (partial(many_columns, method="direct"), grid(30, 1e-6)),
    "large numbers": (large_numbers, {}),
}


def start(rank, size, folder, seconds):
    """Make this process a rank, on the loopback device, by a file in a folder."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = datetime.timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=size, timeout=timeout)


def work(rank, size, folder, split, module=__name__):
    """All cases of a module on a split, and on two ranks what is refused; what came out is left in the folder."""
    start(rank, size, folder, 120)
    found, of = {}, importlib.import_module(module)
    for name, (case, options) in of.CASES.items():
        try:
            found[name] = case(Place(split, **options))
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            found[name] = repr(error)
    for name, refused in of.refusals(rank).items() if size == 2 else ():
        try:
            refused()
            found[name] = "nothing", ""
        except (RuntimeError, TypeError, ValueError) as error:
            found[name] = type(error).__name__, str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


class Own(fl.solvers.Solver):
    """A solver that knows nothing of ranks."""


def on_rank_1(rank, where, name, other, call):
    """`call()`, for which rank 1 alone has another function of that name."""
    before = getattr(where, name)
    if rank == 1:
        setattr(where, name, other)
    try:
        return call()
    finally:
        setattr(where, name, before)


def out_of_memory(*_):
    raise MemoryError("of this rank alone")


def of_rank(rank, one, other):
    return one if rank == 1 else other


def refusals(rank):
    """{name: what is refused} of this rank of two; what differs, does so on rank 1."""
    place = Place("even")
    A, b, m = place.A, place.b, len(place.b)
    bad = torch.where(torch.arange(m) == 3, torch.nan, b)
    short = fl.SparseMatrix(torch.ones(1), fl.SparsePattern(torch.zeros(2, 1, dtype=torch.int64), (1, 7)))
    twice = torch.arange(2 * m)
    twice = fl.SparseMatrix(torch.ones(2 * m), fl.SparsePattern(torch.stack([twice // 2, twice % 2]), (m, 2)))
    deficient = fl.distributed.shard_rows(twice)
    differ, by_products = partial(of_rank, rank), Place("even", by_products=True).A
    calls = []

    def in_graph(A, b, weights=None):
        return fl.lstsq(A, b, weights=weights)

    graph = torch.compile(in_graph, fullgraph=True, backend="eager")

    def failing(A, x):
        calls.append(x)
        if len(calls) > 2:
            raise RuntimeError("of this rank alone")
        return A.matmul(x)

    def bent(A, x):
        return A.matmul(x) + 0.1 * A.matmul(x).square()

    def by_factor():
        return fl.lstsq(A, b, solver=fl.Direct())

    def operator(matvec, factor=1.0, rmatvec=None):
        rows = fl.SparseMatrix(place.values * factor, place.pattern)
        return fl.distributed.shard_rows(fl.LinearOperator(matvec, rows, 8, rmatvec=rmatvec))

    return {
        "NaN in b": lambda: fl.lstsq(A, differ(bad, b)),
        "NaN in b, within grad": lambda: grad(lambda b: fl.lstsq(A, b).sum())(differ(bad, b)),
        "b of another dtype, within vmap": lambda: torch.vmap(lambda b: fl.lstsq(A, b))(
            differ(b.to(torch.complex128), b)[None]
        ),
        "NaN in A": lambda: fl.lstsq(place.matrix(place.values * differ(torch.nan, 1.0)), b),
        "b of another size": lambda: fl.lstsq(A, differ(b[1:], b)),
        "b of another dtype": lambda: fl.lstsq(A, differ(b.to(torch.complex128), b)),
        "b of more columns": lambda: fl.lstsq(A, differ(b[:, None].expand(-1, 2), b)),
        "negative weights": lambda: fl.lstsq(A, b, weights=differ(-place.weights, place.weights)),
        "infinite weights": lambda: fl.lstsq(A, b, weights=place.weights + differ(torch.inf, 0.0)),
        "dependent constraints": lambda: fl.lstsq(
            deficient, b, damp=1.0, weights=torch.where(torch.arange(m) == 3, torch.inf, place.weights)
        ),
        "weights on one rank": lambda: fl.lstsq(A, b, weights=differ(place.weights, None)),
        "another n": lambda: fl.distributed.shard_rows(differ(short, A.rows)),
        "another dtype of A": lambda: fl.distributed.shard_rows(differ(A.rows.to(torch.float32), A.rows)),
        "no matrix": lambda: fl.distributed.shard_rows(differ(b, A.rows)),
        "another solver": lambda: fl.lstsq(A, b, solver=differ(fl.CGLS(), fl.Dense())),
        "another damp": lambda: fl.lstsq(A, b, damp=differ(0.1, 0.2)),
        "another x0": lambda: fl.lstsq(A, b, x0=normal(8, seed=rank)),
        "x that is not shared": lambda: grad(lambda A: place.total((fl.lstsq(A, b).sum() * b).sum()))(A),
        "NaN from a loss": lambda: grad(
            lambda A: place.total((place.shared(fl.lstsq(A, b)).sum() * differ(bad, b)).sum())
        )(A),
        "bounds of an operator": lambda: fl.lstsq(by_products, b, bounds=(0, 1)),
        "other bounds": lambda: fl.lstsq(A, b, bounds=(0, differ(1, 2))),
        "bounds that are none": lambda: fl.lstsq(A, b, bounds=(0, differ("one", 2))),
        "bounds that are touched": lambda: grad(lambda b: place.total(fl.solve(A, b, bounds=(0, 1)).residual.sum()))(
            0 * b
        ),
        "robust": lambda: fl.lstsq(A, b, robust=fl.Huber()),
        "Direct of an operator": lambda: fl.lstsq(by_products, b, solver=fl.Direct()),
        "a solver of one's own": lambda: fl.lstsq(A, b, solver=Own()),
        "no memory for a factor": lambda: on_rank_1(rank, direct, "available_bytes", lambda: 10, by_factor),
        "no memory for the union": lambda: on_rank_1(rank, places, "available_bytes", lambda: 10, by_factor),
        "no memory for A^H A": lambda: on_rank_1(rank, GramPattern, "values", out_of_memory, by_factor),
        "a preconditioner": lambda: fl.lstsq(A, b, solver=fl.CGLS(preconditioner=lambda g: g)),
        "a callback": lambda: fl.lstsq(A, b, solver=fl.CGLS(callback=print)),
        "factors of an operator": lambda: fl.factorize(by_products),
        "leverage of an operator": lambda: fl.leverage(by_products),
        "a sandwich": lambda: fl.covariance(A, [0], b=b, kind="HC1"),
        "NaN in a graph": lambda: graph(A, differ(bad, b)),
        "negative weights in a graph": lambda: graph(A, b, differ(-1.0, 1.0) * place.weights),
        "another dtype in a graph": lambda: graph(place.matrix(A.values.float()), differ(b.float(), b)),
        "a residual that is none": lambda: fl.distributed.gauss_newton(differ(None, torch.sin), torch.ones(2)),
        "a fit of NaN": lambda: fl.distributed.gauss_newton(lambda x: (x[0] - differ(torch.nan, b)) * b, torch.ones(1)),
        "a fit without a minimum": lambda: fl.distributed.gauss_newton(lambda x: torch.exp(x[0]) * b, torch.ones(1)),
        "a fit of too few": lambda: fl.distributed.gauss_newton(lambda x: x[: 1 - rank], torch.ones(3)),
        "another start": lambda: fl.distributed.gauss_newton(lambda x: x[0] - b, differ(1.0, 0.0) * torch.ones(1)),
        "samples": lambda: fl.leverage(A, samples=3),
        "other columns": lambda: fl.covariance(A, differ([0], [1])),
        "columns that are none": lambda: fl.covariance(A, differ([9], [1])),
        "wide": lambda: fl.lstsq(Place("even", m=6).A, b[:3]),
        "an operator and entries": lambda: fl.distributed.shard_rows(differ(by_products.rows, A.rows)),
        "a matvec that fails": lambda: fl.lstsq(operator(differ(failing, multiplied)), b),
        "a matvec that is not linear": lambda: fl.lstsq(operator(differ(bent, multiplied)), b),
        "an rmatvec of another matrix": lambda: fl.lstsq(
            operator(multiplied, rmatvec=lambda A, y: A.H.matmul(y) * differ(1.5, 1.0)), b
        ),
        "NaN in params": lambda: fl.lstsq(operator(multiplied, differ(torch.nan, 1.0)), b),
        "Dense of an operator": lambda: fl.lstsq(by_products, b, solver=fl.Dense()),
        "infinite weights of an operator": lambda: fl.lstsq(
            by_products, b, weights=place.weights + differ(torch.inf, 0.0)
        ),
        "no full rank": lambda: fl.lstsq(deficient, b),
        "no full rank by CGLS": lambda: fl.lstsq(deficient, b, solver=fl.CGLS()),
        "a total of integers": lambda: fl.distributed.total(torch.ones(2, dtype=torch.int64)),
        "no group": lambda: fl.distributed.shard_rows(A.rows, "all"),
    }


def work_until_lost(rank, size, folder, how):
    """Rank 1 dies or sleeps in the middle of a solve of rank 0, whose group waits two seconds.

    What is told, and how long after the last sum began, is left in the folder.
    """
    start(rank, size, folder, 2)
    place, calls = Place("even", m=1500, n=520, density=0.01), 0
    whole, begun = fl.distributed.ranks.Ranks.sum, time.monotonic()

    def lost(ranks, t):
        nonlocal calls, begun
        calls, begun = calls + 1, time.monotonic()
        if rank == 1 and calls == 30:
            if how == "dies":
                os._exit(1)
            if how == "raises":
                raise ValueError("of this rank alone")
            time.sleep(6)
        return whole(ranks, t)

    fl.distributed.ranks.Ranks.sum = lost
    try:
        fl.lstsq(place.A, place.b, solver=CGLS)
        told = "nothing"
    except fl.distributed.RankError as error:
        told = str(error)
    torch.save((told, time.monotonic() - begun), f"{folder}/{rank}.pt")
    threading.Timer(0.1, os._exit, [0]).start()
