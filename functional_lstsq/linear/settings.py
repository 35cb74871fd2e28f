"""What a solve is asked for, and the text that stands for it in a graph."""

from __future__ import annotations

import ast
import itertools
import weakref
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from ..solvers import CGLS, Auto, Dense, Direct, Solver
from ..torch_func.tracing import constant, made

_DEFAULT = Auto()


@dataclass(frozen=True)
class Settings:
    """What a solve is asked for."""

    solver: Any  # None is made the default
    minimum_norm: bool
    precision: float  # machine epsilon of the user's dtype; values and right-hand sides come in double precision
    extended: bool = False  # residuals in extended precision whether or not they are needed
    exact: bool = True  # values are the user's own, not products with weights
    wide: bool = False  # the user's matrix is the adjoint
    tolerance: float | None = None  # fraction of the largest singular value below which others are zero, if given
    of: str = "lstsq"  # what the user called, which decides what may be advised

    def __post_init__(self):
        if self.solver is None:
            object.__setattr__(self, "solver", _DEFAULT)

    @property
    def stops(self) -> bool:
        """Whether iterating ends short of the solution, as asked."""
        return stops_early(self.solver)

    def same_system(self, other: Settings) -> bool:
        """Whether the factors of one serve the other: whoever asks."""
        return self == other or replace(self, of=other.of) == other

    @cached_property
    def text(self) -> str:
        """What stands for these settings in a graph, which carries tensors, numbers and texts only.

        Any process reads that of a solver of this library. A callback, a preconditioner or a solver of the user's own
        has no text that could be read: it is found by a number, in this process, as long as these settings live.
        """
        try:
            return _spelled(self)
        except (KeyError, SyntaxError, TypeError, ValueError):
            text = f"{_HERE} {next(_numbers)}: {self!r}"
            _here[text] = self
            return text


_HERE = "a solver of one process only, number"
_numbers = itertools.count(1)
_here: weakref.WeakValueDictionary[str, Settings] = weakref.WeakValueDictionary()
_compiled: dict[Settings, Settings] = {}  # those of compiled graphs, which live as long as the process


def stops_early(solver: Any) -> bool:
    """Whether a solver stops short of the solution, as asked."""
    return isinstance(solver, CGLS) and solver.steps is not None


def check_solver(solver: Any, what: str = "") -> None:
    """Refuse what is no solver, and one that stops short of a solution where `what` asks for one."""
    if solver is not None and not isinstance(solver, Solver):
        raise TypeError(f"solver must be None or a Solver such as Dense() or CGLS(), got {solver!r}")
    if type(solver).__hash__ is None:
        raise TypeError(f"solver must be hashable, a frozen dataclass for example, got {solver!r}")
    if what and isinstance(solver, CGLS) and solver.steps is not None:
        raise ValueError(f"{what} needs solutions, and solver=CGLS(steps={solver.steps}) stops short of them")


def settings_of(text: Settings | str) -> Settings:
    """The settings that have this text, in this process or in another, whose graph was saved; given settings stay."""
    if isinstance(text, Settings):
        return text
    if not text.startswith(_HERE):
        return _read(text)
    settings = _here.get(text)
    if settings is None:
        raise ValueError(
            f"this graph was saved with {text}, which does not exist here; for graphs that are loaded by other "
            "processes use solvers of this library, without a callback or a preconditioner of your own"
        )
    return settings


@constant
def text_for_graph(
    solver: Any,
    minimum_norm: bool,
    precision: float,
    extended: bool,
    exact: bool,
    wide: bool,
    tolerance: float | None,
    of: str,
) -> str:
    """The text of these settings, which are kept for a graph that is being compiled; to be called while it is."""
    settings = Settings(made(solver), minimum_norm, precision, extended, exact, wide, tolerance, of)
    return _compiled.setdefault(settings, settings).text


@lru_cache(maxsize=1024)  # which keeps no settings that have no such text: an exception is not remembered
def _spelled(settings: Settings) -> str:
    """A text that `_read` makes the same settings of; an error where there is none."""
    text = repr(settings)
    if _read(text) != settings:
        raise ValueError(f"{text} reads as other settings")
    return text


@lru_cache(maxsize=1024)
def _read(text: str) -> Settings:
    """The settings that have this `repr`."""
    kinds = {kind.__name__: kind for kind in (Settings, Auto, CGLS, Dense, Direct)}

    def build(node: ast.expr) -> Any:
        if not isinstance(node, ast.Call):
            return ast.literal_eval(node)
        assert isinstance(node.func, ast.Name)
        return kinds[node.func.id](**{str(part.arg): build(part.value) for part in node.keywords})

    return build(ast.parse(text, mode="eval").body)
