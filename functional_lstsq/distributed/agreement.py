"""A solve that all ranks make together, on plain tensors: agreed on before it, and held against each other after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..linear.factor_cache import Holder, is_kept
from ..linear.low_parts import LOW
from .ranks import digest

_GONE = 0  # a token that no factors have


def solve_together(
    static: Any,
    own: Mapping[str, tuple[Tensor, ...]],
    damp: Tensor | None,
    columns: Mapping[str, Tensor | None],
    known: Tensor | None,
    token: Tensor | None,
    asked: tuple[Tensor | None, tuple[Tensor, ...]],
    solve: Callable[..., tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """(r, s, x, report, token), or one error on all ranks.

    Args:
        static: has `ranks`, `settings`, `n` and `on_failure`.
        own: by their names what may hold no NaN and is a rank's own.
        columns: b, e and c.
        known: x0, or what is of rows too.
        asked: (indices, values) by which factors are found.
        solve: takes b, e, c and a token.
    """
    ranks, wanted, forward = static.ranks, static.settings, token is None or is_kept(token)
    lenient = not forward and static.on_failure != "raise"
    device = next(t for t in columns.values() if t is not None).device

    def check() -> tuple[None, Mapping[str, object]]:
        of_columns = {} if lenient else {name: (t,) for name, t in columns.items() if t is not None}
        for name, tensors in (dict(own) | of_columns).items():
            # Infinite weights make constraints, of rows whose entries are known.
            sound = (~t.isnan() if name == "weights" else t.isfinite() for t in tensors)
            if not all(bool(flags.all()) for flags in sound):
                what = f"{name} of the augmented system" if forward else "what came in for a derivative"
                raise ValueError(f"{what} holds NaN or infinity")
        for name, t in (("weights", dict(own).get("weights", (None,))[0]), ("damp", damp)):
            if t is not None and bool((t < 0).any()):
                raise ValueError(f"{name} must not be negative, got {float(t.min()):g}")
        given = {name: None if t is None else (len(t), t.shape[2]) for name, t in columns.items()}
        start = known if known is not None and known.shape[1] == static.n else None
        alike = {"x0": start, "damp": damp, "the cotangent of x, which is shared, or the tangent of damp": columns["c"]}
        facts = {"what is solved for": (given, wanted), "torch.get_num_threads()": torch.get_num_threads()}
        return None, facts | {name: digest(t) for name, t in alike.items()}

    ranks.checked(check, device)
    b, e, c = columns["b"], columns["e"], columns["c"]
    unknown = None
    if lenient:  # of a derivative, what failed is NaN there
        finite = [t.isfinite().all(1) for t in columns.values() if t is not None]
        unknown = ~ranks.everywhere(torch.stack(finite).all(0))
        b, e, c = (None if t is None else torch.where(unknown[:, None], 0.0, t) for t in (b, e, c))
    if token is not None:
        # Another rank's values may have been changed in place since, and it makes factors anew.
        serves = Holder.of(token).serves(wanted, *asked, damp)
        serves = serves or (forward and not Holder.of(token).is_filled)
        if not bool(ranks.everywhere(torch.tensor(serves, device=device))):
            token = None if forward else torch.full((1,), _GONE, dtype=torch.int64, device="cpu")
    r, s, x, report, made = solve(b, e, c, token)
    ranks.checked(lambda: (None, {"the solution": digest(x), "its report": digest(report)}), device)
    if unknown is not None and static.on_failure != LOW:
        r, s, x = (torch.where(unknown[:, None], torch.nan, t) for t in (r, s, x))
    return r, s, x, report, made
