"""Factors that a user keeps: the same numbers as without them, made once, for as long as they are kept."""

import copy
import gc
import pickle
import weakref
from collections import Counter

import pytest
import torch

import functional_lstsq as fl
from functional_lstsq.linear.factor_cache import Holder
from functional_lstsq.solvers.small import Small

torch.manual_seed(0)
DOUBLE = torch.float64


def problem(m=40, n=12, dtype=DOUBLE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(m, n, generator=generator) < 0.4
    mask[torch.arange(min(m, n)), torch.arange(min(m, n))] = True
    pattern = fl.SparsePattern(mask.nonzero().T, (m, n))
    values = torch.randn(pattern.nnz, dtype=dtype, generator=generator)
    return fl.SparseMatrix(values, pattern), torch.randn(m, dtype=dtype, generator=generator)


@pytest.fixture
def prepared(monkeypatch):
    """How often a method factored, appended to for each time."""
    made = []
    for kind in (fl.Dense, fl.Direct):
        before = kind.prepare

        def prepare(self, system, *, minimum_norm, before=before, kind=kind):
            made.append(kind.__name__)
            return before(self, system, minimum_norm=minimum_norm)

        monkeypatch.setattr(kind, "prepare", prepare)
    of = Small.of
    monkeypatch.setattr(Small, "of", lambda *given: made.append("Small") or of(*given))
    return made


def weights_of(m):
    return torch.rand(m, dtype=DOUBLE, generator=torch.Generator().manual_seed(3)) + 0.5


CASES = {
    "tall": ((40, 12, DOUBLE), {}),
    "float32": ((40, 12, torch.float32), {}),
    "complex": ((40, 12, torch.complex128), {}),
    "direct": ((40, 12, DOUBLE), {"solver": fl.Direct()}),
    "damped": ((40, 12, DOUBLE), {"damp": 0.3}),
    "damped each": ((12, 40, DOUBLE), {"damp": torch.linspace(0.1, 1, 40, dtype=DOUBLE)}),
    "weighted": ((40, 12, DOUBLE), {"weights": weights_of(40)}),
    "wide": ((12, 40, DOUBLE), {}),
    "wide, weighted": ((12, 40, DOUBLE), {"weights": weights_of(12)}),
    "least norm": ((12, 40, DOUBLE), {"rank_deficient": "minimum_norm"}),
    "tolerance": ((40, 12, DOUBLE), {"rank_deficient": "minimum_norm", "rank_tolerance": 1e-7}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_stands_where_A_stands(case):
    (m, n, dtype), options = CASES[case]
    A, b = problem(m, n, dtype)
    F = fl.factorize(A, **options)
    got, want = fl.solve(F, b), fl.solve(A, b, **options)
    assert torch.equal(got.x, want.x)
    assert torch.equal(got.residual, want.residual)
    assert F.info.status == "converged"
    assert (F.shape, F.dtype, F.device) == (A.shape, A.dtype, A.device)


@pytest.mark.parametrize("case", CASES)
def test_it_is_factored_once(case, prepared):
    (m, n, dtype), options = CASES[case]
    A, b = problem(m, n, dtype)
    F = fl.factorize(A, **options)
    for _ in range(3):
        b = b + F @ fl.lstsq(F, b)
    torch.func.vmap(lambda b: fl.lstsq(F, b))(torch.stack([b, 2 * b]))
    torch.func.vjp(lambda b: fl.lstsq(F, b), b)[1](torch.ones(n, dtype=dtype))
    torch.func.jvp(lambda b: fl.lstsq(F, b), (b,), (b,))
    assert set(Counter(prepared).values()) == {1}


def of_kept(A, b):
    return fl.lstsq(fl.factorize(A), b)


TRANSFORMED = {
    "grad": lambda f, v, b: torch.func.grad(lambda v: f(v, b).square().sum())(v),
    "jacrev": lambda f, v, b: torch.func.jacrev(f)(v, b),
    "jacfwd": lambda f, v, b: torch.func.jacfwd(f)(v, b),
    "hessian": lambda f, v, b: torch.func.hessian(lambda v: f(v, b).sum())(v),
    "vmap over A": lambda f, v, b: torch.vmap(f, (0, None))(torch.stack([v, 2 * v]), b),
    "vmap(grad)": lambda f, v, b: torch.vmap(torch.func.grad(lambda v: f(v, b).sum()))(torch.stack([v, 2 * v])),
}


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_derivatives_are_those_of_A(name, made_inside):
    A, b = problem(12, 5)
    F = fl.factorize(A)

    def kept(v, b):
        own = fl.factorize(fl.SparseMatrix(v, A.pattern)) if made_inside else F
        if not made_inside and v is not A.values:  # the same factors, for values that are being differentiated
            own = fl.Factorization(fl.SparseMatrix(v, A.pattern), None, None, F.solver, "raise", F.token)
        return fl.lstsq(own, b)

    def plain(v, b):
        return fl.lstsq(fl.SparseMatrix(v, A.pattern), b)

    got, want = (TRANSFORMED[name](f, A.values, b) for f in (kept, plain))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_autograd_by_A_damp_and_weights():
    A, b = problem()
    leaves = [A.values.clone().requires_grad_(), torch.tensor(0.3, dtype=DOUBLE, requires_grad=True), weights_of(40)]
    leaves[2].requires_grad_()
    M = fl.SparseMatrix(leaves[0], A.pattern)
    F = fl.factorize(M, damp=leaves[1], weights=leaves[2])
    got = torch.autograd.grad((fl.lstsq(F, b) + fl.lstsq(F, 2 * b)).square().sum(), leaves)
    want = torch.autograd.grad((3 * fl.lstsq(M, b, damp=leaves[1], weights=leaves[2])).square().sum(), leaves)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_values_that_were_changed_in_place_are_solved_with():
    A, b = problem()
    F = fl.factorize(A)
    A.values.mul_(2)
    assert torch.equal(fl.lstsq(F, b), fl.lstsq(A, b))


def test_a_right_hand_side_of_another_dtype_is_solved_in_it():
    A, b = problem(dtype=torch.float32)
    F = fl.factorize(A)
    x = fl.lstsq(F, b.double())
    assert x.dtype == DOUBLE
    assert torch.equal(x, fl.lstsq(A, b.double()))


def test_a_complex_right_hand_side_is_solved_as_one():
    A, b = problem()
    F = fl.factorize(A)
    assert torch.equal(fl.lstsq(F, b + 1j * b.flip(0)), fl.lstsq(A, b + 1j * b.flip(0)))


def test_equal_values_on_other_patterns_have_factors_of_their_own():
    A, b = problem()
    ones = torch.ones_like(A.values)
    F = fl.factorize(fl.SparseMatrix(ones, A.pattern))
    other = fl.SparsePattern(A.pattern.indices.flip(1).roll(1, 1), A.shape)
    G = fl.Factorization(fl.SparseMatrix(ones, other), None, None, F.solver, "raise", F.token)  # as if mixed up
    assert torch.equal(fl.lstsq(G, b), fl.lstsq(G.A, b))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda F: pickle.loads(pickle.dumps(F))])
def test_a_copy_keeps_factors_of_its_own(copied, prepared):
    A, b = problem()
    F = fl.factorize(A)
    G = copied(F)
    assert torch.equal(fl.lstsq(G, b), fl.lstsq(F, b))
    assert torch.equal(fl.lstsq(G, 2 * b), fl.lstsq(F, 2 * b))
    assert Counter(prepared)["Small"] == 2


def test_factors_live_as_long_as_they_are_kept():
    A, b = problem()
    F = fl.factorize(A)
    holder = weakref.ref(Holder.living[int(F.token[0])])
    fl.lstsq(F, b)
    gc.collect()
    assert holder() is not None
    del F
    gc.collect()
    assert holder() is None


@pytest.mark.parametrize("made_inside", [False, True])
def test_it_is_compiled_in_one_graph(made_inside):
    A, b = problem()
    F = fl.factorize(A)

    def f(v, b):
        return fl.lstsq(fl.factorize(fl.SparseMatrix(v, A.pattern)) if made_inside else F, b).square().sum()

    got = torch.compile(torch.func.grad(f, 1), fullgraph=True, backend="aot_eager")(A.values, b)
    torch.testing.assert_close(got, torch.func.grad(f, 1)(A.values, b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "study",
    [fl.leverage, fl.covariance_diagonal, lambda A, *w: fl.covariance(A, [0, 3], *w)],
    ids=["leverage", "covariance_diagonal", "covariance"],
)
def test_studies_take_it(prepared, study):
    A, _ = problem()
    w = weights_of(40)
    F = fl.factorize(A, weights=w)
    prepared.clear()
    torch.testing.assert_close(study(F), study(A, w), rtol=1e-12, atol=1e-12)
    assert len(prepared) == 1  # that of A itself


@pytest.mark.parametrize("name", ["damp", "weights", "solver", "rank_deficient", "robust", "bounds"])
def test_what_was_decided_is_refused(name):
    A, b = problem()
    F = fl.factorize(A)
    given = {"damp": 0.1, "weights": weights_of(40), "solver": fl.Dense(), "rank_deficient": "minimum_norm"}
    given |= {"robust": fl.Huber(), "bounds": (0, 1)}
    with pytest.raises((TypeError, ValueError), match=name):
        fl.lstsq(F, b, **{name: given[name]})


@pytest.mark.parametrize("A", [torch.eye(3), 3, fl.LinearOperator(lambda p, x: p * x, torch.ones(3), 3)])
def test_what_has_no_entries_is_refused(A):
    with pytest.raises(TypeError, match="A must be a "):
        fl.factorize(A)


def test_a_matrix_without_full_rank_is_refused_at_once():
    with pytest.raises(fl.RankDeficientError):
        fl.factorize(torch.ones(3, 2, dtype=DOUBLE).to_sparse())


def test_a_factor_is_preferred_to_iterating():
    """CGLS would take less time for one solve of this one."""
    n = 3000
    indices = torch.stack([torch.arange(2 * n) // 2, torch.randint(n, (2 * n,))])
    pattern = fl.SparsePattern(torch.cat([indices, torch.arange(n).expand(2, -1)], 1).unique(dim=1), (n, n))
    rows, columns = pattern.indices
    A = fl.SparseMatrix(torch.where(rows == columns, 4.0, 0.5).double(), pattern)
    assert fl.Auto().predict(A)[0].method == "CGLS"
    assert fl.factorize(A).info.method in ("direct-rslab", "direct-superlu", "dense-cholesky")


@pytest.mark.parametrize("shape", [(), (12,)], ids=str)
def test_a_damping_that_is_changed_in_place_is_another(shape):
    A, b = problem()
    damp = torch.ones(shape, dtype=DOUBLE)
    F = fl.factorize(A, damp=damp)
    fl.lstsq(F, b)
    damp.mul_(3)
    assert torch.equal(fl.lstsq(F, b), fl.lstsq(A, b, damp=damp))


def test_values_that_are_changed_in_inference_mode_are_others():
    A, b = problem()
    with torch.inference_mode():
        values = A.values.clone()
        F = fl.factorize(fl.SparseMatrix(values, A.pattern))
        fl.lstsq(F, b)
        values[0] *= 2
        assert torch.equal(fl.lstsq(F, b), fl.lstsq(fl.SparseMatrix(values, A.pattern), b))
