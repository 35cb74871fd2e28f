"""Forward mode inside of the library: one thread at a time, and of functions that only have rules for reverse mode.

torch counts levels of forward mode for the whole process, so that two threads, each in a jvp of its own, take each
other's level away. What a thread of the user's differentiates in forward mode itself cannot be held back here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

_alone = threading.RLock()


def jvp(function: Callable, primals: tuple, tangents: tuple) -> Any:
    """(result, tangent), as `torch.func.jvp` gives them; by reverse mode twice where it has no rules.

    So too within `torch.func.linearize`, which counts on dual numbers that it does not let anything be nested in.
    """
    try:
        with _alone:
            return torch.func.jvp(function, primals, tangents)
    except (NotImplementedError, RuntimeError) as error:
        if not _only_reverse(error):
            raise
    # J^T u is linear in u: its transpose along the tangent is J times that.
    pulled: Any = torch.func.vjp(function, *primals)
    result, pull = pulled
    turned: Any = torch.func.vjp(pull, torch_pytree.tree_map(torch.zeros_like, result))
    return result, turned[1](tangents)[0]


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The derivative (m, n) of `function` at x (n,): in forward mode, which for m >= n is the cheaper one, if there is.

    `torch.func.jacfwd` takes as many directions at a time as there are.
    """
    try:
        with _alone:
            return torch.func.jacfwd(function)(x)
    except NotImplementedError as error:
        if not _only_reverse(error):
            raise
    return torch.func.jacrev(function)(x)


def _only_reverse(error: NotImplementedError | RuntimeError) -> bool:
    if not isinstance(error, NotImplementedError):
        return "Nested forward mode AD" in str(error)
    return any(told in str(error) for told in ("implement the jvp function", "forward AD", "forward mode AD"))
