"""README.md: its examples run as they stand, it can be read in one sitting, and what it promises of messages holds."""

import ast
import doctest
import io
import re
from pathlib import Path

import pytest

import functional_lstsq

_ROOT, _PACKAGE = Path(__file__).parent.parent, Path(functional_lstsq.__file__).parent
_LINES = (_ROOT / "README.md").read_text(encoding="utf-8").splitlines()
_PROMPT = re.compile(r"(>>>|\.\.\.)( |$)")


def _examples():
    """{heading: README.md with all lines blank but the Python under it}: numbers of lines stay those of the file."""
    found, heading, fence = {}, "", None
    for number, line in enumerate(_LINES):
        if line.startswith("```"):
            fence = line[3:] if fence is None else None
        elif fence is None and line.startswith("#"):
            heading = line.lstrip("# ")
        elif fence == "python":
            found.setdefault(heading, [""] * len(_LINES))[number] = line
    return {heading: "\n".join(lines) + "\n" for heading, lines in found.items()}


_EXAMPLES = _examples()


@pytest.mark.parametrize("heading", _EXAMPLES)
def test_examples_under_a_heading(heading):
    """In order, in one namespace that has nothing of other headings."""
    text, report = _EXAMPLES[heading], io.StringIO()
    examples = doctest.DocTestParser().get_examples(text)
    test = doctest.DocTest(examples, {"__name__": "__main__"}, heading, "README.md", 0, text)
    failed, _ = doctest.DocTestRunner().run(test, out=report.write)
    assert examples
    assert not failed, report.getvalue()


def test_no_example_is_left_out():
    run = "\n".join(_EXAMPLES.values()).splitlines()
    assert sum(map(bool, map(_PROMPT.match, run))) == sum(map(bool, map(_PROMPT.match, _LINES))) > 0


def test_it_can_be_read_in_one_sitting():
    assert len(_LINES) <= 250


def test_what_it_links_to_is_there():
    links = re.findall(r"\]\(([^):]+)\)", "\n".join(_LINES))
    assert len(links) > 7
    assert [link for link in links if not (_ROOT / link).exists()] == []


def test_every_notebook_is_named():
    notebooks = [path.relative_to(_ROOT).as_posix() for path in sorted((_ROOT / "notebooks").glob("*.ipynb"))]
    assert [name for name in notebooks if f"({name})" not in "\n".join(_LINES)] == []


def test_every_public_name_is_in_the_table():
    start = _LINES.index("## The names")
    table = "\n".join(line for line in _LINES[start : start + 40] if line.startswith("|"))
    returned = {
        "BoundedInfo",
        "FitInfo",
        "Factorization",
        "RobustInfo",
        "SeparableFit",
        "Solution",
        "SolveInfo",
        "Weakest",
    }  # what functions give, not what is called
    assert [name for name in functional_lstsq.__all__ if name not in returned and f"`{name}" not in table] == []


def _raised():
    """The calls that raise an error of a solve, as (place, what is called)."""
    kinds = ("ConvergenceError", "RankDeficientError", "SolveError", "TooLarge")
    for path in sorted(_PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] in kinds:
                yield f"{path.relative_to(_PACKAGE)}:{node.lineno}", call


def test_every_error_of_a_solve_carries_a_remedy():
    """The first argument is what went wrong, the others are what may be done about it."""
    raised = list(_raised())
    assert len(raised) > 10
    assert [place for place, call in raised if len(call.args) < 2] == []
