"""Text in lines: SVMlight files, and numbers separated by blanks (.txt) or commas (.csv), read strictly."""

from __future__ import annotations

import re
from typing import IO

import numpy as np

from .content import Content, numbers_of, of_array, of_entries, require_room
from .errors import BadInput
from .market_header import shown

_REAL = rb"[+-]?(?:0+\.?0*|\.0+)(?:[eE][+-]?0+)?"
_PAIR = rb"[0-9]+:[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_SVM_LINE = re.compile(_REAL + rb"(?:[ \t]+0+:" + _REAL + rb")*")
_SVM_START = re.compile(rb"(?:[ \t]*(?:#[^\n]*)?\r?\n)*[ \t]*[+-]?[0-9.][^\s:#]*[ \t]+(?:qid:[0-9]+[ \t]+)?" + _PAIR)
_ZEROS = bytes.maketrans(b"123456789", b"000000000")


def is_svmlight(start: bytes) -> bool:
    """Whether the first bytes of a file have a label and a pair index:value."""
    return _SVM_START.match(start) is not None


def _lines(file: IO[bytes]) -> tuple[list[bytes], list[int]]:
    """(the lines that hold anything, without comments, their numbers from 1)."""
    every = [line.split(b"#", 1)[0].strip() for line in file.read().split(b"\n")]
    held = [number for number, line in enumerate(every, 1) if line]
    return [every[number - 1] for number in held], held


def _require(name: str, lines: list[bytes], numbers: list[int], grammar: re.Pattern[bytes], what: str) -> None:
    shapes = [line.translate(_ZEROS) for line in lines]
    bad = {shape for shape in set(shapes) if not grammar.fullmatch(shape)}
    for line, shape, number in zip(lines, shapes, numbers, strict=True):
        if shape in bad:
            raise BadInput(f"cannot read {name}, line {number}: {what}, got {shown(line)}")


def read_svmlight(name: str, file: IO[bytes]) -> Content:
    """Rows of index:value, indices from 1 and ascending, behind a label, which is a right-hand side.

    (Joachims, Making large-scale SVM learning practical, 1999.)
    """
    lines, where = _lines(file)
    _require(name, lines, where, _SVM_LINE, "a row must be a label and pairs index:value, separated by blanks")
    counts = np.array([line.count(b":") for line in lines], dtype=np.int64)
    require_room(name, int(counts.sum()) + len(lines))
    found = np.array(b" ".join(lines).replace(b":", b" ").split(), dtype=np.float64)
    starts = np.cumsum(2 * counts + 1) - (2 * counts + 1)
    labels = numbers_of(found[starts], name)
    pairs = np.delete(found, starts).reshape(-1, 2)
    rows, columns = np.repeat(np.arange(len(lines)), counts), pairs[:, 0]
    for wrong, what in (
        (columns < 1, "indices count from 1, got 0; add 1 to each"),
        (columns > 2**53 - 1, "an index is too large"),
        (np.r_[False, (rows[1:] == rows[:-1]) & (columns[1:] <= columns[:-1])], "indices must ascend within a row"),
    ):
        if wrong.any():
            raise BadInput(f"cannot read {name}, line {where[int(rows[wrong.argmax()])]}: {what}")
    shape = len(lines), int(columns.max()) if columns.size else 0
    return of_entries(shape, rows, columns.astype(np.int64) - 1, pairs[:, 1], name)._replace(labels=labels)


def read_table(name: str, file: IO[bytes], separator: bytes | None) -> Content:
    """Numbers in lines of equal length, separated by blanks, or by `separator`; comments begin with #."""
    lines, where = _lines(file)
    between = rb"[ \t]+" if separator is None else rb"[ \t]*" + re.escape(separator) + rb"[ \t]*"
    what = f"numbers must be separated by {'blanks' if separator is None else 'commas'}"
    hint = "; comments and names of columns begin with #" if lines and re.search(rb"[A-Za-z]{2}", lines[0]) else ""
    _require(name, lines, where, re.compile(_REAL + rb"(?:" + between + _REAL + rb")*"), what + hint)
    text = [line.replace(b",", b" ") for line in lines] if separator else lines
    counts = np.array([len(line.split()) for line in text], dtype=np.int64)
    if counts.size and (counts != counts[0]).any():
        k = int((counts != counts[0]).argmax())
        raise BadInput(
            f"cannot read {name}, line {where[k]}: {counts[k]} numbers, where the first line has {counts[0]}"
        )
    require_room(name, int(counts.sum()))
    values = np.array(b" ".join(text).split(), dtype=np.float64)
    return of_array(values.reshape(len(text), -1) if len(text) else values, name)
