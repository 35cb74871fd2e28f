"""Matrix Market files, read strictly: a file is the matrix that the format says it is, or it is refused.

(Boisvert, Pozo and Remington, The Matrix Market Exchange Formats: Initial Design, NISTIR 5935, 1996.) Readers that take
the longest number at the start of a token turn 1,5 into 1, and 1.5D+02 into 1.5. So the text is checked first: with
every digit written as 0 a million lines have some hundred shapes, and each shape is held against the grammar once. What
passes is turned into numbers by SciPy, some lines at a time.
"""

from __future__ import annotations

import inspect
import io
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.io

from ..memory import available_bytes
from .errors import BadInput
from .sources import opened

FORMATS, FIELDS = ("coordinate", "array"), ("real", "double", "integer", "unsigned-integer", "complex", "pattern")
SYMMETRIES = ("general", "symmetric", "skew-symmetric", "hermitian")
_CHUNK = 2**20  # bytes that are looked at together, and that a line may have
_OTHER = 2**26  # bytes of lines that are no entries
_LARGEST = 2**53 - 1  # rows, columns or entries: indices are exact in double precision
_ENTRY = 100  # bytes that an entry takes while it is read
_SHAPES = 2**16  # of lines, that are remembered

# With every digit as 0. An exponent by D is Fortran's; one without a letter, as in 1.733+02, is not of this format.
_REAL = rb"[+-]?(?:0+\.?0*|\.0+)(?:[eEdD][+-]?0+)?"
_VALUES = {"real": [_REAL], "integer": [rb"[+-]?0+"], "complex": [_REAL, _REAL], "pattern": []}
_BLANK = re.compile(rb"[ \t]*\r?")
_NO_NUMBER = re.compile(rb"(?i)[+-]?(?:inf|infinity|nan)")
_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_PLAIN = bytes.maketrans(b"dD\t", b"ee ")
_OPTIONS = {"spmatrix": False} if "spmatrix" in inspect.signature(scipy.io.mmread).parameters else {}


class MatrixMarket(NamedTuple):
    """What a file holds.

    Attributes:
        shape: (m, n).
        rows, columns: (entries,) of int64, from 0, what symmetry implies among them; of an array column by column.
        values: (entries,) of float64 or complex128.
        format, field, symmetry: as the first line has them.
        stored: the number of entries in the file itself.
    """

    shape: tuple[int, int]
    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    format: str
    field: str
    symmetry: str
    stored: int


def read(name: str) -> MatrixMarket:
    """Read a file, `-` for standard input; `BadInput` says what is wrong with it, and in which line."""
    with opened(name) as file:
        lines = _Lines(name, file)
        header = _Header.read(lines)
        return _matrix(header, _numbers(lines, header))


class _Lines:
    """The lines of a file: one by one at its beginning, later by the million. `number` is that of the last one."""

    def __init__(self, name: str, file: io.BufferedReader):
        self.name, self.number, self.other = name, 0, 0
        self._chunks, self._left, self._at = self._read(file), b"", 0

    def _read(self, file: io.BufferedReader) -> Iterator[bytes]:
        rest = b""
        while data := file.read(_CHUNK):
            data = rest + data
            end = data.rfind(b"\n") + 1
            rest = data[end:]
            if len(rest) > _CHUNK:
                raise self.fail(f"a line of more than {_CHUNK} bytes", self.number + data.count(b"\n") + 1)
            if end:
                yield data[:end]
        if rest:
            yield rest + b"\n"

    def one(self) -> bytes | None:
        """The next line; None at the end."""
        if self._at == len(self._left):
            self._left, self._at = next(self._chunks, b""), 0
        if not self._left:
            return None
        end = self._left.index(b"\n", self._at)
        line, self._at = self._left[self._at : end], end + 1
        self.number += 1
        return line

    def many(self) -> Iterator[list[bytes]]:
        """All that follow, some thousands at a time."""
        while chunk := self._left[self._at :] or next(self._chunks, b""):
            self._left, self._at, lines = b"", 0, chunk[:-1].split(b"\n")
            yield lines
            self.number += len(lines)

    def skip(self, size: int) -> None:
        """Note so many bytes of lines without entries, which would otherwise have no end in a few compressed bytes."""
        self.other += size
        if self.other > _OTHER:
            raise self.fail(f"more than {_OTHER} bytes of lines without entries", self.number)

    def fail(self, what: str, line: int | None = None) -> BadInput:
        return BadInput(f"cannot read {self.name}{'' if line is None else f', line {line}'}: {what}")


class _Header(NamedTuple):
    """The first line, and the one with the size."""

    format: str
    field: str
    symmetry: str
    kind: str  # of the values: real, integer, complex or pattern
    m: int
    n: int
    entries: int  # that the file must have

    @classmethod
    def read(cls, lines: _Lines) -> _Header:
        format, field, symmetry, kind = _banner(lines)
        line: bytes | None = b"%"
        while line is not None and (line.startswith(b"%") or _BLANK.fullmatch(line)):
            lines.skip(len(line) + 1)
            line = lines.one()
        if line is None:
            raise lines.fail("it ends before the line with its size")
        words = re.split(rb"[ \t]+", line.removesuffix(b"\r").strip(b" \t"))
        wanted = "rows, columns and entries" if format == "coordinate" else "rows and columns"
        if len(words) != wanted.count(" ") or not all(re.fullmatch(rb"[0-9]{1,19}", word) for word in words):
            raise lines.fail(
                f"the line with the size must have the numbers of {wanted}, got {_shown(line)}", lines.number
            )
        m, n, *more = (int(word) for word in words)
        if max(m, n, *more) > _LARGEST:
            raise lines.fail(f"no size may be above {_LARGEST}, got {_shown(line)}", lines.number)
        if symmetry != "general" and m != n:
            raise lines.fail(f"what is {symmetry} must be square, got {m} x {n}", lines.number)
        triangle = {"general": m * n, "skew-symmetric": n * (n - 1) // 2}.get(symmetry, n * (n + 1) // 2)
        count = more[0] if more else triangle
        room = available_bytes()
        if _ENTRY * count > room:
            raise lines.fail(
                f"{count} entries take about {_ENTRY * count:.1e} bytes of memory, of {room:.1e} that are available",
                lines.number,
            )
        return cls(format, field, symmetry, kind, m, n, count)


def _banner(lines: _Lines) -> tuple[str, str, str, str]:
    line = (lines.one() or b"").removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
    words = re.split("[ \t]+", line.removesuffix(b"\r").rstrip(b" \t").decode("ascii", "replace").lower())
    if words[:1] != ["%%matrixmarket"]:
        raise lines.fail("not a Matrix Market file, which begins with %%MatrixMarket", 1)
    if len(words) != 5 or words[1] != "matrix":
        raise lines.fail("the first line must be %%MatrixMarket matrix FORMAT FIELD SYMMETRY", 1)
    format, field, symmetry = words[2:]
    for what, word, known in (
        ("FORMAT", format, FORMATS),
        ("FIELD", field, FIELDS),
        ("SYMMETRY", symmetry, SYMMETRIES),
    ):
        if word not in known:
            raise lines.fail(f"{what} must be {', '.join(known[:-1])} or {known[-1]}, got {word!r}", 1)
    kind = {"double": "real", "unsigned-integer": "integer"}.get(field, field)
    impossible = {("array", "pattern"), ("pattern", "skew-symmetric")} | {
        (kind, "hermitian") for kind in ("real", "integer", "pattern")
    }
    for pair in ((format, kind), (kind, symmetry)):
        if pair in impossible:
            raise lines.fail(f"{pair[0]} cannot go with {pair[1]}", 1)
    return format, field, symmetry, kind


def _numbers(lines: _Lines, header: _Header) -> np.ndarray:
    """(count, tokens of a line), in double precision."""
    places = header.format == "coordinate"
    tokens = [rb"0+", rb"0+"] * places + _VALUES[header.kind]
    grammar = re.compile(rb"[ \t]*" + rb"[ \t]+".join(tokens) + _BLANK.pattern)
    good: set[bytes] = set()
    parts, count = [np.zeros((0, len(tokens)))], 0
    for every in lines.many():
        shapes = b"\n".join(every).translate(_ZEROS).split(b"\n")
        chunk, where = every, list(range(lines.number + 1, lines.number + 1 + len(every)))
        new = set(shapes) - good
        bad = {shape for shape in new if not grammar.fullmatch(shape)}
        good = (good if len(good) < _SHAPES else set()) | (new - bad)
        if bad:
            kept = [i for i, shape in enumerate(shapes) if not _BLANK.fullmatch(shape)]
            chunk, where = [every[i] for i in kept], [where[i] for i in kept]
            for i, line, number in zip(kept, chunk, where, strict=True):
                if shapes[i] in bad:
                    raise lines.fail(_fault(line, header), number)
            lines.skip(sum(map(len, every)) - sum(map(len, chunk)) + len(every) - len(chunk))
        if count + len(chunk) > header.entries:
            extra = where[header.entries - count]
            raise lines.fail(f"more entries than the {header.entries} that its size promises", extra)
        if chunk:
            found = _parsed(chunk, header)
            for wrong, what in _faults(found, header, count):
                if wrong.any():
                    k = int(wrong.argmax())
                    raise lines.fail(f"{what}, got {_shown(chunk[k])}", where[k])
            parts.append(found)
        count += len(chunk)
    if count < header.entries:
        raise lines.fail(f"it ends after {count} of the {header.entries} entries that its size promises", lines.number)
    return np.concatenate(parts)


def _parsed(chunk: list[bytes], header: _Header) -> np.ndarray:
    """The numbers of lines that are known to have the right shape."""
    text = b"\n".join(chunk).translate(_PLAIN, b"\r") + b"\n"
    count, m, n = len(chunk), header.m, header.n
    if header.format == "array":
        size, field = f"{count} 1", "complex" if header.kind == "complex" else "real"
    else:
        size, field = f"{m} {n} {count}", {"integer": "real"}.get(header.kind, header.kind)
    try:
        start = f"%%MatrixMarket matrix {header.format} {field} general\n{size}\n"
        found = scipy.io.mmread(io.BytesIO(start.encode() + text), **_OPTIONS)
    except (ValueError, OverflowError):  # an index out of bounds, a number out of range, a sign that it does not know
        return np.array(text.split(), dtype=np.float64).reshape(count, -1)
    values = found.data if header.format == "coordinate" else found[:, 0]
    numbers = [found.row + 1.0, found.col + 1.0] if header.format == "coordinate" else []
    numbers += {"complex": [values.real, values.imag], "pattern": []}.get(header.kind, [values])
    return np.stack(numbers, 1)


def _faults(found: np.ndarray, header: _Header, before: int) -> Iterator[tuple[np.ndarray, str]]:
    """(which entries are wrong, what they should be), for all that the grammar does not see, after so many `before`."""
    yield ~np.isfinite(found).all(1), "numbers must be in the range of double precision"
    real = "what is hermitian has real numbers on the diagonal"
    if header.format == "array":
        if header.symmetry == "hermitian":
            k = np.arange(header.n)
            on_diagonal = np.isin(np.arange(before, before + len(found)), k * header.n - k * (k - 1) // 2)
            yield on_diagonal & (found[:, 1] != 0), real
        return
    row, column = found[:, 0], found[:, 1]
    yield (row < 1) | (row > header.m), f"a row must lie between 1 and {header.m}"
    yield (column < 1) | (column > header.n), f"a column must lie between 1 and {header.n}"
    if header.symmetry == "skew-symmetric":
        yield row <= column, "what is skew-symmetric has entries below the diagonal only"
    elif header.symmetry != "general":
        yield row < column, f"what is {header.symmetry} has no entries above the diagonal"
    if header.symmetry == "hermitian":
        yield (row == column) & (found[:, 3] != 0), real


def _fault(line: bytes, header: _Header) -> str:
    """What is wrong with a line that has not the right shape."""
    if line.lstrip(b" \t").startswith(b"%"):
        return "comments must stand before the line with the size"
    places = 2 if header.format == "coordinate" else 0
    words = line.split()
    wanted = ["row", "column"][:places] + {"pattern": [], "complex": ["real", "imaginary part"]}.get(
        header.kind, ["value"]
    )
    if len(words) != len(wanted):
        return f"an entry must be {', '.join(wanted)}: {len(wanted)} numbers, got {_shown(line)}"
    for word, what in zip(words, wanted, strict=True):
        if _NO_NUMBER.fullmatch(word):
            return f"{what} must be finite, got {_shown(word)}"
        if not re.fullmatch(
            rb"[0-9]+" if what in ("row", "column") else _VALUES[header.kind][0].replace(b"0", b"[0-9]"), word
        ):
            kind = (
                "a positive integer"
                if what in ("row", "column")
                else "an integer"
                if header.kind == "integer"
                else "a number"
            )
            return f"{what} must be {kind}, got {_shown(word)}"
    return f"numbers must be separated by blanks, got {_shown(line)}"


def _matrix(header: _Header, found: np.ndarray) -> MatrixMarket:
    """All entries, with those that symmetry implies."""
    m, n, symmetry = header.m, header.n, header.symmetry
    if header.format == "coordinate":
        rows, columns = (found[:, i].astype(np.int64) - 1 for i in (0, 1))
        found = found[:, 2:]
    elif symmetry == "general":
        columns, rows = (place.ravel() for place in np.divmod(np.arange(m * n), max(m, 1)))
    else:
        columns, rows = np.triu_indices(n, 1 if symmetry == "skew-symmetric" else 0)  # by columns of the lower triangle
    values: np.ndarray
    if header.kind == "complex":
        values = found[:, 0] + 1j * found[:, 1]
    else:
        values = np.ones(len(rows)) if header.kind == "pattern" else found[:, 0]
    if symmetry != "general":
        off = rows != columns
        mirrored = {"skew-symmetric": np.negative, "hermitian": np.conj}.get(symmetry, np.asarray)(values[off])
        rows, columns = np.concatenate([rows, columns[off]]), np.concatenate([columns, rows[off]])
        values = np.concatenate([values, mirrored])
    return MatrixMarket((m, n), rows, columns, values, header.format, header.field, symmetry, header.entries)


def _shown(text: bytes) -> str:
    """A piece of a file in a message, with nothing in it that a terminal would obey."""
    shown = text.strip().decode("ascii", "backslashreplace")
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown)
    return repr(shown if len(shown) <= 60 else shown[:57] + "...").replace("\\\\", "\\")
