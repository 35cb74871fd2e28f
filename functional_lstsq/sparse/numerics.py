"""Powers of two, which scale without rounding, and random numbers that are the same every time."""

from __future__ import annotations

import torch
from torch import Tensor

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
    first = 1 + seed * like.numel()
    h = torch.arange(first, first + like.numel(), device=like.device) * 0x2545F4914F6CDD1D
    h = (h ^ (h >> 31)) * 0x369DEA0F31A53F85
    h = h ^ (h >> 29)
    size = 0.5 + ((h >> 8) & 0xFFFFFF).to(torch.float64) / 2**24
    return torch.where(((h >> 40) & 1) == 1, size, -size).view(like.shape)
