"""The rows of a fit over ranks: `fits.rows.Rows`, of which each rank has some."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..fits.model import Model
from ..fits.objective import Objective
from ..fits.rows import Rows
from ..linear.settings import Settings
from ..sparse.pattern import SparsePattern
from ..sparse.plain_products import Operator
from ..torch_func.cores import steady
from .bounds import ActiveSetOfRanks
from .collectives import shared_by, total_of
from .fit_models import model_of_ranks
from .products import RowsOverRanks
from .ranks import Ranks, digest
from .sparse_rows import ShardedRows


class FitRows(Rows):
    """Of all ranks, `whole` of them."""

    active_set = ActiveSetOfRanks
    are_here = False

    def __init__(self, ranks: Ranks, whole: int = 0):
        self.ranks, self.whole, self.leads = ranks, whole, ranks.place == 0

    def height(self, m: int) -> int:
        return self.whole

    def shared(self, t: Tensor) -> Tensor:
        return shared_by(t, self.ranks.name)

    def total(self, t: Tensor) -> Tensor:
        return total_of(t, self.ranks.name)

    def linked(self, r: Tensor, given: Sequence[Tensor]) -> Tensor:
        # Ranks whose residual depends on less than that of others would not take part in sums of derivatives, to any
        # order: this is r + exp(0) - 1.
        nothing = sum((t.reshape(-1)[:0].sum() for t in given if t.is_floating_point()), r[:0].sum())
        return r + torch.expm1(nothing)

    def norm(self, t: Tensor) -> Tensor:
        return self.total(t.square().sum(1)).sqrt()

    def largest(self, t: Tensor) -> Tensor:
        return self.largest_of_each(t.amax(1) if t.shape[1] else t.new_zeros((len(t), *t.shape[2:])))

    def largest_of_each(self, t: Tensor) -> Tensor:
        # A maximum of NaN and a number may be either.
        unknown = t.isnan()
        flagged = self.ranks.max(torch.stack([torch.where(unknown, 0.0, t), unknown.to(t.dtype)]))
        return torch.where(flagged[1] > 0, torch.nan, flagged[0])

    def everywhere(self, flags: Tensor) -> Tensor:
        return self.ranks.everywhere(flags.all(1))

    def static(self, m: int, n: int, settings: Settings, on_failure: str) -> ShardedRows:
        return ShardedRows(m, n, settings, on_failure, self.whole, self.ranks)

    def operator(self, pattern: SparsePattern, values: Tensor) -> RowsOverRanks:
        return RowsOverRanks(Operator(pattern, values), self.ranks, self.whole)

    def model(self, objective: Objective, copies: int) -> type[Model]:
        return model_of_ranks(objective, copies)

    def steady(self) -> AbstractContextManager[Any]:
        return steady()

    def agree(self, x: Tensor, report: Tensor) -> None:
        self.ranks.checked(lambda: (None, {"the minimum": digest(x), "its report": digest(report)}), x.device)
