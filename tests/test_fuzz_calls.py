"""Calls of every kind at every scale, held against exact rational arithmetic: right, or refused.

Right is what the documentation of `lstsq` promises: the error is as small as `info` claims, but for rounding to numbers
that exist (2^-1074 is the smallest), and an x that is zero but for rounding says so.
"""

import math

import hypothesis.strategies as st
import torch
from fuzzing import fuzz
from hypothesis import given
from rationals import distance, gradients, least_squares, rational, size

import functional_lstsq as fl

DTYPES = [torch.float64, torch.float32, torch.complex128, torch.complex64]
SOLVERS = [None, fl.Dense(), fl.Direct(), fl.CGLS(), fl.Dense(orthogonal=False)]
MANTISSAS = st.sampled_from([1.0, -1.0, 2.0, -3.0, 0.5, 1 / 3, -0.7, 1 + 2**-20, 1e-5, 0.0])


def _numbers(draw, count, dtype, scale):
    """So many of about 10^scale, a few of them far from it; complex ones have two parts."""
    limit = 300 if dtype in (torch.float64, torch.complex128) else 36

    def some():
        parts = []
        for _ in range(count):
            exponent = scale + draw(st.sampled_from([0, 0, 0, 0, 1, -8, 8]))
            parts.append(draw(MANTISSAS) * 10.0 ** max(-limit, min(limit, exponent)))
        return torch.tensor(parts, dtype=torch.float64)

    return (torch.complex(some(), some()) if dtype.is_complex else some()).to(dtype)


@st.composite
def calls(draw, *, gradient=False):
    """(A dense, pattern, values, b, options of `solve`)"""
    dtype = draw(st.sampled_from(DTYPES[:2] if gradient else DTYPES))
    m, n = draw(st.integers(1 if gradient else 0, 3)), draw(st.integers(1 if gradient else 0, 3))
    limit = 300 if dtype in (torch.float64, torch.complex128) else 36
    scales = st.one_of(st.just(0), st.integers(-limit, limit))
    places = [(i, j) for i in range(m) for j in range(n)]
    stored = draw(st.permutations(places)) if places else []
    stored = stored[: draw(st.integers(0, len(stored)))] if draw(st.booleans()) else stored
    values = _numbers(draw, len(stored), dtype, draw(scales))
    indices = torch.tensor(stored, dtype=torch.int64).reshape(-1, 2).T
    A = torch.zeros(m, n, dtype=dtype).index_put(tuple(indices), values)
    columns = 1 if gradient else draw(st.integers(0, 3))
    b = _numbers(draw, m * max(columns, 1), dtype, draw(scales))
    b = b.reshape(m, columns) if columns > 1 else b
    options = {"solver": draw(st.sampled_from(SOLVERS))}
    if not gradient:
        options["rank_deficient"] = draw(st.sampled_from(["raise", "raise", "minimum_norm"]))
        options["refine"] = draw(st.sampled_from(["auto", "auto", "extended"]))
        if draw(st.booleans()):
            options["damp"] = draw(st.sampled_from([0.0, 1.0, 0.1])) * 10.0 ** draw(st.one_of(st.just(0), scales))
        if draw(st.booleans()):
            options["weights"] = _numbers(draw, m, torch.float64, draw(st.one_of(st.just(0), scales))).abs()
    return A, fl.SparsePattern(indices, (m, n)), values, b, options


def _at_most(value, *bounds):
    """Of logarithms to base 2: whether it is at most the sum of what they are of."""
    top = max(bounds)
    return value <= top + 1 or value <= top + math.log2(sum(2.0 ** max(bound - top, -99) for bound in bounds)) + 1e-9


@fuzz(120)
@given(calls())
def test_a_solution_is_as_right_as_it_claims_or_refused(call):
    A, pattern, values, b, options = call
    m, n = A.shape
    try:
        solution = fl.solve(fl.SparseMatrix(values, pattern), b, **options)
    except torch.linalg.LinAlgError:
        return
    x, info = solution.x, solution.info
    assert torch.isfinite(torch.view_as_real(x) if x.is_complex() else x).all()
    assert info.status in ("converged", "zero but for rounding")
    damp = options.get("damp") or None
    want, rank, _ = least_squares(A, b, damp, options.get("weights"))
    if options["rank_deficient"] == "raise":
        assert rank >= min(m, n), "without full rank there is no such solution"
    elif info.rank.numel() and int(info.rank.min()) != rank:
        return  # singular values that are zero but for rounding count as zero, as documented
    single = x.dtype in (torch.float32, torch.complex64)
    smallest = (-149 if single else -1074) + math.log2(max(1, n)) / 2
    accept = torch.finfo(x.dtype).eps ** (1 / 3)
    for column, errors, codes in zip(*_columns(x, want, info), strict=True):
        got, exact = column
        error = distance(got, exact)
        if codes == 0:
            assert errors <= accept
            assert _at_most(error, math.log2(max(10 * errors, 1e-300)) + size(exact), smallest + 1)
        else:
            assert errors == math.inf
            lengths = A.abs().amax(0) if m and n else A.new_zeros(0).abs()
            lengths = lengths[lengths > 0]
            if len(lengths):  # in units of |b| and of the smallest column, which bounds the documented unit
                unit = size(rational(b)) - math.log2(float(lengths.min()))
                assert _at_most(error, math.log2(10 * accept) + unit, smallest + 1)


def _columns(x, want, info):
    """For each right-hand side ((its x, the exact one), claimed error, status code)."""
    x, k = (x[:, None] if x.ndim == 1 else x), (1 if x.ndim == 1 else x.shape[1])
    twice = bool(want) and len(want[0]) == 2 * k  # [[re, -im], [im, re]]
    pairs = []
    for j in range(k):
        pairs.append((x[:, [j]], [[row[i] for i in ((j, k + j) if twice else (j,))] for row in want]))
    return pairs, info.forward_error.reshape(-1).tolist(), info.status_code.reshape(-1).tolist()


@fuzz(80)
@given(calls(gradient=True))
def test_a_gradient_is_right_or_refused(call):
    A, pattern, values, b, options = call
    n = A.shape[1]
    c = torch.arange(1.0, n + 1, dtype=A.dtype)
    try:
        by_A, by_b = torch.func.grad(
            lambda v, b: fl.lstsq(fl.SparseMatrix(v, pattern), b, **options) @ c, argnums=(0, 1)
        )(values, b)
    except torch.linalg.LinAlgError:
        return
    assert by_A.isfinite().all()
    assert by_b.isfinite().all()
    want = gradients(A, b, c)
    accept = torch.finfo(A.dtype).eps ** (1 / 3)
    smallest = (-149 if A.dtype == torch.float32 else -1074) + 2
    at = [[want["A"][i][j]] for i, j in pattern.indices.T.tolist()]
    for got, exact, zero in ((by_A, at, want["terms"]), (by_b, want["b"], -math.inf)):
        # A gradient that is zero but for rounding is held against the terms that cancel in it.
        bounds = math.log2(10 * accept) + size(exact), math.log2(10 * accept**2) + zero, smallest
        assert _at_most(distance(got, exact), *bounds)


@fuzz(40)
@given(st.data())
def test_what_is_well_conditioned_is_not_refused(data):
    """So that refusing everything would not pass: columns that are nearly orthogonal, of sizes of about 1."""
    n, extra = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 2))
    entries = data.draw(st.lists(MANTISSAS, min_size=n * (n + extra), max_size=n * (n + extra)))
    A = torch.tensor(entries, dtype=torch.float64).reshape(n + extra, n) / 4
    A[:n] += 4 * torch.eye(n, dtype=torch.float64)
    b = torch.arange(1.0, n + extra + 1, dtype=torch.float64)
    dtype, wide = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
    A, b = (A.T, b[:n]) if wide else (A, b)
    solution = fl.solve(A.to(dtype).to_sparse_csr(), b.to(dtype), solver=data.draw(st.sampled_from(SOLVERS)))
    assert solution.info.status == "converged"
    assert solution.info.forward_error < (1e-6 if dtype in (torch.float32, torch.complex64) else 1e-12)
    true = torch.linalg.cond(A / torch.linalg.vector_norm(A, dim=1 if wide else 0, keepdim=True))
    # Columns are scaled by powers of two, to norms between 0.7 and 1.5.
    assert true / 2.5 < solution.info.condition < 2.5 * true
