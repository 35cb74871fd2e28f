"""What a command prints: a table for people, or one JSON object for scripts, or nothing."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import Solution, SparseMatrix, progress
from ..solvers.watching import Step
from . import command

_COLOURS = {"green": 32, "yellow": 33, "red": 31}


class Output:
    """Standard output as the options want it; errors go to standard error always.

    Args:
        quiet: print nothing.
        json: print nothing but one object, that of `record` or of `error`.
        colour: whether colour is allowed; it takes a terminal, and no NO_COLOR in the environment.
        rank: the place of this process among those that do the same together: the first one speaks for all.
    """

    def __init__(self, *, quiet: bool = False, json: bool = False, colour: bool = True, rank: int = 0):
        self.quiet, self.json, self.recorded, self.first = quiet or rank > 0, json, False, rank == 0
        self.file = sys.stdout  # None where it is closed
        command.as_json = json and not quiet
        here = self.file is not None and self.file.isatty() and os.environ.get("TERM") != "dumb"
        self.coloured = colour and here and not os.environ.get("NO_COLOR")

    def line(self, text: str = "") -> None:
        """Print a line for people."""
        if self.file is not None and not (self.quiet or self.json):
            print(text, file=self.file)

    def beside(self) -> None:
        """From now on to standard error: a result goes to standard output."""
        self.file, self.coloured = sys.stderr, False

    def table(self, rows: list[tuple[str, str]]) -> None:
        """Print names and values, one pair a line."""
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self.line(f"{name:<{width}}  {value}")

    def status(self, word: str) -> str:
        """A status, in colour where there is any: green for success, red for what is refused, yellow for the rest."""
        colour = {"converged": "green", "refused": "red", "rank deficient": "red"}.get(word, "yellow")
        return f"\x1b[{_COLOURS[colour]}m{word}\x1b[0m" if self.coloured else word

    def record(self, **record: Any) -> None:
        """Print the one object that scripts read; what would be a second one is left out."""
        if self.json and not self.quiet and not self.recorded:
            self.recorded, command.as_json = True, False
            print(json.dumps(_plain(record), allow_nan=False))

    def error(self, line: str, status: int, *, shared: bool = True) -> int:
        """Print an error, and give back the exit status; `shared` is what all ranks have."""
        if command.ending:  # and what goes wrong now is that files are gone
            return status
        command.leaving = status
        if shared and not self.first:
            return status
        with contextlib.suppress(OSError):  # nobody is left to be told
            if sys.stderr is not None:
                print(f"functional_lstsq: {line}", file=sys.stderr, flush=True)
            self.record(error=line, exit=status)
        return status


def _plain(what: Any) -> Any:
    """What JSON has: numbers as numbers, None for NaN and infinity."""
    if isinstance(what, dict):
        return {name: _plain(value) for name, value in what.items()}
    if isinstance(what, (list, tuple)):
        return [_plain(value) for value in what]
    if isinstance(what, float) and not math.isfinite(what):
        return None
    return what


class Progress:
    """A line on standard error, on a terminal only, once an iteration takes more than a second."""

    def __init__(self, out: Output):
        self.disable = True if out.quiet else None  # None: where there is no terminal

    def __enter__(self) -> Progress:
        self.bar = tqdm(desc="iterating", unit=" it", delay=1.0, disable=self.disable, leave=False)
        self.watch: Any = contextlib.nullcontext() if self.bar.disable else progress(self.step)
        self.watch.__enter__()
        return self

    def step(self, step: Step) -> None:
        """Called after each step."""
        self.bar.set_description(step.phase, refresh=False)
        self.bar.set_postfix(gradient=f"{step.error:.1e}", refresh=False)
        self.bar.update()

    def __exit__(self, *_: object) -> None:
        self.watch.__exit__(None, None, None)
        self.bar.close()


def worst(tensor: Tensor) -> float:
    """The largest of the columns' figures; 0 of none."""
    return float(tensor.max()) if tensor.numel() else 0.0


def figures(A: SparseMatrix, b: Tensor, solution: Solution, seconds: float) -> dict[str, Any]:
    """What is to be told of a solution; of the worst column where there are several."""
    info = solution.info
    relative = float(torch.linalg.vector_norm(solution.residual) / torch.linalg.vector_norm(b).clamp_min(1e-300))
    rank = int(info.rank.min()) if info.rank.numel() else -1
    return {
        "rows": A.shape[0],
        "columns": A.shape[1],
        "entries": A.nnz,
        "right_hand_sides": b.shape[1] if b.ndim == 2 else 1,
        "status": info.status,
        "method": info.method,
        "tried": info.tried,
        "iterations": int(worst(info.iterations)),
        "residual": relative,
        "optimality": worst(info.optimality),
        "forward_error": worst(info.forward_error),
        "condition": worst(info.condition),
        "rank": rank if rank >= 0 else None,
        "seconds": seconds,
    }


def described(told: dict[str, Any], out: Output) -> list[tuple[str, str]]:
    """The same as rows of a table."""
    m, n, columns = told["rows"], told["columns"], told["right_hand_sides"]
    kind, scaled = ("least squares", "columns") if m >= n or "at_lower" in told else ("least norm", "rows")
    at_bounds = [("at bounds", f"{told['at_lower']} lower, {told['at_upper']} upper")] if "at_lower" in told else []
    of_worst = ", figures of the worst" if columns > 1 else ""
    return [
        ("problem", f"{kind}, {m} x {n}, {told['entries']} entries, right-hand sides: {columns}{of_worst}"),
        ("status", out.status(told["status"])),
        ("method", told["method"]),
        ("tried", told["tried"]),
        *at_bounds,
        ("iterations", f"{told['iterations']}"),
        ("residual", f"{told['residual']:.2e}   |A x - b| / |b|"),
        ("optimality", f"{told['optimality']:.2e}   |A^H r| / (|A| |r|)"),
        ("estimated error", f"{told['forward_error']:.2e}   |x - exact| / |exact|"),
        ("condition", f"{told['condition']:.2e}   {scaled} scaled"),
        ("seconds", f"{told['seconds']:.3f}   of solving, reading and compiling left out"),
    ]
