"""Files beside Matrix Market: what other programs write is read, and what is not of the format is refused."""

import gzip
import io
import json
import re
import tarfile

import numpy as np
import pytest
import scipy.io
import scipy.sparse

from functional_lstsq.cli import main
from functional_lstsq.cli.errors import BadInput
from functional_lstsq.cli.files import read_matrix, read_right
from functional_lstsq.cli.formats import read

GENERATOR = np.random.default_rng(0)
D = np.round(GENERATOR.standard_normal((7, 4)) * (GENERATOR.random((7, 4)) < 0.6), 3)
D[0, 0], D[6, 3] = 1.0, -2.5
C = D + 1j * np.roll(D, 1, 0)
# As the SuiteSparse collection has it: fields that fill their lines, exponents with and without a letter.
RUTHERFORD = b"""\
A made matrix                                                           |made
             3             1             1             1
rua                        3             3             4             0
(4I4)           (4I3)           (4E12.4)
   1   3   4   5
  1  2  2  3
  1.5000E+00 -2.0000D+00  3.0000+000  4.0000E-01
"""
RUTHERFORD_DENSE = [[1.5, 0, 0], [-2, 3, 0], [0, 0, 0.4]]
SVM = b"# made\n1.5 1:2 3:-1e-1 # a row\n\n-2 2:.5\n0\n"


@pytest.fixture
def put(tmp_path):
    def write(name, data):
        path = tmp_path / name
        path.write_bytes(data)
        return str(path)

    return write


def dense(name):
    return read_matrix(name).to_dense().numpy()


@pytest.mark.parametrize("kind", ["csr", "csc", "coo"])
@pytest.mark.parametrize(
    "values", [D, C, D.astype(np.float32), (D * 1000).astype(np.int32)], ids=lambda v: str(v.dtype)
)
def test_npz_of_scipy(tmp_path, kind, values):
    for compressed in (True, False):
        scipy.sparse.save_npz(tmp_path / "A.npz", scipy.sparse.coo_array(values).asformat(kind), compressed=compressed)
        assert np.array_equal(dense(str(tmp_path / "A.npz")), values.astype(np.result_type(values, np.float64)))


@pytest.mark.parametrize("values", [D, C], ids=["real", "complex"])
@pytest.mark.parametrize("compressed", [True, False])
def test_mat_files(tmp_path, values, compressed):
    for content in (
        {"Problem": {"A": scipy.sparse.csc_matrix(values), "b": D[:, 0]}},
        {"A": scipy.sparse.csc_matrix(values), "n": 3},
        {"M": values},
    ):
        scipy.io.savemat(tmp_path / "A.mat", content, do_compression=compressed)
        assert np.array_equal(dense(str(tmp_path / "A.mat")), values)


def test_rutherford_boeing(put):
    assert np.array_equal(dense(put("A.rb", RUTHERFORD)), RUTHERFORD_DENSE)
    assert np.array_equal(dense(put("A.any.gz", gzip.compress(RUTHERFORD.replace(b"\n", b"\r\n")))), RUTHERFORD_DENSE)
    lower = RUTHERFORD.replace(b"rua", b"rsa")
    assert np.array_equal(dense(put("A.rsa", lower)), [[1.5, -2, 0], [-2, 3, 0], [0, 0, 0.4]])
    pattern = b"\n".join(RUTHERFORD.replace(b"rua", b"pua").split(b"\n")[:6]) + b"\n"
    pattern = pattern.replace(
        b"3             1             1             1", b"2             1             1             0"
    )
    assert np.array_equal(dense(put("A.rb", pattern)), [[1, 0, 0], [1, 1, 0], [0, 0, 1]])


def test_an_archive_with_a_rutherford_boeing_file(tmp_path):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        member = tarfile.TarInfo("made/made.rb")
        member.size = len(RUTHERFORD)
        archive.addfile(member, io.BytesIO(RUTHERFORD))
    (tmp_path / "made.tar.gz").write_bytes(data.getvalue())
    assert np.array_equal(dense(str(tmp_path / "made.tar.gz")), RUTHERFORD_DENSE)


@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (1, 1)])
def test_harwell_boeing_of_scipy(tmp_path, shape):
    A = scipy.sparse.random_array(shape, density=0.3, rng=0).tocsc()
    A = A if A.nnz else scipy.sparse.csc_array(np.ones(shape))
    scipy.io.hb_write(tmp_path / "A.rua", A)
    assert np.array_equal(dense(str(tmp_path / "A.rua")), A.toarray())


def test_svmlight_is_a_matrix_and_its_labels(put):
    name = put("data.svm", SVM)
    A = read_matrix(name)
    assert A.to_dense().tolist() == [[2, 0, -0.1], [0, 0.5, 0], [0, 0, 0]]
    assert read_right(name, A, name).tolist() == [1.5, -2, 0]


@pytest.mark.parametrize("values", [D[:, 0], D, C], ids=["vector", "columns", "complex"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(tmp_path, values, order):
    np.save(tmp_path / "b.npy", np.asarray(values, order=order))
    A = read_matrix(str(tmp_path / "b.npy"))
    assert np.array_equal(A.to_dense().numpy(), values.reshape(7, -1))
    assert np.array_equal(read_right(str(tmp_path / "b.npy"), A, "A").numpy(), values)


@pytest.mark.parametrize(
    ("ending", "options"), [("txt", {}), ("csv", {"delimiter": ","}), ("txt.gz", {}), ("csv.gz", {"delimiter": ", "})]
)
def test_text_of_numpy(tmp_path, ending, options):
    np.savetxt(tmp_path / f"b.{ending}", D, header="four columns", **options)
    assert np.array_equal(dense(str(tmp_path / f"b.{ending}")), D)


def archive_of(**changed):
    A, file = scipy.sparse.csr_array(D), io.BytesIO()
    arrays = {
        "format": np.array(b"csr"),
        "shape": np.array(A.shape),
        "data": A.data,
        "indices": A.indices,
        "indptr": A.indptr,
    }
    np.savez(file, **{key: value for key, value in (arrays | changed).items() if value is not None})
    return file.getvalue()


def saved(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def mat(**content):
    file = io.BytesIO()
    scipy.io.savemat(file, content)
    return file.getvalue()


INDICES = scipy.sparse.csr_array(D).indices
BAD = {
    "an npz of objects": ("A.npz", archive_of(data=np.array([None] * len(INDICES))), "got Python objects"),
    "an npz with an index outside": ("A.npz", archive_of(indices=INDICES + 1), "column 5 lies outside of 1 to 4"),
    "an npz with a negative index": ("A.npz", archive_of(indices=INDICES - 1), "column 0 lies outside of 1 to 4"),
    "an npz whose pointers fall": (
        "A.npz",
        archive_of(indptr=np.array([0, 5, 3, 3, 3, 3, 3, len(INDICES)])),
        "pointers must rise",
    ),
    "an npz without values": ("A.npz", archive_of(data=None), "zip archive: unpack it first, or write it by"),
    "an npz with too few values": ("A.npz", archive_of(data=np.ones(3)), "positions for values of shape"),
    "an npz of blocks": ("A.npz", archive_of(format=np.array(b"bsr")), "CSR, CSC or COO .* got 'bsr'"),
    "an npz with NaN": ("A.npz", archive_of(data=np.full(len(INDICES), np.nan)), "must be finite, got NaN"),
    "half an npz": ("A.npz", archive_of()[:300], "zip archive: unpack it first"),
    "an npy of objects": ("b.npy", saved(np.array([{}]), allow_pickle=True), "got Python objects"),
    "an npy of text": ("b.npy", saved(np.array(["a"])), "must hold numbers, got <U1"),
    "half an npy": ("b.npy", saved(D)[:-8], "ends before the array of shape"),
    "an npy and more": ("b.npy", saved(D) + b"1", "bytes after the array"),
    "an npy of three dimensions": ("b.npy", saved(np.ones((2, 2, 2))), "one or two dimensions"),
    "a huge npy": (
        "b.npy",
        saved(D).replace(b"(7, 4), }      ", b"(7, 400000000000)}"),
        "not fit into memory|not an array",
    ),
    "a MAT file with two matrices": (
        "A.mat",
        mat(A=scipy.sparse.csc_matrix(D), B=scipy.sparse.csc_matrix(D)),
        "it holds A, B",
    ),
    "a MAT file of text": ("A.mat", mat(name="made"), "Problem.A or one matrix is wanted, and it holds nothing"),
    "half a MAT file": ("A.mat", mat(A=D)[:200], "not a MAT file that can be read"),
    "indices from 0 in a column": (
        "A.rb",
        RUTHERFORD.replace(b"\n  1  2  2", b"\n  0  2  2"),
        r"line 6: .*indices count from 1\), got 0",
    ),
    "pointers from 0": (
        "A.rb",
        RUTHERFORD.replace(b"   1   3   4   5", b"   0   2   3   4"),
        "line 5: pointers must rise from 1 to 5, since indices count from 1",
    ),
    "a field that is no number": (
        "A.rb",
        RUTHERFORD.replace(b"-2.0000D+00", b"-2,0000D+00"),
        "line 7: each field must be a number with its decimal point, got '-2,0000D",
    ),
    "a field without a point": ("A.rb", RUTHERFORD.replace(b"-2.0000D+00", b"-200000D+00"), "line 7: each field"),
    "numbers out of their fields": ("A.rb", RUTHERFORD.replace(b"-2.0000D+00", b"-2.00000D+00"), "line 7"),
    "too few values": ("A.rb", RUTHERFORD.replace(b"  4.0000E-01", b""), "line 7: each field .* got none|line 7"),
    "an elemental matrix": ("A.rb", RUTHERFORD.replace(b"rua", b"rue"), "line 3: a matrix must be assembled"),
    "a strange format": ("A.rb", RUTHERFORD.replace(b"(4E12.4)", b"(4Z12.4)"), "line 4: its formats"),
    "a symmetric one with both halves": (
        "A.rb",
        RUTHERFORD.replace(b"rua", b"rsa").replace(b"\n  1  2  2  3", b"\n  1  2  1  3"),
        "lower triangle only",
    ),
    "half a header": ("A.rb", RUTHERFORD[:240], "."),
    "an index of 0": ("A.svm", b"1 0:1 1:2\n", "line 1: indices count from 1, got 0"),
    "indices that do not ascend": ("A.svm", b"1 1:1\n2 3:1 2:1\n", "line 2: indices must ascend"),
    "a query": ("A.svm", b"1 qid:3 1:1\n", "line 1: a row must be a label and pairs"),
    "a pair that is none": ("A.svm", b"1 1:1\n2 2:x\n", "line 2: .* got '2 2:x'"),
    "a value beyond double precision": ("A.svm", b"1 1:1e999\n", "must be finite, got infinity"),
    "names of columns": (
        "b.csv",
        b"time,height\n1,2\n",
        "line 1: numbers must be separated by commas; comments and names of columns begin with #",
    ),
    "a comma for a point": ("b.txt", b"1,5\n", "line 1: numbers must be separated by blanks, got '1,5'"),
    "lines of other lengths": ("b.csv", b"1,2\n3\n", "line 2: 1 numbers, where the first line has 2"),
    "an empty cell": ("b.csv", b"1,,2\n", "line 1: numbers must be separated by commas, got '1,,2'"),
    "nan in text": ("b.txt", b"1\nnan\n", "line 2: .* got 'nan'"),
    "numbers without a name for it": ("b.dat", b"1 2\n3 4\n", "not a Matrix Market file"),
}


@pytest.mark.parametrize(("name", "data", "message"), BAD.values(), ids=BAD)
def test_what_is_refused_says_why(put, name, data, message):
    with pytest.raises(BadInput, match=message) as caught:
        read(put(name, data))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(60))
def test_a_spoilt_file_is_refused_or_read_and_never_a_crash(put, tmp_path, seed):
    """Bytes changed, cut off or put in at random, in a file of each kind."""
    generator = np.random.default_rng(seed)
    scipy.io.hb_write(tmp_path / "whole.rua", scipy.sparse.csc_array(D))
    kinds = [
        ("A.npz", archive_of()),
        ("A.mat", mat(A=scipy.sparse.csc_matrix(D))),
        ("A.rb", RUTHERFORD),
        ("A.rua", (tmp_path / "whole.rua").read_bytes()),
        ("A.svm", SVM),
        ("A.npy", saved(D)),
        ("A.csv", b"1,2\n3,4\n"),
    ]
    for name, data in kinds:
        spoilt = bytearray(data)
        for _ in range(generator.integers(1, 4)):
            place = int(generator.integers(len(spoilt)))
            change = generator.integers(3)
            spoilt[place : place + 1 - (change == 1)] = b"" if change == 2 else bytes([int(generator.integers(256))])
        try:
            found = read(put(name, bytes(spoilt)))
        except BadInput:
            continue
        assert len(found.rows) == len(found.columns) == len(found.values)
        assert np.isfinite(found.values).all()


def test_from_the_shell(put, tmp_path, capsys):
    scipy.sparse.save_npz(tmp_path / "A.npz", scipy.sparse.csr_array(D))
    np.save(tmp_path / "b.npy", D @ [1.0, 2, 3, 4])
    np.savetxt(tmp_path / "w.csv", np.arange(1.0, 8))
    arguments = ["solve", f"{tmp_path}/A.npz", f"{tmp_path}/b.npy", "--weights", f"{tmp_path}/w.csv"]
    assert main([*arguments, "-o", f"{tmp_path}/x.mtx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "converged"
    assert np.allclose(scipy.io.mmread(tmp_path / "x.mtx")[:, 0], [1, 2, 3, 4])
    data = put("data.svm", b"3 1:1\n5 1:1 2:1\n7 2:2\n")
    assert main(["solve", data, data, "-o", f"{tmp_path}/x.mtx", "--quiet"]) == 0
    assert main(["info", put("A.rb", RUTHERFORD), "--no-condition"]) == 0
    assert re.search(r"coordinate real general, 4 numbers stored", capsys.readouterr().out)
