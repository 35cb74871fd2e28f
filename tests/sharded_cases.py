"""What tests/test_distributed.py asks of one process and of several ranks, and what two refuse; see sharded.py."""

from functools import partial

import torch
from helpers import normal
from sharded import CGLS, SOLVERS, Place, multiplied, of_rank, on_rank_1
from sharded_derivatives import (
    autograd,
    compiled,
    gradient,
    hessians,
    ill_conditioned_gradient,
    jacobian_by_values,
    of_a_small_residual,
    of_dtensors,
    of_dtype,
    products,
    second_along_a_direction,
    solution,
    tangent,
    third,
    vmap_over_b,
    vmap_over_values,
    weighted_columns,
    wide,
)
from sharded_factors import ill_conditioned, kept, many_columns, on_new_patterns, with_full_rows, without_memory
from sharded_options import (
    bounded,
    constrained,
    fitted,
    ill_conditioned_leverage,
    large_numbers,
    of_least_norm,
    of_shared_parameters,
    of_trees,
    stopped,
    studied,
    with_pinned,
)
from sharded_problems import apart, full_rows, grid, of_singular_values, without_full_rank
from torch.func import grad

import functional_lstsq as fl
from functional_lstsq.distributed import places
from functional_lstsq.solvers import direct
from functional_lstsq.sparse.gram_pattern import GramPattern

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
    "many columns": (
        partial(many_columns, method="dense-cholesky", solver=fl.Auto(factor=True)),
        {"m": 1500, "n": 520, "density": 0.01},
    ),
    "many columns, ill-conditioned": (partial(many_columns, method="direct"), grid(30, 1e-6)),
    "large numbers": (large_numbers, {}),
}


class Own(fl.solvers.Solver):
    """A solver that knows nothing of ranks."""


def out_of_memory(*_):
    raise MemoryError("of this rank alone")


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
