"""The command as a process: signals, from before the library is imported, and streams that are closed.

Nothing but the standard library is imported here, and nothing is done where the library is imported by a program.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME = "functional-lstsq"
# How a process ends that a signal ends, as shells have it: 128 and the number of the signal.
_WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
unfinished: set[str] = set()  # files that are being written, to be removed where a signal ends the process
as_json = False  # whether an error is an object on standard output, too
ending = False  # by a signal: nothing else is to be told
leaving: int | None = None  # the status to end with, once all is told: torchrun ends other ranks as soon as one has


def is_running() -> bool:
    """Whether this process is the command, and not a program that imports the library."""
    if sys.argv[:1] == ["-m"]:  # of `python -m`, while the package is imported
        options = sys.orig_argv[1:]
        return "-m" in options and options[options.index("-m") + 1].split(".")[0] == "functional_lstsq"
    started = Path(sys.argv[0]) if sys.argv else Path()
    return started.stem == NAME or started.parts[-2:] == ("functional_lstsq", "__main__.py")


def begin() -> None:
    """End on a signal with one line and the status of `COMMAND --help`, and without half a file."""
    global as_json
    as_json = "--json" in sys.argv[1:]  # until the options are parsed
    for number in (0, 1, 2):  # a file that is opened now must not be taken for a stream that was closed
        try:
            os.fstat(number)
        except OSError:
            while os.open(os.devnull, os.O_RDWR) < number:
                pass
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    for name in _WORDS:
        kind = getattr(signal, name, None)
        # What is ignored stays so, as under nohup.
        if kind is not None and signal.getsignal(kind) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(kind, _end)


def _end(number: int, _frame: Any) -> None:
    global ending
    ending = True
    for name in list(unfinished):
        Path(name).unlink(missing_ok=True)
    if leaving is not None:
        os._exit(leaving)
    said, status = _WORDS[signal.Signals(number).name], 128 + number
    # Straight to the descriptors: the streams may be in the middle of something.
    clear = b"\r\x1b[K" if os.isatty(2) else b""
    _write(2, clear + f"functional_lstsq: {said}\n".encode())
    if as_json:
        _write(1, (json.dumps({"error": said, "exit": status}) + "\n").encode())
    os._exit(status)


def _write(descriptor: int, text: bytes) -> None:
    with contextlib.suppress(OSError):
        os.write(descriptor, text)


def abandon(stream: Any) -> None:
    """Let what is left in a stream that cannot be written to go nowhere, instead of failing again at the end."""
    if stream is not None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def watched(work: Callable[[], int]) -> int:
    """`work()`, in a thread: native code that it is in would keep the main thread from seeing a signal."""
    result: list[Any] = [None, None]

    def run() -> None:
        try:
            result[0] = work()
        except BaseException as error:
            result[1] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            abandon(stream)
    if result[1] is not None:
        raise result[1]
    return result[0]


if is_running():
    begin()
