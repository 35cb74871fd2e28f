"""The rows of a fit, which are its residuals: all that is summed, or decided, over all of them.

Here they are all in one place. Over ranks (`distributed/fit_rows.py`) each has some, and what is made of all of them is
the same everywhere, since every decision rests on that.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..linear.active_set import ActiveSet
from ..linear.gradient import Static
from ..linear.settings import Settings
from ..sparse.base import Products
from ..sparse.pattern import SparsePattern
from ..sparse.plain_products import Operator


class Rows:
    """Of P fits; tensors are (P, m, ...) for the m rows that are here, and results (P, ...) the same everywhere."""

    active_set = ActiveSet
    are_here = True
    leads = True  # whether what has no place of its own counts here

    def height(self, m: int) -> int:
        """How many rows there are in all."""
        return m

    def shared(self, t: Tensor) -> Tensor:
        """t, the same everywhere, where it meets rows: its cotangent is summed over all of them."""
        return t

    def total(self, t: Tensor) -> Tensor:
        """t, a sum over the rows that are here, summed over all of them."""
        return t

    def linked(self, r: Tensor, given: Sequence[Tensor]) -> Tensor:
        """r, as a function of all that is given, whatever the rows that are here depend on."""
        return r

    def norm(self, t: Tensor) -> Tensor:
        return torch.linalg.vector_norm(t, dim=1)

    def largest(self, t: Tensor) -> Tensor:
        """Of numbers that are not negative."""
        return t.amax(1)

    def largest_of_each(self, t: Tensor) -> Tensor:
        """The largest everywhere of each number of t, which has no rows."""
        return t

    def everywhere(self, flags: Tensor) -> Tensor:
        return flags.all(1)

    def static(self, m: int, n: int, settings: Settings, on_failure: str) -> Static:
        """By which a linear problem of these rows is solved."""
        return Static(m, n, settings, on_failure)

    def operator(self, pattern: SparsePattern, values: Tensor) -> Products:
        """Matrices with these rows."""
        return Operator(pattern, values)

    def model(self, objective: Any, copies: int) -> Any:
        """The class in the place of `model.Model` for so many problems; None for that which fits rows in one place."""
        return None

    def steady(self) -> AbstractContextManager[Any]:
        """Within it numbers come out the same everywhere, to the bit."""
        return nullcontext()

    def agree(self, x: Tensor, report: Tensor) -> None:
        """Require that what was found is the same everywhere."""
