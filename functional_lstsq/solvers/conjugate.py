"""Preconditioned conjugate gradients on the extended normal equations, for one column or for a block of them.

    A^H A y + d^2 y = A^H b - c,    r = b - A y updated recursively

Calandra, Gratton, Riccietti, Vasseur, SIAM J. Matrix Anal. Appl. 41(4), 2020; for c = 0 this is CGLS in the stable
form of Björck, Elfving, Strakos, SIAM J. Matrix Anal. Appl. 19(3), 1998.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..products import Operator
from .system import dot

_IMPROVED = 1e-4  # part of gamma that is left of an iterate worth keeping
_BLOWN_UP = 1e20
_STRIDE = 4  # steps after which a goal is taken anew


class Run(NamedTuple):
    """How a run of conjugate gradients ended: iterates, |gradient|^2 in the preconditioner's norm, iterations."""

    r: Tensor
    y: Tensor
    gamma: Tensor
    iterations: Tensor


class Normal(Protocol):
    """What conjugate gradients need of a system: the matrix, and d^2 or None."""

    @property
    def A(self) -> Operator: ...

    @property
    def d2(self) -> Tensor | None: ...


def cgls(
    system: Normal,
    b: Tensor,
    c: Tensor,
    apply: Callable[[Tensor], Tensor],
    goal: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    limit: int,
    rises: int | None = None,
    callback: Callable[[int, float], object] | None = None,
) -> Run:
    """Iterate until gamma = |gradient|^2, in the norm of the preconditioner, is at most a goal.

    Args:
        apply: the preconditioner, about (A^H A + d^2)^-1; gives a new tensor each time.
        goal: (r, y, live) -> (P, live), where `live` are the numbers of the columns that r and y hold.
        limit: iterations at most.
        rises: a column stops once gamma has risen so often. With b = 0, iterations that run on after rounding has
            taken over blow up; about the best iterate is then what is returned.
        callback: called with (iteration, largest norm of a gradient).
    """
    if b.shape[0] * b.shape[2] == 1:
        return _iterate_one(system, b, c, apply, goal, limit, rises, callback)
    return iterate(
        system,
        b,
        c,
        apply,
        lambda r, y, g, gamma, live: gamma <= goal(r, y, live),
        limit=limit,
        rises=rises,
        callback=callback,
    )


def _gradient(system: Normal, r: Tensor, y: Tensor, c: Tensor | None, *, out: Tensor) -> Tensor:
    """A^H r - d^2 y - c"""
    system.A.adjoint(r, out=out)
    if system.d2 is not None:
        out.sub_(system.d2 * y)
    return out if c is None else out.sub_(c)


def _iterate_one(system: Normal, b: Tensor, c: Tensor, apply, goal, limit: int, rises: int | None, callback) -> Run:
    """`iterate` for one column, whose numbers are numbers: on small problems tensors of one element take most time."""
    shift = c if bool(c.any()) else None
    r, y, q, g = b.clone(), torch.zeros_like(c), torch.empty_like(b), torch.empty_like(c)
    z = apply(_gradient(system, r, y, shift, out=g))
    gamma = max(float(dot(g, z)), 0.0)
    kept, kept_gamma, target, risen, step = (b, torch.zeros_like(c)), gamma, 0.0, 0, 0
    live, p, going = torch.zeros(1, dtype=torch.int64, device=b.device), z, True
    while going and gamma > 0 and step < limit:
        system.A.matmul(p, out=q)
        curvature = float(dot(q, q)) + (0.0 if system.d2 is None else float(dot(p, system.d2 * p)))
        if not curvature > 0:
            break
        step += 1
        alpha = gamma / curvature
        y.add_(p, alpha=alpha)
        r.sub_(q, alpha=alpha)
        z = apply(_gradient(system, r, y, shift, out=g))
        last, gamma = gamma, max(float(dot(g, z)), 0.0)
        if (rises is not None or step % 8 == 0) and gamma < _IMPROVED * kept_gamma:
            kept, kept_gamma = (r.clone(), y.clone()), gamma
        if gamma <= target or step % _STRIDE == 1:
            target = float(goal(r, y, live))
        risen += gamma > last
        if gamma <= target:
            kept_gamma = math.inf
        going = target < gamma < _BLOWN_UP * kept_gamma and (rises is None or risen < rises)
        p.mul_(gamma / last).add_(z)
        if callback is not None:
            callback(step, math.sqrt(gamma))
    if gamma > kept_gamma:
        (r, y), gamma = kept, kept_gamma
    return Run(r, y, *(torch.full((1, 1), number, dtype=b.real.dtype, device=b.device) for number in (gamma, step)))


def iterate(
    system: Normal,
    b: Tensor,
    c: Tensor,
    apply: Callable[[Tensor], Tensor],
    converged: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor],
    *,
    limit: int,
    rises: int | None = None,
    drop: bool = True,
    callback: Callable[[int, float], object] | None = None,
) -> Run:
    """As `cgls`, until `converged` holds, for a block of columns.

    Args:
        converged: (r, y, gradient, gamma, live) -> (P, live), the columns to stop at; `live` are the numbers of those
            that the iterates hold.
        drop: whether finished columns leave the block.
    """
    shift = c if bool(c.any()) else None
    r, y, q, g = b.clone(), torch.zeros_like(c), torch.empty_like(b), torch.empty_like(c)
    z = apply(_gradient(system, r, y, shift, out=g))
    gamma = dot(g, z).clamp_min(0)
    kept_r, kept_y, kept_gamma = b, torch.zeros_like(c), gamma
    active, risen, iterations, p = gamma > 0, torch.zeros_like(gamma), torch.zeros_like(gamma), z
    live, done = torch.arange(b.shape[2], device=b.device), None
    for step in range(1, limit + 1):
        alive = active.any(0)
        count = int(alive.sum())
        if not count:
            break
        if drop and 2 * count <= len(live):
            # What has finished goes where it will be found at the end, the others move together.
            done = _put(done, live, _best(r, y, gamma, kept_r, kept_y, kept_gamma, iterations), b, c)
            stay = alive.nonzero()[:, 0]
            live = live[stay]
            r, y, q, g, p, kept_r, kept_y = (t.index_select(-1, stay) for t in (r, y, q, g, p, kept_r, kept_y))
            gamma, kept_gamma, active = (t.index_select(-1, stay) for t in (gamma, kept_gamma, active))
            risen, iterations = (t.index_select(-1, stay) for t in (risen, iterations))
            shift = None if shift is None else shift.index_select(-1, stay)
        system.A.matmul(p, out=q)
        curvature = dot(q, q) if system.d2 is None else dot(q, q) + dot(p, system.d2 * p)
        active = active & (curvature > 0)
        alpha = torch.where(active, gamma / curvature, 0.0)[:, None].to(b.dtype)
        y.addcmul_(alpha, p)
        r.addcmul_(alpha, q, value=-1)
        z = apply(_gradient(system, r, y, shift, out=g))
        new = torch.where(active, dot(g, z).clamp_min(0), gamma)
        iterations = iterations + active
        if rises is not None or step % 8 == 0:  # only a marked improvement, seen now and then, is worth a copy
            better = active & (new < _IMPROVED * kept_gamma)
            if bool(better.any()):
                kept_r, kept_y = torch.where(better[:, None], r, kept_r), torch.where(better[:, None], y, kept_y)
                kept_gamma = torch.where(better, new, kept_gamma)
        reached = active & converged(r, y, g, new, live)
        # The gradient may rise on the way, so the best iterate is that of the smallest only where there was no end.
        kept_gamma = torch.where(reached, torch.inf, kept_gamma)
        active = active & ~reached & (new < _BLOWN_UP * kept_gamma)
        if rises is not None:
            risen = risen + (new > gamma)
            active = active & (risen < rises)
        p = torch.mul(p, torch.where(active, new / gamma, 0.0)[:, None], out=p).add_(z)
        gamma = new
        if callback is not None:
            callback(step, float(gamma.max().sqrt()))
    run = _best(r, y, gamma, kept_r, kept_y, kept_gamma, iterations)
    return run if done is None else _put(done, live, run, b, c)


def _best(r, y, gamma, kept_r, kept_y, kept_gamma, iterations) -> Run:
    worse = gamma > kept_gamma
    if bool(worse.any()):
        r, y = torch.where(worse[:, None], kept_r, r), torch.where(worse[:, None], kept_y, y)
    return Run(r, y, torch.minimum(gamma, kept_gamma), iterations)


def _put(done: Run | None, live: Tensor, run: Run, b: Tensor, c: Tensor) -> Run:
    """`run`, which holds the columns `live`, put into the run of all."""
    if done is None:
        return run
    for whole, part in zip(done, run, strict=True):
        whole[..., live] = part
    return done
