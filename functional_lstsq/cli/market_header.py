"""The lines of a Matrix Market file, and what the first of them promise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from ..solvers.memory import available_bytes
from .errors import BadInput

FORMATS, FIELDS = ("coordinate", "array"), ("real", "double", "integer", "unsigned-integer", "complex", "pattern")
SYMMETRIES = ("general", "symmetric", "skew-symmetric", "hermitian")
CHUNK = 2**20  # bytes that are looked at together, and that a line may have
_OTHER = 2**26  # bytes of lines that are no entries
_LARGEST = 2**53 - 1  # rows, columns or entries: indices are exact in double precision
_ENTRY = 100  # bytes that an entry takes while it is read
BLANK = re.compile(rb"[ \t]*\r?")


class Readable(Protocol):
    """Bytes, from where it stands."""

    def read(self, size: int, /) -> bytes: ...


class Lines:
    """The lines of a file: one by one at its beginning, later by the million. `number` is that of the last one.

    Args:
        file: or a part of one, which has a `read`.
        before: gives the number of lines before the part; called for a message only, since it has to read them.
    """

    def __init__(self, name: str, file: Readable, before: Callable[[], int] = int):
        self.name, self.number, self.other, self.size, self.before = name, 0, 0, 0, before
        self._chunks, self._left, self._at = self._read(file), b"", 0

    def _read(self, file: Readable) -> Iterator[bytes]:
        rest = b""
        while data := file.read(CHUNK):
            data = rest + data
            end = data.rfind(b"\n") + 1
            rest = data[end:]
            if len(rest) > CHUNK:
                raise self.fail(f"a line of more than {CHUNK} bytes", self.number + data.count(b"\n") + 1)
            if end:
                yield data[:end]
        if rest:
            yield rest + b"\n"

    def one(self) -> bytes | None:
        """The next line; None at the end. `size` is how many bytes all of these have had."""
        if self._at == len(self._left):
            self._left, self._at = next(self._chunks, b""), 0
        if not self._left:
            return None
        end = self._left.index(b"\n", self._at)
        line, self._at = self._left[self._at : end], end + 1
        self.number, self.size = self.number + 1, self.size + len(line) + 1
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
        return BadInput(f"cannot read {self.name}{'' if line is None else f', line {self.before() + line}'}: {what}")


class Header(NamedTuple):
    """The first line, and the one with the size."""

    format: str
    field: str
    symmetry: str
    kind: str  # of the values: real, integer, complex or pattern
    m: int
    n: int
    entries: int  # that the file must have

    @classmethod
    def read(cls, lines: Lines, readers: int = 1) -> Header:
        """The header of a file, of whose entries each of so many readers takes an equal part into memory."""
        format, field, symmetry, kind = _banner(lines)
        line: bytes | None = b"%"
        while line is not None and (line.startswith(b"%") or BLANK.fullmatch(line)):
            lines.skip(len(line) + 1)
            line = lines.one()
        if line is None:
            raise lines.fail("it ends before the line with its size")
        words = re.split(rb"[ \t]+", line.removesuffix(b"\r").strip(b" \t"))
        wanted = "rows, columns and entries" if format == "coordinate" else "rows and columns"
        if len(words) != wanted.count(" ") or not all(re.fullmatch(rb"[0-9]{1,19}", word) for word in words):
            raise lines.fail(
                f"the line with the size must have the numbers of {wanted}, got {shown(line)}", lines.number
            )
        m, n, *more = (int(word) for word in words)
        if max(m, n, *more) > _LARGEST:
            raise lines.fail(f"no size may be above {_LARGEST}, got {shown(line)}", lines.number)
        if symmetry != "general" and m != n:
            raise lines.fail(f"what is {symmetry} must be square, got {m} x {n}", lines.number)
        triangle = {"general": m * n, "skew-symmetric": n * (n - 1) // 2}.get(symmetry, n * (n + 1) // 2)
        count = more[0] if more else triangle
        room, share = available_bytes(), count // readers
        if _ENTRY * share > room:
            raise lines.fail(
                f"{share} entries take about {_ENTRY * share:.1e} bytes of memory, of {room:.1e} that are available",
                lines.number,
            )
        return cls(format, field, symmetry, kind, m, n, count)


def _banner(lines: Lines) -> tuple[str, str, str, str]:
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


def shown(text: bytes) -> str:
    """A piece of a file in a message, with nothing in it that a terminal would obey."""
    printable = text.strip().decode("ascii", "backslashreplace")
    printable = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in printable)
    return repr(printable if len(printable) <= 60 else printable[:57] + "...").replace("\\\\", "\\")
