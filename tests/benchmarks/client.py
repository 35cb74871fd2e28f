"""The other end of worker.py: a contestant's process, asked one thing at a time, within a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

_START = 300.0  # seconds to import, to prepare and to compile


class Failed(Exception):
    """A contestant has no answer; the message is for the table."""


class TooLate(Failed):
    """It took longer than the limit, and was stopped."""


class Client:
    """One contestant.

    Args:
        contestant: its name in worker.py.
        python: the interpreter of its environment, or None where there is none.
        folder: for arrays on their way, and for what the process prints.
        limit: seconds that a call may take.
    """

    def __init__(self, contestant: str, python: Path | None, folder: Path, limit: float):
        self.contestant, self.python, self.folder, self.limit = contestant, python, folder, limit
        self.process: subprocess.Popen | None = None
        self.known: dict[str, Any] | str | None = None

    def about(self) -> dict[str, Any]:
        """Versions and threads; raises `Failed` where the contestant cannot be had. Asked once."""
        if self.known is None:
            try:
                self.known = self._ask({"do": "about"}, _START)["about"]
            except Failed as failure:
                self.known = str(failure)
                self.stop()
        if isinstance(self.known, str):
            raise Failed(self.known)
        return self.known

    def forget(self) -> None:
        """Drop all tasks."""
        if self.process is not None:
            with contextlib.suppress(Failed):  # a process that has died has forgotten them too
                self._ask({"do": "forget"}, _START)

    def load(self, task: str, work: str, problem: Path, options: dict[str, Any]) -> None:
        """Prepare a task, compilation included."""
        request = {"do": "load", "task": task, "work": work, "problem": str(problem), "options": options}
        self._ask(request, max(_START, self.limit))

    def call(self, task: str, times: int = 1, save: Path | None = None) -> float:
        """Seconds of a call, the mean of so many; its arrays go to `save`."""
        request = {"do": "call", "task": task, "times": times, "save": save and str(save)}
        return self._ask(request, self.limit * times)["seconds"]

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _ask(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        if self.process is None:
            if request["do"] == "call":
                raise Failed("stopped")
            self._start()
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._died()
        answer = json.loads(self._line(limit))
        if "missing" in answer:
            raise Failed("not installed")
        if "error" in answer:
            raise Failed("failed: " + answer["error"].split("\n")[0][:120])
        return answer

    def _start(self) -> None:
        if self.python is None:
            raise Failed("not installed")
        worker = Path(__file__).with_name("worker.py")
        command = [str(self.python), str(worker), self.contestant]
        with self._log().open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)

    def _line(self, limit: float) -> bytes:
        assert self.process is not None
        assert self.process.stdout is not None
        source, line, end = self.process.stdout.fileno(), b"", time.monotonic() + limit
        while not line.endswith(b"\n"):
            if not select.select([source], [], [], max(0.0, end - time.monotonic()))[0]:
                self.stop()
                raise TooLate(f">{limit:.0f} s")
            part = os.read(source, 65536)
            if not part:
                self._died()
            line += part
        return line

    def _died(self) -> None:
        assert self.process is not None
        code = self.process.wait()
        self.process = None
        said = self._log().read_text(errors="replace").strip().split("\n")[-1]
        raise Failed(f"ended with {code}: {said[:120]}")

    def _log(self) -> Path:
        return self.folder / f"{self.contestant}.log"
