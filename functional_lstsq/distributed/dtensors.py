"""DTensors of torch.distributed that are sharded by rows: this rank's rows of them, and residuals that are like them.

They do not go through torch.func (within `grad` one is a Tensor that knows nothing of its parts); with autograd their
derivatives are DTensors again.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..torch_func.tracing import dtensor_kind, is_dtensor
from .ranks import Ranks


def rows_of(t: Any, name: str, ranks: Ranks) -> Any:
    """This rank's rows of a DTensor, differentiable; what is none as it is."""
    if not is_dtensor(t):
        return t
    if not isinstance(t, dtensor_kind()):
        raise TypeError(f"{name} must be no DTensor within torch.func, but this rank's rows: {name}.to_local()")
    if len(t.placements) != 1 or not t.placements[0].is_shard(0):
        raise ValueError(f"{name} must be sharded by rows, as a DTensor with placements [Shard(0)], got {t.placements}")
    given, wanted = (dist.get_process_group_ranks(group) for group in (t.device_mesh.get_group(), ranks.group))
    if given != wanted:
        raise ValueError(f"{name} must be a DTensor on the ranks of A, {wanted}, got one on {given}")
    return t.to_local()


def like(b: Any, rows: Tensor) -> Tensor:
    """A DTensor of these rows, sharded as b is, where b is a DTensor; else the rows."""
    if not is_dtensor(b):
        return rows
    found: Tensor = dtensor_kind().from_local(
        rows, b.device_mesh, b.placements, run_check=False, shape=b.shape, stride=b.stride()
    )
    return found
