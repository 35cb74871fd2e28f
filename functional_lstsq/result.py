"""What a solve gives back: the solution, and what is known of it, by numbers that stand for words."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from .torch_func.tracing import concrete

CONVERGED, ZERO, INACCURATE, ITERATION_LIMIT, RANK_DEFICIENT, SPOILT, NO_MINIMUM, OUT_OF_RANGE, STOPPED = range(9)
STATUSES = (
    "converged",
    "zero but for rounding",
    "inaccurate",
    "iteration limit reached",
    "rank deficient",
    "gradient inaccurate",
    "not a strict minimum",
    "out of range",
    "stopped as asked",
)
METHODS = ("none", "dense-cholesky", "dense-qr", "direct-rslab", "direct-superlu", "cgls", "IRLS")
# What `Auto` may try, why, and how it may end; its answer is taken where it ends with "".
SOLVERS = ("Dense", "Direct", "CGLS")
REASONS = (
    "few columns",
    "a factor costs more",
    "a factor costs much more",
    "a factor would be dense",
    "a factor costs less",
    "ill-conditioned",
    "A^H A would not fit into memory",
    "a factor would not fit into memory",
    "no factor",
    "last resort",
    "A^H A could not be analysed",
)
ENDS = ("", *STATUSES, "many right-hand sides", "too large", "failed")
# A report is a tensor of doubles, in which whole numbers below 2^53 are exact: six steps of `Auto`, which plans no
# more, or ten letters of a name are such a number.
_STEPS, _LETTERS = 6, "abcdefghijklmnopqrstuvwxyz0123456789-"


class Report(NamedTuple):
    """What a solver says of its answer to K (r, x) = (b, c); every field has shape (P, k), in double precision.

    `method` holds the `method_code` of a name; `tried` the `tried_code` of what `Auto` went through, 0 of any other.
    """

    status: Tensor
    method: Tensor
    iterations: Tensor
    optimality: Tensor
    residual_error: Tensor
    weighted_error: Tensor  # of s = W r + e
    solution_error: Tensor
    condition: Tensor
    rank: Tensor
    norm: Tensor
    tried: Tensor
    rounding: Tensor  # part of the errors that is the rounding of results to the user's precision

    @classmethod
    def shape(cls, copies: int, columns: int) -> tuple[int, int, int]:
        """The shape (P, fields, k) of a packed report."""
        return copies, len(cls._fields), columns

    def packed(self) -> Tensor:
        """The report as one tensor (P, fields, k), which primitives give and graphs carry."""
        return torch.stack(list(self), 1)

    @classmethod
    def unpacked(cls, numbers: Tensor) -> Report:
        """What `packed` made one tensor of."""
        return cls(*numbers.unbind(1))


def method_code(name: str) -> int:
    """The number that stands for a method in a report, which must be a tensor to pass through vmap.

    It is the same in every process. One of `METHODS` has its place there; a name that a solver of your own reports, of
    at most ten letters a to z, digits and hyphens, is spelled by a negative number.
    """
    if name in METHODS:
        return METHODS.index(name)
    if not re.fullmatch("[a-z0-9-]{1,10}", name):
        raise ValueError(f"the name of a method must be 1 to 10 of a-z, 0-9 and -, got {name!r}")
    return -_packed([_LETTERS.index(letter) for letter in name], len(_LETTERS))


def method_of(code: int) -> str:
    """The name that `method_code` is given."""
    return METHODS[code] if code >= 0 else "".join(_LETTERS[i] for i in _unpacked(-code, len(_LETTERS)))


def tried_code(steps: Sequence[tuple[str, str, str]]) -> int:
    """The number that stands for steps in turn: one of `SOLVERS`, of `REASONS` and of `ENDS` each."""
    places = [
        (SOLVERS.index(solver) * len(REASONS) + REASONS.index(reason)) * len(ENDS) + ENDS.index(end)
        for solver, reason, end in steps[-_STEPS:]
    ]
    return _packed(places, len(SOLVERS) * len(REASONS) * len(ENDS))


def tried_of(tried: int, method: int) -> str:
    """What `tried_code` is given, in words; the name of the method where there was no choice."""
    said = []
    for place in _unpacked(tried, len(SOLVERS) * len(REASONS) * len(ENDS)):
        step, end = divmod(place, len(ENDS))
        solver, reason = divmod(step, len(REASONS))
        said.append(f"{SOLVERS[solver]} ({REASONS[reason]}){': ' if end else ''}{ENDS[end]}")
    return ", then ".join(said) or method_of(method)


def _packed(places: list[int], size: int) -> int:
    """Numbers below `size` as the digits of one, the first of them last; no digit is zero, so that they have an end."""
    return sum((1 + place) * (1 + size) ** i for i, place in enumerate(places))


def _unpacked(number: int, size: int) -> list[int]:
    places = []
    while number:
        number, digit = divmod(number, 1 + size)
        places.append(digit - 1)
    return places


class SolveInfo(NamedTuple):
    """What is known of a solution. Numbers are 0-d tensors for b of shape (m,), of shape (k,) for b (m, k).

    A NamedTuple, hence a pytree of tensors: it passes through `has_aux`, `vmap` and the like.

    Attributes:
        status_code: 0 for success, 1 for an x that is zero but for rounding (see `lstsq`); `status` says it in words.
        method_code: which method answered; `method` gives its name.
        iterations: iterations of conjugate gradients, of all refinements together.
        optimality: |A^H r - damp^2 x| / (|A| |r|), columns scaled to norm about 1. Necessary, not sufficient. NaN where
            `CGLS` failed before it solved anything. Of robust fits (method "IRLS") with the weights of the last step,
            as condition and norm are.
        forward_error: estimate of |x - x_exact| / |x_exact| in the 2-norm; this is what a solve is accepted by, except
            where x is zero but for rounding. Infinite there, and where there is no estimate.
        condition: estimate of the 2-norm condition number of A with its columns scaled to norm 1
            (of its rows where A is wide; of a LinearOperator as it is). Infinite without full rank; with
            rank_deficient="minimum_norm" the largest singular value over the smallest that is not zero. A lower bound
            where `CGLS` ran out of iterations.
        rank: numerical rank of A (of A with its damping); -1 where an iteration cannot tell.
        norm: Frobenius norm of A (of [A; damp I]), weights included; of a LinearOperator an estimate.
        tried_code: which methods were tried in turn, and why; `tried` says it in words.
    """

    status_code: Tensor
    method_code: Tensor
    iterations: Tensor
    optimality: Tensor
    forward_error: Tensor
    condition: Tensor
    rank: Tensor
    norm: Tensor
    tried_code: Tensor

    @property
    def status(self) -> str:
        """In words; the worst one where there are several columns."""
        codes = concrete(self.status_code)
        return STATUSES[int(codes.max())] if codes.numel() else STATUSES[CONVERGED]

    @property
    def method(self) -> str:
        """Name of the method that answered, or of the several that did."""
        return ", ".join(sorted(method_of(code) for code in concrete(self.method_code).unique().tolist()))

    @property
    def tried(self) -> str:
        """The methods that were tried, in that order, each with the reason and with how it ended if it failed."""
        codes = torch.stack([concrete(code).reshape(-1) for code in (self.tried_code, self.method_code)])
        return "; ".join(dict.fromkeys(tried_of(*pair) for pair in codes.unique(dim=1).T.tolist()))

    def __repr__(self) -> str:
        numbers = {name: getattr(self, name) for name in self._fields[2:8]}
        shown = (f"{name}={show(concrete(value))}" for name, value in numbers.items())
        return f"SolveInfo(status={self.status!r}, method={self.method!r}, {', '.join(shown)}, tried={self.tried!r})"

    def _repr_html_(self) -> str:
        return html_table("SolveInfo", info_rows(self))


def of_solve(info: Any, name: str) -> Any:
    """An attribute of the `SolveInfo` that `info` has as `solve`, for its `__getattr__`."""
    if name.startswith("_"):
        raise AttributeError(name)
    return getattr(info.solve, name)


def _length(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach()))


def info_of(report: Report, *, wide: bool, single: bool) -> SolveInfo:
    """What users see of the report of one matrix, whose fields are (1, k).

    Args:
        wide: the solution is r, not x.
        single: b has one dimension, so numbers are 0-d.
    """

    def of_columns(field: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        return (field[0, 0] if single else field[0]).to(dtype)

    return SolveInfo(
        status_code=of_columns(report.status, torch.int64),
        method_code=of_columns(report.method, torch.int64),
        iterations=of_columns(report.iterations, torch.int64),
        optimality=of_columns(report.optimality),
        forward_error=of_columns(report.residual_error if wide else report.solution_error),
        condition=of_columns(report.condition),
        rank=of_columns(report.rank, torch.int64),
        norm=of_columns(report.norm),
        tried_code=of_columns(report.tried, torch.int64),
    )


def show(tensor: Tensor) -> str:
    """Numbers in a few words."""
    if tensor.ndim == 0:
        return f"{tensor.item():.2g}" if tensor.is_floating_point() else str(tensor.item())
    if tensor.numel() <= 4:
        return str(tensor.tolist())
    low, high = show(tensor.min()), show(tensor.max())
    return f"{low if low == high else f'{low} to {high}'} in {tuple(tensor.shape)}"


def html_table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A small table for notebooks."""
    cells = (
        f'<tr><th style="text-align: left">{html.escape(name)}</th>'
        f'<td style="text-align: left">{html.escape(value)}</td></tr>'
        for name, value in rows
    )
    return f"<table><caption>{html.escape(title)}</caption>{''.join(cells)}</table>"


def info_rows(info: Any) -> list[tuple[str, str]]:
    """What is known of a solution or of a fit, for `html_table`; of a batch the least and the largest numbers."""
    words = [(name, getattr(info, name)) for name in ("status", "method", "tried") if hasattr(info, name)]
    numbers = [name for name in info._fields if isinstance(getattr(info, name), Tensor) and not name.endswith("_code")]
    return words + [(name.replace("_", " "), show(concrete(getattr(info, name)))) for name in numbers]


class Solution(NamedTuple):
    """x, the residual, and `info`; a NamedTuple, hence a pytree. The residual of `solve` is b - A x."""

    x: Tensor
    residual: Tensor
    info: Any

    def _repr_html_(self) -> str:
        x, residual = concrete(self.x), concrete(self.residual)
        sizes = [
            ("x", f"{tuple(x.shape)}, {x.dtype}, |x| = {_length(x):.3g}"),
            ("residual", f"{tuple(residual.shape)}, |b - A x| = {_length(residual):.3g}"),
        ]
        return html_table("Solution", sizes) + (self.info._repr_html_() if hasattr(self.info, "_repr_html_") else "")


for _kind in (SolveInfo, Solution):  # for torch.export
    torch_pytree._register_namedtuple(_kind, serialized_type_name=f"functional_lstsq.{_kind.__name__}")

torch.serialization.add_safe_globals([Solution, SolveInfo])  # torch.load takes these
