"""Rows of problems in one process that has all of them, and in several that have some each; how these are started.

A case is a function of a `Place`, which gives {kind: [tensors]}: "same" for what is the same on all ranks, "rows" for
what has this rank's rows in front, "entries" for what has this rank's entries there.
"""

import datetime
import importlib
import os
import threading
import time

import torch
import torch.distributed as dist
from helpers import normal, problem

import functional_lstsq as fl

SPLITS = {
    "even": lambda m: (0, m // 2, m),
    "one": lambda m: (0, m),
    "of one row and of none": lambda m: (0, m - 1, m, m),
    "four": lambda m: (0, 1, 1, m // 3, m),
}
CGLS = fl.CGLS(tolerance=1e-14)
SOLVERS = {"auto": None, "dense": fl.Dense(), "direct": fl.Direct(), "cgls": CGLS}


def multiplied(A, x):
    return A.matmul(x)


class Place:
    """Rows first to last of a problem, in the group of all ranks; without a group all of them, in one process.

    `by_products`: as operators.
    """

    def __init__(self, split=None, *, m=40, n=8, seed=1, by_products=False, **options):
        self.alone, self.m, self.by_products = split is None, m, by_products
        pattern, values, b = options.pop("given", None) or problem(m, n, seed=seed, **options)
        rank = 0 if self.alone else dist.get_rank()
        self.first, self.last = (0, m) if self.alone else SPLITS[split](m)[rank : rank + 2]
        self.mine = (pattern.indices[0] >= self.first) & (pattern.indices[0] < self.last)
        indices = pattern.indices[:, self.mine].clone()
        indices[0] -= self.first
        self.pattern = fl.SparsePattern(indices, (self.last - self.first, n))
        self.values, self.b = values[self.mine], self.rows(b)
        self.weights = self.rows(0.5 + normal(m, seed=seed + 1).abs())
        self.A = self.matrix(self.values)

    def rows(self, whole):
        return whole[self.first : self.last]

    def entries(self, seed):
        """Normally distributed numbers at the entries."""
        return normal(len(self.mine), seed=seed)[self.mine]

    def matrix(self, values):
        A = fl.SparseMatrix(values, self.pattern)
        A = fl.LinearOperator(multiplied, A, self.pattern.shape[1]) if self.by_products else A
        return A if self.alone else fl.distributed.shard_rows(A)

    def entries_of(self, A):
        """The values of this rank's rows of A, which may be a gradient by a matrix."""
        rows = A if self.alone else A.rows
        return rows.params.values if self.by_products else rows.values

    def total(self, t):
        return t if self.alone else fl.distributed.total(t)

    def shared(self, t):
        return t if self.alone else fl.distributed.shared(t)


def start(rank, size, folder, seconds):
    """Make this process a rank, on the loopback device, by a file in a folder."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = datetime.timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=size, timeout=timeout)


def work(rank, size, folder, split, module):
    """All cases of a module on a split, and on two ranks what is refused; what came out is left in the folder."""
    found, of = {}, importlib.import_module(module)  # before `start` sets a dtype, as in the process of the tests
    start(rank, size, folder, 120)
    for name, (case, options) in of.CASES.items():
        try:
            found[name] = case(Place(split, **options))
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            found[name] = repr(error)
    for name, refused in of.refusals(rank).items() if size == 2 else ():
        try:
            refused()
            found[name] = "nothing", ""
        except (RuntimeError, TypeError, ValueError) as error:
            found[name] = type(error).__name__, str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_rank_1(rank, where, name, other, call):
    """`call()`, for which rank 1 alone has another function of that name."""
    before = getattr(where, name)
    if rank == 1:
        setattr(where, name, other)
    try:
        return call()
    finally:
        setattr(where, name, before)


def of_rank(rank, one, other):
    return one if rank == 1 else other


def work_until_lost(rank, size, folder, how):
    """Rank 1 dies or sleeps in the middle of a solve of rank 0, whose group waits two seconds.

    What is told, and how long after the last sum began, is left in the folder.
    """
    start(rank, size, folder, 2)
    place, calls = Place("even", m=1500, n=520, density=0.01), 0
    whole, begun = fl.distributed.ranks.Ranks.sum, time.monotonic()

    def lost(ranks, t):
        nonlocal calls, begun
        calls, begun = calls + 1, time.monotonic()
        if rank == 1 and calls == 30:
            if how == "dies":
                os._exit(1)
            if how == "raises":
                raise ValueError("of this rank alone")
            time.sleep(6)
        return whole(ranks, t)

    fl.distributed.ranks.Ranks.sum = lost
    try:
        fl.lstsq(place.A, place.b, solver=CGLS)
        told = "nothing"
    except fl.distributed.RankError as error:
        told = str(error)
    torch.save((told, time.monotonic() - begun), f"{folder}/{rank}.pt")
    threading.Timer(0.1, os._exit, [0]).start()
