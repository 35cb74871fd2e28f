"""What weights over ranks are weighed by: sizes that are usual on all ranks, and the rows that are much heavier.

Rows of infinite weight are constraints, and must be linearly independent, so there are no more than n of them to be
gathered. What is usual is the median of the medians of the ranks: by it a cap is chosen, and no solution depends on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear.weighting import AllRows, HeavyRows
from ..sparse.pattern import SparsePattern
from .ranks import Ranks


class RowsOfAll(AllRows):
    """Answers that are the same on all ranks."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def any(self, flags: Tensor) -> bool:
        return not bool(self.ranks.everywhere(~flags.any()))

    def median(self, t: Tensor) -> Tensor:
        none = t.new_full((len(t), 1), torch.nan)
        here = t.nanmedian(1, keepdim=True).values if t.shape[1] else none
        return torch.cat(list(self.ranks.each(here)), 1).nanmedian(1, keepdim=True).values.nan_to_num(nan=1.0)

    def largest(self, t: Tensor) -> Tensor:
        return self.ranks.max(super().largest(t).contiguous())

    def largest_of_each(self, t: Tensor) -> Tensor:
        return self.ranks.max(t.contiguous())

    def gathered(self, pattern: SparsePattern, values: Tensor, which: Tensor) -> HeavyRows:
        """One row of zeros more than there are columns, all of them heavy, where there are more than that."""
        ranks, n = self.ranks, pattern.shape[1]
        some = which.any(0)
        kept = some[pattern.indices[0]]
        place = torch.cumsum(some, 0) - 1
        counts = torch.tensor([which.shape[1], int(some.sum()), int(kept.sum())], device=values.device)
        of_ranks = torch.stack(list(ranks.each(counts)))
        before, sizes = of_ranks[:, 0].cumsum(0) - of_ranks[:, 0], of_ranks[:, 1:].amax(0)
        if int(of_ranks[:, 1].sum()) > n:
            nothing = SparsePattern(torch.zeros((2, 0), dtype=torch.int64, device=values.device), (n + 1, n))
            heavy = torch.ones((len(values), n + 1), dtype=torch.bool, device=values.device)
            return HeavyRows(nothing, values[:, :0], heavy, None)
        rows, entries = int(sizes[0]), int(sizes[1])
        indices = torch.zeros((2, entries), dtype=torch.int64, device=values.device)
        indices[:, : int(counts[2])] = torch.stack([place[pattern.indices[0][kept]], pattern.indices[1][kept]])
        padded = values.new_zeros((len(values), entries))
        padded[:, : int(counts[2])] = values[:, kept]
        numbers = torch.zeros((1 + len(which), rows), dtype=torch.int64, device=values.device)
        numbers[0, : int(counts[1])] = some.nonzero()[:, 0]
        numbers[1:, : int(counts[1])] = which[:, some].to(torch.int64)
        every: list[tuple[Tensor, ...]] = []
        count = 0
        parts = (ranks.each(indices), ranks.each(padded), ranks.each(numbers))
        found = [list(part) for part in parts]
        for r in range(ranks.size):
            _, height, stored = (int(number) for number in of_ranks[r])
            where = found[0][r][:, :stored].clone()
            where[0] += count
            of_rows = found[2][r][:, :height]
            every.append((where, found[1][r][:, :stored], of_rows[0] + before[r], of_rows[1:] != 0))
            count += height
        where, entries_of, numbers_of, heavy = (torch.cat(parts, -1) for parts in zip(*every, strict=True))
        return HeavyRows(SparsePattern(where, (count, n)), entries_of, heavy, numbers_of)
