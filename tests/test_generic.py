"""sparse_generic_lstsq: the contract of torchsparsegradutils, line by line, and what goes beyond it."""

import pytest
import torch
from helpers import close, problem

import functional_lstsq as fl
from functional_lstsq import sparse_generic_lstsq

LAYOUTS = [torch.sparse_coo, torch.sparse_csr]
SHAPES = [(7,), (7, 1), (7, 3)]


@pytest.fixture(params=LAYOUTS, ids=str)
def A(request):
    pattern, values, _ = problem(7, 4)
    return fl.SparseMatrix(values, pattern).to_torch(request.param)


@pytest.fixture(params=SHAPES, ids=str)
def B(request):
    return torch.randn(*request.param, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Given:
    """Dense solvers that note how they were called."""

    def __init__(self):
        self.calls = []

    def lstsq(self, A, B):
        self.calls.append(("lstsq", A.layout, B.shape))
        return torch.linalg.pinv(A.to_dense()) @ B

    def transpose_lstsq(self, A, G):
        self.calls.append(("transpose_lstsq", A.layout, G.shape))
        assert A.shape == (7, 4)
        return torch.linalg.pinv(A.to_dense()).T @ G


@pytest.fixture(params=["own", "given", "given lstsq", "given transpose_lstsq"])
def solvers(request):
    given = Given()
    return {
        "own": {},
        "given": {"lstsq": given.lstsq, "transpose_lstsq": given.transpose_lstsq},
        "given lstsq": {"lstsq": given.lstsq},
        "given transpose_lstsq": {"transpose_lstsq": given.transpose_lstsq},
    }[request.param]


def test_values_and_gradients(A, B, solvers):
    D, Bd = A.to_dense().requires_grad_(), B.clone().requires_grad_()
    mask = D.detach() != 0
    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
    X = sparse_generic_lstsq(A, B, **solvers)
    want = torch.linalg.pinv(D) @ Bd
    close(X, want)
    X.sin().sum().backward()
    want.sin().sum().backward()
    assert A.grad.layout == A.layout
    close(A.grad.to_dense(), D.grad * mask)
    close(B.grad, Bd.grad)
    if A.layout == torch.sparse_coo:
        assert torch.equal(A.grad.coalesce().indices(), A.detach().indices())
    else:
        assert torch.equal(A.grad.crow_indices(), A.crow_indices())
        assert torch.equal(A.grad.col_indices(), A.col_indices())


def test_double_backward(A, B, solvers):
    A, B, D = A.clone().requires_grad_(), B.clone().requires_grad_(), A.to_dense()

    def second(A, B, X):
        by_A, by_B = torch.autograd.grad(X.sin().sum(), (A, B), create_graph=True)
        total = by_B.sin().sum() + ((by_A if by_A.layout == torch.strided else by_A.to_dense()) * (D != 0)).sin().sum()
        return torch.autograd.grad(total, (A, B))

    got = second(A, B, sparse_generic_lstsq(A, B, **solvers))
    Dd, Bd = D.clone().requires_grad_(), B.detach().clone().requires_grad_()
    want = second(Dd, Bd, torch.linalg.pinv(Dd) @ Bd)
    close(got[0].to_dense(), want[0] * (D != 0))
    close(got[1], want[1])


def test_transformations_in_B_with_A_closed_over(A, B, solvers):
    D = A.to_dense()

    def ours(B):
        return sparse_generic_lstsq(A, B, **solvers)

    def want(B):
        return torch.linalg.pinv(D) @ B

    batch = torch.stack([B, B + 1, B * 2])
    close(torch.vmap(ours)(batch), torch.vmap(want)(batch))
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        close(transform(ours)(B), transform(want)(B))
    close(torch.func.hessian(lambda B: ours(B).sin().sum())(B), torch.func.hessian(lambda B: want(B).sin().sum())(B))
    close(
        torch.vmap(torch.func.grad(lambda B: ours(B).sin().sum()))(batch),
        torch.vmap(torch.func.grad(lambda B: want(B).sin().sum()))(batch),
    )


def test_given_solvers_are_called_as_given(A, B):
    given = Given()
    B = B.clone().requires_grad_()
    X = sparse_generic_lstsq(A, B, given.lstsq, given.transpose_lstsq)
    assert given.calls == [("lstsq", A.layout, B.shape)]
    X.sum().backward()
    assert given.calls[1:] == [("transpose_lstsq", A.layout, X.shape), ("lstsq", A.layout, B.shape)]


def test_uncoalesced():
    pattern, values, b = problem(7, 4)
    indices = torch.cat([pattern.indices, pattern.indices[:, :3]], 1)
    entries = torch.cat([values, values[:3]])
    A = torch.sparse_coo_tensor(indices, entries, (7, 4)).requires_grad_()
    assert not A.is_coalesced()
    D = A.detach().to_dense().requires_grad_()
    X = sparse_generic_lstsq(A, b)
    close(X, torch.linalg.pinv(D) @ b)
    X.sum().backward()
    (torch.linalg.pinv(D) @ b).sum().backward()
    assert A.grad.is_sparse
    close(A.grad.to_dense(), D.grad * (D != 0))


def test_wide_is_solved_but_not_differentiated(solvers):
    pattern, values, _ = problem(4, 7)
    A = fl.SparseMatrix(values, pattern).to_torch().requires_grad_()
    b = torch.ones(4, dtype=torch.float64, requires_grad=True)
    if "transpose_lstsq" in solvers:
        solvers["transpose_lstsq"] = lambda A, G: torch.linalg.pinv(A.to_dense()).T @ G
    X = sparse_generic_lstsq(A, b, **solvers)
    close(X.detach(), torch.linalg.pinv(A.detach().to_dense()) @ b.detach())
    with pytest.raises(ValueError, match=r"A must be tall"):
        X.sum().backward()
    A, b = A.detach(), b.detach()
    with pytest.raises(ValueError, match=r"A must be tall"):
        torch.func.jvp(lambda b: sparse_generic_lstsq(A, b, **solvers), (b,), (b,))


ONES = torch.ones(7, dtype=torch.float64)


def fails(A, B):
    raise ArithmeticError("no luck")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda A: sparse_generic_lstsq(A.to_dense(), ONES), TypeError, "COO or CSR"),
        (lambda A: sparse_generic_lstsq(A.to_dense().to_sparse_csc(), ONES), TypeError, "COO or CSR"),
        (lambda A: sparse_generic_lstsq(A, ONES[1:]), ValueError, r"got A \(7, 4\) and B \(6,\)"),
        (lambda A: sparse_generic_lstsq(A, ONES[:, None, None]), ValueError, r"shape \(m,\) or \(m, k\)"),
        (lambda A: sparse_generic_lstsq(A, ONES, lstsq=fails), RuntimeError, "lstsq failed: no luck"),
        (lambda A: sparse_generic_lstsq(A, ONES, lstsq=lambda A, B: B), RuntimeError, r"must return shape \(4,\)"),
        (lambda A: sparse_generic_lstsq(A, ONES, lstsq=lambda A, B: None), RuntimeError, "must return a tensor"),
    ],
)
def test_bad_input_is_refused(A, call, error, message):
    with pytest.raises(error, match=message):
        call(A)


def test_errors_of_derivatives(A):
    B = ONES.clone()
    with pytest.raises(RuntimeError, match="transpose_lstsq failed: no luck"):
        sparse_generic_lstsq(A, B.requires_grad_(), transpose_lstsq=fails).sum().backward()
    with pytest.raises(RuntimeError, match=r"transpose_lstsq must return shape \(7,\)"):
        sparse_generic_lstsq(A, B, transpose_lstsq=lambda A, G: G).sum().backward()
    with pytest.raises(torch.linalg.LinAlgError):
        sparse_generic_lstsq((0 * A.to_dense() + 1).to_sparse_csr(), B.detach())
