"""Where files come from: packed, in archives, through pipes; and what is told of those that are something else."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
import tarfile
import time

import pytest

from functional_lstsq.cli import sources
from functional_lstsq.cli.errors import BadInput
from functional_lstsq.cli.files import read_matrix
from functional_lstsq.cli.formats import read

REAL, ARRAY = (b"%%MatrixMarket matrix " + kind + b" real general\n" for kind in (b"coordinate", b"array"))
A = REAL + b"2 3 3\n1 1 1.5\n2 3 -2\n2 1 1e-3\n"
DENSE = [[1.5, 0, 0], [1e-3, 0, -2]]
PROGRAM = """
import sys
from functional_lstsq.cli.files import read_matrix
print(read_matrix(sys.argv[1]).to_dense().tolist())
"""


def written(folder, data, name="A.mtx"):
    path = folder / name
    path.write_bytes(data)
    return str(path)


def archive(members, mode="w"):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


RIGHT = ARRAY + b"2 1\n7\n8\n"
COLLECTION = {"name/name_b.mtx": RIGHT, "name/name.mtx": A, "name/README.txt": b"nothing"}
MATLAB = b"MATLAB 5.0 MAT-file" + b" " * 200
OTHERS = {
    "zip": (b"PK\x03\x04" + A, "it is a zip archive: unpack it first"),
    "zstd": (b"\x28\xb5\x2f\xfd" + A, "it is compressed by zstd: unpack it first"),
    "UTF-16": (A.decode().encode("utf-16"), "it is in UTF-16: write it in ASCII or UTF-8"),
    "HDF5": (b"\x89HDF\r\n\x1a\n", "it is an HDF5 file; of MATLAB's, save it with -v7"),
    "MAT": (MATLAB, "not a MAT file that can be read"),
    "nothing": (b"", "the file is empty"),
    "nothing, packed": (gzip.compress(b""), "the file is empty"),
    "gz cut short": (gzip.compress(A)[:-20], "end"),
    "gz with a wrong sum": (gzip.compress(A)[:-8] + b"\0" * 8, "CRC check failed"),
    "bz2 cut short": (bz2.compress(A)[:-20], "end"),
    "xz cut short": (lzma.compress(A)[:-20], "end"),
    "xz that is damaged": (lzma.compress(A)[:30] + b"\xff" * 40 + lzma.compress(A)[70:], "corrupt"),
    "tar without a matrix": (archive({"name/README": b"no"}), "one .mtx or .rb file is wanted, and it holds none"),
    "tar with two": (archive({"a.mtx": A, "b.mtx": A}), "one .mtx or .rb file is wanted, and it holds a.mtx, b.mtx"),
    "tar.gz cut short": (archive(COLLECTION, "w:gz")[:200], "end"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_text_of_this_format_is_told_by_name(tmp_path, name):
    data, why = OTHERS[name]
    path = written(tmp_path, data)
    with pytest.raises(BadInput, match=rf"^cannot read {re.escape(path)}: .*{why}"):
        read(path)


def in_two_parts(data):
    return gzip.compress(data[:9]) + gzip.compress(data[9:])


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, in_two_parts])
def test_a_compressed_file_is_known_by_its_content(tmp_path, pack):
    for name in ("A", "A.mtx", "A.mtx.gz", "A.xz"):
        assert read_matrix(written(tmp_path, pack(A), name)).to_dense().tolist() == DENSE


PACKED = {"plain": A, "gz": gzip.compress(A), "bz2": bz2.compress(A), "xz": lzma.compress(A)}
TARS = {mode: archive({"name/name.mtx": A, "name/name_b.mtx": RIGHT}, mode) for mode in ("w", "w:gz", "w:xz")}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_of_an_archive_the_matrix_is_read(tmp_path, mode):
    assert read_matrix(written(tmp_path, archive(COLLECTION, mode))).to_dense().tolist() == DENSE
    assert read_matrix(written(tmp_path, archive({"./b.mtx": A}, mode))).to_dense().tolist() == DENSE


def piped(data, name, first=None):
    """What a process reads from a pipe, into which `first` bytes are written some time before the others."""
    command = [sys.executable, "-c", PROGRAM, name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        if first is not None:
            process.stdin.write(data[:first])
            process.stdin.flush()
            time.sleep(4)  # by when it has begun to read
        out, err = process.communicate(data[first or 0 :], timeout=120)
    return json.loads(out) if out else err.decode()


@pytest.mark.parametrize("name", ["-", pytest.param("/dev/stdin", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["plain", "xz", "tar.gz"])
def test_standard_input_may_be_packed_too(name, kind):
    if not os.path.exists("/dev/stdin") and name != "-":
        pytest.skip("there is no /dev/stdin")
    assert piped({**PACKED, "tar.gz": TARS["w:gz"]}[kind], name) == DENSE


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "first"), [("gz", 1), ("xz", 5), ("tar", 1), ("tar", 200)])
def test_a_pipe_may_begin_with_a_few_bytes(kind, first):
    assert piped({**PACKED, "tar": TARS["w"]}[kind], "-", first) == DENSE


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = written(tmp_path, A)
    os.chmod(path, 0)
    with pytest.raises(BadInput, match=r"^cannot read .*: permission denied$"):
        read(path)


@pytest.mark.parametrize(("name", "why"), [(".", "it is a folder"), ("none", "no such file"), ("A\0", "null byte")])
def test_what_is_no_file(tmp_path, name, why):
    with pytest.raises(BadInput, match=f"^cannot read .*: .*{why}"):
        read(str(tmp_path / name))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("filling", [b" ", b"\n", b"%\n", b"1 1 1\n"])
def test_what_unpacks_without_end_is_refused(tmp_path, monkeypatch, pack, filling):
    monkeypatch.setattr(sources, "_MOST", 2**16)
    monkeypatch.setattr(sources, "_BUFFER", 2**12)
    path = written(tmp_path, pack(A + filling * (2**18 // len(filling))))
    monkeypatch.setattr(sources, "_RATIO", 4)
    with pytest.raises(BadInput, match=r"it unpacks to more than 65536 bytes and 4 times its own size"):
        read(path)


def test_what_merely_packs_well_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_MOST", 2**16)
    monkeypatch.setattr(sources, "_RATIO", 10**4)
    path = written(tmp_path, gzip.compress(A.replace(b"2 3 3", b"2 3 32771") + b"2 2 1\n" * 2**15))
    assert read_matrix(path).to_dense().tolist() == [[1.5, 0, 0], [1e-3, 2**15, -2]]
