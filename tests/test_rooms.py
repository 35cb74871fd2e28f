"""functional_lstsq/README.md, the map of the code: what it names is there, and it stays a page."""

import re
from pathlib import Path

import functional_lstsq

_PACKAGE = Path(functional_lstsq.__file__).parent
_TEXT = (Path(__file__).parent.parent / "functional_lstsq" / "README.md").read_text(encoding="utf-8")


def test_it_is_a_page():
    assert len(_TEXT.splitlines()) <= 90


def test_what_it_names_is_there():
    named = set(re.findall(r"[\w/]+\.py\b|\b\w+/(?!\w)", _TEXT))
    assert len(named) > 25
    assert sorted(name for name in named if not ((_PACKAGE / name).exists() or (_PACKAGE.parent / name).exists())) == []


def test_every_folder_is_named():
    folders = {path.name for path in _PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert sorted(name for name in folders if f"{name}/" not in _TEXT) == []


def test_a_change_opens_three_rooms_at_most():
    changes = [line for line in _TEXT.splitlines() if line.startswith("| ") and not line.startswith("| change")]
    assert len(changes) == 10
    assert [line for line in changes if line.count(";") > 2] == []
