"""Least squares by dense linear algebra: to fifty digits, and by a Householder QR in double precision."""

import mpmath
import numpy as np


def exact(A, b, w):
    """x, and the gradients of w . x by A and by b, to fifty digits; rounded to double."""
    with mpmath.workdps(50):
        A, b, w = (mpmath.matrix(t.double().tolist()) for t in (A, b, w))
        gram = A.T * A
        x, back = mpmath.lu_solve(gram, A.T * b), mpmath.lu_solve(gram, w)
        by_b, r = A * back, b - A * x
        by_A = -by_b * x.T + r * back.T
        return [np.array(t.tolist(), dtype=float) for t in (x, by_A, by_b)]


def householder(A, b, w):
    """The same by a dense QR in A's own precision."""
    Q, R = np.linalg.qr(A)
    x = np.linalg.solve(R, Q.T @ b)
    half = np.linalg.solve(R.T, w)
    by_b, back = Q @ half, np.linalg.solve(R, half)
    return x[:, None], -np.outer(by_b, x) + np.outer(b - A @ x, back), by_b[:, None]


def distance(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)
