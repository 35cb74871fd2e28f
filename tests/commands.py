"""What tests/test_cli_ranks.py asks of the command line on several ranks: `spoken` for each command, in one group."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import torch
from sharded import start

from functional_lstsq.cli import command, main


def spoken(arguments):
    """(status, standard output, standard error) of the command line, called in this process."""
    out, err = io.StringIO(), io.StringIO()
    command.leaving = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    return status, out.getvalue(), err.getvalue()


def speak(rank, size, folder, every):
    """All commands on this rank of a group, by its number where they name it; what each gave is left in the folder."""
    start(rank, size, folder, 60)
    torch.set_default_dtype(torch.float32)
    named = [[argument.replace("{rank}", str(rank)) for argument in arguments] for arguments in every]
    torch.save([spoken(arguments) for arguments in named], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def as_rank(rank, size, folder, arguments, **how):
    """The command line as a process that is started as torchrun starts one, but for the port, which is a given one."""
    port = how.pop("port")
    told = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    environment = {**os.environ, **{name: str(value) for name, value in told.items()}, "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = str(Path(command.__file__).parents[2])
    line = [sys.executable, "-m", "functional_lstsq", *arguments]
    return subprocess.Popen(line, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


def bytes_read(rank, size, folder, name):
    """How many bytes this rank has read of a file, and how many entries it has in the end."""
    from functional_lstsq.cli.shared_files import read_matrix
    from functional_lstsq.distributed.ranks import Ranks

    start(rank, size, folder, 60)
    of_group = Ranks.of(None)

    def count():
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("rchar")))

    before = count()
    held = read_matrix(name, of_group)
    torch.save((count() - before, held.matrix.nnz, held.entries), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
