"""Files as streams of bytes: plain or compressed, in an archive, or piped. What a file is, its first bytes say."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import BadInput, reason_of

STANDARD = "-"  # names standard input, and standard output
_BUFFER = 2**20
_MOST, _RATIO = 2**30, 200  # bytes that may come out of any compressed file; and times its own size, beyond those
_UNPACKERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
_OTHERS = {
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first",
    b"\xff\xfe": "in UTF-16: write it in ASCII or UTF-8",
    b"\xfe\xff": "in UTF-16: write it in ASCII or UTF-8",
    b"\x89HDF": "an HDF5 file; of MATLAB's, save it with -v7",
}
_TAR = slice(257, 262)  # where an archive says that it is one
_FAULTS = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, tarfile.TarError)


@contextmanager
def opened(name: str) -> Iterator[io.BufferedReader]:
    """The bytes of a file, unpacked; whatever goes wrong while they are read is `BadInput`."""
    with ExitStack() as stack:
        try:
            file = _unpacked(name, stack)
            if file.peek(_TAR.stop)[_TAR] == b"ustar":
                file = _from_archive(name, file, stack)
            if not file.peek(1):
                raise BadInput(f"cannot read {name}: the file is empty")
            yield file
        except _FAULTS as error:
            raise BadInput(f"cannot read {name}: {reason_of(error)}") from None


def _unpacked(name: str, stack: ExitStack) -> io.BufferedReader:
    if name == STANDARD:
        if sys.stdin is None:
            raise BadInput("cannot read standard input: it is closed")
        packed = _Whole(io.FileIO(sys.stdin.fileno(), closefd=False))
    elif not name or Path(name).is_dir():
        raise BadInput(f"cannot read {name!r}: {'it is a folder' if name else 'no file is named'}")
    else:
        packed = _Whole(stack.enter_context(open(name, "rb", 0)))  # noqa: SIM115 (by the stack)
    file: Any = io.BufferedReader(packed, _BUFFER)
    start = file.peek(16)
    for magic, kind in _OTHERS.items():
        if start.startswith(magic):
            raise BadInput(f"cannot read {name}: it is {kind}")
    for magic, unpack in _UNPACKERS.items():
        if start.startswith(magic):
            return io.BufferedReader(_Bounded(name, packed, stack.enter_context(unpack(file))), _BUFFER)
    return file


class _Whole(io.RawIOBase):
    """Gives as much as it is asked for: a pipe, which may give a byte at a time, is looked at by its first hundreds."""

    def __init__(self, file: io.FileIO):
        self.file, self.count = file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        filled, view = 0, memoryview(buffer)
        while filled < len(view) and (size := self.file.readinto(view[filled:])):
            filled += size
        self.count += filled
        return filled


class _Bounded(io.RawIOBase):
    """What comes out of a compressed file, until it is too much to have been meant: a few kilobytes may fill a disk."""

    def __init__(self, name: str, packed: _Whole, unpacked: Any):
        self.name, self.packed, self.unpacked, self.count = name, packed, unpacked, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.unpacked.read(len(buffer))
        buffer[: len(data)] = data
        self.count += len(data)
        if self.count > _MOST and self.count > _RATIO * self.packed.count:
            raise BadInput(
                f"cannot read {self.name}: it unpacks to more than {_MOST} bytes and {_RATIO} times its own size; "
                "unpack it first, if it is meant to"
            )
        return len(data)


def _from_archive(name: str, file: io.BufferedReader, stack: ExitStack) -> io.BufferedReader:
    """The matrix in a tar archive: its only .mtx or .rb file, or else the one that has the name of its folder.

    So the archives of the SuiteSparse Matrix Collection are laid out, which hold right-hand sides too.
    """
    wanted = None
    if Path(name).is_file():  # which can be opened again; of a pipe, the first is taken
        with ExitStack() as other:
            every = [member.name for member, _ in _matrices(_unpacked(name, other), other)]
        chief = [found for found in every if PurePosixPath(found).stem == PurePosixPath(found).parent.name]
        if not every or (len(every) > 1 and len(chief) != 1):
            what = f"it holds {', '.join(every[:5])}" if every else "it holds none"
            raise BadInput(
                f"cannot read {name}: of an archive one .mtx or .rb file is wanted, and {what}; unpack it first"
            )
        wanted = every[0] if len(every) == 1 else chief[0]
    for member, content in _matrices(file, stack):
        if wanted in (None, member.name):
            return io.BufferedReader(stack.enter_context(content), _BUFFER)
    raise BadInput(f"cannot read {name}: of an archive one .mtx or .rb file is wanted, and it holds none")


def _matrices(file: io.BufferedReader, stack: ExitStack) -> Iterator[tuple[tarfile.TarInfo, Any]]:
    """The .mtx and .rb files of an archive, each with its content, to be read before the next."""
    archive = stack.enter_context(tarfile.open(fileobj=file, mode="r|"))  # noqa: SIM115 (by the stack)
    for member in archive:
        if member.isreg() and PurePosixPath(member.name).suffix in (".mtx", ".rb"):
            yield member, archive.extractfile(member)
