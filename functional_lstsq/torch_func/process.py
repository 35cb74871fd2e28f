"""What becomes of a process that forks, and of threads that solve when it ends."""

from __future__ import annotations

import atexit
import os
import threading
import time

import torch

_GRACE = 0.2  # seconds that a thread between two operations is waited for, at the end of the process
_pools: set[int] = set()  # numbers of threads for which this process, or one it was forked from, has made a pool
_lost: frozenset[int] = frozenset()  # those of them whose threads did not come along


def pool_of(count: int) -> int:
    """The least number of threads, from `count`, for which rslab has no pool that a fork has left without its threads.

    It keeps a pool for each number, and would wait for ever for one that it believes it has.
    """
    while count in _lost:
        count += 1
    _pools.add(count)
    return count


class Entrance:
    """Where threads go in and out of operations: at the end of the process they are waited for, and no other begins.

    A thread that comes back from native code while the interpreter ends is ended there, through frames of C++ that
    abort the process. So daemon threads that solve are held at the entrance, from before that moment on.
    """

    def __init__(self):
        self.inside: dict[threading.Thread, int] = {}  # operations that each thread is in, one within another
        self.held: set[threading.Thread] = set()
        self.closed = False

    def __enter__(self) -> None:
        thread = threading.current_thread()
        if thread is threading.main_thread():
            return
        if self.closed and not self.inside.get(thread):
            self.held.add(thread)
            threading.Event().wait()  # for ever
        if thread not in self.inside:  # with this one, those that have ended are forgotten
            self.inside = {other: depth for other, depth in self.inside.items() if other.is_alive()}
        self.inside[thread] = self.inside.get(thread, 0) + 1

    def __exit__(self, *_: object) -> None:
        thread = threading.current_thread()
        if thread is not threading.main_thread():
            self.inside[thread] -= 1

    def close(self) -> None:
        """Let no thread in any more, and wait for those inside."""
        self.closed, end = True, time.monotonic() + _GRACE
        while True:
            free = [(thread, depth) for thread, depth in self.inside.items() if thread not in self.held]
            free = [(thread, depth) for thread, depth in free if thread.is_alive()]
            if not free or (time.monotonic() > end and not any(depth for _, depth in free)):
                return
            time.sleep(0.001)


entrance = Entrance()
atexit.register(entrance.close)


def _begin_fork() -> None:
    global _lost
    _lost = frozenset(_pools)
    entrance.__init__()  # type: ignore[misc]
    # In any operation that is large enough GNU's OpenMP would wait for ever for threads that only the parent has.
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_fork)
