"""Processes that fork, start others, or end: a solve works there, whatever the parent has used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOLVERS = ["auto", *(pytest.param(solver, marks=pytest.mark.slow) for solver in ("direct", "dense", "cgls"))]


def run(case, solver, size):
    command = [sys.executable, Path(__file__).with_name("worlds.py"), case, solver, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_forked_process_solves(solver):
    run("fork", solver, 8)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize(("case", "solver"), [("kept", "auto"), ("kept", "direct"), ("loader", "auto")])
def test_a_forked_process_solves_with_what_its_parent_made(case, solver):
    run(case, solver, 8)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize(
    "solver", ["auto", *(pytest.param(s, marks=pytest.mark.slow) for s in ("direct", "dense", "cgls"))]
)
def test_a_process_forks_among_threads(solver):
    run("fork among threads", solver, 8)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["fork", "kept"])
def test_a_forked_process_solves_with_a_factor_that_has_threads(case):
    run(case, "direct", 34)


@pytest.mark.parametrize("case", [pytest.param("spawn", marks=pytest.mark.slow), "forkserver"])
def test_a_started_process_solves(case):
    run(case, "direct", 8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_process_ends_while_threads_solve(solver):
    """Not by an abort of torch's, which ends a thread that comes back from native code too late."""
    run("end", solver, 8)
