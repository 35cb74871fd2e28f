"""A matrix whose values are a parameter of a torch.nn.Module, as the docstring of SparseMatrix says."""

import copy
import io

import pytest
import torch
from torch.func import functional_call, grad

import functional_lstsq as fl

PATTERN = fl.SparsePattern(torch.tensor([[0, 1, 1, 2, 2, 3], [0, 0, 1, 1, 2, 2]]), (4, 3))
VALUES, B = torch.tensor([1.0, -1, 1, -1, 1, 1.5]), torch.tensor([1.0, 2, 2.5, 5.4])


class Fit(torch.nn.Module):
    def __init__(self, A):
        super().__init__()
        self.values, self.pattern = torch.nn.Parameter(A.values), A.pattern

    def forward(self, b):
        self.pattern = self.pattern.to(self.values.device)
        return fl.lstsq(fl.SparseMatrix(self.values, self.pattern), b)


@pytest.fixture
def layer():
    return Fit(fl.SparseMatrix(VALUES, PATTERN))


def test_it_shows_its_parameter(layer):
    assert [name for name, _ in layer.named_parameters()] == ["values"]


def test_it_moves_to_another_dtype(layer):
    x = layer.double()(B.double())
    assert x.dtype == torch.float64
    assert torch.equal(x, fl.lstsq(fl.SparseMatrix(VALUES.double(), PATTERN), B.double()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_moves_to_another_device(layer):
    assert torch.allclose(layer.cuda()(B.cuda()).cpu(), fl.lstsq(fl.SparseMatrix(VALUES, PATTERN), B))


def test_a_copy_has_values_of_its_own(layer):
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.values.mul_(2)
    assert torch.equal(layer.values, VALUES)
    torch.testing.assert_close(other(B), layer(B) / 2)


def test_it_is_saved_in_a_state_dict(layer):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = Fit(fl.SparseMatrix(torch.zeros_like(VALUES), PATTERN))
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(B), layer(B))


def test_it_is_trained(layer):
    wanted = torch.tensor([1.0, 2.0, 3.0])
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (layer(B) - wanted).square().sum()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3


def test_its_gradient_by_functional_call_is_that_by_the_values(layer):
    got = grad(lambda p: functional_call(layer, p, (B,)).square().sum())(dict(layer.named_parameters()))
    want = grad(lambda v: fl.lstsq(fl.SparseMatrix(v, PATTERN), B).square().sum())(VALUES)
    torch.testing.assert_close(got["values"].detach(), want)
