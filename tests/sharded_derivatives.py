"""Cases over ranks of plain solves, and of their derivatives and batches; see sharded.py."""

from functools import partial

import torch
import torch.distributed as dist
from helpers import normal
from sharded import CGLS, SOLVERS
from torch.func import grad, hessian, jacfwd, jacrev, jvp

import functional_lstsq as fl


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
