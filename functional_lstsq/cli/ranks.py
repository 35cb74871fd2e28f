"""The ranks that torchrun starts: whether there are any, and how they come together."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from ..distributed.ranks import RankError, Ranks
from .errors import reason_of

_TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by torchrun, in the environment


def are_many() -> bool:
    """Whether this process is one of several that torchrun started, or the only one."""
    return dist.is_available() and (dist.is_initialized() or all(os.environ.get(name) for name in _TOLD))


def rank() -> int:
    """The place of this process; 0 where there are no ranks."""
    if not are_many():
        return 0
    told = os.environ.get("RANK", "")
    return dist.get_rank() if dist.is_initialized() else int(told) if told.isdecimal() else 0


@contextmanager
def joined(seconds: float) -> Iterator[Ranks]:
    """All ranks, which wait for one another so many seconds at most."""
    if dist.is_initialized():
        yield Ranks.of(None)
        return
    try:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:
        raise RankError(f"the ranks did not come together: {reason_of(error)}") from None
    try:
        yield Ranks.of(None)
    finally:
        dist.destroy_process_group()
