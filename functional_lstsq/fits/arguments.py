"""What fits are asked, checked: one clear error for every bad argument, before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from ..linear.arguments import check_numbers
from ..sparse.pattern import SparsePattern
from ..sparse.precision import convert
from ..torch_func.tracing import concrete
from .trees import as_vector


def check_asked(
    residual: Any, x0: Any, args: Any, jacobian: Any, max_iterations: Any, name: str, of_start: str
) -> None:
    """One clear error for what cannot be a fit."""
    if torch.compiler.is_compiling():
        raise TypeError(f"torch.compile cannot take {name}; compile what makes its arguments")
    if not callable(residual):
        raise TypeError(f"residual must be callable, got {residual!r}")
    if not isinstance(x0, Tensor) or x0.layout != torch.strided:
        got = f"layout {x0.layout}" if isinstance(x0, Tensor) else type(x0).__name__
        raise TypeError(f"{of_start} must be a dense tensor of shape (n,), got {got}")
    if x0.ndim != 1 or not x0.shape[0]:
        hint = "; for a batch of starts use torch.vmap" if x0.ndim > 1 else ""
        raise ValueError(f"{of_start} must have shape (n,) with n > 0, got {tuple(x0.shape)}{hint}")
    if x0.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{of_start} must be float32 or float64, got {x0.dtype}")
    check_args(args)
    if jacobian is not None and not isinstance(jacobian, SparsePattern) and not callable(jacobian):
        raise TypeError(f"jacobian must be None, a SparsePattern or callable, got {jacobian!r}")
    if max_iterations is None:
        return
    if isinstance(max_iterations, bool) or not isinstance(max_iterations, int):
        raise TypeError(f"max_iterations must be an integer or None, got {max_iterations!r}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")


def of_residuals(name: str, given: Any, m: int, x0: Tensor, on_failure: str) -> Tensor:
    """What is given for each of m residuals, in double precision; ones for None."""
    if given is None:
        return torch.ones(m, dtype=torch.float64, device=x0.device)
    if not isinstance(given, Tensor) or not given.is_floating_point():
        got = str(given.dtype) if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"{name} must be a real tensor of shape ({m},), got {got}")
    if given.shape != (m,):
        raise ValueError(f"{name} must have shape ({m},), one for each residual, got {tuple(given.shape)}")
    if given.device != x0.device:
        raise ValueError(f"{name} is on {given.device}, x0 is on {x0.device}")
    check_numbers(name, given)
    numbers = concrete(given).detach()
    if name == "sigma" and bool((numbers <= 0).any()):
        raise ValueError(f"sigma must be positive, got {float(numbers.min()):g}")
    return convert(given, torch.float64, f"the derivative by {name}", on_failure)


def check_args(args: Any) -> None:
    """Refuse what is not a tuple."""
    if not isinstance(args, tuple):
        raise TypeError(f"args must be a tuple, (y,) for one, got {type(args).__name__}")


def taken_apart(args: tuple) -> tuple[list[Tensor], Callable[[Any], tuple]]:
    """(tensors in `args`, what puts others into their places)"""
    leaves, spec = torch_pytree.tree_flatten(args)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def rebuild(tensors: Any) -> tuple:
        changed = dict(zip(places, tensors, strict=True))
        return torch_pytree.tree_unflatten([changed.get(i, leaf) for i, leaf in enumerate(leaves)], spec)

    return [leaves[i] for i in places], rebuild


def bounds_of(bounds: Any, x0: Tensor, on_failure: str) -> tuple[Tensor, Tensor]:
    """(lower, upper), (n,) each, in double precision."""
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"bounds must be a pair (lower, upper), got {type(bounds).__name__}")
    lower, upper = (_bound(name, bound, x0, on_failure) for name, bound in zip(("lower", "upper"), bounds, strict=True))
    least, most = concrete(lower).detach(), concrete(upper).detach()
    wrong = ~(least <= most) | (least == torch.inf) | (most == -torch.inf)
    if bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        low, high = (float(t.expand(wrong.shape)[place]) for t in (least, most))
        raise ValueError(
            f"bounds must be lower <= upper, with a number between, got {low:g} and {high:g} at {place[-1]}"
        )
    return lower, upper


def _bound(name: str, bound: Any, x0: Tensor, on_failure: str) -> Tensor:
    (n,), what = x0.shape, f"the {name} bound"
    if isinstance(bound, (int, float)) and not isinstance(bound, bool):
        bound = torch.full((), float(bound), dtype=torch.float64, device=x0.device)
    bound = as_vector(bound)[0]
    if not isinstance(bound, Tensor) or bound.layout != torch.strided or not bound.is_floating_point():
        got = f"a tensor of {bound.dtype}, {bound.layout}" if isinstance(bound, Tensor) else repr(bound)
        raise TypeError(f"{what} must be a number, a dense real tensor or a pytree as x0 is, got {got}")
    if bound.shape not in ((), (n,)):
        raise ValueError(f"{what} must be a number or of shape ({n},), got {tuple(bound.shape)}")
    if bound.device != x0.device:
        raise ValueError(f"{what} is on {bound.device}, x0 is on {x0.device}")
    return convert(bound, torch.float64, f"the derivative by {what}", on_failure).expand(n)
