"""What is compared: cases, and the contestants that each is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import fits
import numpy as np
import problems
import scipy.sparse
import scipy.sparse.linalg

Arrays = dict[str, np.ndarray]
_SPARSE = ("torchsparsegradutils", "matfree", "lineax", "torch-sla")


@dataclass(frozen=True)
class Own:
    """A further work of our own to hold a case against."""

    label: str
    work: str
    problem: Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Case:
    """One problem, and who solves it.

    Args:
        work: what is timed, in the words of the contestants' modules.
        peers: those that do the whole work; `forward` are those that find solutions only, held against ours without
            a gradient.
        times: calls that are timed as one, for short ones.
        large: only run when everything is asked for.
    """

    name: str
    make: Callable[[], Arrays]
    work: str = "gradient"
    peers: tuple[str, ...] = _SPARSE
    forward: tuple[str, ...] = ("scipy",)
    own: tuple[Own, ...] = ()
    times: int = 1
    large: bool = False


def arrays(problem: problems.Problem, dtype: type = np.float64) -> Arrays:
    """A problem as it is handed over, its numbers rounded to `dtype`."""
    numbers = {name: getattr(problem, name).astype(dtype) for name in ("values", "b", "cotangent")}
    return {"rows": problem.rows, "columns": problem.columns, "shape": np.array(problem.shape)} | numbers


def _random(m: int, n: int, dtype: type = np.float64) -> Callable[[], Arrays]:
    return lambda: arrays(problems.random(m, n), dtype)


def _batch(count: int, m: int, n: int) -> Arrays:
    problem, rng = arrays(problems.random(m, n)), np.random.default_rng(count)
    sizes = {"values": len(problem["rows"]), "b": m, "cotangent": n}
    return problem | {name: rng.standard_normal((count, size)) for name, size in sizes.items()}


def with_columns(problem: Arrays, count: int) -> Arrays:
    """The same A with `count` right-hand sides, and a cotangent for each."""
    rng = np.random.default_rng(count)
    return problem | {name: rng.standard_normal((len(problem[name]), count)) for name in ("b", "cotangent")}


def _first_column(problem: Arrays) -> Arrays:
    return problem | {name: np.ascontiguousarray(problem[name][:, 0]) for name in ("b", "cotangent")}


def _training() -> Arrays:
    """What is learned is a w, drawn from the normal distribution, from the solution it makes: the loss can reach 0."""
    problem = arrays(problems.random(20_000, 2_000))
    w = np.random.default_rng(50).standard_normal(len(problem["values"]))
    wanted = (problem["values"] * (1 + 0.01 * np.tanh(w)), (problem["rows"], problem["columns"]))
    A = scipy.sparse.coo_matrix(wanted, tuple(problem["shape"])).tocsr()
    target = scipy.sparse.linalg.lsmr(A, problem["b"], atol=1e-12, btol=1e-12)[0]
    return problem | {"target": target, "steps": np.array(50), "rate": np.array(1e5)}


_EFFECTS = "fixed effects, 1,000,000 observations"
_dense = "torch dense"  # where A has no more than 5e7 entries, zeros included
_one = Own("ours, one right-hand side", "gradient", _first_column)
_plain = Own("ours, one solve without gradient", "solve", lambda problem: problem)


def _many(count: int) -> Case:
    return Case(
        f"{count} right-hand sides, random 20,000 x 2,000",
        lambda: with_columns(arrays(problems.random(20_000, 2_000)), count),
        "columns",
        peers=("torchsparsegradutils", "matfree", _dense),
        forward=(),
        own=(_one,),
    )


CASES = (
    Case("random 20,000 x 2,000", _random(20_000, 2_000), peers=(*_SPARSE, _dense)),
    Case("random 200,000 x 20,000", _random(200_000, 20_000)),
    Case("random 20,000 x 2,000, float32", _random(20_000, 2_000, np.float32), peers=(*_SPARSE, _dense)),
    Case("random 200,000 x 20,000, float32", _random(200_000, 20_000, np.float32)),
    Case("grid 300 x 300", lambda: arrays(problems.grid(300, 2)), forward=("scipy", "spqr")),
    Case("grid 20 x 20 x 20", lambda: arrays(problems.grid(20, 3)), forward=("scipy", "spqr")),
    Case("grid 40 x 40 x 40", lambda: arrays(problems.grid(40, 3)), forward=("scipy", "spqr")),
    Case(
        "fixed effects, 1,000,000 observations", lambda: arrays(problems.fixed_effects()), forward=("scipy", "within")
    ),
    Case("tomography 64 x 64, 90 angles", lambda: arrays(problems.tomography(64, 90)), peers=(*_SPARSE, _dense)),
    Case("tomography 128 x 128, 180 angles", lambda: arrays(problems.tomography(128, 180)), large=True),
    Case("1,000 problems 60 x 20 by vmap", lambda: _batch(1000, 60, 20), peers=(_dense,), forward=()),
    _many(64),
    _many(512),
    Case("Jacobian, random 300 x 100", _random(300, 100), "jacobian", (_dense,), (), own=(_plain,)),
    Case("training, 50 steps, random 20,000 x 2,000", _training, "training", _SPARSE[:2], ()),
    Case("fit of 2 unknowns", lambda: fits.decays(1), "fit", ("scipy", "optimistix"), (), times=5),
    Case("64 fits of 2 unknowns by vmap", lambda: fits.decays(64), "fit", ("scipy", "optimistix"), ()),
    Case("bundle adjustment, 18,300 unknowns", fits.bundle, "fit", ("scipy",), ()),
    Case("tiny, random 60 x 20", _random(60, 20), peers=(_dense,), forward=(), times=20),
)
