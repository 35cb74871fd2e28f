"""`solve` on the ranks of torchrun, held against `solve` in one process: real processes, on the loopback device."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
from commands import bytes_read, speak, spoken
from helpers import problem

import functional_lstsq as fl

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch has no gloo"
)
SIZES = 1, 2, 3


def processes(function, size, folder, *given):
    """What each of `size` processes has left in a folder."""
    torch.multiprocessing.spawn(function, (size, str(folder), *given), size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def put(name, matrix, **how):
    scipy.io.mmwrite(name, matrix, precision=17, **how)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of every kind; of entries in any order, as `problem` has them."""
    folder, m, n, g = tmp_path_factory.mktemp("files"), 61, 7, np.random.default_rng(1)
    pattern, values, b = problem(m, n)
    A = scipy.sparse.coo_array((values.numpy(), pattern.indices.numpy()), (m, n))
    i, j = A.coords
    put(folder / "A.mtx", A, symmetry="general")
    put(folder / "b.mtx", b.numpy()[:, None])
    put(folder / "bb.mtx", np.stack([b.numpy(), b.numpy() ** 2], 1))
    put(folder / "w.mtx", g.uniform(0.5, 2, (m, 1)))
    put(folder / "complex.mtx", scipy.sparse.coo_array((A.data * np.exp(1j * A.data), (i, j)), A.shape))
    twice = np.r_[np.arange(A.nnz), np.arange(9)]
    put(folder / "twice.mtx", scipy.sparse.coo_array((A.data[twice], (i[twice], j[twice])), A.shape))
    put(folder / "few.mtx", scipy.sparse.coo_array(np.array([[1.0, 0], [1, 2]])))
    apart = scipy.sparse.coo_array((A.data, (i + (i > 20) * 400, j)), (500, n))
    put(folder / "apart.mtx", apart)
    dense = np.where(np.abs(A.toarray()) > 0.5, A.toarray(), 0)
    put(folder / "dense.mtx", dense)
    square = dense[:n] + dense[:n].T + 9 * np.eye(n)
    put(folder / "symmetric.mtx", scipy.sparse.coo_array(square), symmetry="symmetric")
    put(folder / "skew.mtx", scipy.sparse.coo_array(dense[:6, :6] - dense[:6, :6].T), symmetry="skew-symmetric")
    hermitian = square + 1j * (dense[:n] - dense[:n].T)
    put(folder / "hermitian.mtx", scipy.sparse.coo_array(hermitian), symmetry="hermitian")
    put(folder / "pattern.mtx", scipy.sparse.coo_array((np.ones(A.nnz), (i, j)), A.shape), field="pattern")
    text = (folder / "A.mtx").read_text().splitlines()
    (folder / "blank.mtx").write_bytes(("\r\n\r\n".join(text)).encode() + b"\r\n\r\n")
    put(folder / "Deficient.mtx", scipy.sparse.coo_array(np.ones((9, 2))))
    (folder / "packed.mtx.gz").write_bytes(gzip.compress((folder / "A.mtx").read_bytes()))
    put(folder / "wide.mtx", scipy.sparse.coo_array(A.toarray()[:5]))
    put(folder / "l.mtx", g.uniform(-0.3, 0, (n, 1)))
    put(folder / "u.mtx", np.r_[1e300, g.uniform(0, 0.3, n - 1)][:, None])
    put(folder / "short.mtx", np.ones((5, 1)))
    put(folder / "minus.mtx", -np.ones((m, 1)))
    put(folder / "dense-symmetric.mtx", square, symmetry="symmetric")
    for name, line in (("nan", "1 1 nan"), ("far", "62 1 2.0"), ("late", "1 1")):
        (folder / f"{name}.mtx").write_text("\n".join([*text, line]).replace(f" {A.nnz}\n", f" {A.nnz + 1}\n") + "\n")
    (folder / "ends.mtx").write_text("\n".join(text[:-5]) + "\n")
    (folder / "more.mtx").write_text("\n".join([*text, "1 1 2.0", "1 2 2.0"]) + "\n")
    (folder / "endless.mtx").write_bytes("\n".join(text[:-1]).encode() + b"\n" + b"1" * 2**22)
    for rank in range(3):  # as of machines that share no disk
        (folder / f"own{rank}.mtx").write_text("\n".join(text))
        (folder / f"other{rank}.mtx").write_bytes((folder / f"{'twice' if rank == 1 else 'A'}.mtx").read_bytes())
        put(folder / f"{rank}l.mtx", np.full((n, 1), 0.1 * rank))
    (folder / "own1.mtx").unlink()
    (folder / "older").mkdir()
    (folder / "older/G.part-7.mtx").write_text("")
    (folder / "parts").mkdir()
    rows = A.tocsr()
    for k, (first, last) in enumerate([(0, 5), (5, 5), (5, 47), (47, m)]):
        scipy.sparse.save_npz(folder / f"parts/A.part-{k}.npz", rows[first:last])
    for k, (first, last) in enumerate([(0, 30), (30, m)]):
        np.save(folder / f"parts/b.part-{k}.npy", b.numpy()[first:last])
    for name, kept in (("only", range(4)), ("gap", (0, 1, 3))):
        (folder / name).mkdir()
        for k in kept:
            (folder / name / f"A.part-{k}.npz").write_bytes((folder / f"parts/A.part-{k}.npz").read_bytes())
    (folder / "odd").mkdir()
    put(folder / "odd/A.part-0.mtx", A)
    put(folder / "odd/A.part-1.mtx", scipy.sparse.coo_array(dense[:, :5]))
    return folder


def names(folder, arguments, gradient=""):
    """The command for these files; what it writes a gradient to has a name of its own for each case."""
    every = (argument.replace("@G.", f"@G {gradient}.") if gradient else argument for argument in arguments)
    return ["solve", *(argument.replace("@", f"{folder}/") for argument in every)]


WHOLE = {  # name: (on ranks, what one process is asked for; None for the same)
    "in any order": (["@A.mtx", "@b.mtx"], None),
    "by iteration": (["@A.mtx", "@b.mtx", "--solver", "cgls"], None),
    "weights and damp": (["@A.mtx", "@b.mtx", "--weights", "@w.mtx", "--damp", "0.5"], None),
    "several columns": (["@A.mtx", "@bb.mtx", "--refine", "extended"], None),
    "no right-hand side": (["@A.mtx", "--solver", "dense"], None),
    "complex": (["@complex.mtx", "@b.mtx"], None),
    "entries twice": (["@twice.mtx", "@b.mtx"], None),
    "fewer rows than ranks": (["@few.mtx"], None),
    "empty rows": (["@apart.mtx"], None),
    "dense": (["@dense.mtx", "@b.mtx"], None),
    "symmetric": (["@symmetric.mtx"], None),
    "skew-symmetric": (["@skew.mtx"], None),
    "hermitian": (["@hermitian.mtx"], None),
    "pattern": (["@pattern.mtx", "@b.mtx"], None),
    "blank lines": (["@blank.mtx", "@b.mtx"], None),
    "parts": (["@parts/A.part-*.npz", "@parts/b.part-*.npy"], ["@A.mtx", "@b.mtx"]),
    "nonnegative": (["@A.mtx", "@b.mtx", "--nonnegative"], None),
    "bounds": (["@A.mtx", "@bb.mtx", "--lower", "@l.mtx", "--upper", "@u.mtx", "--weights", "@w.mtx"], None),
    "bounds, wide": (["@wide.mtx", "--lower", "0.1", "--upper", "0.7"], None),
    "minimum norm": (["@Deficient.mtx", "--minimum-norm"], None),
    "minimum norm, wide": (["@wide.mtx", "--minimum-norm"], None),
    "gradient": (["@A.mtx", "@b.mtx", "--weights", "@w.mtx", "--gradient", "@G.part-*.mtx"], None),
    "gradient, bounds": (["@twice.mtx", "@bb.mtx", "--lower", "0", "--gradient", "@G.part-*.mtx"], None),
    "gradient, complex": (["@complex.mtx", "@b.mtx", "--damp", "1", "--gradient", "@G.part-*.mtx"], None),
    "gradient, minimum norm": (["@wide.mtx", "--minimum-norm", "--gradient", "@G.part-*.mtx"], None),
    "a folder of parts": (["@only", "@b.mtx"], ["@A.mtx", "@b.mtx"]),
}
REFUSED = {  # name: (arguments, message, status)
    "no file": (["@none.mtx"], "none.mtx: no such file or directory", 2),
    "no file on one rank": (["@own{rank}.mtx"], "on rank 1: cannot read .*own1.mtx: no such file or directory$", 2),
    "another file on one rank": (
        ["@other{rank}.mtx"],
        "what the first lines of the file say must be the same on all ranks",
        2,
    ),
    "checkpoint to a pipe": (["@A.mtx", "--checkpoint", "-"], "--checkpoint: must be a file", 2),
    "resume from nothing": (["@A.mtx", "--resume"], "--resume: from which --checkpoint FILE", 2),
    "another size": (["@A.mtx", "@short.mtx"], "short.mtx has 5 rows, .*A.mtx has 61", 2),
    "NaN": (["@nan.mtx"], "on rank .: cannot read .*nan.mtx, line .*: value must be finite, got 'nan'", 2),
    "a row too far": (["@far.mtx"], "far.mtx, line .*: a row must lie between 1 and 61", 2),
    "half a line": (["@late.mtx"], "late.mtx, line .*: an entry must be row, column, value", 2),
    "too few entries": (["@ends.mtx"], "ends.mtx: it ends after .* of the .* entries that its size promises", 2),
    "too many entries": (["@more.mtx"], "more.mtx: it has .* entries, more than the .* that its size promises", 2),
    "an endless line": (["@endless.mtx"], "a line of more than 1048576 bytes", 2),
    "compressed": (["@packed.mtx.gz"], "many ranks read a Matrix Market file that is not compressed", 2),
    "standard input": (["-"], "many ranks need a file that each can open", 2),
    "dense and symmetric": (["@dense-symmetric.mtx"], "many ranks read no dense array that is symmetric", 2),
    "a part is missing": (["@gap"], "part 2 is missing", 2),
    "two kinds of parts": (["@parts"], r"it holds A.part-\*.npz, b.part-\*.npy: name one of these", 2),
    "no parts": (["@none.part-*.npz"], "of one kind are wanted, and it holds none", 2),
    "parts of another width": (["@odd"], "A.part-.*mtx has . columns, another part of .* has 7", 2),
    "negative weights": (["@A.mtx", "--weights", "@minus.mtx"], "minus.mtx must hold no negative weight, got -1", 2),
    "two columns of weights": (["@A.mtx", "--weights", "@bb.mtx"], "one column of real weights, got 2", 2),
    "no folder": (["@A.mtx", "-o", "@no/x.mtx"], "no is not a folder", 2),
    "robust": (["@A.mtx", "--robust", "huber"], "--robust: not allowed on the ranks of torchrun", 2),
    "a gradient in one file": (["@A.mtx", "--gradient", "@G.mtx"], r"so a name as 'G.part-\*.mtx' is wanted", 2),
    "a gradient beside older parts": (
        ["@A.mtx", "--gradient", "@older/G.part-*.mtx"],
        "G.part-7.mtx, of more ranks than .; remove it first",
        2,
    ),
    "a gradient in the place of x": (
        ["@A.mtx", "-o", "@G.part-0.mtx", "--gradient", "@G.part-*.mtx"],
        "cannot write both results to",
        2,
    ),
    "two lower bounds": (["@A.mtx", "--nonnegative", "--lower", "0"], "--nonnegative: not allowed with --lower", 2),
    "bounds of another size": (["@A.mtx", "--upper", "@w.mtx"], "must hold one column of 7 bounds, .* got 61 x 1", 2),
    "bounds in the wrong order": (["@A.mtx", "--lower", "1", "--upper", "0"], "the lower bound must not be above", 2),
    "bounds from a pipe": (["@A.mtx", "--lower", "-"], "cannot read -: many ranks need a file of bounds", 2),
    "bounds, least norm": (["@A.mtx", "--upper", "1", "--minimum-norm"], "--upper: not allowed with --minimum-norm", 2),
    "complex bounds": (["@complex.mtx", "--nonnegative"], "--nonnegative: the numbers must be real, got complex", 2),
    "checkpoint of bounds": (
        ["@A.mtx", "--upper", "1", "--checkpoint", "@c.mtx"],
        "--checkpoint: not allowed with --upper",
        2,
    ),
    "other bounds on one rank": (["@A.mtx", "--lower", "@{rank}l.mtx"], "the lower bound must be the same on all", 2),
    "wide": (["@wide.mtx"], "5 x 7, has fewer rows than columns: ranks need --minimum-norm or --damp for it", 2),
    "no timeout": (["@A.mtx", "--timeout", "0"], "--timeout: must be positive, got 0", 2),
    "no full rank": (["@Deficient.mtx"], "rank 1, not full rank 2", 1),
    "negative damp": (["@A.mtx", "--damp", "-1"], "damp must not be negative", 2),
}


@pytest.fixture(scope="module")
def on_ranks(folder, tmp_path_factory):
    """{name: what the command gave on each rank} by the number of ranks, which work through all once asked for."""
    kept = {}

    def found(size):
        if size not in kept:
            every = [
                [*names(folder, on, f"{name} {size}"), "-o", f"{folder}/x {name} {size}.mtx", "--json"]
                for name, (on, _) in WHOLE.items()
            ]
            every += [names(folder, arguments) for arguments, *_ in REFUSED.values()]
            of_ranks = processes(speak, size, tmp_path_factory.mktemp("ranks"), every)
            kept[size] = dict(zip([*WHOLE, *REFUSED], zip(*of_ranks, strict=True), strict=True))
        return kept[size]

    return found


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("size", SIZES)
def test_as_in_one_process(folder, on_ranks, name, size):
    (status, out, err), *others = on_ranks(size)[name]
    assert (status, err) == (0, "")
    assert others == [(0, "", "")] * (size - 1), "the first rank speaks for all"
    on, alone = WHOLE[name]
    asked = [argument.replace(".part-*", "") for argument in on] if name.startswith("gradient") else alone or on
    want_status, want_out, want_err = spoken([*names(folder, asked, name), "-o", f"{folder}/x {name}.mtx", "--json"])
    assert want_status == 0, want_err
    told, want = json.loads(out), json.loads(want_out)
    for key in ("rows", "columns", "entries", "right_hand_sides", "status", "rank", "at_lower", "at_upper"):
        assert told.get(key) == want.get(key), key
    assert told["residual"] == pytest.approx(want["residual"], rel=1e-10, abs=1e-14)
    assert len(told["ranks"]) == size
    assert sum(told["ranks"]) == told["rows"]
    x, exact = (scipy.io.mmread(folder / f"{file}.mtx") for file in (f"x {name} {size}", f"x {name}"))
    assert x.shape == exact.shape
    assert np.abs(x - exact).max() <= 1e-10 * np.abs(exact).max()
    if name.startswith("gradient"):
        parts = [scipy.io.mmread(folder / f"G {name} {size}.part-{rank}.mtx") for rank in range(size)]
        assert [part.shape[0] for part in parts] == told["ranks"]
        G, exact = scipy.sparse.vstack(parts), scipy.io.mmread(folder / f"G {name}.mtx")
        assert (G.shape, G.nnz) == (exact.shape, exact.nnz)
        assert abs(G - exact).max() <= 1e-10 * abs(exact).max()


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("size", SIZES[1:])
def test_bad_input_on_any_rank_is_one_line_and_one_status_on_all(on_ranks, name, size):
    every, (_, message, wanted) = on_ranks(size)[name], REFUSED[name]
    assert [status for status, *_ in every] == [wanted] * size
    said = [err for _, _, err in every]
    assert said[1:] == [""] * (size - 1)
    assert said[0].count("\n") == 1
    assert re.search(message, said[0]), said[0]


def test_the_line_that_is_named_is_that_of_the_whole_file(folder, on_ranks):
    _, _, alone = spoken(["solve", f"{folder}/nan.mtx"])
    line = re.search("line [0-9]+", alone)[0]
    assert line in on_ranks(3)["NaN"][0][2]


@pytest.mark.skipif(sys.platform != "linux", reason="what a process has read is read from /proc")
def test_no_rank_reads_all(tmp_path):
    g, count = np.random.default_rng(0), 400_000
    rows, columns = g.integers(0, 50_000, count), g.integers(0, 40, count)
    put(tmp_path / "A.mtx", scipy.sparse.coo_array((g.normal(size=count), (rows, columns)), (50_000, 40)))
    size = (tmp_path / "A.mtx").stat().st_size
    for read, held, entries in processes(bytes_read, 3, tmp_path, str(tmp_path / "A.mtx")):
        assert read < size / 3 + 2**22  # besides buffers, and messages of the group
        assert read < 0.6 * size
        assert abs(held - entries / 3) < 0.01 * entries


@pytest.fixture
def rank_of_one():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("rank_of_one")
@pytest.mark.parametrize("command", ["info", "plot", "bench", "demo"])
def test_other_commands_are_for_one_process(folder, command):
    given = [f"{folder}/A.mtx"] * (command in ("info", "plot")) + ["-o", f"{folder}/p.png"] * (command == "plot")
    status, out, err = spoken([command, *given])
    assert (status, out) == (2, "")
    assert err == f"functional_lstsq: {command} is for one process, and not for the ranks of torchrun\n"


def test_torchrun(folder, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = str(Path(fl.__file__).parents[1])
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run += ["-m", "functional_lstsq", "solve", f"{folder}/A.mtx", f"{folder}/b.mtx", "-o", f"{tmp_path}/x.mtx"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("status           converged") == 1
    assert spoken(["solve", f"{folder}/A.mtx", f"{folder}/b.mtx", "-o", f"{tmp_path}/alone.mtx"])[0] == 0
    x, exact = (scipy.io.mmread(tmp_path / name) for name in ("x.mtx", "alone.mtx"))
    assert np.abs(x - exact).max() <= 1e-10 * np.abs(exact).max()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.mtx", "x.mtx"]
