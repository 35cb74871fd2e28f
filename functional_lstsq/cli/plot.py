"""Draw the pattern of a matrix and how conjugate gradients converge on it, to a PNG or SVG file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from .. import CGLS, progress, solve
from ..plot import History, draw_history, in_words, pattern
from ..plot_parts import INSTALL
from .errors import BadInput
from .files import read_matrix, read_right
from .output import Output, Progress, worst
from .writing import check_outputs, save

NAME, HELP = "plot", "draw the pattern and the convergence to PNG or SVG"
EXAMPLES = """\
  functional-lstsq plot A.mtx.gz -o pattern.png --pattern-only
  functional-lstsq plot A.mtx b.mtx -o convergence.svg
  functional-lstsq plot A.mtx b.mtx -o long.png --iterations 20000
"""
_HEIGHT = 4.6  # inches


def add_arguments(job: argparse.ArgumentParser) -> None:
    """What `plot` takes."""
    job.add_argument("matrix", metavar="A.mtx[.gz]", help="the matrix; - for standard input")
    job.add_argument("right", metavar="b.mtx", nargs="?", help="right-hand sides, one a column (default: A times ones)")
    job.add_argument("-o", "--output", metavar="picture.png|.svg", required=True, help="the picture to write")
    job.add_argument("--pattern-only", action="store_true", help="draw the pattern and solve nothing")
    job.add_argument(
        "--iterations", type=positive, default=2000, metavar="N", help="of a run of conjugate gradients (default: 2000)"
    )


def positive(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def run(options: argparse.Namespace, out: Output) -> int:
    """Read, iterate, draw, tell."""
    Figure = _figure()
    check_outputs([options.matrix, options.right], [options.output])
    kind = Path(options.output).suffix.lower()
    if kind not in (".png", ".svg"):
        raise BadInput(f"cannot draw {options.output}: its name must end in .png or .svg")
    if options.pattern_only and options.right:
        raise BadInput(f"argument --pattern-only: solves nothing, so it takes no {options.right}")
    A = read_matrix(options.matrix)
    m, n = A.shape
    told: dict[str, Any] = {"rows": m, "columns": n, "entries": A.nnz}
    rows = [("matrix", f"{options.matrix}   {m} x {n}, {A.nnz} entries")]
    history = info = None
    if not options.pattern_only:
        b = read_right(options.right, A, options.matrix)
        b = A @ torch.ones(n, dtype=A.dtype) if b is None else b
        history = History()
        with Progress(out), progress(history):
            info = solve(A, b, solver=CGLS(max_iterations=options.iterations), throw=False).info
        told |= {
            "status": info.status,
            "iterations": history.iterations,
            "forward_error": worst(info.forward_error),
            "condition": worst(info.condition),
            "runs": [{"phase": phase, "gradients": sizes} for phase, sizes in history.phases.items() if sizes],
        }
        error, condition = in_words(info)
        rows += [
            ("status", out.status(info.status)),
            ("iterations", f"{told['iterations']}, {len(next(iter(history.phases.values())))} of them of the search"),
            ("estimated error", f"{error}   |x - exact| / |exact|"),
            ("condition", f"{condition}   {'columns' if m >= n else 'rows'} scaled"),
        ]
    aspect = min(max(m / max(1, n), 0.75), 1.6)
    widths = [_HEIGHT / aspect + 2, 7.0][: 1 if history is None else 2]
    figure = Figure(figsize=(sum(widths), _HEIGHT + 1), layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    figure.suptitle(Path(options.matrix).name)
    pattern(A, axes[0])
    if history is not None and info is not None:
        draw_history(axes[1], history, info, "columns" if m >= n else "rows")
    _save(figure, options.output, kind[1:])
    out.table([*rows, ("picture", options.output)])
    out.record(command=NAME, matrix=options.matrix, **told, picture=options.output)
    return 0


def _figure() -> Any:
    """matplotlib is loaded for this command alone, and not everyone has it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput(INSTALL) from None
    return Figure


def _save(figure: Any, name: str, kind: str) -> None:
    from matplotlib import rc_context

    # Text as text, and nothing that differs from one run to the next.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "functional_lstsq"}):
        metadata = {"Date": None} if kind == "svg" else None
        save(name, lambda file: figure.savefig(file, format=kind, dpi=150, metadata=metadata))
