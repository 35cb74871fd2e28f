"""How far a long computation has come, told to whoever watches: `progress`.

Solvers, fits and studies call `tell`, which does nothing unless somebody watches in the same thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

Given = ParamSpec("Given")
Result = TypeVar("Result")

_DELAY = 0.5  # seconds before a line is shown


class Step(NamedTuple):
    """What `progress` tells.

    Attributes:
        phase: "search" (by CGLS, for the weakest direction, before its first solution), "solve" (an iteration of
            conjugate gradients, of corrections around a factor too), "factor" (a matrix that `Direct` has factored),
            "fit" (a damped step of a nonlinear or robust fit) or "study" (a block of columns of a study).
        iteration: how many there were in this phase since the watch began, this one included.
        total: of about how many, if that is known; the most there can be, for "fit".
        error: the norm of the gradient for "search" and "solve", columns scaled; the size of the step, relative to x,
            for "fit"; NaN where nothing is known.
    """

    phase: str
    iteration: int
    total: int | None
    error: float


class _Watch:
    def __init__(self, show: Callable[[Step], object]):
        self.show, self.counts = show, dict[str, int]()

    def tell(self, phase: str, error: float, total: int | None, count: int) -> None:
        for _ in range(count):
            self.counts[phase] = self.counts.get(phase, 0) + 1
            self.show(Step(phase, self.counts[phase], total, error))


_watches: ContextVar[tuple[_Watch, ...]] = ContextVar("watches", default=())
_iterates: ContextVar[Callable[[Tensor], object] | None] = ContextVar("iterates", default=None)
_phase: ContextVar[str] = ContextVar("phase", default="solve")


def is_watched() -> bool:
    """Whether anybody wants to know, so that numbers need not be fetched for nobody."""
    return bool(_watches.get())


def tell(error: float = math.nan, *, phase: str | None = None, total: int | None = None, count: int = 1) -> None:
    """One step more, or several."""
    for watch in _watches.get():
        watch.tell(phase or _phase.get(), error, total, count)


@contextmanager
def iterates(show: Callable[[Tensor], object]) -> Iterator[None]:
    """Have `show` called with x (P, n, k) every few iterations of CGLS towards a solution, as far as it has come."""
    with _shown_by(show):
        yield


@contextmanager
def seen_as(of: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """What is iterated within is `of` it to those who watch iterates: in other units, or with columns beside it."""
    outer = _iterates.get()
    with _shown_by(None if outer is None else lambda y: outer(of(y))):
        yield


@contextmanager
def _shown_by(show: Callable[[Tensor], object] | None) -> Iterator[None]:
    before = _iterates.set(show)
    try:
        yield
    finally:
        _iterates.reset(before)


def iterate_shown(like: Tensor | None) -> Callable[[Tensor, Tensor], object] | None:
    """What shows columns of an iterate like `like`, given with their numbers; of None, for a run of corrections, none.

    None where nobody looks.
    """
    show = _iterates.get()
    if show is None or like is None:
        return None
    reached = torch.zeros_like(like)

    def put(columns: Tensor, numbers: Tensor) -> None:
        reached[:, :, numbers] = columns
        show(reached)

    return put


def in_blocks(numbers: Tensor, size: int) -> Iterable[Tensor]:
    """Numbers of columns in blocks, of a study that tells of each when it is done; a compiler sees the blocks alone."""
    blocks = numbers.split(size)
    return blocks if torch.compiler.is_compiling() else _told(blocks)


def _told(blocks: Sequence[Tensor]) -> Iterator[Tensor]:
    for block in blocks:
        yield block
        tell(phase="study", total=len(blocks))


@contextmanager
def searching() -> Iterator[None]:
    """What iterates within is no solution."""
    before = _phase.set("search")
    try:
        yield
    finally:
        _phase.reset(before)


def progress(show: Callable[[Step], object] | None = None) -> AbstractContextManager[None]:
    """Watch what is computed within a `with` block, derivatives included: on a terminal, or by a function.

    Args:
        show: called with a `Step(phase, iteration, total, error)` after each step; an exception in it ends the
            computation. None for a line on standard error, by tqdm.

    Functions that may take long have it as an option for the call alone: `lstsq(A, b, progress=True)`.

    Steps of the phase "solve" add up to `info.iterations` of a solve with one right-hand side; with several, all are
    iterated together, and the largest of `info.iterations` is theirs. Those of "fit" add up to that of a fit.

    Not told: what runs within torch.compile's graphs on other threads, and in backward passes on a GPU.

    >>> import torch, functional_lstsq as fl
    >>> A, steps = fl.vstack([fl.eye(3), fl.diags(torch.tensor([1.0, 2.0, 3.0]))]), []
    >>> with fl.progress(steps.append):
    ...     solution = fl.solve(A, torch.ones(6), solver=fl.CGLS())
    >>> sum(step.phase == "solve" for step in steps) == int(solution.info.iterations)
    True
    """
    if show is not None and not callable(show):
        raise TypeError(f"show must be callable or None, got {show!r}")
    return _watched(show)


def watchable(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Have `function` watched if its option progress= says so: True for a line, or a function, as of `progress`."""

    @wraps(function)
    def either(*args: Given.args, **options: Given.kwargs) -> Result:
        asked: Any = options.get("progress", False)
        if asked is False:
            return function(*args, **options)
        if asked is not True and not callable(asked):
            raise TypeError(f"progress must be True, False or callable, got {asked!r}")
        if torch.compiler.is_dynamo_compiling():
            raise TypeError("torch.compile cannot take progress=; put `with fl.progress():` around what is compiled")
        with _watched(None if asked is True else asked):
            return function(*args, **options)

    return either


@contextmanager
def _watched(show: Callable[[Step], object] | None) -> Iterator[None]:
    bar: Any = tqdm(desc="starting", unit=" it", delay=_DELAY, leave=False) if show is None else None

    def on_bar(step: Step) -> None:
        of = "" if step.total is None else f" of {step.total}"
        bar.set_description(f"{step.phase} {step.iteration}{of}", refresh=False)
        if not math.isnan(step.error):
            bar.set_postfix(error=f"{step.error:.1e}", refresh=False)
        bar.update()

    before = _watches.set((*_watches.get(), _Watch(on_bar if show is None else show)))
    try:
        yield
    finally:
        _watches.reset(before)
        if bar is not None:
            bar.close()
