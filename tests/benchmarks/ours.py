"""functional_lstsq, with default settings, through torch.func.

Every work comes cold, with a pattern made anew in each call, so that sorting and analysis are inside its time, and
warm, with one pattern for all calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fits import by_ours
from torch import Tensor
from torch_peers import about_torch

import functional_lstsq as fl
from functional_lstsq.sparse import plain_products

_SINGLE_ENTRIES = plain_products._SINGLE_ENTRIES

Run = Callable[[], dict[str, Any]]


class _Posed:
    """A problem as tensors."""

    def __init__(self, problem: dict[str, np.ndarray], warm: bool):
        self.indices = torch.from_numpy(np.stack([problem["rows"], problem["columns"]]))
        self.shape = (int(problem["shape"][0]), int(problem["shape"][1]))
        self.values, self.b, self.cotangent = (torch.from_numpy(problem[k]) for k in ("values", "b", "cotangent"))
        self._kept = fl.SparsePattern(self.indices, self.shape) if warm else None

    def pattern(self) -> fl.SparsePattern:
        return self._kept or fl.SparsePattern(self.indices, self.shape)


def solve(problem: dict[str, np.ndarray], warm: bool = False) -> Run:
    """x alone."""
    posed = _Posed(problem, warm)
    return lambda: {"x": fl.lstsq(fl.SparseMatrix(posed.values, posed.pattern()), posed.b)}


def gradient(problem: dict[str, np.ndarray], warm: bool = False) -> Run:
    """x and the gradients of cotangent . x by values and b; of many problems on one pattern, by vmap, if b is 2-D."""
    posed = _Posed(problem, warm)

    def run() -> dict[str, Any]:
        pattern = posed.pattern()

        def objective(values: Tensor, b: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
            x = fl.lstsq(fl.SparseMatrix(values, pattern), b)
            return cotangent @ x, x

        work = torch.func.grad(objective, argnums=(0, 1), has_aux=True)
        if posed.b.ndim == 2:
            work = torch.func.vmap(work)
        (by_values, by_b), x = work(posed.values, posed.b, posed.cotangent)
        return {"x": x, "by_values": by_values, "by_b": by_b}

    return run


def columns(problem: dict[str, np.ndarray], warm: bool = False) -> Run:
    """As `gradient`, of the sum over many right-hand sides with one A, by vmap over the columns of b."""
    posed = _Posed(problem, warm)

    def run() -> dict[str, Any]:
        pattern = posed.pattern()

        def objective(values: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            A = fl.SparseMatrix(values, pattern)
            x = torch.func.vmap(lambda b: fl.lstsq(A, b), in_dims=1, out_dims=1)(b)
            return (posed.cotangent * x).sum(), x

        work = torch.func.grad(objective, argnums=(0, 1), has_aux=True)
        (by_values, by_b), x = work(posed.values, posed.b)
        return {"x": x, "by_values": by_values, "by_b": by_b}

    return run


def jacobian(problem: dict[str, np.ndarray], warm: bool = False) -> Run:
    """x and its whole Jacobian by values."""
    posed = _Posed(problem, warm)

    def run() -> dict[str, Any]:
        pattern = posed.pattern()

        def solution(values: Tensor) -> tuple[Tensor, Tensor]:
            x = fl.lstsq(fl.SparseMatrix(values, pattern), posed.b)
            return x, x

        by_values, x = torch.func.jacrev(solution, has_aux=True)(posed.values)
        return {"x": x, "by_values": by_values}

    return run


def training(problem: dict[str, np.ndarray], warm: bool = False) -> Run:
    """Gradient descent on w, where A's values are values * (1 + 0.01 tanh(w))."""
    posed = _Posed(problem, warm)
    target, rate = torch.from_numpy(problem["target"]), float(problem["rate"])

    def run() -> dict[str, Any]:
        pattern = posed.pattern()

        def loss(w: Tensor) -> Tensor:
            A = fl.SparseMatrix(posed.values * (1 + 0.01 * w.tanh()), pattern)
            return (fl.lstsq(A, posed.b) - target).square().sum()

        w, step = torch.zeros_like(posed.values), torch.func.grad(loss)
        for _ in range(int(problem["steps"])):
            w = w - rate * step(w)
        return {"w": w}

    return run


def iterations(problem: dict[str, np.ndarray], double: bool = False) -> Run:
    """Seconds of every iteration of CGLS, run by run: the first run probes with two columns, the second solves."""
    posed = _Posed(problem, warm=True)
    moments: list[tuple[int, float]] = []

    def note(iteration: int, _: float) -> None:
        moments.append((iteration, time.perf_counter()))

    plain_products._SINGLE_ENTRIES = 10**12 if double else _SINGLE_ENTRIES  # from which single precision is tried
    solver = fl.CGLS(callback=note)

    def run() -> dict[str, Any]:
        moments.clear()
        fl.lstsq(fl.SparseMatrix(posed.values, posed.pattern()), posed.b, solver=solver)
        return {"iteration": [step for step, _ in moments], "moment": [moment for _, moment in moments]}

    return run


def copying(problem: dict[str, np.ndarray]) -> Run:
    """Copies 400 MB, which reads as much and writes as much."""
    source = torch.ones(50_000_000, dtype=torch.float64)
    target = torch.zeros_like(source)
    return lambda: {"copied": target.copy_(source)[:1]}


def about(_: str) -> dict[str, Any]:
    """Versions and threads."""
    return {"versions": {"functional_lstsq": fl.__version__, "torch": torch.__version__}} | about_torch()


WORKS = {
    "ours": {
        "solve": solve,
        "gradient": gradient,
        "columns": columns,
        "jacobian": jacobian,
        "training": training,
        "iterations": iterations,
        "copying": copying,
        "fit": by_ours,
    }
}
