"""What torch.func and torch.compile need of a primitive, once for all three primitives.

A primitive is a linear-algebra operation on plain tensors (its kernel, an opaque library operation) with a rule for
each transformation: reverse mode, forward mode and vmap. Its rules call primitives only, so derivatives of every order
and mix follow by recursion.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    _unwrap_for_grad,
    _wrap_for_grad,
    get_interpreter_stack,
    is_legacy_batchedtensor,
)
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from .operations import is_in_program, is_plain, is_seen
from .reverse_mode import apply_on, evaluate_rule_on, gradient_level, node_of
from .tracing import beside_graph, is_traced

_ANY_ARGUMENTS = inspect.Signature([inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)])


def _is_followed(argument: Any) -> bool:
    """Whether autograd has a reason to hear of what is done with an argument."""
    if not isinstance(argument, Tensor):
        return False
    if not is_plain(argument) or forward_ad._current_level >= 0:
        return True
    return argument.requires_grad and torch.is_grad_enabled()


def _refuse_old_batches(cotangents: tuple[Tensor | None, ...]) -> None:
    """Refuse what the vmap before torch.func's would give: right numbers, without a graph, so constants."""
    if any(t is not None and is_legacy_batchedtensor(t) for t in cotangents):
        raise NotImplementedError(
            "derivatives that are themselves to be differentiated (create_graph=True) cannot be taken with "
            "is_grads_batched=True or vectorize=True, where torch loses their graph; torch.func.jacrev and "
            "torch.vmap(lambda c: torch.autograd.grad(x, v, c, create_graph=True)) can"
        )


class Primitive(torch.autograd.Function):
    """`apply(static, *tensors)`; a subclass gives `forward`, `vjp_rule`, `jvp_rule` and `vmap`.

    vjp_rule(static, inputs, outputs, cotangents, needed) returns one gradient (or None) for each tensor input,
    jvp_rule(static, inputs, outputs, tangents) one tangent for each output. Missing cotangents and tangents are None.
    Outputs whose numbers are in `constants` have no derivative.
    """

    constants: tuple[int, ...] = ()
    _node: type

    def __init_subclass__(cls) -> None:
        # Compiled autograd takes static methods alone. After a graph break Dynamo meets the rules as frames of their
        # own, and fails on the insides of torch that they call.
        super().__init_subclass__()
        cls.backward = staticmethod(beside_graph(partial(cls._backward)))  # type: ignore[assignment]
        cls.jvp = staticmethod(beside_graph(partial(cls._jvp)))  # type: ignore[assignment]
        if "forward" in vars(cls):
            # torch looks for defaults of its parameters at each call, for a twentieth of what a small gradient takes.
            cls.forward.__func__.__signature__ = _ANY_ARGUMENTS  # type: ignore[attr-defined]
        cls._node = node_of(cls)

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active() and torch.compiler.is_exporting() and not is_in_program():
            # torch.export records operations, whatever maps over them, and knows of no primitives.
            if all(level.key() == TransformType.Vmap for level in get_interpreter_stack() or ()):
                return cls.forward(*args)
            raise NotImplementedError(
                "torch.export cannot take derivatives inside of what it exports: export the function itself, and "
                "differentiate the program, program.module(), which torch.func can"
            )
        if (level := gradient_level()) is not None:
            return apply_on(level, cls._node, args)
        if not is_seen() and not any(map(_is_followed, args)):
            return cls.forward(*args)
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
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * (1 + ctx.count)
        rule = partial(cls._evaluate_vjp_rule, ctx.static, ctx.count, len(cotangents), ctx.needs_input_grad[1:])
        tensors = *cotangents, *ctx.saved_tensors
        level = gradient_level()
        if level is None and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            _refuse_old_batches(cotangents)
        return None, *(rule(*tensors) if level is None else evaluate_rule_on(level, rule, tensors))

    @classmethod
    def _evaluate_vjp_rule(cls, static: Any, count: int, of_outputs: int, needed: tuple, *tensors: Tensor) -> tuple:
        cotangents, inputs, outputs = tensors[:of_outputs], tensors[of_outputs:][:count], tensors[of_outputs + count :]
        return cls.vjp_rule(static, inputs, outputs, cotangents, needed)

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
