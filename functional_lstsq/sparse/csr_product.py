"""The product of two matrices that torch keeps by rows."""

from __future__ import annotations

import scipy.sparse
import torch
from torch import Tensor


def sparse_product(left: Tensor, right: Tensor) -> Tensor:
    """The product of two torch CSR matrices, without entries that cancel to zero.

    On the CPU by SciPy: torch's own loses memory at every call (2.13 and 2.14), half a MiB for a million entries.
    """
    if left.device.type != "cpu":
        return left @ right
    parts = [
        scipy.sparse.csr_array((A.values().numpy(), A.col_indices().numpy(), A.crow_indices().numpy()), A.shape)
        for A in (left, right)
    ]
    product = parts[0] @ parts[1]
    pointers, indices, values = map(torch.from_numpy, (product.indptr, product.indices, product.data))
    return torch.sparse_csr_tensor(
        pointers, indices, values, product.shape, device=values.device, check_invariants=False
    )
