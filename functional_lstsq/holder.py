"""What a solve is asked for, and where its factors live between the solve and its derivatives."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .pattern import SparsePattern
from .products import Operator
from .solvers import Auto
from .solvers.system import System
from .transforms import constant


class Settings(NamedTuple):
    """What a solve is asked for."""

    solver: Any
    minimum_norm: bool
    precision: float  # machine epsilon of the user's dtype; values and right-hand sides come in double precision
    extended: bool = False  # residuals in extended precision whether or not they are needed
    exact: bool = True  # values are the user's own, not products with weights
    wide: bool = False  # the user's matrix is the adjoint


_numbers: dict[Settings, int] = {}
by_number: list[Settings] = []


@constant
def number_of(
    solver: Any,
    minimum_norm: bool,
    precision: float,
    extended: bool = False,
    exact: bool = True,
    wide: bool = False,
) -> int:
    """The number that stands for these settings, equal ones sharing one: a compiled graph passes numbers only.

    It is kept for good, since a graph may come back to it, so reuse solver objects rather than making one a call.
    """
    settings = Settings(Auto() if solver is None else solver, minimum_norm, precision, extended, exact, wide)
    if settings not in _numbers:
        _numbers[settings] = len(by_number)
        by_number.append(settings)
    return _numbers[settings]


class Holder:
    """The factors of one matrix, for as long as the autograd graph that needs them lives.

    Made for each call and kept by its graph alone. The kernel fills it in the forward solve and finds it filled in
    every derivative, whatever the transformation, as long as it is asked for the same values.
    """

    __slots__ = ("__weakref__", "damp", "factors", "key", "solves", "system", "values", "version")
    key: int
    solves: int  # made so far
    values: Tensor
    damp: Tensor | None
    version: int
    system: System
    factors: Any
    living: weakref.WeakValueDictionary[int, Holder] = weakref.WeakValueDictionary()
    numbers = itertools.count(1)

    def __init__(self):
        self.key, self.factors, self.solves = next(Holder.numbers), None, 0
        Holder.living[self.key] = self

    def prepare(self, settings: Settings, values: Tensor, damp: Tensor | None, pattern: SparsePattern):
        """(system, factors), made afresh if `values` or `damp` are not those of last time."""
        if not self._holds(values, damp):
            self.system = System(
                Operator(pattern, values),
                damp,
                settings.precision,
                extended=settings.extended,
                exact=settings.exact,
            )
            self.factors = settings.solver.prepare(self.system, minimum_norm=settings.minimum_norm)
            self.values, self.version, self.damp = values, _version(values), damp
        return self.system, self.factors

    def _holds(self, values: Tensor, damp: Tensor | None) -> bool:
        if self.factors is None or self.values.shape != values.shape or _version(self.values) != self.version:
            return False
        same = self.values.data_ptr() == values.data_ptr() and self.values.stride() == values.stride()
        if not (same or torch.equal(self.values, values)):
            return False
        if damp is None or self.damp is None:
            return damp is self.damp
        return torch.equal(damp, self.damp)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
