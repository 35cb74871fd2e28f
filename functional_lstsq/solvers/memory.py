"""How much memory this process can still have."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import OTHER_SOLVER, TooLarge

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_LITTLE = 2**26  # bytes
# Seconds for which an answer is good: the system takes 0.2 ms to give one, as long as a small solve, and a process
# touches some 100 MB of new pages meanwhile, beside which half of what is free is left.
_LASTS = 0.02
_REFUSALS = ("DefaultCPUAllocator", "ALLOC_FAILED", "bad_alloc")  # in RuntimeErrors of torch, of MKL and of C++
_LIMITLESS = 2**62  # bytes; version 1 of control groups writes about as many where there is no limit


class _Known(NamedTuple):
    room: int
    until: float


_known = _Known(0, -1.0)


def available_bytes(device: torch.device | None = None) -> int:
    """The least of what is free, of what `ulimit -v` and `-d` leave, and of what the control groups leave.

    Half of what the machine has, where the system does not say what is free.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    global _known
    now = time.monotonic()
    if now > _known.until:
        _known = _Known(max(0, min([_free(), *_under_limits(), *in_control_groups()])), now + _LASTS)
    return _known.room


def fits(wanted: float, room: float | None, device: torch.device | None) -> bool:
    """Whether so many bytes are at most `room`, or half of what is available; a little is not worth the question."""
    if room is None:
        return wanted <= _LITTLE or wanted <= available_bytes(device) / 2
    return wanted <= room


@contextmanager
def told_as_too_large():
    """Raise `TooLarge` where torch, NumPy or SciPy get no memory."""
    try:
        yield
    except TooLarge:
        raise
    except (MemoryError, RuntimeError) as error:
        said = str(error)
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not (known or any(refusal in said for refusal in _REFUSALS)):
            raise
        asked = re.search(r"allocate ([0-9.]+ ?\w+)", said)
        raise TooLarge(
            f"the solve did not get the memory that it needs{f', {asked[1]} at once' if asked else ''}",
            "fewer columns at once",
            OTHER_SOLVER,
        ) from error


def hand_back() -> None:
    """Give the system what nothing refers to any more, and what the allocator keeps for later, where it can be."""
    gc.collect()
    if os.name == "posix" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # of glibc
        trim(0)


def _free() -> int:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return 2**32


def _under_limits() -> Iterator[int]:
    if resource is None:
        return
    for line in _lines("/proc/self/statm"):
        size, *_, data, _ = (int(pages) * os.sysconf("SC_PAGE_SIZE") for pages in line.split())
        for kind, used in ((resource.RLIMIT_AS, size), (resource.RLIMIT_DATA, data)):
            limit = resource.getrlimit(kind)[0]
            if limit != resource.RLIM_INFINITY:
                yield limit - used


def in_control_groups(root: str = "/") -> Iterator[int]:
    """What each control group of this process leaves that has a limit, in either version, and each above it."""
    mounts = [line.split() for line in _lines(f"{root}proc/self/mountinfo")]
    for line in _lines(f"{root}proc/self/cgroup"):
        _, controllers, path = line.rstrip("\n").split(":", 2)  # no controllers are named in version 2
        if controllers and "memory" not in controllers.split(","):
            continue
        # number, parent, device, top of the mounted tree, mount point, ..., "-", type, source, options
        for mount in mounts:
            kind, _, options = mount[mount.index("-") + 1 :][:3]
            if kind != ("cgroup" if controllers else "cgroup2") or (controllers and "memory" not in options.split(",")):
                continue
            top = Path(f"{root}{mount[4]}")
            below = os.path.relpath(path, mount[3])
            # In a container that sees its own group as the top, the path may be that of the host.
            folder = top / below if not below.startswith("..") and (top / below).is_dir() else top
            yield from _left(folder, bool(controllers))
            while folder != top:
                folder = folder.parent
                yield from _left(folder, bool(controllers))


def _left(folder: Path, one: bool) -> Iterator[int]:
    """Bytes that one control group leaves, if it has a limit. Files that were read once can be dropped."""
    of_most, of_used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if one else ("memory.max", "memory.current")
    most = "".join(_lines(folder / of_most)).strip()
    if not most.isdigit() or int(most) >= _LIMITLESS:
        return
    used = "".join(_lines(folder / of_used)).strip()
    if used.isdigit():
        dropped = "total_inactive_file" if one else "inactive_file"
        stat = (line.split() for line in _lines(folder / "memory.stat"))
        yield int(most) - int(used) + sum(int(number) for name, number in stat if name == dropped)


def _lines(name: str | Path) -> list[str]:
    try:
        with open(name) as file:
            return file.readlines()
    except OSError:
        return []
