"""Compiled code in processes of every kind: without Numba, forked, without a place to keep it, with a terminal."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import functional_lstsq as fl

pytest.importorskip("numba")


SOLVE = """
import sys, torch
before = sys.modules.get("numba")
import functional_lstsq as fl
assert sys.modules.get("numba") is before, "imported too early"
indices = torch.cartesian_prod(torch.arange(9), torch.arange(3)).T
A = fl.SparseMatrix((torch.arange(27.0, dtype=torch.float64) ** 1.5).sin(), fl.SparsePattern(indices, (9, 3)))
b = torch.arange(9.0, dtype=torch.float64)
def error():
    x = fl.lstsq(A, b, solver=fl.CGLS())
    return float((A.values.view(9, 3).T @ (A.values.view(9, 3) @ x - b)).abs().max())
assert error() < 1e-10
"""


def run(program, cwd=None, **environment):
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


def test_numba_is_imported_when_it_is_needed_and_is_silent_where_nobody_watches():
    assert run(SOLVE + "assert 'numba' in sys.modules").stderr == ""


def test_without_numba_torch_does_it():
    run("import sys; sys.modules['numba'] = None\n" + SOLVE)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("before", [True, False])
def test_a_forked_process_has_kernels(before):
    program = SOLVE.replace("assert error() < 1e-10", "assert error() < 1e-10" if before else "")
    program += """
import os
from functional_lstsq.sparse.plain_products import Operator
child = os.fork()
torch.set_num_threads(2)
large = fl.SparsePattern(torch.cartesian_prod(torch.arange(200_000), torch.arange(2)).T, (200_000, 2))
ones = Operator(large, torch.ones((1, 400_000), dtype=torch.float64))
right = bool((ones.adjoint(ones.matmul(torch.ones((1, 2, 1), dtype=torch.float64))) == 400_000).all())
right = right and error() < 1e-10
if child == 0:
    os._exit(0 if right else 3)
assert right and os.waitpid(child, 0)[1] == 0
"""
    run(program)


@pytest.mark.parametrize(
    "place", ["nowhere", pytest.param("beside", marks=pytest.mark.slow), pytest.param("told", marks=pytest.mark.slow)]
)
def test_a_place_for_compiled_code_is_not_needed(place, tmp_path):
    """A package that cannot be written to, of a user without a home."""
    package = Path(fl.__file__).parent
    shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    cache, file = tmp_path / "cache", tmp_path / "file"
    file.write_text("")
    # A file stands where folders would have to be made: root may write anywhere else.
    environment = {"HOME": str(file / "home"), "XDG_CACHE_HOME": str(file / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"NUMBA_CACHE_DIR": str(cache)} if place == "told" else {}
    if place != "beside":
        (tmp_path / package.name / "sparse" / "__pycache__").write_text("")
    run(SOLVE + f"assert fl.__file__.startswith({str(tmp_path)!r})", cwd=tmp_path, **environment)
    kept = list((tmp_path / package.name / "sparse").glob("__pycache__/compiled*.nbc"))
    assert bool(kept) == (place == "beside")
    assert bool(list(cache.rglob("*.nbc"))) == (place == "told")


@pytest.mark.slow
def test_a_cache_that_cannot_be_read_is_done_without(tmp_path):
    environment = {"NUMBA_CACHE_DIR": str(tmp_path)}
    run(SOLVE, **environment)
    for file in tmp_path.rglob("*.nb*"):
        file.write_bytes(b"spoilt")
    run(SOLVE, **environment)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="there are no terminals")
def test_compiling_is_announced_on_a_terminal_once(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    lines = []
    for _ in range(2):
        ours, theirs = os.openpty()
        with open(ours, "rb", buffering=0) as screen:
            subprocess.run([sys.executable, "-c", SOLVE], stderr=theirs, check=True, timeout=300, env=environment)
            os.write(theirs, b"end\n")
            os.close(theirs)
            text = b""
            while b"end" not in text:
                text += screen.read(4096)
        lines.append(text.decode().split("\r\n")[:-2])
    assert len(lines[0]) == 1, lines
    assert "compiling" in lines[0][0]
    assert lines[1] == []
