"""The advice of the library, in the words of the command line."""

from __future__ import annotations

from .. import errors

# None for what the command line has no option for.
_WORDS: dict[str, str | None] = {
    errors.LEAST_NORM: "--minimum-norm for the solution of least norm",
    errors.LEAST_NORM_BY_FACTOR: "--minimum-norm with --solver auto, direct or dense for the solution of least norm",
    errors.FIT_OF_LEAST_CHANGE: None,
    errors.BY_FACTOR: "--solver direct or dense",
    errors.BY_CGLS: "--solver cgls",
    errors.OTHER_SOLVER: "another --solver",
    errors.DAMP: "--damp D with D > 0",
    errors.EXTENDED: "--refine extended",
    errors.ITERATIONS: "--solver direct",
    errors.SEE: None,
    errors.MEMORY: None,
    errors.DOUBLE: None,
    errors.NAN: None,
    errors.other_start("x0"): None,
    errors.nearer_start("x0"): None,
    errors.LARGER_THRESHOLD: "a larger --threshold",
}


def line_of(error: BaseException) -> str:
    """One line, with what may be done about it."""
    if isinstance(error, errors.SolveError):
        advice = [told for item in error.advice if (told := _WORDS.get(item, item)) is not None]
        line = f"{error.what}. Try: {'; '.join(advice)}" if advice else error.what
    else:
        line = str(error) or ("out of memory" if isinstance(error, MemoryError) else repr(error))
    return " ".join(line.split())
