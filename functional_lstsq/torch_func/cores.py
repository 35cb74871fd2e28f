"""How many threads of OpenMP an operation uses on a machine whose cores others use too.

A region of OpenMP ends with the last of its threads, and one that has no core waits for its turn: some 8 ms, where the
work takes 50 microseconds. Linux counts how long each thread was ready to run and did not (/proc/*/schedstat). Where
this one has waited so, it works alone until it has a core to itself again. Operations add up in another order then, so
the last bits may differ; not under `torch.use_deterministic_algorithms(True)`.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_WINDOW = 10_000_000  # nanoseconds of running and waiting that a judgement rests on
_CROWDED, _FREE = 0.1, 0.02  # shares of waiting, above which a thread works alone, and below which no more


class _Turns(threading.local):
    """What the calling thread has had of the cores.

    Attributes:
        file: its schedstat, None before the first look.
        thread: whose file that is; a forked child begins with its parent's.
        ran, waited: nanoseconds, when it was judged last.
        crowded: the judgement.
        depth: operations that it is in, one within another.
        asked: threads that OpenMP is given back in the end, None where nothing was changed.
        steady: nothing is changed.
    """

    file: Any = None
    thread = ran = waited = depth = 0
    crowded = False
    asked: int | None = None
    steady = False

    def look(self) -> bool:
        """Whether others use the cores."""
        if self.thread != threading.get_native_id():
            self.thread, self.ran, self.waited, self.crowded = threading.get_native_id(), 0, 0, False
            try:
                self.file = open("/proc/thread-self/schedstat", "rb", buffering=0)  # noqa: SIM115, for the thread's life
            except OSError:
                self.file = False
        if not self.file:
            return False
        ran, waited = map(int, os.pread(self.file.fileno(), 64, 0).split()[:2])
        late, whole = waited - self.waited, ran - self.ran + waited - self.waited
        if whole >= _WINDOW:
            self.crowded = late > (_FREE if self.crowded else _CROWDED) * whole
            self.ran, self.waited = ran, waited
        return self.crowded


_turns = _Turns()


@functools.cache
def _pools() -> tuple[Any, ...]:
    """OpenMP's, for the calling thread each."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return ()
    return tuple(pool for pool in ThreadpoolController().lib_controllers if pool.user_api == "openmp")


def _use(threads: int) -> None:
    for pool in _pools():
        pool.set_num_threads(threads)


def settle() -> None:
    """Work alone from here on, within `shared_cores`, where others use the cores."""
    if _turns.depth and not _turns.steady and _turns.asked is None and _turns.look():
        threads = torch.get_num_threads()
        if threads > 1 and not torch.are_deterministic_algorithms_enabled():
            _turns.asked = threads
            _use(1)


class SharedCores:
    """Within it a thread works alone where others use the cores, and OpenMP is as it was afterwards."""

    def __enter__(self) -> None:
        _turns.depth += 1
        if _turns.depth == 1:
            settle()

    def __exit__(self, *_: object) -> None:
        _turns.depth -= 1
        if not _turns.depth:
            _give_back()


def _give_back() -> None:
    if _turns.asked is not None:
        _use(_turns.asked)
        _turns.asked = None


shared_cores = SharedCores()


@contextmanager
def steady() -> Iterator[None]:
    """With as many threads as asked for, whoever else is there: for what is to be the same to the bit elsewhere."""
    before, _turns.steady = _turns.steady, True
    _give_back()
    try:
        yield
    finally:
        _turns.steady = before


def _begin_fork() -> None:
    _turns.asked = None  # a child has one thread, for good


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_fork)
