"""Devices and dtypes that are not A's own: a default device, autocast, and files that torch.load reads by default."""

import io

import pytest
import torch
from helpers import problem
from torch.func import grad, jacfwd

import functional_lstsq as fl

PATTERN, VALUES, B = problem(7, 3)
A = fl.SparseMatrix(VALUES, PATTERN)
CSR, CSC, COO = (A.to_torch(layout) for layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_coo))
START = torch.zeros(3, dtype=torch.float64)


def gradient(**options):
    return grad(lambda v: fl.lstsq(fl.SparseMatrix(v, PATTERN), B, **options).sum())(VALUES)


JOBS = {
    "to_torch": lambda: A.to_torch().to_dense(),
    "CSR": lambda: A.to_torch(torch.sparse_csr).to_dense(),
    "lstsq(COO)": lambda: fl.lstsq(COO, B),
    "lstsq(CSR)": lambda: fl.lstsq(CSR, B),
    "lstsq(CSC)": lambda: fl.lstsq(CSC, B),
    "dense": lambda: gradient(solver=fl.Dense()),
    "direct": lambda: gradient(solver=fl.Direct()),
    "cgls": lambda: gradient(solver=fl.CGLS()),
    "minimum norm": lambda: gradient(rank_deficient="minimum_norm"),
    "weights and damp": lambda: gradient(weights=B.abs(), damp=0.1),
    "extended": lambda: gradient(refine="extended"),
    "jacfwd": lambda: jacfwd(lambda v: fl.lstsq(fl.SparseMatrix(v, PATTERN), B))(VALUES),
    "leverage": lambda: fl.leverage(A),
    "gauss_newton": lambda: fl.gauss_newton(lambda x, b: A @ x - b, START, (B,)).x,
    "robust": lambda: fl.lstsq(A, B, robust=fl.Huber(1.0)),
}


@pytest.mark.parametrize("name", JOBS)
def test_the_device_is_that_of_A(name):
    want = JOBS[name]()
    torch.set_default_device("meta")  # stands for any other device
    try:
        got = JOBS[name]()
    finally:
        torch.set_default_device(None)
    assert got.device == want.device
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_right_hand_side_from_a_layer_under_autocast(dtype):
    b = B.to(dtype)
    with pytest.raises(TypeError, match="must be float32"):
        fl.lstsq(A, b)
    with torch.autocast("cpu", dtype=dtype):
        x = fl.lstsq(fl.SparseMatrix(VALUES.float(), PATTERN), b)
    assert torch.equal(x, fl.lstsq(fl.SparseMatrix(VALUES.float(), PATTERN), b.float()))


SAVED = [A, A.T, PATTERN, fl.solve(A, B), fl.gauss_newton(lambda x: A @ x - B, START), fl.Huber()]
SAVED += [fl.Auto(), fl.CGLS(max_iterations=7), fl.Dense(), fl.Direct(memory=1e9)]


@pytest.mark.parametrize("thing", SAVED, ids=lambda thing: type(thing).__name__)
def test_torch_load_takes_by_default_what_was_saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    loaded = torch.load(file)
    assert type(loaded) is type(thing)
    assert repr(loaded) == repr(thing) or isinstance(thing, tuple)
