"""Problems for cases over ranks that differ from the usual one, as options of a `Place`."""

import torch
from helpers import normal, problem, with_singular_values

import functional_lstsq as fl


def full_rows(m=60, n=20):
    """Sparse rows, with two that are full far from each other."""
    pattern, _, b = problem(m, n, seed=4, density=0.06)
    full = torch.zeros(m, n, dtype=torch.bool)
    full[tuple(pattern.indices)] = True
    full[torch.tensor([7, m - 2])] = True
    return {"given": (fl.SparsePattern(full.nonzero().T, (m, n)), normal(int(full.sum()), seed=5), b), "m": m, "n": n}


def grid(side, least):
    """Differences of the points of a square, and each of them times `least`: the rows of one sort after the other."""
    n = side * side
    i = torch.arange(n).view(side, side)
    of_pairs = ((i[:, :-1], i[:, 1:]), (i[:-1], i[1:]))
    ends = torch.cat([torch.stack([one.reshape(-1), other.reshape(-1)]) for one, other in of_pairs], 1)
    k = ends.shape[1]
    rows = torch.cat([torch.arange(k), torch.arange(k), k + torch.arange(n)])
    weight = 0.5 + normal(k, seed=6).abs()
    values = torch.cat([-weight, weight, torch.full((n,), least)])
    pattern = fl.SparsePattern(torch.stack([rows, torch.cat([*ends, torch.arange(n)])]), (k + n, n))
    return {"given": (pattern, values, normal(k + n, seed=3)), "m": k + n, "n": n}


def apart(m=40, n=8):
    """The first half of the rows has entries in the first half of the columns only, the second half in the others."""
    pattern, values, b = problem(m, n, seed=2)
    early = pattern.indices[0] < m // 2
    kept = early == (pattern.indices[1] < n // 2)
    return {"given": (fl.SparsePattern(pattern.indices[:, kept], (m, n)), values[kept], b)}


def without_full_rank(m=40):
    """Dummies of two kinds, of which one is always too many."""
    rows = torch.arange(m)
    indices = torch.stack([rows.repeat(2), torch.cat([rows % 3, 3 + rows % 5])])
    return {"given": (fl.SparsePattern(indices, (m, 8)), torch.ones(2 * m), normal(m, seed=3)), "m": m}


def of_singular_values(s, m):
    D, pattern = with_singular_values(torch.tensor(s, dtype=torch.float64), m)
    return {"given": (pattern, D.reshape(-1), normal(m, seed=3)), "m": m, "n": len(s)}
