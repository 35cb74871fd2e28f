"""What a file is, by its first bytes, and whoever reads that: Matrix Market, or one of the formats beside it.

- boeing: Rutherford-Boeing and Harwell-Boeing. tables: SVMlight, and numbers in lines (.txt, .csv).
- binary: .npz of SciPy, .npy, .mat.
"""

from __future__ import annotations

import re

from . import binary, boeing, matrix_market, tables
from .content import Content
from .sources import opened

_PACKED = re.compile(r"\.(gz|bz2|xz)$")
# Numbers in lines say nothing of what they are: a Matrix Market file without its first line would be one of these.
_TABLES = re.compile(r"\.(txt|csv)$")


def read(name: str) -> Content:
    """Read a file, `-` for standard input; `BadInput` says what is wrong with it, and where."""
    with opened(name) as file:
        start, ending = file.peek(2048), _PACKED.sub("", name.lower())
        if start.startswith(b"PK\x03\x04"):
            return binary.read_npz(name, file)
        if start.startswith(b"\x93NUMPY"):
            return binary.read_npy(name, file)
        if start.startswith(b"MATLAB 5"):
            return binary.read_mat(name, file)
        if _TABLES.search(ending):
            return tables.read_table(name, file, b"," if ending.endswith(".csv") else None)
        if tables.is_svmlight(start):
            return tables.read_svmlight(name, file)
        if boeing.is_boeing(start):
            return boeing.read(name, file)
        return matrix_market.read(name, file)
