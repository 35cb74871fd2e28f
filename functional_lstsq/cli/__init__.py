"""The command line: sparse least squares from the shell, for matrices in files of many formats.

- command: the command as a process, with its signals and streams. The package imports it before torch, since a signal
  may come while torch is imported; so it imports the standard library alone, and nothing is imported here.
- program: the parser, and how every error becomes one line and an exit status.
- solve, info, plot, bench, demo: one command each.
- ranks, sharded, shared_files: `solve` on the ranks that torchrun starts, and how they read files together.
  checkpoints: x of a long solve, to go on from. demo_ranks: a demo that starts ranks of its own.
- sources, formats, content, matrix_market, market_header, boeing, tables, binary, mat_file, files, writing: what is
  read and written.
- output, words, errors, timing: how a command speaks.
"""

from __future__ import annotations


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    from . import program  # which imports torch

    return program.run(arguments)
