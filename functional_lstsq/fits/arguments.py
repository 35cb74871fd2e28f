"""What fits are asked, checked: one clear error for every bad argument, before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from ..linear.arguments import check_numbers
from ..linear.bounds import bound_of, pair_of
from ..linear.pivoting import check_order
from ..sparse.pattern import SparsePattern
from ..sparse.precision import convert
from ..torch_func.closures import close
from ..torch_func.tracing import concrete, refuse_recording
from .trees import as_vector


def check_asked(
    residual: Any, x0: Any, args: Any, jacobian: Any, max_iterations: Any, name: str, of_start: str
) -> None:
    """One clear error for what cannot be a fit."""
    refuse_recording(name)
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


def weights_of(weights: Any, sigma: Any, m: int, x0: Tensor, on_failure: str) -> Tensor:
    """(m,) of one of the two, in double precision."""
    if sigma is None:
        return of_residuals("weights", weights, m, x0, on_failure)
    return of_residuals("sigma", sigma, m, x0, on_failure).square().reciprocal()


def check_tensors(x0: Tensor, of_start: str, tensors: list[Tensor]) -> None:
    """Refuse tensors of `args` that are sparse, and numbers that are none."""
    for tensor, where in ((x0, of_start), *((t, "args") for t in tensors)):
        if tensor.layout != torch.strided:
            raise TypeError(f"args must hold dense tensors and SparseMatrix, got layout {tensor.layout}")
        check_numbers(where, tensor)


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
    (n,) = x0.shape
    lower, upper = (
        bound_of(name, as_vector(bound)[0], ((), (n,)), x0.device, "x0", on_failure).expand(n)
        for name, bound in zip(("lower", "upper"), pair_of(bounds), strict=True)
    )
    check_order(*(concrete(bound).detach().reshape(-1, n) for bound in (lower, upper)))
    return lower, upper


def closed_residual(
    residual: Callable[..., Any], of_function: str, of_start: str, start: Tensor, doubled: list[Tensor]
) -> tuple[Callable, Tensor]:
    """(`residual` as a function of all that it depends on, what it gives at the start)."""
    try:
        function, r = close(residual, of_function, "args", start, *doubled)
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        raise TypeError(
            f"{of_function} must take {of_start} and args in double precision, got an error of torch: {error}. Hand "
            "over in args what is of single precision, or convert it"
        ) from error
    if not isinstance(r, Tensor) or r.ndim != 1 or not r.is_floating_point():
        got = f"{r.dtype}, shape {tuple(r.shape)}" if isinstance(r, Tensor) else type(r).__name__
        raise ValueError(f"residual must give a real tensor of shape (m,), got {got}")
    return function, r


def check_sizes(m: int, n: int, bounded: bool, minimum_norm: bool, robust: Any, of_start: str, where: str = "") -> None:
    """Refuse a fit of m numbers to n unknowns that has no unique minimum, and what bounds do not go with."""
    if bounded and minimum_norm:
        raise ValueError("bounds allow no rank_deficient='minimum_norm'")
    if bounded and isinstance(getattr(robust, "scale", None), str):
        raise ValueError(f"bounds allow no estimated scale, got {robust!r}: give it a number for a scale")
    if m < n and not bounded:
        raise ValueError(
            f"residual must give at least as many numbers{where} as {of_start} has, {n}, got {m}; a prior on these, "
            f"s * {of_start[0]}, gives more"
        )
