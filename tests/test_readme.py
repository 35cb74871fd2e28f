"""README.md: its examples run as they stand, and the messages that it explains are those of the code."""

import ast
import doctest
import io
import re
from pathlib import Path

import pytest

import functional_lstsq

_LINES = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8").splitlines()
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


def _templates():
    """The errors of the library as (type, message), with … where a message has a value."""
    for path in Path(functional_lstsq.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                parts = getattr(node.exc.args[0], "values", [node.exc.args[0]])
                message = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
                yield ast.unparse(node.exc.func).split(".")[-1].replace("SolveError", "LinAlgError"), message


def test_messages_are_worded_as_explained():
    templates = list(_templates())
    start = _LINES.index("## What each error means")
    rows = [re.match(r"\| (\w+) \| `(.+?)` \|", line) for line in _LINES[start:]]
    explained = [row.groups() for row in rows if row]
    assert len(explained) > 20
    for kind, message in explained:
        begins = re.compile(".*".join(re.escape(part) for part in message.split("…")))
        assert any(kind == of and begins.match(text) for of, text in templates), message
