"""`demo --ranks N`: processes of its own on the loopback device, which have some rows each and solve for all together.

One process solves the same problem alone, for comparison. Then the last rank is killed in the middle of a solve.
Each rank is `python -m functional_lstsq.cli.demo_ranks FOLDER RANK SIZE`; it ends where its standard input does, so
that none outlives the demo, however that ends.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import CGLS, SparseMatrix, SparsePattern, distributed, lstsq, progress, solve, vstack
from ..solvers.watching import Step
from .errors import BadInput
from .output import Output

_BLOCKS, _ROWS, _COLUMNS, _ENTRIES = 12, 2_000, 1_000, 6  # blocks of rows, rows of one, columns, entries of a row
_TIMEOUT = 20.0  # seconds that ranks wait for one another
_PATIENCE = 120.0  # seconds that the demo waits for a line of a rank
_LAST = 5  # iteration of a rank that is killed
_SOLVER = CGLS()  # which iterates, and so can be seen to be lost in the middle
MOST = _BLOCKS  # ranks


def block(number: int) -> tuple[SparseMatrix, Tensor]:
    """Some rows of A and b, which can be made without the others."""
    generator = torch.Generator().manual_seed(number)
    columns = torch.rand(_ROWS, _COLUMNS, generator=generator).topk(_ENTRIES).indices.reshape(-1)
    values = torch.randn(_ROWS * _ENTRIES, generator=generator, dtype=torch.float64)
    pattern = SparsePattern(torch.stack([torch.arange(_ROWS).repeat_interleave(_ENTRIES), columns]), (_ROWS, _COLUMNS))
    return SparseMatrix(values, pattern), torch.randn(_ROWS, generator=generator, dtype=torch.float64)


def rows(rank: int, size: int) -> tuple[SparseMatrix, Tensor]:
    """(A, b) of a rank: blocks that lie together."""
    blocks = [block(k) for k in range(_BLOCKS * rank // size, _BLOCKS * (rank + 1) // size)]
    return vstack([A for A, _ in blocks]), torch.cat([b for _, b in blocks])


# A rank.


def work(folder: str, rank: int, size: int) -> None:
    """Solve with the others, tell what came out, and solve again, which the last rank does not live to end."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store, timeout = dist.FileStore(f"{folder}/met", size), datetime.timedelta(seconds=_TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    mine, b = rows(rank, size)
    A = distributed.shard_rows(mine)
    found = solve(A, b, solver=_SOLVER)
    by_b = torch.func.grad(lambda b: lstsq(A, b, solver=_SOLVER).sum())(b)
    torch.save({"x": found.x, "by_b": by_b}, f"{folder}/{rank}.pt")
    _say(rows=mine.shape[0], iterations=int(found.info.iterations), forward_error=float(found.info.forward_error))

    def stall(step: Step) -> None:
        if rank == size - 1 and step.phase == "solve" and step.iteration == _LAST:
            _say(iteration=step.iteration)
            time.sleep(_PATIENCE)  # to be killed here

    try:
        with progress(stall):
            solve(A, b, solver=_SOLVER)
        _say(error="none")
    except distributed.RankError as error:
        _say(error=str(error))
    os._exit(0)  # what a group that has lost a rank would end with is told already


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


# The demo.


def run(size: int, out: Output) -> int:
    """Start the ranks, compare, kill one, tell."""
    if not (dist.is_available() and dist.is_gloo_available()):
        raise BadInput("argument --ranks: this torch has no gloo, by which processes would come together")
    A, b = rows(0, 1)
    alone = solve(A, b, solver=_SOLVER)
    by_b = torch.func.grad(lambda b: lstsq(A, b, solver=_SOLVER).sum())(b)
    processes: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(size):
                line = [sys.executable, "-m", __name__, folder, str(rank), str(size)]
                processes.append(subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            lines = [_Lines(process.stdout) for process in processes]
            told = [line.next() for line in lines]
            results = [torch.load(f"{folder}/{rank}.pt") for rank in range(size)]
            middle = lines[-1].next()
            start = time.perf_counter()
            processes[-1].kill()
            lost = [line.next()["error"] for line in lines[:-1]]
            seconds = time.perf_counter() - start
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.communicate()
    if any(not torch.equal(result["x"], results[0]["x"]) for result in results):
        return out.error("the ranks have different solutions", 1)
    difference = _apart(results[0]["x"], alone.x)
    of_gradient = _apart(torch.cat([result["by_b"] for result in results]), by_b)
    if not max(difference, of_gradient) < 1e-8 or any(not error.startswith("rank ") for error in lost):
        return out.error(f"ranks differ from one process by {difference:.0e}, {of_gradient:.0e}; errors: {lost}", 1)
    counts = [of_rank["rows"] for of_rank in told]
    out.line(f"{A.shape[0]} x {A.shape[1]}, {A.nnz} entries, in one process and on {size} ranks.\n")
    out.table(
        [
            ("rows of each rank", ", ".join(map(str, counts))),
            ("iterations", f"{int(alone.info.iterations)} alone, {told[0]['iterations']} on ranks"),
            (
                "estimated error",
                f"{float(alone.info.forward_error):.1e} alone, {told[0]['forward_error']:.1e} on ranks",
            ),
            ("x, alone and on ranks", f"relative difference {difference:.0e}; the same bits on all ranks"),
            ("gradient of sum(x) by b", f"relative difference {of_gradient:.0e}; each rank has that of its rows"),
        ]
    )
    out.line(
        f"\nRank {size - 1} is killed in its iteration {middle['iteration']}. After {seconds:.2f} s the others raise:"
    )
    for error in lost:
        out.line(f"  RankError: {error.partition(' ([')[0]}")
    out.record(
        command="demo", rows=counts, difference=difference, gradient_difference=of_gradient, lost=lost, seconds=seconds
    )
    return 0


class _Lines:
    """What a rank says, a line at a time; a rank that says nothing for too long is an error."""

    def __init__(self, stream: IO[bytes] | None):
        self.stream, self.line = stream, b""

    def next(self) -> dict[str, Any]:
        """The next line."""
        assert self.stream is not None
        reader = threading.Thread(target=self._read, daemon=True)
        reader.start()
        reader.join(_PATIENCE)
        if reader.is_alive() or not self.line:
            raise BadInput("a rank of the demo has ended or stalled")
        return json.loads(self.line)

    def _read(self) -> None:
        assert self.stream is not None
        self.line = b""
        self.line = self.stream.readline()


def _apart(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


if __name__ == "__main__":
    work(str(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
