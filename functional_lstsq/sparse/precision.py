"""The primitive `convert`: into double precision and back.

    Y = convert(X)          X_bar = convert(Y_bar), into the precision of X          dY = convert(dX)

A solution is judged with its solve. A derivative that goes back into single precision is judged here: what leaves the
range is an error, no infinity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import DOUBLE, SCALE, ConvergenceError
from ..torch_func.operations import define, differentiate
from ..torch_func.primitive import Primitive
from ..torch_func.tracing import in_graph


# Not a tuple, which torch.func would take apart at every call.
@dataclass(frozen=True)
class _Static:
    dtype: torch.dtype
    what: str  # the derivative is, in a message
    on_failure: str  # "raise" or "nan", of a derivative that leaves the range
    judged: bool = False  # what is converted is a derivative itself


def _convert_kernel(X: Tensor, dtype: torch.dtype, what: str, on_failure: str, judged: bool) -> Tensor:
    Y = X.to(dtype, copy=True)
    if not judged or torch.finfo(dtype).max >= torch.finfo(X.dtype).max:
        return Y
    lost = Y.isinf() & X.isfinite()
    if not bool(lost.any()):
        return Y
    if on_failure != "raise":
        return torch.where(lost, torch.nan, Y)
    raise ConvergenceError(
        f"{what} leaves the range of {dtype}: its largest entry is about {float(X[lost].abs().max()):.1e}",
        SCALE,
        DOUBLE,
    )


def _convert_fake(X: Tensor, dtype: torch.dtype, what: str, on_failure: str, judged: bool) -> Tensor:
    return X.new_empty(X.shape, dtype=dtype)


_convert = define(
    "convert(Tensor X, ScalarType dtype, str what, str on_failure, bool judged) -> Tensor",
    _convert_kernel,
    _convert_fake,
)


class _Convert(Primitive):
    @classmethod
    def forward(cls, static: _Static, X: Tensor) -> Tensor:
        return _convert(X.contiguous(), static.dtype, static.what, static.on_failure, static.judged)

    @classmethod
    def vjp_rule(cls, static, inputs, outputs, cotangents, needed):
        return (cls.apply(replace(static, dtype=inputs[0].dtype, judged=True), cotangents[0]),)

    @classmethod
    def jvp_rule(cls, static, inputs, outputs, tangents):
        return cls.apply(replace(static, judged=True), tangents[0])

    @classmethod
    def vmap(cls, info, in_dims, static, X):
        return cls.apply(static, X.movedim(in_dims[1], 0)), 0


differentiate(
    _convert, lambda X, dtype, what, on_failure, judged: _Convert.apply(_Static(dtype, what, on_failure, judged), X)
)


@in_graph
def _converted(X: Tensor, dtype: torch.dtype, what: str, on_failure: str) -> Tensor:
    return _Convert.apply(_Static(dtype, what, on_failure), X)


def convert(X: Tensor, dtype: torch.dtype, what: str, on_failure: str = "raise") -> Tensor:
    """X in another precision; itself where it has that already.

    Args:
        what: what a derivative is that goes through here into single precision, for a message.
        on_failure: "raise", or "nan" for NaN where such a derivative leaves the range.
    """
    if X.dtype == dtype:
        return X
    if not (X.is_floating_point() or X.is_complex()):
        return X.to(dtype)
    return _converted(X, dtype, what, on_failure)


def double(X: Tensor, what: str, on_failure: str = "raise") -> Tensor:
    """In double precision, if it holds real or complex numbers; as `convert`."""
    number = X.is_floating_point() or X.is_complex()
    return convert(X, torch.promote_types(X.dtype, torch.float64), what, on_failure) if number else X
