"""The command line: solve a Matrix Market file, or see a demonstration."""

from __future__ import annotations

import argparse
import gzip
import os
import sys
import time
from pathlib import Path

import numpy as np
import scipy.io
import scipy.sparse
import torch
from torch import Tensor
from tqdm import tqdm

from . import CGLS, Auto, Solution, SparseMatrix, SparsePattern, __version__, lstsq, solve


class BadInput(Exception):
    """Something the user gave cannot be used; the message is one line."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 solved, 1 no answer that can be vouched for, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m functional_lstsq", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    job = commands.add_parser(
        "solve",
        help="solve min |A x - b| from Matrix Market files",
        description="Solve min |A x - b|^2 + D^2 |x|^2 for a matrix in Matrix Market format, and say how right it is.",
        epilog="example: python -m functional_lstsq solve A.mtx.gz b.mtx -o x.mtx --gradient G.mtx",
        allow_abbrev=False,
    )
    job.add_argument("matrix", metavar="A.mtx[.gz]", help="the matrix")
    job.add_argument("right", metavar="b.mtx", nargs="?", help="right-hand sides, one a column (default: A times ones)")
    job.add_argument("-o", "--output", metavar="x.mtx", help="write the solution")
    job.add_argument("--damp", type=float, metavar="D", help="damping, at least 0")
    job.add_argument("--gradient", metavar="G.mtx", help="write the gradient of sum(x) by the entries of A")
    job.add_argument("--minimum-norm", action="store_true", help="accept A without full rank: the x of least norm")
    commands.add_parser("demo", help="make a levelling network, solve it, differentiate it, check the gradient")
    options = parser.parse_args(arguments)
    try:
        status = _demo() if options.command == "demo" else _solve(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except torch.linalg.LinAlgError as error:
        print(f"functional_lstsq: {_line(error)}", file=sys.stderr)
        return 1
    except (BadInput, ValueError, TypeError, MemoryError, OSError, RuntimeError) as error:
        print(f"functional_lstsq: {_line(error)}", file=sys.stderr)
        return 2


def _line(error: Exception) -> str:
    """One line, in the words of the command line."""
    words = {"rank_deficient='minimum_norm'": "--minimum-norm", "damp > 0": "--damp D with D > 0"}
    line = " ".join(str(error).split())
    for ours, theirs in words.items():
        line = line.replace(ours, theirs)
    return line


def _solve(options: argparse.Namespace) -> int:
    _check_files(options)
    matrix = _read(options.matrix)
    if not scipy.sparse.issparse(matrix):
        matrix = scipy.sparse.coo_array(matrix)
    A = SparseMatrix.from_scipy(matrix)
    if not A.values.isfinite().all():
        raise BadInput(f"{options.matrix} holds NaN or infinity")
    if A.dtype in (torch.float32, torch.complex64):
        A = A.to(torch.promote_types(A.dtype, torch.float64))
    b = _right(options, A)
    start = time.perf_counter()
    with _Progress() as progress:
        settings = {
            "damp": options.damp,
            "solver": Auto(cgls=CGLS(callback=progress.step)),
            "rank_deficient": "minimum_norm" if options.minimum_norm else "raise",
        }
        if options.gradient:
            gradient, solution = torch.func.grad(_loss, has_aux=True)(A, b, settings)
        else:
            solution = solve(A, b, **settings)
    seconds = time.perf_counter() - start
    _print_table(_describe(A, b, solution, seconds))
    if options.output:
        _write(options.output, solution.x.reshape(A.shape[1], -1).numpy())
    if options.gradient:
        entries = gradient.values.resolve_conj().numpy()
        _write(options.gradient, scipy.sparse.coo_array((entries, A.pattern.indices.numpy()), A.shape))
    return 0


def _check_files(options: argparse.Namespace) -> None:
    """Refuse before any work what could not be written after it, or would overwrite what is needed."""
    inputs = {Path(name).resolve() for name in (options.matrix, options.right) if name}
    outputs = [name for name in (options.output, options.gradient) if name is not None]
    for name in outputs:
        path = Path(name)
        if not name or path.is_dir():
            raise BadInput(f"cannot write {name!r}: not the name of a file")
        if not path.parent.is_dir():
            raise BadInput(f"cannot write {path}: {path.parent} is not a folder")
        if path.resolve() in inputs:
            raise BadInput(f"cannot write {path}: it is an input too")
    if len({Path(name).resolve() for name in outputs}) < len(outputs):
        raise BadInput(f"cannot write both results to {outputs[0]}")


def _loss(A: SparseMatrix, b: Tensor, settings: dict) -> tuple[Tensor, Solution]:
    solution = solve(A, b, **settings)
    return solution.x.sum().real, solution


def _right(options: argparse.Namespace, A: SparseMatrix) -> Tensor:
    if options.right is None:
        return A @ torch.ones(A.shape[1], dtype=A.dtype)
    right = _read(options.right)
    right = right.toarray() if scipy.sparse.issparse(right) else np.asarray(right)
    if right.shape[0] != A.shape[0]:
        raise BadInput(f"{options.right} has {right.shape[0]} rows, {options.matrix} has {A.shape[0]}")
    if not right.shape[1]:
        raise BadInput(f"{options.right} has no columns")
    if not np.isfinite(right).all():
        raise BadInput(f"{options.right} holds NaN or infinity")
    b = torch.tensor(right if np.iscomplexobj(right) else right.astype(float))
    return b[:, 0] if b.shape[1] == 1 else b


def _read(name: str):
    path = Path(name)
    if not path.is_file():
        raise BadInput(f"cannot read {name}: {'not a file' if path.exists() else 'no such file'}")
    if not path.stat().st_size:
        raise BadInput(f"cannot read {name}: the file is empty")
    try:
        return scipy.io.mmread(name)
    except Exception as error:  # the reader's errors are of many types
        raise BadInput(f"cannot read {name} as a Matrix Market file: {_line(error)}") from None


def _write(name: str, what) -> None:
    try:
        with gzip.open(name, "wb") if name.endswith(".gz") else open(name, "wb") as file:
            scipy.io.mmwrite(file, what, precision=17, symmetry="general")
    except OSError as error:
        raise BadInput(f"cannot write {name}: {error.strerror}") from None


def _describe(A: SparseMatrix, b: Tensor, solution: Solution, seconds: float) -> list[tuple[str, str]]:
    info = solution.info
    relative = float(torch.linalg.vector_norm(solution.residual) / torch.linalg.vector_norm(b).clamp_min(1e-300))
    kind = "least squares" if A.shape[0] >= A.shape[1] else "least norm"
    columns = b.shape[1] if b.ndim == 2 else 1
    of_worst = ", figures of the worst" if columns > 1 else ""

    def worst(tensor: Tensor) -> float:
        return float(tensor.max()) if tensor.numel() else 0.0

    return [
        ("problem", f"{kind}, {A.shape[0]} x {A.shape[1]}, {A.nnz} entries, right-hand sides: {columns}{of_worst}"),
        ("status", info.status),
        ("method", info.method),
        ("tried", info.tried),
        ("iterations", f"{worst(info.iterations):.0f}"),
        ("residual", f"{relative:.2e}   |A x - b| / |b|"),
        ("optimality", f"{worst(info.optimality):.2e}   |A^H r| / (|A| |r|)"),
        ("estimated error", f"{worst(info.forward_error):.2e}   |x - exact| / |exact|"),
        ("condition", f"{worst(info.condition):.2e}   columns scaled"),
        ("seconds", f"{seconds:.3f}"),
    ]


def _print_table(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


class _Progress:
    """A line on standard error, on a terminal only, once a solve takes more than a second."""

    def __enter__(self) -> _Progress:
        self.bar = tqdm(desc="iterating", unit=" it", delay=1.0, disable=None, leave=False)
        return self

    def step(self, iteration: int, gradient: float) -> None:
        """Called by the solver after each iteration."""
        self.bar.set_postfix(gradient=f"{gradient:.1e}", refresh=False)
        self.bar.update()

    def __exit__(self, *_: object) -> None:
        self.bar.close()


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


def _demo() -> int:
    stations, lines = 500, 1500
    pattern, values, measured, weights = levelling_network(stations, lines)
    A = SparseMatrix(values, pattern)
    print(f"A levelling network: {stations} heights from {lines} measured differences and one datum, by weights.\n")
    start = time.perf_counter()
    solution = solve(A, measured, weights=weights)
    _print_table(_describe(A, measured, solution, time.perf_counter() - start))

    def height(A: SparseMatrix, b: Tensor) -> Tensor:
        return lstsq(A, b, weights=weights)[-1]

    by_A, by_b = torch.func.grad(height, argnums=(0, 1))(A, measured)
    strongest = by_b[:-1].abs().topk(3).indices.tolist()
    print(f"\nStation {stations - 1} lies at {float(solution.x[-1]):.4f} m. The measurements that move it most:")
    for k in strongest:
        first, second = (int(pattern.indices[1, k + side * (lines - 1)]) for side in (0, 1))
        print(f"  from station {first:3d} to {second:3d}: {float(by_b[k]):+.3f} m per m")

    generator = torch.Generator().manual_seed(1)
    print("\nGradient against central differences, along a random direction:")
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
        print(f"  {name:<20}{exact:+.8f}   {numeric:+.8f}   relative difference {difference:.0e}")
    if worst > 1e-5:
        print("the gradient disagrees with finite differences", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
