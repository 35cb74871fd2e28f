"""Settings of a solve and the texts that stand for them in graphs: read back, and dropped when nothing needs them."""

import gc

import pytest
import torch

import functional_lstsq as fl
from functional_lstsq.linear import settings
from functional_lstsq.linear.settings import Settings, settings_of, text_for_graph


@pytest.mark.parametrize(
    "solver",
    [
        None,
        fl.Dense(accept=1e-4),
        fl.Direct(memory=3e9),
        fl.CGLS(tolerance=1e-13, max_iterations=7),
        fl.Auto(dense_columns=3, cgls=fl.CGLS(accept=0.1), direct=fl.Direct(memory=1)),
    ],
    ids=repr,
)
def test_a_text_says_all_of_a_solver_of_this_library(solver):
    asked = Settings(solver, minimum_norm=True, precision=2.0**-23, wide=True)
    assert asked.solver == (solver or fl.Auto())
    settings._read.cache_clear()
    assert settings_of(asked.text) == asked
    assert settings_of(asked) is asked


@pytest.mark.parametrize("given", [{"callback": print}, {"preconditioner": fl.BlockJacobi(torch.arange(2))}], ids=list)
def test_a_solver_of_one_process_is_found_as_long_as_its_settings_live(given):
    asked = Settings(fl.CGLS(**given), minimum_norm=False, precision=2.0**-52)
    text = asked.text
    assert settings_of(text) is asked
    assert asked.text == text
    del asked
    gc.collect()
    with pytest.raises(ValueError, match="which does not exist here; for graphs that are loaded by other processes"):
        settings_of(text)


def test_a_compiled_graph_keeps_its_settings_once():
    solver, before = fl.CGLS(callback=lambda *_: None), len(settings._compiled)
    texts = {text_for_graph(solver, False, 2.0**-52, False, True, False, None, "lstsq") for _ in range(3)}
    assert len(texts) == 1
    assert len(settings._compiled) == before + 1
    gc.collect()
    assert settings_of(*texts).solver is solver


def test_a_derivative_finds_a_solver_that_nothing_else_holds():
    A = torch.eye(3, 2, dtype=torch.float64).to_sparse().requires_grad_()
    calls = []
    x = fl.lstsq(A, torch.ones(3, dtype=torch.float64), solver=fl.CGLS(callback=lambda *_: calls.append(1)))
    gc.collect()
    before = len(calls)
    x.sum().backward()
    assert len(calls) > before
