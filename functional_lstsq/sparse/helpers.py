"""Threads that help with a kernel's work where they have a core; a process that is forked makes its own.

And what keeps the garbage collector out while kernels are loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple


def _find_core() -> Callable[[], int] | None:
    """What tells the core of the calling thread, where threads can be told on which to run."""
    return getattr(ctypes.CDLL(None), "sched_getcpu", None) if hasattr(os, "sched_setaffinity") else None


class _Helpers(NamedTuple):
    pool: ThreadPoolExecutor
    threads: list[int]  # their numbers in the system

    @classmethod
    def of(cls, count: int) -> _Helpers:
        threads: list[int] = []

        def begin() -> None:
            threads.append(threading.get_native_id())

        return cls(ThreadPoolExecutor(count, "functional_lstsq", initializer=begin), threads)

    def move_away(self) -> None:
        """Have them woken on other cores than the caller's.

        Linux wakes a thread where its waker runs, and on two cores often leaves it waiting there for 2 ms.
        """
        if _core is None:
            return
        with contextlib.suppress(OSError):  # of a system that does not allow it
            others = os.sched_getaffinity(0) - {_core()}
            for thread in self.threads if others else ():
                os.sched_setaffinity(thread, others)


_core = _find_core()
_groups: dict[int, _Helpers] = {}


def call_for_help(count: int, work: Callable[..., object], *arguments: Any, long: bool) -> list[Future]:
    """`count` threads call `work`, as soon as they have a core; for `long` work it matters which."""
    group = _groups.get(count)
    if group is None:
        group = _groups.setdefault(count, _Helpers.of(count))
    if long:
        group.move_away()
    called = []
    try:
        for _ in range(count):
            called.append(group.pool.submit(work, *arguments))
    except RuntimeError:  # the process ends, or may not start another thread
        pass
    return called


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_groups.clear)  # whose threads are the parent's


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection, which would look through all of torch for 0.12 s of the 0.3 s that loading takes."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
