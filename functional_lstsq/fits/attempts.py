"""The minimisation behind `Minimum`: one attempt, and another where that found no strict minimum.

Steps are damped in the scale of More first, that of each column of J, so that units have no effect. Far from a minimum
unknowns whose columns are small may be sent to where nothing depends on them any more, and no minimum is. So the second
attempt is made in the scale of Levenberg, which is the same for all unknowns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ITERATIONS
from ..linear.factor_cache import no_token
from ..result import CONVERGED, ITERATION_LIMIT
from .levenberg_marquardt import Descent
from .losses import Square
from .objective import Leaves, Objective, linear_unknowns
from .report import FitReport, check_fit


def minimise(objective: Objective, start: Tensor, leaves: Leaves) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x (P, n), report (P, fields), blur, token) of the minima that are found from the start, on plain tensors.

    blur (P, n) is a sample of what rounding errors may have made of x.
    """
    with objective.rows.steady():
        return _minimised(objective, start, leaves)


def _minimised(objective: Objective, start: Tensor, leaves: Leaves) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first = Descent(objective, start, leaves)
    x, report, blur, token = first.run()
    which = ((report.status != CONVERGED) & ~first.broken).nonzero()[:, 0]
    if objective.again and len(which):
        spent, some = (report.iterations[which], report.evaluations[which]), tuple(leaf[which] for leaf in leaves)
        y, told, of_y, _ = Descent(objective, start[which], some, spent=spent, even=True).run()
        found = told.status == CONVERGED
        for name, field in report._asdict().items():
            counted = name in ("iterations", "evaluations")
            field[which] = torch.where(found | counted, getattr(told, name), field[which])
        for whole, part in ((x, y), (blur, of_y)):
            whole[which] = torch.where(found[:, None], part, whole[which])
        token = no_token() if bool(found.any()) else token
    if objective.on_failure == "raise":
        check_fit(
            report, objective.name, objective.point, objective.pattern.shape[1], objective.accept,
            _advice(objective, report, x, leaves),
            undefined=objective.undefined, least_norm=objective.settings.minimum_norm,
        )  # fmt: skip
    objective.rows.agree(x, report.packed())
    return x, report.packed(), blur, token


def _advice(objective: Objective, report: FitReport, x: Tensor, leaves: Leaves) -> list[str]:
    """What may be done about the first of the problems that came to the limit of iterations."""
    late = (report.status == ITERATION_LIMIT).nonzero()[:1, 0]
    if objective.linear or not len(late):
        return []
    linear: list[int] = []
    if objective.name == "gauss_newton" and type(objective.loss) is Square:
        linear = linear_unknowns(objective, x[late][0], tuple(leaf[late][0] for leaf in leaves))
    if not 0 < len(linear) < objective.pattern.shape[1]:
        return [ITERATIONS]
    return [ITERATIONS, f"variable_projection, since the residual is linear in {objective.point}[{linear}]"]
