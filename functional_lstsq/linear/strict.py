"""The primitive `Strict`: bounded solutions, refused where they are not known, as derivatives are where there are none.

An unknown that is at its bound and does not press against it, to the error of its multiplier, is called weak: whether
it is free changes with the last digit of the data, so x has a kink there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import NAN, SCALE, ConvergenceError
from ..torch_func.operations import define
from ..torch_func.primitive import Primitive, extent, join_matrices, split_matrices


# Not a tuple, which torch.func would take apart at every call.
@dataclass(frozen=True)
class Judged:
    on_failure: str
    derivative: bool = False


def _strict_kernel(
    r: Tensor, x: Tensor, weak: Tensor, refused: Tensor, unknown: Tensor, on_failure: str, derivative: bool
):
    if not derivative:
        require_known(unknown, weak, on_failure)
    if not derivative or not bool(refused.any()):
        return r.clone(), x.clone()
    return without_refused(r, x, weak, refused, (r != 0).any(2).any(1), on_failure)


def require_known(unknown: Tensor, weak: Tensor, on_failure: str) -> None:
    """Refuse solutions whose estimated error is above what is accepted, for what follows unknowns that are `weak`."""
    if on_failure != "raise" or not bool(unknown.any()):
        return
    which, where = _places(weak, unknown)
    raise ConvergenceError(
        f"x is not known{where}: unknowns at their bounds ({which}) do not press against them, and others, whose "
        "columns of A are far smaller, follow a change of their last digit by more than is accepted",
        SCALE,
        "other bounds",
    )


def _places(weak: Tensor, which: Tensor) -> tuple[str, str]:
    """Some weak unknowns of the first problem that is marked, and which problem that is."""
    p = int(which.nonzero()[0, 0])
    places = weak[p].nonzero()[:, 0].tolist()
    named = ", ".join(str(j) for j in places[:5]) + (", ..." if len(places) > 5 else "")
    return named, f" ({int((which != 0).sum())} of {len(which)} problems; the first: {p})" if len(which) > 1 else ""


def without_refused(
    r: Tensor, x: Tensor, weak: Tensor, refused: Tensor, moved: Tensor, on_failure: str
) -> tuple[Tensor, Tensor]:
    """A derivative (r, x), where none is refused; `moved` (P,): whether r of any place is not zero."""
    r, x = r.clone(), x.clone()
    gone = (refused != 0) & (moved | (x != 0).any(2).any(1))
    if on_failure != "raise":
        r, x = (torch.where(gone[:, None, None], torch.nan, t) for t in (r, x))
    elif bool(gone.any()):
        which, where = _places(weak, gone)
        raise ConvergenceError(
            f"x has no derivative{where}: unknowns at their bounds ({which}) do not press against them, to the errors "
            "of their multipliers",
            "other bounds",
            NAN,
        )
    return r, x


_strict = define(
    "strict(Tensor r, Tensor x, Tensor weak, Tensor refused, Tensor unknown, str on_failure, bool derivative) "
    "-> (Tensor, Tensor)",
    _strict_kernel,
    lambda r, x, *_: (torch.empty_like(r), torch.empty_like(x)),
)


class Strict(Primitive):
    """(r, x) as they are, whose derivatives are refused, or NaN, in the problems that are marked."""

    @classmethod
    def forward(cls, static: Judged, r, x, *told):
        return _strict(r.contiguous(), x.contiguous(), *told, static.on_failure, static.derivative)

    @classmethod
    def _of(cls, static: Judged, inputs, derivatives):
        given = (torch.zeros_like(t) if d is None else d for t, d in zip(inputs[:2], derivatives, strict=True))
        return cls.apply(replace(static, derivative=True), *given, *inputs[2:])

    @classmethod
    def vjp_rule(cls, static, inputs, outputs, cotangents, needed):
        return *cls._of(static, inputs, cotangents[:2]), None, None, None

    @classmethod
    def jvp_rule(cls, static, inputs, outputs, tangents):
        return cls._of(static, inputs, tangents[:2])

    @classmethod
    def vmap(cls, info, in_dims, static, *tensors):
        size = info.batch_size
        joined = [join_matrices(t, dim, size) for t, dim in zip(tensors, in_dims[1:], strict=True)]
        copies = extent(tensors, in_dims[1:], 0)
        return tuple(split_matrices(t, size, copies) for t in cls.apply(static, *joined)), (0, 0)
