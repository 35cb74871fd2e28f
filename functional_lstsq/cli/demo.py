"""Make a levelling network, solve it, differentiate it, and check the gradient against finite differences."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from .. import SparseMatrix, SparsePattern, eye, lstsq, solve, vstack
from . import demo_ranks
from .errors import BadInput
from .output import Output, described, figures
from .timing import warm_up

NAME, HELP = "demo", "make a levelling network, solve it, differentiate it, check the gradient"
EXAMPLES = """\
  functional-lstsq demo
  functional-lstsq demo --json
  functional-lstsq demo --ranks 2                      # rows on two processes, of which one is killed in the end
"""
_SIDE = 150  # stations along one side of the larger network


def add_arguments(job: argparse.ArgumentParser) -> None:
    """What `demo` takes."""
    job.add_argument(
        "--ranks", type=int, metavar="N", help="the same answer from 1 and N processes, and how one is lost"
    )


def levelling_network(stations: int, lines: int, seed: int = 0) -> tuple[SparsePattern, Tensor, Tensor, Tensor]:
    """(pattern, values, measured, weights) of a made levelling network in metres.

    Each measurement is the difference of two stations' heights, with an error of 1 mm per square root of a km; the last
    row fixes the height of station 0.
    """
    generator = torch.Generator().manual_seed(seed)
    place = 10 * torch.rand(stations, 2, generator=generator, dtype=torch.float64)  # km
    height = 100 * torch.rand(stations, generator=generator, dtype=torch.float64)  # m
    chain = torch.stack([torch.arange(stations - 1), torch.arange(1, stations)])
    others = torch.randint(stations, (2, lines - stations), generator=generator)
    others[1] = torch.where(others[0] == others[1], (others[1] + 1) % stations, others[1])
    ends = torch.cat([chain, others], 1)
    count = ends.shape[1]
    row = torch.arange(count)
    rows, columns = torch.cat([row, row, row.new_tensor([count])]), torch.cat([ends[0], ends[1], ends.new_tensor([0])])
    values = torch.cat([-torch.ones(count), torch.ones(count + 1)]).double()
    length = (place[ends[0]] - place[ends[1]]).norm(dim=1).clamp_min(0.1)  # km
    sigma = torch.cat([1e-3 * length.sqrt(), torch.tensor([1e-4], dtype=torch.float64)])  # m
    error = sigma * torch.randn(count + 1, generator=generator, dtype=torch.float64)
    exact = torch.cat([height[ends[1]] - height[ends[0]], height[:1]])
    pattern = SparsePattern(torch.stack([rows, columns]), (count + 1, stations))
    return pattern, values, exact + error, 1 / sigma**2


def run(options: argparse.Namespace, out: Output) -> int:
    """Solve, differentiate, compare."""
    if options.ranks is not None:
        if not 2 <= options.ranks <= demo_ranks.MOST:
            raise BadInput(f"argument --ranks: must be from 2 to {demo_ranks.MOST}, got {options.ranks}")
        return demo_ranks.run(options.ranks, out)
    stations, lines = 500, 1500
    pattern, values, measured, weights = levelling_network(stations, lines)
    A = SparseMatrix(values, pattern)
    out.line(f"A levelling network: {stations} heights from {lines} measured differences and one datum, by weights.\n")
    warm_up(None)
    start = time.perf_counter()
    solution = solve(A, measured, weights=weights)
    told = figures(A, measured, solution, time.perf_counter() - start)
    out.table(described(told, out))

    def height(A: SparseMatrix, b: Tensor) -> Tensor:
        return lstsq(A, b, weights=weights)[-1]

    by_A, by_b = torch.func.grad(height, argnums=(0, 1))(A, measured)
    strongest = by_b[:-1].abs().topk(3).indices.tolist()
    out.line(f"\nStation {stations - 1} lies at {float(solution.x[-1]):.4f} m. The measurements that move it most:")
    for k in strongest:
        first, second = (int(pattern.indices[1, k + side * (lines - 1)]) for side in (0, 1))
        out.line(f"  from station {first:3d} to {second:3d}: {float(by_b[k]):+.3f} m per m")

    generator = torch.Generator().manual_seed(1)
    out.line("\nGradient against central differences, along a random direction:")
    worst = 0.0
    for name, gradient, shifted in (
        ("by the values of A", by_A.values, lambda d: height(SparseMatrix(values + d, pattern), measured)),
        ("by b", by_b, lambda d: height(A, measured + d)),
    ):
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        step = 1e-6
        numeric = float(shifted(step * direction) - shifted(-step * direction)) / (2 * step)
        exact = float(gradient @ direction)
        difference = abs(numeric - exact) / abs(exact)
        worst = max(worst, difference)
        out.line(f"  {name:<20}{exact:+.8f}   {numeric:+.8f}   relative difference {difference:.0e}")
    if worst > 1e-5:
        return out.error(f"the gradient disagrees with finite differences by {worst:.0e}", 1)
    large = _large(out)
    out.record(command=NAME, **told, height=float(solution.x[-1]), gradient_difference=worst, large=large)
    return 0


def levelling_grid(side: int) -> SparseMatrix:
    """Differences between neighbours on a square grid of side x side stations, and the height of the first."""
    nodes = torch.arange(side * side).reshape(side, side)
    along = torch.stack([nodes[:, :-1].reshape(-1), nodes[:, 1:].reshape(-1)])
    ends = torch.cat([along, torch.stack([nodes[:-1].reshape(-1), nodes[1:].reshape(-1)])], 1)
    count, size = ends.shape[1], side * side
    pattern = SparsePattern(torch.stack([torch.arange(count).repeat(2), ends.reshape(-1)]), (count, size))
    differences = SparseMatrix(torch.cat([-torch.ones(count), torch.ones(count)]).double(), pattern)
    return vstack([differences, eye(1, size)])


def _large(out: Output) -> dict[str, Any]:
    """A network that no dense matrix would do for: how long each step takes, and why."""
    A = levelling_grid(_SIDE)
    m, n = A.shape
    generator = torch.Generator().manual_seed(2)
    heights = 100 * torch.rand(n, generator=generator, dtype=torch.float64)
    b = A @ heights + 1e-3 * torch.randn(m, generator=generator, dtype=torch.float64)
    out.line(
        f"\nA larger one, a grid: {n} heights from {m - 1} differences; dense, A would take {8e-9 * m * n:.1f} GB.\n"
    )
    seconds, solution = {}, None
    for name, compute in (
        ("analysis, factor and solution", lambda: solve(A, b)),
        ("the same on a pattern known by now", lambda: solve(A, b)),
        ("solution and gradient by A and b", lambda: torch.func.grad(lambda A, b: lstsq(A, b)[-1], (0, 1))(A, b)),
    ):
        start = time.perf_counter()
        result = compute()
        seconds[name] = time.perf_counter() - start
        solution = result if solution is None else solution
    assert solution is not None
    rows = [(name, f"{taken:.3f} s") for name, taken in seconds.items()]
    error = float(solution.info.forward_error)
    out.table([*rows, ("tried", solution.info.tried), ("estimated error", f"{error:.2e}   |x - exact| / |exact|")])
    return {"rows": m, "columns": n, "seconds": seconds, "tried": solution.info.tried, "forward_error": error}
