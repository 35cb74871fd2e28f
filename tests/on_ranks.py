"""What cases over ranks give: in processes of a split of the rows, and in one process that has all of them."""

import pytest
import torch
import torch.multiprocessing
from helpers import close
from sharded import SPLITS, Place, work


def processes(function, size, folder, *given):
    """What each of `size` processes has left in a folder."""
    torch.multiprocessing.spawn(function, (size, str(folder), *given), size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def fixtures(cases, module):
    """(on_ranks, alone) for `cases` by name, of a module of that name.

    on_ranks(split) gives what the cases gave on each rank of a split, which has processes of its own once it is first
    asked for; alone(name) what a case gave in one process, and its place.
    """

    @pytest.fixture(scope="module")
    def on_ranks(tmp_path_factory):
        kept = {}

        def found(split):
            if split not in kept:
                size = len(SPLITS[split](1)) - 1
                kept[split] = processes(work, size, tmp_path_factory.mktemp("ranks"), split, module)
            return kept[split]

        return found

    @pytest.fixture(scope="module")
    def alone():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        kept = {}

        def found(name):
            if name not in kept:
                case, options = cases[name]
                place = Place(**options)
                kept[name] = case(place), place
            return kept[name]

        yield found
        torch.set_default_dtype(before)

    return on_ranks, alone


def compare(name, split, want, whole, got):
    """Hold what the ranks of a split gave against each other, and against what one process gave for all rows."""
    assert not any(isinstance(of_rank, str) for of_rank in got), got
    tolerance = 1e-6 if "float32" in name else 1e-10
    for of_rank in got[1:]:
        for kind in ("same", "info"):
            for one, other in zip(got[0].get(kind, ()), of_rank.get(kind, ()), strict=True):
                assert torch.equal(one, other), "ranks differ"
    for one, other in zip(got[0].get("same", ()), want.get("same", ()), strict=True):
        close(one, other, tolerance)
    for parts, other in zip(
        zip(*(of_rank.get("rows", ()) for of_rank in got), strict=True), want.get("rows", ()), strict=True
    ):
        close(torch.cat(parts), other, tolerance)
    ends, row = SPLITS[split](whole.m), whole.pattern.indices[0]
    for place, of_rank in enumerate(got):
        mine = (row >= ends[place]) & (row < ends[place + 1])
        for one, other in zip(of_rank.get("entries", ()), want.get("entries", ()), strict=True):
            assert one.shape == other[mine].shape
            assert float((one - other[mine]).abs().sum()) <= tolerance * float(other.abs().sum())
