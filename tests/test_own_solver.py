"""A method of the user's own, by what `functional_lstsq.solvers` says of `Solver`, `Factors` and `Factored`."""

from dataclasses import dataclass

import pytest
import torch
from helpers import close, problem, with_singular_values
from torch.func import grad, jacrev, jvp, vmap

import functional_lstsq as fl
from functional_lstsq.result import method_code
from functional_lstsq.solvers import Factored, Factors, Solver


@dataclass(frozen=True)
class ByInverse(Solver):
    """(A^H A + d^2)^-1 in single precision, and refinement around it."""

    accept: float | None = None

    def prepare(self, system, *, minimum_norm):
        gram = system.A.gram()
        if system.d2 is not None:
            gram.diagonal(dim1=1, dim2=2).add_(system.d2[:, :, 0])
        factors = Inverse(system, minimum_norm, self.threshold(system.precision))
        factors.values = torch.linalg.eigvalsh(gram)
        factors.inverse = torch.linalg.inv(gram.to(torch.complex64 if gram.is_complex() else torch.float32))
        factors.largest = factors.values[:, -1:].sqrt()
        factors.smallest = factors.values[:, :1].clamp_min(1e-30).sqrt()
        factors.rank = torch.full_like(factors.largest, system.n)
        factors.method = torch.full_like(factors.largest, method_code("inverse"))
        return factors


class Inverse(Factored):
    def apply(self, g):
        return (self.inverse @ g.to(self.inverse.dtype)).to(g.dtype)


def solve(solver, **options):
    return lambda A, b: fl.lstsq(A, b, solver=solver, **options)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)], ids=["tall", "wide"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_a_factor_of_the_users_own_has_every_derivative(shape, dtype):
    pattern, values, b = problem(*shape, dtype=dtype)
    own, ours = solve(ByInverse()), solve(None)

    def of(f, values, b):
        return f(fl.SparseMatrix(values, pattern), b)

    close(of(own, values, b), of(ours, values, b), 1e-12)
    for which in (0, 1):
        if not dtype.is_complex:
            close(jacrev(of, which + 1)(own, values, b), jacrev(of, which + 1)(ours, values, b), 1e-10)
    u = torch.ones_like(values)
    close(*(jvp(lambda v, f=f: of(f, v, b), (values,), (u,))[1] for f in (own, ours)), 1e-10)
    columns = torch.stack([b, 2 * b, b.flip(0)])
    close(*(vmap(lambda b, f=f: of(f, values, b))(columns) for f in (own, ours)), 1e-12)


def test_options_reach_it():
    pattern, values, b = problem(9, 4)
    A, weights = fl.SparseMatrix(values, pattern), torch.linspace(0.5, 2, 9, dtype=torch.float64)
    want = fl.lstsq(A, b, damp=0.3, weights=weights)
    for x0 in (None, want + 1):
        solution = fl.solve(A, b, damp=0.3, weights=weights, x0=x0, solver=ByInverse())
        close(solution.x, want, 1e-12)
        assert solution.info.method == "inverse"


def test_what_it_cannot_do_is_refused():
    poor, pattern = with_singular_values([1.0, 1e-3, 1e-7], 6)
    A, b = fl.SparseMatrix(poor.reshape(-1), pattern), torch.ones(6, dtype=torch.float64)
    with pytest.raises(fl.ConvergenceError, match="method inverse"):
        fl.lstsq(A, b, solver=ByInverse())
    loss = lambda b: fl.lstsq(A, b, solver=ByInverse()).sum()  # noqa: E731
    with pytest.raises(fl.ConvergenceError, match="method inverse"):
        grad(loss)(b)


def test_the_threshold_is_that_of_the_method_that_answers():
    poor, pattern = with_singular_values([1.0, 1e-3, 1e-4], 60)
    A, b = fl.SparseMatrix(poor.reshape(-1), pattern), torch.linspace(-1, 1, 60, dtype=torch.float64)
    assert fl.CGLS(tolerance=1e-3).threshold(2.0**-52) == 1e-2
    assert fl.Auto(cgls=fl.CGLS(tolerance=1e-3)).threshold(2.0**-52) == pytest.approx(2.0 ** (-52 / 3))
    close(fl.lstsq(A, b, solver=fl.Auto(dense_columns=1, cgls=fl.CGLS(tolerance=1e-3))), fl.lstsq(A, b), 1e-2)


def test_what_is_no_factors_is_refused():
    @dataclass(frozen=True)
    class Nothing(Solver):
        def prepare(self, system, *, minimum_norm):
            return object()

    pattern, values, b = problem(5, 3)
    with pytest.raises(TypeError, match=r"Nothing\.prepare must give Factors"):
        fl.lstsq(fl.SparseMatrix(values, pattern), b, solver=Nothing())
    with pytest.raises(TypeError, match="solver must be None or a Solver"):
        fl.lstsq(fl.SparseMatrix(values, pattern), b, solver=object())
    assert Factors().dependent(0) == []
