"""A group of ranks: sums over them, agreement on what must be the same on all of them, and errors that all raise.

A rank that takes another branch than the others leaves them waiting. So what is checked on one rank is told to all
before any work: one maximum of three integers says whether a check failed anywhere, and whether facts differ. Only then
the messages are gathered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

# Its functions have the default group as a default, that of the time when they are defined. The first torch.func.grad
# defines them: after the group has begun they would keep its threads to the end of the process, and these may abort it.
import torch.distributed.nn.functional
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from ..torch_func.tracing import unseen_by_transforms

Checked = TypeVar("Checked")
_BITS = 62  # of a digest, whose negative is a number too
_ODD = -7046029254386353131  # the golden ratio's bits, which spread an index over all bits of its product


class RankError(RuntimeError):
    """A rank was lost: it died, it did not come within the timeout of the group, or it runs another program."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of a group of torch.distributed, found by its name, which is a text that any graph can carry."""

    name: str

    @classmethod
    def of(cls, group: Any) -> Ranks:
        """Those of a group, or of the default one.

        Raises:
            RuntimeError: torch.distributed has not been initialised.
            TypeError, ValueError: `group` is no group, or this rank is not in it.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "group needs torch.distributed, which is not initialised: call "
                "torch.distributed.init_process_group('gloo') first, in processes that torchrun starts for example"
            )
        group = dist.group.WORLD if group is None else group
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group must be one that this rank is in, got one that it is not in")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group must be a group of torch.distributed or None, got {group!r}")
        return cls(group.group_name)

    @property
    def group(self) -> Any:
        """The group itself."""
        return _resolve_process_group(cast(Any, self.name))

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.group.size()

    @property
    def place(self) -> int:
        """Which of them this one is, from 0."""
        return self.group.rank()

    def __str__(self) -> str:
        return f"rank {dist.get_rank()} of {self.size}"

    # Collectives, in place.

    def sum(self, t: Tensor) -> Tensor:
        """t summed over the ranks, the same bits on all of them, since one rank makes each sum and hands it out."""
        return self._reduced(t, dist.ReduceOp.SUM)

    def max(self, t: Tensor) -> Tensor:
        """The largest over the ranks of each number in t."""
        return self._reduced(t, dist.ReduceOp.MAX)

    def everywhere(self, flags: Tensor) -> Tensor:
        """Which of the flags hold on all ranks."""
        return self.max((~flags).to(torch.int64)) == 0

    def _reduced(self, t: Tensor, operation: Any) -> Tensor:
        if t.numel():
            with self._told_as_lost():
                dist.all_reduce(t, operation, group=self.group)
        return t

    def each(self, t: Tensor) -> Iterator[Tensor]:
        """The t of every rank in turn, on all ranks; one of them at a time takes memory."""
        for rank in range(self.size):
            of_rank = t.clone(memory_format=torch.contiguous_format)
            with self._told_as_lost():
                # As real numbers, since not every backend takes complex ones.
                flat = torch.view_as_real(of_rank) if of_rank.is_complex() else of_rank
                dist.broadcast(flat, group=self.group, group_src=rank)
            yield of_rank

    def exchange(self, t: Tensor, sent: list[int], taken: list[int]) -> Tensor:
        """What all ranks have for this one, in their order: of t, sent[0] numbers go to rank 0, and so on.

        Args:
            taken: how many numbers come from each rank.
        """
        result = t.new_empty(sum(taken))
        with self._told_as_lost():
            into, of = (torch.view_as_real(part) if part.is_complex() else part for part in (result, t))
            dist.all_to_all_single(into, of, taken, sent, group=self.group)
        return result

    @contextmanager
    def _told_as_lost(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankError(
                f"{self} lost another one: it died, raised an error of its own, did not come within the timeout of "
                f"the group, or runs another program than this one; end all ranks and start again ({error})"
            ) from error

    # Agreement.

    def checked(self, check: Callable[[], tuple[Checked, Mapping[str, object]]], device: torch.device) -> Checked:
        """What `check` gives, on every rank, or one error on all of them.

        Args:
            check: gives (result, facts), where facts by their names must be the same on all ranks; or raises.

        Raises:
            TypeError, ValueError: `check` has raised one on any rank, which the message names, or facts differ.

        Cost: one reduction of three integers.
        """
        error: Exception | None = None
        texts: dict[str, str] = {}
        try:
            result, facts = check()
            texts = {name: str(fact) for name, fact in facts.items()}
        except Exception as raised:  # whatever it is, the others wait to be told
            error = raised
        digest = int.from_bytes(hashlib.blake2b(repr(texts).encode(), digest_size=8).digest(), "big") >> 64 - _BITS
        numbers = [0, digest, -digest] if error is None else [1, 0, 0]
        with unseen_by_transforms():
            failed, most, least = self.max(torch.tensor(numbers, dtype=torch.int64, device=device)).tolist()
        if failed:
            self._raise_for_all(error)
        if most != -least:
            self._raise_for_different(texts)
        return result

    def _gathered(self, thing: Any) -> list[Any]:
        every: list[Any] = [None] * self.size
        # torch makes tensors of it, which must not be those of a transformation.
        with self._told_as_lost(), unseen_by_transforms():
            dist.all_gather_object(every, thing, group=self.group)
        return every

    def _number(self, place: int) -> int:
        return dist.get_global_rank(self.group, place)

    def _raise_for_all(self, error: Exception | None) -> None:
        kinds = (TypeError, ValueError, torch.linalg.LinAlgError)
        kind = next((i for i, kind in enumerate(kinds) if isinstance(error, kind)), len(kinds))
        every = self._gathered(None if error is None else (kind, str(error)))
        first, (kind, message) = next((place, told) for place, told in enumerate(every) if told is not None)
        others = [f"{self._number(place)}" for place, told in enumerate(every) if told is not None and place != first]
        also = f" (others with an error: rank {', '.join(others)})" if others else ""
        raise (*kinds, RuntimeError)[kind](f"on rank {self._number(first)}: {message}{also}") from error

    def _raise_for_different(self, texts: Mapping[str, str]) -> None:
        every = self._gathered(texts)
        for name in every[0]:
            for place, other in enumerate(every):
                if other.get(name) != every[0][name]:
                    raise ValueError(
                        f"{name} must be the same on all ranks, got {every[0][name]} on rank {self._number(0)} and "
                        f"{other.get(name)} on rank {self._number(place)}"
                    )
        raise ValueError(f"all ranks must run the same program, got {every}")


def digest(t: Tensor | None) -> str:
    """A text that differs where the bits of tensors differ; nearly always, and always where a single number does."""
    if t is None:
        return "none"
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    bits = t.contiguous().to(torch.float64).view(torch.int64).flatten()
    spread = (2 * torch.arange(len(bits), device=t.device) + 1) * _ODD
    return f"{tuple(t.shape)} numbers with the digest {int((bits * spread).sum()) & (1 << _BITS) - 1:x}"
