"""Preconditioned conjugate gradients on the extended normal equations, for one column or for a block of them.

    A^H A y + d^2 y = A^H b - c,    r = b - A y,    g = A^H r - d^2 y - c,    z = M g,    gamma = g^H z

Each step, with p = z to begin with (M is the preconditioner, about (A^H A + d^2)^-1):

    q = A p,  alpha = gamma / (|q|^2 + |d p|^2),  y += alpha p,  r -= alpha q
    g = A^H r - d^2 y - c,  z = M g,  beta = g^H z / gamma,  gamma = g^H z,  p = z + beta p

Calandra, Gratton, Riccietti, Vasseur, SIAM J. Matrix Anal. Appl. 41(4), 2020; for c = 0 this is CGLS in the stable
form of Björck, Elfving, Strakos, SIAM J. Matrix Anal. Appl. 19(3), 1998, which updates r and not g.

In finite precision gamma may blow up after rounding has taken over, so the best iterate is kept, and given back where
the goal was not reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..sparse.base import Products, dot
from ..torch_func.cores import settle
from .watching import is_watched, tell

_IMPROVED = 1e-4  # times the gamma of the iterate that is kept: an iterate of less is kept in its place
_BLOWN_UP = 1e20  # times the gamma of the iterate that is kept: iterates of more have blown up
_LOOK = 8  # steps after which it is looked whether an iterate is worth keeping
_STRIDE = 4  # steps after which a goal is taken anew


class Run(NamedTuple):
    """How a run of conjugate gradients ended: iterates, gamma = |g|^2 in the preconditioner's norm, iterations."""

    r: Tensor
    y: Tensor
    gamma: Tensor
    iterations: Tensor


class Normal(Protocol):
    """What conjugate gradients need of a system: the matrix, and d^2 or None."""

    @property
    def A(self) -> Products: ...

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
    inverse: Tensor | None = None,
) -> Run:
    """Iterate until gamma is at most a goal.

    Args:
        apply: the preconditioner M; gives a new tensor each time.
        goal: (r, y, live) -> (P, live), where `live` are the numbers of the columns that r and y hold.
        limit: iterations at most.
        rises: a column stops once gamma has risen so often: with b = 0 gamma blows up soon after rounding takes over.
        callback: called with (iteration, largest norm of a gradient).
        inverse: `apply` as a diagonal (1, n, 1), where it is one.
    """
    if b.shape[0] * b.shape[2] == 1:
        return _iterate_one(system, b, c, apply, goal, limit, rises, callback, inverse)
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


def _gradient(system: Normal, product: Tensor, y: Tensor, c: Tensor | None) -> Tensor:
    """g = A^H r - d^2 y - c, in the place of A^H r"""
    if system.d2 is not None:
        product.sub_(system.d2 * y)
    return product if c is None else product.sub_(c)


class _Steps:
    """The steps for one column, with scalars that are numbers: on small problems tensors of one element take most time.

    `kernels.Iteration` makes the same steps in compiled code.
    """

    def __init__(
        self, system: Normal, c: Tensor | None, r: Tensor, y: Tensor, g: Tensor, apply: Callable[[Tensor], Tensor]
    ):
        self.system, self.c, self.r, self.y, self.g, self.apply = system, c, r, y, g, apply
        self.p, self.q = apply(g), torch.empty_like(r)
        self.gamma = max(float(dot(g, self.p)), 0.0)

    def advance(self, count: int, target: float, ceiling: float) -> tuple[int, bool]:
        """(how many steps there were, whether there may be more): at most `count`, while target < gamma < ceiling."""
        A, d2, y, r, p, q, gamma = self.system.A, self.system.d2, self.y, self.r, self.p, self.q, self.gamma
        for step in range(1, count + 1):
            A.matmul(p, out=q)
            curvature = float(A.curvature(q, r)) + (0.0 if d2 is None else float(dot(p, d2 * p)))
            if not curvature > 0:
                return step - 1, False
            alpha = gamma / curvature
            y.add_(p, alpha=alpha)
            r.sub_(q, alpha=alpha)
            z = self.apply(_gradient(self.system, A.stepped(r, q, alpha, self.g), y, self.c))
            last, gamma = gamma, max(float(dot(self.g, z)), 0.0)
            self.gamma = gamma
            p.mul_(gamma / last).add_(z)
            if not target < gamma < ceiling:
                return step, False
        return count, True


def _iterate_one(
    system: Normal, b: Tensor, c: Tensor, apply, goal, limit: int, rises: int | None, callback, inverse: Tensor | None
) -> Run:
    """`cgls` for one column: steps one by one where each is watched, else up to where something is to be looked at."""
    shift, watched = c if bool(c.any()) else None, rises is not None or callback is not None
    r = b.clone(memory_format=torch.contiguous_format)
    y, g = (torch.zeros_like(c, memory_format=torch.contiguous_format) for _ in range(2))
    _gradient(system, system.A.adjoint(r, out=g), y, shift)
    steps = None
    if inverse is not None and not watched:
        steps = system.A.iteration(inverse, shift, system.d2, r, y, g, max(float(dot(g, inverse * g)), 0.0))
    steps = steps or _Steps(system, shift, r, y, g, apply)
    kept, kept_gamma, target, risen, step = (b, torch.zeros_like(c)), steps.gamma, 0.0, 0, 0
    live, going = torch.zeros(1, dtype=torch.int64, device=b.device), True
    while going and steps.gamma > 0 and step < limit:
        last, ahead = steps.gamma, 1 if watched else _until_a_look(step)
        settle()
        done, going = steps.advance(min(ahead, limit - step), target, _BLOWN_UP * kept_gamma)
        if not done:
            break
        step, gamma = step + done, steps.gamma
        if (rises is not None or step % _LOOK == 0) and gamma < _IMPROVED * kept_gamma:
            kept, kept_gamma = (r.clone(), y.clone()), gamma
        if gamma <= target or step % _STRIDE == 1:
            target = float(goal(r, y, live))
        risen += gamma > last
        if gamma <= target:
            kept_gamma = math.inf
        going = going and target < gamma < _BLOWN_UP * kept_gamma and (rises is None or risen < rises)
        if callback is not None:
            callback(step, math.sqrt(gamma))
        if is_watched():
            tell(math.sqrt(gamma), count=done)
    gamma = steps.gamma
    if gamma > kept_gamma:
        (r, y), gamma = kept, kept_gamma
    return Run(r, y, *(torch.full((1, 1), number, dtype=b.real.dtype, device=b.device) for number in (gamma, step)))


def _until_a_look(step: int) -> int:
    """How many steps it takes to the next at which a goal is taken or it is looked whether an iterate is kept."""
    return next(i for i in range(1, _LOOK + 1) if (step + i) % _STRIDE == 1 or (step + i) % _LOOK == 0)


class _BlockSteps:
    """The steps for a block of columns, each with an alpha, a beta and a gamma of its own (P, k).

    Attributes:
        live: the numbers of the columns that are in the block.
        active: (P, k), which of them still move; the others stay as they are.
        kept_r, kept_y, kept_gamma: the best iterate so far, as far as it was looked at.
    """

    def __init__(self, system: Normal, b: Tensor, c: Tensor, apply: Callable[[Tensor], Tensor]):
        self.system, self.apply, self.c = system, apply, c if bool(c.any()) else None
        self.r, self.y, self.p, self.q = b.clone(), torch.zeros_like(c), torch.zeros_like(c), torch.empty_like(b)
        self.g = _gradient(system, system.A.adjoint(self.r, out=torch.empty_like(c)), self.y, self.c)
        self.z = apply(self.g)
        self.gamma = self.last = dot(self.g, self.z).clamp_min(0)
        self.kept_r, self.kept_y, self.kept_gamma = b, torch.zeros_like(c), self.gamma
        self.active, self.iterations = self.gamma > 0, torch.zeros_like(self.gamma)
        self.live = torch.arange(b.shape[2], device=b.device)

    def advance(self) -> None:
        """One step of all columns."""
        A, d2, p, q = self.system.A, self.system.d2, self.p, self.q
        beta = torch.where(self.active, self.gamma / self.last, 0.0)[:, None]
        torch.mul(p, beta, out=p).add_(self.z)
        A.matmul(p, out=q)
        curvature = A.curvature(q, self.r)
        curvature = curvature if d2 is None else curvature + dot(p, d2 * p)
        self.active = self.active & (curvature > 0)
        alpha = torch.where(self.active, self.gamma / curvature, 0.0)[:, None].to(p.dtype)
        self.y.addcmul_(alpha, p)
        self.r.addcmul_(alpha, q, value=-1)
        self.z = self.apply(_gradient(self.system, A.stepped(self.r, q, alpha, self.g), self.y, self.c))
        self.last, self.gamma = self.gamma, torch.where(self.active, dot(self.g, self.z).clamp_min(0), self.gamma)
        self.iterations = self.iterations + self.active

    def keep_improved(self) -> None:
        """Keep the iterates of columns whose gamma has fallen markedly; a copy of each step would take too long."""
        better = self.active & (self.gamma < _IMPROVED * self.kept_gamma)
        if bool(better.any()):
            self.kept_r = torch.where(better[:, None], self.r, self.kept_r)
            self.kept_y = torch.where(better[:, None], self.y, self.kept_y)
            self.kept_gamma = torch.where(better, self.gamma, self.kept_gamma)

    def best(self) -> Run:
        """For each column the iterate, or the one that was kept where that has a smaller gamma."""
        r, y, worse = self.r, self.y, self.gamma > self.kept_gamma
        if bool(worse.any()):
            r, y = torch.where(worse[:, None], self.kept_r, r), torch.where(worse[:, None], self.kept_y, y)
        return Run(r, y, torch.minimum(self.gamma, self.kept_gamma), self.iterations)

    def take(self, which: Tensor) -> None:
        """Go on with some of the columns, for fewer of which a step takes less time."""
        iterates = ["r", "y", "p", "q", "g", "z", "kept_r", "kept_y"] + ([] if self.c is None else ["c"])
        for name in [*iterates, "gamma", "last", "kept_gamma", "active", "iterations", "live"]:
            setattr(self, name, getattr(self, name).index_select(-1, which))


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
        converged: (r, y, g, gamma, live) -> (P, live), the columns to stop at; `live` are the numbers of those that the
            iterates hold.
        drop: whether columns that have finished leave the block once they are half of it.
    """
    steps, finished = _BlockSteps(system, b, c, apply), None
    risen = torch.zeros((len(b), b.shape[2]), dtype=torch.int64, device=b.device)  # how often gamma has
    for step in range(1, limit + 1):
        alive = steps.active.any(0)
        count = int(alive.sum())
        if not count:
            break
        if drop and 2 * count <= len(steps.live):
            finished = _put(finished, steps.live, steps.best())
            steps.take(alive.nonzero()[:, 0])
        settle()
        steps.advance()
        if rises is not None or step % _LOOK == 0:
            steps.keep_improved()
        reached = steps.active & converged(steps.r, steps.y, steps.g, steps.gamma, steps.live)
        # A column that reached its goal ends with the iterate that did, though gamma may have been smaller before.
        steps.kept_gamma = torch.where(reached, torch.inf, steps.kept_gamma)
        steps.active = steps.active & ~reached & (steps.gamma < _BLOWN_UP * steps.kept_gamma)
        if rises is not None:
            risen[:, steps.live] += steps.gamma > steps.last
            steps.active = steps.active & (risen[:, steps.live] < rises)
        if callback is not None:
            callback(step, float(steps.gamma.max().sqrt()))
        if is_watched():
            tell(float(steps.gamma.max().sqrt()))
    return _put(finished, steps.live, steps.best())


def _put(finished: Run | None, live: Tensor, run: Run) -> Run:
    """`run`, of the columns `live`, put into the run of all columns, which is the first that there is."""
    if finished is None:
        return run
    for whole, part in zip(finished, run, strict=True):
        whole[..., live] = part
    return finished
