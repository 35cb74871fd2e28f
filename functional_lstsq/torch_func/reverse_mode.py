"""Reverse mode of torch.func, one level of it: a node for a primitive, and a node for its rule.

What torch does with an autograd function makes a class at each call, takes every argument for a tree of containers, and
records each operation of a rule on the level of the gradient: twice what a gradient of 60 x 20 takes without
torch.func. Here an argument is a tensor or it is none, and a rule is evaluated one level down, where all that is
outside of the gradient sees it. A second derivative on the level itself, as of a torch.autograd.grad within it,
evaluates the rule again, within a level of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, _unwrap_for_grad, _wrap_for_grad, peek_interpreter_stack, unwrap_if_dead
from torch._functorch.pyfunctorch import GradInterpreter
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction


def gradient_level() -> GradInterpreter | None:
    """The innermost transformation that is under way, if it is reverse mode."""
    level = peek_interpreter_stack()
    return GradInterpreter(level) if level is not None and level.key() == TransformType.Grad else None


def node_of(primitive: Any) -> type:
    """The class of a primitive's nodes on a level."""
    return _node(
        primitive.__name__,
        forward=partial(_below, primitive.apply),
        setup_context=primitive.setup_context,
        backward=primitive.backward,
        jvp=primitive.jvp,
    )


def apply_on(level: GradInterpreter, node: Any, args: tuple) -> Any:
    """What the primitive of `node` makes of `args`, recorded on the level."""
    # Where it has no tensor of this level, an argument that an outer level differentiates would be taken for one.
    lift = level._cptr.lift
    with enable_single_level_autograd_function():
        return node.apply(*[lift(_alive(t)) if isinstance(t, Tensor) else t for t in args])


def evaluate_rule_on(level: GradInterpreter, rule: Callable, tensors: tuple) -> tuple:
    """rule(*tensors), a tensor or None each, evaluated below the level and recorded on it."""
    if forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled():
        return rule(*tensors)  # whose operations carry tangents, of which the level itself may have some
    if torch.is_grad_enabled():
        return apply_on(level, _Rule, (rule, *tensors))
    return _below(rule, *tensors)


def _alive(tensor: Tensor) -> Tensor:
    """The tensor without wrappers of levels that have ended, which saved tensors have where vjp gave a pull back."""
    while (inner := unwrap_if_dead(tensor)) is not tensor:
        tensor = inner
    return tensor


def _below(function: Callable, *args: Any) -> Any:
    """function(*args) one level down, with the results on this one."""
    level = gradient_level()
    assert level is not None
    number = level.level()
    down = [_unwrap_for_grad(_alive(t), number) if isinstance(t, Tensor) else t for t in args]
    # Autograd has both modes off within a node, for this level; for others they are as they were.
    with torch.enable_grad(), _set_fwd_grad_enabled(True), level.lower():
        found = function(*down)
    if isinstance(found, Tensor):
        return _wrap_for_grad(found, number)
    return tuple([_wrap_for_grad(t, number) if isinstance(t, Tensor) else t for t in found])


def _node(name: str, **rules: Callable) -> type:
    return type(f"{name}OnLevel", (_SingleLevelFunction,), {of: staticmethod(rule) for of, rule in rules.items()})


def _keep(ctx: Any, inputs: tuple, _output: tuple) -> None:
    ctx.rule, *tensors = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _differentiate_again(ctx: Any, *cotangents: Tensor | None) -> tuple:
    """The gradients of a rule's results, by evaluating it within a level of its own."""
    tensors, rule = [None if t is None else _alive(t) for t in ctx.saved_tensors], ctx.rule
    which = [i for i, wanted in enumerate(ctx.needs_input_grad[1:]) if wanted]
    results = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]

    def moved(*chosen: Tensor) -> tuple[Tensor, ...]:
        every = list(tensors)
        for i, tensor in zip(which, chosen, strict=True):
            every[i] = tensor
        found = rule(*every)
        return tuple([found[i] for i in results])

    bars = dict.fromkeys(range(len(tensors)))
    if which and results:
        pull: Any = torch.func.vjp(moved, *[tensors[i] for i in which])[1]
        bars |= dict(zip(which, pull(tuple([cotangents[i] for i in results])), strict=True))
    return None, *bars.values()


_Rule: Any = _node("Rule", forward=_below, setup_context=_keep, backward=_differentiate_again)
