"""MAT files of MATLAB, version 5 to 7, for the matrices in them. (MAT-File Format, MathWorks.)

Read here, since SciPy's reader ends the process on some broken files. A file is a header of 128 bytes and elements: a
type, a number of bytes, and these, padded to 8. An element may be compressed; one of the type 14 is an array, made of
elements: flags with its class, sizes, a name, and, by its class, numbers, or an array for each field of a structure.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..solvers.memory import available_bytes
from .errors import BadInput

_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_ARRAY, _COMPRESSED = 14, 15
_STRUCTURE, _SPARSE, _DENSE = 2, 5, range(6, 16)  # classes of arrays
_COMPLEX = 0x800
_DEEPEST = 8  # structures in structures
_MOST, _RATIO = 2**30, 200  # bytes that a compressed element may become, as of other files


class MatFile:
    """The variables of a file: dense arrays, sparse matrices (rows, pointers, values, shape), dicts for structures."""

    def __init__(self, name: str, data: bytes):
        self.name = name
        if len(data) < 128 or data[126:128] not in (b"IM", b"MI"):
            raise self.fail("its header ends early, or does not tell the order of bytes")
        self.order = "<" if data[126:128] == b"IM" else ">"
        if self._whole(data[124:126]) >> 8 != 1:
            raise self.fail("it is not of version 5 to 7; save it with -v7")
        self.variables: dict[str, Any] = {}
        for kind, body in self._elements(data[128:]):
            if kind == _COMPRESSED:
                for inner, part in self._elements(self._unpacked(body)):
                    self._add(inner, part)
            else:
                self._add(kind, body)

    def fail(self, what: str) -> BadInput:
        return BadInput(f"cannot read {self.name}: not a MAT file that can be read: {what}")

    def _add(self, kind: int, body: bytes) -> None:
        if kind == _ARRAY:
            key, value = self._array(body)
            if value is not None:
                self.variables[key] = value

    def _whole(self, data: bytes) -> int:
        return int.from_bytes(data, "little" if self.order == "<" else "big")

    def _unpacked(self, body: bytes) -> bytes:
        most = min(available_bytes(), max(_MOST, _RATIO * len(body)))
        try:
            unpacker = zlib.decompressobj()
            data = unpacker.decompress(body, int(most))
        except zlib.error as error:
            raise self.fail(str(error)) from None
        if unpacker.unconsumed_tail:
            raise self.fail(f"it unpacks to more than {most:.1e} bytes")
        if not unpacker.eof:
            raise self.fail("it ends within a compressed variable")
        return data

    def _elements(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        at = 0
        while at < len(data):
            tag = data[at : at + 8]
            if len(tag) < 8:
                raise self.fail("it ends within the type of an element")
            first = self._whole(tag[:4])
            if first >> 16:  # a small one, within its tag
                kind, size, start, after = first & 0xFFFF, first >> 16, at + 4, at + 8
                if size > 4:
                    raise self.fail(f"a small element of {size} bytes")
            else:
                kind, size, start = first, self._whole(tag[4:]), at + 8
                after = start + size + (0 if kind == _COMPRESSED else -size % 8)
            if start + size > len(data):
                raise self.fail("it ends within an element")
            yield kind, data[start : start + size]
            at = after

    def _numbers(self, element: tuple[int, bytes] | None, what: str) -> np.ndarray:
        if element is None:
            raise self.fail(f"an array without {what}")
        kind, body = element
        if kind not in _NUMBERS or len(body) % int(_NUMBERS[kind][1]):
            raise self.fail(f"{what} of type {kind} in {len(body)} bytes")
        return np.frombuffer(body, self.order + _NUMBERS[kind]).astype(_NUMBERS[kind])

    def _array(self, body: bytes, depth: int = 0) -> tuple[str, Any]:
        """(name, value) of an array; None for what is no matrix and no structure of one element."""
        parts = self._elements(body)
        flags = self._numbers(next(parts, None), "flags")
        sizes = self._numbers(next(parts, None), "sizes")
        if len(flags) != 2 or flags.dtype != np.uint32 or sizes.dtype != np.int32 or len(sizes) < 2 or sizes.min() < 0:
            raise self.fail("an array without flags or sizes")
        key = self._numbers(next(parts, None), "a name").tobytes().decode("ascii", "replace")
        kind, is_complex, shape = int(flags[0]) & 0xFF, bool(flags[0] & _COMPLEX), tuple(sizes.tolist())
        if kind == _STRUCTURE:
            return key, self._structure(parts, shape, depth)
        if kind == _SPARSE and len(shape) == 2:
            rows = self._numbers(next(parts, None), "rows").astype(np.int64)
            pointers = self._numbers(next(parts, None), "pointers").astype(np.int64)
            values = self._values(parts, is_complex)
            stored = int(pointers[-1]) if len(pointers) else 0  # there may be room for more
            if not 0 <= stored <= min(len(rows), len(values)):
                raise self.fail(f"{stored} entries of {len(rows)} rows and {len(values)} values")
            return key, (rows[:stored], pointers, values[:stored], shape)
        if kind in _DENSE:
            values, count = self._values(parts, is_complex), 1
            for size in shape:
                count *= size
            if len(values) != count:
                raise self.fail(f"{len(values)} numbers in an array of shape {shape}")
            return key, values.reshape(shape, order="F")
        return key, None

    def _values(self, parts: Iterator[tuple[int, bytes]], is_complex: bool) -> np.ndarray:
        real = self._numbers(next(parts, None), "values")
        if not is_complex:
            return real
        imaginary = self._numbers(next(parts, None), "imaginary parts")
        if len(imaginary) != len(real):
            raise self.fail(f"{len(real)} real and {len(imaginary)} imaginary parts")
        return real + 1j * imaginary

    def _structure(self, parts: Iterator[tuple[int, bytes]], shape: tuple[int, ...], depth: int) -> dict | None:
        width = self._numbers(next(parts, None), "the length of names")
        names = self._numbers(next(parts, None), "names of fields").tobytes()
        if set(shape) != {1} or depth > _DEEPEST or len(width) != 1 or width[0] < 1 or len(names) % int(width[0]):
            return None
        fields, size = {}, int(width[0])
        for at in range(0, len(names), size):
            kind, body = next(parts, (0, b""))
            name = names[at : at + size].split(b"\0", 1)[0].decode("ascii", "replace")
            if kind == _ARRAY and body:
                fields[name] = self._array(body, depth + 1)[1]
        return fields
