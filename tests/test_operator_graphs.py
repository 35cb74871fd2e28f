"""LinearOperator in graphs of torch.compile(fullgraph=True): right, or an error that says why not."""

import functools
import re
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from test_compile import run

import functional_lstsq as fl

S, B = torch.linspace(1, 2, 4, dtype=torch.float64), torch.linspace(-1, 2, 8, dtype=torch.float64)
SEVERAL = torch.stack([B, B.flip(0)])


def tall(scale, x):
    return torch.cat([scale * x, x.flip(0)])


def wide(scale, x):
    return scale * x[:4] + x[4:]


def of_wide(scale, y):
    return torch.cat([scale * y, y])


@dataclass(frozen=True)
class Times:
    factor: float

    def __call__(self, params, x):
        return torch.cat([self.factor * params["scale"][0] * x, x])


FACTOR = [1.0]


def with_factor(scale, x):
    return torch.cat([FACTOR[0] * scale * x, x])


@dataclass(frozen=True)
class Named:
    """Equal to others of its name."""

    name: str
    factor: float = field(compare=False)

    def __call__(self, scale, x):
        return torch.cat([self.factor * scale * x, x.flip(0)])


def f(scale, b):
    return fl.lstsq(fl.LinearOperator(tall, scale, 4), b)


def loss(scale, b):
    return f(scale, b).square().sum()


def compiled(function, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


TRANSFORMS = {
    "none": f,
    "grad": torch.func.grad(loss, argnums=(0, 1)),
    "vmap b": lambda s, b: torch.vmap(f, (None, 0))(s, SEVERAL),
    "vmap params": lambda s, b: torch.vmap(f, (0, None))(torch.stack([s, 2 * s]), b),
    "vmap grad": lambda s, b: torch.vmap(torch.func.grad(loss), (None, 0))(s, SEVERAL),
    "jacrev": torch.func.jacrev(f),
    "jacfwd": torch.func.jacfwd(f),
    "hessian": torch.func.hessian(loss),
}
SOLVES = {
    "solve": lambda s, b: fl.solve(fl.LinearOperator(tall, s, 4), b),
    "columns": lambda s, b: f(s, SEVERAL.T),
    "damp, weights, x0": lambda s, b: fl.lstsq(
        fl.LinearOperator(tall, s, 4), b, damp=s[0], weights=b.abs(), x0=torch.zeros_like(s)
    ),
    "damp for each": lambda s, b: fl.lstsq(fl.LinearOperator(tall, s, 4), b, damp=s),
    "wide": lambda s, b: fl.lstsq(fl.LinearOperator(wide, s, 8), b[:4]),
    "wide, rmatvec": torch.func.grad(
        lambda s, b: fl.lstsq(fl.LinearOperator(wide, s, 8, rmatvec=of_wide), b[:4]).square().sum()
    ),
    "least norm": lambda s, b: fl.lstsq(fl.LinearOperator(tall, s, 4), b, rank_deficient="minimum_norm"),
    "a solver made inside": lambda s, b: fl.lstsq(fl.LinearOperator(tall, s, 4), b, solver=fl.CGLS(tolerance=1e-9)),
    "stopped": lambda s, b: fl.lstsq(fl.LinearOperator(tall, s, 4), b, solver=fl.CGLS(steps=2)),
    "single precision": lambda s, b: fl.lstsq(fl.LinearOperator(tall, s.float(), 4), b.float()),
    "complex": lambda s, b: fl.lstsq(fl.LinearOperator(tall, s * (1 + 1j), 4), b),
    "params in a dict, a dataclass made inside": lambda s, b: fl.lstsq(
        fl.LinearOperator(Times(2.5), {"scale": (s,)}, 4), b
    ),
    "partial": lambda s, b: fl.lstsq(
        fl.LinearOperator(functools.partial(lambda k, s, x: torch.cat([k * s * x, x]), 3.0), s, 4), b
    ),
}


@pytest.mark.parametrize("name", [*TRANSFORMS, *SOLVES])
def test_it_gives_what_it_gives_outside_of_a_graph(name):
    function = (TRANSFORMS | SOLVES)[name]
    found, right = (torch.utils._pytree.tree_leaves(g(S, B)) for g in (compiled(function), function))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.slow
def test_inductor_takes_it():
    for function in (f, torch.func.grad(loss)):
        torch.testing.assert_close(compiled(function, "inductor")(S, B), function(S, B))


def test_operators_handed_over_each_have_a_graph_of_their_own():
    g = compiled(fl.lstsq)
    twice = fl.LinearOperator(lambda scale, x: 2 * tall(scale, x), S, 4)
    for A in (fl.LinearOperator(tall, S, 4), twice, fl.LinearOperator(tall, 3 * S, 4), twice + twice):
        torch.testing.assert_close(g(A, B), fl.lstsq(A, B))
    params = fl.LinearOperator(Times(1.0), {"scale": (S,)}, 4), fl.LinearOperator(Times(4.0), {"scale": (S,)}, 4)
    for A in params:
        torch.testing.assert_close(g(A, B), fl.lstsq(A, B))


@pytest.mark.parametrize("anew", [False, True])
def test_operators_that_are_equal_are_not_the_same(anew):
    g = compiled(fl.lstsq)
    for factor in (1.0, 2.0, 3.0):
        if anew:
            g = compiled(fl.lstsq)
        A = fl.LinearOperator(Named("a", factor), S, 4)
        for operator in (A, A + A):
            torch.testing.assert_close(g(operator, B), fl.lstsq(operator, B))


def test_a_damping_may_be_another_number():
    g = compiled(lambda s, b, d: fl.lstsq(fl.LinearOperator(tall, s, 4), b, damp=d))
    for damp in (0.5, 1.5, 2, 0, 3.0):
        torch.testing.assert_close(g(S, B, damp), fl.lstsq(fl.LinearOperator(tall, S, 4), B, damp=damp))


def test_a_real_matvec_takes_complex_numbers():
    A, b = torch.linspace(1, 2, 24).double().view(8, 3).square(), B * (1 + 2j)
    g = compiled(lambda A, b: fl.lstsq(fl.LinearOperator(torch.matmul, A, 3), b))
    torch.testing.assert_close(g(A, b), fl.lstsq(fl.LinearOperator(torch.matmul, A, 3), b))


def test_a_graph_is_made_for_each_size_and_not_for_each_number():
    made = []

    def backend(graph, examples):
        made.append(graph)
        return graph

    g = compiled(lambda s, b, d: fl.lstsq(fl.LinearOperator(tall, s, len(s)), b, damp=d), backend)
    for _ in range(2):
        for n in (4, 5, 6):
            s, b, d = torch.rand(n).double() + 1, torch.rand(2 * n).double(), torch.rand(()).double()
            torch.testing.assert_close(g(s, b, d), fl.lstsq(fl.LinearOperator(tall, s, n), b, damp=d))
    assert len(made) == 3


@pytest.mark.parametrize("of", [lambda g: g, torch.func.grad], ids=["value", "gradient"])
def test_a_matvec_that_has_changed_since_the_graph_was_made_is_told(of):
    FACTOR[0] = 1.0
    g = compiled(of(lambda s: fl.lstsq(fl.LinearOperator(with_factor, s, 4), B).square().sum()))
    g(S)
    FACTOR[0] = 2.0
    with pytest.raises(ValueError, match=r"matvec gives other numbers than when torch\.compile made the graph"):
        g(S)


def test_without_fullgraph_any_matvec_runs_beside_the_graph():
    def matvec(scale, x):
        return torch.from_numpy(np.concatenate([scale.numpy() * x.numpy(), x.numpy()]))

    def rmatvec(scale, y):
        return torch.from_numpy(scale.numpy() * y.numpy()[:4] + y.numpy()[4:])

    def g(s, b):
        return 2 * fl.lstsq(fl.LinearOperator(matvec, s, 4, rmatvec=rmatvec), 2 * b)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(g, backend="aot_eager")(S, B), g(S, B))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("fl.lstsq(fl.LinearOperator(by_numpy, s, 4, rmatvec=by_numpy), s)", "needs a matvec that is made of torch"),
        ("fl.lstsq(fl.LinearOperator(beside, s, 4), s)", "needs a matvec that is made of torch"),
        ("fl.lstsq(fl.LinearOperator(Plain().matvec, s, 4), s)", "cannot take a method"),
        ("fl.lstsq(fl.LinearOperator(times, s, 4) + fl.LinearOperator(times, s, 4), s)", "cannot make sums"),
        ("fl.lstsq(fl.JacobianOperator(torch.sin, s), s)", "cannot take a JacobianOperator"),
        ("fl.lstsq(fl.LinearOperator(closing, s, 4), s)", "without a closure or defaults"),
        ("fl.lstsq(fl.LinearOperator(partial(closing), s, 4), s)", "without a closure or defaults"),
        ("fl.lstsq(fl.LinearOperator(defaulting, s, 4), s)", "without a closure or defaults"),
        ("fl.lstsq(adjoint, s)", "an adjoint without rmatvec"),
        ("fl.lstsq(stack, torch.cat([s, s]))", "params of tensors in dicts, lists and tuples"),
        ("fl.lstsq(fl.LinearOperator(sums, s, 4), s[:2], damp=1.0, weights=s[:2])", r"damp.expand\(4\)"),
        ("fl.lstsq(fl.LinearOperator(times, s, 4), s, bounds=(0, 1))", "cannot take bounds="),
    ],
)
def test_what_a_whole_graph_cannot_have_is_one_error(call, message):
    start = """
        s = torch.ones(4, dtype=torch.float64)
        def times(p, x):
            return p * x
        def sums(p, x):
            return (p * x).view(2, 2).sum(1)
        def by_numpy(p, x):
            return torch.from_numpy(p.numpy() * x.numpy())
        def beside(p, x):
            return p * x * s
        def closed(k):
            return lambda p, x: k * p * x
        def defaulting(p, x, k=2.0):
            return k * p * x
        from functools import partial
        closing = closed(2.0)
        class Plain:
            def matvec(self, p, x):
                return p * x
        adjoint = fl.LinearOperator(times, s, 4).H
        stack = fl.vstack([fl.LinearOperator(times, s, 4), fl.eye(4)])
        try:
    """
    done = run(
        start + f"        print(torch.compile(lambda s: {call}, backend='aot_eager', fullgraph=True)(s))\n"
        "        except Exception as error:\n            print('refused:', error)\n"
    )
    assert done.stdout.startswith("refused:"), done.stderr
    assert re.search(message, done.stdout), done.stdout
