"""Nonlinear fits: made problems whose residual NumPy, torch and JAX compute alike, and SciPy's and optimistix's fits.

The data are without noise, so that the minimum is known: what they were made of.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Run = Callable[[], dict[str, Any]]
_PRIOR = 0.01  # weight of each unknown of a bundle adjustment, without which it could move as a whole


def decays(count: int) -> Arrays:
    """`count` problems of an amplitude and a rate each, 20 measurements."""
    rng, t = np.random.default_rng(count), np.linspace(0, 2, 20)
    x = np.stack([rng.uniform(2, 4, count), rng.uniform(0.3, 1.2, count)], 1)
    problem = {"t": t, "y": x[:, :1] * np.exp(-x[:, 1:] * t), "x": x, "start": np.ones((count, 2))}
    return problem if count > 1 else problem | {name: problem[name][0] for name in ("y", "x", "start")}


def decay(xp: Any, x: Any, t: Any, y: Any) -> Any:
    """The residual of one of them."""
    return x[0] * xp.exp(-x[1] * t) - y


def bundle(cameras: int = 50, points: int = 6000, views: int = 5) -> Arrays:
    """Cameras (a rotation vector and a shift) and points, each seen by some of the cameras, all unknown."""
    rng = np.random.default_rng(cameras)
    seen = np.argsort(rng.random((points, cameras)), 1)[:, :views]
    poses = np.concatenate([0.2 * rng.standard_normal((cameras, 3)), 0.5 * rng.standard_normal((cameras, 3))], 1)
    places = rng.uniform(-1, 1, (points, 3)) + np.array([0, 0, 6.0])
    x = np.concatenate([poses.ravel(), places.ravel()])
    problem = {"camera": seen.ravel(), "point": np.repeat(np.arange(points), views), "cameras": np.array(cameras)}
    problem |= {"x": x, "start": x + 0.02 * rng.standard_normal(len(x)), "prior": x, "pixels": np.zeros(0)}
    pixels = seen_at(np, x, problem["camera"], problem["point"], cameras)
    return problem | {"pixels": pixels}


def seen_at(xp: Any, x: Any, camera: Any, point: Any, cameras: int) -> Any:
    """Where each point is in the picture of each camera that sees it."""
    poses, places = x[: 6 * cameras].reshape(-1, 6)[camera], x[6 * cameras :].reshape(-1, 3)[point]
    w, p = poses[:, :3], places
    angle = xp.sqrt((w * w).sum(1) + 1e-30)[:, None]
    axis = w / angle
    across = xp.stack(
        [
            axis[:, 1] * p[:, 2] - axis[:, 2] * p[:, 1],
            axis[:, 2] * p[:, 0] - axis[:, 0] * p[:, 2],
            axis[:, 0] * p[:, 1] - axis[:, 1] * p[:, 0],
        ],
        1,
    )
    along = (axis * p).sum(1)[:, None]
    turned = p * xp.cos(angle) + across * xp.sin(angle) + axis * along * (1 - xp.cos(angle)) + poses[:, 3:]
    return (turned[:, :2] / turned[:, 2:]).reshape(-1)


def entries(problem: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the Jacobian of a bundle adjustment, prior included."""
    count, n = len(problem["camera"]), len(problem["x"])
    first, offset = 2 * np.arange(count), 6 * int(problem["cameras"])
    touched = np.concatenate(
        [6 * problem["camera"][:, None] + np.arange(6), offset + 3 * problem["point"][:, None] + np.arange(3)], 1
    )
    rows = np.concatenate([np.repeat(first, 9), np.repeat(first + 1, 9), 2 * count + np.arange(n)])
    return rows, np.concatenate([touched.ravel(), touched.ravel(), np.arange(n)])


def by_scipy(problem: Arrays) -> Run:
    """Each fit by itself, "lm" for decays, "trf" with the pattern of the Jacobian for a bundle adjustment."""
    from scipy.optimize import least_squares
    from scipy.sparse import coo_matrix

    if "t" in problem:
        pairs = list(zip(np.atleast_2d(problem["start"]), np.atleast_2d(problem["y"]), strict=True))
        tight = {"xtol": 1e-12, "ftol": 1e-12, "gtol": 1e-12}

        def each() -> dict[str, Any]:
            found = [
                least_squares(lambda x, y=y: decay(np, x, problem["t"], y), x, method="lm", **tight).x for x, y in pairs
            ]
            return {"x": np.array(found).reshape(problem["x"].shape)}

        return each
    rows, columns = entries(problem)
    pattern = coo_matrix((np.ones(len(rows)), (rows, columns)))

    def residual(x: np.ndarray) -> np.ndarray:
        found = seen_at(np, x, problem["camera"], problem["point"], int(problem["cameras"]))
        return np.concatenate([found - problem["pixels"], _PRIOR * (x - problem["prior"])])

    return lambda: {"x": least_squares(residual, problem["start"], jac_sparsity=pattern, x_scale="jac", ftol=1e-12).x}


def by_optimistix(problem: Arrays) -> Run:
    """Levenberg and Marquardt's, jitted, by jax.vmap where there are several."""
    import jax
    import jax.numpy as jnp
    import optimistix

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    solver, t = optimistix.LevenbergMarquardt(rtol=1e-10, atol=1e-10), jnp.asarray(problem["t"])

    def fit(start: Any, y: Any) -> Any:
        return optimistix.least_squares(lambda x, y: decay(jnp, x, t, y), solver, start, args=y).value

    fit = jax.jit(fit if problem["y"].ndim == 1 else jax.vmap(fit))
    start, y = jnp.asarray(problem["start"]), jnp.asarray(problem["y"])
    return lambda: {"x": jax.block_until_ready(fit(start, y))}


def by_ours(problem: Arrays, warm: bool = False) -> Run:
    """As users write it; warm, with the pattern of a bundle adjustment made beforehand."""
    import torch

    import functional_lstsq as fl

    given = {name: torch.from_numpy(np.array(array)) for name, array in problem.items()}
    start = given["start"]
    if "t" in problem:

        def fit(start: Any, y: Any) -> Any:
            return fl.gauss_newton(lambda x, y: decay(torch, x, given["t"], y), start, (y,)).x

        several = problem["y"].ndim > 1
        return lambda: {"x": torch.vmap(fit)(start, given["y"]) if several else fit(start, given["y"])}
    places = torch.from_numpy(np.stack(entries(problem)))
    shape = 2 * len(problem["camera"]) + len(start), len(start)
    kept, cameras = fl.SparsePattern(places, shape) if warm else None, int(problem["cameras"])

    def residual(x: Any, pixels: Any) -> Any:
        found = seen_at(torch, x, given["camera"], given["point"], cameras)
        return torch.cat([found - pixels, _PRIOR * (x - given["prior"])])

    def run() -> dict[str, Any]:
        pattern = kept or fl.SparsePattern(places, shape)
        return {"x": fl.gauss_newton(residual, start, (given["pixels"],), jacobian=pattern).x}

    return run


def exact(problem: Arrays) -> Arrays:
    """What the data were made of."""
    return {"x": problem["x"]}


def about(contestant: str) -> dict[str, Any]:
    """Versions."""
    __import__(contestant)
    return {"versions": {name: importlib.metadata.version(name) for name in (contestant, "jax")}}


WORKS = {"optimistix": {"fit": by_optimistix}}
