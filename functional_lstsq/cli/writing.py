"""Results as files: written whole, or not at all."""

from __future__ import annotations

import gzip
import io
import os
import secrets
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import scipy.io
import scipy.sparse

from . import command
from .errors import BadInput, reason_of
from .sources import STANDARD


def check_outputs(inputs: list[str | None], outputs: list[str | None], *, json: bool = False) -> None:
    """Refuse before any work what could not be written after it, or would overwrite what is needed."""
    needed = {Path(name).resolve() for name in inputs if name}
    if inputs.count(STANDARD) > 1:
        raise BadInput("standard input can be read once only")
    wanted = [name for name in outputs if name is not None]
    for name in wanted:
        if name == STANDARD:
            if sys.stdout is None:
                raise BadInput("cannot write to standard output: it is closed")
            if json:
                raise BadInput("argument --json: not allowed with a result on standard output")
            continue
        try:
            _check_file(name, needed)
        except (OSError, RuntimeError) as error:  # Python's word for links that lead in a circle
            raise BadInput(f"cannot write {name}: {reason_of(error)}") from None
    if len({name if name == STANDARD else Path(name).resolve() for name in wanted}) < len(wanted):
        raise BadInput(f"cannot write both results to {wanted[0]}")


def _check_file(name: str, needed: set[Path]) -> None:
    """Whether a file can be made where this one is to be, and this one be replaced."""
    path = Path(name)
    if not name or path.is_dir():
        raise BadInput(f"cannot write {name!r}: not the name of a file")
    if not path.parent.is_dir():
        raise BadInput(f"cannot write {path}: {path.parent} is not a folder")
    if path.resolve() in needed:
        raise BadInput(f"cannot write {path}: it is an input too")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(13, "Permission denied")
    if not _is_special(path):
        tempfile.TemporaryFile(dir=path.resolve().parent).close()


def _is_special(path: Path) -> bool:
    """Whether it is a device or a pipe, which is not replaced but written to."""
    return path.exists() and not stat.S_ISREG(path.stat().st_mode)


@contextmanager
def written(name: str) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of an older one when it is complete and on the disk.

    What goes wrong is `BadInput`, and leaves the older one.
    """
    try:
        if name == STANDARD:
            with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as file:
                yield file
        elif _is_special(Path(name)):
            with open(name, "wb") as file:
                yield file
        else:
            with _replacing(Path(name).resolve()) as file:
                yield file
    except BrokenPipeError:
        raise  # whoever reads has seen enough
    except OSError as error:
        where = "to standard output" if name == STANDARD else name
        raise BadInput(f"cannot write {where}: {reason_of(error)}") from None


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    # Not made of the name, which may be as long as a name can be; and noted before it is there.
    beside = str(path.parent / f".{secrets.token_hex(8)}.part")
    command.unfinished.add(beside)
    try:
        with open(beside, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(beside, _mode(path))
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    finally:
        command.unfinished.discard(beside)
    if hasattr(os, "O_DIRECTORY"):  # the name is on the disk when its folder is
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _mode(path: Path) -> int:
    """Of the file that is replaced, or as a new one has it."""
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write(name: str, what: Any) -> None:
    """Write a dense array or a sparse matrix in Matrix Market format; compressed, where the name ends in .gz."""

    def compressed(file: IO[bytes]) -> None:
        with gzip.GzipFile(filename="", mode="wb", fileobj=file) as packed:
            _write_matrix(packed, what)

    save(name, compressed if name.endswith(".gz") else lambda file: _write_matrix(file, what))


def save(name: str, put: Callable[[IO[bytes]], object]) -> None:
    """Have `put` write the file."""
    with written(name) as file:
        put(file)


def _write_matrix(file: Any, what: Any) -> None:
    if what.shape[0] and what.shape[1]:
        text = io.BytesIO()
        scipy.io.mmwrite(text, what, precision=17, symmetry="general")
        file.write(text.getbuffer())
        return
    # SciPy's writer knows no arrays without numbers.
    field = "complex" if np.iscomplexobj(what) else "real"
    format, count = ("coordinate", " 0") if scipy.sparse.issparse(what) else ("array", "")
    file.write(f"%%MatrixMarket matrix {format} {field} general\n{what.shape[0]} {what.shape[1]}{count}\n".encode())
