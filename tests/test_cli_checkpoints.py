"""Checkpoints of a solve on ranks, and what goes on from one, on another number of ranks too."""

import json
import re
import signal
import socket
import time

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
from commands import as_rank, speak, spoken
from helpers import close, normal, problem

import functional_lstsq as fl
from functional_lstsq.solvers.watching import iterates

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch has no gloo"
)


def processes(size, folder, *every):
    """What each of `size` ranks gave for the commands."""
    torch.multiprocessing.spawn(speak, (size, str(folder), every), size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def put_chain(folder, n):
    """Differences along a chain, which takes n iterations, and its exact solution."""
    i, x = np.arange(n - 1), np.random.default_rng(n).normal(size=n)
    A = scipy.sparse.coo_array((np.repeat([-1.0, 1.0], [n - 1, n]), (np.r_[i, i, n - 1], np.r_[i, i + 1, 0])))
    scipy.io.mmwrite(folder / "A.mtx", A, precision=17)
    scipy.io.mmwrite(folder / "b.mtx", (A @ x)[:, None], precision=17)
    return x


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """(folder, x, what the ranks gave) of a solve with checkpoints on two ranks."""
    folder = tmp_path_factory.mktemp("chain")
    x = put_chain(folder, 300)
    every = ["solve", f"{folder}/A.mtx", f"{folder}/b.mtx", "--solver", "cgls", "--json"]
    (told, _), (other, _) = processes(
        2, tmp_path_factory.mktemp("two"),
        [*every, "--checkpoint", f"{folder}/c.mtx", "--every", "0", "-o", f"{folder}/x.mtx"],
        [*every, "--checkpoint", f"{folder}/none.mtx", "--every", "900", "--resume"],
    )  # fmt: skip
    assert (told[0], other[0]) == (0, 0), told
    return folder, x, json.loads(told[1])


def test_a_checkpoint_is_x_on_its_way(chain):
    folder, x, _ = chain
    reached = scipy.io.mmread(folder / "c.mtx")[:, 0]
    assert 0 < np.linalg.norm(reached - x) < 1e-3 * np.linalg.norm(x)
    assert not list(folder.glob("*.part"))


def test_without_a_checkpoint_resume_begins_anew(chain):
    folder, *_ = chain
    assert not (folder / "none.mtx").exists()  # 900 seconds have not gone by


@pytest.mark.parametrize("size", [1, 3])
def test_going_on_on_another_number_of_ranks(chain, tmp_path, size):
    folder, x, whole = chain
    arguments = ["solve", f"{folder}/A.mtx", f"{folder}/b.mtx", "--solver", "cgls", "--json", "--resume"]
    every = processes(
        size, tmp_path, [*arguments, "--checkpoint", f"{folder}/c.mtx", "--every", "900", "-o", f"{tmp_path}/x.mtx"]
    )
    status, out, err = every[0][0]
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert told["resumed"] is True
    assert told["iterations"] < 0.75 * whole["iterations"]
    assert told["forward_error"] < 1e-9  # what comes out is certified as if it had been found at once
    assert told["condition"] == pytest.approx(whole["condition"], rel=0.1)
    assert np.linalg.norm(scipy.io.mmread(tmp_path / "x.mtx")[:, 0] - x) <= 1e-10 * np.linalg.norm(x)


def test_a_checkpoint_of_another_problem(chain, tmp_path):
    """One that fits is a start that is not used; one that does not fit is refused."""
    folder, x, _ = chain
    scipy.io.mmwrite(tmp_path / "wild.mtx", 1e9 * np.random.default_rng(0).normal(size=(300, 1)), precision=17)
    scipy.io.mmwrite(tmp_path / "short.mtx", np.ones((5, 1)))
    scipy.io.mmwrite(tmp_path / "complex.mtx", 1j * np.ones((300, 1)))
    arguments = ["solve", f"{folder}/A.mtx", f"{folder}/b.mtx", "--solver", "cgls", "--resume"]
    every = [[*arguments, "--checkpoint", f"{tmp_path}/{name}.mtx"] for name in ("short", "complex")]
    every.append([*arguments, "--checkpoint", f"{tmp_path}/wild.mtx", "-o", f"{tmp_path}/x.mtx"])
    first, second = processes(2, tmp_path, *every)
    for (status, _, err), other, message in zip(
        first, second, (r"x of \(5, 1\), wanted \(300, 1\)", "complex numbers, wanted real ones"), strict=False
    ):
        assert (status, other) == (2, (2, "", ""))
        assert re.search(message, err)
    assert first[2][0] == 0
    assert np.linalg.norm(scipy.io.mmread(tmp_path / "x.mtx")[:, 0] - x) <= 1e-10 * np.linalg.norm(x)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_is_lost_and_the_solve_goes_on(tmp_path, how):
    x = put_chain(tmp_path, 3000)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [
        "solve",
        "A.mtx",
        "b.mtx",
        "--solver",
        "cgls",
        "--checkpoint",
        "c.mtx",
        "--every",
        "0.2",
        "--timeout",
        "5",
    ]
    ranks = [as_rank(rank, 2, tmp_path, arguments, port=port) for rank in range(2)]
    try:
        end = time.monotonic() + 100
        while not (tmp_path / "c.mtx").exists():
            assert time.monotonic() < end
            assert [rank.poll() for rank in ranks] == [None, None]
            time.sleep(0.01)
        ranks[1].send_signal(how)
        lost = time.monotonic()
        _, err = ranks[0].communicate(timeout=60)
        assert time.monotonic() - lost < 20
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode == 1
    assert err.startswith(b"functional_lstsq: rank 0 of 2 lost another one: it died")
    assert err.count(b"\n") == 1
    resumed = ["solve", f"{tmp_path}/A.mtx", f"{tmp_path}/b.mtx", "--solver", "cgls", "--json", "--resume"]
    resumed += ["--checkpoint", f"{tmp_path}/c.mtx", "-o", f"{tmp_path}/x.mtx"]
    (status, out, _), *_ = processes(1, tmp_path, resumed)[0]
    assert status == 0
    assert json.loads(out)["resumed"] is True
    assert np.linalg.norm(scipy.io.mmread(tmp_path / "x.mtx")[:, 0] - x) <= 1e-10 * np.linalg.norm(x)


def test_in_one_process_there_are_none(chain):
    folder, *_ = chain
    status, _, err = spoken(["solve", f"{folder}/A.mtx", "--checkpoint", f"{folder}/c.mtx"])
    assert (status, err) == (2, "functional_lstsq: argument --checkpoint: only on the ranks of torchrun\n")


@pytest.mark.parametrize("columns", [1, 7])
def test_iterates_are_x_in_the_units_of_the_caller(columns):
    pattern, values, _ = problem(60, 12)
    A, shown = fl.SparseMatrix(values * 1e-3, pattern), []
    b = 1e200 * normal(60, columns)
    given = {"weights": normal(60, seed=1).abs(), "damp": 1e-4, "x0": 1e200 * normal(12, columns, seed=2)}
    with iterates(lambda x: shown.append(x.clone())):
        x = fl.lstsq(A, b, solver=fl.CGLS(tolerance=1e-3), **given)
    assert len(shown) > 1
    close(shown[-1][0] / 1e203, x / 1e203, 1e-2)
    count = len(shown)
    fl.lstsq(A, b, solver=fl.CGLS())
    assert len(shown) == count, "nobody watches any more"
