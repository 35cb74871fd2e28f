"""torch.compile over every transformation: one graph, the same numbers as without it, one factor; torch.export."""

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.utils._pytree as torch_pytree
from helpers import close, problem
from test_transforms import Counting
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap

import functional_lstsq as fl

PATTERN, VALUES, B = problem(7, 3)
MANY_VALUES, MANY_B = torch.stack([VALUES, VALUES + 0.1]), torch.stack([B, B + 1])


def lstsq(v, b, **options):
    return fl.lstsq(fl.SparseMatrix(v, PATTERN), b, **options)


def loss(v, b, **options):
    return lstsq(v, b, **options).sin().sum()


def of_matrix(A, b):
    return fl.lstsq(A, b).sin().sum()


def everything(v, b):
    solution = fl.solve(fl.SparseMatrix(v, PATTERN), b)
    return solution.x, solution.residual, tuple(solution.info)


def weighted(v, b):
    return loss(v, b, damp=0.3, weights=b.abs() + 1)


def adjoint(v, b):
    x, pull = vjp(lstsq, v, b)
    return x, pull(x.sin())


# name: (function, what it is transformed by and called with); the first ones on inductor too, which takes seconds each.
COMPILED = {
    "lstsq": (lstsq, "vb"),
    "solve": (everything, "vb"),
    "grad": (grad(loss, (0, 1)), "vb"),
    "grad by a SparseMatrix": (lambda v, b: grad(of_matrix)(fl.SparseMatrix(v, PATTERN), b).values, "vb"),
    "SparseMatrix as argument": (grad(of_matrix), "Ab"),
    "vmap by b": (vmap(lstsq, (None, 0)), "vB"),
    "vmap by values and b": (vmap(lstsq), "VB"),
    "vmap(grad)": (vmap(grad(loss)), "VB"),
    "jacrev": (jacrev(lstsq), "vb"),
    "jacfwd": (jacfwd(lstsq), "vb"),
    "hessian": (hessian(loss), "vb"),
    "grad, damp and weights": (grad(weighted, (0, 1)), "vb"),
    "vmap by values": (vmap(lstsq, (0, None)), "Vb"),
    "grad_and_value": (grad_and_value(loss), "vb"),
    "jacrev by b": (jacrev(lstsq, 1), "vb"),
    "jacfwd by b": (jacfwd(lstsq, 1), "vb"),
    "jvp": (lambda v, b: jvp(lstsq, (v, b), (v.cos(), b.sin())), "vb"),
    "vjp": (adjoint, "vb"),
    "jacrev(jacrev)": (jacrev(jacrev(loss)), "vb"),
    "jacfwd(jacfwd)": (jacfwd(jacfwd(loss), 1), "vb"),
    "jacrev(jacfwd)": (jacrev(jacfwd(loss)), "vb"),
    "vmap(jacrev)": (vmap(jacrev(lstsq)), "VB"),
    "vmap(jacfwd)": (vmap(jacfwd(lstsq)), "VB"),
    "vmap(jacrev(jacfwd))": (vmap(jacrev(jacfwd(loss))), "VB"),
    "grad(vmap)": (grad(lambda v, b: vmap(lstsq)(v, b).sin().sum()), "VB"),
    "third derivative": (jacfwd(jacfwd(jacfwd(loss))), "vb"),
    "third derivative, reverse": (grad(lambda v, b: grad(lambda v: grad(loss)(v, b).sum())(v).sum()), "vb"),
}
ON_INDUCTOR = list(COMPILED)[:11]
INPUTS = {"v": VALUES, "b": B, "V": MANY_VALUES, "B": MANY_B, "A": fl.SparseMatrix(VALUES, PATTERN)}
CELLS = [("aot_eager", name) for name in list(COMPILED)[::2]] + [("inductor", name) for name in ON_INDUCTOR[:4]]
CELLS += [pytest.param("aot_eager", name, marks=pytest.mark.slow) for name in list(COMPILED)[1::2]]
CELLS += [pytest.param("eager", name, marks=pytest.mark.slow) for name in COMPILED]
CELLS += [pytest.param("inductor", name, marks=pytest.mark.slow) for name in ON_INDUCTOR[4:]]


def same(got, want, tolerance=1e-10):
    for a, b in zip(torch_pytree.tree_leaves(got), torch_pytree.tree_leaves(want), strict=True):
        close(*(t.to(torch.promote_types(t.dtype, torch.float64)) for t in (a, b)), tolerance)


@pytest.mark.parametrize(("backend", "name"), CELLS)
def test_compiled_is_as_eager(backend, name):
    torch._dynamo.reset()
    function, kinds = COMPILED[name]
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    inputs = [INPUTS[kind] for kind in kinds]
    for _ in range(2):
        same(compiled(*inputs), function(*inputs))
        inputs = torch_pytree.tree_map(lambda tensor: 1.1 * tensor, inputs)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.complex128], ids=str)
@pytest.mark.parametrize("solver", [fl.Dense(), fl.Direct(), fl.CGLS(), None], ids=repr)
@pytest.mark.parametrize("shape", [(7, 3), (3, 7)], ids=str)
def test_compiled_options(shape, solver, dtype):
    """The first call of a graph runs in a mode of its own, in which lazy conjugates were lost."""
    torch._dynamo.reset()
    pattern, values, b = problem(*shape, dtype=dtype)
    B = torch.stack([b, b + 1], 1)

    def f(v, b):
        A = fl.SparseMatrix(v, pattern)
        damped = fl.lstsq(A, b, damp=0.1, weights=b.detach().abs().sum(1) + 1, solver=solver)
        return (fl.lstsq(A, b, solver=solver) * damped.conj()).sum().abs()

    function = grad_and_value(f, (0, 1))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        same(compiled(values, B), function(values, B))


@pytest.mark.parametrize(
    "transform", [lambda f: f, lambda f: grad(lambda v, A, b: f(v, A, b).sum())], ids=["f", "grad"]
)
def test_graphs_for_shapes(transform):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = transform(lambda v, A, b: fl.lstsq(fl.SparseMatrix(v, A.pattern), b))
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for m, n in ((12, 5), (20, 7), (31, 9), (44, 6)):
        pattern, values, b = problem(m, n)
        for k in (0, 2, 3):
            right = b if k == 0 else torch.stack([b + i for i in range(k)], 1)
            arguments = values, fl.SparseMatrix(values, pattern), right
            same(compiled(*arguments), function(*arguments))
    assert counter.frame_count <= 4  # b of one and of two dimensions, each first with its sizes and then without


def test_damping_by_numbers_makes_no_new_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda v, damp: lstsq(v, B, damp=damp), backend=counter, fullgraph=True)
    for damp in (0.1, 0.2, 0.5, 0.7, 1.5):
        close(compiled(VALUES, damp), lstsq(VALUES, B, damp=damp), 1e-10)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_graph_keeps_its_factor(backend):
    solver = Counting()
    for function in (grad(lambda v: loss(v, B, solver=solver)), jacfwd(lambda v: lstsq(v, B, solver=solver))):
        torch._dynamo.reset()
        compiled = torch.compile(function, backend=backend, fullgraph=True)
        for _ in range(2):
            compiled(VALUES)
            assert solver.spent()[:2] == (1, 2)
    torch._dynamo.reset()
    compiled = torch.compile(lambda v: loss(v, B, solver=solver), backend=backend, fullgraph=True)
    compiled(VALUES.clone().requires_grad_()).backward()
    assert solver.spent() == (1, 2, 2)


def test_bad_numbers_are_refused_by_compiled_graphs():
    torch._dynamo.reset()
    compiled = torch.compile(lstsq, backend="aot_eager", fullgraph=True)
    for options, words in (
        ({"damp": torch.tensor(-1.0)}, "damp must not be negative, got -1"),
        ({"x0": torch.full((3,), torch.nan, dtype=torch.float64)}, "x0 .* holds NaN"),
        ({"weights": -torch.ones(7, dtype=torch.float64)}, "weights must not be negative, got -1"),
    ):
        with pytest.raises(ValueError, match=words):
            compiled(VALUES, B, **options)
    with pytest.raises(ValueError, match="holds NaN"):
        compiled(VALUES, B * torch.nan)
    with pytest.raises(fl.RankDeficientError):
        compiled(VALUES * 0, B)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_values_taken_from_a_torch_tensor_compile(layout):
    torch._dynamo.reset()
    A = fl.SparseMatrix.from_torch(fl.SparseMatrix(VALUES, PATTERN).to_torch(layout))
    compiled = torch.compile(lambda v: fl.lstsq(fl.SparseMatrix(v, A.pattern), B), backend="aot_eager", fullgraph=True)
    close(compiled(A.values), fl.lstsq(A, B), 1e-10)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.parametrize("study", ["lstsq", "residual", "leave_one_out"])
def test_sparse_tensors_end_a_graph_and_are_differentiated_all_the_same(layout, study):
    torch._dynamo.reset()
    A = fl.SparseMatrix(VALUES, PATTERN).to_torch(layout)
    weights = torch.linspace(0.5, 2.0, 7, dtype=torch.float64)
    studies = {
        "lstsq": lambda w: fl.lstsq(A, B, weights=w),
        "residual": lambda w: fl.solve(A, w * B).residual,
        "leave_one_out": lambda w: fl.leave_one_out(A, B, weights=w)[0],
    }

    def loss(w):
        return studies[study](w).square().sum()

    wanted = torch.func.grad(loss)(weights)
    close(torch.compile(torch.func.grad(loss), backend="eager")(weights), wanted, 1e-10)
    close(torch.func.grad(torch.compile(loss, backend="eager"))(weights), wanted, 1e-10)


class Model(torch.nn.Module):
    """Values of A from a small network, and the solution."""

    def __init__(self):
        super().__init__()
        self.register_buffer("b", B)
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, len(VALUES), dtype=torch.float64)

    def forward(self, features):
        return fl.lstsq(fl.SparseMatrix(VALUES + 0.1 * self.layer(features).tanh(), PATTERN), self.b)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_training_step_compiles_whole(backend):
    torch._dynamo.reset()
    model, features = Model(), torch.linspace(-1, 1, 4, dtype=torch.float64)

    def step(parameters, features):
        gradients, value = grad_and_value(lambda p: functional_call(model, p, (features,)).square().sum())(parameters)
        return {name: p - 0.1 * gradients[name] for name, p in parameters.items()}, value

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    eager = fast = {name: p.detach() for name, p in model.named_parameters()}
    for _ in range(3):
        (eager, a), (fast, b) = step(eager, features), compiled(fast, features)
        close(a, b, 1e-10)
    same(fast, eager)


def run(program):
    """Run in a process of its own: some failures of Dynamo spoil what it compiles afterwards."""
    code = "import torch\nimport functional_lstsq as fl\n" + textwrap.dedent(program)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    "call",
    [  # the first two are torch's own: they fail so for dense functions too
        pytest.param("attempt(torch.vmap(torch.func.hessian(f)), torch.stack([v, v]))", marks=pytest.mark.slow),
        pytest.param("attempt(lambda v: torch.func.linearize(f, v)[1](v), v)", marks=pytest.mark.slow),
        "attempt(lambda A: fl.lstsq(A, b), torch.eye(3, 2, dtype=torch.float64).to_sparse())",
    ],
    ids=["vmap(hessian)", "linearize", "COO"],
)
def test_what_dynamo_cannot_do_is_an_error(call):
    start = """
        pattern = fl.SparsePattern(torch.tensor([[0, 1, 2], [0, 1, 1]]), (3, 2))
        v, b = torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        f = lambda v: fl.lstsq(fl.SparseMatrix(v, pattern), b).sin().sum()
        def attempt(g, x):
            try:
                torch.compile(g, backend="aot_eager", fullgraph=True)(x)
            except Exception as error:
                print("refused:", type(error).__name__)
    """
    result = run(textwrap.dedent(start) + call)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("refused:"), (result.stdout, result.stderr[-500:])


@pytest.mark.parametrize("strict", [True, False])
def test_export_is_right_in_another_process(strict, tmp_path):
    """Loaded where other solvers were used before, and differentiated there."""
    solver = fl.CGLS(tolerance=1e-13)

    class Solving(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.values = torch.nn.Parameter(VALUES.clone())

        def forward(self, b):
            return fl.solve(fl.SparseMatrix(self.values, PATTERN), b, solver=solver)

    model = Solving()
    program = torch.export.export(model, (B,), strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    x = lstsq(VALUES, B, solver=solver)
    gradient = grad(loss)(VALUES, B, solver=solver)
    torch.save({"b": B, "x": x, "gradient": gradient}, tmp_path / "want.pt")
    result = run(f"""
        A = torch.eye(3, 2, dtype=torch.float64).to_sparse()
        for tolerance in (1e-2, 1e-3, 1e-4):
            fl.lstsq(A, torch.ones(3, dtype=torch.float64), solver=fl.CGLS(tolerance=tolerance))
        module = torch.export.load({str(tmp_path / "program.pt2")!r}).module()
        want = torch.load({str(tmp_path / "want.pt")!r})
        solution = module(want["b"])
        solution.x.sin().sum().backward()
        print(float((solution.x - want["x"]).abs().max()), solution.info.method, solution.info.status)
        print(float((module.values.grad - want["gradient"]).abs().max()))
    """)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first.split()[1:] == ["cgls", "converged"]
    assert float(first.split()[0]) < 1e-12
    assert float(second) < 1e-12


def test_export_with_a_matrix_as_argument(tmp_path):
    class Solving(torch.nn.Module):
        def forward(self, A, b):
            return fl.lstsq(A, b)

    A = fl.SparseMatrix(VALUES, PATTERN)
    program = torch.export.export(Solving(), (A, B))
    close(program.module()(A, B), lstsq(VALUES, B), 1e-12)


def test_an_exported_program_says_when_its_solver_is_not_there(tmp_path):
    class Solving(torch.nn.Module):
        def forward(self, v):
            return lstsq(v, B, solver=fl.CGLS(callback=print))

    torch.export.save(torch.export.export(Solving(), (VALUES,)), tmp_path / "program.pt2")
    result = run(f"torch.export.load({str(tmp_path / 'program.pt2')!r}).module()(torch.ones({len(VALUES)}).double())")
    assert "use solvers of this library, without a callback" in result.stderr
