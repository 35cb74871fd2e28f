"""Least squares in exact rational arithmetic, for small problems of any scale and rank."""

import math
from fractions import Fraction

import torch

Matrix = list[list[Fraction]]


def rational(t) -> Matrix:
    """The numbers of a tensor (m,) or (m, k), complex ones as [[x, -y], [y, x]]."""
    t = t[:, None] if t.ndim == 1 else t
    if t.is_complex():
        t = torch.cat([torch.cat([t.real, -t.imag], 1), torch.cat([t.imag, t.real], 1)])
    return [[Fraction(v) for v in row] for row in t.double().tolist()]


def transpose(A: Matrix, columns: int) -> Matrix:
    return [[row[j] for row in A] for j in range(columns)]


def times(A: Matrix, B: Matrix, columns: int) -> Matrix:
    """A B for B of so many columns."""
    return [[sum((a * B[k][j] for k, a in enumerate(row)), Fraction(0)) for j in range(columns)] for row in A]


def echelon(A: Matrix, columns: int) -> tuple[Matrix, list[int]]:
    """The reduced row echelon form, without rows of zeros, and its pivot columns; pivots in `columns` columns only."""
    A, pivots = [row[:] for row in A], []
    for j in range(columns):
        top = len(pivots)
        at = next((i for i in range(top, len(A)) if A[i][j]), None)
        if at is None:
            continue
        A[top], A[at] = A[at], A[top]
        A[top] = [a / A[top][j] for a in A[top]]
        for i in range(len(A)):
            if i != top and A[i][j]:
                factor = A[i][j]
                A[i] = [a - factor * p for a, p in zip(A[i], A[top], strict=True)]
        pivots.append(j)
    return A[: len(pivots)], pivots


def solved(A: Matrix, B: Matrix) -> Matrix:
    """A^-1 B for a regular A."""
    n = len(A)
    rows, pivots = echelon([a + b for a, b in zip(A, B, strict=True)], n)
    assert len(pivots) == n, "singular"
    return [row[n:] for row in rows]


def least_squares(A, b, damp=None, weights=None) -> tuple[Matrix, int, int]:
    """(the x of least norm that minimises sum weights |b - A x|^2 + damp^2 |x|^2, rank of [W^(1/2) A; damp], n).

    A dense (m, n), b (m,) or (m, k), real or complex, damp a number, weights (m,). Complex x are two rows and two
    columns for one.
    """
    twice = 2 if A.is_complex() or b.is_complex() else 1
    if twice == 2:
        A, b = A.to(torch.complex128), b.to(torch.complex128)
    (m, n), k = A.shape, twice * (1 if b.ndim == 1 else b.shape[1])
    S, B = rational(A), rational(b)
    m, n = twice * m, twice * n
    w = [Fraction(1)] * m if weights is None else [Fraction(v) for v in weights.double().tolist()] * twice
    # Of weighted rows, those of weight zero drop out; sqrt is avoided by the normal equations of the rest.
    kept = [i for i in range(m) if w[i]]
    S, B, w = [S[i] for i in kept], [B[i] for i in kept], [w[i] for i in kept]
    d2 = Fraction(float(damp)) ** 2 if damp is not None else Fraction(0)
    adjoint = transpose([[wi * a for a in row] for wi, row in zip(w, S, strict=True)], n)
    right = times(adjoint, B, k)
    gram = times(adjoint, S, n)
    if d2:
        gram = [[g + (d2 if i == j else 0) for j, g in enumerate(row)] for i, row in enumerate(gram)]
        return solved(gram, right), n // twice, n // twice
    G, pivots = echelon(S, n)  # S = P G with the pivot columns P, so that x lies in the range of G^T
    if not pivots:
        return [[Fraction(0)] * k for _ in range(n)], 0, n // twice
    P = [[row[j] for j in pivots] for row in S]
    weighted = transpose([[wi * p for p in row] for wi, row in zip(w, P, strict=True)], len(pivots))
    y = solved(times(weighted, P, len(pivots)), times(weighted, B, k))  # G x = y
    Gt = transpose(G, n)
    x = times(Gt, solved(times(G, Gt, len(pivots)), y), k)
    return x, len(pivots) // twice, n // twice


def size(A: Matrix) -> float:
    """log2 of the Frobenius norm, -inf of zeros."""
    total = sum((a * a for row in A for a in row), Fraction(0))
    return log2(total) / 2 if total else -math.inf


def log2(a: Fraction) -> float:
    return math.log2(a.numerator) - math.log2(a.denominator)


def distance(got, want: Matrix) -> float:
    """log2 of |got - want|."""
    return size([[a - b for a, b in zip(*rows, strict=True)] for rows in zip(rational(got), want, strict=True)])


def gradients(A, b, c, damp=None, weights=None) -> dict[str, Matrix | float]:
    """Of sum(c x) by A, b, damp and weights, for a real A (m, n) of full rank, b (m,) and c (n,).

    Tall or damped, with y = (A^T W A + damp^2)^-1 c; of least norm, with A A^T, where it is wide. "terms" is log2 of
    the size of the two outer products whose difference is the gradient by A, "image" that of A y, "sums" that of
    |W A| |y|, "products" that of 2 damp |x| |y|.
    """
    (m, n), d = A.shape, Fraction(0) if damp is None else Fraction(float(damp))
    S, B, C = rational(A), rational(b), rational(c)
    w = [Fraction(1)] * m if weights is None else [Fraction(v) for v in weights.double().tolist()]
    St = transpose(S, n)
    if m < n and not d:
        K = times(S, St, m)
        u, v = solved(K, B), solved(K, times(S, C, 1))  # x = A^T u
        x, back = times(St, u, 1), times(St, v, 1)
        by_A = [[u[i][0] * (C[j][0] - back[j][0]) - v[i][0] * x[j][0] for j in range(n)] for i in range(m)]
        rest = [[C[j][0] - back[j][0]] for j in range(n)]
        return {"A": by_A, "b": v, "terms": max(size(u) + size(rest), size(v) + size(x))}
    weighted = [[wi * a for a in row] for wi, row in zip(w, S, strict=True)]
    gram = times(St, weighted, n)
    gram = [[g + (d * d if i == j else 0) for j, g in enumerate(row)] for i, row in enumerate(gram)]
    x = solved(gram, times(St, [[wi * v for v in row] for wi, row in zip(w, B, strict=True)], 1))
    y = solved(gram, C)
    image, fitted = times(S, y, 1), times(S, x, 1)
    r = [[bi[0] - fi[0]] for bi, fi in zip(B, fitted, strict=True)]
    by_A = [[w[i] * (r[i][0] * y[j][0] - image[i][0] * x[j][0]) for j in range(n)] for i in range(m)]
    return {
        "A": by_A,
        "b": [[w[i] * image[i][0]] for i in range(m)],
        "damp": [[-2 * d * sum((a[0] * b[0] for a, b in zip(x, y, strict=True)), Fraction(0))]],
        "weights": [[image[i][0] * r[i][0]] for i in range(m)],
        "image": size(image),
        "sums": size(weighted) + size(y),
        "products": 1 + size([[d]]) + size(x) + size(y),
        "terms": max(
            size([[wi * v[0]] for wi, v in zip(w, r, strict=True)]) + size(y),
            size([[wi * v[0]] for wi, v in zip(w, image, strict=True)]) + size(x),
        ),
    }
