"""Library operations: kernels that are opaque to every tracer, and their way through torch's dispatcher."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad

from .cores import shared_cores
from .process import entrance
from .tracing import beside_graph

_LAZY = (torch._C.DispatchKey.Conjugate, torch._C.DispatchKey.Negative)
_is_left_out = torch._C._dispatch_tls_is_dispatch_key_excluded
_PLAIN = Tensor, torch.nn.Parameter
_library = torch.library.Library("functional_lstsq", "DEF")


def define(schema: str, kernel: Callable, fake: Callable) -> Operation:
    """Make `kernel` the library operation `schema`, opaque to every tracer; `fake` gives the shapes of its results.

    `torch.library.custom_op` with `register_autograd` would be shorter, but fails under `torch.func.grad` and gives
    zero under `jacfwd`, so derivatives are the business of `Primitive`, one floor above.
    """

    def plainly(*args: Any) -> Any:
        with entrance, shared_cores:
            if not (torch.is_autocast_enabled(args[0].device.type) or any(map(_is_left_out, _LAZY))):
                return kernel(*args)
            with ExitStack() as stack:
                stack.enter_context(torch.autocast(args[0].device.type, enabled=False))
                # The mode under which a compiled graph runs for the first time leaves these keys out: x.conj() would
                # be x.
                for key in _LAZY:
                    stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
                return kernel(*args)

    name = _library.define(schema)
    # After a graph break Dynamo would meet the kernel's functions as frames of their own.
    beside = beside_graph(plainly)
    _library.impl(name, beside, "CompositeExplicitAutograd")
    torch.library.register_fake(f"functional_lstsq::{name}", fake, lib=_library)
    return Operation(getattr(torch.ops.functional_lstsq, name).default, beside)


class Operation:
    """A library operation, called through torch's dispatcher only where that does more than to call its kernel.

    Its way through there, past the rules for exported programs, takes a twentieth of what a gradient of 60 x 20 takes.
    """

    def __init__(self, overload: Any, kernel: Callable):
        self.overload, self.kernel = overload, kernel

    def __call__(self, *args: Any) -> Any:
        # Where Dynamo looks into this, at what is called within no primitive, it knows what the first of these tells.
        if torch.compiler.is_compiling() or is_seen() or not all(map(is_plain, args)):
            return self.overload(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.kernel(*args)


def is_seen() -> bool:
    """Whether a tracer, a transformation or a profiler looks at operations that are called."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )


def is_plain(argument: Any) -> bool:
    """Whether an argument is a tensor of numbers under no wrapper, or no tensor."""
    if isinstance(argument, Tensor):
        wrapped = is_functorch_wrapped_tensor(argument) or is_legacy_batchedtensor(argument)
        return type(argument) in _PLAIN and not argument.is_meta and not wrapped
    return not isinstance(argument, list)


def differentiate(operation: Operation, apply: Callable) -> None:
    """Give an operation that is called outside of its primitive, by an exported program, the primitive's rules.

    Args:
        apply: takes the operation's arguments and calls the primitive.
    """

    overload = operation.overload

    def with_rules(*args: Any) -> Any:
        reverse = torch.is_grad_enabled()
        forward = forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()
        if reverse or forward:  # as they are not within a primitive
            every = (part for argument in args for part in (argument if isinstance(argument, list) else [argument]))
            tensors = [part for part in every if isinstance(part, Tensor)]
            if reverse and any(tensor.requires_grad for tensor in tensors):
                return apply(*args)
            if forward and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
                return apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    name = overload._schema.name.split("::")[1]
    _library.impl(name, beside_graph(with_rules), "Autograd")
    # Where a transformation of torch.func is under way, torch would look for rules of the operation's own for it.
    _library.impl(name, partial(_transformed, apply), "FuncTorchDynamicLayerFrontMode")


_recorded = threading.local()  # .yes: an operation is in an exported program by now, and its rules are asked for


def is_in_program() -> bool:
    return torch.compiler.is_dynamo_compiling() or getattr(_recorded, "yes", False)


def _transformed(apply: Callable, *args: Any) -> Any:
    before, _recorded.yes = getattr(_recorded, "yes", False), True
    try:
        return apply(*args)
    finally:
        _recorded.yes = before
