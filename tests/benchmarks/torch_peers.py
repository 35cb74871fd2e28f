"""torchsparsegradutils as it comes, and torch.linalg.lstsq on the dense matrix."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Run = Callable[[], dict[str, Any]]


def _tensors(problem: dict[str, np.ndarray]) -> tuple[Tensor, tuple[int, int], Tensor, Tensor, Tensor]:
    indices = torch.from_numpy(np.stack([problem["rows"], problem["columns"]]))
    m, n = (int(size) for size in problem["shape"])
    values, b, cotangent = (torch.from_numpy(problem[name]) for name in ("values", "b", "cotangent"))
    return indices, (m, n), values, b, cotangent


def sparse_gradient(problem: dict[str, np.ndarray]) -> Run:
    """x and the gradients of cotangent . x; b may have columns, which it solves for one by one."""
    from torchsparsegradutils import sparse_generic_lstsq

    indices, shape, values, b, cotangent = _tensors(problem)

    def run() -> dict[str, Any]:
        # The indices are sorted, which spares it a sort.
        A = torch.sparse_coo_tensor(indices, values, shape, is_coalesced=True).requires_grad_()
        B = b.clone().requires_grad_()
        x = sparse_generic_lstsq(A, B)
        x.backward(cotangent)
        return {"x": x.detach(), "by_values": A.grad.coalesce().values(), "by_b": B.grad}

    return run


def sparse_training(problem: dict[str, np.ndarray]) -> Run:
    """Gradient descent on w, where A's values are values * (1 + 0.01 tanh(w))."""
    from torchsparsegradutils import sparse_generic_lstsq

    indices, shape, values, b, _ = _tensors(problem)
    target, rate = torch.from_numpy(problem["target"]), float(problem["rate"])

    def run() -> dict[str, Any]:
        w = torch.zeros_like(values)
        for _ in range(int(problem["steps"])):
            w.requires_grad_()
            A = torch.sparse_coo_tensor(indices, values * (1 + 0.01 * w.tanh()), shape, is_coalesced=True)
            (sparse_generic_lstsq(A, b) - target).square().sum().backward()
            w = (w - rate * w.grad).detach()
        return {"w": w}

    return run


def normal_gradient(problem: dict[str, np.ndarray]) -> Run:
    """x and the gradients of cotangent . x through A^T A x = A^T b, which torch-sla solves.

    Where the entries of A^T A come from is found beforehand.
    """
    from torch_sla import spsolve

    (rows, columns), (_, n), values, b, cotangent = _tensors(problem)
    order = torch.argsort(rows, stable=True)
    counts = torch.bincount(rows)
    of_pairs = counts[rows[order]]  # each entry meets all of its row
    left = order.repeat_interleave(of_pairs)
    starts = (counts.cumsum(0) - counts)[rows[order]].repeat_interleave(of_pairs)
    within = torch.arange(len(left)) - (of_pairs.cumsum(0) - of_pairs).repeat_interleave(of_pairs)
    right = order[starts + within]
    keys, place = torch.unique(columns[left] * n + columns[right], return_inverse=True)

    def run() -> dict[str, Any]:
        v, c = values.clone().requires_grad_(), b.clone().requires_grad_()
        gram = v.new_zeros(len(keys)).index_add(0, place, v[left] * v[right])
        x = spsolve(gram, keys // n, keys % n, (n, n), v.new_zeros(n).index_add(0, columns, v * c[rows]), is_spd=True)
        x.backward(cotangent)
        return {"x": x.detach(), "by_values": v.grad, "by_b": c.grad}

    return run


def _dense_solution(values: Tensor, b: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """torch.linalg.lstsq with the driver for full rank, the fastest there is on a CPU; leading dimensions are batch."""
    m, n = shape
    batch = values.shape[:-1]
    where = (indices[0] * n + indices[1]).expand(values.shape)
    A = values.new_zeros((*batch, m * n)).scatter(-1, where, values).view(*batch, m, n)
    B = b.unsqueeze(-1) if b.ndim == len(batch) + 1 else b
    return torch.linalg.lstsq(A, B, driver="gels").solution.view(*batch, n, *b.shape[len(batch) + 1 :])


def dense_gradient(problem: dict[str, np.ndarray]) -> Run:
    """x and the gradients of cotangent . x by the stored entries and b: of one problem, of columns, or of a batch."""
    indices, shape, values, b, cotangent = _tensors(problem)

    def objective(values: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        x = _dense_solution(values, b, indices, shape)
        return (cotangent * x).sum(), x

    def run() -> dict[str, Any]:
        (by_values, by_b), x = torch.func.grad(objective, argnums=(0, 1), has_aux=True)(values, b)
        return {"x": x, "by_values": by_values, "by_b": by_b}

    return run


def dense_jacobian(problem: dict[str, np.ndarray]) -> Run:
    """x and its whole Jacobian by the stored entries."""
    indices, shape, values, b, _ = _tensors(problem)

    def solution(values: Tensor) -> tuple[Tensor, Tensor]:
        x = _dense_solution(values, b, indices, shape)
        return x, x

    def run() -> dict[str, Any]:
        by_values, x = torch.func.jacrev(solution, has_aux=True)(values)
        return {"x": x, "by_values": by_values}

    return run


def about_torch() -> dict[str, Any]:
    """Threads of torch and what it computes with."""
    lines = [line.strip() for line in torch.__config__.parallel_info().splitlines()]
    wanted = ("OpenMP ", "Intel(R) oneAPI Math", "Intel(R) Math", "ATen parallel backend")
    told = [line.split(" Build ")[0].split(" (")[0] for line in lines if line.startswith(wanted)]
    return {"threads": torch.get_num_threads(), "parallel": told}


def about(contestant: str) -> dict[str, Any]:
    """Versions and threads."""
    versions = {"torch": torch.__version__}
    if contestant != "torch dense":
        importlib.import_module(contestant.replace("-", "_"))  # where it is missing, this says so
        versions = {contestant: importlib.metadata.version(contestant)} | versions
    return {"versions": versions} | about_torch()


WORKS = {
    "torchsparsegradutils": {
        "gradient": sparse_gradient,
        "columns": sparse_gradient,
        "training": sparse_training,
    },
    "torch-sla": {"gradient": normal_gradient},
    "torch dense": {"gradient": dense_gradient, "columns": dense_gradient, "jacobian": dense_jacobian},
}
