"""Powers of two, which scale without rounding, and random numbers that are the same every time."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..torch_func.operations import is_plain, is_seen

_KEPT = 2**16  # numbers of which making them anew takes longer than to copy them
EPS = torch.finfo(torch.float64).eps


def power_of_two(exponents: Tensor) -> Tensor:
    """2^exponents in double precision, kept finite and normal."""
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float64), exponents.clamp(-1021, 1023))


def ldexp(t: Tensor, exponents: Tensor) -> Tensor:
    """t 2^exponents, in steps where a power of two would not be a number: 2^-2043 of 2^1023 takes three."""
    near = exponents.clamp(-1021, 1021)
    t = t * power_of_two(near)
    return t if torch.equal(near, exponents) else ldexp(t, (exponents - near).clamp(-2042, 2042))


def at(t: Tensor, places: Tensor) -> Tensor:
    """t[:, places] of t (P, n), in less than half of the time that a gather takes where P is 1."""
    return t[0].index_select(0, places)[None] if len(t) == 1 else t.gather(1, places.expand(len(t), -1))


def noise(like: Tensor, seed: int = 0) -> Tensor:
    """Random reals of either sign, sizes from 1/2 to 3/2, the same ones every time for one seed.

    Sizes differ, since vectors of signs alone are orthogonal to the differences of half of all pairs of columns. Taken
    from a hash, since vmap refuses random operations.
    """
    if like.numel() > _KEPT or is_seen() or not is_plain(like):
        return _hashed(like.numel(), like.device, seed).view(like.shape)
    return _kept(like.numel(), like.device, seed).clone().view(like.shape)


def _hashed(count: int, device: torch.device, seed: int) -> Tensor:
    first = 1 + seed * count
    h = torch.arange(first, first + count, device=device) * 0x2545F4914F6CDD1D
    h = (h ^ (h >> 31)) * 0x369DEA0F31A53F85
    h = h ^ (h >> 29)
    size = 0.5 + ((h >> 8) & 0xFFFFFF).to(torch.float64) / 2**24
    return torch.where(((h >> 40) & 1) == 1, size, -size)


@lru_cache(maxsize=16)
def _kept(count: int, device: torch.device, seed: int) -> Tensor:
    with torch.inference_mode(False):
        return _hashed(count, device, seed)
