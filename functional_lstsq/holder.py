"""What a solve is asked for, and where its factors live between the solve and its derivatives."""

from __future__ import annotations

import ast
import itertools
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .solvers import CGLS, Auto, Dense, Direct
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


class Name(str):
    """The text that stands for settings: a graph passes tensors, numbers and texts only."""

    settings: Settings


_HERE = "a solver of one process only, number"
_numbers = itertools.count(1)
_names: weakref.WeakValueDictionary[Settings, Name] = weakref.WeakValueDictionary()
_named: weakref.WeakValueDictionary[str, Name] = weakref.WeakValueDictionary()
_kept: dict[str, Name] = {}


def check_solver(solver: Any) -> None:
    """Refuse what is no solver."""
    if isinstance(solver, type) or (solver is not None and not callable(getattr(solver, "prepare", None))):
        raise TypeError(f"solver must be None or a solver such as Dense() or CGLS(), got {solver!r}")
    if type(solver).__hash__ is None:
        raise TypeError(f"solver must be hashable, a frozen dataclass for example, got {solver!r}")


@constant
def name_of(
    solver: Any,
    minimum_norm: bool,
    precision: float,
    extended: bool = False,
    exact: bool = True,
    wide: bool = False,
    keep: bool = False,
) -> str:
    """The name of these settings, equal ones sharing one.

    It lives as long as something holds it: a graph of autograd, or with `keep`, for a compiled graph, the process.
    """
    settings = Settings(Auto() if solver is None else solver, minimum_norm, precision, extended, exact, wide)
    name = _names.get(settings)
    if name is None:
        text = repr(settings)
        try:
            told = _read(text) == settings
        except (KeyError, SyntaxError, TypeError, ValueError):
            told = False
        name = Name(text if told else f"{_HERE} {next(_numbers)}: {text}")
        name.settings = settings
        _names[settings] = _named[str(name)] = name
        if told:  # there are few of them
            _kept[name] = name
    if keep:
        _kept[name] = name
    return str(name) if keep else name


def by_name(text: str) -> Settings:
    """The settings that `name_of` gave this name, in this process or in another, whose graph was saved."""
    name = _named.get(text)
    if name is None:
        if text.startswith(_HERE):
            raise ValueError(
                f"this graph was saved with {text}, which does not exist here; for graphs that are loaded by other "
                "processes use solvers of this library, without a callback or a preconditioner of your own"
            )
        name = _named[text] = _kept[text] = Name(text)
        name.settings = _read(text)
    return name.settings


def _read(name: str) -> Settings:
    """What has this `repr`."""
    kinds = {kind.__name__: kind for kind in (Settings, Auto, CGLS, Dense, Direct)}

    def build(node: ast.expr) -> Any:
        if not isinstance(node, ast.Call):
            return ast.literal_eval(node)
        assert isinstance(node.func, ast.Name)
        return kinds[node.func.id](**{str(part.arg): build(part.value) for part in node.keywords})

    return build(ast.parse(name, mode="eval").body)


class Holder:
    """The factors of one matrix, for as long as the autograd graph that needs them lives.

    Made for each solve and kept by the memory of its token, a tensor that the solve gives and its derivatives are
    given: so a graph keeps it, compiled or not, and nothing else does. Derivatives find the factors as long as they
    ask for the same values.
    """

    __slots__ = ("__weakref__", "damp", "factors", "key", "solves", "system", "values", "versions")
    key: int
    solves: int  # made so far
    values: tuple[Tensor, ...]
    damp: Tensor | None
    versions: list[int]
    system: System
    factors: Any
    living: weakref.WeakValueDictionary[int, Holder] = weakref.WeakValueDictionary()
    numbers = itertools.count(1)

    def __init__(self):
        self.key, self.factors, self.solves = next(Holder.numbers), None, 0
        Holder.living[self.key] = self

    def token(self) -> Tensor:
        """A tensor of one number, this holder's, whose memory keeps it alive."""
        memory = _Memory(self.key.to_bytes(8, sys.byteorder))
        memory.holder = self
        return torch.frombuffer(memory, dtype=torch.int64)

    @classmethod
    def of(cls, token: Tensor | None) -> Holder:
        """The holder of a token; a new one if there is none any more."""
        living = None if token is None else cls.living.get(int(token))
        return living or cls()

    def prepare(
        self, settings: Settings, values: tuple[Tensor, ...], damp: Tensor | None, make: Callable[[], System]
    ) -> tuple[System, Any]:
        """(system, factors), made afresh if `values` or `damp` are not those of last time."""
        if not self._holds(values, damp):
            self.system = make()
            self.factors = settings.solver.prepare(self.system, minimum_norm=settings.minimum_norm)
            self.values, self.versions, self.damp = values, [_version(tensor) for tensor in values], damp
        return self.system, self.factors

    def _holds(self, values: tuple[Tensor, ...], damp: Tensor | None) -> bool:
        if self.factors is None or [_version(tensor) for tensor in self.values] != self.versions:
            return False
        if not all(_same(old, new) for old, new in zip(self.values, values, strict=True)):
            return False
        if damp is None or self.damp is None:
            return damp is self.damp
        return torch.equal(damp, self.damp)


class _Memory(bytearray):
    holder: Holder


def _same(old: Tensor, new: Tensor) -> bool:
    if old.shape != new.shape:
        return False
    return (old.data_ptr() == new.data_ptr() and old.stride() == new.stride()) or torch.equal(old, new)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
