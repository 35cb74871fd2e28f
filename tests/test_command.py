"""The command as a process: how it ends on a signal, with closed streams, or where a reader ends early."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse

from functional_lstsq.cli import command

termios = pytest.importorskip("termios")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what a process does is read from /proc")
SECONDS = 60  # after which a process that has not done what is awaited is taken to hang
SAID = {
    signal.SIGINT: ("interrupted", 130),
    signal.SIGTERM: ("terminated", 143),
    signal.SIGHUP: ("hung up", 129),
}
OLD = b"an older file\n"


@pytest.fixture(scope="session")
def matrices(tmp_path_factory):
    """Files that take no time, a factor of seconds, an iteration of minutes, and a result that is long to write."""
    folder = tmp_path_factory.mktemp("matrices")

    def put(name, values, rows, columns):
        scipy.io.mmwrite(folder / name, scipy.sparse.coo_array((values, (rows, columns))), precision=17)

    scipy.io.mmwrite(folder / "tiny.mtx", scipy.sparse.coo_array(np.vander(np.arange(1.0, 6.0), 3)), precision=17)
    n, g = 7000, np.random.default_rng(0)
    rows = np.concatenate([np.arange(n), np.repeat(np.arange(2 * n), 3)])
    columns = np.concatenate([np.arange(n), g.integers(0, n, 6 * n)])
    put("fills.mtx", g.normal(size=7 * n), rows, columns)
    n = 20_000
    i = np.arange(n - 1)
    put("chain.mtx", np.repeat([-1.0, 1.0], [n - 1, n]), np.r_[i, i, n - 1], np.r_[i, i + 1, 0])
    n = 300_000
    put("diagonal.mtx", g.uniform(1, 2, n), np.arange(n), np.arange(n))
    return folder


def started(arguments, environment=None, *, program=("-m", "functional_lstsq"), **how):
    """The command, as a process whose factors take one thread, and which holds back nothing that it prints."""
    one = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    one["PYTHONPATH"] = str(Path(command.__file__).parents[2])
    how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    line = [sys.executable, *map(str, [*program, *arguments])]
    return subprocess.Popen(line, env={**os.environ, **one, **(environment or {})}, **how)


def run(arguments, environment=None, **how):
    """(status, standard output, standard error) of the command."""
    process = started(arguments, environment, **how)
    out, err = process.communicate(timeout=2 * SECONDS)
    return process.returncode, out, err


def wait(process, condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it does not come to pass"
        time.sleep(0.002)


def handles(process, kind):
    """Whether the process has a handler of its own for the signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (kind - 1) & 1)


def has_loaded(process, library):
    return library in Path(f"/proc/{process.pid}/maps").read_text()


def check_end(process, kind, *, as_json=False):
    """Send the signal, and hold the end of the process to what is promised."""
    said, status = SAID[kind]
    process.send_signal(kind)
    sent = time.monotonic()
    out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (status, f"functional_lstsq: {said}\n".encode())
    assert time.monotonic() - sent < 10
    if as_json:
        assert json.loads(out) == {"error": said, "exit": status}
    else:
        assert out == b""


@pytest.mark.parametrize("kind", [k if k == signal.SIGINT else pytest.param(k, marks=pytest.mark.slow) for k in SAID])
def test_a_signal_while_the_library_is_imported(matrices, tmp_path, kind):
    process = started(["solve", matrices / "tiny.mtx", "-o", tmp_path / "x.mtx"])
    wait(process, lambda: handles(process, signal.SIGHUP))  # the last one to be set, before torch is imported
    check_end(process, kind)
    assert not list(tmp_path.iterdir())


def test_a_signal_in_the_middle_of_the_import(matrices):
    process = started(["solve", matrices / "tiny.mtx"])
    wait(process, lambda: has_loaded(process, "libtorch_cpu"))
    check_end(process, signal.SIGTERM)


def test_for_scripts_a_signal_while_the_library_is_imported_is_an_object(matrices):
    process = started(["solve", matrices / "tiny.mtx", "--json"])
    wait(process, lambda: handles(process, signal.SIGHUP))
    check_end(process, signal.SIGINT, as_json=True)


def test_the_installed_script_ends_in_the_same_way(matrices, tmp_path):
    """As pip writes it, which knows nothing of what runs before `main`."""
    script = tmp_path / "functional-lstsq"
    script.write_text("import sys\nfrom functional_lstsq.cli import main\nsys.exit(main())\n")
    process = started(["solve", matrices / "tiny.mtx"], program=[script])
    wait(process, lambda: handles(process, signal.SIGHUP))
    check_end(process, signal.SIGTERM)


@pytest.mark.parametrize("kind", [k if k == signal.SIGINT else pytest.param(k, marks=pytest.mark.slow) for k in SAID])
def test_a_signal_inside_a_native_factor(matrices, tmp_path, kind):
    """Where no Python code runs for seconds; the older file stays as it was."""
    (tmp_path / "x.mtx").write_bytes(OLD)
    as_json = ["--json"] if kind == signal.SIGTERM else []
    given = ["solve", matrices / "fills.mtx", "--solver", "direct", "-o", tmp_path / "x.mtx"]
    process = started([*given, *as_json])
    wait(process, lambda: has_loaded(process, "rslab"))
    time.sleep(1)  # the factor takes several times as long
    check_end(process, kind, as_json=bool(as_json))
    assert (tmp_path / "x.mtx").read_bytes() == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["x.mtx"]


def until(terminal, word):
    """What is read of a terminal until that word, or, if it is None, until nobody is left to write."""
    read, end = b"", time.monotonic() + SECONDS
    while word is None or word not in read:
        assert time.monotonic() < end, read
        if select.select([terminal], [], [], 1)[0]:
            try:
                read += os.read(terminal, 4096)
            except OSError:  # as Linux says it
                assert word is None, read
                break
    return read.decode()


@pytest.mark.parametrize("kind", [k if k == signal.SIGINT else pytest.param(k, marks=pytest.mark.slow) for k in SAID])
def test_a_signal_while_it_iterates_on_a_terminal(matrices, tmp_path, kind):
    """The line takes the place of that of the progress."""
    (tmp_path / "x.mtx").write_bytes(OLD)
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    given = ["solve", matrices / "chain.mtx", "--solver", "cgls", "-o", tmp_path / "x.mtx"]
    process = started(given, stderr=theirs)
    os.close(theirs)
    until(ours, b"gradient=")
    process.send_signal(kind)
    shown, (said, status) = until(ours, None), SAID[kind]
    os.close(ours)
    assert (process.communicate(timeout=SECONDS)[0], process.returncode) == (b"", status)
    assert shown.split("\r\x1b[K")[-1] == f"functional_lstsq: {said}\r\n"
    assert (tmp_path / "x.mtx").read_bytes() == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["x.mtx"]


def test_a_signal_while_a_result_is_written(matrices, tmp_path):
    (tmp_path / "G.mtx.gz").write_bytes(OLD)
    process = started(["solve", matrices / "diagonal.mtx", "--solver", "cgls", "--gradient", tmp_path / "G.mtx.gz"])
    wait(process, lambda: list(tmp_path.glob(".*.part")))
    time.sleep(0.05)
    check_end(process, signal.SIGTERM)
    assert (tmp_path / "G.mtx.gz").read_bytes() == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["G.mtx.gz"]


def test_signals_that_are_ignored_stay_so(matrices):
    """As under nohup, and as a shell starts a job behind `&`."""

    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = started(["solve", matrices / "tiny.mtx", "--json"], preexec_fn=ignore)
    wait(process, lambda: handles(process, signal.SIGTERM) and has_loaded(process, "libtorch_cpu"))
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (0, b"")
    assert json.loads(out)["status"] == "converged"


def test_a_program_that_imports_the_library_keeps_its_handlers():
    """This one, for example."""
    assert not command.is_running()
    assert all(signal.getsignal(kind) is not command._end for kind in SAID)


CLOSED = "functional_lstsq: standard output is closed, so that nothing could be told: add --quiet\n"


@pytest.mark.parametrize(
    ("closed", "options", "status", "said"),
    [
        ((0,), [], 0, ""),
        ((1,), [], 2, CLOSED),
        pytest.param((1,), ["--json"], 2, CLOSED, marks=pytest.mark.slow),
        ((1,), ["--quiet"], 0, ""),
        ((1,), ["--quiet", "--gradient", "-"], 2, "functional_lstsq: cannot write to standard output: it is closed\n"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ((2,), [], 0, ""),
                ((2,), ["--damp", "-1"], 2, ""),
                ((0, 1, 2), [], 2, ""),
                ((0, 1, 2), ["--quiet"], 0, ""),
            )
        ),
    ],
)
def test_streams_that_are_closed(matrices, tmp_path, closed, options, status, said):
    """And whatever is printed goes into no file that happens to have the number of such a stream."""

    def close():
        for number in closed:
            os.close(number)

    before = (matrices / "tiny.mtx").read_bytes()
    given = ["solve", matrices / "tiny.mtx", "-o", tmp_path / "x.mtx", *options]
    ended, out, err = run(given, preexec_fn=close)
    assert (ended, err.decode()) == (status, said)
    assert (b"converged" in out) is (status == 0 and 1 not in closed)
    assert (matrices / "tiny.mtx").read_bytes() == before
    if status:
        assert not list(tmp_path.iterdir())
    else:
        text = (tmp_path / "x.mtx").read_text()
        assert text.startswith("%%MatrixMarket matrix array real general\n")
        assert text.splitlines()[-4:-3] == ["3 1"]
        assert np.abs(scipy.io.mmread(tmp_path / "x.mtx") - 1).max() < 1e-12


def test_standard_input_that_is_closed_is_not_read():
    status, out, err = run(["solve", "-"], preexec_fn=lambda: os.close(0))
    assert (status, out, err) == (2, b"", b"functional_lstsq: cannot read standard input: it is closed\n")


@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("options", "status"),
    [
        ([], 0),
        pytest.param(["--json"], 0, marks=pytest.mark.slow),
        pytest.param(["-o", "-"], 0, marks=pytest.mark.slow),
        pytest.param(["--damp", "-1", "--json"], 2, marks=pytest.mark.slow),
    ],
)
def test_a_reader_that_ends_early(matrices, options, status, unbuffered):
    """`... | head -0`: no error, and what is one without a pipe stays so, in one line."""
    read, write = os.pipe()
    os.close(read)
    ended, _, err = run(["solve", matrices / "tiny.mtx", *options], {"PYTHONUNBUFFERED": unbuffered}, stdout=write)
    os.close(write)
    assert ended == status
    assert err.count(b"\n") == (1 if status else 0), err


def test_a_reader_of_errors_that_ends_early(matrices):
    """The result is written all the same."""
    read, write = os.pipe()
    os.close(read)
    status, out, _ = run(["solve", matrices / "tiny.mtx", "-o", "-"], stderr=write)
    os.close(write)
    assert status == 0
    assert out.startswith(b"%%MatrixMarket matrix array real general\n")
