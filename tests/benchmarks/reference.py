"""Solutions and gradients that owe nothing to the library, and the errors of answers against them.

Corrections come from conjugate gradients or a dense factor in double precision; residuals of the augmented system,
and the sums of corrections, are in np.longdouble (64 bits of mantissa on x86; no better than double where the platform
has nothing longer).
"""

from __future__ import annotations

from collections.abc import Callable

import fits
import numpy as np
import scipy.linalg
from scipy.sparse import csr_array

Arrays = dict[str, np.ndarray]
_DENSE = 6000  # columns that are factored densely where conjugate gradients are too slow
_BLOCK = 64  # right-hand sides at a time


class NoReference(Exception):
    """No solution was found that could be a reference."""


class Augmented:
    """Solves r + A x = b, A^T r = c."""

    def __init__(self, rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]):
        self.A = csr_array((values.astype(np.float64), (rows, columns)), shape)
        self.At = self.A.T.tocsr()
        self.exact, self.exact_t = self.A.astype(np.longdouble), self.At.astype(np.longdouble)
        self.scale = 1 / np.sqrt(np.asarray((self.A * self.A).sum(0)).ravel())
        self.factor: Callable[[np.ndarray], np.ndarray] | None = None

    def solve(self, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(r, x) in np.longdouble, for vectors, or for columns."""
        b, c = b.astype(np.longdouble), c.astype(np.longdouble)
        r, x = np.zeros_like(b), np.zeros_like(c)
        last = np.inf
        for _ in range(40):
            f, g = b - r - self.exact @ x, c - self.exact_t @ r
            f, g = f.astype(np.float64), g.astype(np.float64)
            dx = self._correction(self.At @ f - g)
            dr = f - self.A @ dx
            r, x = r + dr, x + dx
            size = max(_ratio(dx, x), _ratio(dr, r))
            if size < 1e-15 or size > last / 2:
                break
            last = size
        if not size < 1e-12:
            raise NoReference(f"corrections of a reference stay at {size:.0e}")
        return r, x

    def _correction(self, h: np.ndarray) -> np.ndarray:
        """About (A^T A)^-1 h."""
        n, scale = len(h), self.scale if h.ndim == 1 else self.scale[:, None]
        if self.factor is None and n > 500 and h.ndim == 1:
            found = self._conjugate_gradients(h * scale)
            if found is not None:
                return found * scale
        if self.factor is None:
            self.factor = self._factored()
        return self.factor(h * scale) * scale

    def _conjugate_gradients(self, h: np.ndarray, tolerance: float = 1e-10, limit: int = 3000) -> np.ndarray | None:
        """For the normal equations with columns scaled to norm 1."""
        y, g, p = np.zeros_like(h), h.copy(), h.copy()
        gamma = _square(g)
        end = tolerance**2 * gamma
        for _ in range(limit):
            if gamma <= end:
                return y
            q = self.A @ (self.scale * p)
            alpha = gamma / _square(q)
            y += alpha * p
            g -= alpha * (self.scale * (self.At @ q))
            gamma, before = _square(g), gamma
            p = g + (gamma / before) * p
        return None

    def _factored(self) -> Callable[[np.ndarray], np.ndarray]:
        n = len(self.scale)
        if n > _DENSE:
            raise NoReference(f"{n} columns are too many to factor densely")
        scaled = self.A * self.scale
        try:
            factor = scipy.linalg.cho_factor((scaled.T @ scaled).toarray())
        except np.linalg.LinAlgError:
            R = scipy.linalg.qr(scaled.toarray(), mode="r", overwrite_a=True)[0][:n]
            factor = (R, False)
        return lambda h: scipy.linalg.cho_solve(factor, h)


def _square(vector: np.ndarray) -> float:
    return float(np.square(vector).sum())  # at these sizes BLAS waits for its threads longer than it works


def _ratio(part: np.ndarray, whole: np.ndarray) -> float:
    sizes = np.sqrt((whole * whole).sum(0)), np.sqrt((part * part).sum(0).astype(np.longdouble))
    return float(np.max(np.where(sizes[0] > 0, sizes[1] / np.where(sizes[0] > 0, sizes[0], 1), sizes[1])))


def _augmented(problem: Arrays, values: np.ndarray | None = None) -> Augmented:
    values = problem["values"] if values is None else values
    return Augmented(problem["rows"], problem["columns"], values, tuple(problem["shape"]))


def _solution(system: Augmented, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return system.solve(b, np.zeros((system.A.shape[1], *b.shape[1:])))


def _gradient_of(
    system: Augmented, problem: Arrays, b: np.ndarray, cotangent: np.ndarray, known: tuple | None = None
) -> Arrays:
    m, rows, columns = problem["shape"][0], problem["rows"], problem["columns"]
    r, x = known or _solution(system, b)
    by_b, l_x = system.solve(np.zeros((m, *b.shape[1:])), cotangent)
    by_values = -(by_b[rows] * x[columns] + r[rows] * l_x[columns])
    return {"x": x, "by_values": by_values if b.ndim == 1 else by_values.sum(1), "by_b": by_b}


def gradient(problem: Arrays) -> Arrays:
    """x and the gradients of cotangent . x by values and b; of a batch on one pattern where b is 2-D."""
    if problem["b"].ndim == 1:
        return _gradient_of(_augmented(problem), problem, problem["b"], problem["cotangent"])
    batch = zip(problem["values"], problem["b"], problem["cotangent"], strict=True)
    each = [_gradient_of(_augmented(problem, values), problem, b, cotangent) for values, b, cotangent in batch]
    return {name: np.stack([one[name] for one in each]) for name in each[0]}


def columns(problem: Arrays) -> Arrays:
    """The same of the sum over the columns of b, with one A."""
    system, b, cotangent = _augmented(problem), problem["b"], problem["cotangent"]
    starts = range(0, b.shape[1], _BLOCK)
    parts = [_gradient_of(system, problem, b[:, k : k + _BLOCK], cotangent[:, k : k + _BLOCK]) for k in starts]
    joined = {name: np.concatenate([part[name] for part in parts], 1) for name in ("x", "by_b")}
    return joined | {"by_values": sum(part["by_values"] for part in parts)}


def jacobian(problem: Arrays) -> Arrays:
    """x and its whole Jacobian by values."""
    system, (m, n), rows, places = _augmented(problem), problem["shape"], problem["rows"], problem["columns"]
    r, x = _solution(system, problem["b"])
    l_r, l_x = system.solve(np.zeros((m, n)), np.eye(n))
    return {"x": x, "by_values": -(l_r[rows] * x[places, None] + r[rows, None] * l_x[places]).T}


def training(problem: Arrays) -> Arrays:
    """Gradient descent on w, where A's values are values * (1 + 0.01 tanh(w)); and the losses on the way."""
    w, losses = np.zeros_like(problem["values"]), []
    for _ in range(int(problem["steps"])):
        system = _augmented(problem, problem["values"] * (1 + 0.01 * np.tanh(w)))
        known = _solution(system, problem["b"])
        misfit = known[1] - problem["target"]
        losses.append(_square(misfit))
        found = _gradient_of(system, problem, problem["b"], 2 * misfit, known)
        slope = found["by_values"] * problem["values"] * 0.01 / np.cosh(w) ** 2
        w = (w - float(problem["rate"]) * slope).astype(np.float64)
    return {"w": w, "losses": np.array(losses)}


WORKS = {"gradient": gradient, "columns": columns, "jacobian": jacobian, "training": training, "fit": fits.exact}


def error(answer: Arrays, reference: Arrays) -> float:
    """The largest relative error, in the 2-norm, among the arrays of an answer; NaN if one is not what is asked for."""
    errors = []
    for name, array in answer.items():
        exact = reference[name]
        if array.shape != exact.shape:
            return float("nan")
        exact = exact.ravel()
        off = array.ravel() - exact
        errors.append(float(np.sqrt(off @ off) / np.sqrt(exact @ exact)))
    return max(errors) if np.isfinite(errors).all() else float("nan")
