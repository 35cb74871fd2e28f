"""The environment of the peers, and what the comparison runs on."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from client import Client, Failed

_HERE = Path(__file__).parent


def peers_python(given: Path | None) -> Path:
    """The interpreter of the environment of the peers, which is made where none is given."""
    if given is not None:
        python = given / "bin" / "python"
        if not python.exists():
            raise SystemExit(f"no interpreter at {python}")
        return python
    folder = _HERE / ".peers"
    python, done = folder / "bin" / "python", folder / "installed.txt"
    lines = (_HERE / "peers.txt").read_text()
    # The peers get the same torch as ours.
    packages = [f"torch=={importlib.metadata.version('torch').split('+')[0]}"]
    packages += [line.strip() for line in lines.splitlines() if line.strip() and not line.startswith("#")]
    wanted = "\n".join(packages)
    if done.exists() and done.read_text() == wanted:
        return python
    print(f"making the environment of the peers, {folder}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for package in packages:  # in turn: one that cannot be installed is missing, the others are not
        command = [str(python), "-m", "pip", "install", "--quiet", package]
        outcome = subprocess.run(command, stdout=sys.stderr, check=False)
        if outcome.returncode:
            print(f"{package} could not be installed", file=sys.stderr)
    done.write_text(wanted)
    return python


@contextlib.contextmanager
def beside(count: int) -> Iterator[None]:
    """As many processes that do nothing but keep a core busy, as on a machine that is shared."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def describe(clients: dict[str, Client]) -> list[str]:
    """Lines on the machine, the threads and the versions; asks every contestant, and so starts it."""
    lines = [
        f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}, {_processor()}, {os.cpu_count()} cores, "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    ]
    threads = {name: os.environ[name] for name in os.environ if name.endswith("_NUM_THREADS")}
    lines.append(f"thread settings in the environment: {threads or 'none'}")
    for name, client in clients.items():
        try:
            known = client.about()
        except Failed as failure:
            lines.append(f"{name}: {failure}")
            continue
        parts = [" ".join(pair) for pair in known["versions"].items()]
        if "threads" in known:
            parts.append(f"torch.get_num_threads() = {known['threads']}")
        parts += known.get("parallel", []) + known.get("blas", [])
        lines.append(f"{name}: {'; '.join(parts)}")
    return lines


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"
