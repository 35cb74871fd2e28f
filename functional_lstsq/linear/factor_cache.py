"""Where the factors of a solve live between it and its derivatives."""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from ..solvers.base import Factors
from ..solvers.small import Small
from ..solvers.system import System
from ..sparse.pattern import SparsePattern
from ..torch_func.operations import define
from .settings import Settings


class Holder:
    """The factors of one matrix, for as long as the autograd graph that needs them lives, or as a user keeps them.

    A holder is made for each solve, and has a key, an integer by which it is found among the living. Its token is a
    tensor of that one number, which the solve gives and its derivatives are given. The memory of the token keeps the
    holder: so a graph keeps it, compiled or not, and nothing else does. Derivatives find the factors as long as they
    ask for the same values.

    A user who keeps factors holds a token of two numbers, the key and 0, which is given to solves.
    """

    __slots__ = ("__weakref__", "asked", "damp", "factors", "key", "small", "system", "values", "versions")
    key: int
    asked: tuple[Settings, Tensor | None]  # with the indices of the entries
    values: tuple[Tensor, ...]
    damp: Tensor | None
    versions: list[int]
    system: System
    factors: Factors | None
    small: Small | None  # made first of small matrices, and the others if it does not suffice
    living: weakref.WeakValueDictionary[int, Holder] = weakref.WeakValueDictionary()
    keys = itertools.count(1)

    def __init__(self):
        self.key, self.factors, self.small = next(Holder.keys), None, None
        Holder.living[self.key] = self

    def token(self, *, kept: bool = False) -> Tensor:
        """A tensor of the key, whose memory keeps this holder alive; `kept`: that of a user."""
        memory = _Memory(self.key.to_bytes(8, sys.byteorder) + bytes(8 if kept else 0))
        memory.holder = self
        return torch.frombuffer(memory, dtype=torch.int64)

    @classmethod
    def of(cls, token: Tensor | None) -> Holder:
        """The holder of a token; a new one if there is none any more."""
        living = None if token is None else cls.living.get(int(token[0]))
        return living or cls()

    def prepare(
        self,
        settings: Settings,
        indices: Tensor | None,
        values: tuple[Tensor, ...],
        damp: Tensor | None,
        make: Callable[[], System],
    ) -> tuple[System, Factors]:
        """(system, factors), made afresh if what is asked for is not that of last time."""
        served = self.serves(settings, indices, values, damp)
        if not served or self.factors is None:
            self.system = make()
            self.factors = settings.solver.prepare(self.system, minimum_norm=settings.minimum_norm)
            if not isinstance(self.factors, Factors):
                kind, got = type(settings.solver).__name__, type(self.factors).__name__
                raise TypeError(f"{kind}.prepare must give Factors, of functional_lstsq.solvers, got {got}")
            self._remember(settings, indices, values, damp)
            self.small = self.small if served else None
        assert self.factors is not None
        return self.system, self.factors

    def prepare_small(
        self, settings: Settings, pattern: SparsePattern, values: tuple[Tensor, ...], damp: Tensor | None
    ) -> Small | None:
        """As `prepare`, for one of the matrices that `is_small` tells; None of one that has factors of another kind."""
        if not self.serves_small(settings, pattern, values, damp):
            self.factors = None
            self.small = Small.of(settings.solver, settings.precision, pattern, values, damp)
            self._remember(settings, pattern.indices, values, damp)
        return self.small

    def serves_small(
        self, settings: Settings, pattern: SparsePattern, values: tuple[Tensor, ...], damp: Tensor | None
    ) -> bool:
        """As `serves`."""
        return self.serves(settings, pattern.indices, values, damp)

    def _versions(self) -> list[int]:
        return [_version(t) for t in (*self.values, self.damp) if t is not None]

    @property
    def is_filled(self) -> bool:
        """Whether there are factors of any kind."""
        return self.factors is not None or self.small is not None

    def _remember(
        self, settings: Settings, indices: Tensor | None, values: tuple[Tensor, ...], damp: Tensor | None
    ) -> None:
        # What is changed in place has another version, but for tensors of inference mode, which have none.
        self.values = tuple(t.clone() if t.is_inference() else t for t in values)
        self.damp = damp.clone() if damp is not None and damp.is_inference() else damp
        self.versions, self.asked = self._versions(), (settings, indices)

    def serves(
        self, settings: Settings, indices: Tensor | None, values: tuple[Tensor, ...], damp: Tensor | None
    ) -> bool:
        """Whether its factors are those of this system."""
        if not self.is_filled or self._versions() != self.versions:
            return False
        if not self.asked[0].same_system(settings) or len(self.values) != len(values):
            return False
        pairs = zip((self.asked[1], self.damp, *self.values), (indices, damp, *values), strict=True)
        return all(_same(old, new) for old, new in pairs)


class _Memory(bytearray):
    holder: Holder


def is_kept(token: Tensor | None) -> bool:
    """Whether a token is of factors that a user keeps, and not of the solve that a derivative belongs to."""
    return token is not None and token.shape[0] == 2


def no_token() -> Tensor:
    """What stands for a token where nothing is kept."""
    return torch.zeros(1, dtype=torch.int64, device="cpu")


def of_solve(token: Tensor | None, new: Tensor) -> Tensor:
    """The token by which a derivative finds the factors: that of the solve, which gave `new` and was given `token`."""
    return new if token is None or is_kept(token) else token


def _keeper(indices: Tensor) -> Tensor:
    return Holder().token(kept=True)


# An operation, since a graph that is compiled cannot hold a tensor's memory otherwise.
keeper = define("keeper(Tensor indices) -> Tensor", _keeper, lambda indices: indices.new_empty((2,), device="cpu"))


def _same(old: Tensor | None, new: Tensor | None) -> bool:
    if old is None or new is None:
        return old is new
    if old.shape != new.shape or old.dtype != new.dtype:
        return False
    return (old.data_ptr() == new.data_ptr() and old.stride() == new.stride()) or torch.equal(old, new)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
