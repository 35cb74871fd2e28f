"""Every transformation x kind of matrix x solver x dtype: right, or an error that says why not.

Cells that differ in one of the last three from a SparseMatrix of double precision with the default solver are always
run; the others have the mark `table`.
"""

import itertools

import pytest
import torch
from helpers import close, dense, problem
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import functional_lstsq as fl

M, N = 7, 3
SOLVERS = {"default": None, "dense": fl.Dense(), "direct": fl.Direct(), "cgls": fl.CGLS(tolerance=1e-14)}
DTYPES = (torch.float32, torch.float64, torch.complex128)


def apply(params, x):
    values, pattern = params["values"], PATTERN
    return dense(values, pattern) @ x


PATTERN = problem(M, N)[0]
KINDS = {
    "SparseMatrix": lambda v: fl.SparseMatrix(v, PATTERN),
    "COO": lambda v: fl.SparseMatrix(v, PATTERN).to_torch(torch.sparse_coo),
    "CSR": lambda v: fl.SparseMatrix(v, PATTERN).to_torch(torch.sparse_csr),
    "CSC": lambda v: fl.SparseMatrix(v, PATTERN).to_torch(torch.sparse_csc),
    "LinearOperator": lambda v: fl.LinearOperator(apply, {"values": v}, N, v.dtype),
}


def scalar(f):
    return lambda x: f(x).abs().square().sum()


def leaves(A):
    return torch.utils._pytree.tree_leaves(A)


def backward(f, b):
    b = b.detach().requires_grad_()
    f(b).abs().square().sum().backward()
    return b.grad


def by_autograd(f, A):
    (leaf,), spec = torch.utils._pytree.tree_flatten(A)
    leaf = leaf.detach().requires_grad_()
    loss = f(torch.utils._pytree.tree_unflatten([leaf], spec)).abs().square().sum()
    return torch.utils._pytree.tree_unflatten(torch.autograd.grad(loss, leaf), spec)  # CSC leaves take no .grad


def inferred(f, b):
    with torch.inference_mode():
        return f(b).clone()


# By b, with the matrix closed over; f takes b.
BY_B = {
    "call": lambda f, b: f(b),
    "grad": lambda f, b: grad(scalar(f))(b),
    "grad(grad)": lambda f, b: grad(lambda b: grad(lambda b: f(b).abs().sum())(b).abs().square().sum())(b),
    "vjp": lambda f, b: vjp(f, b)[1](f(b))[0],
    "jvp": lambda f, b: jvp(f, (b,), (b.flip(0),))[1],
    "jacrev": lambda f, b: jacrev(f)(b),
    "jacfwd": lambda f, b: jacfwd(f)(b),
    "hessian": lambda f, b: hessian(lambda b: f(b).sum() ** 3)(b),
    "vmap": lambda f, b: vmap(f)(torch.stack([b, 2 * b, b.flip(0)])),
    "vmap, chunks": lambda f, b: vmap(f, chunk_size=2)(torch.stack([b, 2 * b, b.flip(0)])),
    "vmap(grad)": lambda f, b: vmap(grad(scalar(f)))(torch.stack([b, 2 * b])),
    "linearize": lambda f, b: linearize(f, b)[1](b.flip(0)),
    "checkpoint": lambda f, b: backward(lambda b: torch.utils.checkpoint.checkpoint(f, b, use_reentrant=False), b),
    "backward": backward,
    "inference mode": inferred,
    "functionalize": lambda f, b: functionalize(f)(b),
}
# By the matrix; f takes it.
BY_A = {
    "grad by A": lambda f, A: grad(scalar(f))(A),
    "autograd by A": by_autograd,
    "jacrev by A": lambda f, A: jacrev(scalar(f))(A),
    "hessian by A": lambda f, A: grad(lambda A: sum(t.abs().square().sum() for t in leaves(grad(scalar(f))(A))))(A),
    "vmap by A": lambda f, A: vmap(f)(torch.utils._pytree.tree_map(lambda t: torch.stack([t, 2 * t]), A)),
}
NOT_BY_B = {"functionalize": "NYI: Functionalize rule for custom_function_call"}
REAL_ONLY = ("jacrev", "jacfwd", "hessian", "jacrev by A")  # torch refuses complex arguments
NOT_OF_SPARSE = "Sparse|sparse|layout|strides"
REASONS = {
    **{(kind, name): NOT_OF_SPARSE for kind in ("CSR", "CSC") for name in BY_A if name != "autograd by A"},
    **{("COO", name): NOT_OF_SPARSE for name in ("jacrev by A", "vmap by A")},
    **{(kind, "linearize"): "do not have strides" for kind in ("CSR", "CSC")},
    ("COO", "linearize"): "get value out of a tracing tensor",
}


def in_values(result, kind):
    """What a result by a matrix says of its values, in the order of the pattern."""
    if kind in ("COO", "CSR", "CSC"):
        return result.to_dense()[tuple(PATTERN.indices)]
    (leaf,) = leaves(result)
    return leaf


def expect(reason, compute):
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError), match=reason):
        compute()


def cells():
    usual = "SparseMatrix", "default", torch.float64
    for name, *choice in itertools.product([*BY_B, *BY_A], KINDS, SOLVERS, DTYPES):
        others = sum(one != first for one, first in zip(choice, usual, strict=True))
        marks = pytest.mark.table if others > 1 else ()
        yield pytest.param(name, *choice, marks=marks, id="-".join(map(str, (name, *choice))))


@pytest.mark.parametrize(("name", "kind", "solver", "dtype"), [*cells()])
def test_cell(name, kind, solver, dtype):
    _, values, b = problem(M, N, dtype=dtype)
    A, chosen = KINDS[kind](values), SOLVERS[solver]
    tolerance = 2e-4 if dtype == torch.float32 else 1e-8

    def compute():
        if name in BY_B:
            return BY_B[name](lambda b: fl.lstsq(A, b, solver=chosen), b)
        return BY_A[name](lambda A: fl.lstsq(A, b, solver=chosen), A)

    if kind == "LinearOperator" and solver in ("dense", "direct"):
        expect(r"solver must be CGLS\(\) or None for a LinearOperator|to be real", compute)
    elif name in NOT_BY_B or (kind, name) in REASONS:
        expect(NOT_BY_B.get(name) or f"{REASONS[kind, name]}|to be real", compute)
    elif dtype.is_complex and name in REAL_ONLY:
        expect("Expected all inputs to be real", compute)
    else:
        double = torch.promote_types(dtype, torch.float64)
        D, v, right = dense(values, PATTERN).to(double), values.to(double), b.to(double)
        if name in BY_B:
            want = BY_B["call" if name == "inference mode" else name](lambda b: torch.linalg.pinv(D) @ b, right)
            got = compute()
        else:
            want = BY_A[name](lambda v: torch.linalg.pinv(dense(v, PATTERN)) @ right, v)
            got = compute() if name == "vmap by A" else in_values(compute(), kind)
        close(got.to(double), want, tolerance)
