"""Sparse factorisation of the Gram matrix, for problems of any size whose factor fits into memory.

    (A^H A + s N^2) = P L L^H P^T,   N the norms of the columns, s as small as rounding allows

is the preconditioner of refinement on the augmented system, so the accuracy is that of a backward stable method and
not that of the normal equations. The shift s makes the factor exist whatever the rank. Directions so weak that it
hides them (singular values below some sqrt(s)) are found by block inverse iteration with a Ritz projection through A,
which squares nothing: they are solved for on their own, and those on which A vanishes are the null space.

Rows that are nearly dense are left out of the factor and come back by the Woodbury identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BY_CGLS, MEMORY, OTHER_SOLVER, SolveError, TooLarge
from ..memory import available_bytes
from ..products import Operator
from ..result import INACCURATE, Report, method_code
from .factored import Factored, power
from .gram import GramAnalysis, NotPositive, method_name
from .numerics import noise
from .system import System, check_number

_SHIFTS = (1e-14, 1e-12, 1e-10)  # relative to the squares of the norms of columns
# Where rows are left out, what is left may have no full rank, and the Woodbury identity cancels up to 1 / shift.
_SHIFTS_WITHOUT_ROWS = (1e-10, 1e-9)
_BLOCKS = (8, 32, 128, 512)


@dataclass(frozen=True)
class Direct:
    """Factor A^H A sparsely and refine; finds the rank.

    The analysis is made once for each pattern, a factor once for each set of values; a batch of values shares the
    analysis. The factor itself is always on the CPU.

    Args:
        accept: largest estimated forward error, relative, of an answer that is given; None for eps^(1/3).
        memory: bytes that a factor may take; None for half of what is available. A factor predicted to take more is
            not started: `TooLarge`, a `torch.linalg.LinAlgError` and a `MemoryError`.

    >>> import functional_lstsq as fl
    >>> pattern = fl.SparsePattern(torch.tensor([[0, 1, 2], [0, 0, 1]]), (3, 2))
    >>> A = fl.SparseMatrix(torch.tensor([1.0, 2.0, 3.0]), pattern)
    >>> fl.lstsq(A, torch.tensor([1.0, 2.0, 3.0]), solver=fl.Direct())
    tensor([1., 1.])
    """

    accept: float | None = None
    memory: float | None = None
    sparse_factor = True

    def __post_init__(self):
        check_number("accept", self.accept, optional=True)
        check_number("memory", self.memory, optional=True)

    def prepare(self, system: System, *, minimum_norm: bool) -> _Factors:
        """Factor `system`; the result solves for any right-hand side."""
        system.accept = self.accept or system.accept
        analysis = analyse(system)
        reason = self.too_large(analysis, system.copies)
        if reason:
            raise TooLarge(f"method {method_name()} was not started: {reason}", BY_CGLS, MEMORY)
        return _Factors(system, analysis, minimum_norm)

    @property
    def room(self) -> float:
        """Bytes that factors may take."""
        return self.memory or available_bytes() / 2

    def too_large(self, analysis: GramAnalysis, copies: int) -> str:
        """Why a factor is not to be started; empty if it fits."""
        for wanted in (lambda: analysis.bytes_before, lambda: copies * analysis.predicted[1]):
            size = wanted()
            room = self.room  # which the analysis, that predicts, has made smaller
            if size > room:
                return f"it would take about {size:.1e} bytes, of {room:.1e} that it may"
        return ""


def analyse(system: System) -> GramAnalysis:
    """The analysis for the pattern of `system`, kept on the pattern."""
    complex_values = system.A.dtype.is_complex
    return system.A.pattern.keep(
        ("gram", complex_values),
        lambda: GramAnalysis(system.A.pattern, complex_values=complex_values),
    )


class _Factors(Factored):
    sparse_factor = True

    def __init__(self, system: System, analysis: GramAnalysis, minimum_norm: bool):
        super().__init__(system, minimum_norm)
        code, device = method_code(method_name()), system.A.device
        self.method = torch.full((system.copies, 1), code, device=device)
        A = system.A
        self.largest = power(lambda v: A.adjoint(A.matmul(v)) + system.damped(v), system).sqrt()
        self.largest = torch.where(self.largest > 0, self.largest, 1.0)
        self.blocks = [_Block(system, analysis, p) for p in range(system.copies)]
        self.nullity = torch.zeros_like(self.largest)
        self.smallest = torch.ones_like(self.largest)
        self.gave_up = torch.zeros_like(self.largest, dtype=torch.bool)
        weak: list[Tensor] = []
        for p, block in enumerate(self.blocks):
            known, sigma, V, beyond = block.explore(float(self.largest[p]))
            lost = sigma <= system.tolerance * self.largest[p]
            block.deflate(V[:, ~lost], sigma[~lost])
            block.null = V[:, lost]
            weak.append(V[:, lost])
            self.smallest[p] = min([beyond, *sigma[~lost].tolist()])
            self.gave_up[p] = not known
            self.nullity[p] = int(lost.sum()) + int(system.empty[p].sum())
        self.rank = system.n - self.nullity
        if bool((self.nullity > 0).any()):
            self._collect(weak)

    def _collect(self, weak: list[Tensor]) -> None:
        """The null space, refined; columns of zeros are unit vectors of it."""
        width = max(z.shape[1] for z in weak)
        Z = torch.stack([torch.nn.functional.pad(z, (0, width - z.shape[1])) for z in weak])
        lost = torch.stack([torch.arange(width, device=Z.device) < z.shape[1] for z in weak])[:, None]
        if width:
            self._find_null_space(Z, lost)
        else:
            self.null, self.null_slip = Z, Z

    def apply(self, g: Tensor) -> Tensor:
        """(A^H A + d^2)^+ g, to some digits."""
        return torch.stack([block.apply(part) for block, part in zip(self.blocks, g, strict=True)])

    def _project(self, x: Tensor) -> Tensor:
        return torch.where(self.system.empty[:, :, None], 0.0, super()._project(x))

    def dependent(self, p: int) -> list[int]:
        """Some columns that take part in a dependence among the columns of matrix p."""
        zeros = self.system.empty[p].nonzero()[:5, 0].tolist()
        return zeros or super().dependent(p)

    def solve(self, b: Tensor, c: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor, Report]:
        """As of `Factored`; what could not be explored is no success."""
        r, y, answer = super().solve(b, c)
        if bool(self.gave_up.any()):
            answer = answer._replace(
                status=torch.where(self.gave_up, INACCURATE, answer.status),
                solution_error=torch.where(self.gave_up, torch.inf, answer.solution_error),
                rank=torch.where(self.gave_up, -1, answer.rank),
            )
        return r, y, answer


class _Block:
    """The factor of one matrix of the batch, p, and its weak directions."""

    def __init__(self, system: System, analysis: GramAnalysis, p: int):
        self.system, self.p = system, p
        A = self.A = system.A if system.copies == 1 else Operator(system.A.pattern, system.A.values[p : p + 1])
        values, self.empty = A.values[0], system.empty[p][:, None]
        self.norms2 = system.norms[p].square()
        extra = torch.where(self.empty, 1.0, 0.0 * self.norms2)  # columns of zeros keep to themselves
        if system.d2 is not None:
            extra = extra + system.d2[p]
        shifts = _SHIFTS_WITHOUT_ROWS if len(analysis.heavy) else _SHIFTS
        for shift in shifts:
            # One diagonal for the shift and what is on it anyway.
            diagonal = (self.norms2 + extra / shift)[:, 0].cpu().numpy()
            try:
                self._solve = analysis.factor(values, diagonal, shift)
                break
            except NotPositive:
                if shift == shifts[-1]:
                    raise SolveError(
                        f"method {method_name()} could not factor A^H A + {shift:g}", OTHER_SOLVER
                    ) from None
        # Singular values below this are too much changed by the shift to be left to the iteration.
        self.threshold = (30 * shift) ** 0.5
        self.U: Tensor | None = None
        if len(analysis.heavy):
            self.U = analysis.heavy_rows(values)
            self.inverse_U = self._solve(self.U)
            inner = self.U.mH @ self.inverse_U
            inner = (inner + inner.mH) / 2 + torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
            self.inner, _ = torch.linalg.cholesky_ex(inner)
            self._check_inverse(extra + shift * self.norms2)
        self.V: Tensor | None = None
        self.null: Tensor | None = None

    def invert(self, g: Tensor) -> Tensor:
        """(A^H A + shift N^2)^-1 g"""
        x = self._solve(g)
        if self.U is not None:
            x = x - self.inverse_U @ torch.cholesky_solve(self.U.mH @ x, self.inner)
        return torch.where(self.empty, 0.0, x)

    def _check_inverse(self, diagonal: Tensor) -> None:
        """Raise if cancellation has spoilt the inverse in any direction: four random vectors have a part in each."""
        v = torch.where(self.empty, 0.0, noise(self.norms2.expand(-1, 4))).to(self.A.dtype)
        found = self.invert(self.A.adjoint(self.A.matmul(v[None]))[0] + diagonal * v)
        error = (torch.linalg.vector_norm(found - v, dim=0) / torch.linalg.vector_norm(v, dim=0)).max()
        if not bool(error < 0.01 / len(v) ** 0.5):
            raise SolveError(
                f"method {method_name()}: without its {len(self.inner)} rows with most entries, which would fill the "
                "factor, A is too far from full rank",
                OTHER_SOLVER,
            )

    def apply(self, g: Tensor) -> Tensor:
        """(A^H A)^+ g, to some digits: weak directions by what is known of them, none of the null space."""
        null = self.null if self.null is not None and self.null.shape[1] else None
        if null is not None:
            g = g - null @ (null.mH @ g)
        x = self.invert(g)
        if self.V is not None:
            x = x + self.V @ (self.gain * (self.V.mH @ g))
        return x if null is None else x - null @ (null.mH @ x)

    def deflate(self, V: Tensor, sigma: Tensor) -> None:
        """Solve for the directions V, of singular values sigma, by themselves."""
        if V.shape[1]:
            self.V = V
            seen = (V.conj() * self.invert(V)).sum(0).real
            self.gain = (1 / sigma.square() - seen).clamp_min(0)[:, None].to(V.dtype)

    def explore(self, largest: float) -> tuple[bool, Tensor, Tensor, float]:
        """(whether all were found, the weak singular values, their right singular vectors, the next singular value)."""
        n = self.system.n - int(self.empty.sum())
        none = self.norms2.new_zeros((self.system.n, 0)).to(self.A.dtype)
        if not n:
            return True, none[0].real, none, largest
        sigma, V = self._inverse_iterations(min(4, n), steps=3, until_settled=False)
        if bool(sigma.min() > self.threshold):
            return True, none[0].real, none, float(sigma.min())
        for size in _BLOCKS:
            width = min(size, n)
            if width * len(self.empty) > 2**27:  # a gigabyte
                break
            sigma, V = self._inverse_iterations(width, steps=8, until_settled=True)
            weak = sigma <= self.threshold
            if width == n or not bool(weak.all()):
                return True, *self._sharpen(V[:, weak]), float(sigma[~weak].min()) if bool((~weak).any()) else largest
        return False, sigma, V, largest

    def _sharpen(self, V: Tensor) -> tuple[Tensor, Tensor]:
        """Weak directions without what rounding errors in the factor have mixed into them.

        Inverse iteration leaves eps / sigma_i^2 of a stronger direction i in them, so that |A v| stays above
        eps / sigma_i. A correction of the residual A^H A V - V sigma^2, which is small, does better.
        """
        sigma = V[0].real
        for _ in range(3):
            residual = self.A.adjoint(self._image(V)[None, : self.system.m])[0]
            if self.system.d2 is not None:
                residual = residual + self.system.d2[self.p] * V
            residual = residual - V @ (V.mH @ residual)
            moved = self.invert(residual)
            V = torch.linalg.qr(V - (moved - V @ (V.mH @ moved))).Q
            sigma, turn = self._ritz(V)
            V = V @ turn
        return sigma, V

    def _inverse_iterations(self, width: int, *, steps: int, until_settled: bool) -> tuple[Tensor, Tensor]:
        """Block inverse iteration; the smallest singular values by Rayleigh and Ritz, through A itself."""
        V = torch.where(self.empty, 0.0, noise(self.norms2.expand(-1, width))).to(self.A.dtype)
        before = None
        for step in range(steps):
            V = torch.linalg.qr(self.invert(V)).Q
            if step < 2 or (step < steps - 1 and not until_settled):
                continue
            sigma, turn = self._ritz(V)
            V = V @ turn
            weak = (sigma <= self.threshold) & (sigma > 1e-14)
            if before is not None and bool(((sigma - before).abs() <= 0.01 * sigma)[weak].all()):
                break
            before = sigma
        return sigma, V

    def _ritz(self, V: Tensor) -> tuple[Tensor, Tensor]:
        """Singular values of A V, and its right singular vectors; ascending."""
        image = self._image(V)
        R = torch.linalg.qr(image, mode="r").R
        _, s, Wh = torch.linalg.svd(R)
        return s.flip(0), Wh.mH.flip(1)

    def _image(self, V: Tensor) -> Tensor:
        """[A; d] V"""
        image, damp = self.A.matmul(V[None])[0], self.system.damp
        return image if damp is None else torch.cat([image, damp[self.p] * V])
