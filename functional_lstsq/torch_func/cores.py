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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_WINDOW = 10_000_000  # nanoseconds of running and waiting that a judgement rests on
_CROWDED, _FREE = 0.1, 0.02  # shares of waiting, above which a thread works alone, and below which no more

_SERIAL, _LARGE = (
    2**15,
    2**22,
)  # numbers from which torch takes several threads, and from which they gain more than that
_FEW = 8  # threads, above which there are cores enough


class _Turns(threading.local):
    """What the calling thread has had of the cores.

    Attributes:
        ran, waited, looked: nanoseconds, and the moment, when it was judged last.
        crowded: the judgement.
        depth: operations that it is in, one within another.
        asked: OpenMP's pools and the threads that each is given back in the end, None where nothing was changed.
        steady: nothing is changed.
        own: threads of our own within `alone`.
    """

    ran = waited = looked = depth = 0
    crowded = False
    asked: list[tuple[Any, int]] | None = None
    steady = False
    own: int | None = None

    def look(self) -> bool:
        """Whether others use the cores."""
        now = time.monotonic_ns()
        if now - self.looked < _WINDOW:
            return self.crowded
        self.looked = now
        try:
            with open("/proc/thread-self/schedstat", "rb") as file:
                ran, waited = map(int, file.read().split()[:2])
        except (OSError, ValueError):  # another system, or no descriptor left
            return False
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


def settle() -> None:
    """Work alone from here on, within `shared_cores`, where others use the cores."""
    if not _turns.depth or _turns.steady or (_turns.asked is not None and _turns.own is None) or not _turns.look():
        return
    if _turns.own is not None:
        _turns.own = 1
    elif torch.get_num_threads() > 1 and not torch.are_deterministic_algorithms_enabled():
        _ask_for_one()


def _ask_for_one() -> None:
    _turns.asked = [(pool, pool.get_num_threads()) for pool in _pools()]
    for pool, _ in _turns.asked:
        pool.set_num_threads(1)


def threads() -> int:
    """How many threads of our own may work."""
    return torch.get_num_threads() if _turns.own is None else _turns.own


def are_alone() -> bool:
    """Whether this is within `alone`."""
    return _turns.own is not None


@contextmanager
def alone() -> Iterator[None]:
    """Torch's operations take one thread within it, and threads of our own as many as torch had, within `shared_cores`.

    After each operation torch's other threads spin for some 7 ms (libgomp) on cores that ours would work on.
    """
    given = torch.get_num_threads()
    if not _turns.depth or _turns.own is not None or (given > 1 and not _pools()):
        yield
        return
    _turns.own = given  # one, where others use the cores
    if given > 1:
        _ask_for_one()
    try:
        yield
    finally:
        _turns.own = None
        if given > 1:
            _give_back()


@contextmanager
def together() -> Iterator[None]:
    """Within `alone`: with torch's threads after all, for what they gain most by."""
    own, _turns.own = _turns.own, None
    if own is not None and own > 1:
        _give_back()
    try:
        yield
    finally:
        if own is not None and own > 1 and _turns.asked is None:
            _ask_for_one()
        _turns.own = own


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
    asked, _turns.asked = _turns.asked, None
    for pool, threads in asked or ():
        if pool.get_num_threads() == 1:  # which the user has not changed in between
            pool.set_num_threads(threads)


shared_cores = SharedCores()


@contextmanager
def steady() -> Iterator[None]:
    """With as many threads as asked for, whoever else is there: for what is to be the same to the bit elsewhere."""
    before, _turns.steady = _turns.steady, True
    if _turns.own is None:
        _give_back()
    try:
        yield
    finally:
        _turns.steady = before


@contextmanager
def quiet(numbers: int) -> Iterator[None]:
    """`alone`, for operations on so many numbers beside those of a solve, where threads of torch would gain little.

    They would spin while the solve begins: 14 ms of 116 for value and gradient of 200,000 x 20,000, 7 of 20 for 1,000
    problems of 60 x 20.
    """
    if not _SERIAL < numbers <= _LARGE or torch.get_num_threads() > _FEW:
        yield
        return
    with shared_cores, alone():
        yield


def _begin_fork() -> None:
    _turns.asked = _turns.own = None  # a child has one thread, for good
    _turns.ran = _turns.waited = _turns.looked = 0
    _turns.crowded = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_fork)
