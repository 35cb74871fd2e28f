"""`solve` on the ranks of torchrun: each reads its own rows, the solution is the same on all, the first one writes it.

What goes wrong on any rank is one error on all of them, since `Ranks.checked` tells it to all before it is raised.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .. import CGLS, Auto, Dense, distributed
from .. import solve as solve_problem
from ..distributed.ranks import Ranks
from .checkpoints import Checkpoint
from .errors import BadInput
from .output import Output, Progress, described, figures
from .ranks import joined
from .shared_files import read_columns, read_matrix
from .sources import STANDARD
from .timing import warm_up
from .writing import check_outputs, write

_ALONE = ("gradient", "robust", "threshold", "nonnegative", "lower", "upper", "minimum_norm")  # for one process
_SOLVERS = {"auto": Auto(), "dense": Dense(), "cgls": CGLS()}
_CPU = torch.device("cpu")


def add_arguments(job: argparse.ArgumentParser) -> None:
    """What `solve` takes on ranks only."""
    job.add_argument(
        "--timeout", type=float, metavar="S", default=600.0, help="seconds that ranks wait for another (default: 600)"
    )

    job.add_argument("--checkpoint", metavar="FILE", help="on ranks: write x there now and then, while it is iterated")
    job.add_argument("--every", type=float, metavar="S", default=300.0, help="seconds between two (default: 300)")
    job.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint, if it is there; on any number of ranks"
    )


def run(options: argparse.Namespace, out: Output) -> int:
    """Read, solve, write, tell, as `solve` does in one process."""
    for name in _ALONE:
        if getattr(options, name) not in (None, False):
            raise BadInput(f"argument --{name.replace('_', '-')}: not allowed on the ranks of torchrun")
    if options.solver not in _SOLVERS:
        raise BadInput(f"argument --solver: must be {', '.join(_SOLVERS)} on the ranks of torchrun")
    if not options.timeout > 0:
        raise BadInput(f"argument --timeout: must be positive, got {options.timeout:g}")
    if not options.every >= 0:
        raise BadInput(f"argument --every: must not be negative, got {options.every:g}")
    if options.checkpoint == STANDARD:
        raise BadInput("argument --checkpoint: must be a file")
    if options.resume and options.checkpoint is None:
        raise BadInput("argument --resume: from which --checkpoint FILE?")
    with joined(options.timeout) as ranks:
        return _run(options, out, ranks)


def by_first(ranks: Ranks, work: Callable[[], object]) -> None:
    """Have the first rank do something that is done once; what goes wrong is an error on all."""
    ranks.checked(lambda: (None if ranks.place else work(), {}), _CPU)


def _run(options: argparse.Namespace, out: Output, ranks: Ranks) -> int:
    inputs = [options.matrix, options.right, options.weights]
    by_first(ranks, lambda: check_outputs(inputs, [options.output, options.checkpoint], json=options.json))
    if options.output == STANDARD:
        out.beside()
    held = read_matrix(options.matrix, ranks)
    A, solver = distributed.shard_rows(held.matrix), _SOLVERS[options.solver]
    if options.right is None:
        b = A.rows @ torch.ones(A.shape[1], dtype=A.dtype)
    else:
        b = read_columns(options.right, held, options.matrix, ranks)
        b = b[:, 0] if b.shape[1] == 1 else b
    weights = None if options.weights is None else read_columns(options.weights, held, options.matrix, ranks)

    def checked() -> tuple[Any, dict]:
        if weights is None:
            return None, {}
        if weights.shape[1] != 1 or weights.is_complex():
            what = "complex ones" if weights.is_complex() else f"{weights.shape[1]}"
            raise BadInput(f"{options.weights} must hold one column of real weights, got {what}")
        if bool((weights < 0).any()):
            raise BadInput(f"{options.weights} must hold no negative weight, got {float(weights.min()):g}")
        return weights[:, 0], {}

    settings = {"damp": options.damp, "weights": ranks.checked(checked, _CPU), "refine": options.refine}
    checkpoint = Checkpoint(options.checkpoint, options.every, ranks)
    x0 = checkpoint.read((A.shape[1], *b.shape[1:]), torch.result_type(A.values, b)) if options.resume else None
    warm_up(solver, derivatives=False)
    start = time.perf_counter()
    with Progress(out), checkpoint.written():
        solution = solve_problem(A, b, solver=solver, x0=x0, **settings)
    told = figures(held.matrix, b, solution, time.perf_counter() - start)
    sizes = [torch.linalg.vector_norm(t).square() for t in (solution.residual, b)]
    residual, whole = ranks.sum(torch.stack(sizes)).sqrt().tolist()
    told |= {"rows": A.height, "entries": held.entries, "residual": residual / max(whole, 1e-300)}
    if options.damp:
        told["rank"] = min(A.shape)
    if options.output:
        x = solution.x.reshape(A.shape[1], -1 if solution.x.ndim == 2 else 1).numpy()
        by_first(ranks, lambda: write(options.output, x))
    asked = {"weights": options.weights, "damp": options.damp, "checkpoint": options.checkpoint}
    told["resumed"] = x0 is not None
    told_too = ", ".join(f"{name} {value}" for name, value in asked.items() if value is not None)
    rows = [int(count) for count in np.diff(held.ends)]
    between = f"{min(rows)} to {max(rows)} rows on each"
    table = [*described(told, out), ("ranks", f"{ranks.size}, {between}")]
    if options.resume:
        table.append(("resumed", "from the checkpoint" if x0 is not None else "not: there was no checkpoint yet"))
    out.table(table + ([("asked for", told_too)] if told_too else []))
    out.record(command="solve", matrix=options.matrix, **told, **asked, solution=options.output, ranks=rows)
    return 0
