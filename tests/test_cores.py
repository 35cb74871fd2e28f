"""How many threads a solve uses where others use the cores."""

import io
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import problem

import functional_lstsq as fl
from functional_lstsq.linear import augmented
from functional_lstsq.sparse import kernels, small_kernels
from functional_lstsq.torch_func import cores

BUSY = [sys.executable, "-c", "while True: pass"]


@pytest.fixture
def turns(monkeypatch):
    """The calling thread's, with a schedstat that the test writes."""
    turns, asked = cores._Turns(), torch.get_num_threads()
    monkeypatch.setattr(cores, "_turns", turns)
    torch.set_num_threads(2)
    yield turns
    torch.set_num_threads(asked)


def threads_in_a_solve() -> int:
    """That its last products use; those before look whether it is linear."""
    seen = []

    def matvec(scale, x):
        seen.append(torch.get_num_threads())
        return scale * x

    A = fl.LinearOperator(matvec, torch.arange(1.0, 6.0, dtype=torch.float64), 5)
    fl.lstsq(A, torch.ones(5, dtype=torch.float64))
    return seen[-1]


def test_who_has_waited_for_a_core_works_alone_until_nobody_waits(turns, monkeypatch):
    millisecond, stat, clock = 1_000_000, [0, 0], [0]
    monkeypatch.setattr(cores, "open", lambda *_: io.BytesIO(b"%d %d 7\n" % tuple(stat)), raising=False)
    monkeypatch.setattr(cores.time, "monotonic_ns", lambda: clock[0])

    def after(ran: int, waited: int) -> bool:
        stat[0] += ran * millisecond
        stat[1] += waited * millisecond
        clock[0] += 1000 * millisecond
        return turns.look()

    assert not after(100, 5)
    assert after(80, 20)
    assert after(95, 5)  # it waits still, if not for long
    assert after(5, 0)  # which is too short to judge by
    assert not after(100, 0)
    monkeypatch.setattr(cores, "open", lambda *_: io.BytesIO(b""), raising=False)
    assert not after(0, 100)


@pytest.mark.skipif(not cores._pools(), reason="no OpenMP that could be told")
def test_a_solve_leaves_the_number_of_threads_as_it_was(turns, monkeypatch):
    monkeypatch.setattr(cores._Turns, "look", lambda self: True)
    assert threads_in_a_solve() == 1
    assert torch.get_num_threads() == 2

    singular = fl.SparseMatrix.from_dense(torch.ones(3, 2, dtype=torch.float64))
    with pytest.raises(fl.RankDeficientError):
        fl.lstsq(singular, torch.ones(3, dtype=torch.float64))
    assert torch.get_num_threads() == 2
    other = SimpleNamespace(number=7)  # another runtime, as scikit-learn's wheel brings
    other.get_num_threads, other.set_num_threads = lambda: other.number, lambda number: setattr(other, "number", number)
    with monkeypatch.context() as within:
        pools = *cores._pools(), other
        within.setattr(cores, "_pools", lambda: pools)
        assert threads_in_a_solve() == 1
    assert (torch.get_num_threads(), other.number) == (2, 7)
    with cores.shared_cores, cores.steady():
        assert torch.get_num_threads() == 2
    torch.use_deterministic_algorithms(True)
    try:
        assert threads_in_a_solve() == 2
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(cores._Turns, "look", lambda self: False)
    assert threads_in_a_solve() == 2


@pytest.mark.skipif(not cores._pools(), reason="no OpenMP that could be told")
def test_torch_stands_back_while_our_own_threads_work(turns, monkeypatch):
    monkeypatch.setattr(cores._Turns, "look", lambda self: False)

    def seen():
        return torch.get_num_threads(), cores.threads(), cores.are_alone()

    def fails():
        with cores.alone():
            assert seen() == (1, 2, True)
            with cores.alone(), cores.together():
                assert seen() == (2, 2, False)
            assert seen() == (1, 2, True)
            raise ArithmeticError

    with cores.alone():  # not within an operation of this library
        assert seen() == (2, 2, False)
    with cores.shared_cores:
        with pytest.raises(ArithmeticError):
            fails()
        assert seen() == (2, 2, False)
        with cores.alone():
            monkeypatch.setattr(cores._Turns, "look", lambda self: True)  # others come
            cores.settle()
            assert seen() == (1, 1, True)
            with cores.together():
                assert seen() == (1, 1, False)
    assert seen() == (2, 2, False)


@pytest.mark.skipif(not cores._pools(), reason="no OpenMP that could be told")
@pytest.mark.parametrize(("copies", "threads"), [(1, 2), (200, 1)])
def test_rules_of_middling_size_leave_the_cores_to_our_own_threads(turns, monkeypatch, copies, threads):
    """Not those of small ones, on which torch works alone anyway; solves within have the threads that they had."""
    monkeypatch.setattr(cores._Turns, "look", lambda self: False)
    pattern, values, b = problem(60, 20)
    seen, within, rule, kernel = [], [], augmented.Solve._vjp, small_kernels.run

    def spied(*given):
        seen.append(torch.get_num_threads())
        return rule(*given)

    monkeypatch.setattr(augmented.Solve, "_vjp", spied)
    monkeypatch.setattr(small_kernels, "run", lambda *given: within.append(cores.threads()) or kernel(*given))
    many = values.expand(copies, -1) + torch.arange(copies, dtype=torch.float64)[:, None] / copies

    def loss(V):
        return torch.func.vmap(lambda v: fl.lstsq(fl.SparseMatrix(v, pattern), b).square().sum())(V).sum()

    found = torch.func.grad(loss)(many)
    assert seen == [threads]
    assert set(within) == ({2} if kernels.available(b.device) else set())
    assert torch.get_num_threads() == 2
    torch.testing.assert_close(found[0], torch.func.grad(loss)(many[:1])[0])


@pytest.mark.skipif(not hasattr(os, "fork") or not cores._pools(), reason="no forks, or no OpenMP that could be told")
def test_a_child_that_is_forked_in_the_midst_of_a_solve_keeps_its_one_thread(turns, monkeypatch):
    monkeypatch.setattr(cores._Turns, "look", lambda self: True)
    parent, left = os.getpid(), [8]

    def matvec(scale, x):
        left[0] -= 1
        if not left[0] and turns.depth and not os.fork():
            left[0] = -1
        return scale * x

    diagonal = torch.linspace(1, 3, 20, dtype=torch.float64)
    fl.lstsq(fl.LinearOperator(matvec, diagonal, 20), torch.ones(20, dtype=torch.float64))
    if os.getpid() != parent:
        os._exit(torch.get_num_threads())
    assert left[0] <= 0
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 1
    assert torch.get_num_threads() == 2


@pytest.mark.slow
@pytest.mark.skipif(not cores._pools() or not os.path.exists("/proc/thread-self/schedstat"), reason="not told here")
def test_a_solve_beside_busy_processes_works_alone():
    program = (
        "import sys, time, torch; sys.path.insert(0, 'tests'); from test_cores import threads_in_a_solve\n"
        "torch.set_num_threads(2); end = time.monotonic() + 60\n"
        "while threads_in_a_solve() != 1 and time.monotonic() < end: pass\n"
        "print(threads_in_a_solve(), torch.get_num_threads())\n"
    )
    others = [subprocess.Popen(BUSY) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        time.sleep(0.2)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert done.stdout.strip() == "1 2", done.stderr
