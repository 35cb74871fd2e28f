"""Matrix Market text read line by line, after Boisvert, Pozo and Remington (NISTIR 5935): a reference for the reader.

It shares no line with the reader of the library, and is as plain as the format lets it be, so that a fault of one is
not a fault of both. Where the format leaves a choice, it takes the one that the reader's messages tell of.
"""

import re

FORMATS = ("coordinate", "array")
FIELDS = ("real", "double", "integer", "unsigned-integer", "complex", "pattern")
SYMMETRIES = ("general", "symmetric", "skew-symmetric", "hermitian")
_LARGEST = 2**53 - 1  # beyond, numbers of rows are not all of them exact in double precision
_REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eEdD][+-]?[0-9]+)?")
_INTEGER = re.compile(r"[+-]?[0-9]+")


def parse(text: bytes) -> tuple[tuple[int, int], dict[tuple[int, int], float | complex]]:
    """(shape, {(i, j): value}), from 0, with what symmetry implies, duplicates added up; or ValueError."""
    lines = text.removeprefix(b"\xef\xbb\xbf").decode("latin-1").split("\n")  # latin-1: a character for every byte
    format, field, symmetry = _banner(_words(lines[0], bare=True))
    at = 1
    while at < len(lines) and (lines[at].startswith("%") or not _words(lines[at])):
        at += 1
    if at == len(lines):
        raise ValueError("no line with the size")
    shape, count = _size(_words(lines[at]), format, symmetry)
    rest = [words for words in map(_words, lines[at + 1 :]) if words]
    if count != len(rest):
        raise ValueError(f"{len(rest)} entries, not {count}")
    entries: dict[tuple[int, int], float | complex] = {}
    for words, place in zip(rest, _places(format, symmetry, shape, count), strict=True):
        i, j = place or _place(words[:2], shape)
        value = _value(words if place else words[2:], field)
        _check(i, j, value, symmetry)
        for at_i, at_j, number in _implied(i, j, value, symmetry):
            entries[at_i, at_j] = entries.get((at_i, at_j), 0) + number
    return shape, entries


def _words(line: str, *, bare: bool = False) -> list[str]:
    """What stands between spaces and tabs, with one CR at the end forgiven; in the banner nothing may stand before."""
    if bare and line[:1] in (" ", "\t"):
        raise ValueError("blanks before the banner")
    return [word for word in re.split(r"[ \t]+", line.removesuffix("\r")) if word]


def _banner(words: list[str]) -> tuple[str, str, str]:
    words = ["".join(c.lower() if c.isascii() else c for c in word) for word in words]
    if len(words) != 5 or words[:2] != ["%%matrixmarket", "matrix"]:
        raise ValueError("no banner")
    format, field, symmetry = words[2:]
    if format not in FORMATS or field not in FIELDS or symmetry not in SYMMETRIES:
        raise ValueError("a word that the format does not have")
    if field == "pattern" and (format == "array" or symmetry in ("skew-symmetric", "hermitian")):
        raise ValueError("a pattern has no such thing")
    if symmetry == "hermitian" and field != "complex":
        raise ValueError("hermitian is what is complex")
    return format, field, symmetry


def _size(words: list[str], format: str, symmetry: str) -> tuple[tuple[int, int], int]:
    if len(words) != (3 if format == "coordinate" else 2) or not all(re.fullmatch("[0-9]{1,19}", w) for w in words):
        raise ValueError("no size")
    m, n, *count = map(int, words)
    if max(m, n, *count) > _LARGEST:
        raise ValueError("too large")
    if symmetry != "general" and m != n:
        raise ValueError("not square")
    if count:
        return (m, n), count[0]
    stored = {"general": m * n, "skew-symmetric": n * (n - 1) // 2}
    return (m, n), stored.get(symmetry, n * (n + 1) // 2)


def _places(format: str, symmetry: str, shape: tuple[int, int], count: int):
    """Where the entries of an array are, column by column; None for each entry that says so itself."""
    if format == "coordinate":
        yield from [None] * count
    elif count:
        for j in range(shape[1]):
            first = {"general": 0, "skew-symmetric": j + 1}.get(symmetry, j)
            for i in range(first, shape[0]):
                yield i, j


def _place(words: list[str], shape: tuple[int, int]) -> tuple[int, int]:
    if len(words) != 2 or not all(re.fullmatch("[0-9]+", word) for word in words):
        raise ValueError("no place")
    i, j = map(int, words)
    if not (1 <= i <= shape[0] and 1 <= j <= shape[1]):
        raise ValueError("a place outside")
    return i - 1, j - 1


def _value(words: list[str], field: str) -> float | complex:
    if len(words) != {"pattern": 0, "complex": 2}.get(field, 1):
        raise ValueError("too many numbers, or too few")
    grammar = _INTEGER if "integer" in field else _REAL
    if not all(grammar.fullmatch(word) for word in words):
        raise ValueError("no number")
    numbers = [float(re.sub("[dD]", "e", word)) for word in words] or [1.0]
    if any(abs(number) == float("inf") for number in numbers):
        raise ValueError("not in the range of double precision")
    return numbers[0] if len(numbers) == 1 else complex(*numbers)


def _check(i: int, j: int, value: float | complex, symmetry: str) -> None:
    if symmetry == "general":
        return
    if i < j or (i == j and symmetry == "skew-symmetric"):
        raise ValueError("not in the lower triangle")
    if i == j and symmetry == "hermitian" and complex(value).imag != 0:
        raise ValueError("a diagonal that is not real")


def _implied(i: int, j: int, value: float | complex, symmetry: str):
    yield i, j, value
    if symmetry != "general" and i != j:
        yield j, i, {"skew-symmetric": -value, "hermitian": complex(value).conjugate()}.get(symmetry, value)
