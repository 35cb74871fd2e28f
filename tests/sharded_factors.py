"""Cases over ranks of what factors are chosen, kept and left alone; see sharded.py."""

import torch
import torch.distributed as dist
from sharded import CGLS, on_rank_1
from sharded_derivatives import gradient, of_dtype
from torch.func import grad

import functional_lstsq as fl
from functional_lstsq.distributed.products import RowsOverRanks
from functional_lstsq.solvers import direct, sparse_factor
from functional_lstsq.solvers.direct import analyse
from functional_lstsq.solvers.system import EPS, System
from functional_lstsq.sparse.plain_products import Operator


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


def ill_conditioned(place):
    found = fl.solve(place.A, place.b, solver=fl.Dense())
    assert found.info.method == "dense-qr"
    return {"same": [found.x], "rows": [found.residual]}


def many_columns(place, method, tried="", solver=None):
    """More than the 500 up to which A^H A is factored without a thought of its cost."""
    found = fl.solve(place.A, place.b, solver=solver)
    assert found.info.method.startswith(method), found.info.tried
    assert tried in found.info.tried, found.info.tried
    by_A, by_b = grad(lambda A, b: fl.lstsq(A, b, solver=solver).sin().sum(), (0, 1))(place.A, place.b)
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
