"""`demo --ranks`: the same answer from one process and from several, and what the others say when one is killed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import functional_lstsq as fl
from functional_lstsq.cli import main

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch has no gloo"
)


def ranks_of(folder):
    """The processes of a demo that are there, by their command lines."""
    return [
        path.parent.name
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if f"{folder}".encode() in path.read_bytes() and b"demo_ranks" in path.read_bytes()
    ]


@pytest.fixture
def demo(tmp_path):
    """A started demo, whose ranks can be told by its folder."""
    root = str(Path(fl.__file__).parents[1])
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "functional_lstsq", "demo", "--ranks", "2", "--json"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    yield process
    process.kill()
    process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
def test_it_shows_the_same_answer_and_an_error(demo, tmp_path):
    out, err = demo.communicate(timeout=200)
    assert demo.returncode == 0, err
    told = json.loads(out)
    assert told["rows"] == [12000, 12000]
    assert max(told["difference"], told["gradient_difference"]) < 1e-10
    assert len(told["lost"]) == 1
    assert told["lost"][0].startswith("rank 0 of 2 lost another one")
    assert told["seconds"] < 20
    assert not ranks_of(tmp_path)
    assert not list(tmp_path.glob("tmp*"))


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
def test_no_rank_outlives_a_demo_that_is_killed(demo, tmp_path):
    end = time.monotonic() + 100
    while len(ranks_of(tmp_path)) < 2:
        assert time.monotonic() < end
        assert demo.poll() is None
        time.sleep(0.05)
    demo.kill()
    while ranks_of(tmp_path):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("count", [1, 13])
def test_too_few_or_many_ranks(capsys, count):
    assert main(["demo", "--ranks", str(count)]) == 2
    assert f"argument --ranks: must be from 2 to 12, got {count}" in capsys.readouterr().err
