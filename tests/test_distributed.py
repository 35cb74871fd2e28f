"""Rows on many ranks: processes that sharded.py starts, held against one process that has all rows."""

import os
import subprocess
import sys

import pytest
import test_table
import torch
import torch.multiprocessing
from helpers import close, dense, problem
from on_ranks import compare, fixtures
from sharded import SPLITS, work_until_lost
from sharded_cases import CASES
from torch.fx.experimental.proxy_tensor import make_fx

import functional_lstsq as fl

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch has no gloo"
)


OF_TABLE = problem(test_table.M, test_table.N)


on_ranks, alone = fixtures(CASES, "sharded_cases")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("split", ["even", *(pytest.param(s, marks=pytest.mark.slow) for s in SPLITS if s != "even")])
def test_as_in_one_process(on_ranks, alone, split, name):
    compare(name, split, *alone(name), [found[name] for found in on_ranks(split)])


REFUSALS = {  # name: (what is raised, words of the message)
    "NaN in b": (ValueError, "on rank 1: b must be finite, got NaN in it"),
    "NaN in b, within grad": (ValueError, "on rank 1: b must be finite, got NaN in it"),
    "b of another dtype, within vmap": (ValueError, "got torch.float64 on rank 0 and torch.complex128 on rank 1"),
    "NaN in A": (ValueError, "on rank 1: A must be finite, got NaN in it"),
    "b of another size": (
        ValueError,
        r"on rank 1: b must have shape (20,) or (20, k) for A of shape (20, 8), got (19,)",
    ),
    "b of another dtype": (ValueError, "got torch.float64 on rank 0 and torch.complex128 on rank 1"),
    "b of more columns": (
        ValueError,
        "the columns of b must be the same on all ranks, got () on rank 0 and (2,) on rank 1",
    ),
    "negative weights": (ValueError, "on rank 1: weights must not be negative"),
    "infinite weights": (fl.RankDeficientError, "must be linearly independent and neither contradict each other"),
    "dependent constraints": (fl.RankDeficientError, "got 2, of rank 1 (rows 3, 23 take part in a dependence)"),
    "weights on one rank": (ValueError, "whether there are weights must be the same on all ranks, got False on rank 0"),
    "another n": (
        ValueError,
        "the number of columns of A must be the same on all ranks, got 8 on rank 0 and 7 on rank 1",
    ),
    "another dtype of A": (ValueError, "the dtype of A must be the same on all ranks, got torch.float64 on rank 0"),
    "no matrix": (
        TypeError,
        "on rank 1: A must be a SparseMatrix, a LinearOperator or a torch sparse tensor of this rank's rows, got Ten",
    ),
    "another solver": (ValueError, "solver, refine, rank_deficient and rank_tolerance must be the same on all ranks"),
    "another damp": (ValueError, "damp must be the same on all ranks"),
    "another x0": (ValueError, "x0 must be the same on all ranks"),
    "x that is not shared": (ValueError, "the cotangent of x, which is shared"),
    "NaN from a loss": (ValueError, "what came in for a derivative holds NaN or infinity"),
    "bounds of an operator": (ValueError, "a sharded matrix of operators allows no bounds"),
    "other bounds": (ValueError, "the upper bound must be the same on all ranks"),
    "bounds that are none": (TypeError, "on rank 1: the upper bound must be a number or a dense real tensor"),
    "bounds that are touched": (fl.ConvergenceError, "x has no derivative: unknowns at their bounds"),
    "robust": (ValueError, "a sharded matrix allows no robust"),
    "Direct of an operator": (TypeError, "solver must be CGLS() or None for a LinearOperator, got Direct("),
    "a solver of one's own": (
        TypeError,
        "solver must be Auto(), Dense(), Direct(), CGLS() or None for a sharded matrix, got ",
    ),
    "no memory for a factor": (fl.TooLarge, "was not started: it would take about"),
    "no memory for the union": (fl.TooLarge, "a sparse factor was not started: A^H A would take"),
    "no memory for A^H A": (torch.linalg.LinAlgError, "on rank 1: the solve did not get the memory that it needs"),
    "a preconditioner": (ValueError, "a sharded matrix allows no preconditioner of CGLS"),
    "a callback": (ValueError, "a sharded matrix allows no callback of CGLS"),
    "factors of an operator": (TypeError, "A must have entries, got a ShardedMatrix of operators"),
    "leverage of an operator": (TypeError, "A must have entries, got a ShardedMatrix of operators"),
    "a sandwich": (TypeError, "covariances without b, kind and groups"),
    "NaN in a graph": (ValueError, "on rank 1: b of the augmented system holds NaN or infinity"),
    "negative weights in a graph": (ValueError, "on rank 1: weights must not be negative"),
    "another dtype in a graph": (ValueError, "what is solved for must be the same on all ranks"),
    "a residual that is none": (TypeError, "on rank 1: residual must be callable, got None"),
    "a fit of NaN": (ValueError, "residual must be finite at x0, got NaN or infinity"),
    "a fit without a minimum": (fl.ConvergenceError, "iterations, the limit, without a minimum"),
    "a fit of too few": (ValueError, "at least as many numbers on all ranks as x0 has, 3, got 1"),
    "another start": (ValueError, "x0 must be the same on all ranks"),
    "samples": (ValueError, "a sharded matrix allows no samples"),
    "other columns": (ValueError, "columns must be the same on all ranks, got [1] on rank 0 and [0] on rank 1"),
    "columns that are none": (ValueError, "on rank 1: columns must lie between 0 and 7, got 9 to 9"),
    "wide": (
        ValueError,
        "a sharded matrix with fewer rows than columns needs damp, or rank_deficient='minimum_norm', got shape (6, 8)",
    ),
    "an operator and entries": (ValueError, "whether A is a LinearOperator must be the same on all ranks"),
    "a matvec that fails": (RuntimeError, "on rank 1: of this rank alone"),
    "a matvec that is not linear": (ValueError, "matvec must be linear, got a relative difference of"),
    "an rmatvec of another matrix": (ValueError, "rmatvec must be the adjoint of matvec, got a relative difference"),
    "NaN in params": (ValueError, "on rank 1: A must be finite, got NaN in it"),
    "Dense of an operator": (TypeError, "solver must be CGLS() or None for a LinearOperator, got Dense("),
    "infinite weights of an operator": (ValueError, "on rank 1: weights must be finite"),
    "no full rank": (fl.RankDeficientError, "has rank 1, not full rank 2"),
    "no full rank by CGLS": (fl.RankDeficientError, "has rank below 2, not full rank 2"),
    "a total of integers": (TypeError, "t must be a floating or complex dense tensor, got torch.int64"),
    "no group": (TypeError, "group must be a group of torch.distributed or None, got 'all'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_all_ranks_raise_the_same_error(on_ranks, name):
    (kind, message), other = (of_rank[name] for of_rank in on_ranks("even"))
    assert (kind, message) == other
    assert kind == REFUSALS[name][0].__name__
    assert any(words in message for words in REFUSALS[name][1].split("|"))


@pytest.mark.parametrize("how", ["dies", "sleeps", "raises"])
def test_a_lost_rank_ends_the_others_within_the_timeout(tmp_path, how):
    context = torch.multiprocessing.spawn(work_until_lost, (2, str(tmp_path), how), 2, join=False)
    for process in context.processes:
        process.join(30)
    told, seconds = torch.load(tmp_path / "0.pt")
    assert told.startswith("rank 0 of 2 lost another one: it died, raised an error of its own, did not come within")
    assert seconds < 5


def test_without_a_group_it_says_how_to_make_one():
    A = fl.eye(2)
    with pytest.raises(RuntimeError, match="not initialised: call torch"):
        fl.distributed.shard_rows(A)


@pytest.fixture
def group_of_one():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
def test_sums_over_ranks_compile_in_one_graph():
    def gradient(theta):
        return torch.func.grad(lambda theta: fl.distributed.total(fl.distributed.shared(theta).sin().sum()))(theta)

    theta = torch.linspace(0, 1, 4, dtype=torch.float64)
    assert torch.equal(torch.compile(gradient, fullgraph=True, backend="eager")(theta), theta.cos())


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["lstsq", "grad", "vmap"])
def test_a_solve_compiles_in_one_graph(backend, name):
    pattern, values, b = problem(12, 4)
    A = fl.distributed.shard_rows(fl.SparseMatrix(values, pattern))
    function = {
        "lstsq": fl.lstsq,
        "grad": lambda A, b: torch.func.grad(lambda A: fl.lstsq(A, b).sin().sum())(A).values,
        "vmap": lambda A, b: torch.vmap(lambda b: fl.lstsq(A, b))(torch.stack([b, b.cos()])),
    }[name]
    torch._dynamo.reset()
    close(torch.compile(function, fullgraph=True, backend=backend)(A, b), function(A, b), 1e-12)


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("kind", ["SparseMatrix", "LinearOperator"])
@pytest.mark.parametrize("name", [*test_table.BY_B, *test_table.BY_A])
def test_every_transformation_of_the_table(name, kind):
    pattern, values, b = OF_TABLE
    D = dense(values, pattern)

    def compute():
        A = fl.distributed.shard_rows(test_table.KINDS[kind](values))
        if name in test_table.BY_B:
            return test_table.BY_B[name](lambda b: fl.lstsq(A, b), b)
        found = test_table.BY_A[name](lambda A: fl.lstsq(A, b), A)
        return found if name == "vmap by A" else torch.utils._pytree.tree_leaves(found)[0]

    refused = {
        "functionalize": "NYI: Functionalize rule",
        "linearize": "linearize cannot record a sharded matrix of oper",
    }
    if name == "functionalize" or (name, kind) == ("linearize", "LinearOperator"):
        with pytest.raises((RuntimeError, TypeError), match=refused[name]):
            compute()
        return
    if name in test_table.BY_B:
        way = test_table.BY_B["call" if name == "inference mode" else name]
        want = way(lambda b: torch.linalg.pinv(D) @ b, b)
    else:
        want = test_table.BY_A[name](lambda v: torch.linalg.pinv(dense(v, pattern)) @ b, values)
    close(compute(), want, 1e-10)


@pytest.mark.usefixtures("group_of_one")
def test_a_solve_is_exported_and_recorded():
    pattern, values, b = problem(12, 4)
    A = fl.distributed.shard_rows(fl.SparseMatrix(values, pattern))

    class Program(torch.nn.Module):
        def forward(self, b):
            return fl.lstsq(A, b, damp=0.1)

    program = torch.export.export(Program(), (b,)).module()
    close(program(b.cos()), fl.lstsq(A, b.cos(), damp=0.1), 1e-12)
    by_b = torch.func.grad(lambda b: program(b).sin().sum())(b)
    close(by_b, torch.func.grad(lambda b: fl.lstsq(A, b, damp=0.1).sin().sum())(b), 1e-12)
    recorded = make_fx(lambda b: fl.lstsq(A, b, damp=0.1))(b)
    close(recorded(b.cos()), fl.lstsq(A, b.cos(), damp=0.1), 1e-12)


@pytest.mark.usefixtures("group_of_one")
def test_what_no_whole_graph_takes_is_refused():
    A, b = fl.distributed.shard_rows(fl.eye(2)), torch.ones(2)
    by_products = fl.distributed.shard_rows(fl.LinearOperator(lambda d, x: d * x, torch.ones(2), 2))
    for given, options in ((by_products, {}), (fl.factorize(A), {}), (A, {"bounds": (0, 1)})):
        with pytest.raises(RuntimeError, match=r"torch\.compile cannot take .* a sharded matrix"):
            torch.compile(lambda b, A=given, o=options: fl.lstsq(A, b, **o), fullgraph=True, backend="eager")(b)


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize(
    "function", [lambda A: fl.leave_one_out(A, torch.ones(2)), lambda A: fl.weakest(A, 1), lambda A: fl.vstack([A])]
)
def test_what_takes_no_sharded_matrix_says_so(function):
    with pytest.raises(TypeError, match=r"must be .* torch sparse tensors?, got .*ShardedMatrix"):
        function(fl.distributed.shard_rows(fl.eye(2)))


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("name", ["b", "weights"])
def test_a_dtensor_beside_rows_of_one_place_is_refused(name):
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    rows = DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (1,)), [Shard(0)])
    given = {"b": torch.ones(2), name: rows}
    message = rf"{name} must be a Tensor, got a DTensor, .* functional_lstsq\.distributed\.shard_rows\(A\)"
    with pytest.raises(TypeError, match=message):
        fl.lstsq(fl.eye(2), **given)
    with pytest.raises(TypeError, match=message):
        torch.func.grad(lambda t: fl.lstsq(fl.eye(2), **{**given, name: t}).sum())(rows)


ENDS = """
import os, torch, functional_lstsq as fl
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
torch.func.grad(lambda t: fl.distributed.total(t).sum())(torch.ones(3))
torch.distributed.destroy_process_group()
print(sum("gloo" in open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="the system does not tell of threads")
def test_threads_of_a_group_end_with_it():
    """Those that are left at the end of a process abort it now and then, as one freed a tensor meanwhile."""
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", ENDS], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["0"]
