"""What torch knows of a tensor and of who is watching: wrappers of torch.func, tracers, and the compiler."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import (
    _FrameAction,
    _FrameExecStrategy,
    get_eval_frame_callback,
    set_code_exec_strategy,
    set_eval_frame,
)
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

Given = ParamSpec("Given")
Result = TypeVar("Result")

_MADE = "made inside of a compiled function"

# A context in which torch.func does not see what is done, so that it wraps nothing.
unseen_by_transforms = torch._C._DisableFuncTorch
# The same for tracers such as that of torch.export, which would give tensors without numbers.
unseen_by_tracers = _disable_current_modes
# Whether the outermost wrapper of a tensor is that of a vmap.
is_mapped = is_batchedtensor


def without_hooks() -> AbstractContextManager:
    """Within it, no hooks of a checkpoint around count what autograd saves; with torch.func about there are none."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


def constant(function: Callable) -> Callable:
    """Mark `function` for Dynamo to run while it traces, and to keep the result.

    What `torch.compiler.assume_constant_result` does, without the second that importing Dynamo takes.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def _is_whole(thing: Any) -> bool:
    """Whether an object has its attributes: one that is made inside of a compiled function gets them when it runs."""
    own = getattr(thing, "__dict__", None)
    if isinstance(thing, type) or own or own is None or type(thing).__init__ is object.__init__:
        return True
    if "__dataclass_params__" in vars(type(thing)):  # not inherited, beside an __init__ of its own
        return not fields(thing)
    raise TypeError(f"torch.compile cannot take a {type(thing).__name__} that is made inside of it: make it outside")


@constant
def _options(thing: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(thing) if field.init)


@constant
def _refuse(option: Any, name: str, kind: type) -> int:
    raise TypeError(
        f"torch.compile cannot take a {kind.__name__} that is made inside of it with {name} = {option!r}: make it "
        "outside"
    )


def _option(thing: Any, name: str) -> Any:
    option = getattr(thing, name)
    if is_dataclass(option) and _is_whole(option) and _options(option):  # Dynamo takes no object within a tuple
        _refuse(option, name, type(thing))
    return told(option)


def told(thing: Any) -> Any:
    """`thing`, such as a solver, for a function marked `constant`, which gets it back by `made`; under Dynamo alone.

    An object that is made inside of a compiled function reaches a constant function without its attributes, so that a
    dataclass would show its defaults in place of its options. So these are traced, and handed over by themselves.
    """
    if _is_whole(thing):
        return thing
    names = _options(thing)
    return (_MADE, type(thing), names, tuple([_option(thing, name) for name in names]))


def made(thing: Any) -> Any:
    """What `told` has taken apart, and anything else as it is."""
    if not (isinstance(thing, tuple) and thing and thing[0] == _MADE):
        return thing
    _, kind, names, values = thing
    return kind(**dict(zip(names, map(made, values), strict=True)))


@cache
def load_forward_mode() -> None:
    """Have torch load what its first forward derivative loads, without the deprecation that it warns itself of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad._maybe_load_decompositions()


def is_watched() -> bool:
    """Whether Dynamo looks at each function that is called: outside of a graph, which it gave up, within what compiles.

    Not for Dynamo itself to trace.
    """
    return get_eval_frame_callback() not in (None, False)


def beside_graph(function: Callable[Given, Result], reason: str | None = None) -> Callable[Given, Result]:
    """`function`, run by Python alone where Dynamo is on: a graph ends before it, and a whole graph is refused.

    What `torch.compiler.disable` does, without the second that importing Dynamo takes.
    """

    @wraps(function)
    def plainly(*args: Given.args, **options: Given.kwargs) -> Result:
        before = set_eval_frame(None)
        try:
            return function(*args, **options)
        finally:
            set_eval_frame(before)

    # The frame itself, where it is not called by what is traced.
    set_code_exec_strategy(
        plainly.__code__,  # type: ignore[attr-defined]
        _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT),
    )
    plainly._torchdynamo_disable = True  # type: ignore[attr-defined]
    plainly._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
    return plainly


def fit_beside_graph(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """`beside_graph` for a function such as gauss_newton."""
    return beside_graph(function, f"torch.compile cannot take {function.__name__}; compile what makes its arguments")


def sparse_beside_graph(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """`beside_graph` for a call whose argument A is a torch sparse tensor, which Dynamo cannot take.

    It would end the graph within the function, and a frame that goes on within torch.func is none that it can compile.
    """
    beside = beside_graph(
        function,
        "torch.compile cannot take a torch sparse tensor; SparseMatrix.from_torch, called outside, makes what it takes",
    )

    @wraps(function)
    def either(*args: Given.args, **options: Given.kwargs) -> Result:
        A = args[0] if args else options.get("A")
        if isinstance(A, Tensor) and (torch.compiler.is_dynamo_compiling() or is_watched()):
            return beside(*args, **options)
        return function(*args, **options)

    return either


_in_graph: list[Callable] = []


def in_graph(function: Callable) -> Callable:
    """Have Dynamo put `function` into the graph as it is: inlining a Primitive drops its rules (pytorch#192985)."""
    _in_graph.append(function)
    return function


@constant
def prepare_compiler() -> int:
    """Tell Dynamo of the functions marked `in_graph`; to be called while it traces, before it meets one of them."""
    while _in_graph:
        torch.compiler.allow_in_graph(_in_graph.pop())
    return 0


@constant
def is_whole_graph() -> bool:
    """Whether Dynamo, which traces this call, may not give a graph up: what it cannot take is an error then."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    tracer = InstructionTranslator.current_tx()
    return bool(tracer.one_graph or tracer.error_on_graph_break)


def is_recorded() -> bool:
    """Whether a tracer such as that of make_fx records what is done."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def refuse_recording(what: str) -> None:
    """Refuse `what`, whose steps depend on numbers, where they would be recorded before there are any."""
    if torch.compiler.is_compiling():
        raise TypeError(f"torch.compile cannot take {what}; compile what makes the arguments")
    if is_recorded():
        raise TypeError(
            f"make_fx and torch.func.linearize cannot record {what}, whose steps depend on numbers; torch.func.jvp and "
            "vjp give its derivatives"
        )


def concrete(tensor: Tensor) -> Tensor:
    """The plain tensor under every wrapper of torch.func."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def is_traced(tensor: Tensor) -> bool:
    """Whether `tensor` stands for values to come: a compiler or a tracer is recording."""
    if torch.compiler.is_compiling() or type(concrete(tensor)) not in (Tensor, torch.nn.Parameter):
        return True
    return is_recorded()


def dtensor_kind() -> Any:
    """The class of distributed tensors, if anybody has imported it (that takes a while); else of nothing."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())


def is_dtensor(t: Any) -> bool:
    """Whether it is one, or a transformation has one in it."""
    kind = dtensor_kind()
    if isinstance(t, kind) or torch.compiler.is_compiling():
        return isinstance(t, kind)
    return isinstance(t, Tensor) and isinstance(concrete(t), kind)
