"""One case: every contestant beside ours, call by call, and the rows of the table that come of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import reference
from cases import Case
from client import Client, Failed, TooLate

HEADER = ("case", "contestant", "time", "theirs / ours", "theirs / ours, pattern reused", "error", "pairs")
_NAMES = {
    "torchsparsegradutils": "torchsparsegradutils",
    "torch dense": "torch.linalg.lstsq, dense",
    "matfree": "matfree LSMR",
    "lineax": "lineax LSMR",
    "scipy": "SciPy LSMR",
    "spqr": "SuiteSparse SPQR",
    "torch-sla": "torch-sla, normal equations",
    "within": "within",
    "optimistix": "optimistix Levenberg-Marquardt",
}
_PAUSE = 0.1  # seconds for the threads of the contestant before to fall asleep
_PATIENCE = 180.0  # seconds of calls beside one contestant after which three of them will do


@dataclass
class Job:
    """One contestant in one case."""

    label: str
    client: Client
    work: str
    options: dict[str, Any] = field(default_factory=dict)
    error: float | None = None
    failure: str | None = None
    late: bool = False
    times: list[float] = field(default_factory=list)
    ratios: list[tuple[float | None, float | None]] = field(default_factory=list)  # to ours, cold and warm

    def prepare(self, problem: Path, exact: dict[str, np.ndarray] | None) -> None:
        """Load, and make a first call, which compiles and warms up; its answer is the one that is judged."""

        def first() -> None:
            self.client.about()
            self.client.load(self.label, self.work, problem, self.options)
            answer = problem.with_name("answer.npz")
            self.client.call(self.label, save=answer)
            if exact is not None:
                with np.load(answer) as file:
                    self.error = reference.error(dict(file), exact)

        self._try(first)

    def time(self, times: int) -> float | None:
        """Seconds of a call, or None where there is no answer any more."""
        if self.failure is not None:
            return None
        time.sleep(_PAUSE)
        seconds = self._try(lambda: self.client.call(self.label, times))
        if seconds is not None:
            self.times.append(seconds)
        return seconds

    def _try(self, ask: Callable[[], float | None]) -> float | None:
        try:
            return ask()
        except Failed as failure:
            self.failure, self.late = str(failure), isinstance(failure, TooLate)
            return None


def compare(case: Case, clients: dict[str, Client], repeats: int, folder: Path) -> list[tuple[str, ...]]:
    """The rows of a case."""
    problem, path = case.make(), folder / "problem.npz"
    np.savez(path, **problem)
    exact = _exact(case, problem)
    for client in clients.values():
        client.forget()
    ours, rows = clients["ours"], []

    def prepared(label: str, client: Client, work: str, path: Path = path, exact: Any = exact, **options: Any) -> Job:
        job = Job(label, client, work, options)
        _say(f"{case.name}: {label}, first call")
        job.prepare(path, exact)
        return job

    groups = [("ours", case.work, case.peers)]
    if case.forward:
        groups.append(("ours, solution only", "solve", case.forward))
    for label, work, peers in groups:
        cold = prepared(label, ours, work)
        warm = prepared(f"{label}, pattern reused", ours, work, warm=True)
        others = []
        if work == case.work:
            for own in case.own:
                own_problem, own_path = own.problem(problem), folder / "own.npz"
                np.savez(own_path, **own_problem)
                others.append(prepared(own.label, ours, own.work, own_path, None))
        for peer in peers:
            suffix = ", solution only" if work == "solve" else ""
            name = "SciPy least_squares" if (peer, work) == ("scipy", "fit") else _NAMES[peer]
            others.append(prepared(name + suffix, clients[peer], work))
        _pairs(case, cold, warm, others, repeats)
        rows += [_row(case, job, cold, warm) for job in (cold, warm, *others)]
    return rows


def _exact(case: Case, problem: dict[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    _say(f"{case.name}: reference")
    try:
        return reference.WORKS[case.work](problem)
    except reference.NoReference as failure:
        _say(f"{case.name}: no errors, {failure}")
        return None


def _pairs(case: Case, cold: Job, warm: Job, others: list[Job], repeats: int) -> None:
    """Ours, ours with the pattern reused, another one; and so on with the next."""
    spent = dict.fromkeys(range(len(others)), 0.0)
    for repeat in range(repeats):
        _say(f"{case.name}: {cold.label} and others, {repeat + 1} of {repeats}")
        alive = [k for k, job in enumerate(others) if job.failure is None]
        for k in alive or [None]:
            if k is not None and spent[k] > _PATIENCE and len(others[k].times) >= 3:
                continue
            start = time.monotonic()
            base, reused = cold.time(case.times), warm.time(case.times)
            _note(cold, base, base, reused)
            _note(warm, reused, base, reused)
            if k is not None:
                _note(others[k], others[k].time(case.times), base, reused)
                spent[k] += time.monotonic() - start


def _note(job: Job, seconds: float | None, base: float | None, reused: float | None) -> None:
    if seconds is not None:
        job.ratios.append((base and seconds / base, reused and seconds / reused))


def _row(case: Case, job: Job, cold: Job, warm: Job) -> tuple[str, ...]:
    error = "-" if job.error is None else f"{job.error:.0e}"
    if job.late or not job.times:
        bounds = ["-", "-"]
        if job.late and job is not cold and job is not warm:  # at least so much
            for which, base in enumerate((cold, warm)):
                bounds[which] = f">{_ratio(job.client.limit / median(base.times))}" if base.times else "-"
        return (case.name, job.label, job.failure or "-", *bounds, error, "0")
    ratios = []
    for which in (0, 1):
        known = [pair[which] for pair in job.ratios if pair[which] is not None]
        ratios.append(_ratio(median(known)) if known else "-")
    return (case.name, job.label, duration(median(job.times)), *ratios, error, str(len(job.times)))


def duration(seconds: float) -> str:
    """For people."""
    for unit, name in ((1e-6, "ns"), (1e-3, "us"), (1, "ms")):
        if seconds < 0.9995 * unit:
            return f"{seconds / unit * 1e3:.3g} {name}"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def _ratio(value: float) -> str:
    for least, digits in ((100, 0), (10, 1), (0.1, 2)):
        if value >= least:
            return f"{value:,.{digits}f}"
    return f"{value:.2g}"


def markdown(rows: list[tuple[str, ...]]) -> str:
    """Rows of a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def heading(names: tuple[str, ...]) -> str:
    """The head of a Markdown table."""
    return markdown([names, ("---",) * len(names)])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
