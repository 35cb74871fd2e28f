"""SparsePattern and SparseMatrix."""

import copy
import gc
import pickle

import numpy as np
import pytest
import scipy.sparse
import torch
from helpers import close, dense, normal, problem
from hypothesis import given
from hypothesis import strategies as st

import functional_lstsq as fl
from functional_lstsq.sparse.pattern import find_pattern

LAYOUTS = [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc]
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]


@st.composite
def matrices(draw, dtypes=DTYPES):
    m, n = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    cells = draw(st.lists(st.integers(0, m * n - 1), unique=True, max_size=m * n))
    index_dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    indices = torch.tensor([[c // n for c in cells], [c % n for c in cells]], dtype=index_dtype).reshape(2, -1)
    seed = draw(st.integers(0, 100))
    values = torch.randn(len(cells), generator=torch.Generator().manual_seed(seed), dtype=draw(st.sampled_from(dtypes)))
    return fl.SparseMatrix(values, fl.SparsePattern(indices, (m, n)))


@given(matrices(), st.integers(0, 3), st.integers(0, 100))
def test_products_are_those_of_the_dense_matrix(A, k, seed):
    D, tolerance = dense(A.values, A.pattern), 1e-12 if A.dtype in (torch.float64, torch.complex128) else 1e-5
    X = normal(A.shape[1], k, dtype=A.dtype, seed=seed)
    close(A @ X, D @ X, tolerance)
    close(A.T @ torch.ones(A.shape[0], dtype=A.dtype), D.T.sum(1), tolerance)
    close(A.H @ torch.ones(A.shape[0], dtype=A.dtype), D.mH.sum(1), tolerance)
    assert torch.equal(A.to_dense(), D)
    assert A.T.T.pattern is A.pattern


@given(matrices(), st.sampled_from(LAYOUTS))
def test_torch_layouts_there_and_back(A, layout):
    tensor = A.to_torch(layout)
    assert tensor.layout == layout
    assert torch.equal(tensor.to_dense(), A.to_dense())
    assert torch.equal(fl.SparseMatrix.from_torch(tensor).to_dense(), A.to_dense())


@given(matrices([torch.float32, torch.float64, torch.complex128]))
def test_scipy_there_and_back(A):
    there = scipy.sparse.coo_array((A.values.numpy(), A.pattern.indices.numpy()), A.shape)
    for form in (there, there.tocsr(), there.tocsc(), scipy.sparse.coo_matrix(there)):
        assert torch.equal(fl.SparseMatrix.from_scipy(form).to_dense(), A.to_dense())


def test_scipy_duplicates_and_integers():
    A = fl.SparseMatrix.from_scipy(scipy.sparse.coo_array(([1, 2, 3], ([0, 0, 1], [1, 1, 0])), (2, 2)))
    assert A.dtype == torch.float64
    assert A.to_dense().tolist() == [[0, 3], [3, 0]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_reach_torch_tensors_in_their_layout(layout):
    pattern, values, b = problem(6, 3)
    tensor = fl.SparseMatrix(values, pattern).to_torch(layout).requires_grad_()
    (gradient,) = torch.autograd.grad(fl.lstsq(tensor, b).sin().sum(), tensor, create_graph=True)
    assert gradient.layout == layout
    reference = torch.func.grad(lambda v: fl.lstsq(fl.SparseMatrix(v, pattern), b).sin().sum())
    close(gradient.to_dense(), dense(reference(values), pattern))
    (second,) = torch.autograd.grad(gradient.to_dense().square().sum(), tensor)
    want = torch.func.grad(lambda v: reference(v).square().sum())(values)
    close(second.to_dense(), dense(want, pattern))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_tensors_closed_over(layout):
    pattern, values, b = problem(6, 3)
    A, tensor = fl.SparseMatrix(values, pattern), fl.SparseMatrix(values, pattern).to_torch(layout)
    B = torch.stack([b, b + 1])
    close(torch.vmap(lambda b: fl.lstsq(tensor, b))(B), torch.vmap(lambda b: fl.lstsq(A, b))(B))
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        close(transform(lambda b: fl.lstsq(tensor, b))(b), transform(lambda b: fl.lstsq(A, b))(b))


def test_patterns_made_inside_a_transformation_are_plain():
    pattern, values, b = problem(3, 6)

    def loss(values):
        fresh = fl.SparsePattern(pattern.indices, pattern.shape)
        return fl.lstsq(fl.SparseMatrix(values, fresh), b).sum()

    want = torch.func.hessian(lambda v: fl.lstsq(fl.SparseMatrix(v, pattern), b).sum())(values)
    close(torch.func.hessian(loss)(values), want)
    close(torch.func.jacfwd(torch.func.jacfwd(loss))(values), want)


def test_pattern_is_a_copy_and_found_again():
    indices = torch.tensor([[0, 1, 2], [0, 1, 1]])
    pattern = fl.SparsePattern(indices, (3, 2))
    indices.zero_()
    assert pattern.indices.tolist() == [[0, 1, 2], [0, 1, 1]]
    assert find_pattern(pattern.indices, 3, 2) is pattern
    assert find_pattern(pattern.T.indices, 2, 3) is pattern.T
    transpose = pattern.T
    del pattern
    gc.collect()
    assert transpose.T.shape == (3, 2)
    assert transpose.T.T is transpose


def test_equality_pickle_and_repr():
    pattern, values, _ = problem(4, 3)
    same = fl.SparsePattern(pattern.indices.to(torch.int32), pattern.shape)
    assert same == pattern
    assert hash(same) == hash(pattern)
    assert pattern != pattern.T
    for copied in (pickle.loads(pickle.dumps(pattern)), copy.deepcopy(pattern)):
        assert copied == pattern
    A = pickle.loads(pickle.dumps(fl.SparseMatrix(values, pattern)))
    assert A.pattern == pattern
    assert torch.equal(A.values, values)
    assert repr(A) == f"SparseMatrix(shape=(4, 3), nnz={A.nnz}, dtype=torch.float64)"
    assert "batch=(2,)" in repr(fl.SparseMatrix(torch.stack([values] * 2), pattern))


@pytest.mark.parametrize(
    ("indices", "shape", "error", "message"),
    [
        ([[0, 0], [1, 1]], (2, 2), ValueError, r"position \(0, 1\) is given more than once"),
        ([[0, 2], [1, 1]], (2, 2), ValueError, r"row index 2 lies outside of shape \(2, 2\)"),
        ([[0, 1], [-1, 1]], (2, 2), ValueError, r"column index -1 lies outside"),
        ([[0.0, 1.0], [0.0, 1.0]], (2, 2), TypeError, r"integer tensor, got dtype torch.float32"),
        ([0, 1], (2, 2), ValueError, r"shape \(2, nnz\), got \(2,\)"),
        ([[0], [0]], (2,), ValueError, r"shape must be a pair"),
        ([[0], [0]], (-1, 2), ValueError, r"must not be negative"),
    ],
)
def test_bad_patterns(indices, shape, error, message):
    with pytest.raises(error, match=message):
        fl.SparsePattern(torch.tensor(indices), shape)


def test_bad_matrices():
    pattern, values, _ = problem(4, 3)
    A = fl.SparseMatrix(values, pattern)
    with pytest.raises(ValueError, match="one for each entry"):
        fl.SparseMatrix(values[1:], pattern)
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        fl.SparseMatrix(values.long(), pattern)
    with pytest.raises(TypeError, match="pattern must be a SparsePattern"):
        fl.SparseMatrix(values, pattern.indices)
    with pytest.raises(TypeError, match="values must be a tensor"):
        fl.SparseMatrix([1.0], pattern)
    with pytest.raises(ValueError, match=r"X of shape \(3,\) or \(3, k\), got \(4,\)"):
        A @ torch.ones(4)
    with pytest.raises(TypeError, match="dense tensor X, got ndarray"):
        A @ np.ones(3)
    with pytest.raises(TypeError, match="sparse COO, CSR or CSC"):
        fl.SparseMatrix.from_torch(torch.eye(3))
    with pytest.raises(ValueError, match="layout must be"):
        A.to_torch(torch.strided)
    with pytest.raises(TypeError, match="SciPy sparse matrix"):
        fl.SparseMatrix.from_scipy(np.eye(3))
    with pytest.raises(ValueError, match="cannot be vmapped"):
        torch.vmap(lambda i: fl.SparsePattern(i, (4, 3)).indices)(torch.zeros(2, 2, 1, dtype=torch.int64))


def test_coo_tensors_inside_transformations_are_right_or_refused():
    """torch.func.grad takes COO tensors; where torch drops derivatives of sparse tensors there is an error."""
    pattern, values, b = problem(6, 3)
    A = fl.SparseMatrix(values, pattern)
    D, T = A.to_dense(), A.to_torch()
    want = torch.func.grad(lambda v: fl.lstsq(fl.SparseMatrix(v, pattern), b).sum())(values)
    close(torch.func.grad(lambda T: fl.lstsq(T, b).sum())(T).to_dense(), dense(want, pattern))
    close(torch.func.grad(lambda D: fl.lstsq(D.to_sparse(), b).sum())(D), dense(want, pattern))
    close(torch.func.vjp(lambda T: fl.lstsq(T, b), T)[1](torch.ones(3).double())[0].to_dense(), dense(want, pattern))
    made = torch.func.grad(lambda v: fl.lstsq(torch.sparse_coo_tensor(pattern.indices, v, (6, 3)), b).sum())
    close(made(values), want)
    two = torch.tensor(2.0, dtype=torch.float64)
    by_factor = torch.func.grad(lambda s: fl.lstsq(T * s, b).sum())
    close(by_factor(two), -fl.lstsq(A, b).sum() / 4)
    with pytest.raises((TypeError, RuntimeError)):  # torch's own refusal, or ours
        torch.func.jvp(lambda s: fl.lstsq(T * s, b), (two,), (two,))
    with pytest.raises((TypeError, RuntimeError)):
        torch.vmap(lambda s: fl.lstsq(T * s, b))(torch.stack([two, two]))
    with pytest.raises(TypeError, match=r"make it a SparseMatrix"):
        torch.func.jvp(lambda b: fl.lstsq(T.detach(), b), (b,), (b,))


def test_patterns_made_in_inference_mode_serve_later():
    pattern, values, b = problem(6, 3)
    with torch.inference_mode():
        made = fl.SparsePattern(pattern.indices.clone(), pattern.shape)
        fl.lstsq(fl.SparseMatrix(values, made), b)
    fl.lstsq(fl.SparseMatrix(values.requires_grad_(), made), b).sum().backward()
    assert values.grad.isfinite().all()
