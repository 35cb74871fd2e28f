import os

import pytest
import torch
from fuzzing import VARIABLE
from hypothesis import settings

settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")
if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core: threads of several would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """What torch itself draws, in gradcheck, is the same whatever ran before. Tests name their own generators."""
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz-examples", type=int, metavar="N", help="examples of each fuzzer, in place of its own number"
    )


def pytest_configure(config):
    if (examples := config.getoption("--fuzz-examples")) is not None:
        os.environ[VARIABLE] = str(examples)
