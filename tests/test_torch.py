"""Faults of torch that this library works around, or tells its users of; each test fails where torch has mended one.

Then what stands against it may go: the file named in the test, and the sentence in the README.
"""

import pytest
import torch
from test_compile import run
from torch.func import grad, jacfwd

X = torch.linspace(0.5, 1.5, 4, dtype=torch.float64)


class Cube(torch.autograd.Function):
    """x^3, with a rule for forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)
        ctx.save_for_backward(*inputs)

    @staticmethod
    def jvp(ctx, x_dot):
        return 3 * ctx.saved_tensors[0] ** 2 * x_dot

    @staticmethod
    def backward(ctx, y_bar):
        return 3 * ctx.saved_tensors[0] ** 2 * y_bar


def mended_if(fails, what):
    """Fail where `fails`, a call that asserts what is right, does not."""
    try:
        fails()
    except Exception:
        return
    pytest.fail(f"torch {torch.__version__} has mended {what}")


def test_second_forward_derivatives_of_a_function_are_dropped():
    """pytorch#197867; torch_func/primitive.py unwraps by itself."""

    def fails():
        got = jacfwd(jacfwd(lambda x: Cube.apply(x).sum()))(X)
        torch.testing.assert_close(got, torch.diag(6 * X))

    mended_if(fails, "nested forward mode of autograd.Function")


COMPILED = {
    "vmap(jacfwd) with dynamic=True": """
compiled = torch.compile(vmap(jacfwd(lambda x, y: x.sin() * y.sum())), backend="eager", dynamic=True)
compiled(X.expand(3, -1).clone(), X.expand(3, -1).clone())
""",
    "vmap(hessian)": """
compiled = torch.compile(vmap(hessian(lambda x: x.sin().sum())), fullgraph=True, backend="eager")
torch.testing.assert_close(compiled(X[None]), torch.diag(-X.sin())[None])
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_what_is_not_compiled(name):
    """README, "What composes": an internal assertion, which in this process would spoil tests that come later.

    What Dynamo leaves on the way is undone when it is collected as garbage, in the midst of some other transformation.
    """
    start = """
from torch.func import hessian, jacfwd, vmap
X = torch.linspace(0.5, 1.5, 4, dtype=torch.float64)
print("begun")
"""
    ended = run(start + COMPILED[name])
    assert "begun" in ended.stdout
    assert ended.returncode, f"torch {torch.__version__} has mended compiled {name}"


def test_nested_forward_mode_of_a_dense_solve_is_wrong():
    """README, "What composes"."""
    A = torch.tensor([[2.0, 0.5], [0.3, 1.0]], dtype=torch.float64)

    def fails():
        def f(t):
            return torch.linalg.solve(A + t * torch.eye(2, dtype=t.dtype), A[:, 0]).sum()

        exact = grad(grad(f))(torch.tensor(0.1, dtype=torch.float64))
        got = jacfwd(jacfwd(f))(torch.tensor(0.1, dtype=torch.float64))
        torch.testing.assert_close(got, exact)

    mended_if(fails, "nested forward mode of torch.linalg.solve")


def test_sparse_tensors_have_no_strides_under_a_transformation():
    """pytorch#136357; sparse tensors are made on plain tensors only, in sparse/plain_products.py."""
    A = torch.eye(3, dtype=torch.float64).to_sparse_csr()

    def fails():
        grad(lambda x: (A @ x).sum())(torch.ones(3, dtype=torch.float64))

    mended_if(fails, "CSR tensors under torch.func")
