"""`Products` of one's own, by what `functional_lstsq.sparse.base` says of it, through the system and through `CGLS`."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import close, normal, with_singular_values

import functional_lstsq as fl
from functional_lstsq.result import CONVERGED, RANK_DEFICIENT
from functional_lstsq.solvers.system import EPS, System, Weighting
from functional_lstsq.sparse.base import Products, dot, norm

DOUBLE = torch.float64


class Convolution(Products):
    """Toeplitz: the full convolution with a kernel of h numbers, (n + h - 1, n), by Fourier transforms."""

    def __init__(self, kernel, n):
        self.copies, self.m, self.n, self.dtype, self.device = 1, n + len(kernel) - 1, n, kernel.dtype, kernel.device
        self.spectrum = torch.fft.rfft(kernel, self.m)[None, :, None]

    def matmul(self, X, out=None):
        product = torch.fft.irfft(self.spectrum * torch.fft.rfft(X, self.m, dim=1), self.m, dim=1)
        return product if out is None else out.copy_(product)

    def adjoint(self, Y, out=None):
        product = torch.fft.irfft(self.spectrum.conj() * torch.fft.rfft(Y, dim=1), self.m, dim=1)[:, : self.n]
        return product if out is None else out.copy_(product)


class Exchange:
    """Where as many threads as there are places meet to sum, or to take the largest of, what each has brought."""

    def __init__(self, places):
        self.barrier, self.brought = threading.Barrier(places, timeout=60), [None] * places

    def together(self, place, numbers, join):
        self.brought[place] = numbers
        self.barrier.wait()
        whole = join(torch.stack(self.brought), 0)
        self.barrier.wait()
        return whole


class Rows(Products):
    """Some of the rows of a dense matrix, of which others are elsewhere."""

    def __init__(self, D, place, exchange, height):
        self.D, self.place, self.exchange, self.whole_height = D, place, exchange, height
        (self.copies, self.m, self.n), self.dtype, self.device = D.shape, D.dtype, D.device

    @property
    def height(self):
        return self.whole_height

    def summed(self, numbers):
        return self.exchange.together(self.place, numbers, torch.sum)

    def matmul(self, X, out=None):
        return self.D @ X if out is None else out.copy_(self.D @ X)

    def adjoint(self, Y, out=None):
        product = self.summed(self.D.mH @ Y)
        return product if out is None else out.copy_(product)

    def dot(self, x, y):
        return self.summed(dot(x, y))

    def norm(self, y):
        return self.dot(y, y).sqrt()

    def largest(self, y):
        return self.exchange.together(self.place, y.abs().amax(1) if self.m else y[:, :0].sum(1), torch.amax)


def solved(A, b, damp=None, weighting=None, solver=None):
    """(x, r, report) of min |b - A x|^2 + damp^2 |x|^2 for b (m, k)."""
    system = System(A, damp, EPS, weighting=weighting)
    c = torch.zeros(1, A.n, b.shape[1], dtype=b.dtype)
    r, y, report = (solver or fl.CGLS()).prepare(system, minimum_norm=False).solve(b[None], c)
    return (y / system.scale)[0], r[0], report


@pytest.mark.parametrize("damp", [None, 0.3])
def test_a_toeplitz_matrix_by_fourier_transforms(damp):
    kernel, b = normal(4) + torch.tensor([3.0, 0, 0, 0], dtype=DOUBLE), normal(23, 2, seed=1)
    A = Convolution(kernel, 20)
    D = A.matmul(torch.eye(20, dtype=DOUBLE)[None])[0]
    x, r, report = solved(A, b, None if damp is None else torch.tensor([[damp]], dtype=DOUBLE))
    want = fl.lstsq(D.to_sparse(), b, damp=damp)
    close(x, want, 1e-9)
    close(r, b - D @ want, 1e-9)
    assert (report.status == CONVERGED).all()
    off = (x - want).norm(dim=0) / want.norm(dim=0)
    assert (off <= 10 * report.solution_error[0]).all()
    whole = D if damp is None else torch.cat([D, damp * torch.eye(20, dtype=DOUBLE)])
    condition = torch.linalg.cond(whole)
    assert condition / 10 < report.condition.min() <= 1.01 * condition


def test_weights_need_products_alone():
    D, weights, b = normal(9, 4), torch.linspace(0.25, 1, 9, dtype=DOUBLE), normal(9, 1, seed=1)
    weighting = Weighting(weights[None], torch.zeros(1, 1, dtype=torch.int32), None)
    x, r, _ = solved(Rows(D[None], 0, Exchange(1), 9), b, weighting=weighting)
    close(x, fl.lstsq(D.to_sparse(), b, weights=weights), 1e-9)
    close(r, b - D @ x, 1e-9)


def test_the_certificate_sees_a_dependence_by_products_alone():
    D, _ = with_singular_values([1.0, 0.7, 0.3, 1e-17], 12)
    _, _, report = solved(Rows(D[None], 0, Exchange(1), 12), normal(12, 1))
    assert (report.status == RANK_DEFICIENT).all()


@pytest.mark.parametrize("damp", [None, 0.3])
@pytest.mark.parametrize("ends", [(0, 30, 60), (0, 1, 60), (0, 60, 60)], ids=["even", "one row", "no row"])
def test_rows_in_several_places(ends, damp):
    """Each place has its rows of A, b and r, and gets the same x, to the bit: all that is summed over rows is `A`'s."""
    D, _ = with_singular_values(torch.logspace(0, -3, 12), 60)
    b, d = normal(60, 3, seed=1), None if damp is None else torch.tensor([[damp]], dtype=DOUBLE)
    exchange = Exchange(2)

    def at(place):
        mine = slice(*ends[place : place + 2])
        return solved(Rows(D[None, mine], place, exchange, 60), b[mine], d)

    with ThreadPoolExecutor(2) as pool:
        (x, r, report), (other_x, other_r, other_report) = pool.map(at, (0, 1))
    want = fl.lstsq(D.to_sparse(), b, damp=damp)
    close(x, want, 1e-9)
    close(torch.cat([r, other_r]), b - D @ want, 1e-9)
    assert (report.status == CONVERGED).all()
    assert torch.equal(x, other_x)
    assert torch.equal(report.packed(), other_report.packed())
    assert norm((x - want)[None]).max() <= 10 * (report.solution_error * norm(want[None])).max()
