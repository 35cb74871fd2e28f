"""Sandwich covariances of linear fits: statsmodels' numbers, dense algebra, derivatives, and what is refused."""

import pytest
import torch
from helpers import close, normal, problem
from torch.func import jacfwd, jacrev, vmap

import functional_lstsq as fl

D = torch.float64
# Brownlee's stack loss plant data (Statistical Theory and Methodology, Wiley 1965): air flow, water temperature, acid.
STACK = torch.tensor(
    [
        (80, 27, 89), (80, 27, 88), (75, 25, 90), (62, 24, 87), (62, 22, 87), (62, 23, 87), (62, 24, 93),
        (62, 24, 93), (58, 23, 87), (58, 18, 80), (58, 18, 89), (58, 17, 88), (58, 18, 82), (58, 19, 93),
        (50, 18, 89), (50, 18, 86), (50, 19, 72), (50, 19, 79), (50, 20, 80), (56, 20, 82), (70, 20, 91),
    ],
    dtype=D,
)  # fmt: skip
LOSS = torch.tensor([42, 37, 37, 28, 18, 18, 19, 20, 15, 14, 14, 13, 11, 12, 8, 7, 8, 8, 9, 15, 15], dtype=D)
A = fl.SparseMatrix.from_torch(torch.cat([torch.ones(21, 1, dtype=D), STACK], 1).to_sparse())
WEIGHTS = 1 / (1 + torch.arange(21, dtype=D) % 4)
GROUPS = torch.arange(21) // 4
# statsmodels 0.15.0: the diagonal of cov_params() of OLS(LOSS, A), and of WLS with WEIGHTS, and its entry [1, 2], for
# fit(cov_type=kind), and for fit(cov_type="cluster", cov_kwds={"groups": GROUPS}).
PUBLISHED = {
    ("HC0", False): (41.109248859995056, 0.025263277955268205, 0.19938697671735953, 0.0074700542472367374,
                     -0.06184201782894533),
    ("HC1", False): (50.78201329764096, 0.03120757865062543, 0.24630155947438534, 0.009227714070115968,
                     -0.0763930808475207),
    ("HC2", False): (57.11731226182821, 0.03382933164986974, 0.2619835921330954, 0.010331492259843485,
                     -0.08211600690445761),
    ("HC3", False): (81.0198931823552, 0.04554860780548894, 0.34663103316643645, 0.014539591626729978,
                     -0.10969135664843642),
    (None, False): (88.40917750309367, 0.03997706723937059, 0.44275468213687486, 0.011804130736265081,
                    -0.11793403346666488),
    ("HC0", True): (44.81619206237183, 0.02969062493288777, 0.25267101099765954, 0.011771947329157206,
                    -0.07220639324900611),
    ("HC1", True): (55.36117842998874, 0.036676654328861365, 0.3121230135853441, 0.014541817288958902,
                    -0.08919613283700756),
    ("HC2", True): (78.42406466567525, 0.0498754997314593, 0.42019279856906294, 0.01942889847663803,
                    -0.12031144541417106),
    ("HC3", True): (150.4990651678592, 0.08553084857013458, 0.7143542984993503, 0.034768654692013255,
                    -0.20377318004060774),
    (None, True): (86.0060039073471, 0.04959187524767039, 0.5610896194600943, 0.01681044355408924,
                   -0.14443207335961722),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "weighted"), PUBLISHED)
def test_published_numbers(kind, weighted):
    options = {"b": LOSS, "kind": kind, "groups": GROUPS if kind is None else None}
    weights, want = WEIGHTS if weighted else None, torch.tensor(PUBLISHED[kind, weighted], dtype=D)
    got = fl.covariance(A, range(4), weights, **options)
    close(torch.cat([got.diagonal(), got[1:2, 2]]) / want, torch.ones_like(want), 1e-8)
    close(fl.covariance_diagonal(A, weights, **options) / want[:4], torch.ones(4, dtype=D), 1e-8)


PATTERN, VALUES, B = problem(9, 3, seed=2)
W = torch.linspace(0.5, 2, 9, dtype=D)


def by_dense(values, b, w, kind, damp=0.0):
    A = torch.zeros(9, 3, dtype=values.dtype).index_put(tuple(PATTERN.indices), values)
    C = torch.linalg.inv(A.mH @ (w[:, None] * A) + damp**2 * torch.eye(3, dtype=D))
    r = b - A @ (C @ (A.mH @ (w * b)))
    others = 1 - (w[:, None] * A * (A.conj() @ C.T)).sum(1).real
    power = {"HC0": 0, "HC1": 0, "HC2": 1, "HC3": 2}[kind]
    M = A.mH @ (((w * r.abs()).square() / others**power)[:, None] * A)
    counted = (w > 0).sum()
    return C @ M @ C * (counted.to(D) / (counted - 3) if kind == "HC1" else 1.0)


of_every_kind = pytest.mark.parametrize("kind", ["HC0", "HC1", "HC2", "HC3"])


def ours(values, b, w, kind):
    return fl.covariance(fl.SparseMatrix(values, PATTERN), [0, 2], w, b=b, kind=kind)


@of_every_kind
@pytest.mark.parametrize("mode", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
def test_derivatives(kind, mode):
    for by in range(3):
        want = mode(by_dense, by)(VALUES, B, W, kind)[:, [0, 2]]
        close(mode(ours, by)(VALUES, B, W, kind), want, 1e-8)


@of_every_kind
def test_a_weight_of_zero_leaves_a_row_out(kind):
    w = W * (torch.arange(9) != 3)
    close(ours(VALUES, B, w, kind), by_dense(VALUES, B, w, kind)[:, [0, 2]], 1e-10)
    A = fl.SparseMatrix(VALUES, PATTERN)
    close(fl.covariance_diagonal(A, w, b=B, kind=kind), by_dense(VALUES, B, w, kind).diagonal(), 1e-10)


@of_every_kind
def test_a_constraint_has_no_error(kind):
    """It takes one direction from the unknowns, and one degree of freedom with it."""
    dense = torch.zeros(9, 3, dtype=D).index_put(tuple(PATTERN.indices), VALUES)
    first, rest, w = dense[:1], dense[1:], W[1:]
    x0, Z = torch.linalg.pinv(first) @ B[:1], torch.linalg.svd(first).Vh[1:].T
    reduced, b = rest @ Z, B[1:] - rest @ x0
    C = torch.linalg.inv(reduced.T @ (w[:, None] * reduced))
    r, h = b - reduced @ (C @ (reduced.T @ (w * b))), w * (reduced * (reduced @ C)).sum(1)
    factor = {"HC0": 1, "HC1": 9 / 6, "HC2": 1 / (1 - h), "HC3": 1 / (1 - h).square()}[kind]
    M = reduced.T @ ((factor * (w * r).square())[:, None] * reduced)
    weights = torch.where(torch.arange(9) == 0, torch.inf, W)
    got = fl.covariance(fl.SparseMatrix(VALUES, PATTERN), range(3), weights, b=B, kind=kind)
    close(got, Z @ C @ M @ C @ Z.T, 1e-10)


@of_every_kind
def test_complex_numbers_and_damping(kind):
    values, b = torch.complex(VALUES, VALUES.flip(0)), torch.complex(B, B.flip(0))
    F = fl.factorize(fl.SparseMatrix(values, PATTERN), damp=0.7, weights=W)
    want = by_dense(values, b, W, kind, 0.7)
    close(fl.covariance(F, range(3), b=b, kind=kind), want, 1e-10)
    close(fl.covariance_diagonal(F, b=b, kind=kind), want.diagonal().real, 1e-10)


def test_groups_of_complex_numbers():
    values, b = torch.complex(VALUES, VALUES.flip(0)), torch.complex(B, B.flip(0))
    groups = torch.tensor([7, 7, 1, 1, 1, 9, 9, 9, 7])
    A = torch.zeros(9, 3, dtype=values.dtype).index_put(tuple(PATTERN.indices), values)
    C = torch.linalg.inv(A.mH @ A)
    scores = A.conj() * (b - A @ (C @ (A.mH @ b)))[:, None]
    sums = torch.stack([scores[groups == g].sum(0) for g in (1, 7, 9)])
    want = 3 / 2 * 8 / 6 * C @ (sums.T @ sums.conj()) @ C
    got = fl.covariance(fl.SparseMatrix(values, PATTERN), range(3), b=b, groups=groups)
    close(got, want, 1e-10)
    diagonal = fl.covariance_diagonal(fl.SparseMatrix(values, PATTERN), b=b, groups=groups.tolist())
    close(diagonal, want.diagonal().real, 1e-10)


@pytest.mark.parametrize("options", [{"kind": "HC3"}, {"groups": GROUPS}], ids=["HC3", "groups"])
def test_vmap(options):
    bs = torch.stack([LOSS, LOSS + normal(21, seed=1)])
    got = vmap(lambda b: fl.covariance_diagonal(A, b=b, **options))(bs)
    close(got, torch.stack([fl.covariance_diagonal(A, b=b, **options) for b in bs]), 1e-10)


ALONE = fl.SparseMatrix.from_torch(torch.tensor([[1.0, 0], [1, 0], [0, 1]], dtype=D).to_sparse())
BAD = {
    "no b": (lambda: fl.covariance(A, [0], kind="HC0"), "b must be given beside kind, got None"),
    "no b for groups": (lambda: fl.covariance_diagonal(A, groups=GROUPS), "b must be given beside groups, got None"),
    "b": (lambda: fl.covariance(A, [0], b=LOSS[1:], kind="HC0"), r"b must be a tensor of shape \(21,\), got .*\(20,\)"),
    "no kind": (lambda: fl.covariance(A, [0], b=LOSS), "kind must be one of HC0, HC1, HC2, HC3, got None"),
    "kind": (lambda: fl.covariance(A, [0], b=LOSS, kind="HC4"), "kind must be one of .*, got 'HC4'"),
    "both": (
        lambda: fl.covariance(A, [0], b=LOSS, kind="HC0", groups=GROUPS),
        "kind must be None beside groups, got 'HC0'",
    ),
    "groups": (
        lambda: fl.covariance(A, [0], b=LOSS, groups=GROUPS[1:]),
        r"groups must be integers of shape \(21,\), got torch.int64, shape \(20,\)",
    ),
    "one group": (lambda: fl.covariance(A, [0], b=LOSS, groups=0 * GROUPS), "at least two groups, got 1"),
    "alone": (
        lambda: fl.covariance(ALONE, [0], b=LOSS[:3], kind="HC3"),
        "kind must be HC0 or HC1 where a row has leverage 1, as row 2 has, got 'HC3'",
    ),
    "freedom": (
        lambda: fl.covariance(ALONE, [0], WEIGHTS[:3] * (torch.arange(3) > 0), b=LOSS[:3], kind="HC1"),
        "A must have more rows than columns for HC1, got 3 x 2, weights of 0 aside",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()
