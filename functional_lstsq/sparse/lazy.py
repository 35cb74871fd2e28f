"""An attribute that is made when it is first asked for, and kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

Made = TypeVar("Made")


class lazy(Generic[Made]):
    """`functools.cached_property` without a lock.

    Up to Python 3.11 that one holds a lock of its class while it computes: a process that is forked while another
    thread computes could never use it again. Two threads may here compute the same twice, which does no harm.
    """

    def __init__(self, make: Callable[[Any], Made]):
        self.make, self.__doc__ = make, make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> lazy[Made]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> Made: ...

    def __get__(self, instance: object | None, owner: type) -> lazy[Made] | Made:
        if instance is None:
            return self
        made = instance.__dict__[self.name] = self.make(instance)  # found there before this is asked again
        return made
