"""Files that all ranks of a group read together: each parses its share of them, and keeps its own rows.

A share is a range of the lines of a Matrix Market file, by bytes, so that no line is parsed twice; or some of the files
that hold the rows in parts, `A.part-0.npz` and so on. Lines may stand in any order. So entries go to the rank that has
their row, by one exchange. No rank ever holds more than its share and its rows.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import SparseMatrix
from ..distributed.ranks import Ranks
from . import formats, matrix_market
from .content import Content
from .errors import BadInput
from .files import matrix_of
from .market_header import CHUNK, Header, Lines
from .sources import STANDARD, opened

_CPU = torch.device("cpu")
_BINS = 2**16  # of rows, whose entries are counted before they are dealt out
_PART = re.compile(r"(.+)\.part-([0-9]+)\.(.+)")


class Held(NamedTuple):
    """Rows of a matrix, or of columns of numbers, of which this rank has those from ends[rank] to ends[rank + 1]."""

    matrix: SparseMatrix
    ends: np.ndarray
    entries: int  # on all ranks


def read_matrix(name: str, ranks: Ranks) -> Held:
    """This rank's rows: of parts those that it has read, of a file as many that all ranks have about equal work."""
    found, ends = _share(name, ranks, formats.read)
    if ends is None:
        ends = _even_ends(found, ranks)
        found = _to_owners(found, ends, ranks)
    rank, n = ranks.place, found.shape[1]
    local = found._replace(shape=(int(ends[rank + 1] - ends[rank]), n), rows=found.rows - ends[rank])
    A = ranks.checked(lambda: (matrix_of(local), {}), _CPU)
    return Held(A, ends, int(ranks.sum(torch.tensor(A.nnz))))


def read_columns(name: str, held: Held, matrix: str, ranks: Ranks) -> Tensor:
    """The columns of numbers (m_r, k) for this rank's rows of what was read from the file `matrix`."""
    found, _ = _share(name, ranks, lambda part: formats.read(part).as_columns())
    (m, k), height, rank = found.shape, int(held.ends[-1]), ranks.place
    if m != height:
        raise BadInput(f"{name} has {m} rows, {matrix} has {height}")
    if not k:
        raise BadInput(f"{name} has no columns")
    found = _to_owners(found, held.ends, ranks)

    def filled() -> tuple[np.ndarray, dict]:
        columns = np.zeros((held.matrix.shape[0], k), dtype=found.values.dtype)
        np.add.at(columns, (found.rows - held.ends[rank], found.columns), found.values)
        return columns, {}

    return torch.from_numpy(ranks.checked(filled, _CPU))


def _share(name: str, ranks: Ranks, read: Callable[[str], Content]) -> tuple[Content, np.ndarray | None]:
    """(entries of all rows that this rank has read, where the rows of each rank begin if it keeps what it has read)."""
    names = ranks.checked(
        lambda: (found := _parts(name), {"the files of parts": [Path(part).name for part in found]}), _CPU
    )
    return _of_parts(name, names, ranks, read) if names else (_of_lines(name, ranks), None)


# A range of lines.


def _of_lines(name: str, ranks: Ranks) -> Content:
    def read() -> tuple[tuple[Header, np.ndarray], dict[str, object]]:
        header, found = _lines_of(name, ranks.place, ranks.size)
        return (header, found), {"what the first lines of the file say": tuple(header)}

    header, found = ranks.checked(read, _CPU)
    counts = _from_each(len(found), ranks)
    if sum(counts) != header.entries:  # on all ranks
        few = matrix_market.too_few(sum(counts), header)
        many = f"it has {sum(counts)} entries, more than the {header.entries} that its size promises"
        raise BadInput(f"cannot read {name}: {few if sum(counts) < header.entries else many}")
    return _without_zeros(matrix_market.matrix(header, found, sum(counts[: ranks.place])))


def _lines_of(name: str, rank: int, size: int) -> tuple[Header, np.ndarray]:
    """The header, and the numbers of the lines that begin in this rank's share of the bytes behind it."""
    if name == STANDARD or (Path(name).exists() and not Path(name).is_file()):
        raise BadInput(f"cannot read {name}: many ranks need a file that each can open, or files of parts")
    with opened(name) as unpacked, open(name, "rb") as file:
        start = file.read(64)
        if unpacked.peek(64)[:64] != start or not start.removeprefix(b"\xef\xbb\xbf").startswith(b"%%"):
            raise BadInput(
                f"cannot read {name}: many ranks read a Matrix Market file that is not compressed, or files of "
                "parts, as in A.part-0.npz, whose names they are given as 'A.part-*.npz'"
            )
        lines = Lines(name, unpacked)
        header = Header.read(lines, size)
        if header.format == "array" and header.symmetry != "general":
            raise BadInput(f"cannot read {name}: many ranks read no dense array that is {header.symmetry}")
        whole = file.seek(0, 2)
        first, last = (_line_after(file, lines, whole, lines.size, k, size) for k in (rank, rank + 1))
        part = Lines(name, _Range(file, first, last), lambda: _count_lines(name, first))
        return header, matrix_market.numbers(part, header)


def _line_after(file: Any, lines: Lines, whole: int, header: int, rank: int, size: int) -> int:
    """Where the first line begins of those that begin in or behind the share of a rank."""
    place = min(header, whole) + max(whole - header, 0) * rank // size
    if rank in (0, size) or place == header:
        return place
    file.seek(place - 1)
    line = file.readline(CHUNK + 1)
    if len(line) > CHUNK:
        raise lines.fail(f"a line of more than {CHUNK} bytes")
    return place - 1 + len(line)


class _Range:
    """The bytes of a file from `first` up to `last`."""

    def __init__(self, file: Any, first: int, last: int):
        self.file, self.left = file, max(last - first, 0)
        file.seek(first)

    def read(self, size: int, /) -> bytes:
        data = self.file.read(min(size, self.left))
        self.left -= len(data)
        return data


def _count_lines(name: str, size: int) -> int:
    with open(name, "rb") as file:
        part = _Range(file, 0, size)
        return sum(data.count(b"\n") for data in iter(lambda: part.read(CHUNK), b""))


# Parts.


def _parts(name: str) -> list[str]:
    """The files of a folder, or of a name with * in it, that hold rows in parts, in their order; none for one file."""
    if Path(name).is_dir():
        found = [str(path) for path in Path(name).iterdir()]
    elif "*" in name:
        found = glob.glob(name)
    else:
        return []
    matched = [(match, part) for part in found if (match := _PART.fullmatch(Path(part).name))]
    kinds = sorted({f"{match[1]}.part-*.{match[3]}" for match, _ in matched})
    if len(kinds) != 1:
        what = f"it holds {', '.join(kinds[:5])}: name one of these" if kinds else "it holds none"
        raise BadInput(f"cannot read {name}: files A.part-0.npz, A.part-1.npz ... of one kind are wanted, and {what}")
    numbered = {int(match[2]): part for match, part in matched}
    # A part that is missing would be rows that are missing.
    missing = sorted(set(range(len(matched))) - numbered.keys())
    if missing:
        raise BadInput(f"cannot read {name}: parts are numbered from 0, each once, and part {missing[0]} is missing")
    return [numbered[k] for k in range(len(matched))]


def own_part(name: str, ranks: Ranks) -> str:
    """The file that this rank writes its rows to, for a name as 'G.part-*.mtx'."""
    path = Path(name)
    if path.name.count("*") != 1 or not _PART.fullmatch(path.name.replace("*", "0")):
        raise BadInput(f"cannot write {name}: each rank writes its own rows, so a name as 'G.part-*.mtx' is wanted")
    for other in path.parent.glob(path.name):
        match = _PART.fullmatch(other.name)
        if match and int(match[2]) >= ranks.size:  # which would be taken for more rows of the same
            raise BadInput(f"cannot write {name}: there is {other}, of more ranks than {ranks.size}; remove it first")
    return str(path.with_name(path.name.replace("*", str(ranks.place))))


def _of_parts(name: str, names: list[str], ranks: Ranks, read: Callable[[str], Content]) -> tuple[Content, np.ndarray]:
    mine = names[len(names) * ranks.place // ranks.size : len(names) * (ranks.place + 1) // ranks.size]
    every = ranks.checked(lambda: ([_without_zeros(read(part)) for part in mine], {}), _CPU)
    widths = [part.shape[1] for part in every]
    width, is_complex = ranks.max(
        torch.tensor([max(widths, default=0), any(np.iscomplexobj(part.values) for part in every)], dtype=torch.int64)
    ).tolist()

    def agreed() -> tuple[None, dict]:
        for part, found in zip(mine, widths, strict=True):
            if found != width:
                raise BadInput(f"{part} has {found} columns, another part of {name} has {width}")
        return None, {}

    ranks.checked(agreed, _CPU)
    heights = np.array([part.shape[0] for part in every], dtype=np.int64)
    ends = np.cumsum([0, *_from_each(int(heights.sum()), ranks)])
    firsts = ends[ranks.place] + np.cumsum(heights) - heights
    rows = [part.rows + first for part, first in zip(every, firsts, strict=True)]
    none = np.zeros(0, dtype=np.int64)
    values = np.concatenate([np.zeros(0, np.complex128 if is_complex else np.float64), *[p.values for p in every]])
    columns = np.concatenate([none, *[part.columns for part in every]])
    field = "complex" if is_complex else "real"
    shape = int(ends[-1]), width
    found = Content(shape, np.concatenate([none, *rows]), columns, values, "coordinate", field, "general", len(values))
    return found, ends


# Rows to ranks.


def _without_zeros(found: Content) -> Content:
    """Of a dense array what is not zero, at its places."""
    if found.format != "array":
        return found
    held = found.values != 0
    rows, columns, values = (part[held] for part in (found.rows, found.columns, found.values))
    return found._replace(rows=rows, columns=columns, values=values, format="coordinate")


def _from_each(number: int, ranks: Ranks) -> list[int]:
    """The number of each rank, on all of them."""
    every = torch.zeros(ranks.size, dtype=torch.int64)
    every[ranks.place] = number
    return ranks.sum(every).tolist()


def _even_ends(found: Content, ranks: Ranks) -> np.ndarray:
    """Where the rows of each rank begin, (size + 1,), so that all have about as many rows and entries together."""
    m = found.shape[0]
    width = max(1, -(-m // _BINS))
    edges = np.minimum(np.arange(-(-m // width) + 1) * width, m)
    counts = torch.from_numpy(np.bincount(found.rows // width, minlength=len(edges) - 1))
    work = ranks.sum(counts).numpy() + np.diff(edges)
    shares = work.sum() * np.arange(1, ranks.size) / ranks.size
    return np.concatenate([[0], edges[np.searchsorted(np.cumsum(work) - work / 2, shares)], [m]])


def _to_owners(found: Content, ends: np.ndarray, ranks: Ranks) -> Content:
    """Every entry at the rank that has its row, those of one row in the order in which they were read."""
    owner = np.searchsorted(ends[1:-1], found.rows, side="right")
    order, sent = np.argsort(owner, kind="stable"), np.bincount(owner, minlength=ranks.size)
    table = torch.zeros((ranks.size, ranks.size), dtype=torch.int64)
    table[ranks.place] = torch.from_numpy(sent)
    taken = ranks.sum(table)[:, ranks.place].tolist()
    rows, columns, values = (
        ranks.exchange(torch.from_numpy(part[order]), sent.tolist(), taken).numpy()
        for part in (found.rows, found.columns, found.values)
    )
    return found._replace(rows=rows, columns=columns, values=values)
