"""Checkpoints of a long solve on ranks: x as it is iterated, in a file like that of a solution.

x is all that a checkpoint needs. It is the same on all ranks, so that one of them writes it, and it says nothing of how
many there are. Rows are read from their files again, the residual is made of them and x, and conjugate gradients begin
anew there: what they knew of other directions is lost, some iterations, and so is the search for the weakest direction,
which certifies what comes out as if it had been found at once. A checkpoint of another problem does no harm: a start
that is no better than none is not used.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..distributed.ranks import Ranks
from ..solvers.watching import iterates
from .errors import BadInput
from .formats import read
from .writing import write


class Checkpoint:
    """A file for x, which the first rank writes and reads.

    Args:
        name: the file; None for no checkpoints.
        seconds: at least so long between two.
    """

    def __init__(self, name: str | None, seconds: float, ranks: Ranks):
        self.name, self.seconds, self.ranks = name, seconds, ranks

    def read(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """x of that shape and dtype, on all ranks; None where there is no file yet."""

        def found() -> tuple[Tensor, dict]:
            x = torch.zeros(shape, dtype=dtype)
            if self.ranks.place or self.name is None or not Path(self.name).exists():
                return x, {}
            content = read(self.name)
            wanted = (shape[0], shape[1] if len(shape) == 2 else 1)
            if content.shape != wanted:
                raise BadInput(f"{self.name} is of another problem: x of {content.shape}, wanted {wanted}")
            if np.iscomplexobj(content.values) and not dtype.is_complex:
                raise BadInput(f"{self.name} is of another problem: complex numbers, wanted real ones")
            columns = np.zeros(wanted, dtype=content.values.dtype)
            np.add.at(columns, (content.rows, content.columns), content.values)
            return torch.from_numpy(columns).to(dtype).reshape(shape), {}

        x = self.ranks.checked(found, torch.device("cpu"))
        there = torch.tensor(bool(self.name and Path(self.name).exists() and not self.ranks.place), dtype=torch.int64)
        return self.ranks.sum(x) if int(self.ranks.max(there)) else None

    @contextmanager
    def written(self) -> Iterator[None]:
        """Write what is iterated within. What cannot be written is told, and does not end the solve."""
        if self.name is None or self.ranks.place:
            yield
            return
        last = time.monotonic()

        def show(x: Tensor) -> None:
            nonlocal last
            if time.monotonic() - last < self.seconds:
                return
            assert self.name is not None
            try:
                write(self.name, x[0].numpy())
            except BadInput as error:
                print(f"functional_lstsq: no checkpoint: {error}", file=sys.stderr, flush=True)
            last = time.monotonic()

        with iterates(show):
            yield
