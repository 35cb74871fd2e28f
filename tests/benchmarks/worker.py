"""A contestant in a process of its own: JSON lines in, JSON lines out, arrays by way of .npz files.

Run as `python worker.py CONTESTANT` by the interpreter of the environment that has what the contestant needs.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

MODULES = {
    "ours": "ours",
    "torchsparsegradutils": "torch_peers",
    "torch dense": "torch_peers",
    "matfree": "jax_peers",
    "lineax": "jax_peers",
    "scipy": "scipy_peers",
    "spqr": "scipy_peers",
    "torch-sla": "torch_peers",
    "within": "effects_peer",
    "optimistix": "fits",
}


def main(contestant: str) -> None:
    """Answer requests until standard input ends."""
    # Whatever a library prints goes to stderr, so that it cannot end up among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    tasks: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = _answer(contestant, request, tasks)
        except ImportError as error:
            answer = {"missing": str(error)}
        except Exception as error:  # whatever goes wrong in a contestant is told, not fatal
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(contestant: str, request: dict[str, Any], tasks: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    module = importlib.import_module(MODULES[contestant])
    if request["do"] == "about":
        return {"about": module.about(contestant)}
    if request["do"] == "forget":
        tasks.clear()
        return {}
    if request["do"] == "load":
        with np.load(request["problem"]) as file:
            problem = dict(file)
        works = module.WORKS[contestant]
        tasks[request["task"]] = works[request["work"]](problem, **request["options"])
        return {}
    run = tasks[request["task"]]
    start = time.perf_counter()
    for _ in range(request["times"]):
        result = run()
    seconds = (time.perf_counter() - start) / request["times"]
    if request["save"]:
        np.savez(request["save"], **{name: np.asarray(array) for name, array in result.items()})
    return {"seconds": seconds}


if __name__ == "__main__":
    main(sys.argv[1])
