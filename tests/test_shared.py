"""Real matrices with answers refined in extended precision, where they are at hand (they are not part of this repo)."""

import numpy as np
import pytest
import scipy.io
import torch
from helpers import SHARED
from references import distance

import functional_lstsq as fl

MATRICES = sorted((SHARED / "matrices").glob("*.ref.npz"))
pytestmark = [pytest.mark.external, pytest.mark.skipif(not MATRICES, reason="the shared matrices are not here")]


def solve(A, b, w, **options):
    """(x, gradients of w . x by A's values and by b, info)."""
    pattern = fl.SparsePattern(torch.tensor(np.stack([A.row, A.col]), dtype=torch.int64), A.shape)

    def loss(values, b):
        solution = fl.solve(fl.SparseMatrix(values, pattern), b, **options)
        return solution.x @ torch.tensor(w), (solution.x, solution.info)

    (by_values, by_b), (x, info) = torch.func.grad(loss, (0, 1), has_aux=True)(torch.tensor(A.data), torch.tensor(b))
    return [t.numpy() for t in (x, by_values, by_b)], info


@pytest.mark.parametrize("path", MATRICES, ids=lambda path: path.name.split(".")[0])
def test_direct_is_right_honest_and_sharp(path):
    """Values and gradients within 100 times the error of a Householder QR; the claim within its bounds."""
    ref, name = np.load(path), path.name.split(".")[0]
    A = scipy.io.mmread(path.with_name(f"{name}.mtx.gz")).tocoo()
    if "x" not in ref:
        b, w = ref["b"], ref["cotangent"]
        with pytest.raises(fl.RankDeficientError):
            solve(A, b, w, solver=fl.Direct())
        got, info = solve(A, b, w, solver=fl.Direct(), rank_deficient="minimum_norm")
        for mine, right in zip(got, ("x", "grad_values", "grad_b"), strict=True):
            assert distance(mine, ref[f"min_norm_{right}"]) <= max(1e-9, 1000 * ref["cond"] * 2.2e-16)
        return
    for prefix in ("", "wide_"):
        if f"{prefix}x" not in ref:
            continue
        matrix = A.T.tocoo() if prefix else A
        got, info = solve(matrix, ref[f"{prefix}b"], ref[f"{prefix}cotangent"], solver=fl.Direct())
        errors = [distance(m, ref[f"{prefix}{k}"]) for m, k in zip(got, ("x", "grad_values", "grad_b"), strict=True)]
        of_qr = [float(ref[f"{prefix}qr_{k}_error"]) for k in ("x", "grad")]
        assert errors[0] <= max(1e-9, 100 * of_qr[0])
        assert max(errors[1:]) <= max(1e-9, 100 * of_qr[1])
        claim = float(info.forward_error)
        assert (errors[0] - 1e-15) / 10 <= claim <= max(1e-10, 1000 * of_qr[0])
        # The gradient by b is the solution of A^T z = cotangent, which has a claim of its own.
        _, adjoint = solve(matrix.T.tocoo(), ref[f"{prefix}cotangent"], ref[f"{prefix}b"], solver=fl.Direct())
        assert errors[2] <= 10 * float(adjoint.forward_error) + 1e-15
