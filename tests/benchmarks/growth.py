"""How our own time grows with the entries of A and with right-hand sides, and how an iteration compares with memory."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from statistics import median

import cases
import numpy as np
import problems
from client import Client, Failed
from compare import duration, heading, markdown

ITERATION = "iteration of CGLS, random 200,000 x 20,000"
GROWTH = "growth with entries and right-hand sides"
_ENTRIES = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
_COLUMNS = tuple(2**k for k in range(10))
Points = list[tuple[int, float]]


def iteration(ours: Client, repeats: int, folder: Path) -> str:
    """Seconds of an iteration of CGLS beside what moving its numbers through memory takes."""
    problem = cases.arrays(problems.random(200_000, 20_000))
    (m, n), entries = (int(size) for size in problem["shape"]), len(problem["values"])
    path, answer = folder / "problem.npz", folder / "answer.npz"
    np.savez(path, **problem)
    rows = []
    try:
        ours.forget()
        ours.load("copying", "copying", path, {})
        ours.call("copying")
        bandwidth = 8e8 / median(ours.call("copying") for _ in range(max(5, repeats)))
        for label, double in (("default settings", False), ("double precision throughout", True)):
            ours.load("iterations", "iterations", path, {"double": double})
            ours.call("iterations")
            runs = []
            for _ in range(repeats):
                ours.call("iterations", save=answer)
                runs.append(_main_run(answer))
            seconds, count = median(run[0] for run in runs), runs[0][1]
            bounds = [_least(entries, m, n, size) / bandwidth for size in (8, 4)]
            ratios = [f"{seconds / bound:.2f}" for bound in bounds]
            rows.append((label, str(count), duration(seconds), *map(duration, bounds), *ratios))
    except Failed as failure:
        return f"{ITERATION}: {failure}"
    names = ("CGLS", "iterations", "time of one", "bound, float64", "bound, float32", "to the first", "to the second")
    return "\n".join(
        [
            f"An {ITERATION}, of the run that solves. The bound is {bandwidth / 1e9:.1f} GB/s, at which 400 MB are",
            "copied here, for A once in each orientation (int32 indices) and 10 vectors of m and 8 of n numbers. With",
            "default settings the library may iterate in single precision; then the second bound is what counts.",
            "",
            heading(names),
            markdown(rows),
        ]
    )


def _main_run(answer: Path) -> tuple[float, int]:
    """Seconds of an iteration, and iterations, of the longest run after the first, which only probes."""
    with np.load(answer) as file:
        steps, moments = file["iteration"], file["moment"]
    starts = [*np.flatnonzero(steps == 1), len(steps)]
    runs = [moments[first:end] for first, end in itertools.pairwise(starts)]
    main = max(runs[1:], key=len)
    return (main[-1] - main[0]) / (len(main) - 1), len(main)


def _least(entries: int, m: int, n: int, size: int) -> int:
    return 2 * entries * (size + 4) + (10 * m + 8 * n) * size


def growth(ours: Client, repeats: int, folder: Path, file: Path) -> str:
    """Two small tables, and a plot of them where matplotlib is there."""
    by_entries = _series(ours, repeats, folder, _ENTRIES, "gradient", _of_entries)
    by_columns = _series(ours, repeats, folder, _COLUMNS, "columns", _of_columns)
    said = [_table("entries", "entry", by_entries), "", _table("right-hand sides", "right-hand side", by_columns), ""]
    said.append(_plot(by_entries, by_columns, file))
    return "\n".join(said)


def _of_entries(entries: int) -> cases.Arrays:
    m = entries // 8
    return cases.arrays(problems.random(m, m // 10))


def _of_columns(count: int) -> cases.Arrays:
    return cases.with_columns(cases.arrays(problems.random(20_000, 2_000)), count)


def _series(ours: Client, repeats: int, folder: Path, sizes: tuple[int, ...], work: str, make) -> Points:
    points, path = [], folder / "problem.npz"
    for size in sizes:
        problem = make(size)
        np.savez(path, **problem)
        try:
            ours.forget()
            ours.load("growth", work, path, {})
            ours.call("growth")
            seconds = median(ours.call("growth") for _ in range(repeats))
        except Failed:  # larger ones would take longer still
            break
        points.append((len(problem["values"]) if work == "gradient" else size, seconds))
    return points


def _table(name: str, one: str, points: Points) -> str:
    rows, before = [], None
    for size, seconds in points:
        exponent = "-"
        if before is not None:
            exponent = f"{math.log(seconds / before[1]) / math.log(size / before[0]):.2f}"
        rows.append((f"{size:,}", duration(seconds), duration(seconds / size), exponent))
        before = size, seconds
    return f"{heading((name, 'value and gradient', 'time / ' + one, 'growth, as a power'))}\n{markdown(rows)}"


def _plot(by_entries: Points, by_columns: Points, file: Path) -> str:
    try:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "no plot: matplotlib is not installed here"
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    titles = ("random, m = entries / 8, n = m / 10", "random 20,000 x 2,000")
    labels = ("stored entries", "right-hand sides")
    for axes, points, title, label in zip(panels, (by_entries, by_columns), titles, labels, strict=True):
        if not points:
            continue
        sizes, times = (np.array(column, dtype=float) for column in zip(*points, strict=True))
        axes.loglog(sizes, times, "o-", label="value and gradient")
        axes.loglog(sizes, times[-1] * sizes / sizes[-1], ":", color="grey", label="proportional")
        axes.set(title=title, xlabel=label, ylabel="seconds")
        axes.legend()
    figure.savefig(file, dpi=150)
    return f"plotted in {file}"
