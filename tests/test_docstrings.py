"""Every public docstring has examples that run as pasted into a fresh interpreter."""

import doctest
import inspect
import io

import pytest

import functional_lstsq as fl

# What functions give and raise; an alias; what is explained where it is used.
_WITHOUT = {
    "BoundedInfo",
    "RobustInfo",
    "ConvergenceError",
    "Factorization",
    "FitInfo",
    "SeparableFit",
    "Solution",
    "SolveInfo",
    "TooLarge",
    "Weakest",
    "distributed.RankError",
    "distributed.ShardedFit",
    "distributed.ShardedMatrix",
}


def _documented():
    for name in fl.__all__:
        thing = getattr(fl, name)
        if inspect.ismodule(thing):
            for inner in thing.__all__:
                yield f"{name}.{inner}", getattr(thing, inner)
            continue
        yield name, thing
        if inspect.isclass(thing) and thing.__module__.startswith("functional_lstsq"):
            for cls in thing.__mro__:
                for method, found in vars(cls).items():
                    member = getattr(found, "__func__", found)
                    if ">>>" in (getattr(member, "__doc__", None) or "") and callable(member):
                        yield f"{name}.{method}", member


_DOCUMENTED = dict(_documented())


@pytest.mark.parametrize("name", _DOCUMENTED)
def test_examples_run_as_they_stand(name):
    if name.startswith("plot."):
        matplotlib = pytest.importorskip("matplotlib")
        matplotlib.use("Agg")
    text, report = inspect.getdoc(_DOCUMENTED[name]) or "", io.StringIO()
    examples = doctest.DocTestParser().get_examples(text)
    assert examples or name in _WITHOUT
    test = doctest.DocTest(examples, {"__name__": "__main__"}, name, None, 0, text)
    failed, _ = doctest.DocTestRunner().run(test, out=report.write)
    assert not failed, report.getvalue()
