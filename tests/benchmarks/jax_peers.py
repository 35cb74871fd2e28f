"""matfree's LSMR and lineax's LSMR, in JAX on the CPU, compiled before they are timed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

jax.config.update("jax_platforms", "cpu")

Run = Callable[[], dict[str, Any]]
LIMIT = 1_000_000  # iterations: the tolerance decides, not they


def _arrays(problem: dict[str, np.ndarray]) -> tuple[jax.Array, tuple[int, int], jax.Array, jax.Array, jax.Array]:
    # With it on, neither library takes float32: some of their numbers would come out as float64.
    jax.config.update("jax_enable_x64", problem["values"].dtype == np.float64)
    indices = jnp.asarray(np.stack([problem["rows"], problem["columns"]], 1).astype(np.int32))
    m, n = (int(size) for size in problem["shape"])
    values, b, cotangent = (jnp.asarray(problem[name]) for name in ("values", "b", "cotangent"))
    return indices, (m, n), values, b, cotangent


def _matrix(values: jax.Array, indices: jax.Array, shape: tuple[int, int]) -> sparse.BCOO:
    # Products of BCOO and segment sums over sorted int32 indices are alike on a CPU: each won some
    # runs with 160,000 entries, BCOO those with 1,600,000.
    return sparse.BCOO((values, indices), shape=shape, indices_sorted=True, unique_indices=True)


def _tolerance(values: jax.Array) -> float:
    return 1e-9 if values.dtype == jnp.float64 else 1e-6  # below what rounding allows nothing would ever end


def _matfree(values: jax.Array, b: jax.Array, indices: jax.Array, shape: tuple[int, int]) -> jax.Array:
    from matfree import lstsq

    tolerance = _tolerance(values)
    # Full rank spares its derivative a solve.
    solve = lstsq.lsmr(atol=tolerance, btol=tolerance, maxiter=LIMIT, is_full_rank=True)
    return solve(lambda u, values: u @ _matrix(values, indices, shape), b, values)[0]


def _lineax(values: jax.Array, b: jax.Array, indices: jax.Array, shape: tuple[int, int]) -> jax.Array:
    import lineax

    tolerance = _tolerance(values)
    options = {"rtol": tolerance, "atol": tolerance, "max_steps": LIMIT}
    # Without LSMR, which is the faster one of the two: conjugate gradients on the normal equations.
    solver = lineax.LSMR(**options) if hasattr(lineax, "LSMR") else lineax.NormalCG(**options)
    inputs = jax.ShapeDtypeStruct((shape[1],), values.dtype)
    operator = lineax.FunctionLinearOperator(lambda x: _matrix(values, indices, shape) @ x, inputs)
    return lineax.linear_solve(operator, b, solver).value


def _compiled(function: Callable, *arguments: Any) -> Callable:
    # Large arrays are arguments: as constants in the function they would be folded for minutes.
    return jax.jit(function).lower(*arguments).compile()


def _gradient(solution: Callable) -> Callable[[dict[str, np.ndarray]], Run]:
    def prepare(problem: dict[str, np.ndarray]) -> Run:
        """x and the gradients of cotangent . x; b may have columns, by vmap."""
        indices, shape, values, b, cotangent = _arrays(problem)

        def objective(values, b, indices, cotangent):
            def one(b):
                return solution(values, b, indices, shape)

            x = one(b) if b.ndim == 1 else jax.vmap(one, 1, 1)(b)
            return jnp.sum(cotangent * x), x

        work = _compiled(jax.value_and_grad(objective, (0, 1), has_aux=True), values, b, indices, cotangent)

        def run() -> dict[str, Any]:
            (_, x), (by_values, by_b) = jax.block_until_ready(work(values, b, indices, cotangent))
            return {"x": x, "by_values": by_values, "by_b": by_b}

        return run

    return prepare


def _training(solution: Callable) -> Callable[[dict[str, np.ndarray]], Run]:
    def prepare(problem: dict[str, np.ndarray]) -> Run:
        """Gradient descent on w, where A's values are values * (1 + 0.01 tanh(w)); a step is compiled."""
        indices, shape, values, b, _ = _arrays(problem)
        target, rate = jnp.asarray(problem["target"]), float(problem["rate"])

        def loss(w, indices, values, b, target):
            x = solution(values * (1 + 0.01 * jnp.tanh(w)), b, indices, shape)
            return jnp.sum((x - target) ** 2)

        def descend(w, *rest):
            return w - rate * jax.grad(loss)(w, *rest)

        rest = (indices, values, b, target)
        step = _compiled(descend, jnp.zeros_like(values), *rest)

        def run() -> dict[str, Any]:
            w = jnp.zeros_like(values)
            for _ in range(int(problem["steps"])):
                w = step(w, *rest)
            return {"w": jax.block_until_ready(w)}

        return run

    return prepare


def about(contestant: str) -> dict[str, Any]:
    """Versions."""
    importlib.import_module(contestant)
    return {"versions": {name: importlib.metadata.version(name) for name in (contestant, "jax", "jaxlib")}}


WORKS = {
    "matfree": {"gradient": _gradient(_matfree), "columns": _gradient(_matfree), "training": _training(_matfree)},
    "lineax": {"gradient": _gradient(_lineax)},
}
