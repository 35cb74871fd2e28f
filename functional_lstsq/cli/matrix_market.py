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

import numpy as np
import scipy.io

from .content import Content
from .market_header import BLANK, Header, Lines, shown

_SHAPES = 2**16  # of lines, that are remembered

# With every digit as 0. An exponent by D is Fortran's; one without a letter, as in 1.733+02, is not of this format.
_REAL = rb"[+-]?(?:0+\.?0*|\.0+)(?:[eEdD][+-]?0+)?"
_VALUES = {"real": [_REAL], "integer": [rb"[+-]?0+"], "complex": [_REAL, _REAL], "pattern": []}
_NO_NUMBER = re.compile(rb"(?i)[+-]?(?:inf|infinity|nan)")
_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_PLAIN = bytes.maketrans(b"dD\t", b"ee ")
_OPTIONS = {"spmatrix": False} if "spmatrix" in inspect.signature(scipy.io.mmread).parameters else {}


def read(name: str, file: io.BufferedReader) -> Content:
    """Read an open file; `BadInput` says what is wrong with it, and in which line."""
    lines = Lines(name, file)
    header = Header.read(lines)
    found = numbers(lines, header)
    if len(found) < header.entries:
        raise lines.fail(too_few(len(found), header), lines.number)
    return matrix(header, found)


def too_few(count: int, header: Header) -> str:
    """What is wrong with a file of so many entries."""
    return f"it ends after {count} of the {header.entries} entries that its size promises"


def numbers(lines: Lines, header: Header) -> np.ndarray:
    """(count, tokens of a line), in double precision, of the lines that follow; no more than the header promises."""
    places = header.format == "coordinate"
    tokens = [rb"0+", rb"0+"] * places + _VALUES[header.kind]
    grammar = re.compile(rb"[ \t]*" + rb"[ \t]+".join(tokens) + BLANK.pattern)
    good: set[bytes] = set()
    parts, count = [np.zeros((0, len(tokens)))], 0
    for every in lines.many():
        shapes = b"\n".join(every).translate(_ZEROS).split(b"\n")
        chunk, where = every, list(range(lines.number + 1, lines.number + 1 + len(every)))
        new = set(shapes) - good
        bad = {shape for shape in new if not grammar.fullmatch(shape)}
        good = (good if len(good) < _SHAPES else set()) | (new - bad)
        if bad:
            kept = [i for i, shape in enumerate(shapes) if not BLANK.fullmatch(shape)]
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
                    raise lines.fail(f"{what}, got {shown(chunk[k])}", where[k])
            parts.append(found)
        count += len(chunk)
    return np.concatenate(parts)


def _parsed(chunk: list[bytes], header: Header) -> np.ndarray:
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


def _faults(found: np.ndarray, header: Header, before: int) -> Iterator[tuple[np.ndarray, str]]:
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
    for name, index, size in (("row", row, header.m), ("column", column, header.n)):
        yield index < 1, f"a {name} must lie between 1 and {size}, since indices count from 1"
        yield index > size, f"a {name} must lie between 1 and {size}"
    if header.symmetry == "skew-symmetric":
        yield row <= column, "what is skew-symmetric has entries below the diagonal only"
    elif header.symmetry != "general":
        yield row < column, f"what is {header.symmetry} has no entries above the diagonal"
    if header.symmetry == "hermitian":
        yield (row == column) & (found[:, 3] != 0), real


def _fault(line: bytes, header: Header) -> str:
    """What is wrong with a line that has not the right shape."""
    if line.lstrip(b" \t").startswith(b"%"):
        return "comments must stand before the line with the size"
    places = 2 if header.format == "coordinate" else 0
    words = line.split()
    wanted = ["row", "column"][:places] + {"pattern": [], "complex": ["real", "imaginary part"]}.get(
        header.kind, ["value"]
    )
    if len(words) != len(wanted):
        return f"an entry must be {', '.join(wanted)}: {len(wanted)} numbers, got {shown(line)}"
    for word, what in zip(words, wanted, strict=True):
        if _NO_NUMBER.fullmatch(word):
            return f"{what} must be finite, got {shown(word)}"
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
            return f"{what} must be {kind}, got {shown(word)}"
    return f"numbers must be separated by blanks, got {shown(line)}"


def matrix(header: Header, found: np.ndarray, before: int = 0) -> Content:
    """Entries, with those that symmetry implies: all, or of a general matrix some, before which there are others."""
    m, n, symmetry = header.m, header.n, header.symmetry
    if header.format == "coordinate":
        rows, columns = (found[:, i].astype(np.int64) - 1 for i in (0, 1))
        found = found[:, 2:]
    elif symmetry == "general":
        columns, rows = np.divmod(np.arange(before, before + len(found)), max(m, 1))
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
    return Content((m, n), rows, columns, values, header.format, header.field, symmetry, header.entries)
