"""vmap anywhere, pytrees, and what a derivative costs."""

from dataclasses import dataclass, field

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from helpers import SOLVERS, close, problem, through_pinv
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import functional_lstsq as fl
from functional_lstsq.solvers import Factors, Solver

SHAPES = [(6, 3), (3, 6)]


@pytest.fixture(params=SOLVERS)
def solver(request):
    return SOLVERS[request.param]


@pytest.fixture(params=SHAPES, ids=str)
def functions(request, solver):
    """(ours, reference, values, b, batch of values, batch of b)"""
    pattern, values, b = problem(*request.param)
    generator = torch.Generator().manual_seed(3)
    many_values = values + 0.3 * torch.randn(4, len(values), generator=generator, dtype=torch.float64)
    many_b = torch.randn(4, len(b), generator=generator, dtype=torch.float64)

    def ours(values, b):
        return fl.lstsq(fl.SparseMatrix(values, pattern), b, solver=solver)

    return ours, lambda v, b: through_pinv(v, pattern, b), values, b, many_values, many_b


def test_vmap_over_each_argument(functions):
    ours, want, values, b, V, B = functions
    close(vmap(ours, (None, 0))(values, B), vmap(want, (None, 0))(values, B))
    close(vmap(ours, (0, None))(V, b), vmap(want, (0, None))(V, b))
    close(vmap(ours)(V, B), vmap(want)(V, B))
    columns = torch.stack([B, B + 1], 2)
    close(vmap(ours, (None, 0))(values, columns), vmap(want, (None, 0))(values, columns))
    close(vmap(ours)(V, columns), vmap(want)(V, columns))


def test_vmap_dimensions_and_nesting(functions):
    ours, want, _, b, V, B = functions
    close(vmap(ours, (1, 1), 1)(V.T, B.T), vmap(want)(V, B).T)
    close(vmap(ours, (-1, None), -1)(V.T, b), vmap(want, (0, None))(V, b).T)
    close(vmap(vmap(ours, (None, 0)), (0, None))(V, B), vmap(vmap(want, (None, 0)), (0, None))(V, B))
    close(vmap(vmap(ours, (0, None)), (None, 0))(V, B), vmap(vmap(want, (0, None)), (None, 0))(V, B))
    close(vmap(ours, chunk_size=3)(V, B), vmap(want)(V, B))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: grad(f, (0, 1)),
        lambda f: jacfwd(f, (0, 1)),
        lambda f: hessian(f, 0),
        lambda f: jacfwd(jacfwd(f, 0), 1),
        lambda f: jacrev(jacrev(f, 1), 0),
        lambda f: jacrev(jacfwd(f, 0), 0),
    ],
    ids=["grad", "jacfwd", "hessian", "jacfwd-jacfwd", "jacrev-jacrev", "jacrev-jacfwd"],
)
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)], ids=["both", "values", "b"])
def test_vmap_over_derivatives(functions, transform, in_dims):
    ours, want, values, b, V, B = functions
    got, expected = (transform(lambda v, b, f=f: f(v, b).sin().sum()) for f in (ours, want))
    inputs = V if in_dims[0] == 0 else values, B if in_dims[1] == 0 else b
    results = vmap(got, in_dims)(*inputs), vmap(expected, in_dims)(*inputs)
    for a, c in zip(*(torch_pytree.tree_leaves(result) for result in results), strict=True):
        close(a, c)


@pytest.mark.parametrize("transform", [grad, jacfwd, jacrev, hessian], ids=["grad", "jacfwd", "jacrev", "hessian"])
def test_derivatives_of_vmap(functions, transform):
    ours, want, _, _, V, B = functions
    got = transform(lambda V: vmap(ours)(V, B).sin().sum())(V)
    close(got, transform(lambda V: vmap(want)(V, B).sin().sum())(V))


def test_jacrev_in_chunks(functions):
    ours, want, values, b, _, _ = functions
    close(jacrev(ours, chunk_size=2)(values, b), jacrev(want)(values, b))


def test_vmap_over_damp_and_weights(solver):
    pattern, values, b = problem(6, 3)
    damps = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    weights = torch.linspace(0.1, 1.1, 18, dtype=torch.float64).view(3, 6)

    def ours(damp, weights):
        return fl.lstsq(fl.SparseMatrix(values, pattern), b, damp=damp, weights=weights, solver=solver)

    together = vmap(ours)(damps, weights)
    close(together, torch.stack([ours(d, w) for d, w in zip(damps, weights, strict=True)]))


def test_grad_of_a_sparse_matrix_is_one():
    pattern, values, b = problem(6, 3)
    A = fl.SparseMatrix(values, pattern)
    gradient = grad(lambda A: fl.lstsq(A, b).sum())(A)
    assert isinstance(gradient, fl.SparseMatrix)
    assert gradient.pattern is pattern
    batch = vmap(grad(lambda A, b: fl.lstsq(A, b).sum()), (None, 0))(A, torch.stack([b, 2 * b]))
    assert batch.values.shape == (2, A.nnz)
    with pytest.raises(ValueError, match=r"torch\.vmap"):
        fl.lstsq(batch, b)


def test_solution_and_info_pass_through_transformations(solver):
    pattern, values, b = problem(6, 3)

    def loss(A, b):
        solution = fl.solve(A, b, solver=solver)
        return solution.x.sum(), solution

    A = fl.SparseMatrix(values, pattern)
    gradient, solution = grad(loss, has_aux=True)(A, b)
    assert solution.info.status == "converged"
    assert gradient.values.shape == values.shape
    close(solution.residual, b - A.to_dense() @ solution.x)
    assert {number.shape for number in solution.info} == {()}
    B = torch.stack([b, b + 1, b + 2])
    _, solutions = vmap(grad(loss, has_aux=True), (None, 0))(A, B)
    assert solutions.info.forward_error.shape == (3,)
    assert solutions.info.status == "converged"
    assert fl.solve(A, B.T, solver=solver).info.iterations.shape == (3,)


@pytest.mark.parametrize("tree_map", [torch_pytree.tree_map, optree.tree_map], ids=["torch", "optree"])
def test_tree_map(tree_map):
    pattern, values, b = problem(6, 3)
    A = fl.SparseMatrix(values, pattern)
    doubled = tree_map(lambda x: 2 * x, {"A": A, "b": b})
    assert torch.equal(doubled["A"].values, 2 * values)
    assert doubled["A"].pattern is pattern
    assert tree_map(lambda x: None, A).values is None


def test_leaves_and_paths():
    pattern, values, b = problem(6, 3)
    A = fl.SparseMatrix(values, pattern)
    leaves, spec = optree.tree_flatten(fl.solve(A, b))
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    assert isinstance(optree.tree_unflatten(spec, leaves), fl.Solution)
    assert optree.tree_paths(A) == [("values",)]
    same = fl.SparseMatrix(values, fl.SparsePattern(pattern.indices, pattern.shape))
    assert torch_pytree.tree_structure(same) == torch_pytree.tree_structure(A)


@dataclass(frozen=True, eq=False)
class Counting(Solver):
    """A solver that counts what is asked of it."""

    counts: dict = field(default_factory=lambda: {"prepare": 0, "solve": 0, "columns": 0})

    def prepare(self, system, *, minimum_norm):
        self.counts["prepare"] += 1
        return Counted(fl.Dense().prepare(system, minimum_norm=minimum_norm), self.counts)

    def spent(self):
        spent = tuple(self.counts.values())
        self.counts.update(prepare=0, solve=0, columns=0)
        return spent


class Counted(Factors):
    def __init__(self, factors, counts):
        self.factors, self.counts, self.accept = factors, counts, factors.accept

    def solve(self, b, c, start=None, *, judged=True):
        self.counts["solve"] += 1
        self.counts["columns"] += b.shape[0] * b.shape[2]
        return self.factors.solve(b, c, start, judged=judged)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_derivative_costs_one_further_solve_and_no_factor(shape):
    pattern, values, b = problem(*shape)
    n, solver = shape[1], Counting()

    def f(values, b):
        return fl.lstsq(fl.SparseMatrix(values, pattern), b, solver=solver)

    f(values, b)
    assert solver.spent() == (1, 1, 1)
    torch.func.vjp(f, values, b)[1](torch.ones(n, dtype=torch.float64))
    assert solver.spent() == (1, 2, 2)
    torch.func.jvp(f, (values, b), (values, b))
    assert solver.spent() == (1, 2, 2)
    jacrev(f, (0, 1))(values, b)
    assert solver.spent() == (1, 2, 1 + n)
    jacfwd(f, 0)(values, b)
    assert solver.spent() == (1, 2, 1 + len(values))
    jacfwd(f, 1)(values, b)
    assert solver.spent() == (1, 2, 1 + len(b))
    vmap(f, (None, 0))(values, torch.stack([b] * 7))
    assert solver.spent() == (1, 1, 7)
    vmap(f, (0, None))(torch.stack([values] * 7), b)
    assert solver.spent() == (1, 1, 7)
    vmap(grad(lambda v, b: f(v, b).sum()), (0, None))(torch.stack([values] * 7), b)
    assert solver.spent() == (1, 2, 14)
    hessian(lambda v: f(v, b).sum())(values)
    assert solver.spent()[0] == 1


def test_factors_are_not_taken_for_changed_values():
    pattern, values, b = problem(6, 3)
    values.requires_grad_()
    solver = Counting()
    x = fl.lstsq(fl.SparseMatrix(values, pattern), b, solver=solver)
    with torch.no_grad():
        values.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_factors_die_with_their_graph():
    from functional_lstsq.linear.factor_cache import Holder

    pattern, values, b = problem(6, 3)
    before = len(Holder.living)
    x = fl.lstsq(fl.SparseMatrix(values.requires_grad_(), pattern), b)
    assert len(Holder.living) == before + 1
    del x
    with torch.no_grad():
        y = fl.lstsq(fl.SparseMatrix(values, pattern), b)
    assert len(Holder.living) == before
    assert y.isfinite().all()


def test_autocast_leaves_a_solve_in_its_own_precision():
    pattern, values, b = problem(6, 3, dtype=torch.float32)
    A = fl.SparseMatrix(values, pattern)
    want = fl.solve(A, b, weights=torch.ones(6)), A @ torch.ones(3)
    with torch.autocast("cpu", torch.bfloat16):
        got = fl.solve(A, b, weights=torch.ones(6)), A @ torch.ones(3)
        gradient = grad(lambda A: fl.lstsq(A, b).sum())(A)
    assert torch.equal(got[0].residual, want[0].residual)
    assert torch.equal(got[1], want[1])
    close(gradient.values, grad(lambda A: fl.lstsq(A, b).sum())(A).values)
