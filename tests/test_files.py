"""Matrix Market files: what is taken, as which matrix, and what is refused, saying why and in which line."""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.sparse
import torch
from market import parse

import functional_lstsq as fl
from functional_lstsq.cli import main
from functional_lstsq.cli.files import read_matrix

A = b"%%MatrixMarket matrix coordinate real general\n2 3 3\n1 1 1.5\n2 3 -2\n2 1 1e-3\n"
DENSE = [[1.5, 0, 0], [1e-3, 0, -2]]


def banner(kind):
    return f"%%MatrixMarket matrix {kind}\n".encode()


def written(folder, data, name="A.mtx"):
    path = folder / name
    path.write_bytes(data)
    return str(path)


REAL, ARRAY = banner("coordinate real general"), banner("array real general")
VALID = {
    "a D exponent": (REAL + b"1 2 2\n1 1 1.5D+02\n1 2 -.5d-1\n", [[150, -0.05]]),
    "points without digits": (REAL + b"1 3 3\n1 1 1.\n1 2 .5\n1 3 +2.e0\n", [[1, 0.5, 2]]),
    "leading zeros": (REAL + b"01 1 1\n001 01 007e00\n", [[7]]),
    "below the range of doubles": (REAL + b"1 2 2\n1 1 1e-400\n1 2 4.9e-324\n", [[0, 5e-324]]),
    "a byte-order mark": (b"\xef\xbb\xbf" + A, DENSE),
    "a banner in upper case": (banner("coordinate real general").upper() + b"1 1 1\n1 1 3\n", [[3]]),
    "CRLF": (A.replace(b"\n", b"\r\n"), DENSE),
    "a last line without an end": (A[:-1], DENSE),
    "a last line that ends in a space": (A[:-1] + b" ", DENSE),
    "a last line that ends in CR": (A[:-1] + b"\r", DENSE),
    "tabs": (A.replace(b"2 3 3", b"\t2\t3 \t3").replace(b"2 1 1", b"2\t1\t \t1"), DENSE),
    "blank lines": (A.replace(b"\n", b"\n \n\r\n\t\n"), DENSE),
    "comments": (A.replace(b"general\n", b"general\n%\n% 3 3 1\n\n%%MatrixMarket \xff\n"), DENSE),
    "duplicates": (REAL + b"2 1 4\n1 1 1\n2 1 5\n1 1 2\n1 1 -4\n", [[-1], [5]]),
    "integers": (banner("coordinate integer general") + b"1 2 2\n1 1 +300\n1 2 -7\n", [[300, -7]]),
    "unsigned integers": (banner("array unsigned-integer general") + b"1 1\n4000000000\n", [[4e9]]),
    "doubles": (banner("array double general") + b"1 1\n.1\n", [[0.1]]),
    "complex numbers": (banner("coordinate complex general") + b"1 1 1\n1 1 1.5 -2D0\n", [[1.5 - 2j]]),
    "a pattern": (banner("coordinate pattern general") + b"2 2 2\n1 2\n2 1\n", [[0, 1], [1, 0]]),
    "a symmetric pattern": (banner("coordinate pattern symmetric") + b"2 2 2\n1 1\n2 1\n", [[1, 1], [1, 0]]),
    "symmetric": (banner("coordinate real symmetric") + b"2 2 2\n1 1 4\n2 1 -3\n", [[4, -3], [-3, 0]]),
    "skew-symmetric": (banner("coordinate real skew-symmetric") + b"2 2 1\n2 1 -3\n", [[0, 3], [-3, 0]]),
    "hermitian": (
        banner("coordinate complex hermitian") + b"2 2 2\n1 1 4 0\n2 1 1 -3\n",
        [[4, 1 + 3j], [1 - 3j, 0]],
    ),
    "an array by columns": (ARRAY + b"2 3\n1\n2\n3\n4\n5\n6\n", [[1, 3, 5], [2, 4, 6]]),
    "a symmetric array": (banner("array real symmetric") + b"2 2\n1\n2\n3\n", [[1, 2], [2, 3]]),
    "a larger symmetric array": (
        banner("array integer symmetric") + b"3 3\n1\n2\n3\n4\n5\n6\n",
        [[1, 2, 3], [2, 4, 5], [3, 5, 6]],
    ),
    "a skew-symmetric array": (
        banner("array real skew-symmetric") + b"3 3\n1\n2\n3\n",
        [[0, -1, -2], [1, 0, -3], [2, 3, 0]],
    ),
    "a hermitian array": (banner("array complex hermitian") + b"2 2\n1 0\n2 3\n4 0\n", [[1, 2 - 3j], [2 + 3j, 4]]),
    "an array without rows": (ARRAY + b"0 3\n", np.zeros((0, 3))),
    "an array without columns": (ARRAY + b"3 0", np.zeros((3, 0))),
    "no rows": (REAL + b"0 3 0\n", np.zeros((0, 3))),
    "no columns": (REAL + b"3 0 0\n", np.zeros((3, 0))),
    "no entries": (REAL + b"2 2 0\n", np.zeros((2, 2))),
    "nothing at all": (banner("coordinate complex hermitian") + b"0 0 0", np.zeros((0, 0))),
    "more lines than one reading takes": (REAL + b"2 1 150000\n" + b"2 1 1\n" * 150000, [[0], [150000]]),
}


@pytest.mark.parametrize("name", VALID)
def test_a_file_is_the_matrix_that_the_format_says(tmp_path, name):
    data, want = VALID[name]
    want = torch.as_tensor(np.array(want))
    got = read_matrix(written(tmp_path, data)).to_dense()
    assert torch.equal(got.to(torch.complex128), want.to(torch.complex128))
    shape, entries = parse(data)  # which the fuzzer relies on
    assert shape == tuple(want.shape)
    assert all(entries.get((i, j), 0) == want[i, j] for i in range(shape[0]) for j in range(shape[1]))


REFUSED = {
    "cut in an exponent": (A[:-2], 5, "value must be a number, got '1e-'"),
    "a NUL byte": (A.replace(b"1.5", b"1\x00.5"), 3, r"value must be a number, got '1\x00.5'"),
    "a comma in a number": (A.replace(b"1.5", b"1,5"), 3, "value must be a number, got '1,5'"),
    "a hexadecimal number": (A.replace(b"1.5", b"0x10"), 3, "value must be a number, got '0x10'"),
    "an underscore in a number": (A.replace(b"1.5", b"1_000"), 3, "value must be a number, got '1_000'"),
    "letters behind a number": (A.replace(b"1.5", b"1.5abc"), 3, "value must be a number, got '1.5abc'"),
    "an exponent without a letter": (A.replace(b"1.5", b"1.5+02"), 3, "value must be a number, got '1.5+02'"),
    "not a number": (A.replace(b"1.5", b"nan"), 3, "value must be finite, got 'nan'"),
    "infinity": (A.replace(b"1.5", b"-Inf"), 3, "value must be finite, got '-Inf'"),
    "beyond the range of doubles": (A.replace(b"1.5", b"1e999"), 3, "numbers must be in the range of double precision"),
    "a form feed between numbers": (A.replace(b"1 1.5", b"1\f1.5"), 3, "numbers must be separated by blanks"),
    "a real number among integers": (
        banner("coordinate integer general") + b"1 1 1\n1 1 5e2\n",
        3,
        "value must be an integer, got '5e2'",
    ),
    "a weight in a pattern": (banner("coordinate pattern general") + b"1 1 1\n1 1 5\n", 3, "2 numbers, got '1 1 5'"),
    "a second value": (A.replace(b"1.5", b"1.5 2"), 3, "3 numbers, got '1 1 1.5 2'"),
    "no value": (A.replace(b"3 -2", b"3"), 4, "3 numbers, got '2 3'"),
    "half a complex number": (banner("array complex general") + b"1 1\n1\n", 3, "real, imaginary part: 2 numbers"),
    "two values in a line": (ARRAY + b"2 1\n1 2\n", 3, "an entry must be value: 1 numbers, got '1 2'"),
    "row 0": (
        A.replace(b"1 1 1", b"0 1 1"),
        3,
        "a row must lie between 1 and 2, since indices count from 1, got '0 1 1.5'",
    ),
    "a row beyond the last": (A.replace(b"1 1 1", b"3 1 1"), 3, "a row must lie between 1 and 2"),
    "a row beyond any": (A.replace(b"1 1 1", b"18446744073709551617 1 1"), 3, "a row must lie between 1 and 2"),
    "a column beyond the last": (A.replace(b"2 3 -2", b"2 4 -2"), 4, "a column must lie between 1 and 3"),
    "a row with a sign": (A.replace(b"1 1 1", b"+1 1 1"), 3, "row must be a positive integer, got '+1'"),
    "a row with a point": (A.replace(b"1 1 1", b"1. 1 1"), 3, "row must be a positive integer, got '1.'"),
    "both triangles": (
        banner("coordinate real symmetric") + b"2 2 2\n2 1 1\n1 2 1\n",
        4,
        "symmetric has no entries above the diagonal, got '1 2 1'",
    ),
    "a diagonal of what is skew-symmetric": (
        banner("coordinate real skew-symmetric") + b"2 2 1\n1 1 0\n",
        3,
        "entries below the diagonal only",
    ),
    "a diagonal that is not real": (
        banner("coordinate complex hermitian") + b"2 2 1\n2 2 1 1e-9\n",
        3,
        "real numbers on the diagonal",
    ),
    "such a diagonal of an array": (
        banner("array complex hermitian") + b"2 2\n1 0\n2 3\n4 5\n",
        5,
        "real numbers on the diagonal, got '4 5'",
    ),
    "a symmetric array without its last value": (
        banner("array real symmetric") + b"2 2\n1\n2\n",
        4,
        "it ends after 2 of the 3 entries",
    ),
    "symmetric and not square": (banner("coordinate real symmetric") + b"4 2 0\n", 2, "must be square, got 4 x 2"),
    "too few entries": (A.replace(b"3 3", b"3 4"), 5, "it ends after 3 of the 4 entries"),
    "too many entries": (A.replace(b"3 3", b"3 2"), 5, "more entries than the 2 that its size promises"),
    "a comment among entries": (A.replace(b"2 3 -2", b"% 2"), 4, "comments must stand before the line with the size"),
    "a size with a sign": (A.replace(b"2 3 3", b"2 +3 3"), 2, "numbers of rows, columns and entries, got '2 +3 3'"),
    "an array that counts its entries": (ARRAY + b"1 1 1\n1\n", 2, "the numbers of rows and columns, got '1 1 1'"),
    "a size beyond any": (REAL + b"9007199254740992 1 1\n9007199254740993 1 1\n", 2, "no size may be above"),
    "a form feed in the size": (A.replace(b"2 3 3", b"2\f3 3"), 2, "rows, columns and entries, got '2\\x0c3 3'"),
    "a CR in the size": (A.replace(b"2 3 3", b"2\r3 3"), 2, "rows, columns and entries, got '2\\x0d3 3'"),
    "a vertical tab in the banner": (A.replace(b"real ", b"real\v"), 1, "must be %%MatrixMarket matrix FORMAT FIELD"),
    "a blank before the banner": (b" " + A, 1, "not a Matrix Market file, which begins with %%MatrixMarket"),
    "no size": (REAL + b"% 2 2 0\n", None, "it ends before the line with its size"),
    "an array that is a pattern": (banner("array pattern general") + b"1 1\n", 1, "array cannot go with pattern"),
    "real and hermitian": (banner("array real hermitian") + b"1 1\n1\n", 1, "real cannot go with hermitian"),
    "a word that is not known": (banner("coordinate quaternion general"), 1, "FIELD must be real, .*got 'quaternion'"),
    "a vector": (b"%%MatrixMarket vector coordinate real general\n", 1, "must be %%MatrixMarket matrix FORMAT FIELD"),
    "a line of a mebibyte": (REAL + b"1 1 1\n1 1 1" + b"0" * 2**21, 3, "a line of more than 1048576 bytes"),
    "Latin-1 in a number": (A.replace(b"1.5", b"1\xb2"), 3, r"value must be a number, got '1\xb2'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why_and_in_which_line(tmp_path, capsys, name):
    data, line, why = REFUSED[name]
    path = written(tmp_path, data)
    assert main(["info", path]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"functional_lstsq: cannot read {path}{'' if line is None else f', line {line}'}: "), said
    assert re.search(why, said) or why in said, said
    assert said.count("\n") == 1
    with pytest.raises(ValueError, match=r"."):  # as the fuzzer relies on
        parse(data[: 2**20])


def test_short_comments_take_no_longer_than_long_ones(tmp_path):
    """A line at a time out of a mebibyte, not a new mebibyte for each."""
    path = written(tmp_path, A.replace(b"general\n", b"general\n" + b"%\n" * 2**21))
    start = time.perf_counter()
    assert read_matrix(path).to_dense().tolist() == DENSE
    assert time.perf_counter() - start < 30  # 1 of them; it was 40


@pytest.mark.skipif(os.name != "posix", reason="needs the peak memory of a process")
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ("50000000 3", []),
        pytest.param("3 50000000", [], marks=pytest.mark.slow),
        pytest.param("50000000 50000000", ["--minimum-norm"], marks=pytest.mark.slow),
        ("50000000 50000000", ["--damp", "2"]),
    ],
)
def test_empty_rows_and_columns_take_no_memory(tmp_path, size, options):
    path = written(tmp_path, REAL + f"{size} 3\n1 1 1\n2 2 2\n{size} 3\n".encode())
    start = time.perf_counter()
    command = [sys.executable, "-m", "functional_lstsq", "solve", path, "--json", *options]
    # A process counts the memory of the one that started it, up to that moment: a small one in between has none.
    between = "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; " + (
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", between, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed, used = done.stdout, int(done.stderr.split()[-1])
    told = json.loads(printed)
    assert told["status"] == "converged"
    assert told["rank"] == (50000000 if "--damp" in options else 3)
    assert used / (2**20 if sys.platform != "darwin" else 2**30) < 1  # GiB; 0.3 with torch alone
    assert time.perf_counter() - start < 60


def test_small_types_add_up_in_double_precision():
    """In their own, 300 ones are 44 or True."""
    place = np.zeros(300, dtype=np.int64)
    for kind in (np.int8, np.uint8, bool, np.int16, np.float32):
        B = fl.SparseMatrix.from_scipy(scipy.sparse.coo_array((np.ones(300, dtype=kind), (place, place)), shape=(2, 2)))
        assert B.values.tolist() == [300.0]
    for kind in (torch.int8, torch.uint8, torch.bool, torch.int16, torch.float32):
        B = torch.sparse_coo_tensor(torch.zeros(2, 300, dtype=torch.int64), torch.ones(300, dtype=kind), (2, 2))
        assert fl.SparseMatrix.from_torch(B).values.tolist() == [300.0]
