"""What programs in processes of their own are made of: a problem for each solver, forks, ends.

`python worlds.py CASE SOLVER SIZE` runs a case of `CASES`; tests/test_forks.py says what each shows.
"""

import multiprocessing
import os
import sys
import threading
import time
import traceback

import torch

import functional_lstsq as fl

SOLVERS = {"auto": None, "direct": fl.Direct(), "dense": fl.Dense(), "cgls": fl.CGLS()}
SECONDS = 100  # after which a process that has not ended is taken to hang


def grid(s):
    """Differences along the edges of a grid of s^3 points, and one point: its factor has threads from about 32^3."""
    i = torch.arange(s**3).view(s, s, s)
    ends = [torch.stack([i.narrow(d, 0, s - 1).reshape(-1), i.narrow(d, 1, s - 1).reshape(-1)]) for d in range(3)]
    ends = torch.cat(ends, 1)
    k = ends.shape[1]
    rows = torch.cat([torch.arange(k), torch.arange(k), torch.tensor([k])])
    columns = torch.cat([ends[0], ends[1], torch.tensor([0])])
    values = torch.cat([-torch.ones(k), torch.ones(k + 1)]).double()
    return fl.SparseMatrix(values, fl.SparsePattern(torch.stack([rows, columns]), (k + 1, s**3)))


class Problem:
    """A solve and its gradient, held to each other: x is linear in b."""

    def __init__(self, solver, size):
        self.solver, self.A = SOLVERS[solver], grid(size)
        self.b = torch.linspace(0, 1, self.A.shape[0], dtype=torch.float64)

    def solve(self, b):
        return fl.lstsq(self.A, b, solver=self.solver)

    def __call__(self):
        # More numbers than torch lets one thread add: the threads of OpenMP are there now, or waited for.
        assert torch.ones(10**6, dtype=torch.float64).exp().sum() > 0
        by_b, x = torch.func.grad(lambda b: self.solve(b).sum())(self.b), self.solve(self.b)
        assert abs(float(by_b @ self.b / x.sum()) - 1) < 1e-6

    def on_new_pattern(self):
        pattern = fl.SparsePattern(self.A.pattern.indices, self.A.shape)
        self.A = fl.SparseMatrix(self.A.values, pattern)
        self()


def in_fork(call):
    """Fails unless `call` ends well in a forked process."""
    child = os.fork()
    if not child:
        try:
            call()
        except BaseException:
            traceback.print_exc()
            os._exit(3)
        os._exit(0)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, status
            return
        time.sleep(0.02)
    os.kill(child, 9)
    raise SystemExit("the forked process hangs")


def fork(problem):
    """After solves in the parent: on its pattern, on a new one, and in a fork of the fork."""
    problem()
    in_fork(problem)
    in_fork(problem.on_new_pattern)

    def again():
        problem()
        in_fork(problem)

    in_fork(again)
    problem()


def kept(problem):
    """A graph and a preconditioner that the parent made, whose factors a child goes on with."""
    b = problem.b.clone().requires_grad_()
    loss = problem.solve(b).sum()
    factor = fl.CGLS(preconditioner=fl.GramFactor(problem.A, solver=fl.Direct()))
    x = fl.lstsq(problem.A, problem.b, solver=factor)

    def go_on():
        loss.backward()
        assert abs(float(b.grad @ b / loss) - 1) < 1e-6
        assert torch.allclose(fl.lstsq(problem.A, problem.b, solver=factor), x, rtol=1e-8)

    in_fork(go_on)


def fork_among_threads(problem):
    """A fork at many moments of a solve in another thread: no lock is held by a thread that the child lacks."""
    stop = threading.Event()

    def work():
        while not stop.is_set():
            Problem.on_new_pattern(problem)

    problem()
    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(10):
        in_fork(Problem(*sys.argv[2:3], 4))
        time.sleep(0.05)
    stop.set()
    thread.join()


def _of_method(name, size):
    Problem(name, size)()


def start(problem, method):
    """A process that multiprocessing starts, by spawn or forkserver."""
    problem()
    context = multiprocessing.get_context(method)
    process = context.Process(target=_of_method, args=(sys.argv[2], 6))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == 0, process.exitcode


class Solved(torch.utils.data.Dataset):
    """Each item is a solve, in whatever process it is asked for."""

    def __init__(self, problem):
        self.problem = problem

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return self.problem.solve((1 + index) * self.problem.b)


def loader(problem):
    """An epoch of a DataLoader with two forked workers."""
    problem()
    first = problem.solve(problem.b)
    batches = torch.utils.data.DataLoader(Solved(problem), batch_size=3, num_workers=2, multiprocessing_context="fork")
    every = torch.cat(list(batches))
    assert torch.allclose(every, torch.arange(1.0, 13.0).double()[:, None] * first, rtol=1e-8)


def end(problem):
    """The interpreter ends while daemon threads solve."""
    problem()

    def work():
        while True:
            problem.on_new_pattern()

    for _ in range(2):
        threading.Thread(target=work, daemon=True).start()
    time.sleep(0.2)


CASES = {
    "fork": fork,
    "kept": kept,
    "fork among threads": fork_among_threads,
    "spawn": lambda problem: start(problem, "spawn"),
    "forkserver": lambda problem: start(problem, "forkserver"),
    "loader": loader,
    "end": end,
}

if __name__ == "__main__":
    torch.set_num_threads(2)
    CASES[sys.argv[1]](Problem(sys.argv[2], int(sys.argv[3])))
