"""What a command cannot do with what it was given."""

from __future__ import annotations


class BadInput(Exception):
    """Something the user gave cannot be used; the message is one line."""


def reason_of(error: BaseException) -> str:
    """What went wrong, in a line: of errors of the system its own words."""
    said = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
    return said[:1].lower() + said[1:] if said[1:2].islower() else said
