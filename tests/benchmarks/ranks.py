"""How an iteration of CGLS grows with ranks: measured on 1, 2 and 4, a model fitted to that, and what it foretells.

    t = s (t_0 + t_e (1 + t_c share) entries + t_m rows + t_n n) + k l hops + bytes / w    (rows, entries of one rank)

s = max(1, ranks / cores) where ranks share cores; share is that of the other cores which are at work too, and wait for
the same memory; k all-reduces, of l seconds a hop, or l_s where cores are shared; hops = 2 log2(ranks), as of a tree;
bytes = 16 n (ranks - 1) / ranks, as of any all-reduce that sends no number twice.

2026-11-28, one all-reduce an iteration, 2 idle cores of an AMD EPYC: iteration / (local part + one sum) was 0.76 to
1.30 on 2 ranks in eight of nine sizes and 1.60 in one (100,000 rows a rank, n = 10,000), on 4 ranks 1.21 to 1.33.
Fitted: 1.77 ns an entry, 0.94 ns a row, 9.8 ns a column, 78 us a hop, 3.9 ns a byte. Foretold for 1,000 ranks and 1e11
entries: 277 ms an iteration at n = 1e5, of which the sum takes 0.23 ms at 100 Gbit/s and 5 us a hop; a second sum would
add 0.04 %, and a pipelined iteration takes 12 % longer.
"""

from __future__ import annotations

import datetime
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import problems
import scipy.optimize
import torch
import torch.distributed as dist
import torch.multiprocessing
from compare import duration, heading, markdown

import functional_lstsq as fl
from functional_lstsq.distributed.products import RowsOverRanks
from functional_lstsq.distributed.ranks import Ranks
from functional_lstsq.solvers.conjugate_gradients import cgls
from functional_lstsq.solvers.system import System
from functional_lstsq.sparse.plain_products import Operator

RANKS = "iteration of CGLS on ranks"
_SIZES = {1: (20_000, 100_000, 200_000, 400_000), 2: (20_000, 100_000, 200_000), 4: (20_000, 100_000)}  # rows a rank
_COLUMNS, _PER_ROW, _STEPS = (1_000, 10_000, 100_000), 8, 20
_CORES = os.cpu_count() or 1
_FAR = {  # name: (seconds a hop, seconds a byte)
    "100 Gbit/s, 5 us": (5e-6, 8e-11),
    "10 Gbit/s, 50 us": (5e-5, 8e-10),
}


class Point(NamedTuple):
    """Seconds on so many ranks: of an iteration, of its local part, of an all-reduce of n + 1 numbers and of one.

    They are the least of all calls: whatever else is at work on the machine only adds to them.
    """

    ranks: int
    rows: int
    n: int
    iteration: float
    local: float
    large: float
    small: float
    sums: int  # in an iteration


class _Alone:
    """In place of `Ranks`: what is summed is what is here."""

    def __init__(self) -> None:
        self.count = 0

    def sum(self, t: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return t

    max = sum


def report(repeats: int) -> str:
    """Tables: measured times, the model with its residuals, and what it foretells."""
    points: list[Point] = []
    for size in _SIZES:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_work, (size, folder, repeats), size)
            points += [Point(*numbers) for numbers in torch.load(f"{folder}/points.pt")]
    model = _fitted(points)
    return "\n\n".join([_measured(points), _scaling(points), _model(points, model), _foretold(model, points[-1].sums)])


# Measuring.


def _work(rank: int, size: int, folder: str, repeats: int) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store, timeout = dist.FileStore(f"{folder}/met", size), datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    found = [_point(size, rows, n, repeats) for n in _COLUMNS for rows in _SIZES[size]]
    if rank == 0:
        torch.save([tuple(point) for point in found], Path(folder) / "points.pt")
    dist.barrier()
    dist.destroy_process_group()


def _point(size: int, rows: int, n: int, repeats: int) -> Point:
    problem = problems.random(rows, n, _PER_ROW)
    indices = torch.from_numpy(np.stack([problem.rows, problem.columns]))
    A = fl.SparseMatrix(torch.from_numpy(problem.values), fl.SparsePattern(indices, (rows, n)))
    b = torch.from_numpy(problem.b)[None, :, None]
    ranks, numbers, one = Ranks.of(None), torch.zeros(n + 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

    def run(among: Ranks) -> Callable[[], object]:
        products = RowsOverRanks(Operator(A.pattern, A.values[None]), among, rows * size)
        system = System(products, None, 2.2e-16)
        inverse, c = system.norms.square().reciprocal(), b.new_zeros((1, n, 1))

        def goal(r: torch.Tensor, y: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
            return 0 * system.A.norm(r)

        return lambda: cgls(system, b, c, lambda g: g * inverse, goal, limit=_STEPS, inverse=inverse)

    alone = _Alone()
    works = [
        run(ranks),
        run(alone),
        lambda: [ranks.sum(numbers) for _ in range(_STEPS)],
        lambda: [ranks.sum(one) for _ in range(_STEPS)],
    ]
    times: list[list[float]] = [[] for _ in works]
    for turn in range(repeats + 1):
        for seconds, work in zip(times, works, strict=True):
            dist.barrier()
            start = time.perf_counter()
            work()
            if turn:  # the first one compiles, and touches memory
                seconds.append((time.perf_counter() - start) / _STEPS)
    alone.count = 0
    works[1]()
    return Point(size, rows, n, *(min(seconds) for seconds in times), alone.count // _STEPS)


def _counted(sums: int, of: str) -> str:
    return f"{sums} {of}{'' if sums == 1 else 's'}"


# Fitting.

_NAMES = ("t_0", "t_e, an entry", "t_c", "t_m, a row", "t_n, a column", "l, a hop", "l_s, a hop", "1 / w, a byte")


def _fitted(points: list[Point]) -> np.ndarray:
    """The constants of the model, all positive, of the least squares of logarithms of model over measurement."""

    def errors(logarithms: np.ndarray) -> np.ndarray:
        model, found = np.exp(logarithms), []
        for p in points:
            found.append(_iteration(p, model) / p.iteration)
            if p.ranks <= _CORES:  # on cores that are shared the local part without sums is as its turn comes
                found.append(_local(p, model) / p.local)
            if p.ranks > 1:
                found += [_sum(p.ranks, p.n + 1, model) / p.large, _sum(p.ranks, 1, model) / p.small]
        return np.log(found)

    start = np.log([1e-4, 2e-9, 0.5, 1e-9, 5e-9, 1e-4, 5e-4, 5e-10])
    bounds = np.log([1e-12] * 8), np.log([10.0] * 8)
    return np.exp(scipy.optimize.least_squares(errors, start, bounds=bounds, loss="soft_l1").x)


def _local(point: Point, model: np.ndarray) -> float:
    t_0, t_e, t_c, t_m, t_n = model[:5]
    others = (min(point.ranks, _CORES) - 1) / max(_CORES - 1, 1)
    entries = point.rows * _PER_ROW
    return max(1.0, point.ranks / _CORES) * (
        t_0 + t_e * (1 + t_c * others) * entries + t_m * point.rows + t_n * point.n
    )


def _sum(ranks: int, numbers: int, model: np.ndarray, sums: int = 1) -> float:
    """Seconds of so many all-reduces, of which one has so many numbers and others have few."""
    hop = model[5] if ranks <= _CORES else model[6]
    return sums * hop * 2 * math.log2(ranks) + model[7] * 16 * numbers * (ranks - 1) / ranks


def _iteration(point: Point, model: np.ndarray) -> float:
    return _local(point, model) + _sum(point.ranks, point.n + 1, model, point.sums)


# Telling.


def _measured(points: list[Point]) -> str:
    rows = []
    for p in points:
        ratio = "-" if p.ranks == 1 else f"{p.iteration / (p.local + p.large):.2f}"
        times = map(duration, (p.iteration, p.local, p.large, p.small))
        rows.append((str(p.ranks), f"{p.rows:,}", f"{p.n:,}", *times, ratio))
    names = (
        "ranks",
        "rows a rank",
        "n",
        "iteration",
        "local part",
        "sum of n + 1",
        "sum of 1",
        "iteration / (local + sum)",
    )
    return "\n".join(
        [
            f"An {RANKS}, {_PER_ROW} entries a row, one thread each, {_CORES} cores; the local part with all ranks",
            "running and no sums, all-reduces alone: the least of all calls.\n",
            heading(names),
            markdown(rows),
        ]
    )


def _scaling(points: list[Point]) -> str:
    by = {point[:3]: point.iteration for point in points}
    rows = []
    for n in _COLUMNS:
        strong = [by[1, 400_000, n], by[2, 200_000, n], by[4, 100_000, n]]
        weak = [by[1, 100_000, n], by[2, 100_000, n], by[4, 100_000, n]]
        told = [f"{strong[0] / (k * t):.0%}" for k, t in zip((2, 4), strong[1:], strict=True)]
        told += [f"{weak[0] / t:.0%}" for t in weak[1:]]
        rows.append((f"{n:,}", *told))
    names = ("n", "strong, 2 ranks", "strong, 4", "weak, 2 ranks", "weak, 4")
    note = "Efficiency: strong of 400,000 rows in all, weak of 100,000 on each rank (4 ranks share 2 cores).\n"
    return "\n".join([note, heading(names), markdown(rows)])


def _model(points: list[Point], model: np.ndarray) -> str:
    rows = [
        (name, f"{value:.2g}" if name == "t_c" else duration(value)) for name, value in zip(_NAMES, model, strict=True)
    ]
    errors = [
        (f"{p.ranks} x {p.rows:,} x {p.n:,}", duration(p.iteration), duration(t), f"{t / p.iteration - 1:+.0%}")
        for p in points
        for t in [_iteration(p, model)]
    ]
    said = f"The model, with {_counted(points[-1].sums, 'all-reduce')} an iteration, fitted to the iterations, "
    said += "local parts and sums:\n"
    residuals = [heading(("ranks x rows x n", "measured", "model", "residual")), markdown(errors)]
    return "\n".join([said, heading(("", "fitted")), markdown(rows), "", *residuals])


def _foretold(model: np.ndarray, sums: int) -> str:
    """1,000 ranks, 1e11 entries: each core a rank, as those here where all of them are at work; networks as sold."""
    ranks, entries = 1000, 10**8
    told = []
    for name, (hop, a_byte) in _FAR.items():
        for n in (10**5, 10**6, 10**7):
            entry = model[1] * (1 + model[2])
            here = model[0] + entry * entries + model[3] * entries / _PER_ROW + model[4] * n
            far = np.array([*model[:5], hop, hop, a_byte])
            once, twice = (_sum(ranks, n, far, count) for count in (1, 2))
            # A pipelined iteration has its sum on the way during the products, and updates a vector more of m and of
            # n, which moves 24 bytes a number, as much as an entry.
            pipelined = max(here, once) + entry * (entries / _PER_ROW + n)
            shares = [f"{twice / once - 1:+.1%}", f"{(here + twice) / (here + once) - 1:+.2%}"]
            shares.append(f"{pipelined / (here + once) - 1:+.1%}")
            told.append((name, f"{n:,}", *map(duration, (here, once, here + once)), *shares))
    names = ("network", "n", "local", "one sum", "iteration", "two sums: of the sum", "of the iteration", "pipelined")
    counted = f"here an iteration has {_counted(sums, 'sum')}"
    note = f"Foretold for 1,000 ranks, a core each, and 1e11 entries, {_PER_ROW} a row ({counted}):\n"
    return "\n".join([note, heading(names), markdown(told)])
