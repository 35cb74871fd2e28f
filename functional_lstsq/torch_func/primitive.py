"""What torch.func and torch.compile need of a primitive, once for all three primitives.

A primitive is a linear-algebra operation on plain tensors (its kernel, an opaque library operation) with a rule for
each transformation: reverse mode, forward mode and vmap. Its rules call primitives only, so derivatives of every order
and mix follow by recursion.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    _unwrap_for_grad,
    _wrap_for_grad,
    get_interpreter_stack,
)
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from .cores import shared_cores
from .process import entrance
from .tracing import beside_graph, is_traced

_LAZY = (torch._C.DispatchKey.Conjugate, torch._C.DispatchKey.Negative)
_library = torch.library.Library("functional_lstsq", "DEF")


def define(schema: str, kernel: Callable, fake: Callable) -> Callable:
    """Make `kernel` the library operation `schema`, opaque to every tracer; `fake` gives the shapes of its results.

    `torch.library.custom_op` with `register_autograd` would be shorter, but fails under `torch.func.grad` and gives
    zero under `jacfwd`, so derivatives are the business of `Primitive`, one floor above.
    """

    def plainly(*args: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(entrance)
            stack.enter_context(shared_cores)
            device = args[0].device.type
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
            # The mode under which a compiled graph runs for the first time leaves these keys out: x.conj() would be x.
            for key in _LAZY:
                if torch._C._dispatch_tls_is_dispatch_key_excluded(key):
                    stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
            return kernel(*args)

    name = _library.define(schema)
    # After a graph break Dynamo would meet the kernel's functions as frames of their own.
    _library.impl(name, beside_graph(plainly), "CompositeExplicitAutograd")
    torch.library.register_fake(f"functional_lstsq::{name}", fake, lib=_library)
    return getattr(torch.ops.functional_lstsq, name).default


def differentiate(operation: Any, apply: Callable) -> None:
    """Give an operation that is called outside of its primitive, by an exported program, the primitive's rules.

    Args:
        apply: takes the operation's arguments and calls the primitive.
    """

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
            return operation(*args)

    name = operation._schema.name.split("::")[1]
    _library.impl(name, beside_graph(with_rules), "Autograd")
    # Where a transformation of torch.func is under way, torch would look for rules of the operation's own for it.
    _library.impl(name, partial(_transformed, apply), "FuncTorchDynamicLayerFrontMode")


_recorded = threading.local()  # .yes: an operation is in an exported program by now, and its rules are asked for


def _is_recorded() -> bool:
    return torch.compiler.is_dynamo_compiling() or getattr(_recorded, "yes", False)


def _transformed(apply: Callable, *args: Any) -> Any:
    before, _recorded.yes = getattr(_recorded, "yes", False), True
    try:
        return apply(*args)
    finally:
        _recorded.yes = before


_ANY_ARGUMENTS = inspect.Signature([inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)])


class Primitive(torch.autograd.Function):
    """`apply(static, *tensors)`; a subclass gives `forward`, `vjp_rule`, `jvp_rule` and `vmap`.

    vjp_rule(static, inputs, outputs, cotangents, needed) returns one gradient (or None) for each tensor input,
    jvp_rule(static, inputs, outputs, tangents) one tangent for each output. Missing cotangents and tangents are None.
    Outputs whose numbers are in `constants` have no derivative.
    """

    constants: tuple[int, ...] = ()

    def __init_subclass__(cls) -> None:
        # Compiled autograd takes static methods alone. After a graph break Dynamo meets the rules as frames of their
        # own, and fails on the insides of torch that they call.
        super().__init_subclass__()
        cls.backward = staticmethod(beside_graph(partial(cls._backward)))  # type: ignore[assignment]
        cls.jvp = staticmethod(beside_graph(partial(cls._jvp)))  # type: ignore[assignment]
        if "forward" in vars(cls):
            # torch looks for defaults of its parameters at each call, for a twentieth of what a small gradient takes.
            cls.forward.__func__.__signature__ = _ANY_ARGUMENTS  # type: ignore[attr-defined]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active() and torch.compiler.is_exporting() and not _is_recorded():
            # torch.export records operations, whatever maps over them, and knows of no primitives.
            if all(level.key() == TransformType.Vmap for level in get_interpreter_stack() or ()):
                return cls.forward(*args)
            raise NotImplementedError(
                "torch.export cannot take derivatives inside of what it exports: export the function itself, and "
                "differentiate the program, program.module(), which torch.func can"
            )
        return super().apply(*args)

    @classmethod
    def setup_context(cls, ctx: Any, inputs: tuple, output: Any) -> None:
        static, *tensors = inputs
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.static, ctx.count = static, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*map(outputs.__getitem__, cls.constants))
        ctx.save_for_backward(*tensors, *outputs)
        ctx.save_for_forward(*tensors, *outputs)

    @classmethod
    def _backward(cls, ctx: Any, *cotangents: Tensor | None) -> tuple:
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        if cotangents.count(None) == len(cotangents):
            return (None,) * (1 + ctx.count)
        return None, *cls.vjp_rule(ctx.static, saved[: ctx.count], saved[ctx.count :], cotangents, needed)

    @classmethod
    def _jvp(cls, ctx: Any, _static: None, *tangents: Tensor | None) -> Any:
        # torch calls this rule on the level of the inner jvp, with forward mode off, so what the rule computes would
        # carry no tangent of an outer jvp (pytorch#197867). One level down, everything carries what it should.
        interpreter = retrieve_current_functorch_interpreter() if torch._C._are_functorch_transforms_active() else None
        saved = ctx.saved_tensors
        if interpreter is None or interpreter.key() != TransformType.Jvp:
            return cls.jvp_rule(ctx.static, saved[: ctx.count], saved[ctx.count :], tangents)
        level = interpreter.level()

        def down(tensors: tuple) -> tuple:
            return tuple([None if t is None else _unwrap_for_grad(t, level) for t in tensors])

        saved, tangents = down(saved), down(tangents)
        with torch.enable_grad(), interpreter.lower(), _set_fwd_grad_enabled(True):
            result = cls.jvp_rule(ctx.static, saved[: ctx.count], saved[ctx.count :], tangents)
        if isinstance(result, Tensor):
            return _wrap_for_grad(result, level)
        return tuple([None if t is None else _wrap_for_grad(t, level) for t in result])

    @classmethod
    def vjp_rule(cls, static: Any, inputs: tuple, outputs: tuple, cotangents: tuple, needed: tuple) -> tuple:
        raise NotImplementedError

    @classmethod
    def jvp_rule(cls, static: Any, inputs: tuple, outputs: tuple, tangents: tuple) -> Any:
        raise NotImplementedError


def of_some(which: list[int], every: Sequence[Tensor], function: Callable) -> tuple[Callable, tuple[Tensor, ...]]:
    """(`function` of the arguments `which` alone, those arguments): what a rule differentiates by."""

    def moved(*chosen: Tensor) -> Any:
        changed = dict(zip(which, chosen, strict=True))
        return function(*(changed.get(i, tensor) for i, tensor in enumerate(every)))

    return moved, tuple(every[i] for i in which)


def beside(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The parts one after the other along `dim`, as torch.cat gives them.

    That would fix the size of a batch where a tracer records it under vmap: one graph for each size, up to the limit.
    """
    if not is_traced(parts[0]):
        return torch.cat(list(parts), dim)
    dim = dim % parts[0].ndim
    before, after, whole = 0, sum(part.shape[dim] for part in parts), None
    for part in parts:
        after = after - part.shape[dim]
        padded = torch.nn.functional.pad(part, (*[0] * (2 * (part.ndim - 1 - dim)), before, after))
        whole = padded if whole is None else whole + padded
        before = before + part.shape[dim]
    assert whole is not None
    return whole


# Tensors of the primitives are (P, rows, k): P matrices on one pattern, k columns each; values are (P, nnz). A vmap
# over columns alone joins the columns; a vmap over values joins the matrices. Results have the batch in front and are
# contiguous: strides that differ between a result and its tangent are an error in a compiled graph.


def lead(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """`tensor` with the vmapped dimension in front, expanded when it has none."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def extent(tensors: Sequence[Tensor | None], dims: Sequence[int | None], which: int) -> int:
    """The size of dimension `which` of the first tensor that there is, without the vmapped dimension."""
    tensor, dim = next((t, dim) for t, dim in zip(tensors, dims, strict=True) if t is not None)
    return tensor.shape[which + (dim is not None and dim <= which)]


def join_matrices(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(B, P, ...) -> (B P, ...)"""
    return None if tensor is None else lead(tensor, dim, size).flatten(0, 1)


def split_matrices(tensor: Tensor, size: int, copies: int) -> Tensor:
    """(B P, ...) -> (B, P, ...), for P = `copies`, which an empty batch does not tell."""
    return tensor.unflatten(0, (size, copies)).contiguous()


def join_columns(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(B, P, rows, k) -> (P, rows, B k)"""
    return None if tensor is None else lead(tensor, dim, size).movedim(0, 2).flatten(2, 3)


def split_columns(tensor: Tensor, size: int, columns: int) -> Tensor:
    """(P, rows, B k) -> (B, P, rows, k), for k = `columns`."""
    return tensor.unflatten(2, (size, columns)).movedim(2, 0).contiguous()


class Constant(Primitive):
    """Outputs without a derivative, (P, ...) each, of P problems; the last `shared` tensors are those of all."""

    shared = 0

    @classmethod
    def vjp_rule(cls, static: Any, inputs: tuple, outputs: tuple, cotangents: tuple, needed: tuple) -> tuple:
        return (None,) * len(inputs)

    @classmethod
    def jvp_rule(cls, static: Any, inputs: tuple, outputs: tuple, tangents: tuple) -> tuple:
        return (None,) * len(cls.constants)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple, static: Any, *tensors: Any) -> tuple:
        size, count = info.batch_size, len(tensors) - cls.shared
        of_problems, dims = tensors[:count], in_dims[1 : 1 + count]
        joined = [join_matrices(t, dim, size) for t, dim in zip(of_problems, dims, strict=True)]
        outputs = cls.apply(static, *joined, *tensors[count:])
        copies = extent(of_problems, dims, 0)
        return tuple(split_matrices(t, size, copies) for t in outputs), (0,) * len(outputs)
