"""The examples in README.md, run as they stand: those under one heading in order, in a namespace of their own."""

import doctest
import io
import re
from pathlib import Path

import pytest

_LINES = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8").splitlines()


def _sections():
    """{heading: README.md with every line blank but those of its Python blocks}: line numbers stay those of the file."""
    sections, heading, block = {}, "", None
    for number, line in enumerate(_LINES):
        if block is None and re.match("#+ ", line):
            heading = line.lstrip("# ")
        elif line.startswith("```"):
            block = line[3:] if block is None else None
        elif block == "python":
            sections.setdefault(heading, [""] * len(_LINES))[number] = line
    return {heading: "\n".join(lines) + "\n" for heading, lines in sections.items()}


_SECTIONS = _sections()


@pytest.mark.parametrize("heading", _SECTIONS)
def test_examples(heading):
    examples = doctest.DocTestParser().get_examples(_SECTIONS[heading])
    shown = "".join(example.source for example in examples if example.want)
    assert shown, "no output to compare with: a block is Python only for its interpreter's prompts"
    report = io.StringIO()
    test = doctest.DocTest(examples, {"__name__": "__main__"}, heading, "README.md", 0, _SECTIONS[heading])
    failed, _ = doctest.DocTestRunner().run(test, out=report.write)
    assert not failed, report.getvalue()


def test_all_is_run():
    blocks = "\n".join(_LINES).count("```python")
    assert blocks
    prompts = sum(line.startswith((">>> ", "... ")) for line in _LINES)
    run = sum(text.count("\n>>> ") + text.count("\n... ") for text in _SECTIONS.values())
    assert run == prompts
