"""What the command writes and tells: files whole or not at all, no words of Python, seconds of the solve alone."""

import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse

import functional_lstsq as fl
from functional_lstsq import errors
from functional_lstsq.cli import main, sharded, solve, writing
from functional_lstsq.cli.words import line_of

resource = pytest.importorskip("resource")
OLD = b"an older file\n"


@pytest.fixture(scope="module")
def matrices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrices")
    g = np.random.default_rng(0)
    U, V = (np.linalg.qr(g.normal(size=(m, 20)))[0] for m in (40, 20))
    made = {
        "tiny": np.vander(np.arange(1.0, 6.0), 3),
        "ones": np.ones((4, 2)),
        "twice": np.hstack([U[:, :5], U[:, :1]]),
        "hard": U * np.logspace(0, -8, 20) @ V.T,
        "worse": U * np.logspace(0, -17, 20) @ V.T,
        "small": 1e-200 * np.vander(np.arange(1.0, 6.0), 3),
    }
    for name, A in made.items():
        scipy.io.mmwrite(folder / f"{name}.mtx", scipy.sparse.coo_array(A), precision=17)
    scipy.io.mmwrite(folder / "large.mtx", np.full((5, 1), 1e200), precision=17)
    n = 200_000
    i = np.arange(n)
    scipy.io.mmwrite(folder / "huge.mtx", scipy.sparse.coo_array((np.ones(n), (i, i))))
    return folder


@pytest.fixture
def old(tmp_path):
    (tmp_path / "x.mtx").write_bytes(OLD)
    return tmp_path / "x.mtx"


def check_untouched(old):
    assert old.read_bytes() == OLD
    assert [path.name for path in old.parent.iterdir()] == [old.name]


def one_line(capsys):
    """What stands on standard error, which is one line."""
    told = capsys.readouterr().err
    assert told.startswith("functional_lstsq: ")
    assert told.count("\n") == 1
    return told


def process(*arguments, **how):
    command = [sys.executable, "-m", "functional_lstsq", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **how)


@pytest.mark.parametrize("name", ["x.mtx", "x.mtx.gz"])
def test_an_older_file_survives_a_disk_that_is_full(matrices, tmp_path, name):
    """A limit to the sizes of files stands for it: the write fails in the middle."""
    (tmp_path / name).write_bytes(OLD)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (30, 30))
    done = process("solve", matrices / "tiny.mtx", "-o", tmp_path / name, preexec_fn=limit)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"functional_lstsq: cannot write {tmp_path / name}: file too large\n"
    check_untouched(tmp_path / name)


def test_an_older_file_survives_a_solve_that_is_refused(matrices, old, capsys):
    assert main(["solve", f"{matrices}/ones.mtx", "-o", str(old)]) == 1
    assert "rank 1" in one_line(capsys)
    check_untouched(old)


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_an_older_file_survives_an_error_in_the_middle(old, error):
    wanted = writing.BadInput if error is OSError else error

    def half(file):
        file.write(b"half a")
        file.flush()
        assert len(list(old.parent.iterdir())) == 2
        raise error

    with pytest.raises(wanted):
        writing.save(str(old), half)
    check_untouched(old)
    assert not writing.command.unfinished


def test_the_first_result_stays_when_the_second_cannot_be_written(matrices, old, capsys):
    """Each file is whole; that both come is not promised."""
    if not Path("/dev/full").exists():
        pytest.skip("there is no full device")
    assert main(["solve", f"{matrices}/tiny.mtx", "-o", str(old), "--gradient", "/dev/full"]) == 2
    assert "cannot write /dev/full: no space left on device" in one_line(capsys)
    assert scipy.io.mmread(old).shape == (3, 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
def test_a_device_is_written_to_and_named(matrices, capsys):
    assert main(["solve", f"{matrices}/tiny.mtx", "-o", "/dev/full"]) == 2
    assert one_line(capsys) == "functional_lstsq: cannot write /dev/full: no space left on device\n"
    assert main(["solve", f"{matrices}/tiny.mtx", "-o", "/dev/null", "--quiet"]) == 0
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664])
def test_permissions_of_a_file_are_kept(matrices, old, mode):
    old.chmod(mode)
    assert main(["solve", f"{matrices}/tiny.mtx", "-o", str(old), "--quiet"]) == 0
    assert old.stat().st_mode & 0o777 == mode
    assert old.read_bytes() != OLD


def test_permissions_of_a_new_file_are_those_of_the_umask(matrices, tmp_path):
    before = os.umask(0o027)
    try:
        assert main(["solve", f"{matrices}/tiny.mtx", "-o", f"{tmp_path}/x.mtx", "--quiet"]) == 0
    finally:
        os.umask(before)
    assert (tmp_path / "x.mtx").stat().st_mode & 0o777 == 0o640


def test_a_name_may_be_as_long_as_names_can_be(matrices, tmp_path):
    name = "x" * 251 + ".mtx"
    assert main(["solve", f"{matrices}/tiny.mtx", "-o", f"{tmp_path}/{name}", "--quiet"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed(matrices, tmp_path, exists):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "x.mtx", tmp_path / "link.mtx"
    link.symlink_to(target)
    if exists:
        target.write_bytes(OLD)
    assert main(["solve", f"{matrices}/tiny.mtx", "-o", str(link), "--quiet"]) == 0
    assert link.is_symlink()
    assert scipy.io.mmread(target).shape == (3, 1)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link.mtx", "there", "x.mtx"]


def test_a_result_on_standard_output_has_the_table_beside_it(matrices, capfd):
    assert main(["solve", f"{matrices}/tiny.mtx", "-o", "-"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("%%MatrixMarket matrix array real general\n")
    assert np.abs(np.array(out.split()[-3:], float) - 1).max() < 1e-12
    assert "converged" in err
    assert main(["solve", f"{matrices}/tiny.mtx", "--gradient", "-", "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("%%MatrixMarket matrix coordinate real general\n")
    assert err == ""


def test_a_name_that_ends_in_gz_is_compressed(matrices, tmp_path):
    for name in ("G.mtx", "G.mtx.gz"):
        assert main(["solve", f"{matrices}/tiny.mtx", "--gradient", f"{tmp_path}/{name}", "--quiet"]) == 0
    packed = (tmp_path / "G.mtx.gz").read_bytes()
    assert packed[:2] == b"\x1f\x8b"
    assert gzip.decompress(packed) == (tmp_path / "G.mtx").read_bytes()


def no_access(folder):
    """A folder in which nothing can be made: for the super-user, whom no permission binds, one of the system."""
    folder = folder / "closed"
    folder.mkdir(mode=0o555)
    for place in (folder, Path("/proc"), Path("/sys")):
        try:
            tempfile.TemporaryFile(dir=place).close()
        except OSError:
            if place.is_dir():
                return place
    return pytest.skip("everything can be written")


@pytest.mark.parametrize(
    ("outputs", "told"),
    [
        (["-o", "{here}/none/x.mtx"], "none is not a folder"),
        (["-o", "{here}/x.mtx/y.mtx"], "x.mtx is not a folder"),
        (["-o", "{here}"], "not the name of a file"),
        (["--gradient", ""], "cannot write '': not the name of a file"),
        (["-o", "{matrices}/tiny.mtx"], "it is an input too"),
        (["-o", "{here}/in.mtx"], "it is an input too"),
        (["-o", "{here}/x.mtx", "--gradient", "{here}/./x.mtx"], "cannot write both results to"),
        (["-o", "{here}/x.mtx", "--gradient", "{here}/link.mtx"], "cannot write both results to"),
        (["-o", "{here}/lost.mtx"], "lost.mtx: no such file"),
        (["-o", "{here}/" + 300 * "x"], "xxx: file name too long"),
        (["-o", "{here}/round.mtx"], "round.mtx"),
        (["-o", "{closed}/x.mtx"], "cannot write .*/x.mtx: "),
        (["-o", "{here}/x.mtx", "--gradient", "{closed}/G.mtx"], "cannot write .*/G.mtx: "),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_read(matrices, old, capsys, monkeypatch, outputs, told):
    def never(*_, **__):
        raise AssertionError("it has begun to work")

    for name in ("read_matrix", "warm_up", "solved"):
        monkeypatch.setattr(solve, name, never)
    here = old.parent
    for name, target in {
        "in": matrices / "tiny.mtx",
        "link": old,
        "lost": here / "none/x",
        "round": "round.mtx",
    }.items():
        (here / f"{name}.mtx").symlink_to(target)
    closed = no_access(here) if "{closed}" in " ".join(outputs) else None
    outputs = [part.format(here=here, matrices=matrices, closed=closed) for part in outputs]
    before = sorted(here.rglob("*"))
    assert main(["solve", f"{matrices}/tiny.mtx", *outputs]) == 2
    assert re.search(told, one_line(capsys))
    assert old.read_bytes() == OLD
    assert sorted(here.rglob("*")) == before


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="the super-user may write anything")
def test_a_file_that_must_not_be_written_is_not_replaced(matrices, old, capsys):
    old.chmod(0o444)
    assert main(["solve", f"{matrices}/tiny.mtx", "-o", str(old)]) == 2
    assert "permission denied" in one_line(capsys).lower()
    check_untouched(old)


PYTHON = ("=", "(", "rank_deficient", "throw", "solver=", "max_iterations", "None", "memory=", "x0")
ADVICE = [value for name, value in vars(errors).items() if name.isupper() and isinstance(value, str)]


def check_words(advice):
    for word in PYTHON:
        assert word not in advice, advice


@pytest.mark.parametrize("advice", ADVICE)
def test_advice_of_the_library_is_worded_for_the_shell(advice):
    line = line_of(errors.SolveError("what", advice))
    check_words(line)
    assert line.startswith("what")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        *((["twice", "--solver", name], "--minimum-norm") for name in sharded.SOLVERS),
        (["twice", "--minimum-norm", "--solver", "cgls"], "--solver direct or dense"),
        (["twice", "--solver", "cgls", "--robust", "huber"], "--damp"),
        (["ones", "--solver", "cgls"], "--minimum-norm"),
        (["hard", "--solver", "cgls"], "--damp"),
        (["worse", "--solver", "dense"], "--minimum-norm"),
        (["worse", "--solver", "direct"], "--minimum-norm"),
        (["small", "large"], "scale unknowns"),
        (["huge", "--solver", "dense"], "--solver cgls"),
    ],
)
def test_a_refusal_is_worded_for_the_shell(matrices, capsys, arguments, option):
    """All that may be done has its option; the figures before that are in the words of the library."""
    files = [f"{matrices}/{part}.mtx" if (matrices / f"{part}.mtx").exists() else part for part in arguments]
    assert main(["solve", *files]) == 1
    what, _, advice = one_line(capsys).partition(" Try: ")
    assert option in advice
    check_words(advice)
    assert not any(word in what for word in ("solver=", "rank_deficient=", "throw=", "max_iterations", "refine="))


def test_too_few_iterations_are_worded_for_the_shell(matrices, capsys, monkeypatch):
    monkeypatch.setitem(sharded.SOLVERS, "cgls", fl.CGLS(max_iterations=3))
    assert main(["solve", f"{matrices}/hard.mtx", "--solver", "cgls"]) == 1
    what, _, advice = one_line(capsys).partition(" Try: ")
    assert "iteration limit" in what
    assert advice.startswith("--solver direct")
    check_words(advice)


LOADED = """
import sys
from functional_lstsq.cli import main, solve
warm_up, before = solve.warm_up, set()
def warmed(*given, **named):
    warm_up(*given, **named)
    before.update(sys.modules)
solve.warm_up = warmed
main(sys.argv[1:])
print([name for name in sys.modules if name not in before])
"""


@pytest.mark.parametrize(
    "options",
    [
        ["--gradient", "/dev/null"],
        pytest.param(["--solver", "cgls", "--damp", "1"], marks=pytest.mark.slow),
        pytest.param(["--robust", "huber"], marks=pytest.mark.slow),
    ],
)
def test_nothing_is_loaded_in_the_seconds_of_a_solve(matrices, options):
    """But for a lock of the progress, which takes no time; seen in a fresh process, where all is yet to be loaded."""
    command = [sys.executable, "-c", LOADED, "solve", f"{matrices}/tiny.mtx", "--quiet", *options]
    root = {**os.environ, "PYTHONPATH": str(Path(fl.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=root)
    loaded = [name for name in json.loads(done.stdout.replace("'", '"')) if "multiprocessing" not in name]
    assert not loaded, len(loaded)


def test_seconds_are_of_the_solve_alone(matrices):
    start = time.perf_counter()
    done = process("solve", matrices / "tiny.mtx", "--json")
    assert json.loads(done.stdout)["seconds"] < 0.4 * (time.perf_counter() - start)
