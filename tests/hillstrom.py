"""Test problems of Moré, Garbow and Hillstrom (ACM TOMS 7(1), 1981): starts, residuals, sums of squares at minima.

Without the two linear ones of rank one. Of local minima those that are known are listed, the global one first.
"""

import math

import torch

D = torch.float64
PROBLEMS = {}


def T(*numbers):
    return torch.tensor(numbers, dtype=D)


def numbers(text):
    return T(*map(float, text.split()))


def ar(first, last):
    return torch.arange(first, last + 1, dtype=D)


def problem(name, x0, sums):
    def put(residual):
        PROBLEMS[name] = x0 if isinstance(x0, torch.Tensor) else T(*x0), residual, sums
        return residual

    return put


@problem("rosenbrock", (-1.2, 1), [0])
def residual_1(x):
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


@problem("freudenstein", (0.5, -2), [0, 48.98425])
def residual_2(x):
    return torch.stack([-13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1], -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1]])


@problem("powell bad", (0, 1), [0])
def residual_3(x):
    return torch.stack([1e4 * x[0] * x[1] - 1, torch.exp(-x[0]) + torch.exp(-x[1]) - 1.0001])


@problem("brown bad", (1, 1), [0])
def residual_4(x):
    return torch.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


@problem("beale", (1, 1), [0])
def residual_5(x):
    i = ar(1, 3)
    return T(1.5, 2.25, 2.625) - x[0] * (1 - x[1] ** i)


@problem("jennrich", (0.3, 0.4), [124.3622])
def residual_6(x):
    i = ar(1, 10)
    return 2 + 2 * i - (torch.exp(i * x[0]) + torch.exp(i * x[1]))


@problem("helical", (-1, 0, 0), [0])
def residual_7(x):
    th = torch.atan2(x[1], x[0]) / (2 * math.pi)
    return torch.stack([10 * (x[2] - 10 * th), 10 * (torch.sqrt(x[0] ** 2 + x[1] ** 2) - 1), x[2]])


@problem("bard", (1, 1, 1), [8.214877e-3, 17.4286])
def residual_8(x):
    y = numbers("0.14 0.18 0.22 0.25 0.29 0.32 0.35 0.39 0.37 0.58 0.73 0.96 1.34 2.10 4.39")
    u = ar(1, 15)
    v = 16 - u
    w = torch.minimum(u, v)
    return y - (x[0] + u / (v * x[1] + w * x[2]))


@problem("gaussian", (0.4, 1, 0), [1.12793e-8])
def residual_9(x):
    h = [0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521]
    y = T(*h, 0.3989, *h[::-1])
    t = (8 - ar(1, 15)) / 2
    return x[0] * torch.exp(-x[1] * (t - x[2]) ** 2 / 2) - y


@problem("meyer", (0.02, 4000, 250), [87.9458])
def residual_10(x):
    y = numbers("34780 28610 23650 19630 16370 13720 11540 9744 8261 7030 6005 5147 4427 3820 3307 2872")
    t = 45 + 5 * ar(1, 16)
    return x[0] * torch.exp(x[1] / (t + x[2])) - y


@problem("gulf", (5, 2.5, 0.15), [0])
def residual_11(x):
    t = ar(1, 99) / 100
    y = 25 + (-50 * torch.log(t)) ** (2 / 3)
    return torch.exp(-(torch.abs(y - x[1]) ** x[2]) / x[0]) - t


@problem("box3", (0, 10, 20), [0])
def residual_12(x):
    t = 0.1 * ar(1, 10)
    return torch.exp(-t * x[0]) - torch.exp(-t * x[1]) - x[2] * (torch.exp(-t) - torch.exp(-10 * t))


@problem("powell singular", (3, -1, 0, 1), [0])
def residual_13(x):
    return torch.stack([x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2])


@problem("wood", (-3, -1, -3, -1), [0, 7.876966])
def residual_14(x):
    return torch.stack(
        [
            10 * (x[1] - x[0] ** 2),
            1 - x[0],
            90**0.5 * (x[3] - x[2] ** 2),
            1 - x[2],
            10**0.5 * (x[1] + x[3] - 2),
            (x[1] - x[3]) / 10**0.5,
        ]
    )


@problem("kowalik", (0.25, 0.39, 0.415, 0.39), [3.075056e-4, 1.02734e-3])
def residual_15(x):
    y = numbers("0.1957 0.1947 0.1735 0.1600 0.0844 0.0627 0.0456 0.0342 0.0323 0.0235 0.0246")
    u = numbers("4 2 1 0.5 0.25 0.167 0.125 0.1 0.0833 0.0714 0.0625")
    return y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


@problem("brown dennis", (25, 5, -5, -1), [85822.2])
def residual_16(x):
    t = ar(1, 20) / 5
    return (x[0] + t * x[1] - torch.exp(t)) ** 2 + (x[2] + x[3] * torch.sin(t) - torch.cos(t)) ** 2


@problem("osborne1", (0.5, 1.5, -1, 0.01, 0.02), [5.46489e-5])
def residual_17(x):
    y = numbers(
        "0.844 0.908 0.932 0.936 0.925 0.908 0.881 0.850 0.818 0.784 0.751 0.718 0.685 0.658 0.628 0.603 "
        "0.580 0.558 0.538 0.522 0.506 0.490 0.478 0.467 0.457 0.448 0.438 0.431 0.424 0.420 0.414 0.411 "
        "0.406"
    )
    t = 10 * (ar(1, 33) - 1)
    return y - (x[0] + x[1] * torch.exp(-t * x[3]) + x[2] * torch.exp(-t * x[4]))


@problem("biggs", (1, 2, 1, 1, 1, 1), [0, 5.65565e-3])
def residual_18(x):
    t = 0.1 * ar(1, 13)
    y = torch.exp(-t) - 5 * torch.exp(-10 * t) + 3 * torch.exp(-4 * t)
    return x[2] * torch.exp(-t * x[0]) - x[3] * torch.exp(-t * x[1]) + x[5] * torch.exp(-t * x[4]) - y


@problem("osborne2", (1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5), [4.013773e-2])
def residual_19(x):
    y = numbers(
        "1.366 1.191 1.112 1.013 0.991 0.885 0.831 0.847 0.786 0.725 0.746 0.679 0.608 0.655 0.616 0.606 "
        "0.602 0.626 0.651 0.724 0.649 0.649 0.694 0.644 0.624 0.661 0.612 0.558 0.533 0.495 0.500 0.423 "
        "0.395 0.375 0.372 0.391 0.396 0.405 0.428 0.429 0.523 0.562 0.607 0.653 0.672 0.708 0.633 0.668 "
        "0.645 0.632 0.591 0.559 0.597 0.625 0.739 0.710 0.729 0.720 0.636 0.581 0.428 0.292 0.162 0.098 "
        "0.054"
    )
    t = (ar(1, 65) - 1) / 10
    return y - (
        x[0] * torch.exp(-t * x[4])
        + x[1] * torch.exp(-((t - x[8]) ** 2) * x[5])
        + x[2] * torch.exp(-((t - x[9]) ** 2) * x[6])
        + x[3] * torch.exp(-((t - x[10]) ** 2) * x[7])
    )


def watson(n):
    def f(x):
        t = ar(1, 29) / 29
        j = ar(1, n)
        s1 = ((j[1:] - 1) * x[1:] * t[:, None] ** (j[1:] - 2)).sum(1)
        s2 = (x * t[:, None] ** (j - 1)).sum(1)
        return torch.cat([s1 - s2**2 - 1, x[:1], (x[1] - x[0] ** 2 - 1)[None]])

    return f


PROBLEMS["watson6"] = (torch.zeros(6, dtype=D), watson(6), [2.28767e-3])
PROBLEMS["watson9"] = (torch.zeros(9, dtype=D), watson(9), [1.39976e-6])


@problem("ext rosenbrock", torch.tensor([-1.2, 1] * 5, dtype=D), [0])
def residual_20(x):
    return torch.stack([10 * (x[1::2] - x[::2] ** 2), 1 - x[::2]], 1).reshape(-1)


@problem("penalty1", ar(1, 4), [2.249975e-5])
def residual_21(x):
    return torch.cat([1e-5**0.5 * (x - 1), (x.square().sum() - 0.25)[None]])


@problem("penalty2", 0.5 * torch.ones(4, dtype=D), [9.37629e-6])
def residual_22(x):
    n = 4
    i = ar(2, n)
    y = torch.exp(i / 10) + torch.exp((i - 1) / 10)
    a = 1e-5**0.5
    return torch.cat(
        [
            (x[0] - 0.2)[None],
            a * (torch.exp(x[1:] / 10) + torch.exp(x[:-1] / 10) - y),
            a * (torch.exp(x[1:] / 10) - math.exp(-0.1)),
            (((n - ar(1, n) + 1) * x.square()).sum() - 1)[None],
        ]
    )


@problem("variably", 1 - ar(1, 10) / 10, [0])
def residual_23(x):
    s = (ar(1, 10) * (x - 1)).sum()
    return torch.cat([x - 1, s[None], s.square()[None]])


@problem("trigonometric", torch.full((10,), 0.1, dtype=D), [0, 2.79506e-5, 4.21863e-5])
def residual_24(x):
    n = 10
    return n - torch.cos(x).sum() + ar(1, n) * (1 - torch.cos(x)) - torch.sin(x)


@problem("brown almost", torch.full((10,), 0.5, dtype=D), [0, 1.0])
def residual_25(x):
    return torch.cat([(x + x.sum() - 11)[:-1], (torch.prod(x) - 1)[None]])


@problem("discrete bv", (ar(1, 10) / 11) * (ar(1, 10) / 11 - 1), [0])
def residual_26(x):
    h = 1 / 11
    t = ar(1, 10) * h
    z = torch.zeros(1, dtype=D)
    return 2 * x - torch.cat([z, x[:-1]]) - torch.cat([x[1:], z]) + h * h * (x + t + 1) ** 3 / 2


@problem("discrete ie", (ar(1, 10) / 11) * (ar(1, 10) / 11 - 1), [0])
def residual_27(x):
    h = 1 / 11
    t = ar(1, 10) * h
    c = (x + t + 1) ** 3
    return x + h * ((1 - t) * torch.cumsum(t * c, 0) + t * ((1 - t) * c).sum() - t * torch.cumsum((1 - t) * c, 0)) / 2


@problem("broyden tri", -torch.ones(10, dtype=D), [0])
def residual_28(x):
    z = torch.zeros(1, dtype=D)
    return (3 - 2 * x) * x - torch.cat([z, x[:-1]]) - 2 * torch.cat([x[1:], z]) + 1


@problem("broyden band", -torch.ones(10, dtype=D), [0])
def residual_29(x):
    n = 10
    M = torch.tensor(
        [[1.0 if j != i and max(0, i - 5) <= j <= min(n - 1, i + 1) else 0 for j in range(n)] for i in range(n)],
        dtype=D,
    )
    return x * (2 + 5 * x**2) + 1 - M @ (x * (1 + x))


@problem("linear full", torch.ones(5, dtype=D), [5])
def residual_30(x):
    m, n = 10, 5
    s = 2 * x.sum() / m
    return torch.cat([x - s - 1, (-s - 1).expand(m - n)])


@problem("chebyquad", ar(1, 8) / 9, [3.516874e-3])
def residual_31(x):
    y = 2 * x - 1
    a, b = torch.ones_like(y), y
    out = []
    for i in range(1, 9):
        out.append(b.mean() - (0 if i % 2 else -1 / (i * i - 1)))
        a, b = b, 2 * y * b - a
    return torch.stack(out)
