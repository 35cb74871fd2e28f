"""`solve` on the ranks of torchrun: each reads its own rows, the solution is the same on all, the first one writes it.

What goes wrong on any rank is one error on all of them, since `Ranks.checked` tells it to all before it is raised.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
import torch

from .. import CGLS, Auto, Dense, Direct, distributed
from ..distributed.ranks import Ranks
from .checkpoints import Checkpoint
from .errors import BadInput
from .files import read_bounds
from .output import Output, Progress, described, figures
from .ranks import joined
from .shared_files import own_part, read_columns, read_matrix
from .sources import STANDARD
from .timing import solved, warm_up
from .writing import check_outputs, write

_ALONE = ("robust", "threshold")  # for one process
# What iterates towards something else than x, or not at all.
_NO_CHECKPOINT = ("nonnegative", "lower", "upper", "minimum_norm")
SOLVERS = {"auto": Auto(), "dense": Dense(), "direct": Direct(), "cgls": CGLS()}
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
    if not options.timeout > 0:
        raise BadInput(f"argument --timeout: must be positive, got {options.timeout:g}")
    if not options.every >= 0:
        raise BadInput(f"argument --every: must not be negative, got {options.every:g}")
    if options.checkpoint == STANDARD:
        raise BadInput("argument --checkpoint: must be a file")
    if options.resume and options.checkpoint is None:
        raise BadInput("argument --resume: from which --checkpoint FILE?")
    for name in _NO_CHECKPOINT if options.checkpoint is not None else ():
        if getattr(options, name) not in (None, False):
            raise BadInput(f"argument --checkpoint: not allowed with --{name.replace('_', '-')}")
    if STANDARD in (options.lower, options.upper):
        raise BadInput("cannot read -: many ranks need a file of bounds that each can open")
    with joined(options.timeout) as ranks:
        return _run(options, out, ranks)


def by_all(ranks: Ranks, work: Callable[[], object]) -> None:
    """Have every rank do something; what goes wrong on one is an error on all."""
    ranks.checked(lambda: (work(), {}), _CPU)


def by_first(ranks: Ranks, work: Callable[[], object]) -> None:
    """Have the first rank do something that is done once."""
    by_all(ranks, lambda: None if ranks.place else work())


def _run(options: argparse.Namespace, out: Output, ranks: Ranks) -> int:
    inputs = [options.matrix, options.right, options.weights, options.lower, options.upper]
    part = ranks.checked(lambda: (_checked_outputs(options, inputs, ranks), {}), _CPU)
    if options.output == STANDARD:
        out.beside()
    held = read_matrix(options.matrix, ranks)
    A = distributed.shard_rows(held.matrix)
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

    if A.height < A.shape[1] and not (options.damp or options.minimum_norm or _bounded(options)):
        size = f"{A.height} x {A.shape[1]}"
        raise BadInput(f"the matrix, {size}, has fewer rows than columns: ranks need --minimum-norm or --damp for it")
    settings = {
        "damp": options.damp,
        "weights": ranks.checked(checked, _CPU),
        "bounds": ranks.checked(lambda: (read_bounds(options, held.matrix, b), {}), _CPU),
        "rank_deficient": "minimum_norm" if options.minimum_norm else "raise",
        "refine": options.refine,
        "solver": SOLVERS[options.solver],
    }
    checkpoint = Checkpoint(options.checkpoint, options.every, ranks)
    x0 = checkpoint.read((A.shape[1], *b.shape[1:]), torch.result_type(A.values, b)) if options.resume else None
    warm_up(settings["solver"], derivatives=part is not None)
    start = time.perf_counter()
    with Progress(out), checkpoint.written():
        solution, gradient = solved(A, b, settings | {"x0": x0}, gradient=part is not None)
    told = figures(held.matrix, b, solution, time.perf_counter() - start)
    sizes = [torch.linalg.vector_norm(t).square() for t in (solution.residual, b)]
    residual, whole = ranks.sum(torch.stack(sizes)).sqrt().tolist()
    told |= {"rows": A.height, "entries": held.entries, "residual": residual / max(whole, 1e-300)}
    if options.damp:
        told["rank"] = min(A.shape)
    if settings["bounds"] is not None:
        told["at_lower"], told["at_upper"] = (int((solution.info.active == side).sum()) for side in (-1, 1))
    if options.output:
        x = solution.x.reshape(A.shape[1], -1 if solution.x.ndim == 2 else 1).numpy()
        by_first(ranks, lambda: write(options.output, x))
    if part is not None:
        values, where = gradient.values.resolve_conj().numpy(), held.matrix.pattern
        entries = scipy.sparse.coo_array((values, where.indices.numpy()), where.shape)
        by_all(ranks, lambda: write(part, entries))
    asked = {name: getattr(options, name) for name in ("weights", "damp", "lower", "upper", "checkpoint")}
    if options.nonnegative:
        asked["lower"] = "0"
    told["resumed"] = x0 is not None
    told_too = ", ".join(f"{name} {value}" for name, value in asked.items() if value is not None)
    rows = [int(count) for count in np.diff(held.ends)]
    between = f"{min(rows)} to {max(rows)} rows on each"
    table = [*described(told, out), ("ranks", f"{ranks.size}, {between}")]
    if options.resume:
        table.append(("resumed", "from the checkpoint" if x0 is not None else "not: there was no checkpoint yet"))
    out.table(table + ([("asked for", told_too)] if told_too else []))
    files = {"solution": options.output, "gradient": options.gradient}
    out.record(command="solve", matrix=options.matrix, **told, **asked, **files, ranks=rows)
    return 0


def _bounded(options: argparse.Namespace) -> bool:
    return options.nonnegative or options.lower is not None or options.upper is not None


def _checked_outputs(options: argparse.Namespace, inputs: list[str | None], ranks: Ranks) -> str | None:
    """The file for this rank's rows of a gradient, if one is asked for; the first rank writes all else."""
    part = None if options.gradient is None else own_part(options.gradient, ranks)
    outputs = [part] if ranks.place else [options.output, options.checkpoint, part]
    check_outputs(inputs, outputs, json=options.json)
    return part
