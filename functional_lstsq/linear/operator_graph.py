"""A LinearOperator in a graph of torch.compile: one call, for the functions in it are traced by torch alone.

Dynamo keeps what `_note` gives, a number, for as long as the functions and the options are those that it has seen; the
graph calls `_solved` with it and with the tensors. AOTAutograd then records the operations in it: those of `matvec` for
derivatives, while the solve itself calls `matvec`. Nobody guards what that takes from elsewhere than its arguments. So
one product is recorded too, and held against what `matvec` gives when the graph runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from ..result import Solution, SolveInfo
from ..sparse.jacobian_operator import JacobianOperator
from ..sparse.operator import LinearOperator
from ..sparse.operator_algebra import Pulled
from ..torch_func.operations import define
from ..torch_func.primitive import Constant
from ..torch_func.tracing import constant, in_graph, made, prepare_compiler, told
from .arguments import Problem, pose
from .matrix_free import static_of
from .operator_static import OperatorStatic, operator_of
from .posed import finished, run

_SLACK = 1e4  # roundings by which products may differ: a compiler orders sums anew
_noted: list[tuple] = []  # which lives as long as the process, as do graphs


@constant
def _note(*given: Any) -> int:
    """The number of an operator's functions with the options of a solve; functions that are equal are not the same."""
    for function in given[:2]:
        _require_guarded(function)
    for number, other in enumerate(_noted):
        if all(map(_is_same, given, other)):
            return number
    _noted.append(given)
    return len(_noted) - 1


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return one is other or (type(one) is type(other) and isinstance(one, (str, float, int)) and one == other)


def _require_guarded(function: Any) -> None:
    """Refuse what Dynamo takes for the same when it is another one: of a function it looks at the code alone."""
    if isinstance(function, FunctionType):
        if function.__closure__ or function.__defaults__ or function.__kwdefaults__:
            raise TypeError(
                "torch.compile(fullgraph=True) needs a matvec without a closure or defaults, got "
                f"{function.__qualname__}: hand over in params what it needs, or make an object with __call__ of it"
            )
    elif isinstance(function, partial):
        for part in (function.func, *function.args, *function.keywords.values()):
            _require_guarded(part)
    elif isinstance(function, tuple):  # an object that is made inside of what is compiled
        for part in function:
            _require_guarded(part)


def solve_in_graph(
    A: LinearOperator, b: Any, damp: Any, weights: Any, robust: Any, solver: Any, rank_deficient: Any, refine: Any,
    x0: Any, rank_tolerance: Any, *, throw: bool,
) -> Solution:  # fmt: skip
    """`solve`, while Dynamo traces."""
    prepare_compiler()
    if isinstance(A.matvec, MethodType) or isinstance(A.rmatvec, MethodType):
        raise TypeError("torch.compile cannot take a method for a matvec or rmatvec: make it a function of params")
    if isinstance(A, JacobianOperator) or isinstance(A.matvec, Pulled):
        raise TypeError(
            "torch.compile cannot take a JacobianOperator, nor an adjoint without rmatvec, whose products are "
            "derivatives; compile what makes its params"
        )
    _require_tensors(A.params)
    functions = told(A.matvec), None if A.rmatvec is None else told(A.rmatvec)
    number = _note(*functions, A.given, told(solver), rank_deficient, refine, rank_tolerance, throw)
    if isinstance(damp, (int, float)) and not isinstance(damp, bool) and isinstance(b, Tensor):
        damp = torch.zeros((), dtype=torch.float64, device=b.device) + damp  # a number would be compiled anew
    x, residual, *numbers = _solved(number, A.in_size, A.params, b, damp, weights, x0)
    return Solution(x, residual, SolveInfo(*numbers))


def _require_tensors(params: Any) -> None:
    """Refuse what Dynamo hands over to no function."""
    if isinstance(params, (list, tuple, dict)):
        for part in params.values() if isinstance(params, dict) else params:
            _require_tensors(part)
    elif not isinstance(params, Tensor):
        raise TypeError(
            "torch.compile takes params of tensors in dicts, lists and tuples, of a LinearOperator, got "
            f"{type(params).__name__} among them"
        )


@in_graph
def _solved(number: int, size: int, params: Any, b: Any, damp: Any, weights: Any, x0: Any) -> tuple[Tensor, ...]:
    matvec, rmatvec, dtype, solver, rank_deficient, refine, rank_tolerance, throw = _noted[number]
    A = LinearOperator(made(matvec), params, int(size), dtype, rmatvec=made(rmatvec))
    given = A, b, damp, weights, None, made(solver), rank_deficient, refine, x0
    try:
        problem = pose(*given, rank_tolerance=rank_tolerance, throw=throw)
        problem = problem._replace(b=problem.b + _held_against_the_record(problem))
        x, residual, info = finished(problem, *run(problem, "raise" if throw else "return"), throw=throw)
    except (RuntimeError, AssertionError) as error:  # of NumPy, of a tensor that is in no graph, of torch.func within
        raise TypeError(
            "torch.compile needs a matvec that is made of torch's operations on params and x alone, without torch.func "
            f"in it, got {error!r}"
        ) from error
    return x, residual, *info


def _held_against_the_record(problem: Problem) -> Tensor:
    """Zero, and an error when the graph runs where products are others then."""
    assert isinstance(problem.A, LinearOperator)
    static, leaves = static_of(problem.A, *problem.shape, problem.settings, "raise")
    every = [leaf[None].detach() for leaf in leaves]
    image = static.product(every, _probe(static, every, problem.b), adjoint=False)
    return _Same.apply(static, image.detach(), *every)[0][0, 0, 0]


def _probe(static: OperatorStatic, leaves: Sequence[Tensor], like: Tensor) -> Tensor:
    # Not `noise`, whose arithmetic on integers is none that Inductor compiles.
    one = torch.cos(1 + 1.7 * torch.arange(static.n, dtype=torch.float64, device=like.device)).to(static.dtype)
    return one[None, :, None].expand(len(leaves[0]) if leaves else 1, -1, -1)


class _Same(Constant):
    """For (image (P, m, 1), *leaves (P, ...)) a zero (P, 1, 1)."""

    constants = (0,)

    @classmethod
    def forward(cls, static: OperatorStatic, image: Tensor, *leaves: Tensor) -> tuple[Tensor]:
        return (_same(image, list(leaves), static.text),)


def _same_kernel(image: Tensor, leaves: list[Tensor], products: str) -> Tensor:
    static = operator_of(products)
    now = static.plainly(leaves, _probe(static, leaves, image), adjoint=False)
    apart = torch.linalg.vector_norm(now - image) > _SLACK * static.unit * torch.linalg.vector_norm(image)
    if bool(apart):  # not where these are no numbers, which the solve refuses
        raise ValueError(
            "matvec gives other numbers than when torch.compile made the graph: it must depend on params and x alone"
        )
    return image.new_zeros((len(image), 1, 1), dtype=torch.float64)


_same = define(
    "same_products(Tensor image, Tensor[] leaves, str products) -> Tensor",
    _same_kernel,
    lambda image, leaves, products: image.new_empty((len(image), 1, 1), dtype=torch.float64),
)
