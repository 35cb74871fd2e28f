"""Rutherford-Boeing and Harwell-Boeing files, read strictly: fields stand where the formats of their header say.

(Duff, Grimes and Lewis, The Rutherford-Boeing Sparse Matrix Collection, RAL-TR-97-031, 1997.) A header of four lines,
of Harwell-Boeing with right-hand sides five, tells of pointers to columns, of rows and of values, each in Fortran's
fields of fixed width. Right-hand sides are not read.
"""

from __future__ import annotations

import re
from typing import IO, NamedTuple

import numpy as np

from .content import Content, of_entries, require_room
from .errors import BadInput
from .market_header import shown

_TYPE = re.compile(rb"\s*([rcpiq])([suhzr])([ae])\s+([0-9]+)\s+([0-9]+)\s+([0-9]+)(?:\s+([0-9]+))?\s*", re.I)
_FORMAT = re.compile(r"\((?:([+-]?\d*)P,?)?(\d*)([IEDFG])(\d+)(?:\.(\d+)(?:E\d+)?)?\)", re.I)
_NUMBER = re.compile(rb"[+-]?(?:0+\.0*|\.0+)(?:[eEdD][+-]?0+|[+-]0+)?")
_INTEGER = re.compile(rb"[+-]?0+")
_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_SYMMETRIES = {b"s": "symmetric", b"u": "general", b"h": "hermitian", b"z": "skew-symmetric", b"r": "general"}


def is_boeing(start: bytes) -> bool:
    """Whether the third line, of the first bytes of a file, tells of a matrix as these formats do."""
    lines = start.split(b"\n", 3)
    return len(lines) > 2 and _TYPE.fullmatch(lines[2]) is not None


class _Field(NamedTuple):
    """Numbers of a fixed width, so many in a line."""

    many: int
    kind: str
    width: int


def read(name: str, file: IO[bytes]) -> Content:
    """An assembled matrix; `BadInput` says what is wrong with it."""

    def fail(what: str, line: int) -> BadInput:
        return BadInput(f"cannot read {name}, line {line}: {what}")

    lines = file.read().replace(b"\r\n", b"\n").split(b"\n")
    if len(lines) < 4:
        raise fail("it ends within the header", len(lines))
    cards = [_whole(word) for word in lines[1].split()]
    told = _TYPE.fullmatch(lines[2])
    assert told is not None  # by which it was recognised
    kind, symmetry, form = (told[i].lower() for i in (1, 2, 3))
    m, n, entries = (int(told[i]) for i in (4, 5, 6))
    if form != b"a" or kind == b"q":
        raise fail(f"a matrix must be assembled, its complex numbers together, got type {shown(told[0].split()[0])}", 3)
    if len(cards) not in (4, 5) or None in cards:
        raise fail(f"four or five numbers of lines are wanted, got {shown(lines[1])}", 2)
    require_room(name, entries + n + m)
    sizes: list[int] = [card for card in cards[1:4] if card is not None]
    formats = [_field(text) for text in (lines[3][:16], lines[3][16:32], lines[3][32:52])]
    if None in formats[: 2 if kind == b"p" else 3]:
        raise fail(f"its formats must be those of Fortran's fields, got {shown(lines[3])}", 4)
    at = 5 if len(cards) == 5 and cards[4] else 4
    wanted = [n + 1, entries, {b"p": 0, b"c": 2 * entries}.get(kind, entries)]
    parts = []
    for number, (count, size, field) in enumerate(zip(wanted, sizes, formats, strict=True)):
        chunk = lines[at : at + size]
        parts.append(_numbers(chunk, count, field, at + 1, whole=number < 2 or kind == b"i", fail=fail))
        at += size
    pointers, rows, numbers = parts[0].astype(np.int64), parts[1].astype(np.int64), parts[2]
    if pointers[0] != 1 or pointers[-1] != entries + 1 or (np.diff(pointers) < 0).any():
        raise fail(f"pointers must rise from 1 to {entries + 1}, since indices count from 1", 5)
    if entries and not 1 <= rows.min() <= rows.max() <= m:
        wrong = rows.min() if rows.min() < 1 else rows.max()
        raise fail(f"a row must lie between 1 and {m} (indices count from 1), got {wrong}", 5 + sizes[0])
    values = np.ones(entries) if kind == b"p" else numbers
    values = numbers[0::2] + 1j * numbers[1::2] if kind == b"c" else values
    columns = np.repeat(np.arange(n), np.diff(pointers))
    return _mirrored(name, (m, n), rows - 1, columns, values, _SYMMETRIES[symmetry], kind)


def _whole(word: bytes) -> int | None:
    return int(word) if re.fullmatch(rb"[0-9]{1,14}", word) else None


def _field(text: bytes) -> _Field | None:
    found = _FORMAT.fullmatch(text.decode("ascii", "replace").replace(" ", ""))
    return None if found is None else _Field(int(found[2] or 1), found[3].upper(), int(found[4]))


def _numbers(lines: list[bytes], count: int, field: _Field | None, first: int, *, whole: bool, fail) -> np.ndarray:
    """So many numbers of these lines, of which `first` is the number of the first one."""
    if not count:
        return np.zeros(0)
    assert field is not None
    width = field.many * field.width
    if field.kind == "I" and not whole:
        raise fail("values that are real must have a real format", 4)
    if not field.width or -(-count // max(field.many, 1)) != len(lines):
        raise fail(f"{count} numbers are wanted, {field.many} a line, got {len(lines)} lines", first)
    for k, line in enumerate(lines):
        if len(line) > width and line[width:].strip():
            raise fail(f"more than {field.many} fields of {field.width}, got {shown(line)}", first + k)
    cells = np.frombuffer(b"".join(line.ljust(width)[:width] for line in lines), dtype=f"S{field.width}")
    texts = np.char.strip(cells[:count])
    grammar = _INTEGER if whole else _NUMBER
    shapes = set(b"\n".join(texts.tolist()).translate(_ZEROS).split(b"\n"))
    bad = {shape for shape in shapes if not grammar.fullmatch(shape)}
    if bad or np.char.strip(cells[count:]).any():
        wrong = next((k for k, text in enumerate(texts.tolist()) if text.translate(_ZEROS) in bad), count)
        what = "a whole number" if whole else "a number with its decimal point"
        got = shown(cells[wrong]) if wrong < len(cells) else "none"
        raise fail(f"each field must be {what}, got {got}", first + wrong // field.many)
    if whole:
        return texts.astype(np.float64) if np.char.str_len(texts).max() > 15 else texts.astype(np.int64)
    text = b" ".join(texts.tolist()).replace(b"D", b"e").replace(b"d", b"e")
    return np.array(re.sub(rb"([0-9.])([+-])", rb"\1e\2", text).split(), dtype=np.float64)


def _mirrored(
    name: str,
    shape: tuple[int, int],
    rows: np.ndarray,
    columns: np.ndarray,
    values: np.ndarray,
    symmetry: str,
    kind: bytes,
) -> Content:
    """With the entries that symmetry implies."""
    stored = len(rows)
    if symmetry != "general":
        if shape[0] != shape[1]:
            raise BadInput(f"cannot read {name}: what is {symmetry} must be square, got {shape[0]} x {shape[1]}")
        if (rows < columns).any() or (symmetry == "skew-symmetric" and (rows == columns).any()):
            raise BadInput(f"cannot read {name}: what is {symmetry} has entries of the lower triangle only")
        off = rows != columns
        turned = {"skew-symmetric": np.negative, "hermitian": np.conj}.get(symmetry, np.asarray)(values[off])
        rows, columns = np.concatenate([rows, columns[off]]), np.concatenate([columns, rows[off]])
        values = np.concatenate([values, turned])
    found = of_entries(shape, rows, columns, values, name)
    field = {b"r": "real", b"c": "complex", b"p": "pattern", b"i": "integer"}[kind]
    return found._replace(field=field, symmetry=symmetry, stored=stored)
