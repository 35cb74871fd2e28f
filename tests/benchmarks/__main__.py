"""Compare functional_lstsq with its peers: `python tests/benchmarks` prints a Markdown table of ratios of times.

Every contestant works in a process of its own, with the threads it takes by default. Calls alternate: ours, ours with
its pattern reused, a peer; times and ratios are medians over such rounds, and a ratio above 1 says that ours is the
faster one. Each error is the largest relative one of solution and gradients (2-norm) against a reference that owes
nothing to the library.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import growth
import ranks
from cases import CASES, Case
from client import Client
from compare import HEADER, compare, heading, markdown
from environment import beside, describe, peers_python
from worker import MODULES

_OURS = ("ours", "torch dense", "scipy")  # what they need is there where the library is

_NOTE = (
    "tolerances of the iterations: our own default; 1e-9 for matfree, lineax and SciPy (1e-6 in JAX's float32); "
    "torchsparsegradutils as it comes (1e-6), torch-sla too (a factor of A^T A where it takes one)"
)


def main() -> None:
    """Everything that the arguments ask for."""
    arguments = _arguments()
    names = [case.name for case in CASES] + [growth.ITERATION, growth.GROWTH, ranks.RANKS]
    names = [arguments.only] if arguments.only in names else [name for name in names if arguments.only in name]
    chosen = [case for case in CASES if case.name in names and (arguments.all or not case.large)]
    extras = [name for name in (growth.ITERATION, growth.GROWTH, ranks.RANKS) if name in names]
    if arguments.list:
        for case in CASES:
            print(f"{case.name}: {', '.join(case.peers + case.forward)}{' (--all)' if case.large else ''}")
        print(growth.ITERATION, growth.GROWTH, ranks.RANKS, sep="\n")
        return
    if not chosen and not extras:
        sys.exit(f"no case has {arguments.only!r} in its name; see --list and --all")
    needed = {name for case in chosen for name in case.peers + case.forward} | {"ours"}
    peers = None if needed <= set(_OURS) else peers_python(arguments.peers)
    with tempfile.TemporaryDirectory() as name, beside(arguments.busy):
        folder = Path(name)
        clients = {
            name: Client(name, Path(sys.executable) if name in _OURS else peers, folder, arguments.limit)
            for name in MODULES
            if name in needed
        }
        try:
            _run(chosen, extras, clients, arguments, folder)
        finally:
            for client in clients.values():
                client.stop()


def _run(
    chosen: list[Case], extras: list[str], clients: dict[str, Client], arguments: argparse.Namespace, folder: Path
) -> None:
    others = [f"{arguments.busy} other processes that keep a core busy each"] if arguments.busy else []
    print("\n".join(f"- {line}" for line in [*describe(clients), *others, _NOTE]), flush=True)
    if chosen:
        print("\n" + heading(HEADER), flush=True)
    for case in chosen:  # a row is printed as soon as it is known
        print(markdown(compare(case, clients, arguments.repeats, folder)), flush=True)
    if growth.ITERATION in extras:
        print("\n" + growth.iteration(clients["ours"], arguments.repeats, folder), flush=True)
    if growth.GROWTH in extras:
        print("\n" + growth.growth(clients["ours"], arguments.repeats, folder, arguments.plot), flush=True)
    if ranks.RANKS in extras:
        print("\n" + ranks.report(arguments.repeats), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/benchmarks", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", metavar="WORD", default="", help="cases whose name contains it, or is it")
    parser.add_argument("--all", action="store_true", help="with the cases that take long")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and end")
    parser.add_argument("--busy", metavar="N", type=int, default=0, help="other processes that keep a core busy each")
    parser.add_argument("--repeats", metavar="N", type=int, default=5, help="pairs of calls (default: %(default)s)")
    parser.add_argument("--limit", metavar="S", type=float, default=60.0, help="seconds a call may take (default: 60)")
    parser.add_argument("--peers", metavar="PATH", type=Path, help="an environment that has the peers already")
    plot = Path(__file__).with_name("growth.png")
    parser.add_argument("--plot", metavar="FILE", type=Path, default=plot, help="where the plot goes (growth.png here)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
